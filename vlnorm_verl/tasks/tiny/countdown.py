"""CountDown with small numbers: prompt, written search traces, and the reward.

A problem is three numbers and a target; the answer is an expression that uses every number exactly once and
is worth the target. **Expressions are read strictly from left to right, without operator precedence and
without brackets**: ``2+3*4`` is (2 + 3) * 4 = 20, not 14. The operators are ``+ - *``.

    prompt     07,03,12>bp:                 numbers with two digits each; the target 18 in letters of its own
    response   7*3=21-12=9;7-3=4+12=16;12+3=15+7=22;...;A:7+3-12.

The response is a search: attempts ``a*b=m-c=r`` closed by ``;`` (go on) or ``!`` (the target was hit), then the
answer ``A:a*b-c`` and ``.``, which is the end-of-sequence token. The search stops at the hit or when it gives
up, so response lengths spread over more than ten times: that is what length-dependent loss normalisation is
about. The target has its own letters (one for the tens, one for the units) because a small model that sees it
in ordinary digits learns the arithmetic but not to compare a result with the target.

Covered: seeded problems, the held-out split, prompts of one fixed length, traces with documented noise, and
``compute_score`` in the signature of verl's custom reward. Pure Python: neither torch nor verl is imported. A problem
and its ground truth are those of `tasks.countdown`. Not covered: division, brackets, numbers above 12, other counts of
numbers.

    pytest tests/test_tiny.py
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from vlnorm_verl.tasks.base import Split, distinct, hash_picks
from vlnorm_verl.tasks.countdown import OPERATORS, Problem, parse_ground_truth

DATA_SOURCE = "vlnorm_tiny_countdown"
MAX_NUMBER = 12
MAX_TARGET = 60
MAX_VALUE = 150  # intermediate and final values stay in 0..MAX_VALUE
SYMBOLS = "+-*"
TENS_LETTERS = "abcdefg"  # target // 10
UNITS_LETTERS = "hijklmnopq"  # target % 10
PROMPT_LENGTH = 12

# The noise of the traces: what is left for RL to improve.
GIVE_UP_PROBABILITY = 0.08  # before each attempt
WRONG_RESULT_PROBABILITY = 0.02  # of a final result, by 1 to 3

HELD_OUT_ONE_IN = 8  # one problem in 8 is never trained on

# The answer is looked for in the last characters only, which bounds the work on any text.
_ANSWER_WINDOW = 64
_ANSWER = re.compile(r"A:([0-9]{1,2})([-+*])([0-9]{1,2})([-+*])([0-9]{1,2})\.?", re.ASCII)


class Expression(NamedTuple):
    """``a op1 b op2 c``, read from left to right."""

    a: int
    op1: str
    b: int
    op2: str
    c: int

    def __str__(self) -> str:
        return f"{self.a}{self.op1}{self.b}{self.op2}{self.c}"

    @property
    def middle(self) -> int:
        return int(OPERATORS[self.op1](self.a, self.b))

    @property
    def value(self) -> int:
        return int(OPERATORS[self.op2](self.middle, self.c))


def _equivalence_key(expression: Expression) -> tuple[Any, ...]:
    """The same key for expressions that differ only by commuting their terms or factors."""
    a, op1, b, op2, c = expression
    sign = {"+": 1, "-": -1}
    if op1 == op2 == "*":
        return ("product", *sorted((a, b, c)))
    if op1 == "*":
        return ("product-then", *sorted((a, b)), sign[op2] * c)
    if op2 == "*":
        return ("sum-times", *sorted((a, sign[op1] * b)), c)
    return ("sum", *sorted((a, sign[op1] * b, sign[op2] * c)))


@cache
def expressions(numbers: tuple[int, ...]) -> tuple[Expression, ...]:
    """One representative of every class of equivalent expressions whose values stay in 0..MAX_VALUE."""
    representatives: dict[tuple[Any, ...], Expression] = {}
    for a, b, c in itertools.permutations(numbers):
        for op1, op2 in itertools.product(SYMBOLS, repeat=2):
            expression = Expression(a, op1, b, op2, c)
            if 0 <= expression.middle <= MAX_VALUE and 0 <= expression.value <= MAX_VALUE:
                representatives.setdefault(_equivalence_key(expression), expression)
    return tuple(representatives.values())


@cache
def reachable_targets(numbers: tuple[int, ...]) -> tuple[int, ...]:
    values = {expression.value for expression in expressions(numbers)}
    return tuple(sorted(value for value in values if 1 <= value <= MAX_TARGET))


def is_held_out(problem: Problem) -> bool:
    """No reordering of a held-out problem is trained on."""
    return hash_picks(f"{sorted(problem.numbers)}>{problem.target}", HELD_OUT_ONE_IN)


def problems(seed: int, split: Split) -> Iterator[Problem]:
    """An endless stream of problems of one split; the same seed gives the same stream everywhere."""
    rng = random.Random(f"countdown-{split}-{seed}")
    while True:
        numbers = (rng.randint(1, MAX_NUMBER), rng.randint(1, MAX_NUMBER), rng.randint(1, MAX_NUMBER))
        targets = reachable_targets(numbers)
        if not targets:
            continue
        problem = Problem(numbers, rng.choice(targets))
        if is_held_out(problem) == (split == "test"):
            yield problem


def distinct_problems(count: int, seed: int, split: Split) -> list[Problem]:
    """The first ``count`` different problems of the stream.

    Raises:
        UserError: the split does not hold that many (it holds 2,000 to 15,000).
    """
    return list(distinct(problems(seed, split), count, lambda problem: problem, f"ask for fewer of the {split} split"))


def render_prompt(problem: Problem) -> str:
    """Always PROMPT_LENGTH characters, so that verl never pads or cuts a prompt."""
    tens, units = divmod(problem.target, 10)
    numbers = ",".join(f"{n:02d}" for n in problem.numbers)
    return f"{numbers}>{TENS_LETTERS[tens]}{UNITS_LETTERS[units]}:"


def search_trace(problem: Problem, rng: random.Random) -> str:
    """A written search as the warm start is taught it, end mark included.

    A written result is wrong by 1 to 3 with WRONG_RESULT_PROBABILITY, but never wrong so that it shows the
    target: every ``!`` of a trace is true.
    """
    untried = list(expressions(problem.numbers))
    rng.shuffle(untried)
    tried: list[Expression] = []
    written: list[str] = []
    answer: Expression | None = None
    while untried and rng.random() >= GIVE_UP_PROBABILITY:
        expression = untried.pop()
        tried.append(expression)
        result = expression.value
        if rng.random() < WRONG_RESULT_PROBABILITY:
            wrong = [expression.value + d for d in (-3, -2, -1, 1, 2, 3)]
            result = rng.choice([w for w in wrong if 0 <= w <= MAX_VALUE and w != problem.target])
        hit = result == problem.target
        a, op1, b, op2, c = expression
        written.append(f"{a}{op1}{b}={expression.middle}{op2}{c}={result}{'!' if hit else ';'}")
        if hit:
            answer = expression
            break
    if answer is None:
        # A slip can hide the only solution: then everything was tried, and any guess is as good.
        answer = rng.choice(untried or tried)
    return "".join(written) + f"A:{answer}."


def judge(response: str, problem: Problem) -> str:
    """The outcome of a response: ``correct``, or what is wrong with it.

    ``no_answer``: the text does not END with a well-formed ``A:a*b-c`` (cut at the length limit, for one);
    ``wrong_numbers``: not each given number exactly once; ``wrong_value``: not worth the target, left to right.

    Nothing is evaluated as code, and only the last characters are read: safe and bounded on hostile text.
    """
    tail = response[-_ANSWER_WINDOW:]
    match = _ANSWER.fullmatch(tail, max(tail.rfind("A:"), 0))
    if match is None:
        return "no_answer"
    a, op1, b, op2, c = match.groups()
    expression = Expression(int(a), op1, int(b), op2, int(c))
    if sorted((expression.a, expression.b, expression.c)) != sorted(problem.numbers):
        return "wrong_numbers"
    return "correct" if expression.value == problem.target else "wrong_value"


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | Mapping[str, Any],
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """verl's custom reward (``reward.custom_reward_function``): 1.0 for a right answer, else 0.0.

    verl decodes without special tokens, so the final ``.`` may be absent. ``acc`` is the key that verl's
    validation reports; ``outcome`` (see ``judge``) goes into the dumped generations.

    Raises:
        ValueError: ``ground_truth`` is not this task's. A bad response never raises.
    """
    problem = parse_ground_truth(ground_truth)
    if len(problem.numbers) != 3:
        raise ValueError(f"reward_model.ground_truth must have three numbers for the tiny CountDown, not {problem}")
    outcome = judge(solution_str, problem)
    score = float(outcome == "correct")
    return {"score": score, "acc": score, "outcome": outcome}
