"""Tasks of the lab: where its prompts come from and how a response is scored.

Covered: the tiny CountDown (`vlnorm_verl.tasks.tiny`, no file needed), and CountDown and Math from the parquet files
that `vlnorm-verl data` writes. A prompt is the text of its one user message and goes to the tokenizer as it is, without
a chat template, as in the recipes. Not covered: prompts of several messages, images, tools.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlnorm_verl.files import UserError

TASKS = ("tiny", "countdown", "math")
COLUMNS = ("data_source", "prompt", "reward_model")


class Question(NamedTuple):
    """A prompt and what its responses are scored by."""

    prompt: str
    ground_truth: str
    data_source: str


@dataclass(frozen=True)
class Task:
    """
    Args:
        name: one of TASKS.
        data: verl's parquet file; None for the tiny task.
        compute_score: the task's reward, in the signature of verl's custom reward.
    """

    name: str
    data: Path | None
    compute_score: Callable[..., dict[str, Any]]

    def questions(self, count: int, seed: int) -> list[Question]:
        """Different problems of the training set, the same for the same seed.

        Raises:
            UserError: there are fewer than `count`, or a row's prompt is not one message.
        """
        if self.data is None:
            return _tiny_questions(count, seed)
        import pyarrow.parquet as pq

        table = pq.read_table(self.data, columns=list(COLUMNS))
        if table.num_rows < count:
            raise UserError(f"--data {self.data} has {table.num_rows} rows, {count} prompts are asked for")
        chosen = random.Random(f"lab-{seed}").sample(range(table.num_rows), count)
        return [_question(row, self.data) for row in table.take(chosen).to_pylist()]

    def score(self, question: Question, response: str) -> float:
        """Reward of a response's text."""
        result = self.compute_score(
            data_source=question.data_source, solution_str=response, ground_truth=question.ground_truth
        )
        return float(result["score"])


def load_task(name: str, data: Path | None = None) -> Task:
    """
    Args:
        name: one of TASKS.
        data: verl's parquet file of the task; the tiny task takes none.

    Raises:
        UserError: unknown task, or a file that is missing, unreadable or lacks columns.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name.lower(), TASKS, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"--task {name} is not known.{hint} Accepted: {', '.join(TASKS)}")
    if name == "tiny":
        if data is not None:
            raise UserError(f"--data {data}: --task tiny makes its own prompts; leave --data out")
        from vlnorm_verl.tasks.tiny.countdown import compute_score

        return Task(name, None, compute_score)
    if data is None:
        raise UserError(f"--task {name} needs --data FILE, a parquet file that `vlnorm-verl data {name}` writes")
    _check_columns(data)
    if name == "countdown":
        from vlnorm_verl.tasks import countdown

        return Task(name, data, countdown.compute_score)
    from vlnorm_verl.tasks import math

    return Task(name, data, math.compute_score)


def _check_columns(data: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not data.is_file():
        raise UserError(f"--data {data}: there is no such file")
    try:
        columns = pq.read_schema(data).names
    except pa.ArrowException as error:
        raise UserError(f"--data {data} is not a parquet file: {error}") from error
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise UserError(f"--data {data} lacks {', '.join(missing)}; it has {', '.join(columns)}")


def _tiny_questions(count: int, seed: int) -> list[Question]:
    from vlnorm_verl.tasks.countdown import ground_truth
    from vlnorm_verl.tasks.tiny.countdown import DATA_SOURCE, distinct_problems, render_prompt

    try:
        problems = distinct_problems(count, seed, "train")
    except UserError as error:
        raise UserError(f"--task tiny: {error}") from error
    return [Question(render_prompt(problem), ground_truth(problem), DATA_SOURCE) for problem in problems]


def _question(row: dict[str, Any], data: Path) -> Question:
    messages = row["prompt"]
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0].get("content"), str):
        raise UserError(f"--data {data}: `prompt` must be one message with a text, not {messages!r:.200}")
    return Question(messages[0]["content"], row["reward_model"]["ground_truth"], row["data_source"])
