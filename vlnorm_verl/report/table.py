"""A table as data, and as the text that every writer shows: numbers rounded, notes by letters."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import NamedTuple

from vlnorm_verl.report.estimates import Estimate

Cell = str | int | float | Estimate | None
ABSENT = "–"


def one_line(text: str) -> str:
    """Without line breaks, control characters, marks that turn the direction of what follows, and lone surrogates."""
    text = text.encode(errors="replace").decode()  # a file name that is not UTF-8, which a terminal refuses
    return "".join(c for c in " ".join(text.split()) if unicodedata.category(c) not in ("Cc", "Cf"))


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
        hidden: headings of columns that are in CSV and JSON only.
        bold: rows that stand out.
        grouped: whether a first cell that says the same as the one above is left empty.
        forest: heading of the column of differences that a page draws, too.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    foot: list[str] = field(default_factory=list)
    digits: int = 3
    digits_of: dict[str, int] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    bold: frozenset[int] = frozenset()
    grouped: bool = False
    forest: str = ""


class Shown(NamedTuple):
    """A cell as every writer shows it. `mark` is the letter of its note."""

    text: str
    interval: str = ""
    mark: str = ""
    bold: bool = False


@dataclass
class Layout:
    """A table as text: C headings and [R][C] cells, which columns hold numbers, and the notes by their letters."""

    columns: list[str]
    cells: list[list[Shown]]
    numeric: list[bool]
    notes: dict[str, str]


def number(value: float, digits: int, sign: bool = False) -> str:
    """ "−0.020"; with a sign "+0.020"."""
    if isinstance(value, Integral):
        return str(int(value)).replace("-", "−")
    if math.isnan(value):
        return ABSENT
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    # A difference of −0.0004 isn't "−0.000".
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def _letters(index: int) -> str:
    """0 -> a, 25 -> z, 26 -> aa."""
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def layout_of(table: Table) -> Layout:
    marks: dict[str, str] = {}

    def show(cell: Cell, digits: int) -> Shown:
        if cell is None:
            return Shown(ABSENT)
        if isinstance(cell, Estimate):
            interval = "" if math.isnan(cell.low) else f"[{number(cell.low, digits)}, {number(cell.high, digits)}]"
            mark = marks.setdefault(cell.note, _letters(len(marks))) if cell.note else ""
            return Shown(number(cell.value, digits), interval, mark)
        if isinstance(cell, Real):
            return Shown(number(cell, digits))
        return Shown(one_line(str(cell)))

    kept = [index for index, column in enumerate(table.columns) if column not in table.hidden]
    columns = [table.columns[index] for index in kept]
    digits = [table.digits_of.get(column, table.digits) for column in columns]
    # A word among numbers ("not reached") leaves a column one of numbers.
    numeric = [any(isinstance(row[index], (Real, Estimate)) for row in table.rows) for index in kept]
    cells: list[list[Shown]] = []
    above: Cell = None
    for place, row in enumerate(table.rows):
        shown = [show(row[index], decimals) for index, decimals in zip(kept, digits, strict=True)]
        cells.append([one._replace(bold=place in table.bold) for one in shown])
        if table.grouped and row[0] == above:
            cells[-1][0] = cells[-1][0]._replace(text="")
        above = row[0]
    notes = {mark: one_line(note) for note, mark in marks.items()}
    return Layout([*map(one_line, columns)], cells, numeric, notes)
