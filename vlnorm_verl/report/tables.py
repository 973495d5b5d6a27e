"""The paper's tables from runs: CountDown, Math, α, full DAPO, speed-up; `runs` for others, `inputs` for what was read.

A run belongs to the table that its recipe's family and task say, whatever its folder is called. Each table says in its
foot how its columns are defined and which of its rows cannot be compared as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isnan

from vlnorm_verl.report import measures, paper
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.measures import Group
from vlnorm_verl.report.output import Cell, Table, method_label
from vlnorm_verl.report.runs import VALIDATION_METRIC, Run, Setting

Groups = dict[Group, list[Run]]

TITLES = {
    "countdown": "CountDown, aggregations",
    "math": "Math, aggregations",
    "alpha": "VL Norm's α",
    "dapo": "Full DAPO",
    "speedup": "Steps to another method's final accuracy",
}
METHODS = (
    "grpo_norm",
    "dapo_norm",
    "dr_grpo_norm",
    "dr_grpo",
    "dapo",
    "overlong_filtering",
    "soft_punishment",
    "vl_norm",
)
MATH_SETS = {"aime2024": "AIME2024", "amc": "AMC", "math500": "MATH500", "minerva": "Minerva"}
DIFFERENCE = "VL Norm minus this"
RATIOS = ("last step / first hit", "first hit / first hit")

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


def tables(runs: Sequence[Run], smooth: int | None = None, baseline: str = "") -> list[Table]:
    """Every table that there are runs for, `inputs` last; of the others without the columns that are empty.

    smooth: steps of the speed-up's trailing mean, see `measures.smoothing`.
    baseline: the method that others are compared with, instead of VL Norm.
    """
    groups = _ordered({group: found for group, found in measures.grouped(runs).items() if _validated(found)})
    # The paper's tables are of verl's accuracy.
    of_paper = {g: r for g, r in groups.items() if paper.has(g[0]) and not any(run.metric for run in r)}
    others = {g: r for g, r in groups.items() if g not in of_paper}
    made = [
        _comparison("countdown", {g: r for g, r in of_paper.items() if _is_main(g, "countdown")}, baseline),
        _math({g: r for g, r in of_paper.items() if _is_main(g, "math")}, baseline),
        _alpha(of_paper),
        _comparison("dapo", {g: r for g, r in of_paper.items() if g[0].family == "dapo"}, baseline, with_task=True),
        _speed_up(groups, smooth, baseline),
        _comparison("runs", others, baseline, with_task=True),
    ]
    return [_without_empty(table) for table in made if table is not None] + [inputs(runs)]


def missing(made: Sequence[Table]) -> list[str]:
    """Which of the paper's tables have no run, as sentences."""
    have = {table.name for table in made}
    return [
        f"No runs for the table {TITLES[name]!r}: vlnorm-verl reproduce {name} makes them."
        for name in ("countdown", "math", "alpha", "dapo")
        if name not in have
    ]


def _without_empty(table: Table) -> Table:
    """Without the columns in which no row says anything."""

    def says(cell: Cell) -> bool:
        if isinstance(cell, Estimate):
            return bool(cell.note) or not isnan(cell.value)
        return cell not in (None, "")

    kept = [i for i in range(len(table.columns)) if any(says(row[i]) for row in table.rows)]
    return replace(table, columns=[table.columns[i] for i in kept], rows=[[row[i] for i in kept] for row in table.rows])


# -------------------------------------------------------------------------------------------------- which runs where


def _validated(runs: Sequence[Run]) -> bool:
    return any(measures.validated_steps(run) for run in runs)


def _alpha_of(group: Group) -> float | None:
    return measures.alpha_of(group[1])


def _is_main(group: Group, task: str) -> bool:
    """Whether a row of the paper's table of a task: one of the five aggregations, VL Norm with the task's α."""
    own = group[0].family == "aggregation" and group[0].task == task
    return own and _alpha_of(group) in (None, paper.alpha(task))


def _ordered(groups: Groups) -> Groups:
    def key(group: Group) -> tuple[object, ...]:
        setting, method_key = group
        method = method_key.partition(":")[0]
        place = METHODS.index(method) if method in METHODS else len(METHODS)
        length = (0, int(setting.length), "") if setting.length.isdigit() else (1, 0, setting.length)
        return (
            setting.scale == "cpu", setting.family, setting.task, setting.model, length, place, _alpha_of(group) or 0.0,
            method_key,
        )  # fmt: skip

    return {group: groups[group] for group in sorted(groups, key=key)}


def reference(groups: Groups, setting: Setting, baseline: str = "") -> Group | None:
    """What the others of a setting are compared with."""
    key = measures.compared_with(setting, [key for of, key in groups if of == setting], baseline)
    return None if key is None else (setting, key)


# ------------------------------------------------------------------------------------------------------------ cells


def _model(setting: Setting) -> str:
    return f"tiny ({setting.model})" if setting.scale == "cpu" and paper.has(setting) else setting.model


def _length(setting: Setting) -> str:
    return f"tiny ({setting.length})" if setting.scale == "cpu" and paper.has(setting) else setting.length


def _label(group: Group) -> str:
    return method_label(group[1], group[0].family)


def _seeds(runs: Sequence[Run]) -> Cell:
    """How many there are; "1 of 2" if not all are as far as the one that is furthest."""
    there, used = len(_with_validation(runs)), len(measures.final_runs(runs))
    return there if used == there else f"{used} of {there}"


def _step(runs: Sequence[Run]) -> str:
    """ "1000", "450 of 1000"; of the last validation."""
    step = measures.final_step(runs) or 0
    planned = max((run.planned_steps or 0 for run in runs), default=0)
    return str(step) if step >= planned else f"{step} of {planned}"


def _difference(groups: Groups, group: Group, baseline: str = "") -> Cell:
    """VL Norm minus this, or this minus the baseline."""
    other = reference(groups, group[0], baseline)
    if other is None or other == group:
        return None
    one, other = (group, other) if baseline else (other, group)
    return measures.difference(_with_validation(groups[one]), _with_validation(groups[other]))


def _difference_heading(baseline: str) -> str:
    return f"this minus {method_label(baseline)}" if baseline else DIFFERENCE


def _paired(groups: Groups, baseline: str) -> list[str]:
    """The foot's sentence on the difference, or on why several methods have none."""
    references = {group: reference(groups, group[0], baseline) for group in groups}
    if any(other not in (None, group) for group, other in references.items()):
        better = "this" if baseline else "VL Norm"
        return [f"{_difference_heading(baseline)}: positive where {better} is better; {PAIRED}"]
    if len(groups) == 1 or any(references.values()):
        return []
    if baseline:
        return [f"No differences: {method_label(baseline)} was not run here."]
    return ["No VL Norm here that the others could be compared with: --baseline METHOD names another method."]


def _with_validation(runs: Sequence[Run]) -> list[Run]:
    """A run that has just begun says nothing of its final accuracy."""
    return [run for run in runs if measures.validated_steps(run)]


def _average(groups: Groups) -> str:
    """The accuracies' heading."""
    return measures.accuracy_name([run for runs in groups.values() for run in runs])


def _accuracy(groups: Groups) -> str:
    """The foot's sentence on the accuracies."""
    metric = next((run.metric for runs in groups.values() for run in runs), "")
    return f"{metric}: as it was logged. {ACCURACY.partition(': ')[2]}" if metric == _average(groups) else ACCURACY


def _caveats(groups: Groups) -> list[str]:
    """What a reader has to know before comparing the rows."""
    feet = []
    runs = [run for found in groups.values() for run in found]
    unfinished = [
        f"{run.name} ({_step([run])})" for run in runs if measures.validated_steps(run) and measures.unfinished(run)
    ]
    if unfinished:
        feet.append(f"Not finished: {', '.join(unfinished)}.")
    ended = [
        f"{run.name} (from step {step} on)"
        for run in runs
        for key, step in run.ended.items()
        if key == run.metric or (not run.metric and VALIDATION_METRIC.fullmatch(key))
    ]
    if ended:
        feet.append(f"Accuracy is not a number any more: {', '.join(ended)}.")
    waiting = [run.name for run in runs if not measures.validated_steps(run)]
    if waiting:
        feet.append(f"Without a validation, left out: {', '.join(waiting)}.")
    behind = [
        f"{run.name} (step {max(steps)})"
        for found in groups.values()
        for run in found
        if (steps := measures.validated_steps(run)) and max(steps) < (measures.final_step(found) or 0)
    ]
    if behind:
        feet.append(f"Not as far as another seed of its row, so not in the row's values: {', '.join(behind)}.")
    for setting in dict.fromkeys(setting for setting, _ in groups):
        at = {step for found in _only(groups, setting).values() if (step := measures.final_step(found)) is not None}
        if len(at) > 1:
            where = ", ".join(filter(None, (_model(setting), _length(setting))))
            feet.append(
                f"{where or 'These runs'}: rows stand at different steps ({', '.join(map(str, sorted(at)))}); a "
                "difference is at the last step that both have."
            )
    if any(group[0].scale == "cpu" and paper.has(group[0]) for group in groups):
        feet.append(
            "Rows of the tiny model were trained on a CPU on a task of their own with this recipe's method; they are "
            "not comparable with the paper's."
        )
    if any(group[0].scale != "cpu" and paper.has(group[0]) for group in groups):
        feet.append(
            "The paper's values are of arXiv 2509.07558; the label says where each was read, “not found” that it could "
            "not be."
        )
    return feet


def _only(groups: Groups, setting: Setting) -> Groups:
    return {group: runs for group, runs in groups.items() if group[0] == setting}


# ----------------------------------------------------------------------------------------------------------- tables


def _comparison(name: str, groups: Groups, baseline: str, with_task: bool = False) -> Table | None:
    """Rows model × length × method with what the paper has for CountDown; `with_task`: and the task."""
    if not groups:
        return None
    of_paper = {"countdown": ("avg@8", "", "pass@8"), "dapo": ("accuracy", "vl_norm_minus_this", "")}.get(
        name, ("",) * 3
    )
    headings = {"avg@8": "paper's Avg@8", "pass@8": "paper's Pass@8", "accuracy": "paper's accuracy"}
    headings["vl_norm_minus_this"] = f"paper's {DIFFERENCE}"
    difference = _difference_heading(baseline)
    columns = [*(["task"] if with_task else []), "model", "length", "method"]
    for measured, known in zip((_average(groups), difference, "Pass@8"), of_paper, strict=True):
        columns += [measured, headings[known]] if known else [measured]
    columns += ["verl's best@8", "monotonicity", "seeds", "step"]
    rows: list[list[Cell]] = []
    for group, all_runs in groups.items():
        setting, runs = group[0], _with_validation(all_runs)
        row: list[Cell] = [setting.task] if with_task else []
        row += [_model(setting), _length(setting), _label(group)]
        values: list[Cell] = [measures.final_accuracy(runs), _difference(groups, group, baseline)]
        values.append(measures.final_pass(runs))
        for value, known in zip(values, of_paper, strict=True):
            row += [value, paper.cell(setting, group[1], known)] if known else [value]
        rows.append([*row, measures.own_best(runs), measures.monotonicity(runs), _seeds(runs), _step(runs)])
    feet = [_accuracy(groups), *_paired(groups, baseline), PASS, MONOTONICITY]
    if any(len(measures.validation_sets(runs)) > 1 for runs in groups.values()):
        feet.append(WEIGHTED)
    feet += [*_caveats(groups), *paper.sources(groups, of_paper)]
    feet += paper.remarks(groups) if name == "countdown" else []
    title = TITLES.get(name, "Runs outside of the paper's settings")
    return Table(name, title, columns, rows, [*feet, *_other_accuracies(groups)])


def _other_accuracies(groups: Groups) -> list[str]:
    """A sentence where a run's accuracies are not means of eight responses' `acc`."""
    found = []
    for run in (run for runs in groups.values() for run in _with_validation(runs)):
        variables, counts = measures.accuracies_of([run])
        if counts <= {0}:
            continue
        if variables - {"acc"} or counts != {measures.K}:
            what = f" of {', '.join(sorted(variables))}" if variables - {"acc"} else ""
            found.append(f"{run.name}: mean@{', '.join(map(str, sorted(counts)))}{what}")
    if not found:
        return []
    return [f"Not Avg@8 of verl's acc: {'; '.join(found)}. Pass@8 is over the problems that have eight responses."]


def _math(groups: Groups, baseline: str) -> Table | None:
    if not groups:
        return None
    found = {name for runs in groups.values() for name in measures.validation_sets(runs)}
    names = [*MATH_SETS, *sorted(found - MATH_SETS.keys())]
    columns = ["model", "length", "method", *(MATH_SETS.get(name, name) for name in names)]
    columns += [f"weighted {_average(groups)}", "paper's weighted Avg@8", _difference_heading(baseline)]
    columns += ["weighted Pass@8", "verl's best@8", "monotonicity", "seeds", "step"]
    rows: list[list[Cell]] = []
    for group, all_runs in groups.items():
        setting, runs = group[0], _with_validation(all_runs)
        row: list[Cell] = [_model(setting), _length(setting), _label(group)]
        row += [measures.final_accuracy(runs, name) for name in names]
        row += [measures.final_accuracy(runs), paper.cell(setting, group[1], "avg@8")]
        row += [_difference(groups, group, baseline), measures.final_pass(runs)]
        row += [measures.own_best(runs), measures.monotonicity(runs)]
        rows.append([*row, _seeds(runs), _step(runs)])
    feet = [ACCURACY, WEIGHTED, *_paired(groups, baseline), PASS, MONOTONICITY]
    if any(len(measures.set_sizes(run)) < len(measures.validation_sets([run])) for g in groups.values() for run in g):
        feet.append(
            "Where no dump that can be used says which validation set a response is of, each set's number is verl's "
            "own, without an interval over problems, and there is no weighted average."
        )
    feet += [*_caveats(groups), *paper.sources(groups, ("avg@8",)), *paper.remarks(groups)]
    return Table("math", TITLES["math"], columns, rows, [*feet, *_other_accuracies(groups)])


def _alpha(groups: Groups) -> Table | None:
    """VL Norm in the settings that have it with another α than the task's, or with several."""
    own = {
        g: r for g, r in groups.items() if g[0].family == "aggregation" and paper.has(g[0]) and _alpha_of(g) is not None
    }
    chosen: Groups = {}
    for setting in dict.fromkeys(setting for setting, _ in own):
        of_setting = _only(own, setting)
        if {_alpha_of(group) for group in of_setting} != {paper.alpha(setting.task)}:
            chosen |= of_setting
    if not chosen:
        return None
    columns = ["task", "model", "length", "α", _average(chosen), "paper's Avg@8", "task's α minus this", "Pass@8"]
    rows: list[list[Cell]] = []
    for group, all_runs in chosen.items():
        setting, runs = group[0], _with_validation(all_runs)
        rows.append(
            [
                setting.task, _model(setting), _length(setting), f"{_alpha_of(group):g}", measures.final_accuracy(runs),
                paper.cell(setting, group[1], "avg@8"), _difference(chosen, group), measures.final_pass(runs),
                measures.monotonicity(runs), _seeds(runs), _step(runs),
            ]
        )  # fmt: skip
    alphas = ", ".join(f"{task} {paper.alpha(task):g}" for task in ("countdown", "math"))
    feet = [
        ACCURACY,
        f"Task's α minus this: paired as in the other tables, against the α that the paper's scripts have ({alphas}). "
        "Which values of α the paper tried was not found; these are ours.",
        PASS,
        MONOTONICITY,
    ]
    feet += [*_caveats(chosen), *paper.sources(chosen, ("avg@8",)), *_other_accuracies(chosen)]
    return Table("alpha", TITLES["alpha"], [*columns, "monotonicity", "seeds", "step"], rows, feet)


def _speed_up(groups: Groups, smooth: int | None, baseline: str) -> Table | None:
    """VL Norm against each other method of its setting, and each of those against VL Norm; raw and smoothed.

    With a baseline, each other method against it, and the reverse.
    """
    columns = ["task", "model", "length", "method", "reaches the final accuracy of", "curve", "target"]
    columns += ["its last step", "its own first hit", "first hit", "paper's first hit", *RATIOS, "seeds reached"]
    pairs: list[tuple[Group, Group]] = []
    for setting in dict.fromkeys(setting for setting, _ in groups):
        if main := reference(groups, setting, baseline):
            others = [other for other in _only(groups, setting) if other != main]
            pairs += [(other, main) if baseline else (main, other) for other in others]
    pairs += [(other, one) for one, other in pairs]
    rows: list[list[Cell]] = []
    used: Groups = {}
    for one, other in pairs:
        smoothed = measures.smoothing((run for runs in _only(groups, one[0]).values() for run in runs), smooth)
        for window in dict.fromkeys((1, smoothed)):
            found = measures.speed_up(_with_validation(groups[one]), _with_validation(groups[other]), window)
            if found is not None:
                used |= {one: groups[one], other: groups[other]}
                rows.append(_speed_up_row(one, other, window, found))
    if not rows:
        return None
    feet = [
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
        *_caveats(used),
        *paper.sources(used, ("first_hit", "speed_up")),
        *_other_accuracies(used),
    ]
    return Table("speedup", TITLES["speedup"], columns, rows, feet, digits_of=dict.fromkeys(RATIOS, 2))


def _speed_up_row(one: Group, other: Group, window: int, found: measures.SpeedUp) -> list[Cell]:
    setting = one[0]
    if not found.pairs or found.first is not None:
        instead: Cell = None
    else:
        instead = "not reached" if found.waiting is None else f"not yet (step {found.waiting})"
    return [
        setting.task, _model(setting), _length(setting), _label(one), _label(other),
        "raw" if window == 1 else f"mean of {window} steps", Estimate(found.target, note=found.note),
        _mean_step(found.reference_last), _mean_step(found.reference_first, found.reference_late),
        _mean_step(found.first, found.late) or instead, _papers_first_hit(one, other),
        found.by_last or instead, found.by_first or instead, f"{found.reached} of {found.pairs}",
    ]  # fmt: skip


def _mean_step(step: float | None, at_or_before: bool = False) -> Cell:
    return None if step is None or isnan(step) else f"{'at or before ' if at_or_before else ''}{step:.6g}"


def _papers_first_hit(one: Group, other: Group) -> str:
    """ "375 (2.67×) [paper, Fig. 2]": when VL Norm reaches DAPO's final accuracy, and the paper's count of it."""
    if not paper.has(one[0]):
        return ""
    hit, ratio = (paper.known(*one, metric) for metric in ("first_hit", "speed_up"))
    if one[0].scale == "cpu" or hit is None or ratio is None or other[1] != "dapo":
        return paper.TINY if one[0].scale == "cpu" else paper.NOT_FOUND
    return f"{hit.value} ({ratio.value}×) [{hit.label}]"


def inputs(runs: Sequence[Run]) -> Table:
    """Each run that was read, with what was odd."""
    left_out = {id(run) for run in measures.doubles(runs)}
    rows: list[list[Cell]] = []
    for run in runs:
        last = str(int(run.steps[-1])) if len(run.steps) else "none"
        planned = f" of {run.planned_steps}" if run.planned_steps else ""
        double = id(run) in left_out and len(run.steps)
        notes = [*run.notes, *(["another run has the same seed: left out"] if double else [])]
        setting = " ".join(filter(None, run.setting)) or "unknown"
        rows.append(
            [
                run.name, str(run.folder), setting, run.method_key, None if run.seed < 0 else run.seed,
                f"{last}{planned}", len(measures.validated_steps(run)), "; ".join(dict.fromkeys(notes)),
            ]
        )  # fmt: skip
    columns = ["run", "folder", "setting", "method", "seed", "last step", "validations", "notes"]
    return Table("inputs", "What was read", columns, rows, [])
