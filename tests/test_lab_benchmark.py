"""The tasks of benchmarks/lab: enough problems for run.sh, in files that the lab reads, and rewards that are right; and
what is put right in a dequantised model's files.

Not covered: the measurements themselves, which need pretrained models and hours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lab import dequantise, tasks
from vlnorm_verl.lab.tasks import load_task


@pytest.mark.parametrize(
    ("task", "truth", "right", "wrong"),
    [
        ("multiplication", "1336", r"\boxed{1,335}, no: \boxed{1,336}", r"\boxed{1336}, no: \boxed{1335}"),
        ("multiplication", "96", r"It is $\boxed{96}$.", "It is 96."),
        ("list", "3", "1. cat\n\n2. dog\n3. cow\n", "cat\ndog\ncow\nhen"),
        ("addition", "11", "3 + 8 = 11.", "11 is 3 + 8"),
    ],
)
def test_a_reward_is_that_of_its_task(task: str, truth: str, right: str, wrong: str, tmp_path: Path) -> None:
    tasks.main(task, tmp_path / "data.parquet")
    loaded = load_task("custom", tmp_path / "data.parquet", str(tasks.__file__))
    question = loaded.questions(8 + 96, seed=0)[0]._replace(ground_truth=truth)
    assert loaded.score(question, right) == 1
    assert loaded.score(question, wrong) == loaded.score(question, "") == 0


@pytest.mark.parametrize(("keep", "expected"), [(True, {"a": 1, "b": "·"}), (False, {"b": "·"})])
def test_fields_of_a_json_file_are_set(keep: bool, expected: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text('{"a": 1, "b": null}', encoding="utf-8")
    dequantise.change(file, {"b": "·"}, keep)
    assert json.loads(file.read_text(encoding="utf-8")) == expected
