"""Tables as files and on a terminal: NAME.md (GitHub), NAME.csv, NAME.json, NAME.tex (booktabs).

The same table gives the same bytes. Titles, cells and feet are plain text whose origin is not trusted: each writer
escapes what its format would read as markup.

Not covered: LaTeX for every letter of Unicode. What a plain pdfLaTeX lacks is written as its code point.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from vlnorm_verl.files import write
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.table import Cell, Shown, Table, layout_of, one_line


def write_tables(tables: Iterable[Table], out: Path) -> None:
    """NAME.md, NAME.csv, NAME.json and NAME.tex of each, in the folder `out`, which is made."""
    for table in tables:
        for ending, make in FORMATS.items():
            write(out / f"{table.name}.{ending}", make(table))


def to_markdown(table: Table) -> str:
    """A heading, the table and its feet as GitHub's Markdown; `|`, `*`, `<`, `$` … print as they are."""
    layout = layout_of(table)

    def line(texts: Iterable[str]) -> str:
        return f"| {' | '.join(texts)} |"

    def cell(shown: Shown) -> str:
        text = " ".join(filter(None, (_markdown(shown.text), shown.interval)))
        text = f"**{text}**" if shown.bold and text else text
        return text + (f"<sup>{shown.mark}</sup>" if shown.mark else "")

    lines = [f"### {_markdown(table.title)}", "", line(map(_markdown, layout.columns))]
    lines.append(line("---:" if numeric else "---" for numeric in layout.numeric))
    lines += [line(map(cell, row)) for row in layout.cells]
    below = [f"- <sup>{mark}</sup> {_markdown(note)}" for mark, note in layout.notes.items()]
    below += [f"- {_markdown(sentence)}" for sentence in table.foot]
    return "\n".join([*lines, *([""] if below else []), *below]) + "\n"


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", one_line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def to_csv(table: Table) -> str:
    """A header and one line a row, numbers in full precision; empty where there is no value.

    A column with an Estimate becomes four: its value, "… low", "… high" and "… note". Text that a spreadsheet would run
    as a formula begins with "'".
    """
    wide = [any(isinstance(row[index], Estimate) for row in table.rows) for index in range(len(table.columns))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        _no_formula(name)
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
        writer.writerow(map(_no_formula, fields))
    return buffer.getvalue()


def _no_formula(field: str | int | float | None) -> str | int | float | None:
    if not isinstance(field, str):
        return field
    text = field.replace("\r", "\n")  # csv writes a field with "\r" without quotes, so that it begins another row
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\n")) else text


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
        "rows": [[cell(content) for content in row] for row in table.rows],
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


# Beside Latin letters up to Extended-A and Greek ones: what a plain pdfLaTeX with textcomp prints.
LATEX_SYMBOLS = "–—‘’“”…→←√∞≈≠≤≥∝∇∑−‖"
# Where pylatexenc leaves a character that TeX would read: "[" after the "\\" of a row is its optional argument.
LATEX = {"[": "{[}", "]": "{]}", '"': r"{\textquotedbl}", "'": r"{\textquotesingle}", "`": r"{\textasciigrave}"}
LATEX |= {"|": r"{\textbar}", "√": r"\ensuremath{\surd}"}


@functools.cache
def _encoder() -> Callable[[str], str]:
    from pylatexenc.latexencode import RULE_DICT, UnicodeToLatexConversionRule, UnicodeToLatexEncoder

    own = UnicodeToLatexConversionRule(RULE_DICT, {ord(character): text for character, text in LATEX.items()})
    encoder = UnicodeToLatexEncoder(
        conversion_rules=[own, "defaults"], unknown_char_policy=_code_point, unknown_char_warning=False
    )
    encode: Callable[[str], str] = encoder.unicode_to_latex
    return encode


def _code_point(character: str) -> str:
    return f"U+{ord(character):04X}"


def latex_escape(text: str) -> str:
    """Plain text as LaTeX that a plain pdfLaTeX with T1 fonts prints; other characters as "U+4E2D"."""
    plain = unicodedata.normalize("NFC", one_line(text))
    known = re.sub(rf"[^ -~\xa0-ňŊ-žΑ-ω{LATEX_SYMBOLS}]", lambda match: _code_point(match[0]), plain)
    return re.sub(r"([-,])(?=\1)", r"\1{}", _encoder()(known))  # "--" would become a dash, ",," a quotation mark


def to_latex(table: Table) -> str:
    r"""A `table` float with booktabs' rules, \label{tab:NAME}, shrunk to the line if it is wider.

    Its first line is what it needs of the preamble.
    """
    layout = layout_of(table)

    def cell(shown: Shown) -> str:
        text = " ".join(filter(None, map(latex_escape, (shown.text, shown.interval))))
        text = rf"\textbf{{{text}}}" if shown.bold and text else text
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
            line(map(latex_escape, layout.columns)),
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


FORMATS: dict[str, Callable[[Table], str]] = {"csv": to_csv, "md": to_markdown, "tex": to_latex, "json": to_json}


def print_table(table: Table, console: Console) -> None:
    """The table, its notes and its feet on a terminal; one that is wider than the terminal as a list of its rows."""
    layout = layout_of(table)

    def text(shown: Shown) -> Text:
        interval, mark = f" {shown.interval}" if shown.interval else "", f" ({shown.mark})" if shown.mark else ""
        return Text.assemble((shown.text, "bold" if shown.bold else ""), (interval + mark, "dim"))

    title = Text(one_line(table.title), style="bold")
    printed = RichTable(title=title, title_justify="left")
    for column, numeric in zip(layout.columns, layout.numeric, strict=True):
        printed.add_column(Text(column), justify="right" if numeric else "left")
    for row in layout.cells:
        printed.add_row(*map(text, row))
    if Measurement.get(console, console.options.update(max_width=10_000), printed).maximum > console.width:
        printed = RichTable(title=title, title_justify="left", show_header=False)
        for row in layout.cells:
            for column, shown in zip(layout.columns, row, strict=True):
                printed.add_row(Text(column, style="dim"), text(shown))
            printed.add_section()
    console.print(printed)
    for mark, note in layout.notes.items():
        console.print(Text(f"({mark}) {note}", style="dim"))
    for sentence in table.foot:
        console.print(Text(one_line(sentence), style="dim"))
