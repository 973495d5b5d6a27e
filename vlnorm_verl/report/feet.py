"""The sentences below the tables: how columns are defined, and what a reader has to know before comparing rows."""

from __future__ import annotations

from collections.abc import Sequence

from vlnorm_verl.methods import label_of
from vlnorm_verl.report import measures, paper
from vlnorm_verl.report.groups import Groups, only, reference, with_validation
from vlnorm_verl.report.run import VALIDATION_METRIC, Run

DIFFERENCE = "VL Norm minus this"
ACCURACY = (
    "Avg@8: share of correct responses, mean over problems, at a run's last validation. Brackets: 95% interval, over "
    "problems (a problem's responses stay together) and, where there are several, over seeds; with one seed it holds "
    "for that training run only."
)
PAIRED = "95% interval of the paired difference (same problems; same seeds where both have them)."
PASS = (
    "Pass@8: 1 − C(n−c, 8)/C(n, 8), unbiased, mean over problems. verl's best@8: a bootstrap with replacement, which "
    "lies below it."
)
MONOTONICITY = (
    "Monotonicity: Kendall's τ-b between step and accuracy over a run's validations. This definition is ours; the "
    "paper's was not found."
)
WEIGHTED = "Weighted: over the validation sets by their number of problems; its interval resamples within each set."


def step_of(runs: Sequence[Run]) -> str:
    """ "1000", "450 of 1000"; of the last validation."""
    step = measures.final_step(runs) or 0
    planned = max((run.planned_steps or 0 for run in runs), default=0)
    return str(step) if step >= planned else f"{step} of {planned}"


def difference_heading(baseline: str) -> str:
    return f"this minus {label_of(baseline)}" if baseline else DIFFERENCE


def accuracy_heading(groups: Groups) -> str:
    """The accuracies' heading."""
    return measures.accuracy_name([run for runs in groups.values() for run in runs])


def on_accuracy(groups: Groups) -> str:
    """On the accuracies."""
    metric = next((run.metric for runs in groups.values() for run in runs), "")
    if metric != accuracy_heading(groups):
        return ACCURACY
    return f"{metric}: as it was logged. {ACCURACY.partition(': ')[2]}"


def on_difference(groups: Groups, baseline: str) -> list[str]:
    """On the difference, or on why several methods have none."""
    references = {group: reference(groups, group[0], baseline) for group in groups}
    if any(other not in (None, group) for group, other in references.items()):
        better = "this" if baseline else "VL Norm"
        return [f"{difference_heading(baseline)}: positive where {better} is better; {PAIRED}"]
    if len(groups) == 1 or any(references.values()):
        return []
    if baseline:
        return [f"No differences: {label_of(baseline)} was not run here."]
    return ["No VL Norm here that the others could be compared with: --baseline METHOD names another method."]


def caveats(groups: Groups) -> list[str]:
    """What a reader has to know before comparing the rows."""
    every = [run for runs in groups.values() for run in runs]
    validated = with_validation(every)
    named = {
        "Not finished": [f"{run.name} ({step_of([run])})" for run in validated if measures.unfinished(run)],
        "Accuracy is not a number any more": [
            f"{run.name} (from step {step} on)"
            for run in every
            for key, step in run.ended.items()
            if key == run.metric or (not run.metric and VALIDATION_METRIC.fullmatch(key))
        ],
        "Without a validation, left out": [run.name for run in every if not measures.validated_steps(run)],
        "Not as far as another seed of its row, so not in the row's values": [
            f"{run.name} (step {last})"
            for runs in groups.values()
            for run in with_validation(runs)
            if (last := max(measures.validated_steps(run))) < (measures.final_step(runs) or 0)
        ],
    }
    feet = [f"{words}: {', '.join(names)}." for words, names in named.items() if names]
    settings = dict.fromkeys(setting for setting, _ in groups)
    for setting in settings:
        steps = {measures.final_step(runs) or 0 for runs in only(groups, setting).values()}
        if len(steps) > 1:
            where = ", ".join(filter(None, (setting.model, setting.length)))
            feet.append(
                f"{where or 'These runs'}: rows stand at different steps ({', '.join(map(str, sorted(steps)))}); a "
                "difference is at the last step that both have."
            )
    if others := {setting.model for setting in settings if paper.has(setting) and not paper.covers(setting)}:
        feet.append(
            f"The paper has no model {', '.join(sorted(others))}: such rows are not comparable with its values."
        )
    if any(map(paper.covers, settings)):
        feet.append(
            "The paper's values are of arXiv 2509.07558; the label says where each was read, “not found” that it could "
            "not be."
        )
    return feet


def on_other_accuracies(groups: Groups) -> list[str]:
    """A sentence where a run's accuracies are not means of eight responses' `acc`."""
    others = []
    for run in with_validation([run for runs in groups.values() for run in runs]):
        variables, counts = measures.accuracies_of([run])
        if counts <= {0}:
            continue
        if variables - {"acc"} or counts != {measures.K}:
            what = f" of {', '.join(sorted(variables))}" if variables - {"acc"} else ""
            others.append(f"{run.name}: mean@{', '.join(map(str, sorted(counts)))}{what}")
    if not others:
        return []
    return [f"Not Avg@8 of verl's acc: {'; '.join(others)}. Pass@8 is over the problems that have eight responses."]
