"""Tasks of the lab: where its prompts come from and how a response is scored.

Covered: the tiny CountDown (`vlnorm_verl.tasks.tiny`, no file needed), CountDown and Math from the parquet files that
`vlnorm-verl data` writes, and any parquet file of verl with a reward of one's own. Not covered: images, tools, rewards
that are coroutines or models.
"""

from __future__ import annotations

import importlib
import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from vlnorm_verl.files import UserError, require
from vlnorm_verl.tasks.base import content_sha256

REWARDS = {
    "tiny": "vlnorm_verl.tasks.tiny.countdown",
    "countdown": "vlnorm_verl.tasks.countdown",
    "math": "vlnorm_verl.tasks.math",
}
TASKS = (*REWARDS, "custom")
COLUMNS = ("data_source", "prompt", "reward_model")

Messages = list[dict[str, str]]  # of a chat: role and content


class Question(NamedTuple):
    """A prompt and what its responses are scored by."""

    messages: Messages
    ground_truth: Any
    data_source: str
    extra_info: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """
    Args:
        name: one of TASKS.
        data: verl's parquet file; None for the tiny task.
        compute_score: the task's reward, in the signature of verl's custom reward.
        reward: of a reward of one's own, its path, name and file's checksum.
    """

    name: str
    data: Path | None
    compute_score: Callable[..., Any]
    reward: dict[str, str] | None = None

    def questions(self, count: int, seed: int) -> list[Question]:
        """Different problems of the training set, the same for the same seed.

        Raises:
            UserError: there are fewer than `count`, a row's prompt is not a chat of texts, or it has no ground truth.
        """
        if self.data is None:
            from vlnorm_verl.tasks.tiny.data import rows

            return [_question(row, self.data) for row in rows(count, seed, "train")]
        import pyarrow.parquet as pq

        table = pq.read_table(self.data)
        if table.num_rows < count:
            raise UserError(f"--data {self.data} has {table.num_rows} rows, {count} prompts are asked for")
        chosen = random.Random(f"lab-{seed}").sample(range(table.num_rows), count)
        return [_question(row, self.data) for row in table.take(chosen).to_pylist()]

    def score(self, question: Question, response: str) -> float:
        """Reward of a response's text.

        Raises:
            UserError: the reward is not a finite number.
        """
        result = self.compute_score(
            data_source=question.data_source,
            solution_str=response,
            ground_truth=question.ground_truth,
            extra_info=question.extra_info,
        )
        score = result.get("score") if isinstance(result, dict) else result
        if not isinstance(score, Real) or not math.isfinite(score):
            raise UserError(
                f"the reward of a response is {result!r:.200}; accepted: a finite number, or a dictionary with one as "
                f"'score'. The response: {response!r:.200}"
            )
        return float(score)


def load_task(
    name: str, data: Path | None = None, reward: str | None = None, reward_name: str = "compute_score"
) -> Task:
    """
    Args:
        name: one of TASKS.
        data: verl's parquet file of the task; the tiny task takes none.
        reward: of the task "custom" alone: file or pkg://module of its reward, as verl's reward.custom_reward_function.
        reward_name: of the function there.

    Raises:
        UserError: unknown task, a file that is missing, unreadable or lacks columns, or no such reward.
    """
    require(f"--task {name}", name, TASKS)
    if (name == "custom") != (reward is not None):
        raise UserError(f"--task {name}, --reward {reward}: --task custom and --reward belong together")
    if name == "tiny" and data is not None:
        raise UserError(f"--data {data}: --task tiny makes its own prompts; leave --data out")
    if name != "tiny":
        if data is None:
            made_by = "of verl" if name == "custom" else f"that `vlnorm-verl data {name}` writes"
            raise UserError(f"--task {name} needs --data FILE, a parquet file {made_by}")
        _check_columns(data)
    if reward is None:
        return Task(name, data, importlib.import_module(REWARDS[name]).compute_score)
    function = _own_reward(reward, reward_name)
    sha256 = content_sha256(Path(inspect.getfile(function)))
    return Task(name, data, function, {"path": reward, "name": reward_name, "sha256": sha256})


def _own_reward(path: str, name: str) -> Callable[..., Any]:
    from verl.utils.import_utils import load_extern_object

    try:
        function = load_extern_object(path, name)
    except (OSError, ImportError, RuntimeError, AttributeError) as error:
        reason = error.__cause__ or error
        here = ". `python -m vlnorm_verl lab run` looks in this folder, too" if path.startswith("pkg://") else ""
        raise UserError(f"--reward {path}, --reward-name {name}: cannot be loaded: {reason}{here}") from error
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        raise UserError(
            f"--reward {path}, --reward-name {name}: {function!r:.100} is not a plain function (def); "
            "wrap it in one, a coroutine with asyncio.run"
        )
    return function


def _check_columns(data: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(data).names
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"--data {data} cannot be read as a parquet file: {error}") from error
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise UserError(f"--data {data} lacks {', '.join(missing)}; it has {', '.join(columns)}")


def _question(row: dict[str, Any], data: Path | None) -> Question:
    try:
        if not row["prompt"] or not all(isinstance(message["content"], str) for message in row["prompt"]):
            raise TypeError
        extra_info = row.get("extra_info") or {}  # as verl's data set
        return Question(row["prompt"], row["reward_model"]["ground_truth"], row["data_source"], extra_info)
    except (KeyError, TypeError):
        raise UserError(
            f"--data {data}: `prompt` must be a chat, a list of messages with a text, and `reward_model` must have a "
            f"`ground_truth`, not {row!r:.300}"
        ) from None
