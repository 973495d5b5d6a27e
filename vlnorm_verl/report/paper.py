"""The paper's own results, from paper.yaml: what is known, with its label, and "not found" for the rest."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlnorm_verl.report.runs import Setting

NOT_FOUND = "not found"
TINY = "tiny model, not the paper's"


@dataclass(frozen=True)
class Known:
    """One value of paper.yaml; see there."""

    item: str
    setting: dict[str, str]
    metric: str
    value: float | str
    label: str
    source: str
    method: str = ""


@functools.cache
def _content() -> dict[str, Any]:
    content = yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text())
    assert isinstance(content, dict)
    return content


def values() -> list[Known]:
    return [Known(**entry) for entry in _content()["values"]]


def alpha(task: str) -> float | None:
    """VL Norm's α on a task of the paper; None for another task."""
    found = _content()["alpha"].get(task)
    return None if found is None else float(found)


def known(setting: Setting, method: str, metric: str) -> Known | None:
    """The paper's value for a run at full size; None for one of the tiny model, of which the paper has none."""
    if setting.scale == "cpu":
        return None
    of = setting._asdict()
    for one in values():
        if (one.metric, one.method) == (metric, method) and all(of[k] == v for k, v in one.setting.items()):
            return one
    return None


def cell(setting: Setting, method_key: str, metric: str) -> str:
    """ "0.847 [second-hand, of v1]", "not found", or that the run is not one of the paper's."""
    if setting.scale == "cpu":
        return TINY
    method, _, number = method_key.partition(":")
    if number and float(number) != alpha(setting.task):
        return NOT_FOUND
    found = known(setting, method, metric)
    return NOT_FOUND if found is None else f"{found.value} [{found.label}]"


def remarks(task: str) -> list[str]:
    """Sentences for the foot of a task's table."""
    return [
        f"{one.item}: {one.value} [{one.label}]."
        for one in values()
        if one.metric == "remark" and one.setting.get("task") == task
    ]
