"""Whether two Math answers that `latex.reading` has read are equal.

Rational numbers are compared exactly. Other closed forms (roots, π, logarithms) are equal if they agree to 50
significant digits, formulas if they do to 20 at points that are the same in every process, and exactly where they are
polynomials with rational coefficients. One tolerance is on purpose: a number with a decimal point against one that has
no finite decimal form (1/3, √2) is equal within a relative difference of TOLERANCE, which is six significant digits.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
from sympy import Basic, Expr, MatrixBase, Rational, S
from sympy.core.function import AppliedUndef

from vlnorm_verl.tasks.latex.tokens import CHOICES
from vlnorm_verl.tasks.latex.values import (
    AM,
    ERRORS,
    MARKERS,
    PERCENT,
    PM,
    Answer,
    Base,
    Items,
    Relation,
    as_set,
    parts,
)

TOLERANCE = Rational(5, 10**6)

_FLIPPED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "=": "=", "≠": "≠", "≈": "≈", "∈": "∋"}
_RELATIONALS = {"<": sympy.Lt, ">": sympy.Gt, "≤": sympy.Le, "≥": sympy.Ge, "=": sympy.Eq, "≠": sympy.Ne}
_EQUATIONS = {"=", "≈", "∈"}


def equal(gold: Answer, answer: Answer) -> bool:
    if gold.label and answer.label and gold.label != answer.label:
        return False
    texts = [(gold.words, answer.words)]
    if bool(gold.label) != bool(answer.label):  # of two labels with values, both count
        texts.append((gold.label or gold.words, answer.label or answer.words))
    for of_gold, of_answer in texts:
        if of_gold is None or of_answer is None:
            continue
        # Of \text{Yes} and Yes the text, which has lost its case, decides. C is a choice, c may be a variable.
        choice = CHOICES.fullmatch(of_gold.upper())
        folds = gold.prose or of_gold.isupper() if choice else gold.prose != answer.prose
        fold = str.casefold if folds else str
        if fold(of_gold) == fold(of_answer):
            return True
    compare = _Comparison(gold.decimal, answer.decimal)
    pairs = list(itertools.product(gold.readings, answer.readings + answer.dropped))  # a gold keeps its symbols
    if (gold.products or answer.products) and _is_variable(gold, answer):
        pairs += itertools.product(gold.products or gold.readings, answer.products or answer.readings)
    for pair in pairs:
        try:
            if compare.values(*pair):
                return True
        except ERRORS:
            continue
    return False


def _is_variable(gold: Answer, answer: Answer) -> bool:
    """Whether what looks like a function is a variable elsewhere: P in P(1 + r) and (1 + r)P, not f in f(2) and 3."""
    values = [part for side in (gold, answer) for reading in side.readings for part in parts(reading)]
    both = sympy.Tuple(*(value for value in values if isinstance(value, Basic)))
    functions = {function.func.__name__ for function in both.atoms(AppliedUndef)}
    return not functions.isdisjoint(symbol.name for symbol in both.free_symbols)


class _Comparison:
    def __init__(self, *decimals: bool) -> None:
        self.decimals = decimals
        self.decimal = any(decimals)

    def values(self, gold: Any, answer: Any) -> bool:
        if isinstance(gold, Relation) and isinstance(answer, Relation):
            return self.relations(gold, answer)
        if isinstance(answer, Relation):
            return any(self.values(gold, value) for value in self.stated(answer)) or _equal_sets(gold, answer)
        if isinstance(gold, Relation):
            stated = self.stated(gold, believed=True) if _is_solution(gold) else []
            return any(self.values(value, answer) for value in stated) or _equal_sets(gold, answer)
        if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
            return gold.shape == answer.shape and all(map(self.values, gold, answer))
        if isinstance(gold, MatrixBase) or isinstance(answer, MatrixBase):
            points = [_point(side) for side in (gold, answer)]
            return len(points[0]) == len(points[1]) > 1 and all(map(self.values, *points))
        if isinstance(gold, Items | sympy.Set) or isinstance(answer, Items | sympy.Set):
            return self.items(gold, answer)
        return isinstance(gold, Expr) and isinstance(answer, Expr) and self.expressions(gold, answer)

    # --- several values ---

    def items(self, gold: Any, answer: Any) -> bool:
        if not isinstance(gold, Items) or not isinstance(answer, Items):
            for items, other in ((gold, answer), (answer, gold)):
                if not isinstance(items, Items) or not isinstance(other, Expr):
                    continue
                if items.brackets == ":" and len(items.values) == 2:
                    value = items.values[0] / items.values[1]
                elif items.brackets == "{}" and len(items.values) == 1:
                    (value,) = items.values
                else:
                    continue
                return self.values(value, other) if items is gold else self.values(other, value)
            return _equal_sets(gold, answer)
        kinds = {gold.brackets, answer.brackets}
        if _are_named(gold.values) and not any(isinstance(value, Relation) for value in answer.values):
            same = len(gold.values) == len(answer.values) and answer.brackets in ("", "()")
            return same and all(map(self.values, gold.values, answer.values))
        if kinds <= {"", "or", "{}"}:
            return self.unordered(gold.values, answer.values)
        if len(gold.values) != len(answer.values):
            return _equal_sets(gold, answer)
        if ":" in kinds and kinds <= {":", "::"}:
            return self.proportional(gold.values, answer.values)
        intervals = {"[)", "(]"} | ({"[]"} if len(gold.values) == 2 else set())
        ordered = len(kinds) == 1 or ("" in kinds and not kinds & {":", "::", *intervals})
        if ordered or (len(gold.values) > 2 and kinds == {"()", "[]"}):
            return all(map(self.values, gold.values, answer.values))
        return False

    def proportional(self, gold: Sequence[Any], answer: Sequence[Any]) -> bool:
        """Of ratios. Those whose products agree with every ratio's are none: 0:0, ∞:∞, and of matrices of zeros."""
        if any(isinstance(term, MatrixBase) or term.has(S.Infinity, S.NegativeInfinity) for term in answer):
            return False
        pairs = itertools.combinations(zip(gold, answer, strict=True), 2)
        zero = all(self.values(S.Zero, term) for term in answer)
        return not zero and all(self.values(a * d, b * c) for (a, b), (c, d) in pairs)

    def unordered(self, gold: Sequence[Any], answer: Sequence[Any]) -> bool:
        same = [[self.values(of_gold, of_answer) for of_answer in answer] for of_gold in gold]
        return all(map(any, same)) and all(map(any, zip(*same, strict=True)))

    # --- relations ---

    def stated(self, relation: Relation, believed: bool = False) -> list[Any]:
        """The values that an equation states: x = 3 states 3, x = 22/7 ≈ 3.14 both, 100 ≈ 101 the last, 3 = 2 none.

        ``believed``: what is ≈ need not be close.
        """
        if not _EQUATIONS.issuperset(relation.operators):
            return []
        numbers = [side for side in relation.sides if isinstance(side, Expr) and side.is_number]
        for (left, right), operator in zip(itertools.pairwise(relation.sides), relation.operators, strict=True):
            if left in numbers and right in numbers:
                about = operator == "≈"
                close = _relative_difference(left, right, 15) < 0.01 if about else self.expressions(left, right)
                if not close and not (about and believed):
                    return []
        *_, before, last = relation.sides
        if last == 0 and isinstance(before, Expr) and before.is_Add:
            return []  # x + y - 1 = 0 says what x and y are, not that anything is 0
        both = relation.operators[-1] == "≈" and before in numbers and not _terminates(before)
        # Not a whole number in disguise: what is 100 is not about 101.
        both = both and not (before.is_real and self.numbers(before, sympy.Integer(before.round())))
        return [last, before] if both else [last]

    def relations(self, gold: Relation, answer: Relation) -> bool:
        if _is_solved(gold) and not _is_solved(answer):
            return False
        flipped = Relation(tuple(_FLIPPED[o] for o in reversed(answer.operators)), answer.sides[::-1])
        for other in (answer, flipped):
            if gold.operators == other.operators and all(map(self.values, gold.sides, other.sides)):
                return True
        if len(gold.operators) == 1 and gold.operators in (answer.operators, flipped.operators):
            differences = [r.sides[0] - r.sides[1] for r in (gold, answer) if all(isinstance(s, Expr) for s in r.sides)]
            if len(differences) == 2:
                # 2x - y + 3 = 0 is y = 2x + 3: the ratio of the differences is a number, which is positive for < and >.
                if gold.operators[0] == "=":
                    differences = [sympy.fraction(sympy.together(d))[0] for d in differences]
                factor = sympy.cancel(differences[0] / differences[1])
                if factor.is_number and factor.is_finite and factor != 0:
                    return gold.operators[0] in "=≠" or (factor.is_positive is (gold.operators == answer.operators))
        return _equal_sets(gold, answer)

    # --- expressions ---

    def expressions(self, gold: Expr, answer: Expr) -> bool:
        return any(itertools.starmap(self.same, _without_markers(gold, answer)))

    def same(self, gold: Expr, answer: Expr) -> bool:
        if gold == answer:
            return True
        functions = sympy.Tuple(gold, answer).atoms(AppliedUndef)
        names = {function: sympy.Dummy() for function in sorted(functions, key=sympy.default_sort_key)}
        gold, answer = gold.xreplace(names), answer.xreplace(names)
        symbols = sorted(gold.free_symbols | answer.free_symbols, key=sympy.default_sort_key)
        if not symbols:
            return self.numbers(gold, answer)
        limit = TOLERANCE if self.decimal else Rational(1, 10**20)
        # Symbols are positive, as most in physics are, unless it shows that their sign matters.
        signs = (1, -1) if sympy.Tuple(gold, answer).has(sympy.Abs, sympy.Max, sympy.Min) else (1,)
        compared = 0
        for point in _points(len(symbols), signs):
            at = dict(zip(symbols, point, strict=True))
            at_gold, at_answer = (_evaluated(value, at) for value in (gold, answer))
            if at_gold is not None and at_answer is not None:
                if _relative_difference(at_gold, at_answer, 30) > limit:
                    return False
                compared += 1
        difference = sympy.expand(gold - answer)
        if not compared:
            return sympy.simplify(difference) == 0
        exact = not self.decimal and difference.is_polynomial(*symbols)
        return difference == 0 or not (exact and all(c.is_Rational for c in sympy.Poly(difference, *symbols).coeffs()))

    def numbers(self, gold: Expr, answer: Expr) -> bool:
        if not (gold.is_finite and answer.is_finite):
            return False
        difference = gold - answer
        rounded = any(d and not _terminates(other) for d, other in zip(self.decimals, (answer, gold), strict=True))
        if difference.is_Rational and not rounded:
            return difference == 0
        return _relative_difference(gold, answer, 50) < (TOLERANCE if rounded else 1e-50)


def _terminates(value: Expr) -> bool:
    """Whether it is a number that has a finite decimal form."""
    # Then its denominator divides a power of 10, which need not be above its number of bits.
    return value.is_Rational and pow(10, value.q.bit_length(), value.q) == 0


def _evaluated(value: Expr, at: dict[Any, Expr]) -> Expr | None:
    # Exact values first make differences exact, and of (a^m)^n powers of huge integers.
    number = value.xreplace(at).evalf(30) if value.is_rational_function(*at) else value.evalf(30, subs=at)
    return number if number.is_number and number.is_finite and not number.has(sympy.Function) else None


def _relative_difference(left: Expr, right: Expr, digits: int) -> Expr:
    scale = max(abs(left.evalf(15)), abs(right.evalf(15)))
    return abs((left - right).evalf(digits)) / scale if scale else S.Zero


def _points(symbols: int, signs: tuple[int, ...]) -> Iterable[list[Expr]]:
    """Values for the symbols, the same each time: small and large ones."""
    numbers = random.Random(1)
    for largest in (3, 30, 3, 30, 3, 30):
        yield [Rational(numbers.randint(1, 307 * largest), 307) * numbers.choice(signs) for _ in range(symbols)]


def _without_markers(gold: Expr, answer: Expr) -> Iterable[tuple[Expr, Expr]]:
    """What one side alone is marked with may be left out: 5% is 5 and 0.05, 3 p.m. is 3, 1011_2 is 1011."""
    marked = [{m for m in MARKERS if side.has(m)} for side in (gold, answer)]
    based = [side.has(Base) for side in (gold, answer)]
    if any(based) and not all(based):
        gold, answer = (side.replace(Base, lambda digits, _: digits) for side in (gold, answer))
    if bool(marked[0]) == bool(marked[1]):
        yield gold, answer
        return
    # 5% is 5 and 0.05, 3 + 4% is 3.04 only.
    mixed = any(sympy.expand(side / PERCENT).has(PERCENT) for side in (gold, answer) if side.has(PERCENT))
    for percent in (Rational(1, 100),) if mixed else (1, Rational(1, 100)):
        values = {AM: 0, PM: 0, PERCENT: percent}
        yield gold.subs(values), answer.subs(values)


def _point(value: Any) -> Sequence[Any]:
    """The coordinates of a column, of a row and of (1, 2); of what is none, none."""
    if isinstance(value, MatrixBase):
        return tuple(value) if 1 in value.shape else ()
    return value.values if isinstance(value, Items) and value.brackets == "()" else ()


def _is_name(side: Any) -> bool:
    """x, AB, f(x), (x, y), but not 2x, x + y or gcd(x, y), whose value is a condition."""
    if not isinstance(side, Expr):
        return isinstance(side, Items) and all(map(_is_name, side.values))
    if side.is_Add or side.atoms(sympy.Number, sympy.NumberSymbol):
        return False
    return bool(side.free_symbols) and {f.name for f in side.atoms(AppliedUndef)}.isdisjoint({"gcd", "lcm"})


def _is_solution(gold: Relation) -> bool:
    """Whether a gold is its last value, with what it is of: AB = 6, TM/MK = 2, 25 + 2 = 27, but not x - y = 2."""
    left = gold.sides[0]
    numbers = all(isinstance(side, Expr) and side.is_number for side in gold.sides)
    return numbers or _is_name(left) or (isinstance(left, Expr) and all(map(_is_name, left.as_numer_denom())))


def _are_named(values: Sequence[Any]) -> bool:
    """x = 1, y = 2, whose order counts; not x = 1, x = 2."""
    names = {value.sides[0] for value in values if isinstance(value, Relation) and _is_name(value.sides[0])}
    return len(names) == len(values)


def _is_solved(value: Any) -> bool:
    """False for an equation or inequality that is still to be solved: x = 3, 1 < x and |x| < 3 are solved."""
    if isinstance(value, Items):
        return all(map(_is_solved, value.values))
    if not isinstance(value, Relation):
        return True
    if len(_symbols(value)) > 1:
        return False  # y = x and xy = 1 are equations of curves, F = ma a formula
    sides = [side.xreplace(dict.fromkeys(MARKERS, S.One)) for side in value.sides if isinstance(side, Expr)]
    names = [side.args[0] if isinstance(side, sympy.Abs) else side for side in sides]
    return all(
        name.is_number or (_is_name(name) and name.atoms(sympy.Function) <= name.atoms(AppliedUndef)) for name in names
    )


def _equal_sets(gold: Any, answer: Any) -> bool:
    if _is_solved(gold) and not _is_solved(answer):
        return False  # the problem, said again
    if isinstance(gold, Relation) and isinstance(answer, Relation) and _symbols(gold) != _symbols(answer):
        return False
    try:
        of_gold, of_answer = _solutions(gold), _solutions(answer)
        # (3, 2) as an interval, x = 2i and 3 = 2 solved for real numbers, and 1 = 1, say nothing.
        if {S.EmptySet, S.UniversalSet} & {of_gold, of_answer}:
            return bool(gold == answer)
        return bool(of_gold == of_answer or of_gold.symmetric_difference(of_answer).is_empty)
    except ERRORS:
        return False  # no sets, or none that sympy can compare


def _symbols(relation: Relation) -> set[sympy.Symbol]:
    return set().union(*(side.free_symbols for side in relation.sides if isinstance(side, Expr))) - {*MARKERS}


def _solutions(relation: Any) -> sympy.Set:
    if isinstance(relation, Items) and relation.brackets == "or":
        return sympy.Union(*map(_solutions, relation.values))
    if not isinstance(relation, Relation):
        return as_set(relation)
    if relation.operators == ("∈",):
        return as_set(relation.sides[1])
    unknown = sympy.Dummy(real=True)  # for f(x), which sympy cannot solve for
    sides = [side.replace(lambda part: isinstance(part, AppliedUndef), lambda _: unknown) for side in relation.sides]
    pairs = zip(itertools.pairwise(sides), relation.operators, strict=True)
    return sympy.And(*(_RELATIONALS[operator](*pair) for pair, operator in pairs)).as_set()
