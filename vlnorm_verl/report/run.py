"""A run: what it is, its metrics over steps and its validation counts, and the accuracies in them.

Covered: the data model that reading, tables and figures share. Not covered: reading files (read.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlnorm_verl.report.identity import Identity
from vlnorm_verl.runs.records import VALIDATION_METRIC


@dataclass
class Validation:
    """One validation set at one step.

    problems: [P] identity of each problem, stable over steps and runs (a hash of prompt and ground truth).
    n: int [P] responses of each problem.
    correct: int [P] correct responses of each; float sums of scores if these are not 0/1 (`binary` is False then).
    """

    problems: list[str]
    n: np.ndarray
    correct: np.ndarray
    binary: bool


@dataclass(kw_only=True, eq=False)
class Run(Identity):
    """One training run; runs with one `setting` and one `method_key` differ by seed only. Equal to itself alone.

    steps: int [T], sorted, unique.
    metrics: verl's metric -> float64 [T], NaN where a step lacks it.
    validations: step -> validation set -> counts, from the dumps.
    dumps: step -> file of every validation response.
    metric: what the accuracy is, if not verl's mean@n of the validation sets.
    ended: metric -> the step from which on it was logged, but not as a finite number.
    left_out: why it is not in the report; "" if it is. copy: whether that is because another logger's log is read.
    numbered: whether its seed is not known, and is the next that was free.
    unnamed: whether its dumps leave open which validation set a response is of.
    """

    folder: Path
    name: str
    steps: np.ndarray
    metrics: dict[str, np.ndarray]
    validations: dict[int, dict[str, Validation]] = field(default_factory=dict)
    dumps: dict[int, Path] = field(default_factory=dict)
    metric: str = ""
    ended: dict[str, int] = field(default_factory=dict)
    left_out: str = ""
    copy: bool = False
    numbered: bool = False
    unnamed: bool = False

    @property
    def late_start(self) -> int | None:
        """The first step of a log whose beginning is lost; None where the log has it.

        verl's file logger empties its file at each start: what is left of a resumed run begins in the middle. A log's
        beginning is at most as far from 0 as its records are from each other.
        """
        if not len(self.steps):
            return None
        spacing = max(1.0, float(np.median(np.diff(self.steps)))) if len(self.steps) > 1 else 1.0
        return int(self.steps[0]) if self.steps[0] > spacing else None


class Logged(NamedTuple):
    """verl's mean@n of one validation set, values [T]: the mean of a variable of the reward (acc) over n responses.

    n is 0, and variable the metric's name, where `--metric` asks for another.
    """

    variable: str
    n: int
    values: np.ndarray


def logged_accuracies(run: Run) -> dict[str, Logged]:
    """{validation set: verl's mean@n over steps}; of `acc` where there is one, else of what verl calls core.

    Of the run's `metric` alone where it has one.
    """
    accuracies: dict[str, Logged] = {}
    for key in [run.metric] if run.metric else run.metrics:
        column, match = run.metrics.get(key), VALIDATION_METRIC.fullmatch(key)
        if column is not None and match:
            logged = Logged(match["variable"], int(match["n"]), column)
            other = accuracies.get(match["set"])
            if other is None or (logged.variable == "acc", logged.n) > (other.variable == "acc", other.n):
                accuracies[match["set"]] = logged
        elif column is not None and run.metric:
            accuracies[key] = Logged(key, 0, column)
    return accuracies


def value_at(run: Run, column: np.ndarray, step: int) -> float | None:
    """A metric's value at a step; None where there is none."""
    at = int(np.searchsorted(run.steps, step))
    has_value = at < len(run.steps) and run.steps[at] == step and np.isfinite(column[at])
    return float(column[at]) if has_value else None
