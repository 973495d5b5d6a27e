"""What the report knows of a run: its settings, its metrics over steps and its validation counts.

Covered: the data model that reading, tables and figures share. Reading files is readers.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Setting(NamedTuple):
    """What runs must share to be compared."""

    family: str
    task: str
    model: str
    length: str
    scale: str


@dataclass
class Validation:
    """One validation set at one step.

    problems: [P] identity of each problem, stable over steps and runs (a hash of prompt and ground truth).
    n: int [P] responses of each problem.
    correct: int [P] correct responses of each; float sums of scores if these are not 0/1 (`binary` is False then).
    characters: int32 [Σ n] length of each response's text, ascending; None if the dump has no texts.
    """

    problems: list[str]
    n: np.ndarray
    correct: np.ndarray
    binary: bool
    characters: np.ndarray | None = None


@dataclass
class Run:
    """One training run; runs with one `setting` and one `method_key` differ by seed only.

    family … scale: as the recipes name them ("aggregation", "countdown", "3b", "8192", "gpu"); "" if unknown.
    method: the recipe's, else verl's loss_agg_mode.
    steps: int [T], sorted, unique.
    metrics: verl's metric -> float64 [T], NaN where a step lacks it.
    validations: step -> validation set -> counts, from the dumps.
    notes: what was odd while reading.
    scale_factor: M, verl's loss_scale_factor, tokens.
    """

    folder: Path
    name: str
    family: str
    task: str
    model: str
    length: str
    scale: str
    method: str
    alpha: float | None
    seed: int
    planned_steps: int | None
    steps: np.ndarray
    metrics: dict[str, np.ndarray]
    validations: dict[int, dict[str, Validation]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scale_factor: float | None = None

    @property
    def setting(self) -> Setting:
        return Setting(self.family, self.task, self.model, self.length, self.scale)

    @property
    def method_key(self) -> str:
        return self.method if self.alpha is None else f"{self.method}:{self.alpha:g}"
