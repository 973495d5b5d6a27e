"""The report's tables from runs.

| table    | says                                                                                   |
|----------|----------------------------------------------------------------------------------------|
| results  | of each setting and method: accuracy, difference, Pass@8, seeds, step                  |
| details  | of the same rows: monotonicity, verl's best@8, what the paper has                      |
| sets     | accuracy on each validation set, where a setting has several (Math)                    |
| speedup  | when the higher of two methods reached the other's final accuracy                      |
| settings | what else the runs of a setting differ in, by their configurations                     |
| inputs   | every run that was read, with what was odd                                             |

A run belongs where its recipe's family and task say, whatever its folder is called. A table without a row is not made,
and a column in which no row says anything is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from vlnorm_verl.methods import label_of
from vlnorm_verl.report import measures, paper
from vlnorm_verl.report.configs import differing
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.first_hit import SpeedUp, smoothing, speed_up
from vlnorm_verl.report.groups import (
    Group,
    Groups,
    doubles,
    grouped,
    only,
    ordered,
    pairs_of,
    reference,
    where,
    with_validation,
)
from vlnorm_verl.report.identity import UNKNOWN_SEED, Setting
from vlnorm_verl.report.labels import titles
from vlnorm_verl.report.run import Run
from vlnorm_verl.report.table import Cell, Table
from vlnorm_verl.report.verdict import bracket, step_of, times_sooner

Row = dict[str, Cell]  # heading -> cell; the rows of a table have the same headings

TITLES = {
    "results": "Results",
    "details": "More of the same rows",
    "sets": "Each validation set",
    "speedup": "Steps to another method's final accuracy",
    "settings": "What else the runs differ in",
    "inputs": "What was read",
}
MATH_SETS = {"aime2024": "AIME2024", "amc": "AMC", "math500": "MATH500", "minerva": "Minerva"}
DIFFERENCE = "VL Norm minus this"
# What paper.yaml has, by family: metric -> heading.
OF_PAPER = {
    "aggregation": {"avg@8": "paper's Avg@8", "pass@8": "paper's Pass@8"},
    "dapo": {"accuracy": "paper's accuracy", "vl_norm_minus_this": f"paper's {DIFFERENCE}"},
}
ACCURACY = (
    "share of correct responses, mean over problems, at the last validation. Brackets: 95% interval over problems (a "
    "problem's responses stay together) and seeds; of one seed it holds for that training run only."
)
PASS = "Pass@8: 1 − C(n−c, 8)/C(n, 8), unbiased, mean over problems."


def tables(runs: Sequence[Run], smooth: int | None = None, baseline: str = "") -> list[Table]:
    """Every table that there are rows for, `inputs` last.

    smooth: steps of the speed-up's trailing mean, see `first_hit.smoothing`.
    baseline: the method that others are compared with, instead of VL Norm.
    """
    groups = validated(runs)
    made = [
        _results(groups, baseline),
        _details(groups, any(run.metric for run in runs)),
        _sets(groups),
        _speed_up(groups, smooth, baseline),
        differing(groups, titles(setting for setting, _ in groups), TITLES["settings"]),
    ]
    return [table for table in made if table is not None] + [inputs(runs)]


def validated(runs: Sequence[Run]) -> Groups:
    """The groups of which a run has a validation, in the order of the tables."""
    return ordered({group: seeds for group, seeds in grouped(runs).items() if with_validation(seeds)})


def _table(name: str, rows: list[Row], foot: list[str], hidden: Sequence[str] = (), **options: object) -> Table | None:
    """Without the columns in which no row says anything; None without a row."""

    def says(cell: Cell) -> bool:
        if isinstance(cell, Estimate):
            return bool(cell.note) or not isnan(cell.value)
        return cell not in (None, "", paper.NOT_FOUND)

    columns = [heading for heading in (rows[0] if rows else ()) if any(says(row[heading]) for row in rows)]
    if not columns:
        return None
    cells = [[row[heading] for heading in columns] for row in rows]
    hidden = [column for column in hidden if column in columns]
    return Table(name, TITLES[name], columns, cells, foot, hidden=tuple(hidden), grouped=True, **options)  # type: ignore[arg-type]


def _starts(groups: Groups) -> dict[Group, Row]:
    """What every row begins with."""
    names = titles(setting for setting, _ in groups)
    return {group: {"setting": names[group[0]], "method": label_of(group[1], group[0].family)} for group in groups}


def difference_heading(baseline: str) -> str:
    return f"this minus {label_of(baseline)}" if baseline else DIFFERENCE


def accuracy_heading(groups: Groups) -> str:
    return measures.accuracy_name([run for runs in groups.values() for run in runs])


# ---------------------------------------------------------------------------------------------------------- accuracy


def _results(groups: Groups, baseline: str) -> Table | None:
    heading, rows = accuracy_heading(groups), []
    for group, start in _starts(groups).items():
        runs = with_validation(groups[group])
        used = len(measures.final_runs(runs))
        rows.append(
            start
            | {
                heading: measures.final_accuracy(runs),
                difference_heading(baseline): _difference(groups, group, baseline),
                "Pass@8": measures.final_pass(runs),
                "seeds": used if used == len(runs) else f"{used} of {len(runs)}",
                "step": step_of(runs),
            }
        )
    foot = [f"{heading}: {ACCURACY}", *_on_difference(groups, baseline), PASS]
    if any(len(measures.validation_sets(runs)) > 1 for runs in groups.values()):
        foot.append("Several validation sets: weighted by their problems; the interval resamples within each set.")
    foot += [*_at_different_steps(groups), *_other_accuracies(groups)]
    return _table("results", rows, foot, bold=_best(groups, rows, heading), forest=difference_heading(baseline))


def _best(groups: Groups, rows: list[Row], heading: str) -> frozenset[int]:
    """The rows with the highest accuracy of their setting, where that has several."""
    settings: dict[Setting, list[tuple[float, int]]] = {}
    for index, (group, row) in enumerate(zip(groups, rows, strict=True)):
        cell = row[heading]
        if isinstance(cell, Estimate) and not isnan(cell.value):
            settings.setdefault(group[0], []).append((cell.value, index))
    return frozenset(max(of)[1] for of in settings.values() if len(of) > 1)


def _difference(groups: Groups, group: Group, baseline: str) -> Cell:
    """VL Norm minus this, or this minus the baseline."""
    other = reference(groups, group[0], baseline)
    if other is None or other == group:
        return None
    minuend, subtrahend = (group, other) if baseline else (other, group)
    return measures.difference(with_validation(groups[minuend]), with_validation(groups[subtrahend]))


def _on_difference(groups: Groups, baseline: str) -> list[str]:
    """On the difference, or on why several methods have none."""
    references = {group: reference(groups, group[0], baseline) for group in groups}
    if any(other not in (None, group) for group, other in references.items()):
        better = "this" if baseline else "VL Norm"
        return [
            f"{difference_heading(baseline)}: positive where {better} is better; 95% interval, paired by problem and "
            "by the seeds that both have. Filled: the interval does not reach 0; hollow: open; grey: one seed, which "
            "knows problems only."
        ]
    if len(groups) == 1 or any(references.values()):
        return []
    if baseline:
        return [f"No differences: {label_of(baseline)} was not run here."]
    return ["No VL Norm here that the others could be compared with: --baseline METHOD names another method."]


def _at_different_steps(groups: Groups) -> list[str]:
    names = titles(setting for setting, _ in groups)
    steps = {
        setting: sorted({measures.final_step(runs) or 0 for runs in only(groups, setting).values()})
        for setting in names
    }
    uneven = [f"{names[setting]} ({', '.join(map(str, of))})" for setting, of in steps.items() if len(of) > 1]
    return (
        [f"Rows stand at different steps, and a difference is at the last that both have: {'; '.join(uneven)}."]
        if uneven
        else []
    )


def _other_accuracies(groups: Groups) -> list[str]:
    """A sentence where a run's accuracies are not means of eight responses' `acc`."""
    others = []
    for run in with_validation([run for runs in groups.values() for run in runs]):
        variables, counts = measures.accuracies_of([run])
        if not counts <= {0} and (variables - {"acc"} or counts != {measures.K}):
            what = f" of {', '.join(sorted(variables))}" if variables - {"acc"} else ""
            others.append(f"{run.name}: mean@{', '.join(map(str, sorted(counts)))}{what}")
    if not others:
        return []
    return [f"Not Avg@8 of verl's acc: {'; '.join(others)}. Pass@8 is over the problems that have eight responses."]


def _details(groups: Groups, other_metric: bool) -> Table | None:
    """other_metric: the paper's values are of verl's accuracy only."""
    rows: list[Row] = []
    for group, start in _starts(groups).items():
        runs = with_validation(groups[group])
        of_paper: Row = {heading: None for headings in OF_PAPER.values() for heading in headings.values()}
        for metric, heading in OF_PAPER.get(group[0].family, {}).items():
            of_paper[heading] = None if other_metric else paper.cell(*group, metric)
        rows.append(
            start | {"monotonicity": measures.monotonicity(runs), "verl's best@8": measures.own_best(runs)} | of_paper
        )
    if not rows or all(cell is None for row in rows for cell in list(row.values())[2:]):
        return None
    foot = [
        "Monotonicity: Kendall's τ-b between step and accuracy over a run's validations. This definition is ours; the "
        "paper's was not found. It punishes a plateau: a method that is at its best early and stays there is lower "
        "than one that still climbs. verl's best@8: a bootstrap with replacement, which lies below Pass@8.",
    ]
    if any(map(paper.covers, (setting for setting, _ in groups))) and not other_metric:
        foot.append("The paper: arXiv 2509.07558; “not found”: that its value could not be; –: not in the paper.")
        foot += paper.sources(groups, [metric for metrics in OF_PAPER.values() for metric in metrics])
        foot += paper.remarks(where(groups, lambda setting, _: setting.family == "aggregation"))
    return _table("details", rows, foot)


def _sets(groups: Groups) -> Table | None:
    groups = where(groups, lambda setting, key: len(measures.validation_sets(groups[setting, key])) > 1)
    names = {name for runs in groups.values() for name in measures.validation_sets(runs)}
    rows: list[Row] = []
    for group, start in _starts(groups).items():
        runs = with_validation(groups[group])
        for name in (*(known for known in MATH_SETS if known in names), *sorted(names - MATH_SETS.keys())):
            start[MATH_SETS.get(name, name)] = measures.final_accuracy(runs, name)
        rows.append(start)
    foot = [f"{accuracy_heading(groups)}: {ACCURACY}"] if groups else []
    if any(len(measures.set_sizes(run)) < len(measures.validation_sets([run])) for of in groups.values() for run in of):
        foot.append(
            "Where no dump that can be used says which validation set a response is of, each set's number is verl's "
            "own, without an interval over problems, and there is no weighted average."
        )
    return _table("sets", rows, foot)


# ---------------------------------------------------------------------------------------------------------- speed-up


def _speed_up(groups: Groups, smooth: int | None, baseline: str) -> Table | None:
    rows: list[Row] = []
    starts, used = _starts(groups), []
    for group, other in pairs_of(groups, baseline):
        runs, others = with_validation(groups[group]), with_validation(groups[other])
        window = smoothing((run for of in only(groups, group[0]).values() for run in of), smooth)
        raw, smoothed = speed_up(runs, others, 1), speed_up(runs, others, window)
        if raw is None or smoothed is None:
            continue
        used.append(group)
        row = starts[group] | {
            "reaches the final accuracy of": starts[other]["method"],
            "target": Estimate(raw.target, note=raw.note),
            "at step": _first(raw),
            "that one's first hit": bracket(raw.reference_before, raw.reference_first, raw.reference_late),
            "last step / first hit": times_sooner(raw) or None,
            "first hit / first hit": raw.by_first,
            "smoothed: at step": _first(smoothed) if window > 1 else None,
            "seeds reached": f"{raw.reached} of {raw.pairs}",
            "paper's first hit": _papers_first_hit(group, other),
        }
        for name, hits in (("raw", raw), (f"mean of {window} steps", smoothed)):
            row |= {
                f"{name}: first hit": hits.first,
                f"{name}: validation before": hits.before,
                f"{name}: that one's last step": hits.reference_last,
                f"{name}: last step / first hit": hits.by_last,
                f"{name}: first hit / first hit": hits.by_first,
            }
        rows.append(row)
    hidden = [heading for row in rows for heading in row if heading.startswith(("raw:", "mean of"))]
    rows = [{heading: row.get(heading) for of in rows for heading in of} for row in rows]
    foot = [
        "Target: the other method's accuracy at its last validation. A first hit is the first validation at the target "
        f"or above, of each seed's own curve, known as far as validations are apart: 325–350. Smoothed: trailing "
        f"mean{'' if smooth else ' of three validations'}. Steps are means over the seeds that reached, ratios "
        "geometric means with Student's t interval of their logarithm.",
        "Last step / first hit is the paper's count (its 1000 / 375). It flatters whoever reaches a plateau, since the "
        "other too was at its own final accuracy before its last step: first hit / first hit does not.",
        *paper.sources(used, ("first_hit", "speed_up")),
    ]
    return _table("speedup", rows, foot, hidden, digits_of={"first hit / first hit": 2})


def _first(hits: SpeedUp) -> str:
    if hits.first is not None:
        return bracket(hits.before, hits.first, hits.late)
    if not hits.pairs:
        return ""
    return "not reached" if hits.waiting is None else f"not yet (step {hits.waiting})"


def _papers_first_hit(group: Group, other: Group) -> Cell:
    """ "375 (2.67×) [paper, Fig. 2]": when VL Norm reaches DAPO's final accuracy, and the paper's count of it."""
    hit, ratio = (paper.known(*group, metric) for metric in ("first_hit", "speed_up"))
    if hit is None or ratio is None or other[1] != "dapo":
        return None
    return f"{hit.value} ({ratio.value}×) [{hit.label}]"


def inputs(runs: Sequence[Run]) -> Table:
    """Each run that was read, with what was odd."""
    left_out = doubles(runs)
    rows: list[list[Cell]] = []
    for run in runs:
        last = str(int(run.steps[-1])) if len(run.steps) else "none"
        planned = f" of {run.planned_steps}" if run.planned_steps else ""
        double = any(run is other for other in left_out) and len(run.steps)
        notes = dict.fromkeys([*run.notes, *(["another run has the same seed: left out"] if double else [])])
        what: list[Cell] = [run.name, str(run.folder), " ".join(filter(None, run.setting)) or "unknown"]
        what += [run.method_key, None if run.seed == UNKNOWN_SEED else run.seed]
        rows.append([*what, f"{last}{planned}", len(measures.validated_steps(run)), "; ".join(notes)])
    columns = ["run", "folder", "setting", "method", "seed", "last step", "validations", "notes"]
    return Table("inputs", TITLES["inputs"], columns, rows, hidden=("folder",))
