"""The offline sets: generated problems in the schema of the real ones, so that everything runs without a network.

Covered: CountDown with 3 or 4 numbers, each problem exactly solvable and shipped with a solution; short arithmetic
and algebra problems with exact answers under the names of the five Math sets. The same seed and sizes give the same
rows everywhere. Not covered: the real sets' difficulty or their distribution. Scores on these files say nothing
about MATH500, AIME2024, AMC or Minerva: rows carry ``extra_info.origin = "generated"``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator
from fractions import Fraction
from typing import NamedTuple

from vlnorm_verl.tasks.base import Split, distinct, hash_picks
from vlnorm_verl.tasks.countdown import OPERATORS, Problem
from vlnorm_verl.tasks.sources import MATH

MAX_NUMBER = 99  # ranges of Countdown-Tasks-3to4 as seen in its published examples, not documented by its makers
TARGETS = range(10, 101)
HELD_OUT_ONE_IN = 16  # one CountDown problem in 16 is never trained on, whatever the sizes and the seed


class Solved(NamedTuple):
    problem: Problem
    solution: str  # ordinary precedence; uses every number exactly once


def countdown(split: Split, count: int, seed: int) -> Iterator[Solved]:
    """``count`` problems of a split, different from each other in any order of their numbers.

    Raises:
        UserError: there are not so many.
    """
    rng = random.Random(f"countdown-{split}-{seed}")

    def key(solved: Solved) -> tuple[tuple[int, ...], int]:
        return tuple(sorted(solved.problem.numbers)), solved.problem.target

    def drawn() -> Iterator[Solved | None]:
        while True:
            solved = _random_countdown(rng)
            held_out = solved is not None and hash_picks(repr(key(solved)), HELD_OUT_ONE_IN)
            yield solved if held_out == (split == "test") else None

    return distinct(drawn(), count, key, f"lower --{split}-rows")


def _random_countdown(rng: random.Random) -> Solved | None:
    """Joins random numbers by random operators until one value is left; None if that is no target."""
    numbers = tuple(rng.randint(1, MAX_NUMBER) for _ in range(rng.choice((3, 4))))
    terms = [(Fraction(n), str(n)) for n in numbers]
    while len(terms) > 1:
        left, left_text = terms.pop(rng.randrange(len(terms)))
        right, right_text = terms.pop(rng.randrange(len(terms)))
        symbol = rng.choice("+-*/")
        if symbol == "/" and right == 0:
            return None
        terms.append((OPERATORS[symbol](left, right), f"({left_text} {symbol} {right_text})"))
    value, text = terms[0]
    if value.denominator != 1 or int(value) not in TARGETS:
        return None
    return Solved(Problem(numbers, int(value)), text[1:-1])


def _latex(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _signed(n: int) -> str:
    return f"- {-n}" if n < 0 else f"+ {n}"


def _product(rng: random.Random) -> tuple[str, Fraction]:
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(-99, 99)
    return f"Compute ${a} \\cdot {b} {_signed(c)}$.", Fraction(a * b + c)


def _linear(rng: random.Random) -> tuple[str, Fraction]:
    a, b, c = rng.randint(2, 20), rng.randint(-50, 50), rng.randint(-50, 50)
    return f"Solve ${a}x {_signed(b)} = {c}$ for $x$.", Fraction(c - b, a)


def _fractions(rng: random.Random) -> tuple[str, Fraction]:
    a, b, c, d = (rng.randint(1, 20) for _ in range(4))
    question = f"Write $\\frac{{{a}}}{{{b}}} + \\frac{{{c}}}{{{d}}}$ as a reduced fraction or a whole number."
    return question, Fraction(a, b) + Fraction(c, d)


def _remainder(rng: random.Random) -> tuple[str, Fraction]:
    base, exponent, modulus = rng.randint(2, 30), rng.randint(5, 200), rng.randint(7, 999)
    question = f"Find the remainder when ${base}^{{{exponent}}}$ is divided by ${modulus}$."
    return question, Fraction(pow(base, exponent, modulus))


def _series(rng: random.Random) -> tuple[str, Fraction]:
    first, step, terms = rng.randint(1, 30), rng.randint(1, 12), rng.randint(3, 30)
    question = (
        f"An arithmetic sequence has first term ${first}$ and common difference ${step}$. "
        f"Find the sum of its first ${terms}$ terms."
    )
    return question, Fraction(terms * (2 * first + (terms - 1) * step), 2)


def _roots(rng: random.Random) -> tuple[str, Fraction]:
    p, q = rng.randint(1, 40), rng.randint(-40, 40)
    question = (
        f"Let $r$ and $s$ be the roots of $x^2 - {p}x {_signed(q)} = 0$. Find $r^2 + s^2$, counting complex roots too."
    )
    return question, Fraction(p * p - 2 * q)


Family = Callable[[random.Random], tuple[str, Fraction]]
_ANY: tuple[Family, ...] = (_product, _linear, _fractions, _remainder, _series, _roots)
_WHOLE: tuple[Family, ...] = (_product, _remainder, _series, _roots)


def math_problems(train_rows: int, test_rows: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """Question and answer of every set's problems; no question occurs twice, in one set or in two.

    Answers look like the real sets': whole numbers of 0 to 999 in aime2024, floats such as ``142.0`` in amc.

    Raises:
        UserError: there are not so many.
    """
    seen: set[Hashable] = set()
    made = {}
    for name in MATH:
        count, option = (train_rows, "--train-rows") if name == "train" else (test_rows, "--test-rows")
        drawn = _random_math(name, random.Random(f"math-{name}-{seed}"))
        made[name] = list(distinct(drawn, count, lambda pair: pair[0], f"lower {option}", seen))
    return made


def _random_math(name: str, rng: random.Random) -> Iterator[tuple[str, str] | None]:
    families = _WHOLE if name in ("aime2024", "amc") else _ANY
    while True:
        question, value = rng.choice(families)(rng)
        fits = name != "aime2024" or 0 <= value <= 999
        yield (question, str(float(value)) if name == "amc" else _latex(value)) if fits else None
