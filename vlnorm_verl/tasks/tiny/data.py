"""The tiny task's files: CountDown, or the same problems in the schema of Math, and a copy of the model.

Covered: different problems in each file, no problem of a test file in train.parquet in any order of its numbers, the
same content for every run, and files that appear complete or not at all. Not covered: two processes at once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from vlnorm_verl.files import whole
from vlnorm_verl.tasks import sources
from vlnorm_verl.tasks.base import Row, Split, row, write_parquet
from vlnorm_verl.tasks.countdown import ground_truth
from vlnorm_verl.tasks.tiny import WEIGHTS
from vlnorm_verl.tasks.tiny.countdown import DATA_SOURCE, distinct_problems, render_prompt

TRAIN_ROWS, TEST_ROWS = 4096, 128
TEST_ROWS_OF_MATH = 32  # in each of its four sets


def rows(count: int, seed: int, split: Split, math_set: str = "") -> list[Row]:
    """Rows of the tiny CountDown, or of a Math set, whose ground truth is the target alone."""
    source = sources.data_source(math_set) if math_set else DATA_SOURCE
    return [
        row(source, render_prompt(p), str(p.target) if math_set else ground_truth(p), split, index, "generated")
        for index, p in enumerate(distinct_problems(count, seed, split))
    ]


def make(folder: Path, task: Literal["countdown", "math"]) -> None:
    """Write ``folder/model`` and the files of ``folder/<task>`` where they are missing; the same for every run.

    The model is copied beside the data because every node must find it under one path, and the package has another one
    on each node of a cluster that Ray sends it to.
    """
    if not (model := folder / "model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".model.{os.getpid()}.tmp"
        shutil.copytree(WEIGHTS, temporary)
        temporary.rename(model)
    _write_missing(folder / task / "train.parquet", TRAIN_ROWS, 0, "train", "train" if task == "math" else "")
    if task == "countdown":
        _write_missing(folder / task / "test.parquet", TEST_ROWS, 0, "test")
        return
    for seed, name in enumerate(name for name in sources.MATH if name != "train"):
        _write_missing(folder / task / f"{name}.parquet", TEST_ROWS_OF_MATH, seed, "test", name)


def _write_missing(path: Path, count: int, seed: int, split: Split, math_set: str = "") -> None:
    if not path.exists():
        with whole(path) as temporary:
            write_parquet(rows(count, seed, split, math_set), temporary)
