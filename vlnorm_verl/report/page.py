"""Tables and figures as one HTML file. Every text is escaped."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlnorm_verl.files import write
from vlnorm_verl.report.style import Figure
from vlnorm_verl.report.table import Table, layout_of

SVG_LIMIT = 400_000  # bytes; a larger figure is put into the page as PNG


@dataclass
class Fold:
    """Parts that are shown when their title is clicked."""

    title: str
    parts: list[Table | Figure | str]


def write_page(path: Path, title: str, intro: list[str], parts: list[Table | Figure | Fold | str]) -> None:
    """One HTML file with everything in it: it opens without a network, on a phone, in the dark and on paper.

    Links to a table's and a figure's files where these are there, beside the page or in tables/ or figures/ under it.

    Args:
        title, intro: the heading, and paragraphs below it.
        parts: in order; a str is a heading, under which the contents list what follows it.
    """
    anchors: set[str] = set()
    contents: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    flat: list[Table | Figure | Fold | str | None] = []  # None: the end of a fold
    for top in parts:
        flat += [top, *top.parts, None] if isinstance(top, Fold) else [top]
    for part in flat:
        if part is None or isinstance(part, Fold):
            shown.append({"kind": "end" if part is None else "fold", "title": part and part.title})
            continue
        kind = "heading" if isinstance(part, str) else "table" if isinstance(part, Table) else "figure"
        text = part if isinstance(part, str) else part.title
        anchor = _anchor(text if isinstance(part, str) else part.name, anchors)
        entry: dict[str, Any] = {"kind": kind, "title": text, "anchor": anchor, "parts": []}
        if isinstance(part, str) or not contents or contents[-1]["kind"] != "heading":
            contents.append(entry)
        else:
            contents[-1]["parts"].append(entry)
        if isinstance(part, Table):
            layout = layout_of(part)
            columns = [
                {"title": column, "numeric": numeric}
                for column, numeric in zip(part.columns, layout.numeric, strict=True)
            ]
            rows = [
                [cell._replace(numeric=numeric) for cell, numeric in zip(row, layout.numeric, strict=True)]
                for row in layout.cells
            ]
            links = _links(path.parent, part.name, ("csv", "json", "md", "tex"))
            entry |= {"columns": columns, "rows": rows, "notes": layout.notes.items(), "foot": part.foot}
            entry |= {"links": links}
        elif isinstance(part, Figure):
            entry |= {"source": _data_address(part), "caption": part.caption}
            entry |= {"links": _links(path.parent, part.name, ("png", "svg"))}
        shown.append(entry)
    write(path, _template().render(title=title, intro=intro, contents=contents, parts=shown))


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("page.html.j2")


def _anchor(text: str, taken: set[str]) -> str:
    stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
    anchor, number = stem, 2
    while anchor in taken:
        anchor, number = f"{stem}-{number}", number + 1
    taken.add(anchor)
    return anchor


def _links(folder: Path, name: str, endings: Iterable[str]) -> list[tuple[str, str]]:
    places = ("", "tables/", "figures/")
    return [
        (ending.upper(), f"{place}{name}.{ending}")
        for ending in endings
        for place in places
        if (folder / f"{place}{name}.{ending}").is_file()
    ]


def _data_address(figure: Figure) -> str:
    """An image in an address of its own: ids of several inline SVGs would clash, and a script in one can't run."""
    svg = figure.svg.encode()
    kind, content = ("svg+xml", svg) if len(svg) <= SVG_LIMIT else ("png", figure.png)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
