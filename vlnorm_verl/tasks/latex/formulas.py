r"""The grammar of one value of a Math answer: arithmetic, functions, units, matrices.

A unit behind a value is dropped, and so are currency and degrees (in a sine they count). What changes the value is not:
percent and a.m./p.m. are symbols (`MARKERS`), "million" and "tenths" are factors, another such word, and an unknown
word anywhere else, is `Unreadable`.

Not read: integrals, limits, piecewise functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import sympy
from sympy import Expr, MatrixBase, Rational, S, Symbol

from vlnorm_verl.tasks.latex.cursor import END, Cursor
from vlnorm_verl.tasks.latex.tokens import (
    CLOSING,
    FRACTIONS,
    FUNCTIONS,
    HYPERBOLIC,
    NAMES,
    OPENING,
    RELATIONS,
    TRIGONOMETRIC,
    Token,
)
from vlnorm_verl.tasks.latex.units import without_unit
from vlnorm_verl.tasks.latex.values import PERCENT, Base, Items, Unreadable, as_set, operand

_CONSTANTS = {"e": S.Exp1, "i": S.ImaginaryUnit, r"\pi": S.Pi, r"\mathbb{R}": S.Reals, r"\mathbb{Z}": S.Integers}
_CONSTANTS |= {r"\mathbb{N}": S.Naturals, r"\mathbb{Q}": S.Rationals, r"\mathbb{C}": S.Complexes}
# dx/dt, d^2x/dt^2, ∂²u/∂x∂y, δS/δx, without braces and backslashes; not d/(d+1), d_1/d_2, d/δ
_DERIVATIVE = re.compile(r"(delta|partial|d(?!elta))(\^\w)?(?![-+_^]).*/\1(?!elta)[A-Za-z]([A-Za-z]|\^\w)*")
# What begins the next factor behind sin x and its like: sin x (1 + x), not sin 2(1 + x).
_BEHIND_ARGUMENTS = {"(", "[", "|", "e", r"\sqrt"}
_FUNCTION_LETTERS = set("fghFGHP")  # f(x + 1) is a function, k(x + 1) a product, u(t) a function
_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12,
}  # fmt: skip
_BINOMIALS = {r"\binom", r"\dbinom", r"\tbinom"}
_VALUES = {*FRACTIONS, *_BINOMIALS, *NAMES, *(rf"\{f}" for f in FUNCTIONS), r"\sqrt", r"\lfloor", r"\lceil", r"\lvert"}
_VALUES |= {r"\sum", r"\prod", r"\infty"}


def _apply(name: str, arguments: list[Any]) -> Any:
    """The function of that name; sympy has most of them under it."""
    name = re.sub("^a(?:rc|r)(?=sin|cos|tan|cot|sec|csc)", "a", name)
    if name == "lg" or (name == "log" and len(arguments) == 1):
        return sympy.log(*arguments, 10)
    if name in ("gcd", "lcm"):  # sympy's are of polynomials: its gcd(m, n) is 1
        if all(argument.is_Integer for argument in arguments):
            return getattr(sympy, name)(arguments)
        return sympy.Function(name)(*sorted(arguments, key=sympy.default_sort_key))
    return getattr(sympy, {"max": "Max", "min": "Min", "abs": "Abs", "ceil": "ceiling"}.get(name, name))(*arguments)


class Formulas(Cursor):
    """Each method reads what its name says from the place where the cursor is, and leaves it behind that."""

    def sequence(self, expand: bool) -> list[Any]:
        """Values between brackets: `reading.Parser` has their grammar."""
        raise NotImplementedError

    # --- arithmetic ---

    def additive(self) -> Any:
        value = self.signed()
        while symbol := self.accept("+", "-", r"\pm", r"\mp"):
            sign, right = self.sign_of(symbol), self.signed()
            if isinstance(value, sympy.Set) and symbol == "-":
                value = value - as_set(right)
            else:
                value = operand(value) + sign * operand(right)
        return value

    def sign_of(self, symbol: str) -> int:
        if symbol in "+-":
            return 1 if symbol == "+" else -1
        self.signs = True
        return self.sign if symbol == r"\pm" else -self.sign

    def signed(self) -> Any:
        if symbol := self.accept("+", "-", r"\pm", r"\mp"):
            return self.sign_of(symbol) * operand(self.signed())
        return self.term()

    def term(self) -> Any:
        value = self.product()
        while symbol := self.accept("*", "/", r"\cdot", r"\times", r"\div", r"\ast"):
            sign = -1 if self.accept("-") else 1
            divides = symbol in ("/", r"\div")
            right = operand(self.power() if self.second and divides else self.product())
            if symbol == "/" and self.peek(-1).text != ")" and right.has(PERCENT) and not value.has(PERCENT):
                right = right / PERCENT**2  # 3/4% is 0.75%
            value = operand(value) / (sign * right) if divides else operand(value) * (sign * right)
            while self.second and divides and self.starts_factor():
                factor = operand(self.power())
                if value.is_Rational and factor.subs(PERCENT, 1).is_Rational:
                    raise Unreadable("6/1(2), which is 3 and 12")
                value = value * factor
            value = self.units(value)
        return value

    def product(self) -> Any:
        """Factors side by side."""
        start = self.position
        value = self.power()
        if self.position == start + 1 and self.peek(-1).kind == "number" and value.is_Integer:
            fraction = self.fraction_of_mixed_number()
            value = self.postfix(value + fraction) if fraction else value
        while self.starts_factor() and not self.unit_fraction():
            behind = self.peek(-1)
            if self.peek().kind == "number" and behind.kind in ("number", "letter") and self.peek(-2).text != "^":
                raise Unreadable("a number behind a number or a letter")
            value = operand(value) * operand(self.power())
        return self.units(value)

    def fraction_of_mixed_number(self) -> Expr:
        r"""The \frac{1}{2} or 1/2 that follows an integer, else 0."""
        start = self.position
        if self.peek().text in FRACTIONS and not self.unit_fraction():
            value = self.atom()
            if all(t.kind == "number" or t.text in "{}" for t in self.tokens[start + 1 : self.position]):
                return value
            self.position = start
        numerator, slash, denominator = (self.peek(i) for i in range(3))
        if slash.text == "/" and numerator.gap and {numerator.kind, denominator.kind} == {"number"}:
            self.position += 3
            return Rational(int(numerator.text), int(denominator.text))
        return S.Zero

    def starts_factor(self) -> bool:
        kind, text, _ = self.peek()
        if kind == "mark":
            return text in ("(", "[", "{") or (text == "|" and not self.bars)
        return kind in ("number", "letter", "name", "begin") or text in _VALUES

    def power(self) -> Any:
        return self.postfix(self.atom())

    def postfix(self, value: Any) -> Any:
        """The value with what is behind it: exponents, factorials, percent, degrees."""
        while True:
            if self.accept("!"):
                if self.peek().text == "!":
                    raise Unreadable("a double factorial")
                value = sympy.factorial(value)
            elif self.accept(r"\degree"):
                value = self.degrees(value)
            elif self.accept("%", r"\%"):
                value = value * PERCENT
            elif self.accept("^"):
                start, raw = self.position, self.raw()
                if raw in ("circ", "degree"):
                    value = self.degrees(value)
                elif re.fullmatch("(prime)+|st|nd|rd|th", raw) and value.is_Number:
                    pass  # minutes of arc, ordinals
                elif raw in ("top", "T") and isinstance(value, MatrixBase):
                    value = value.T
                else:
                    self.position = start
                    value = value ** self.exponent()
            else:
                return value

    def degrees(self, value: Any) -> Any:
        """The value in radians where they count, and without a temperature's letter."""
        if self.peek().text in ("C", "F", "K"):
            self.next()
            return value
        return value * sympy.pi / 180 if self.angle else value

    def exponent(self) -> Any:
        if symbol := self.accept("+", "-"):
            return self.exponent() if symbol == "+" else -self.exponent()
        value = self.atom()
        return value ** self.exponent() if self.accept("^") else value

    def units(self, value: Any) -> Any:
        """The value, without the unit behind it."""
        if self.unit_fraction():
            start = self.position
            self.next()
            self.raw()
            self.raw()
            fraction = self.tokens[start : self.position]
            units = {without_unit(S.One, token.text.lower()) for token in fraction if token.kind == "text"}
            signs = "".join(token.text for token in fraction if token.kind != "text")
            if units != {S.One} or re.search(r"\d", re.sub(r"\^\{?-?\d+", "", signs)):
                raise Unreadable("a number in a unit")
        per = False
        while True:
            if self.peek().kind == "text":
                text, before = self.next().text.lower(), value
                value = without_unit(value, text)
                if per and value != before:
                    raise Unreadable("a number in a unit")
                per |= text == "per"
                while self.accept("^"):
                    self.raw()
            elif self.peek().text in ("/", r"\cdot", r"\times", ".") and self.peek(1).kind == "text":
                per |= self.next().text == "/"
            else:
                return value

    def unit_fraction(self) -> bool:
        return self.peek().text in FRACTIONS and self.peek(1).text == "{" and self.peek(2).kind == "text"

    # --- atoms ---

    def atom(self) -> Any:
        kind, text, _ = self.next()
        if kind == "number":
            return self.number(text)
        if kind in ("letter", "name") or text in NAMES:
            return self.symbol(text)
        if kind == "text" and (self.peek() is END or self.peek().text in (*RELATIONS, "_", ",", ")", "}")):
            return self.symbol(text)
        if kind == "begin":
            return self.matrix(text)
        if text in OPENING:
            return self.brackets(text)
        if text in FRACTIONS:
            return self.fraction()
        if text == r"\sqrt":
            return self.root()
        if text in _BINOMIALS:
            return sympy.binomial(self.argument(), self.argument())
        if text in ("|", r"\vert", r"\lvert"):
            return self.between(sympy.Abs, "|", r"\vert", r"\rvert")
        if text in (r"\lfloor", r"\lceil"):
            return self.between(sympy.floor if text == r"\lfloor" else sympy.ceiling, text.replace("l", "r", 1))
        if text in (r"\sum", r"\prod"):
            return self.sum(sympy.Sum if text == r"\sum" else sympy.Product)
        if text == r"\infty":
            return S.Infinity
        if text in (r"\emptyset", r"\varnothing"):
            return S.EmptySet
        if kind == "command" and text[1:] in FUNCTIONS:
            return self.function(text[1:])
        raise Unreadable(f"{text!r}")

    def number(self, text: str) -> Expr:
        value = Rational(text)
        self.decimal |= "." in text
        if not self.accept("_"):
            return value
        name = self.raw().lower()
        base = int(_BASES.get(name, name))
        whole, _, fraction = text.partition(".")
        return Base(value, Rational(int(whole + fraction, base), base ** len(fraction)))

    def symbol(self, name: str) -> Any:
        letter = name
        while sign := self.accept("_", "'", "^"):
            start, raw = self.position, "" if sign == "'" else self.raw()
            if sign != "^":
                name += sign + raw
            elif raw == "-1" and letter in _FUNCTION_LETTERS:
                name += "^-1"
            elif re.fullmatch("(prime)+", raw):
                name += "'" * (len(raw) // 5)
            else:
                self.position = start - 1
                break
        if name in _CONSTANTS and name not in self.indices:
            return _CONSTANTS[name]
        call = self.functions and self.peek().text == "("
        if call and (self.peek(2).text == ")" or letter in _FUNCTION_LETTERS):
            self.next()
            self.called = True
            return sympy.Function(name)(*map(operand, self.closed("(")[0]))
        return Symbol(name)

    def closed(self, opening: str) -> tuple[list[Any], str]:
        """The values in the brackets, and the bracket that closes them."""
        bars, self.bars = self.bars, 0
        values = self.sequence(expand=OPENING[opening] == "{")
        self.bars = bars
        if opening == "{":
            if len(values) == 1 and self.accept(r"\choose"):
                values = [sympy.binomial(values[0], self.additive())]
            return values, self.expect("}")
        return values, CLOSING[self.expect(*CLOSING)]

    def brackets(self, opening: str) -> Any:
        shape = OPENING[opening]
        if shape == "{" and self.accept(r"\}", r"\rbrace"):
            return S.EmptySet
        values, closing = self.closed(opening)
        if (shape == "{") != (closing == "}" and opening != "{"):
            raise Unreadable("brackets that do not match")
        if len(values) == 1 and shape + closing in ("()", "[]", "}"):
            return values[0]
        return Items(shape + closing if shape else "", tuple(values))  # LaTeX does not show plain braces

    def between(self, function: Callable[[Any], Any], *ends: str) -> Any:
        self.bars += 1
        value = function(operand(self.additive()))
        self.bars -= 1
        self.expect(*ends)
        return value

    def argument(self) -> Any:
        """Of a command: a group, or one token; of a number its first digit."""
        token = self.peek()
        if token.kind == "number" and len(token.text) > 1:
            self.tokens[self.position : self.position + 1] = [Token("number", c) for c in token.text]
        return operand(self.atom())

    def fraction(self) -> Any:
        start = self.position
        if _DERIVATIVE.fullmatch(name := f"{self.raw()}/{self.raw()}"):
            return Symbol(name)
        self.position = start
        return self.argument() / self.argument()

    def root(self) -> Any:
        degree = S(2)
        if self.accept("["):
            degree = self.additive()
            self.expect("]")
        value = self.argument()
        if value.is_negative and degree.is_odd:
            return -((-value) ** (1 / degree))  # the real one
        return value ** (1 / degree)

    def function(self, name: str) -> Any:
        exponent, base = S.One, []
        while symbol := self.accept("^", "_"):
            if symbol == "^":
                exponent = self.exponent()
            elif name == "log":
                base = [self.exponent()]
            else:
                raise Unreadable(f"{name} with an index")
        if exponent == -1 and name in TRIGONOMETRIC | HYPERBOLIC:
            name, exponent = f"a{name}", S.One
        angle, self.angle = self.angle, name in TRIGONOMETRIC
        if opening := self.accept("(", "{", r"\{"):
            arguments, _ = self.closed(opening)
        else:
            sign = -1 if self.accept("-") else 1
            arguments = [sign * operand(self.power())]
            while self.starts_factor() and self.peek().text[1:] not in FUNCTIONS:
                if arguments[0].free_symbols and self.peek().text in _BEHIND_ARGUMENTS:
                    break
                arguments[0] = arguments[0] * operand(self.power())
        self.angle = angle
        return _apply(name, [*map(operand, arguments), *base]) ** exponent

    def sum(self, kind: Any) -> Any:
        self.expect("_")
        self.expect("{")
        name, outer = self.next().text, self.indices
        self.indices = outer | {name}
        index = self.symbol(name)
        self.expect("=")
        first = self.additive()
        self.expect("}")
        self.expect("^")
        last = self.exponent()
        term = self.term()
        self.indices = outer
        return kind(term, (index, first, last)).doit()

    def matrix(self, environment: str) -> Any:
        if not re.fullmatch(r"([pbBvV]|small)?matrix\*?|array", environment):
            raise Unreadable(environment)
        rows: list[list[Any]] = [[]]
        while True:
            rows[-1].append(operand(self.additive()))
            if self.accept("&"):
                continue
            more = self.accept(r"\\")
            if self.peek().kind == "end":
                self.next()
                break
            if not more:
                raise Unreadable(f"{self.peek().text!r} in a matrix")
            rows.append([])
        matrix = sympy.ImmutableMatrix(rows)
        return matrix.det() if environment[0] in "vV" else matrix
