"""Which runs are seeds of one row, in which order rows stand, and what is compared with what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isnan

from vlnorm_verl.methods import alpha_of, place_of
from vlnorm_verl.report import paper
from vlnorm_verl.report.identity import Setting
from vlnorm_verl.report.measures import final_accuracy, validated_steps
from vlnorm_verl.report.run import Run

Group = tuple[Setting, str]  # and a method's key
Groups = dict[Group, list[Run]]


def grouped(runs: Sequence[Run]) -> Groups:
    """{(setting, method_key): its runs by seed}, in the order of the first run of each.

    Of two runs with the same seed the one with more steps is taken, since they are one sample; see `doubles`.
    """
    groups: dict[Group, dict[int, Run]] = {}
    for run in runs:
        seeds = groups.setdefault((run.setting, run.method_key), {})
        if run.seed not in seeds or len(run.steps) > len(seeds[run.seed].steps):
            seeds[run.seed] = run
    return {group: [seeds[seed] for seed in sorted(seeds)] for group, seeds in groups.items()}


def doubles(runs: Sequence[Run]) -> list[Run]:
    """The runs that `grouped` leaves out."""
    kept = {id(run) for group in grouped(runs).values() for run in group}
    return [run for run in runs if id(run) not in kept]


def with_validation(runs: Sequence[Run]) -> list[Run]:
    """A run that has just begun says nothing of its final accuracy."""
    return [run for run in runs if validated_steps(run)]


def ordered(groups: Groups) -> Groups:
    def key(group: Group) -> tuple[object, ...]:
        (family, task, model, length), method_key = group
        by_number = (0, int(length), "") if length.isdigit() else (1, 0, length)
        return family, task, model, by_number, place_of(method_key), alpha_of(method_key) or 0.0, method_key

    return {group: groups[group] for group in sorted(groups, key=key)}


def where(groups: Groups, condition: Callable[[Setting, str], bool]) -> Groups:
    """Those whose setting and method's key meet the condition."""
    return {group: runs for group, runs in groups.items() if condition(*group)}


def only(groups: Groups, setting: Setting) -> Groups:
    return where(groups, lambda of_group, _: of_group == setting)


def reference(groups: Groups, setting: Setting, baseline: str = "") -> Group | None:
    """What the others of a setting are compared with: the baseline asked for, else VL Norm."""
    keys = [key for _, key in only(groups, setting)]
    key = main_vl_norm(setting, keys) if not baseline else baseline if baseline in keys else None
    return None if key is None else (setting, key)


def pairs_of(groups: Groups, baseline: str = "") -> list[tuple[Group, Group]]:
    """Each method of a setting with its reference, the one with the higher final accuracy first."""
    pairs = []
    for setting in dict.fromkeys(setting for setting, _ in groups):
        main = reference(groups, setting, baseline)
        for other in only(groups, setting) if main else ():
            if main is not None and other != main:
                finals = [final_accuracy(with_validation(groups[group])) for group in (main, other)]
                values = [-1.0 if final is None or isnan(final.value) else final.value for final in finals]
                pairs.append((main, other) if values[0] >= values[1] else (other, main))
    return pairs


def main_vl_norm(setting: Setting, method_keys: Iterable[str]) -> str | None:
    """The VL Norm that other methods of a setting are compared with.

    With the task's α in the paper's settings, and none if that was not run; elsewhere with α = 1 if there is one, else
    with the largest.
    """
    by_alpha = {alpha: key for key in method_keys if (alpha := alpha_of(key)) is not None}
    of_paper = paper.has(setting)
    wanted = paper.alpha(setting.task) if of_paper else 1.0
    if wanted in by_alpha:
        return by_alpha[wanted]
    return None if of_paper or not by_alpha else by_alpha[max(by_alpha)]
