"""The tasks of benchmarks/lab: enough problems for run.sh, in files that the lab reads, and rewards that are right.

Slow: run.sh itself, with the tiny model and few responses. Not covered: the measurements themselves, which need
pretrained models and hours, and dequantise.py, which needs their files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.lab import tasks
from vlnorm_verl.lab.tasks import load_task
from vlnorm_verl.tasks.tiny import WEIGHTS


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


@pytest.mark.slow
def test_the_script_measures_and_reports(tmp_path: Path) -> None:
    few = "--slope-prompts 1 --slope-responses 3 --pool-prompts 4 --pool-responses 2 --max-response-length 16"
    subprocess.run(
        ["bash", "benchmarks/lab/run.sh", str(tmp_path), *few.split()],
        env={**os.environ, "MEASURE": "smollm2-addition", "SMOLLM2": str(WEIGHTS), "PYTHON": sys.executable},
        cwd=Path(__file__).parent.parent,
        check=True,
    )
    assert (tmp_path / "report" / "lab.html").exists()
