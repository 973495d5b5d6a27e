"""What the report says first: which method is best in each setting, by how much, and what to look at.

"Established" is a difference whose 95% interval, over seeds and problems, does not reach 0; all else is open. Of one
seed nothing is established: its interval knows problems only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan

from vlnorm_verl.methods import label_of
from vlnorm_verl.report import measures
from vlnorm_verl.report.estimates import LEVEL, Estimate
from vlnorm_verl.report.first_hit import SpeedUp, speed_up
from vlnorm_verl.report.groups import Groups, doubles, only, with_validation
from vlnorm_verl.report.identity import Setting
from vlnorm_verl.report.labels import points
from vlnorm_verl.report.run import VALIDATION_METRIC, Run

MANY = 5  # comparisons; from so many on the page says what several intervals at once mean
NAMED = 8  # runs that are named one by one


def state_of(difference: Estimate | None) -> str:
    """ "established", "open", "one seed" or "" where there is no interval."""
    notes = [] if difference is None else difference.note.split("; ")
    if "one seed" in notes or any(note.endswith("seeds: no interval") for note in notes):
        return "one seed"
    if difference is None or not isfinite(difference.low):
        return ""
    return "established" if difference.low > 0 or difference.high < 0 else "open"


@dataclass(frozen=True)
class Over:
    """The best method over another one. difference: best minus that one, as it and its interval are written."""

    method: str
    state: str
    difference: str
    behind: bool  # at the last step that both have, which may be earlier than the best one's last


@dataclass(frozen=True)
class Verdict:
    """One setting's. value: the best method's accuracy. reach: when it was at the
    final accuracy of the next best one that it is established over."""

    title: str
    best: str
    method_key: str
    value: Estimate
    seeds: str
    step: str
    over: tuple[Over, ...]
    reach: str
    unit: str

    @property
    def sure(self) -> bool:
        """Whether it is established over every other method."""
        return bool(self.over) and all(over.state == "established" and not over.behind for over in self.over)

    @property
    def claim(self) -> str:
        """What is established of the best method."""
        if not self.over:
            return "the only method"
        if self.sure:
            return f"best of {len(self.over) + 1}, established"
        count = sum(over.state == "established" and not over.behind for over in self.over)
        return f"highest of {len(self.over) + 1}, established over {count or 'none'}"

    @property
    def shown(self) -> str:
        """Its accuracy with the interval."""
        numbers = [f"{of:.3f}".replace("-", "−") for of in (self.value.value, self.value.low, self.value.high)]
        return numbers[0] + (f" [{numbers[1]}, {numbers[2]}]" if isfinite(self.value.low) else "")

    def sentence(self) -> str:
        """The whole verdict as a line of text."""
        words = [f"{self.title}: {self.best} {self.shown}, {self.claim} ({self.seeds}, step {self.step})."]
        over = [
            f"{over.difference}{self.unit} {'behind' if over.behind else 'over'} {over.method}"
            + (f" ({over.state or 'no interval'})" if over.state != "established" else "")
            for over in self.over
        ]
        return " ".join([*words, *([f"{', '.join(over)}."] if over else []), *([self.reach] if self.reach else [])])


def verdicts(groups: Groups, titles: dict[Setting, str]) -> list[Verdict]:
    """One for each setting that has an accuracy, in the order of the groups."""
    found = (_verdict(only(groups, setting), titles[setting]) for setting in dict.fromkeys(s for s, _ in groups))
    return [verdict for verdict in found if verdict is not None]


def _verdict(groups: Groups, title: str) -> Verdict | None:
    of_methods = {group: with_validation(runs) for group, runs in groups.items()}
    finals = {group: measures.final_accuracy(runs) for group, runs in of_methods.items()}
    values = {group: final for group, final in finals.items() if final is not None and isfinite(final.value)}
    if not values:
        return None
    best, *others = sorted(values, key=lambda group: -values[group].value)
    is_rate = measures.is_rate(of_methods[best])
    over = []
    for other in others:
        difference = measures.difference(of_methods[best], of_methods[other])
        if difference is None:
            difference = Estimate(nan)
        text = points(difference.value, is_rate)
        if isfinite(difference.low):
            text += f" [{points(difference.low, is_rate, False)}, {points(difference.high, is_rate, False)}]"
        where = [note for note in difference.note.split("; ") if note.startswith("at step")]
        text += f" ({where[0]})" if where else ""
        over.append(Over(label_of(other[1], other[0].family), state_of(difference), text, difference.value < 0))
    established = (other for other, of in zip(others, over, strict=True) if of.state == "established" and not of.behind)
    nearest = next(established, None)
    count = len(measures.final_runs(of_methods[best]))
    return Verdict(
        title=title,
        best=label_of(best[1], best[0].family),
        method_key=best[1],
        value=values[best],
        seeds="1 seed" if count == 1 else f"{count} seeds",
        step=step_of(of_methods[best]),
        over=tuple(over),
        reach=_reach(of_methods[best], of_methods[nearest], nearest) if nearest else "",
        unit=" points" if is_rate else "",
    )


def _reach(runs: Sequence[Run], other: Sequence[Run], group: tuple[Setting, str]) -> str:
    hits = speed_up(runs, other, 1)
    if hits is None or hits.first is None:
        return ""
    times = f" ({by_last})" if (by_last := times_sooner(hits)) else ""
    name = label_of(group[1], group[0].family)
    seeds = f" in {hits.reached} of {hits.pairs} seeds" if hits.reached < hits.pairs else ""
    return f"At {name}'s final accuracy at step {bracket(hits.before, hits.first, hits.late)}{times}{seeds}."


def bracket(before: float | None, first: float | None, late: bool = False) -> str:
    """ "325–350": between the last validation below and the first one at the target; whole steps."""
    if first is None or not isfinite(first):
        return ""
    if late or before is None:
        return f"at or before {first:.0f}"
    return f"{before:.0f}–{first:.0f}" if round(before) < round(first) else f"{first:.0f}"


def times_sooner(hits: SpeedUp) -> str:
    """The reference's last step over the bracket: "2.86–3.08×"; "" where it is not known."""
    if hits.first is None or hits.by_last is None or hits.late:
        return ""
    low = f"{hits.reference_last / hits.first:.2f}"
    high = f"{hits.reference_last / hits.before:.2f}" if hits.before else ""
    return f"{low}–{high}×" if high else f"{low}× or more"


def step_of(runs: Sequence[Run]) -> str:
    """ "1000", "450 of 1000"; of the last validation."""
    step = measures.final_step(runs) or 0
    planned = max((run.planned_steps or 0 for run in runs), default=0)
    return str(step) if step >= planned else f"{step} of {planned}"


def several_at_once(found: Sequence[Verdict]) -> str:
    """On multiple comparisons; "" where there are few."""
    count = sum(over.state in ("established", "open") for verdict in found for over in verdict.over)
    if count < MANY:
        return ""
    return (
        f"{count} differences are judged here, each by a {LEVEL:.0%} interval of its own. If no method differed from "
        f"another, about {count * (1 - LEVEL):.0f} of so many would look established by chance, and some more since "
        "the best method of each setting was picked from the same data."
    )


def look_at(runs: Sequence[Run], groups: Groups, titles: dict[Setting, str]) -> dict[str, list[str]]:
    """What is wrong with the runs: {what: which}, the gravest first."""
    every = [run for of in groups.values() for run in of]
    behind = [
        run
        for of in groups.values()
        for run in with_validation(of)
        if (measures.final_step([run]) or 0) < (measures.final_step(of) or 0)
    ]
    not_numbers = {
        run.name: [key for key in run.ended if not run.metric or key == run.metric] or [*run.ended]
        for run in runs
        if run.ended
    }
    found = {
        "Accuracy is not a number any more": [
            f"{run.name} (from step {step} on)"
            for run in runs
            for key, step in run.ended.items()
            if key == run.metric or (not run.metric and VALIDATION_METRIC.fullmatch(key))
        ],
        "Not a finite number any more": [
            f"{run.name} ({', '.join(keys[:2])}{' …' if len(keys) > 2 else ''}, from step {min(run.ended.values())} on)"
            for run in runs
            if (keys := not_numbers.get(run.name))
        ],
        "No metrics": [f"{run.name} ({run.notes[-1]})" for run in runs if not len(run.steps) and run.notes],
        "No validation": [run.name for run in every if len(run.steps) and not measures.validated_steps(run)],
        "Not finished": [
            f"{run.name} ({step_of([run])}{', not in its row' if any(run is other for other in behind) else ''})"
            for run in with_validation(every)
            if measures.unfinished(run)
        ],
        "Left out of its row, not as far as another seed": [
            f"{run.name} (step {measures.final_step([run])})" for run in behind if not measures.unfinished(run)
        ],
        "Left out, another run has the same seed": [run.name for run in doubles(runs) if len(run.steps)],
        "One seed only": [
            f"{label_of(key, setting.family)} ({titles[setting]})"
            for (setting, key), of in groups.items()
            if len(measures.final_runs(with_validation(of))) == 1
        ],
        "No validation dumps, so no interval over problems": [
            run.name for run in with_validation(every) if not run.validations
        ],
    }
    return {what: which for what, which in found.items() if which}


def shortened(which: Sequence[str], named: int = NAMED) -> str:
    """The first of them, and how many more."""
    more = f" and {len(which) - named} more" if len(which) > named else ""
    return ", ".join(which[:named]) + more
