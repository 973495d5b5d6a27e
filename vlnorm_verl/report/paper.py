"""The paper's own results, from paper.yaml: what is known, with its label, and "not found" for the rest."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlnorm_verl.methods import split
from vlnorm_verl.report.identity import Setting

NOT_FOUND = "not found"


@dataclass(frozen=True)
class Known:
    """One value of paper.yaml; see there."""

    setting: dict[str, str]
    metric: str
    value: float | str
    label: str
    source: str
    method: str = ""

    def is_of(self, setting: Setting) -> bool:
        return all(getattr(setting, key) == value for key, value in self.setting.items())


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text())
    return content | {"values": [Known(**entry) for entry in content["values"]]}


def alpha(task: str) -> float | None:
    """VL Norm's α on a task of the paper; None for another task."""
    of_task = _content()["alpha"].get(task)
    return None if of_task is None else float(of_task)


def has(setting: Setting) -> bool:
    """Whether the paper has tables of this family and task."""
    return setting.family in ("aggregation", "dapo") and alpha(setting.task) is not None


def covers(setting: Setting) -> bool:
    """Whether the paper also has the model, so that its values may stand beside a run's."""
    return has(setting) and setting.model in _content()["models"][setting.family]


def known(setting: Setting, method_key: str, metric: str) -> Known | None:
    """The paper's value for a run; its VL Norm is the one with the task's α. Its runs were made with its code."""
    method, number = split(method_key)
    if number not in (None, alpha(setting.task)):
        return None
    method = method.removesuffix("_as_coded")
    if (setting.family, method) == ("dapo", "dapo_norm"):
        method = "dapo"
    matching = (value for value in _content()["values"] if (value.metric, value.method) == (metric, method))
    return next((value for value in matching if value.is_of(setting)), None)


def cell(setting: Setting, method_key: str, metric: str) -> str | None:
    """ "0.847 [second-hand, of v1]", "not found", or None for a model that the paper does not have."""
    value = known(setting, method_key, metric)
    if value is not None:
        return f"{value.value} [{value.label}]"
    return NOT_FOUND if covers(setting) else None


def sources(rows: Iterable[tuple[Setting, str]], metrics: Iterable[str]) -> list[str]:
    """A sentence for a table's foot: where the values of these rows (setting, method key) were read."""
    shown = [value for row in rows for metric in metrics if (value := known(*row, metric)) is not None]
    labels = dict.fromkeys(f"[{value.label}]: {value.source}" for value in shown)
    return [f"Read in {'; '.join(labels)}."] if labels else []


def remarks(rows: Iterable[tuple[Setting, str]]) -> list[str]:
    """Sentences for a table's foot that concern at least one of its rows (setting, method key)."""
    rows = [row for row in rows if covers(row[0])]
    return [
        f"{value.value} [{value.label}; {value.source}]."
        for value in _content()["values"]
        if value.metric == "remark"
        and any(value.is_of(setting) and key.startswith(value.method) for setting, key in rows)
    ]
