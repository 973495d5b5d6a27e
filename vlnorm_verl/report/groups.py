"""Which runs are seeds of one row, in which order rows stand, and what is compared with what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from math import inf, isnan
from typing import NamedTuple

from vlnorm_verl.methods import alpha_of, is_vl_norm, label_of, place_of
from vlnorm_verl.report import labels, paper
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.first_hit import SpeedUp, speed_up
from vlnorm_verl.report.identity import Setting
from vlnorm_verl.report.measures import final_accuracy, final_runs, same_sets, validated_steps
from vlnorm_verl.report.run import Run


class Group(NamedTuple):
    """What the seeds of a row share. key: of the method."""

    setting: Setting
    key: str

    @property
    def label(self) -> str:
        return label_of(self.key, self.setting.family)


Groups = dict[Group, list[Run]]


class Pair(NamedTuple):
    """Two methods of a setting. hits: when the higher one is at the final accuracy of the lower one, seed by seed."""

    higher: Group
    lower: Group
    hits: SpeedUp


class Comparison:
    """What verdicts, tables and charts of one report are of, worked out once.

    runs: all that were read. baseline: key of the method that others are compared with, instead of VL Norm.
    groups: runs that are not left out, those without a validation too; titles: what their settings are called.
    """

    def __init__(self, runs: Sequence[Run], baseline: str = "") -> None:
        self.runs, self.baseline = runs, baseline
        self.groups = grouped(runs)
        self.titles = labels.titles(setting for setting, _ in self.groups)

    @cached_property
    def validated(self) -> Groups:
        """Only the runs with a validation: one that has just begun says nothing of its final accuracy."""
        validated = {group: [run for run in runs if validated_steps(run)] for group, runs in self.groups.items()}
        return {group: runs for group, runs in validated.items() if runs}

    @cached_property
    def finals(self) -> dict[Group, Estimate | None]:
        return {group: final_accuracy(runs) for group, runs in self.validated.items()}

    @cached_property
    def references(self) -> dict[Setting, Group]:
        """{setting: what its others are compared with}, of the settings that have it."""
        found = {}
        for setting, groups in by_setting(self.validated).items():
            key = self.baseline or main_vl_norm(setting, [group.key for group in groups]) or ""
            if (reference := Group(setting, key)) in groups:
                found[setting] = reference
        return found

    @cached_property
    def pairs(self) -> list[Pair]:
        """Each method of a setting with its reference, where steps can be compared."""
        found = []
        for group in self.validated:
            main = self.references.get(group.setting)
            if main is None or main == group or not same_sets([*self.validated[main], *self.validated[group]]):
                continue
            higher, lower = sorted((main, group), key=self._final, reverse=True)
            hits = speed_up(self.validated[higher], final_runs(self.validated[lower]), 1)
            found += [Pair(higher, lower, hits)] if hits is not None else []
        return found

    def _final(self, group: Group) -> float:
        final = self.finals[group]
        return -inf if final is None or isnan(final.value) else final.value


def grouped(runs: Sequence[Run]) -> Groups:
    """{group: its runs by seed}, in the order of the tables, of the runs that are not left out.

    Of two runs with the same seed the one that was validated later is taken, of equals the one with more steps, since
    they are one sample; see `doubles`.
    """
    groups: dict[Group, dict[int, Run]] = {}
    for run in runs:
        if run.left_out:
            continue
        seeds = groups.setdefault(Group(run.setting, run.method_key), {})
        seeds[run.seed] = max(
            seeds.get(run.seed, run), run, key=lambda run: (max(validated_steps(run), default=-1), len(run.steps))
        )
    return {group: [groups[group][seed] for seed in sorted(groups[group])] for group in sorted(groups, key=_place)}


def _place(group: Group) -> tuple[object, ...]:
    (family, task, model, length), key = group
    by_number = (0, int(length), "") if length.isdigit() else (1, 0, length)
    return family, task, model, by_number, place_of(key), alpha_of(key) or 0.0, key


def doubles(runs: Sequence[Run], groups: Groups) -> dict[Run, Run]:
    """{run of a seed that another run has, too: that other one, which is taken}."""
    taken = {(run.setting, run.method_key, run.seed): run for run in runs_of(groups)}
    others = {run: taken[run.setting, run.method_key, run.seed] for run in runs if not run.left_out}
    return {run: other for run, other in others.items() if run is not other}


def runs_of(groups: Groups) -> list[Run]:
    return [run for runs in groups.values() for run in runs]


def by_setting(groups: Groups) -> dict[Setting, Groups]:
    """The groups of each setting."""
    found: dict[Setting, Groups] = {}
    for group, runs in groups.items():
        found.setdefault(group.setting, {})[group] = runs
    return found


def main_vl_norm(setting: Setting, method_keys: Iterable[str]) -> str | None:
    """The VL Norm that other methods of a setting are compared with.

    With the task's α in the paper's settings, and none if that was not run; elsewhere with α = 1 if there is one, else
    with the largest. That of the authors' code only where this package's was not run.
    """
    keys = sorted(method_keys, key=is_vl_norm)
    by_alpha = {alpha: key for key in keys if (alpha := alpha_of(key)) is not None}
    of_paper = paper.has(setting)
    wanted = paper.alpha(setting.task) if of_paper else 1.0
    if wanted in by_alpha:
        return by_alpha[wanted]
    return None if of_paper or not by_alpha else by_alpha[max(by_alpha)]
