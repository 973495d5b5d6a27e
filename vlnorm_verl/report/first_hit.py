"""When one method reaches another's final accuracy, and how many times sooner than that one.

"Runs" of a function are the seeds of one method in one setting, as in measures.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import NamedTuple

import numpy as np

from vlnorm_verl.report.estimates import Estimate, over_seeds
from vlnorm_verl.report.measures import accuracy_curve, same_seed, trailing_mean, unfinished, validated_steps
from vlnorm_verl.report.run import Run


def smoothing(runs: Iterable[Run], asked: int | None) -> int:
    """Steps of the trailing mean: as asked, else three validations of the run that is validated least often."""
    gaps = [float(np.median(np.diff(steps))) for run in runs if len(steps := validated_steps(run)) > 1]
    return asked or int(np.ceil(3 * max(gaps, default=1.0)))


def _at(values: np.ndarray, target: float) -> np.ndarray:
    """Whether each is at the target or above, as far as rounding and tensorboard's float32 tell."""
    return np.asarray(values >= target - 1e-7)


def first_hit(steps: np.ndarray, values: np.ndarray, target: float) -> int | None:
    """First step at which the curve is at the target or above; None if it never is."""
    reached = np.flatnonzero(_at(values, target))
    return int(steps[reached[0]]) if len(reached) else None


class Hit(NamedTuple):
    """When a method is first at a target: steps of one seed, or their means over seeds.

    first: the first validation at the target or above; None if it never was. before: the one before it; 0 if there is
    none. last: the last one. late: whether a log's beginning is lost, so that it may have been there before `first`.
    """

    first: float | None
    before: float | None
    last: float
    late: bool

    def __str__(self) -> str:
        """The validations that it is between, whole steps: "325–350"; "" where there is none."""
        if self.first is None or self.before is None:
            return ""
        if self.late:
            return f"at or before {self.first:.0f}"
        return f"{self.before:.0f}–{self.first:.0f}" if round(self.before) < round(self.first) else f"{self.first:.0f}"


class FirstHits(NamedTuple):
    """One seed: when two methods reach the final accuracy of the second, the reference.

    above_start: whether the target was not met already by a validation before the first step.
    """

    target: float
    own: Hit
    reference: Hit
    above_start: bool


def first_hits(run: Run, reference: Run, smooth: int) -> FirstHits | None:
    """smooth: steps of the trailing mean that both curves and the target are taken of; 1 is raw.

    None if either has no validation after its first step.
    """
    curves = [accuracy_curve(run), accuracy_curve(reference)]
    if any(not len(steps) or steps[-1] <= 0 for steps, _ in curves):
        return None
    curves = [(steps, trailing_mean(steps, values, smooth)) for steps, values in curves]
    target = float(curves[1][1][-1])
    own, other = (_hit(of, *curve, target) for of, curve in zip((run, reference), curves, strict=True))
    starts = np.concatenate([values[steps <= 0] for steps, values in curves])
    return FirstHits(target, own, other, not _at(starts, target).any())


def _hit(run: Run, steps: np.ndarray, values: np.ndarray, target: float) -> Hit:
    steps, values = steps[steps > 0], values[steps > 0]
    first = first_hit(steps, values, target)
    before = 0 if first is None else max(steps[steps < first], default=0)
    return Hit(first, int(before), int(steps[-1]), run.late_start is not None)


@dataclass(frozen=True)
class SpeedUp:
    """A method against a reference over their seeds.

    pairs: seeds that can be compared: the reference is finished, and its final accuracy was not there before training.
    reached: how many of them reached it. target is the mean over all pairs, NaN without any; `own` and `reference` are
    means over those that reached, or `reference` over all pairs where none did.
    by_last: the paper's count, the reference's last step / first hit. by_first: the reference's first hit / first hit.
    waiting: the last validation of the pair that is the least far of those that may still reach it.
    """

    pairs: int
    reached: int
    target: float
    own: Hit
    reference: Hit
    by_last: Estimate | None
    by_first: Estimate | None
    waiting: float | None
    note: str

    @property
    def times_sooner(self) -> str:
        """The reference's last step over the first hit: "2.86–3.08×"; "" where it is not known."""
        if self.own.first is None or self.own.late:
            return ""
        low = f"{self.reference.last / self.own.first:.2f}"
        return f"{low}–{self.reference.last / self.own.before:.2f}×" if self.own.before else f"{low}× or more"

    def when(self, other: str) -> str:
        """ "at step 325–350, 2.86–3.08× sooner than DAPO's last step, in 2 of 3 seeds"."""
        times = f", {self.times_sooner} sooner than {other}'s last step" if self.times_sooner else ""
        seeds = f", in {self.reached} of {self.pairs} seeds" if self.reached < self.pairs else ""
        return f"at step {self.own}{times}{seeds}"


def speed_up(runs: Sequence[Run], reference: Sequence[Run], smooth: int) -> SpeedUp | None:
    """Ratios are geometric means over seeds, with a t interval of their logarithms where every seed reached.

    A seed whose log has lost its beginning has a first hit "at or before" a step, and no ratio.

    Seeds are paired by number if any is in both, else in their order: independent samples may be paired at will. None
    if no pair has validations after the first step.
    """
    notes = []
    if not (pairs := same_seed(runs, reference)):
        pairs = list(zip(runs, reference, strict=False))
        notes.append("other seeds")
    compared = [(run, other, hits) for run, other in pairs if (hits := first_hits(run, other, smooth)) is not None]
    if not compared:
        return None
    finished = [pair for pair in compared if not unfinished(pair[1])]
    if len(finished) < len(compared):
        steps = {max(validated_steps(other)) for _, other, _ in compared if unfinished(other)}
        planned = max(other.planned_steps or 0 for _, other, _ in compared)
        where = f"step {_span(steps)} of {planned}"
        notes.append(f"the reference is not finished ({where})" + (_of_seeds(finished, compared) if finished else ""))
    usable = [pair for pair in finished if pair[2].above_start]
    if len(usable) < len(finished):
        notes.append("the target was met before training" + (_of_seeds(usable, finished) if usable else ""))
    waiting = [hits.own.last for run, _, hits in usable if hits.own.first is None and unfinished(run)]
    reached = [hits for _, _, hits in usable if hits.own.first is not None]
    shown = reached or [hits for _, _, hits in usable]
    late = [hits for hits in shown if hits.own.late or hits.reference.late]
    which = "that reached"
    if late:
        notes.append(f"the beginning of a log is lost in {len(late)} of {len(shown)} seeds")
        which += ", with a whole log"
    by_last = [hits.reference.last / hits.own.first for hits in reached if hits.own.first and not hits.own.late]
    by_first = [
        hits.reference.first / hits.own.first
        for hits in reached
        if hits.own.first and hits.reference.first and hits not in late
    ]
    return SpeedUp(
        pairs=len(usable),
        reached=len(reached),
        target=float(np.mean([hits.target for _, _, hits in usable])) if usable else nan,
        own=_over_seeds([hits.own for hits in reached]),
        reference=_over_seeds([hits.reference for hits in shown]),
        by_last=_ratio(by_last, len(usable), which),
        by_first=_ratio(by_first, len(usable), which),
        waiting=min(waiting, default=None),
        note="; ".join(notes),
    )


def _over_seeds(hits: Sequence[Hit]) -> Hit:
    """Of seeds that all reached the target, or of none."""
    if not hits:
        return Hit(None, None, nan, False)
    first, before, last = np.mean([hit[:3] for hit in hits], axis=0).tolist()
    return Hit(first, before, last, any(hit.late for hit in hits))


def _span(steps: set[int]) -> str:
    return str(min(steps)) if len(steps) == 1 else f"{min(steps)}–{max(steps)}"


def _of_seeds(left: Sequence[object], every: Sequence[object]) -> str:
    return f" in {len(every) - len(left)} of {len(every)} seeds, which are left out"


def _ratio(ratios: list[float], seeds: int, which: str) -> Estimate | None:
    if not ratios:
        return None
    logarithm = over_seeds(np.log(ratios).tolist())
    value = float(np.exp(logarithm.value))
    if len(ratios) < seeds:
        return Estimate(value, note=f"of the {'seed' if len(ratios) == 1 else f'{len(ratios)} seeds'} {which}")
    return replace(logarithm, value=value, low=float(np.exp(logarithm.low)), high=float(np.exp(logarithm.high)))
