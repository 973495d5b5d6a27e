"""Tables, charts and figures as one HTML file. Every text is escaped, and nothing but the page's own script runs."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlnorm_verl.files import write
from vlnorm_verl.report import svg
from vlnorm_verl.report.charts import Chart
from vlnorm_verl.report.examples import Example
from vlnorm_verl.report.labels import Look
from vlnorm_verl.report.style import DOTS, Figure
from vlnorm_verl.report.table import Table, layout_of
from vlnorm_verl.report.verdict import Verdict
from vlnorm_verl.report.writers import FORMATS

SVG_LIMIT = 400_000  # bytes; a larger figure is put into the page as PNG
FOLDER = Path(__file__).parent


@dataclass
class Lead:
    """What a report begins with. looks: the page's methods, in the order of their places; several: on several
    comparisons at once."""

    verdicts: Sequence[Verdict]
    several: str
    look_at: dict[str, str]
    looks: dict[str, Look]


@dataclass
class Fold:
    """Parts that are shown when their title is clicked."""

    title: str
    parts: list[Part]


class Examples(NamedTuple):
    """Responses of one method. where: the run and the step."""

    title: str
    where: str
    responses: list[Example]


Part = Table | Figure | Chart | Fold | Examples


def write_page(path: Path, title: str, intro: list[str], parts: Sequence[Part], lead: Lead | None = None) -> None:
    """One HTML file with everything in it: it opens without a network, on a phone, in the dark and on paper.

    A table can be saved from it in every format, also from a copy that was mailed.

    Args:
        title, intro: the heading, and paragraphs below it.
        parts: in order.
        lead: what a report begins with; charts need its looks.
    """
    page = _Page(lead.looks if lead else {})
    shown = [page.entry(part) for part in parts]
    script = (FOLDER / "charts.js").read_text() if page.charts else ""
    text = _template().render(
        title=title,
        intro=intro,
        lead=lead,
        frame=svg.FRAME,
        looks=list(page.looks.values()) if page.charts else [],
        parts=shown,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=svg.data(page.charts, page.looks) if page.charts else None,
    )
    write(path, text)


@dataclass
class _Page:
    """What the template shows of each part. charts: those met so far, in order."""

    looks: dict[str, Look]
    # What the script looks up.
    anchors: set[str] = field(default_factory=lambda: {"data", "tools", "legend", "tip", "frame"})
    charts: list[Chart] = field(default_factory=list)

    def entry(self, part: Part, alone: bool = False) -> dict[str, Any]:
        """alone: whether a fold has nothing else in it, so that its title stands above this already."""
        anchor = "" if alone else self._anchor(getattr(part, "name", part.title))
        entry: dict[str, Any] = {"title": part.title, "anchor": anchor}
        if isinstance(part, Table):
            entry |= {"kind": "table", **self._table(part)}
        elif isinstance(part, Figure):
            entry |= {"kind": "figure", "source": _data_address(part), "caption": part.caption}
        elif isinstance(part, Chart):
            self.charts.append(part)
            panels = [
                {"title": shown.title, "svg": svg.panel(shown, self.looks), "note": shown.note} for shown in part.panels
            ]
            entry |= {"kind": "chart", "panels": panels, "caption": part.caption}
        elif isinstance(part, Fold):
            alone = len(part.parts) == 1 and not isinstance(part.parts[0], Fold)
            entry |= {"kind": "fold", "parts": [self.entry(inner, alone) for inner in part.parts]}
        else:
            entry |= {"kind": "examples", "where": part.where, "responses": part.responses}
        return entry

    def _table(self, table: Table) -> dict[str, Any]:
        layout = layout_of(table)
        drawn = [row[table.columns.index(table.forest)] for row in table.rows] if table.forest in table.columns else []
        limit = svg.axis_limit(drawn)
        columns = [
            {"title": column, "class": "drawn" if column == table.forest else "number" if numeric else ""}
            for column, numeric in zip(layout.columns, layout.numeric, strict=True)
        ]
        texts = {ending: make(table).encode(errors="replace") for ending, make in FORMATS.items()}
        files = {
            ending: f"data:text/plain;charset=utf-8;base64,{base64.b64encode(text).decode()}"
            for ending, text in texts.items()
        }
        return {
            "name": table.name,
            "columns": columns,
            "rows": layout.cells,
            "axis": svg.difference_axis(limit),
            "differences": [svg.difference(cell, limit) for cell in drawn],
            "grouped": table.grouped,
            "notes": layout.notes.items(),
            "foot": [*table.foot, *([DOTS] if drawn else [])],
            "files": files,
        }

    def _anchor(self, text: str) -> str:
        stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
        anchor, number = stem, 2
        while anchor in self.anchors:
            anchor, number = f"{stem}-{number}", number + 1
        self.anchors.add(anchor)
        return anchor


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template("page.html.j2")


def _data_address(figure: Figure) -> str:
    """An image in an address of its own: ids of several inline SVGs would clash, and a script in one can't run."""
    content = figure.svg.encode()
    kind, content = ("svg+xml", content) if len(content) <= SVG_LIMIT else ("png", figure.png)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
