r"""What a Math answer can be, once it is read:

value     sympy expression or matrix: numbers (1,234; 2\tfrac12; 0.\overline{3}; 4.5e33; 1011_2), formulas
Items     (1, 2)   [1, 2)   \{1, 2\}   1, 2   1:2:3   3:30
Set       unions, intersections and differences of these, \mathbb{R}, \emptyset
Relation  x = 3   1 < x \le 5   x \in [1, 2]
prose     \text{east}, (C)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from sympy import Expr, MatrixBase

PERCENT, AM, PM = MARKERS = sympy.symbols("% am pm")
Base = sympy.Function("base")  # Base(1011, 11): the digits as a decimal number, and what they are to their base

# What sympy raises where an operation makes no sense, or that it cannot do.
ERRORS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError, ValueError)


class Unreadable(ValueError):
    """A part of the text was not understood."""


@dataclass(frozen=True)
class Items:
    """Values. ``brackets``: "()", "[)", …, "{}"; "" and "or" for a list without, ":" a ratio, "::" a time of day."""

    brackets: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Relation:
    """``operators`` of `RELATIONS`, one between two ``sides`` each."""

    operators: tuple[str, ...]
    sides: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    """A text that was read. ``readings`` has two values where the notation has two meanings (1,234; 1/2x; 9:16)."""

    words: str | None  # if the text is nothing but words or letters; words in small letters
    prose: bool  # whether these words are no product of variables
    readings: tuple[Any, ...]
    products: tuple[Any, ...]  # the same, with g(a + b) as a product, if there is one
    decimal: bool  # whether a number has a decimal point
    dropped: tuple[Any, ...]  # 12 of 12\Omega, whose letter may be a unit
    label: str = ""  # E of (E) 289

    @property
    def readable(self) -> bool:
        return bool(self.readings) or self.prose


def as_set(value: Any) -> sympy.Set:
    """An interval, a list in braces, or a set.

    Raises:
        Unreadable: it is none.
    """
    if isinstance(value, sympy.Set):
        return value
    if isinstance(value, Items) and value.brackets in ("", "{}"):
        return sympy.FiniteSet(*map(operand, value.values))
    if isinstance(value, Items) and value.brackets[0] in "([" and len(value.values) == 2:
        return sympy.Interval(*value.values, value.brackets[0] == "(", value.brackets[1] == ")")
    raise Unreadable("no set")


def operand(value: Any) -> Any:
    if not isinstance(value, Expr | MatrixBase):
        raise Unreadable("arithmetic with a list or a set")
    return value


def parts(value: Any) -> list[Any]:
    inner = value.values if isinstance(value, Items) else value.sides if isinstance(value, Relation) else ()
    return [value, *(part for item in inner for part in parts(item))]
