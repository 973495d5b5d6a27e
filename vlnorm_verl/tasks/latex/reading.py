r"""Reads the text of a Math answer, LaTeX or plain, into sympy objects: all of it, or not at all.

A recursive descent over the tokens of `latex.tokens`; here are lists, relations and sets of the values of
`latex.formulas`. What it does not know, or is left over at the end, is `Unreadable`: it never takes a part for the
whole. Decimals are read as exact fractions.

Not read: set builders, "…".
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

from sympy import Basic, Expr, S

from vlnorm_verl.tasks.latex.cursor import END
from vlnorm_verl.tasks.latex.formulas import Formulas
from vlnorm_verl.tasks.latex.tokens import AMBIGUOUS, LABEL, RELATIONS, SYMBOL_UNIT, rewritten, tokens_of, words
from vlnorm_verl.tasks.latex.values import ERRORS, Answer, Items, Relation, Unreadable, as_set, operand, parts


def read(text: str) -> Answer:
    """The answer that a text is. One of which a part was not understood is not ``readable``."""
    text = rewritten(text)
    if label := LABEL.match(text):
        value = read(text[label.end() :])
        return replace(value, label=label["bold"] or label["plain"]) if value.readable else value
    tokens = tokens_of(text)
    letters = words(tokens)
    prose = letters is not None and any(token.kind == "text" for token in tokens)
    readings: list[Any] = []
    products: list[Any] = []
    decimal = False
    seconds = [False, True] if AMBIGUOUS.search(text) else [False]
    angles = [False, True] if re.search(r"\\circ|\\degree", text) else [False]  # 60 of 60^\circ, and \pi/3
    for second, angle in [] if prose else itertools.product(seconds, angles):
        for functions, found in ((True, readings), (False, products)):
            parser = Parser(tokens_of(text, second), second, functions, angle)
            try:
                value = parser.answer()
            except ERRORS:
                break
            decimal |= parser.decimal
            if value not in found:
                found.append(value)
            if not parser.called:
                break
    dropped: list[Any] = []
    if SYMBOL_UNIT.search(text):
        number = read(SYMBOL_UNIT.sub(r"\\text{ unit}", text))
        dropped = [value for value in number.readings if isinstance(last := parts(value)[-1], Expr) and last.is_number]
        decimal |= number.decimal
    readings = readings or dropped  # 12\text{k}\Omega
    return Answer(letters, prose, tuple(readings), tuple(products), decimal, tuple(dropped))


class Parser(Formulas):
    """Each method reads what its name says from the place where the cursor is, and leaves it behind that."""

    def answer(self) -> Any:
        values = self.sequence(expand=True)
        if self.peek() is not END:
            raise Unreadable(f"{self.peek().text!r}")
        value = values[0] if len(values) == 1 else Items("or" if self.either else "", tuple(values))
        if any(isinstance(part, Basic) and part.has(S.NaN, S.ComplexInfinity) for part in parts(value)):
            raise Unreadable("a division by zero")
        return value

    def sequence(self, expand: bool) -> list[Any]:
        r"""Values with commas between them, or lists of such with semicolons. ``expand``: an item with \pm is two."""
        groups = [self.commas(expand)]
        while self.accept(";"):
            groups.append(self.commas(expand))
        if len(groups) == 1:
            return groups[0]
        return [group[0] if len(group) == 1 else Items("", tuple(group)) for group in groups]

    def commas(self, expand: bool) -> list[Any]:
        values = []
        while True:
            start, before = self.position, (self.sign, self.signs)
            if expand:
                self.sign, self.signs = 1, False
            values.append(self.relation())
            if expand and self.signs:
                self.position, self.sign = start, -1
                values.append(self.relation())
            if expand:
                self.sign, self.signs = before
            comma, conjunction = self.accept(","), self.accept("and", "or")
            if not comma and not conjunction:
                return values
            self.either |= conjunction == "or"

    def relation(self) -> Any:
        self.accept("=", r"\approx", r"\sim")  # "= 5" is 5
        sides, operators = [self.ratio()], []
        while symbol := self.accept(*RELATIONS):
            operators.append(RELATIONS[symbol])
            sides.append(self.ratio())
        return Relation(tuple(operators), tuple(sides)) if operators else sides[0]

    def ratio(self) -> Any:
        first, last = self.peek(), END
        terms = [self.union()]
        while self.accept(":"):
            last = self.peek()
            terms.append(operand(self.union()))
        time = len(terms) == 2 and re.fullmatch("[0-5][0-9]", last.text) and terms[0] in range(25)
        if time and self.second and "0" not in (first.text[0], last.text[0]):
            quotient = terms[0] / terms[1]
            if quotient.is_Rational and quotient.q == terms[1]:
                return quotient  # 9:16 in lowest terms is a ratio as well
        return Items("::" if time else ":", tuple(terms)) if len(terms) > 1 else terms[0]

    def union(self) -> Any:
        value = self.additive()
        while symbol := self.accept(r"\cup", r"\cap", r"\setminus", r"\backslash"):
            left, right = as_set(value), as_set(self.additive())
            value = left | right if symbol == r"\cup" else left & right if symbol == r"\cap" else left - right
        return value
