"""The paper's tables from runs: CountDown, Math, α, full DAPO, speed-up; `runs` for others, `inputs` for what was read.

A run belongs to the table that its recipe's family and task say, whatever its folder is called. Each table says in its
foot how its columns are defined and which of its rows cannot be compared as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from vlnorm_verl.methods import alpha_of, label_of
from vlnorm_verl.report import feet, measures, paper
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.first_hit import SpeedUp, smoothing, speed_up
from vlnorm_verl.report.groups import Group, Groups, doubles, grouped, only, ordered, reference, where, with_validation
from vlnorm_verl.report.identity import UNKNOWN_SEED, Setting
from vlnorm_verl.report.run import Run
from vlnorm_verl.report.table import Cell, Table

Row = dict[str, Cell]  # heading -> cell; the rows of a table have the same headings

TITLES = {
    "countdown": "CountDown, aggregations",
    "math": "Math, aggregations",
    "alpha": "VL Norm's α",
    "dapo": "Full DAPO",
    "speedup": "Steps to another method's final accuracy",
    "runs": "Runs outside of the paper's settings",
    "inputs": "What was read",
}
MATH_SETS = {"aime2024": "AIME2024", "amc": "AMC", "math500": "MATH500", "minerva": "Minerva"}
RATIOS = ("last step / first hit", "first hit / first hit")
# What paper.yaml has behind a table's accuracy, difference and Pass@8: metric, heading.
OF_PAPER: dict[str, tuple[tuple[str, str] | None, ...]] = {
    "countdown": (("avg@8", "paper's Avg@8"), None, ("pass@8", "paper's Pass@8")),
    "dapo": (("accuracy", "paper's accuracy"), ("vl_norm_minus_this", f"paper's {feet.DIFFERENCE}"), None),
    "runs": (None, None, None),
}


def tables(runs: Sequence[Run], smooth: int | None = None, baseline: str = "") -> list[Table]:
    """Every table that there are runs for, `inputs` last; of the others without the columns that are empty.

    smooth: steps of the speed-up's trailing mean, see `first_hit.smoothing`.
    baseline: the method that others are compared with, instead of VL Norm.
    """
    groups = ordered({group: seeds for group, seeds in grouped(runs).items() if with_validation(seeds)})
    # The paper's tables are of verl's accuracy.
    other_metric = any(run.metric for run in runs)
    of_paper = where(groups, lambda setting, _: paper.has(setting) and not other_metric)
    made = [
        _comparison("countdown", where(of_paper, lambda setting, key: _is_main(setting, key, "countdown")), baseline),
        _math(where(of_paper, lambda setting, key: _is_main(setting, key, "math")), baseline),
        _alpha(where(of_paper, lambda setting, _: setting.family == "aggregation")),
        _comparison("dapo", where(of_paper, lambda setting, _: setting.family == "dapo"), baseline),
        _speed_up(groups, smooth, baseline),
        _comparison("runs", where(groups, lambda setting, key: (setting, key) not in of_paper), baseline),
    ]
    return [table for table in made if table is not None] + [inputs(runs)]


def missing(made: Sequence[Table]) -> list[str]:
    """Which of the paper's tables have no run, as sentences."""
    have = {table.name for table in made}
    return [
        f"No runs for the table {TITLES[name]!r}: vlnorm-verl reproduce {name} makes them."
        for name in ("countdown", "math", "alpha", "dapo")
        if name not in have
    ]


def _table(name: str, rows: list[Row], foot: list[str]) -> Table:
    """Without the columns in which no row says anything."""

    def says(cell: Cell) -> bool:
        if isinstance(cell, Estimate):
            return bool(cell.note) or not isnan(cell.value)
        return cell not in (None, "")

    columns = [heading for heading in rows[0] if any(says(row[heading]) for row in rows)]
    cells = [[row[heading] for heading in columns] for row in rows]
    return Table(name, TITLES[name], columns, cells, foot, digits_of=dict.fromkeys(RATIOS, 2))


# -------------------------------------------------------------------------------------------------- which runs where


def _is_main(setting: Setting, method_key: str, task: str) -> bool:
    """Whether a row of the paper's table of a task: one of the aggregations, VL Norm with the task's α."""
    of_table = setting.family == "aggregation" and setting.task == task
    return of_table and alpha_of(method_key) in (None, paper.alpha(task))


# ------------------------------------------------------------------------------------------------------------ cells


def _place(setting: Setting) -> Row:
    return {"task": setting.task, "model": setting.model, "length": setting.length}


def _ending(runs: Sequence[Run]) -> Row:
    """What every row of accuracies ends with. Seeds are "1 of 2" if not all are as far as the one that is furthest."""
    used = len(measures.final_runs(runs))
    return {
        "monotonicity": measures.monotonicity(runs),
        "seeds": used if used == len(runs) else f"{used} of {len(runs)}",
        "step": feet.step_of(runs),
    }


def _difference(groups: Groups, group: Group, baseline: str = "") -> Cell:
    """VL Norm minus this, or this minus the baseline."""
    other = reference(groups, group[0], baseline)
    if other is None or other == group:
        return None
    minuend, subtrahend = (group, other) if baseline else (other, group)
    return measures.difference(with_validation(groups[minuend]), with_validation(groups[subtrahend]))


# ----------------------------------------------------------------------------------------------------------- tables


def _comparison(name: str, groups: Groups, baseline: str) -> Table | None:
    """Rows model × length × method, but for CountDown with their task; with what the paper has."""
    rows: list[Row] = []
    for group, all_runs in groups.items():
        (setting, method_key), runs = group, with_validation(all_runs)
        row: Row = {} if name == "countdown" else {"task": setting.task}
        row |= {"model": setting.model, "length": setting.length, "method": label_of(method_key, setting.family)}
        measured: Row = {
            feet.accuracy_heading(groups): measures.final_accuracy(runs),
            feet.difference_heading(baseline): _difference(groups, group, baseline),
            "Pass@8": measures.final_pass(runs),
        }
        for (heading, value), of_paper in zip(measured.items(), OF_PAPER[name], strict=True):
            row[heading] = value
            if of_paper is not None:
                row[of_paper[1]] = paper.cell(setting, method_key, of_paper[0])
        rows.append(row | {"verl's best@8": measures.own_best(runs)} | _ending(runs))
    if not rows:
        return None
    foot = [feet.on_accuracy(groups), *feet.on_difference(groups, baseline), feet.PASS, feet.MONOTONICITY]
    if any(len(measures.validation_sets(runs)) > 1 for runs in groups.values()):
        foot.append(feet.WEIGHTED)
    foot += [*feet.caveats(groups), *paper.sources(groups, [of[0] for of in OF_PAPER[name] if of is not None])]
    foot += paper.remarks(groups) if name == "countdown" else []
    return _table(name, rows, [*foot, *feet.on_other_accuracies(groups)])


def _math(groups: Groups, baseline: str) -> Table | None:
    names = {name for runs in groups.values() for name in measures.validation_sets(runs)}
    rows: list[Row] = []
    for group, all_runs in groups.items():
        (setting, method_key), runs = group, with_validation(all_runs)
        row: Row = {"model": setting.model, "length": setting.length, "method": label_of(method_key, setting.family)}
        for name in (*MATH_SETS, *sorted(names - MATH_SETS.keys())):
            row[MATH_SETS.get(name, name)] = measures.final_accuracy(runs, name)
        row[f"weighted {feet.accuracy_heading(groups)}"] = measures.final_accuracy(runs)
        row["paper's weighted Avg@8"] = paper.cell(setting, method_key, "avg@8")
        row[feet.difference_heading(baseline)] = _difference(groups, group, baseline)
        row["weighted Pass@8"] = measures.final_pass(runs)
        rows.append(row | {"verl's best@8": measures.own_best(runs)} | _ending(runs))
    if not rows:
        return None
    foot = [feet.ACCURACY, feet.WEIGHTED, *feet.on_difference(groups, baseline), feet.PASS, feet.MONOTONICITY]
    if any(
        len(measures.set_sizes(run)) < len(measures.validation_sets([run]))
        for seeds in groups.values()
        for run in seeds
    ):
        foot.append(
            "Where no dump that can be used says which validation set a response is of, each set's number is verl's "
            "own, without an interval over problems, and there is no weighted average."
        )
    foot += [*feet.caveats(groups), *paper.sources(groups, ("avg@8",)), *paper.remarks(groups)]
    return _table("math", rows, [*foot, *feet.on_other_accuracies(groups)])


def _alpha(groups: Groups) -> Table | None:
    """VL Norm in the settings that have it with another α than the task's, or with several."""
    ours = where(groups, lambda _, method_key: alpha_of(method_key) is not None)
    chosen: Groups = {}
    for setting in dict.fromkeys(setting for setting, _ in ours):
        of_setting = only(ours, setting)
        if {alpha_of(key) for _, key in of_setting} != {paper.alpha(setting.task)}:
            chosen |= of_setting
    rows: list[Row] = []
    for (setting, method_key), all_runs in chosen.items():
        runs = with_validation(all_runs)
        row = _place(setting) | {
            "α": f"{alpha_of(method_key):g}",
            feet.accuracy_heading(chosen): measures.final_accuracy(runs),
        }
        row["paper's Avg@8"] = paper.cell(setting, method_key, "avg@8")
        row["task's α minus this"] = _difference(chosen, (setting, method_key))
        row["Pass@8"] = measures.final_pass(runs)
        rows.append(row | _ending(runs))
    if not rows:
        return None
    alphas = ", ".join(f"{task} {paper.alpha(task):g}" for task in ("countdown", "math"))
    foot = [
        feet.ACCURACY,
        f"Task's α minus this: paired as in the other tables, against the α that the paper's scripts have ({alphas}). "
        "Which values of α the paper tried was not found; these are ours.",
        feet.PASS,
        feet.MONOTONICITY,
    ]
    foot += [*feet.caveats(chosen), *paper.sources(chosen, ("avg@8",)), *feet.on_other_accuracies(chosen)]
    return _table("alpha", rows, foot)


def _speed_up(groups: Groups, smooth: int | None, baseline: str) -> Table | None:
    """VL Norm against each other method of its setting, and each of those against VL Norm; raw and smoothed.

    With a baseline, each other method against it, and the reverse.
    """
    pairs: list[tuple[Group, Group]] = []
    for setting in dict.fromkeys(setting for setting, _ in groups):
        if main := reference(groups, setting, baseline):
            others = [other for other in only(groups, setting) if other != main]
            pairs += [(other, main) if baseline else (main, other) for other in others]
    pairs += [(other, group) for group, other in pairs]
    rows: list[Row] = []
    used: Groups = {}
    for group, other in pairs:
        smoothed = smoothing((run for runs in only(groups, group[0]).values() for run in runs), smooth)
        for window in dict.fromkeys((1, smoothed)):
            hits = speed_up(with_validation(groups[group]), with_validation(groups[other]), window)
            if hits is not None:
                used |= {group: groups[group], other: groups[other]}
                rows.append(_speed_up_row(group, other, window, hits))
    if not rows:
        return None
    foot = [
        "Target: the reference's accuracy at its last validation; of a smoothed curve, of its trailing mean over as "
        f"many steps as it says{'' if smooth else ' (three validations)'}. First hit: the first validation at the "
        "target or above, of a run's own curve; both methods are treated alike. Steps are means over seeds, ratios "
        "geometric means over seeds with Student's t interval of their logarithm; no interval where a seed did not "
        "reach. All of a row is of the seeds that reached; where none did, target and the reference's steps are of all "
        "that can be compared.",
        "Last step / first hit is the paper's count (its 1000 / 375). It flatters whoever reaches a plateau, since the "
        "reference too had reached its own final accuracy before its last step: first hit / first hit does not.",
        "Steps are those with a validation, so a first hit is known to one validation's distance. In a log whose "
        "beginning is lost it is at or before a step, and there is no ratio.",
        *feet.caveats(used),
        *paper.sources(used, ("first_hit", "speed_up")),
        *feet.on_other_accuracies(used),
    ]
    return _table("speedup", rows, foot)


def _speed_up_row(group: Group, other: Group, window: int, hits: SpeedUp) -> Row:
    setting, method_key = group
    instead: Cell = None
    if hits.pairs and hits.first is None:
        instead = "not reached" if hits.waiting is None else f"not yet (step {hits.waiting})"
    return _place(setting) | {
        "method": label_of(method_key, setting.family),
        "reaches the final accuracy of": label_of(other[1], setting.family),
        "curve": "raw" if window == 1 else f"mean of {window} steps",
        "target": Estimate(hits.target, note=hits.note),
        "its last step": _mean_step(hits.reference_last),
        "its own first hit": _mean_step(hits.reference_first, hits.reference_late),
        "first hit": _mean_step(hits.first, hits.late) or instead,
        "paper's first hit": _papers_first_hit(group, other),
        RATIOS[0]: hits.by_last or instead,
        RATIOS[1]: hits.by_first or instead,
        "seeds reached": f"{hits.reached} of {hits.pairs}",
    }


def _mean_step(step: float | None, at_or_before: bool = False) -> Cell:
    return None if step is None or isnan(step) else f"{'at or before ' if at_or_before else ''}{step:.6g}"


def _papers_first_hit(group: Group, other: Group) -> Cell:
    """ "375 (2.67×) [paper, Fig. 2]": when VL Norm reaches DAPO's final accuracy, and the paper's count of it."""
    hit, ratio = (paper.known(*group, metric) for metric in ("first_hit", "speed_up"))
    if hit is None or ratio is None or other[1] != "dapo":
        return paper.NOT_FOUND if paper.covers(group[0]) else None
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
    return Table("inputs", TITLES["inputs"], columns, rows)
