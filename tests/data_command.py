"""`vlnorm-verl data` as the tests call it, with what they ask for and expect."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from typer.testing import CliRunner

from vlnorm_verl.cli import app

SAMPLES = Path(__file__).parent / "data_samples"
MATH_FILES = ["train.parquet", "math500.parquet", "aime2024.parquet", "amc.parquet", "minerva.parquet"]
SMALL_COUNTDOWN = ["countdown", "--offline", "--train-rows", "40", "--test-rows", "10"]
SMALL_MATH = ["math", "--offline", "--train-rows", "60", "--test-rows", "20"]

COUNTDOWN_PROMPT = """\
A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first \
thinks about the reasoning process in the mind and then provides the user with the answer.
User: Using the numbers [44, 19, 35], create an equation that equals 98. You can use basic arithmetic operations \
(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the final \
answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.
Assistant: Let me solve this step by step.
<think>"""

MATH_PROMPT = (
    """\
A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first \
thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and \
answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process \
here </think> <answer> answer here </answer>."""
    + " "  # the authors' template has this blank at the line's end
    + """

User: You must put your answer inside <answer> </answer> tags, i.e.,
<answer> answer here </answer>. And your final answer will be extracted automatically by the \\boxed{} tag.
What is $1+1$?
Assistant: <think>"""
)


def data(*arguments: Any) -> tuple[int, str]:
    """Exit code and all output (lines joined, for the command line wraps its own errors at the terminal's width)."""
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(r"\s*│?\n│?\s*", " ", result.output)


def must_run(*arguments: Any) -> str:
    code, output = data(*arguments)
    assert code == 0, output
    return output


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())
