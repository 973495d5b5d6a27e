"""The paper's own results, from paper.yaml: what is known, with its label, and "not found" for the rest."""

from __future__ import annotations

import functools
from collections.abc import Iterable
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


def has(setting: Setting) -> bool:
    """Whether the paper has tables of this family and task."""
    return setting.family in ("aggregation", "dapo") and setting.task in ("countdown", "math")


def known(setting: Setting, method_key: str, metric: str) -> Known | None:
    """The paper's value for a run at full size with the task's α; None for one of the tiny model, of which it has none.

    The paper's VL Norm is the one with the task's α.
    """
    method, _, number = method_key.partition(":")
    if number and float(number) != alpha(setting.task):
        return None
    for one in values():
        if (one.metric, one.method) == (metric, method) and _fits(one, setting):
            return one
    return None


def _fits(one: Known, setting: Setting) -> bool:
    of = setting._asdict()
    return setting.scale != "cpu" and all(of[key] == value for key, value in one.setting.items())


def cell(setting: Setting, method_key: str, metric: str) -> str:
    """ "0.847 [second-hand, of v1]", "not found", or that the run is not one of the paper's."""
    if setting.scale == "cpu":
        return TINY
    found = known(setting, method_key, metric)
    return NOT_FOUND if found is None else f"{found.value} [{found.label}]"


def sources(rows: Iterable[tuple[Setting, str]], metrics: Iterable[str]) -> list[str]:
    """A sentence for a table's foot: where the values of these rows (setting, method key) were read."""
    found = [one for row in rows for metric in metrics if (one := known(*row, metric)) is not None]
    labels = dict.fromkeys(f"[{one.label}]: {one.source}" for one in found)
    return [f"Read in {'; '.join(labels)}."] if labels else []


def remarks(rows: Iterable[tuple[Setting, str]]) -> list[str]:
    """Sentences for a table's foot that concern at least one of its rows (setting, method key)."""
    rows = list(rows)
    return [
        f"{one.item}: {one.value} [{one.label}; {one.source}]."
        for one in values()
        if one.metric == "remark"
        and any(_fits(one, setting) and key.startswith(one.method) for setting, key in rows if has(setting))
    ]
