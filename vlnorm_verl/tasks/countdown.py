"""CountDown: its prompt, its ground truth, and its reward.

An answer is an arithmetic expression that uses every given number exactly once and is worth the target. The reward's
rule is the paper's (`verl/utils/reward_score/countdown.py` of its code): of the response's last line the last
``<answer>…</answer>`` counts, and the score is 1 or 0. Verdicts on well-formed answers are the same. The differences:

| here                                                     | in the paper's code                                       |
|----------------------------------------------------------|-----------------------------------------------------------|
| no code is evaluated; time is linear in the response     | `eval` on the model's text                                |
| exact fractions                                          | floats, within 1e-5. Never another verdict for up to four |
|                                                          | numbers to 100 and a target from 1: what is not the       |
|                                                          | target differs from it by 1e-4 or more                    |
| no power ``**`` and no floor division ``//``: malformed  | both are evaluated                                        |
| no decimals: ``1.5`` is malformed; ``3.`` is read as 3   | ``1.5`` uses up the numbers 1 and 5, and is worth 1.5     |
| answers above MAX_ANSWER_LENGTH characters: too long     | any length                                                |
| an "Assistant:" in the response means nothing            | what is before the response's first "Assistant:" (or      |
|                                                          | "<|im_start|>assistant") is not read: an answer on the    |
|                                                          | last line before a first one there does not count         |

Covered: outcome classes, exact arithmetic, hostile text (tests/test_rewards_countdown.py). Pure Python: neither torch
nor verl is imported here.

    reward.custom_reward_function.path=pkg://vlnorm_verl.tasks.countdown
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

OUTCOMES = ("correct", "wrong_value", "wrong_numbers", "no_answer", "malformed", "too_long")
MAX_ANSWER_LENGTH = 256  # characters; an answer with four numbers needs about 20

_OPEN, _CLOSE = "<answer>", "</answer>"
_TOKEN = re.compile(r"[ \t]*(?:([0-9]+)\.?|([-+*/()]))")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}

# Data of the authors' repository (github.com/zerolllin/Delta-L-Normalization, examples/data_preprocess/countdown.py,
# template `base`): the whole text that a base model continues. Nothing follows <think>, no newline and no blank.
TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer.\n"
    "User: Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic "
    "operations (+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And "
    "return the final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.\n"
    "Assistant: Let me solve this step by step.\n"
    "<think>"
)


class Problem(NamedTuple):
    """The given numbers, in any order, and the target."""

    numbers: tuple[int, ...]
    target: int


def prompt(problem: Problem) -> str:
    """The paper's prompt, to the character; the numbers read ``[44, 19, 35]``."""
    return TEMPLATE.format(numbers=list(problem.numbers), target=problem.target)


def read_row(raw: Any) -> Problem:
    """The problem of one row of a data set, with the columns ``nums`` (or ``numbers``) and ``target``.

    Raises:
        ValueError: no such format.
    """
    try:
        return _problem(raw["nums"] if "nums" in raw else raw["numbers"], raw["target"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"columns nums (whole numbers, none below 0) and target (a whole number) not found in {raw!r:.200}"
        ) from None


def _problem(numbers: Iterable[Any], target: Any) -> Problem:
    # operator.index takes numpy's integers, and refuses floats and strings, which int() would round or parse.
    problem = Problem(tuple(map(operator.index, numbers)), operator.index(target))
    if not problem.numbers or min(problem.numbers) < 0:  # an answer's -3 is the sign of a 3
        raise ValueError("no numbers, or one below 0")
    return problem


def ground_truth(problem: Problem) -> str:
    """A JSON string: survives parquet, whose nested types would merge the rows' fields."""
    return json.dumps({"numbers": list(problem.numbers), "target": problem.target})


def parse_ground_truth(value: str | Mapping[str, Any]) -> Problem:
    """
    Args:
        value: what ``ground_truth`` writes, or a mapping with its fields, whose numbers may be a numpy array (so
            TinyZero's parquet files hold it).

    Raises:
        ValueError: it is neither, or a number is not whole or below 0: the data file is not this task's.
    """
    try:
        fields = json.loads(value) if isinstance(value, str) else value
        return _problem(fields["numbers"], fields["target"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "reward_model.ground_truth must be a JSON string or a mapping like "
            f'{{"numbers": [3, 5, 7], "target": 8}}, no number below 0, not {value!r:.200}; '
            "make the string with vlnorm_verl.tasks.countdown.ground_truth"
        ) from error


def extract_answer(response: str) -> str | None:
    """What the last ``<answer>…</answer>`` of the last line holds, without outer white space; None without one."""
    line = response.strip().rpartition("\n")[2]
    # Pair by pair from the left, as the paper's regular expression does, whose time is quadratic in unclosed tags.
    answers = [part.partition(_OPEN)[2] for part in line.split(_CLOSE)[:-1] if _OPEN in part]
    return answers[-1].strip() if answers else None


def parse_expression(text: str) -> list[int | str] | None:
    """The expression in postfix order, or None if it is malformed.

    Numbers are ints; operators are ``+ - * /``, and ``negate`` for the sign; a plus sign is left out. Dijkstra's
    shunting-yard: every token is pushed and popped once, and there is no recursion that brackets could exhaust.
    """
    output: list[int | str] = []
    pending: list[str] = []  # operators and brackets whose right side is not complete
    operand_next = True
    text = text.strip()
    position = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            return None
        position = token.end()
        digits, symbol = token.groups()
        if digits is not None:
            # As in Python, only zero itself starts with a zero.
            if not operand_next or (digits[0] == "0" and digits.strip("0")):
                return None
            output.append(int(digits))
            operand_next = False
        elif symbol == "(":
            if not operand_next:
                return None
            pending.append(symbol)
        elif symbol == ")":
            if operand_next:
                return None
            while pending and pending[-1] != "(":
                output.append(pending.pop())
            if not pending:
                return None
            pending.pop()
        elif operand_next:
            if symbol == "-":
                pending.append("negate")
            elif symbol != "+":
                return None
        else:
            while pending and _PRECEDENCE[pending[-1]] >= _PRECEDENCE[symbol]:
                output.append(pending.pop())
            pending.append(symbol)
            operand_next = True
    if operand_next or "(" in pending:
        return None
    return output + pending[::-1]


def evaluate(postfix: list[int | str]) -> Fraction | None:
    """The exact value of what ``parse_expression`` returned, or None where it divides by zero."""
    stack: list[Fraction] = []
    for item in postfix:
        if isinstance(item, int):
            stack.append(Fraction(item))
        elif item == "negate":
            stack.append(-stack.pop())
        else:
            right, left = stack.pop(), stack.pop()
            if item == "/" and right == 0:
                return None
            stack.append(OPERATORS[item](left, right))
    return stack.pop()


def judge(response: str, problem: Problem) -> str:
    """The outcome of a response, one of OUTCOMES.

    ``no_answer``: no ``<answer>…</answer>`` on the last line; ``too_long``: more than MAX_ANSWER_LENGTH characters in
    it; ``malformed``: not an expression of whole numbers, ``+ - * /`` and brackets; ``wrong_numbers``: not each given
    number exactly once; ``wrong_value``: not worth the target, or a division by zero.
    """
    answer = extract_answer(response)
    if answer is None:
        return "no_answer"
    if len(answer) > MAX_ANSWER_LENGTH:
        return "too_long"
    postfix = parse_expression(answer)
    if postfix is None:
        return "malformed"
    # Before any arithmetic: it bounds the size of what is computed by the given numbers.
    if sorted(item for item in postfix if isinstance(item, int)) != sorted(problem.numbers):
        return "wrong_numbers"
    return "correct" if evaluate(postfix) == problem.target else "wrong_value"


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | Mapping[str, Any],
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """verl's custom reward (``reward.custom_reward_function``): 1.0 for a correct answer, else 0.0.

    Args:
        solution_str: the response alone, decoded.
        ground_truth: see ``parse_ground_truth``.

    Raises:
        ValueError: ``ground_truth`` is not this task's. A bad response never raises.
    """
    outcome = judge(solution_str, parse_ground_truth(ground_truth))
    score = float(outcome == "correct")
    return {"score": score, "acc": score, "outcome": outcome, "validation_set": data_source}
