"""What the report says first: which method is best in each setting, by how much, and what to look at.

"Established" is a difference whose 95% interval, over seeds and problems, does not reach 0; all else is open. Of one
seed nothing is established: its interval knows problems only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan

from vlnorm_verl.report import measures
from vlnorm_verl.report.configs import differing_keys
from vlnorm_verl.report.estimates import LEVEL, Estimate
from vlnorm_verl.report.first_hit import speed_up
from vlnorm_verl.report.groups import Comparison, Group, Groups, by_setting, doubles, runs_of
from vlnorm_verl.report.labels import accuracy_label, points
from vlnorm_verl.report.run import Run, logged_accuracies
from vlnorm_verl.report.table import number
from vlnorm_verl.runs.records import VALIDATION_METRIC, has_unread

MANY = 3  # pairs of methods; from so many on the page says what several intervals at once mean
NAMED = 8  # runs that are named one by one


@dataclass(frozen=True)
class Over:
    """The best method over another one. difference: best minus that one, as it is written; state, note: an Estimate's.

    relation: "over"; "behind" at the last step that both have, which may be earlier than the best one's last; "with"
    where the difference is no number but why there is none.
    """

    method: str
    state: str
    difference: str
    relation: str
    note: str = ""

    @property
    def established(self) -> bool:
        return self.state == "established" and self.relation == "over"

    @property
    def words(self) -> str:
        """ "+4.6 [−0.3, 9.5] points over DAPO Norm (open; 2 of 3 seeds)", "no validated step in common with …"."""
        # An estimate of one seed says so in its note, too.
        state = "" if self.state in ("established", "one seed") or self.relation == "with" else self.state
        known = "; ".join(filter(None, (state, self.note)))
        return f"{self.difference} {self.relation} {self.method}" + (f" ({known})" if known else "")


@dataclass(frozen=True)
class Verdict:
    """One setting's. value: the best method's accuracy; basis: what accuracy, over how many seeds, at which step.

    reach: when it was at the final accuracy of the next best one that it is established over.
    """

    title: str
    best: str
    value: Estimate
    basis: str
    over: tuple[Over, ...]
    reach: str

    @property
    def sure(self) -> bool:
        """Whether it is established over every other method."""
        return bool(self.over) and all(over.established for over in self.over)

    @property
    def claim(self) -> str:
        """What is established of the best method."""
        if not self.over:
            return "the only method"
        if self.sure:
            earlier = any("at step" in over.note for over in self.over)  # than the step in `basis`
            return f"best of {len(self.over) + 1}{' so far' if earlier else ''}, established"
        count = sum(over.established for over in self.over)
        return f"highest of {len(self.over) + 1}, established over {count or 'none'}"

    @property
    def shown(self) -> str:
        """Its accuracy with the interval."""
        numbers = [number(value, 3) for value in (self.value.value, self.value.low, self.value.high)]
        return numbers[0] + (f" [{numbers[1]}, {numbers[2]}]" if isfinite(self.value.low) else "")

    def sentence(self) -> str:
        """The whole verdict as a line of text."""
        words = [f"{self.title}: {self.best} {self.shown}, {self.claim} ({self.basis})."]
        words += [f"{', '.join(over.words for over in self.over)}."] if self.over else []
        return " ".join([*words, *([self.reach] if self.reach else [])])


def verdicts(compared: Comparison) -> list[Verdict]:
    """One for each setting that has an accuracy, in the order of the groups."""
    settings = by_setting(compared.validated).items()
    found = (_verdict(groups, compared.finals, compared.titles[setting]) for setting, groups in settings)
    return [verdict for verdict in found if verdict is not None]


def _verdict(groups: Groups, finals: dict[Group, Estimate | None], title: str) -> Verdict | None:
    values = {group: final for group in groups if (final := finals[group]) is not None and isfinite(final.value)}
    if not values:
        return None
    best, *others = sorted(values, key=lambda group: -values[group].value)
    is_rate = measures.is_rate(runs_of(groups))
    over = []
    for other in others:
        difference = measures.difference(groups[best], groups[other]) or Estimate(nan, note="no comparison")
        if not isfinite(difference.value):
            over.append(Over(other.label, difference.state, difference.note, "with"))
            continue
        text = points(difference.value, is_rate)
        if isfinite(difference.low):
            text += f" [{points(difference.low, is_rate, False)}, {points(difference.high, is_rate, False)}]"
        text += " points" if is_rate else ""
        relation = "behind" if difference.value < 0 else "over"
        over.append(Over(other.label, difference.state, text, relation, difference.note))
    nearest = next((other for other, found in zip(others, over, strict=True) if found.established), None)
    count = len(measures.final_runs(groups[best]))
    return Verdict(
        title=title,
        best=best.label,
        value=values[best],
        basis=f"{accuracy_label(groups[best])}, {count} seed{'s' * (count > 1)}, step {step_of(groups[best])}",
        over=tuple(over),
        reach=_reach(groups[best], groups[nearest], nearest.label) if nearest else "",
    )


def _reach(runs: Sequence[Run], other: Sequence[Run], name: str) -> str:
    hits = speed_up(runs, measures.final_runs(other), 1)
    if hits is None or hits.own.first is None:
        return ""
    return f"It reaches {name}'s final accuracy {hits.when(name)}; {name} itself is there at {hits.reference}."


def step_of(runs: Sequence[Run]) -> str:
    """ "1000", "450 of 1000"; of the last validation."""
    step = measures.final_step(runs) or 0
    planned = max((run.planned_steps or 0 for run in runs), default=0)
    return str(step) if step >= planned else f"{step} of {planned}"


def several_at_once(found: Sequence[Verdict]) -> str:
    """On multiple comparisons; "" where there are few. Any two methods of a setting could have been those compared."""
    judged = [sum(over.state in ("established", "open") for over in verdict.over) for verdict in found]
    pairs = sum(count * (count + 1) // 2 for count in judged)
    if pairs < MANY:
        return ""
    return (
        f"{sum(judged)} differences are judged here, each by a {LEVEL:.0%} interval of its own. If no method differed "
        f"from another, the chance that one or more look established would be up to {1 - LEVEL**pairs:.0%}: the best "
        f"method of a setting is picked from the same data, so each of the {pairs} pairs of methods counts."
    )


def _is_accuracy(run: Run, key: str) -> bool:
    return key == run.metric or (not run.metric and VALIDATION_METRIC.fullmatch(key) is not None)


def _unseeded(run: Run) -> bool:
    """Whether its configuration leaves out the seed of the prompts' order, which verl then has the same in all runs."""
    data = run.config.get("data")
    return isinstance(data, dict) and "seed" in data and data["seed"] is None


def _last(run: Run) -> int:
    """Its last step, with a record or a dump."""
    return int(run.steps[-1]) if len(run.steps) else measures.validated_steps(run)[-1]


def _without_average(compared: Comparison) -> dict[str, list[str]]:
    """Methods without an accuracy, and a metric that they can be compared by."""
    lacking = {
        group: next(filter(measures.has_no_average, runs))
        for group, runs in compared.validated.items()
        if ((final := compared.finals[group]) is None or not isfinite(final.value))
        and any(map(measures.has_no_average, runs))
    }
    if not lacking:
        return {}
    name, logged = next(iter(logged_accuracies(next(iter(lacking.values()))).items()))
    what = (
        "Several validation sets and no dump that says which one a response is of, so there is no one accuracy "
        f"(--metric KEY compares one, for instance val-core/{name}/{logged.variable}/mean@{logged.n})"
    )
    return {what: [f"{group.label} ({compared.titles[group.setting]})" for group in lacking]}


def look_at(compared: Comparison) -> dict[str, list[str]]:
    """What is wrong with the runs: {what: which}, the gravest first."""
    runs, every, validated = compared.runs, runs_of(compared.groups), runs_of(compared.validated)
    behind = [
        run
        for seeds in compared.validated.values()
        for run in seeds
        if (measures.final_step([run]) or 0) < (measures.final_step(seeds) or 0)
    ]
    other_sets = list[str]()
    for groups in by_setting(compared.validated).values():
        sets = [(run, ", ".join(measures.validation_sets([run]))) for run in runs_of(groups)]
        usual = Counter(names for _, names in sets).most_common(1)[0][0]
        other_sets += [f"{run.name} ({names} instead of {usual})" for run, names in sets if names != usual]
    known = {run.setting for run in every if any(run.setting)}
    hint = " (label=PATH takes it as theirs)" if len(known) == 1 else ""
    furthest = {
        setting: max(measures.validated_steps(run)[-1] for run in runs_of(groups))
        for setting, groups in by_setting(compared.validated).items()
    }
    left_out = {run: differing_keys([run, taken]) for run, taken in doubles(runs, compared.groups).items()}
    found = {
        "Accuracy is not a number any more": [
            f"{run.name} (from step {step} on)"
            for run in runs
            for key, step in run.ended.items()
            if _is_accuracy(run, key)
        ],
        "Not a finite number any more": [
            f"{run.name} ({', '.join(keys[:2])}{' …' if len(keys) > 2 else ''}, from step {run.ended[keys[0]]} on)"
            for run in runs
            if (keys := sorted((key for key in run.ended if not _is_accuracy(run, key)), key=run.ended.__getitem__))
        ],
        "Files of it cannot be read": [run.name for run in runs if has_unread(run.notes)],
        "Not in the report": [f"{run.name} ({run.left_out})" for run in runs if run.left_out and not run.copy],
        **_without_average(compared),
        f"Setting not known, so not compared with those of a known one{hint}": [
            run.name for run in every if not any(run.setting) and known
        ],
        "Other validation sets than most runs of the setting, so not compared with them": other_sets,
        "No metrics, only validation dumps": [run.name for run in every if not len(run.steps)],
        "No validation": [run.name for run in every if not measures.validated_steps(run)],
        "Not finished": [
            f"{run.name} ({step_of([run])}{', not in its row' if run in behind else ''})"
            for run in validated
            if measures.unfinished(run)
        ],
        "Left out of its row, not as far as another seed": [
            f"{run.name} (step {measures.final_step([run])})" for run in behind if not measures.unfinished(run)
        ],
        "Its log begins late, so how it was trained before is not known": [
            f"{run.name} (step {run.late_start})" for run in every if run.late_start is not None
        ],
        "Ends before other runs of its setting; whether that was planned is not known": [
            f"{run.name} (step {_last(run)})"
            for run in validated
            if run.planned_steps is None and run not in behind and _last(run) < furthest[run.setting]
        ],
        "Left out, another run has the same seed, but another configuration (label=PATH for each such run)": [
            f"{run.name} ({shortened(keys)})" for run, keys in left_out.items() if keys
        ],
        "Left out, another run has the same seed": [run.name for run, keys in left_out.items() if not keys],
        "Counted as seeds of one method, but configured differently": [
            f"{group.label} ({compared.titles[group.setting]}; {shortened(keys)})"
            for group, seeds in compared.groups.items()
            if (keys := differing_keys(seeds))
        ],
        "Counted as seeds by their names, but without data.seed: the prompts have the same order in all of them": [
            f"{group.label} ({compared.titles[group.setting]})"
            for group, seeds in compared.groups.items()
            if sum(_unseeded(run) and not run.numbered for run in seeds) > 1
        ],
        "Seed not known, so counted as one more (label@seed=PATH says it); the prompts may have the same order": [
            run.name for seeds in compared.groups.values() for run in seeds if run.numbered and len(seeds) > 1
        ],
        "One seed only": [
            f"{group.label} ({compared.titles[group.setting]})"
            for group, seeds in compared.validated.items()
            if len(measures.final_runs(seeds)) == 1
        ],
        "No validation dump that can be used, so no interval over problems": [
            run.name + (f" (step {step})" if run.validations else "")
            for run in validated
            if measures.undumped([run], step := measures.validated_steps(run)[-1]) and not run.unnamed
        ],
        "Validation dumps do not say the validation set of a response (a reward that returns data_source as "
        "validation_set does)": [run.name for run in validated if run.unnamed],
    }
    return {what: which for what, which in found.items() if which}


def shortened(which: Sequence[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(which) - NAMED} more" if len(which) > NAMED else ""
    return ", ".join(which[:NAMED]) + more
