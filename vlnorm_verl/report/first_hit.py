"""When one method reaches another's final accuracy, and how many times sooner than that one.

"Runs" of a function are the seeds of one method in one setting, as in measures.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan

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


def _before(steps: np.ndarray, first: int | None) -> int:
    """The validation before a step; 0 if there is none."""
    return max((int(step) for step in steps if first is not None and 0 < step < first), default=0)


@dataclass(frozen=True)
class FirstHits:
    """One seed: when two methods reach the final accuracy of the second, the reference. Steps; None is never."""

    target: float
    reference_last: int
    reference_first: int
    reference_before: int
    first: int | None
    before: int  # the validation before `first`; 0 if there is none
    last: int
    above_start: bool  # whether the target was not met already by the validation before the first step
    late: bool  # whether the log's beginning is lost, so that the target may have been met before `first`
    reference_late: bool


def first_hits(run: Run, reference: Run, smooth: int) -> FirstHits | None:
    """smooth: steps of the trailing mean that both curves and the target are taken of; 1 is raw.

    None if either has no validation after its first step.
    """
    curves = [accuracy_curve(run), accuracy_curve(reference)]
    if any(not len(steps) or steps[-1] <= 0 for steps, _ in curves):
        return None
    (steps, values), (reference_steps, reference_values) = (
        (steps, trailing_mean(steps, values, smooth)) for steps, values in curves
    )
    target = float(reference_values[-1])
    begun, reference_begun = steps > 0, reference_steps > 0
    starts = np.concatenate([values[~begun], reference_values[~reference_begun]])
    reference_first = first_hit(reference_steps[reference_begun], reference_values[reference_begun], target)
    assert reference_first is not None  # its last value is the target
    first = first_hit(steps[begun], values[begun], target)
    return FirstHits(
        target=target,
        reference_last=int(reference_steps[-1]),
        reference_first=reference_first,
        first=first,
        before=_before(steps, first),
        reference_before=_before(reference_steps, reference_first),
        last=int(steps[-1]),
        above_start=not _at(starts, target).any(),
        late=run.late_start is not None,
        reference_late=reference.late_start is not None,
    )


@dataclass(frozen=True)
class SpeedUp:
    """A method against a reference over their seeds.

    pairs: seeds that can be compared: the reference is finished, and its final accuracy was not there before training.
    reached: how many of them reached it. target is the mean over all pairs; the other values are means over those that
    reached, or over all pairs where none did. NaN without any pair.
    waiting: the last validation of the pair that is the least far of those that may still reach it.
    """

    pairs: int
    reached: int
    target: float
    reference_last: float
    reference_first: float
    reference_before: float
    first: float | None
    before: float | None  # the validation before `first`: the hit is in between
    by_last: Estimate | None  # the paper's count: reference's last step / first hit
    by_first: Estimate | None  # reference's first hit / first hit
    waiting: int | None
    note: str
    late: bool  # whether `first`, and below whether `reference_first`, is the latest that it can have been
    reference_late: bool

    @property
    def hit(self) -> str:
        """The validations that the first hit is between, whole steps: "325–350"; "" where there is none."""
        return _between(self.before, self.first, self.late)

    @property
    def reference_hit(self) -> str:
        return _between(self.reference_before, self.reference_first, self.reference_late)

    @property
    def times_sooner(self) -> str:
        """The reference's last step over `hit`: "2.86–3.08×"; "" where it is not known."""
        if self.first is None or self.late:
            return ""
        low = f"{self.reference_last / self.first:.2f}"
        return f"{low}–{self.reference_last / self.before:.2f}×" if self.before else f"{low}× or more"

    def when(self, other: str) -> str:
        """ "at step 325–350, 2.86–3.08× sooner than DAPO's last step, in 2 of 3 seeds"."""
        times = f", {self.times_sooner} sooner than {other}'s last step" if self.times_sooner else ""
        seeds = f", in {self.reached} of {self.pairs} seeds" if self.reached < self.pairs else ""
        return f"at step {self.hit}{times}{seeds}"


def _between(before: float | None, first: float | None, late: bool) -> str:
    if first is None or not isfinite(first):
        return ""
    if late or before is None:
        return f"at or before {first:.0f}"
    return f"{before:.0f}–{first:.0f}" if round(before) < round(first) else f"{first:.0f}"


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
    waiting = [hits.last for run, _, hits in usable if hits.first is None and unfinished(run)]
    reached = [hits for _, _, hits in usable if hits.first is not None]
    shown = reached or [hits for _, _, hits in usable]
    firsts = [hits.first for hits in reached if hits.first is not None]
    late = [hits for hits in shown if hits.late or hits.reference_late]
    which = "that reached"
    if late:
        notes.append(f"the beginning of a log is lost in {len(late)} of {len(shown)} seeds")
        which += ", with a whole log"
    by_last = [hits.reference_last / hits.first for hits in reached if hits.first and not hits.late]
    by_first = [hits.reference_first / hits.first for hits in reached if hits.first and hits not in late]
    return SpeedUp(
        pairs=len(usable),
        reached=len(reached),
        target=_mean([hits.target for _, _, hits in usable]),
        reference_last=_mean([hits.reference_last for hits in shown]),
        reference_first=_mean([hits.reference_first for hits in shown]),
        reference_before=_mean([hits.reference_before for hits in shown]),
        first=_mean(firsts) if firsts else None,
        before=_mean([hits.before for hits in reached]) if firsts else None,
        by_last=_ratio(by_last, len(usable), which),
        by_first=_ratio(by_first, len(usable), which),
        waiting=min(waiting, default=None),
        note="; ".join(notes),
        late=any(hits.late for hits in reached),
        reference_late=any(hits.reference_late for hits in shown),
    )


def _span(steps: set[int]) -> str:
    return str(min(steps)) if len(steps) == 1 else f"{min(steps)}–{max(steps)}"


def _of_seeds(left: Sequence[object], every: Sequence[object]) -> str:
    return f" in {len(every) - len(left)} of {len(every)} seeds, which are left out"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else nan


def _ratio(ratios: list[float], seeds: int, which: str) -> Estimate | None:
    if not ratios:
        return None
    logarithm = over_seeds(np.log(ratios).tolist())
    value = float(np.exp(logarithm.value))
    if len(ratios) < seeds:
        return Estimate(value, note=f"of the {'seed' if len(ratios) == 1 else f'{len(ratios)} seeds'} {which}")
    return replace(logarithm, value=value, low=float(np.exp(logarithm.low)), high=float(np.exp(logarithm.high)))
