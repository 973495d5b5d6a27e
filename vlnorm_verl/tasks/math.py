r"""Math: its prompt, the rows of its data sets, and its reward.

A response is right if what its last ``\boxed{…}`` holds is equal to the answer.

A text is read whole (`latex.reading`) or not at all, and compared exactly (`latex.equality`; one tolerance: 0.333333 is
1/3, six significant digits). docs/rewards.md says what counts as equal, and compares with other rules.

sympy can take for ever or all memory on what a model writes: it runs in worker processes with limits. `latex.pool` has
a table of what becomes of which failure; one of the machine is never a score.

Source of the rule: the paper's code (`open_reasoner_zero.py` and its server). Differences: there an answer of more than
30 characters scores 0 unless it is the same text, the comparison is sympy's, without a ``\boxed`` the whole response is
the answer, and an outage of the server scores 0.

    reward.custom_reward_function.path=pkg://vlnorm_verl.tasks.math
    +reward.custom_reward_function.reward_kwargs.limit_s=5
"""

from __future__ import annotations

import os
import re
from math import isfinite
from typing import Any

from vlnorm_verl.tasks.latex.pool import LIMIT_S, MAX_FAILURE_RATE, MEMORY_MIB, WORKERS, Pool

OUTCOMES = ("correct", "wrong", "unparsable", "timeout", "crash", "gold_unparsed")

# Data of the authors' repository (github.com/zerolllin/Delta-L-Normalization, open_reasoner_zero_nochat.py): the whole
# text that a base model continues. Two details that an editor would "repair", and that change the tokens: the blank
# before the empty line, and nothing after <think>. It is not Open-Reasoner-Zero's own: case, tags and breaks differ.
TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. \n"
    "\n"
    "User: You must put your answer inside <answer> </answer> tags, i.e.,\n"
    "<answer> answer here </answer>. And your final answer will be extracted automatically by the \\boxed{} tag.\n"
    "{question}\n"
    "Assistant: <think>"
)

_QUESTION_COLUMNS = ("problem", "question", "Problem", "Question")
_ANSWER_COLUMNS = ("answer", "final_answer", "Answer")

MAX_ANSWER_LENGTH = 1000  # characters between the braces of \boxed{}

_BOXED = re.compile(r"\\boxed\s*\{")
_BRACES = re.compile(r"[{}]|\\.", re.DOTALL)  # or an escaped character, which is none


def prompt(question: str) -> str:
    """The paper's prompt, to the character. The question is taken as it is: its braces, blanks and line breaks stay."""
    return TEMPLATE.replace("{question}", question)


def read_row(raw: Any) -> tuple[str, str]:
    """Question and answer of one row of any accepted format; the answer as the authors' code reads it.

    A list of answers (Minerva) counts by its first entry. Blanks around an answer are dropped, which the authors do
    for Minerva only. A number becomes its Python text: AMC's answers are floats, so ``142.0``.

    Raises:
        ValueError: no such format.
    """
    try:
        if isinstance(raw, list):  # Open-Reasoner-Zero, training: [{"value": q}, {"ground_truth": {"value": a}}]
            question, answer = raw[0]["value"], raw[1]["ground_truth"]["value"]
        elif isinstance(raw.get("prompt"), list):  # Open-Reasoner-Zero, evaluation
            (message,) = raw["prompt"]
            question, answer = message["value"], raw["final_answer"]
        else:
            question = next(raw[column] for column in _QUESTION_COLUMNS if column in raw)
            answer = next(raw[column] for column in _ANSWER_COLUMNS if column in raw)
        if isinstance(answer, list):
            answer = answer[0]
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
        columns = f"{' or '.join(_QUESTION_COLUMNS)}, and {' or '.join(_ANSWER_COLUMNS)}"
        raise ValueError(f"columns {columns} not found in {raw!r:.200}") from None
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question must be a text, in {raw!r:.200}")
    number = type(answer) is int or (isinstance(answer, float) and isfinite(answer))  # True is no answer
    if not number and not (isinstance(answer, str) and answer.strip()):
        raise ValueError(f"the answer must be a text or a finite number, in {raw!r:.200}")
    return question, str(answer).strip()


_pools: dict[tuple[float, ...], Pool] = {}  # one for each set of settings in this process
os.register_at_fork(after_in_child=_pools.clear)  # a child would read the verdicts of its parent's answers


def extract_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{…}`` holds, without outer white space and dollars.

    None without one, if its braces do not close, or if it is longer than MAX_ANSWER_LENGTH. Escaped braces (``\{``) are
    text. Time is linear in the text.
    """
    _, *insides = _BOXED.split(text)
    if not insides:
        return None
    inside = insides[-1][: MAX_ANSWER_LENGTH + 1]  # one more for the closing brace
    depth = 1
    for match in _BRACES.finditer(inside):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return _strip(inside[: match.start()])
    return None


def _strip(answer: str) -> str:
    """Without white space and dollars around it; not the dollar of currency, \\$."""
    answer = re.sub(r"^[\s$]+", "", answer)
    end = len(answer)
    while end and (answer[end - 1].isspace() or (answer[end - 1] == "$" and answer[end - 2 : end - 1] != "\\")):
        end -= 1
    return answer[:end]


def judge(response: str, gold: str, pool: Pool) -> str:
    r"""The outcome of a response, one of OUTCOMES.

    ``unparsable``: no closed ``\boxed{…}`` of at most MAX_ANSWER_LENGTH characters, or a part of it was not
    understood; ``timeout`` and ``crash``: see the module; ``gold_unparsed``: a part of the *right* answer was not
    understood, so that texts were compared, and they differ. The others say it themselves.

    Raises:
        InfrastructureError: see the module.
    """
    answer = extract_boxed(response)
    if not answer:
        return "unparsable"
    if answer == gold:
        return "correct"
    return pool.compare(gold, answer)


def parse_ground_truth(value: str) -> str:
    r"""The right answer, out of its ``\boxed{}`` if it has one.

    Raises:
        ValueError: it is not a text, or an empty one: the data file is not this task's.
    """
    gold = (extract_boxed(value) or _strip(value)) if isinstance(value, str) else ""
    if not gold:
        raise ValueError(f"reward_model.ground_truth must be the right answer as a text, like 42, not {value!r:.200}")
    return gold


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any] | None = None,
    limit_s: float = LIMIT_S,
    workers: int = WORKERS,
    memory_mib: int = MEMORY_MIB,
    max_failure_rate: float = MAX_FAILURE_RATE,
    **kwargs: Any,
) -> dict[str, Any]:
    """verl's custom reward (``reward.custom_reward_function``): 1.0 for a correct answer, else 0.0.

    ``validation_set`` names the data set in verl's dumps of validation, which hold several sets without their names.
    verl calls it in threads of its reward workers, as many as it likes; ``workers`` answers are compared at a time.

    Args:
        solution_str: the response alone, decoded.
        ground_truth: the right answer, LaTeX or plain.
        limit_s, workers, memory_mib, max_failure_rate: see `Pool`; set them in
            ``reward.custom_reward_function.reward_kwargs``.

    Raises:
        ValueError: ``ground_truth`` is not this task's. A bad response never raises.
        InfrastructureError: see the module.
    """
    settings = (limit_s, workers, memory_mib, max_failure_rate)
    pool = _pools.setdefault(settings, Pool(*settings))  # one that is not used has no workers
    outcome = judge(solution_str, parse_ground_truth(ground_truth), pool)
    score = float(outcome == "correct")
    return {"score": score, "acc": score, "outcome": outcome, "validation_set": data_source}
