"""How tables and figures look, and the files that they become: one home for the report and the gradient lab.

A table becomes NAME.md (GitHub), NAME.csv, NAME.json and NAME.tex (booktabs); a figure NAME.png and NAME.svg; a page is
one HTML file that needs no network. The same input gives the same bytes. Titles, cells and feet are plain text whose
origin isn't trusted: each writer escapes what its format would read as markup.

Colours are Okabe & Ito's (2008), which differ under the common colour-vision deficiencies too; line style and marker
tell the methods apart without colour.

Not covered: what is in a table or a figure (tables.py, figures.py). LaTeX can't print every letter of Unicode: a
character that a plain pdfLaTeX lacks is written as its code point.
"""

from __future__ import annotations

import base64
import csv
import functools
import importlib.util
import io
import json
import math
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlnorm_verl.report.estimates import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure
    from rich.console import Console

Cell = str | int | float | Estimate | None
ABSENT = "–"
SVG_LIMIT = 400_000  # bytes; a larger figure is put into the page as PNG
FILE_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def missing_libraries() -> str | None:
    """What to type where the libraries of the report and the lab are not installed."""
    names = [name for name in ("matplotlib", "scipy", "jinja2") if importlib.util.find_spec(name) is None]
    return f"{', '.join(names)} not installed: pip install 'vlnorm-verl[report]'" if names else None


def _one_line(text: str) -> str:
    """Without line breaks, control characters and marks that turn the direction of what follows."""
    return "".join(c for c in " ".join(text.split()) if unicodedata.category(c) not in ("Cc", "Cf"))


def _check_name(name: str) -> None:
    if not FILE_STEM.fullmatch(name):
        raise ValueError(f"name={name!r} is no file stem. Accepted: letters, digits, '.', '_' and '-'.")


# ---------------------------------------------------------------------------------------------------------- tables


@dataclass
class Table:
    """A table of R rows and C columns.

    Args:
        name: file stem, e.g. "countdown".
        title: one line.
        columns: [C] headings.
        rows: [R][C] cells. None and NaN print as "–"; an Estimate as "0.615 [0.598, 0.632]", its note below the table.
        foot: sentences below the table: definitions, caveats.
        digits: decimals of a float.
        digits_of: the same of single columns, by heading.

    Raises:
        ValueError: `name` is no file stem, or a row hasn't one cell for each column.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    foot: list[str] = field(default_factory=list)
    digits: int = 3
    digits_of: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name(self.name)
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name!r}, row {index}: {len(row)} cells for {len(self.columns)} columns.")


class _Shown(NamedTuple):
    """A cell as every writer shows it. `mark` is the letter of its note."""

    text: str
    interval: str = ""
    mark: str = ""
    numeric: bool = False


@dataclass
class _Layout:
    """A table as text: [R][C] cells, which of the C columns hold numbers, and the notes by their letters."""

    cells: list[list[_Shown]]
    numeric: list[bool]
    notes: dict[str, str]


def _number(value: float, digits: int) -> str:
    if isinstance(value, Integral):
        return str(int(value)).replace("-", "−")
    if math.isnan(value):
        return ABSENT
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}"
    # A difference of −0.0004 isn't "−0.000".
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def _letters(index: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def _layout(table: Table) -> _Layout:
    marks: dict[str, str] = {}

    def show(cell: Cell, digits: int) -> _Shown:
        if cell is None:
            return _Shown(ABSENT, numeric=True)
        if isinstance(cell, Estimate):
            interval = ""
            if not (math.isnan(cell.low) or math.isnan(cell.high)):
                interval = f"[{_number(cell.low, digits)}, {_number(cell.high, digits)}]"
            mark = marks.setdefault(cell.note, _letters(len(marks))) if cell.note else ""
            return _Shown(_number(cell.value, digits), interval, mark, numeric=True)
        if isinstance(cell, Real):
            return _Shown(_number(cell, digits), numeric=True)
        return _Shown(_one_line(str(cell)))

    digits = [table.digits_of.get(column, table.digits) for column in table.columns]
    cells = [[show(cell, of) for cell, of in zip(row, digits, strict=True)] for row in table.rows]
    # A word among numbers ("not reached") leaves a column one of numbers.
    numeric = [
        any(isinstance(row[index], (Real, Estimate)) for row in table.rows) for index in range(len(table.columns))
    ]
    return _Layout(cells, numeric, {mark: note for note, mark in marks.items()})


def write_tables(tables: Iterable[Table], out: Path) -> None:
    """NAME.md, NAME.csv, NAME.json and NAME.tex of each, in the folder `out`, which is made."""
    for table in tables:
        for ending, text in (
            ("md", to_markdown(table)),
            ("csv", to_csv(table)),
            ("json", to_json(table)),
            ("tex", to_latex(table)),
        ):
            _write(out / f"{table.name}.{ending}", text)


def to_markdown(table: Table) -> str:
    """A heading, the table and its feet as GitHub's Markdown; `|`, `*`, `<`, `$` … print as they are."""
    layout = _layout(table)

    def line(texts: Iterable[str]) -> str:
        return f"| {' | '.join(texts)} |"

    def cell(shown: _Shown) -> str:
        text = " ".join(filter(None, (_markdown(shown.text), shown.interval)))
        return text + (f"<sup>{shown.mark}</sup>" if shown.mark else "")

    lines = [f"### {_markdown(table.title)}", "", line(map(_markdown, table.columns))]
    lines.append(line("---:" if numeric else "---" for numeric in layout.numeric))
    lines += [line(map(cell, row)) for row in layout.cells]
    below = [f"- <sup>{mark}</sup> {_markdown(note)}" for mark, note in layout.notes.items()]
    below += [f"- {_markdown(sentence)}" for sentence in table.foot]
    return "\n".join([*lines, *([""] if below else []), *below]) + "\n"


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", _one_line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_csv(table: Table) -> str:
    """A header and one line a row, numbers in full precision; empty where there is no value.

    A column with an Estimate becomes four: its value, "… low", "… high" and "… note".
    """
    wide = [any(isinstance(row[index], Estimate) for row in table.rows) for index in range(len(table.columns))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        name
        for column, four in zip(table.columns, wide, strict=True)
        for name in ([column, f"{column} low", f"{column} high", f"{column} note"] if four else [column])
    )
    for row in table.rows:
        fields: list[str | int | float | None] = []
        for cell, four in zip(row, wide, strict=True):
            if isinstance(cell, Estimate):
                fields += [_plain(cell.value), _plain(cell.low), _plain(cell.high), cell.note]
            else:
                fields += [_plain(cell), *([None] * 3 if four else [])]
        writer.writerow(fields)
    return buffer.getvalue()


def to_json(table: Table) -> str:
    """{"name", "title", "columns": [C], "rows": [R][C], "foot"}; an Estimate is {"value", "low", "high", "note"}.

    JSON has no NaN and no infinity: both are null.
    """

    def cell(content: Cell) -> Any:
        if isinstance(content, Estimate):
            bounds = {key: _plain(getattr(content, key)) for key in ("value", "low", "high")}
            return {**bounds, "note": content.note}
        return _plain(content)

    content = {
        "name": table.name,
        "title": table.title,
        "columns": table.columns,
        "rows": [[cell(one) for one in row] for row in table.rows],
        "foot": table.foot,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(cell: str | int | float | None) -> str | int | float | None:
    """Python's own types for NumPy's; None for what isn't finite."""
    if isinstance(cell, Integral):
        return int(cell)
    if isinstance(cell, Real):
        return float(cell) if math.isfinite(cell) else None
    return cell


LATEX = {
    **{character: f"\\{character}" for character in "#$%&_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    # "[" after the "\\" of a row would be its optional argument.
    "[": "{[}",
    "]": "{]}",
    "−": r"\ensuremath{-}",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "…": r"\dots{}",
    "’": r"\textquoteright{}",
    "‘": r"\textquoteleft{}",
    "“": r"\textquotedblleft{}",
    "”": r"\textquotedblright{}",
    "§": r"\S{}",
    "\u00a0": "~",
    **{
        character: rf"\ensuremath{{{command}}}"
        for character, command in {
            "±": r"\pm",
            "×": r"\times",
            "·": r"\cdot",
            "√": r"\surd",
            "∞": r"\infty",
            "≈": r"\approx",
            "≠": r"\neq",
            "≤": r"\leq",
            "≥": r"\geq",
            "∝": r"\propto",
            "‖": r"\|",
            "∇": r"\nabla",
            "∑": r"\sum",
            "→": r"\rightarrow",
            "←": r"\leftarrow",
            "°": r"^\circ",
            "²": "^2",
            "³": "^3",
            "Γ": r"\Gamma",
            "Δ": r"\Delta",
            "Θ": r"\Theta",
            "Λ": r"\Lambda",
            "Π": r"\Pi",
            "Σ": r"\Sigma",
            "Φ": r"\Phi",
            "Ψ": r"\Psi",
            "Ω": r"\Omega",
            "α": r"\alpha",
            "β": r"\beta",
            "γ": r"\gamma",
            "δ": r"\delta",
            "ε": r"\varepsilon",
            "ζ": r"\zeta",
            "η": r"\eta",
            "θ": r"\theta",
            "λ": r"\lambda",
            "μ": r"\mu",
            "µ": r"\mu",
            "ν": r"\nu",
            "ξ": r"\xi",
            "π": r"\pi",
            "ρ": r"\rho",
            "σ": r"\sigma",
            "τ": r"\tau",
            "φ": r"\varphi",
            "χ": r"\chi",
            "ψ": r"\psi",
            "ω": r"\omega",
        }.items()
    },
}


def latex_escape(text: str) -> str:
    """Plain text as LaTeX that a plain pdfLaTeX with T1 fonts prints; other characters as "U+4E2D"."""

    def one(character: str) -> str:
        if character in LATEX:
            return LATEX[character]
        # Latin letters up to Extended-A are in the T1 fonts.
        if " " <= character <= "~" or ("À" <= character <= "ž" and unicodedata.category(character)[0] == "L"):
            return character
        return f"U+{ord(character):04X}"

    escaped = "".join(map(one, unicodedata.normalize("NFC", _one_line(text))))
    return re.sub(r"([-,])(?=\1)", r"\1{}", escaped)  # "--" would become a dash, ",," a quotation mark


def to_latex(table: Table) -> str:
    r"""A `table` float with booktabs' rules, \label{tab:NAME}, shrunk to the line if it is wider.

    Its first line is what it needs of the preamble.
    """
    layout = _layout(table)

    def cell(shown: _Shown) -> str:
        text = " ".join(filter(None, map(latex_escape, (shown.text, shown.interval))))
        return text + (rf"\textsuperscript{{{shown.mark}}}" if shown.mark else "")

    def line(texts: Iterable[str]) -> str:
        return f"{' & '.join(texts)} \\\\"

    below = [rf"\textsuperscript{{{mark}}} {latex_escape(note)}" for mark, note in layout.notes.items()]
    below += map(latex_escape, table.foot)
    return "\n".join(
        [
            r"% \usepackage[T1]{fontenc}\usepackage{textcomp}\usepackage{booktabs,graphicx}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_escape(table.title)}}}",
            rf"\label{{tab:{table.name}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{''.join('r' if numeric else 'l' for numeric in layout.numeric)}}}",
            r"\toprule",
            line(map(latex_escape, table.columns)),
            r"\midrule",
            *(line(map(cell, row)) for row in layout.cells),
            r"\bottomrule",
            r"\end{tabular}}",
            *([r"\par\medskip", r"\begin{minipage}{\linewidth}\footnotesize"] if below else []),
            *(rf"{sentence}\par" for sentence in below),
            *([r"\end{minipage}"] if below else []),
            r"\end{table}",
            "",
        ]
    )


def print_table(table: Table, console: Console) -> None:
    """The table, its notes and its feet on a terminal; one that is wider than the terminal as a list of its rows."""
    from rich.measure import Measurement
    from rich.table import Table as RichTable
    from rich.text import Text

    layout = _layout(table)

    def text(shown: _Shown) -> Text:
        interval, mark = f" {shown.interval}" if shown.interval else "", f" ({shown.mark})" if shown.mark else ""
        return Text.assemble(shown.text, (interval + mark, "dim"))

    title = Text(table.title, style="bold")
    printed = RichTable(title=title, title_justify="left")
    for column, numeric in zip(table.columns, layout.numeric, strict=True):
        printed.add_column(Text(column), justify="right" if numeric else "left")
    for row in layout.cells:
        printed.add_row(*map(text, row))
    if Measurement.get(console, console.options.update(max_width=10_000), printed).maximum > console.width:
        printed = RichTable(title=title, title_justify="left", show_header=False)
        for row in layout.cells:
            for column, shown in zip(table.columns, row, strict=True):
                printed.add_row(Text(column, style="dim"), text(shown))
            printed.add_section()
    console.print(printed)
    for mark, note in layout.notes.items():
        console.print(Text(f"({mark}) {note}", style="dim"))
    for sentence in table.foot:
        console.print(Text(sentence, style="dim"))


# --------------------------------------------------------------------------------------------------------- methods

# Okabe & Ito's palette. DAPO's loss aggregation is DAPO Norm's, and no figure has both: they share a colour.
METHOD_COLORS = {
    "vl_norm": "#D55E00",
    "grpo_norm": "#0072B2",
    "dapo_norm": "#009E73",
    "dr_grpo_norm": "#CC79A7",
    "dr_grpo": "#56B4E9",
    "dapo": "#009E73",
    "overlong_filtering": "#000000",
    "soft_punishment": "#E69F00",
}
METHOD_LABELS = {
    "vl_norm": "VL Norm",
    "grpo_norm": "GRPO Norm",
    "dapo_norm": "DAPO Norm",
    "dr_grpo_norm": "Dr. GRPO Norm",
    "dr_grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "overlong_filtering": "DAPO + overlong filtering",
    "soft_punishment": "DAPO + soft punishment",
}
# verl's names for them.
MODES = {
    "token-mean": "dapo_norm",
    "seq-mean-token-mean": "grpo_norm",
    "seq-mean-token-sum-norm": "dr_grpo_norm",
}
LINE_STYLES: dict[str, str | tuple[int, tuple[float, ...]]] = {
    "vl_norm": "-",
    "grpo_norm": "--",
    "dapo_norm": "-.",
    "dr_grpo_norm": ":",
    "dr_grpo": (0, (3, 1, 1, 1, 1, 1)),
    "dapo": "-.",
    "overlong_filtering": "--",
    "soft_punishment": ":",
}
MARKERS = {
    "vl_norm": "o",
    "grpo_norm": "s",
    "dapo_norm": "^",
    "dr_grpo_norm": "D",
    "dr_grpo": "v",
    "dapo": "^",
    "overlong_filtering": "s",
    "soft_punishment": "D",
}
# For methods that the paper doesn't have: Paul Tol's muted scheme without what resembles the colours above.
OTHER_COLORS = ("#332288", "#882255", "#999933", "#44AA99", "#AA4499", "#661100", "#888888")
OTHER_LINE_STYLES = ((0, (5, 1)), (0, (1, 1)), (0, (5, 2, 1, 2)), (0, (8, 2)))
OTHER_MARKERS = ("P", "X", "<", ">", "p", "h", "*")


def method_name(method_key: str) -> str:
    """The method without its α, verl's modes by the paper's names: "vl_norm:0.75" -> "vl_norm"."""
    return _method(method_key)[0]


def _method(method_key: str) -> tuple[str, float | None]:
    """The method's own name and α; verl's modes by the paper's names."""
    method, _, alpha = method_key.partition(":")
    if method != "vl_norm":
        return MODES.get(method_key, method_key), None
    try:
        return method, float(alpha) if alpha else None
    except ValueError:
        return method_key, None


def _pick(method: str, choices: tuple[Any, ...], salt: str) -> Any:
    return choices[zlib.crc32(f"{salt}{method}".encode()) % len(choices)]


def method_color(method_key: str) -> str:
    """The method's one colour, e.g. "#D55E00" for VL Norm of any α; of an unknown method, always the same one."""
    method = method_name(method_key)
    return METHOD_COLORS.get(method) or _pick(method, OTHER_COLORS, "color")


def method_line_style(method_key: str) -> Any:
    """The method's one line style, as matplotlib takes it."""
    method = method_name(method_key)
    return LINE_STYLES.get(method) or _pick(method, OTHER_LINE_STYLES, "line")


def method_marker(method_key: str) -> str:
    """The method's one marker, as matplotlib takes it."""
    method = method_name(method_key)
    return MARKERS.get(method) or _pick(method, OTHER_MARKERS, "marker")


def method_label(method_key: str, family: str = "") -> str:
    """The method as the paper writes it: "VL Norm (α = 1)", in the family "dapo" "DAPO + VL Norm (α = 1)".

    An unknown method's name is returned as it is.
    """
    method, alpha = _method(method_key)
    label = METHOD_LABELS.get(method, method)
    if method == "vl_norm":
        label = f"{'DAPO + ' if family == 'dapo' else ''}{label}{'' if alpha is None else f' (α = {alpha:g})'}"
    return label


def alpha_color(alpha: float) -> str:
    """A shade of VL Norm's hue for comparisons over α: α = 0 light, 1 VL Norm's own, 2 dark."""
    own = [int(METHOD_COLORS["vl_norm"][index : index + 2], 16) for index in (1, 3, 5)]
    end, share = (250, min(1 - alpha, 1) * 0.62) if alpha <= 1 else (0, min(alpha - 1, 1) * 0.65)
    return "#" + "".join(f"{round(part + (end - part) * share):02X}" for part in own)


# --------------------------------------------------------------------------------------------------------- figures

STYLE = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "figure.titlesize": 11,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    # matplotlib names an SVG's elements by random numbers unless it gets its salt.
    "svg.hashsalt": "vlnorm-verl",
}


@dataclass
class Figure:
    """A drawn figure. `caption`: sentences that say what is shown, what the band is, what is left out."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str

    def __post_init__(self) -> None:
        _check_name(self.name)


@contextmanager
def use_style() -> Iterator[None]:
    """matplotlib in the style of the report, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        yield


def figure_text(text: str) -> str:
    """Text that isn't ours for a figure: matplotlib reads "$" as mathematics and hides a label that begins with "_"."""
    text = _one_line(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def render(figure: MatplotlibFigure, name: str, title: str, caption: str) -> Figure:
    """The figure as PNG and SVG (its text as text, no date: the same figure gives the same bytes). Closes it."""
    import matplotlib.pyplot as plt

    png, svg = io.BytesIO(), io.BytesIO()
    with use_style():
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.set_layout_engine("none")  # stays as laid out for the PNG: it is slow
        figure.savefig(svg, format="svg", metadata={"Date": None})
        plt.close(figure)
    return Figure(name, title, caption, png.getvalue(), svg.getvalue().decode())


def write_figures(figures: Iterable[Figure], out: Path) -> None:
    """NAME.png and NAME.svg of each, in the folder `out`, which is made."""
    for figure in figures:
        _write(out / f"{figure.name}.png", figure.png)
        _write(out / f"{figure.name}.svg", figure.svg)


# ------------------------------------------------------------------------------------------------------------ page


def write_page(path: Path, title: str, intro: list[str], parts: list[Table | Figure | str]) -> None:
    """One HTML file with everything in it: it opens without a network, on a phone, in the dark and on paper.

    Links to a table's and a figure's files where these are there, beside the page or in tables/ or figures/ under it.

    Args:
        title, intro: the heading, and paragraphs below it.
        parts: in order; a str is a heading, under which the contents list what follows it.
    """
    anchors: set[str] = set()
    contents: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for part in parts:
        kind = "heading" if isinstance(part, str) else "table" if isinstance(part, Table) else "figure"
        text = part if isinstance(part, str) else part.title
        anchor = _anchor(text if isinstance(part, str) else part.name, anchors)
        entry: dict[str, Any] = {"kind": kind, "title": text, "anchor": anchor, "parts": []}
        if isinstance(part, str) or not contents or contents[-1]["kind"] != "heading":
            contents.append(entry)
        else:
            contents[-1]["parts"].append(entry)
        if isinstance(part, Table):
            layout = _layout(part)
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
    _write(path, _template().render(title=title, intro=intro, contents=contents, parts=shown))


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


def _write(path: Path, content: str | bytes) -> None:
    """Whole or not at all. A lone surrogate (a file name that isn't UTF-8) becomes "?"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
    os.replace(temporary, path)
