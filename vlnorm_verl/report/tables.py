"""The paper's tables from runs: CountDown, Math, α, full DAPO, speed-up; `runs` for others, `inputs` for what was read.

A run belongs to the table that its recipe's family and task say, whatever its folder is called. Each table says in its
foot how its columns are defined and which of its rows cannot be compared as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlnorm_verl.report import measures, paper
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.measures import Group
from vlnorm_verl.report.output import Cell, Table, method_label
from vlnorm_verl.report.runs import Run, Setting

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

ACCURACY = (
    "Avg@8: share of correct responses, mean over problems, at a run's last validation. Brackets: 95% interval, over "
    "problems (a problem's responses stay together) and, where there are several, over seeds; with one seed it holds "
    "for that training run only."
)
PAIRED = (
    f"{DIFFERENCE}: positive where VL Norm is better; 95% interval of the paired difference (same problems; same seeds "
    "where both have them)."
)
PASS = (
    "Pass@8: 1 − C(n−c, 8)/C(n, 8), unbiased, mean over problems. verl's best@8: a bootstrap with replacement, which "
    "lies below it."
)
MONOTONICITY = (
    "Monotonicity: Kendall's τ-b between step and accuracy over a run's validations. This definition is ours; the "
    "paper's was not found."
)
WEIGHTED = "Weighted: over the validation sets by their number of problems; its interval resamples within each set."


def tables(runs: Sequence[Run], smooth: int) -> list[Table]:
    """Every table that there are runs for, `inputs` last. smooth: validations in the speed-up's trailing mean."""
    groups = _ordered({group: found for group, found in measures.grouped(runs).items() if _validated(found)})
    made = [
        _comparison("countdown", {g: r for g, r in groups.items() if _is_main(g, "countdown")}),
        _math({g: r for g, r in groups.items() if _is_main(g, "math")}),
        _alpha(groups),
        _comparison("dapo", {g: r for g, r in groups.items() if g[0].family == "dapo"}, with_task=True),
        _speed_up(groups, smooth),
        _comparison("runs", {g: r for g, r in groups.items() if not _in_paper(g[0])}, with_task=True),
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


# -------------------------------------------------------------------------------------------------- which runs where


def _validated(runs: Sequence[Run]) -> bool:
    return any(measures.validated_steps(run) for run in runs)


def _in_paper(setting: Setting) -> bool:
    return setting.family in ("aggregation", "dapo") and setting.task in ("countdown", "math")


def _alpha_of(group: Group) -> float | None:
    method, _, number = group[1].partition(":")
    return float(number) if method == "vl_norm" and number else None


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


def reference(groups: Groups, setting: Setting) -> Group | None:
    """VL Norm in a setting: with the task's α; on other tasks with α = 1 if there is one, else with the largest."""
    found = {alpha: group for group in groups if group[0] == setting and (alpha := _alpha_of(group)) is not None}
    own = paper.alpha(setting.task) if _in_paper(setting) else 1.0
    if own in found:
        return found[own]
    return None if _in_paper(setting) or not found else found[max(found)]


# ------------------------------------------------------------------------------------------------------------ cells


def _model(setting: Setting) -> str:
    return f"tiny, recipe of {setting.model}" if setting.scale == "cpu" and _in_paper(setting) else setting.model


def _length(setting: Setting) -> str:
    return f"tiny, recipe of {setting.length}" if setting.scale == "cpu" and _in_paper(setting) else setting.length


def _label(group: Group) -> str:
    return method_label(group[1], group[0].family)


def _seeds(runs: Sequence[Run]) -> int:
    return sum(bool(measures.validated_steps(run)) for run in runs)


def _step(runs: Sequence[Run]) -> str:
    """ "1000", "450 of 1000", "400–450 of 1000"; of the last validations."""
    steps = measures.final_steps(runs)
    low, high = min(steps), max(steps)
    text = str(high) if low == high else f"{low}–{high}"
    planned = max((run.planned_steps or 0 for run in runs), default=0)
    return text if low >= planned else f"{text} of {planned}"


def _difference(groups: Groups, group: Group) -> Cell:
    """VL Norm minus this."""
    other = reference(groups, group[0])
    if other is None or other == group:
        return None
    return measures.difference(_with_validation(groups[other]), _with_validation(groups[group]))


def _with_validation(runs: Sequence[Run]) -> list[Run]:
    """A run that has just begun says nothing of its final accuracy."""
    return [run for run in runs if measures.validated_steps(run)]


def _caveats(groups: Groups) -> list[str]:
    """What a reader has to know before comparing the rows."""
    feet = []
    runs = [run for found in groups.values() for run in found]
    unfinished = [
        f"{run.name} ({_step([run])})"
        for run in runs
        if measures.validated_steps(run) and run.planned_steps and measures.final_steps([run])[0] < run.planned_steps
    ]
    if unfinished:
        feet.append(f"Not finished: {', '.join(unfinished)}.")
    waiting = [run.name for run in runs if not measures.validated_steps(run)]
    if waiting:
        feet.append(f"Without a validation, left out: {', '.join(waiting)}.")
    for setting in dict.fromkeys(setting for setting, _ in groups):
        steps = {step for group, found in groups.items() if group[0] == setting for step in measures.final_steps(found)}
        if len(steps) > 1:
            where = ", ".join(filter(None, (_model(setting), _length(setting))))
            feet.append(
                f"{where or 'These runs'}: rows stand at different steps ({', '.join(map(str, sorted(steps)))}); the "
                "differences compare them as they stand."
            )
    if any(group[0].scale == "cpu" and _in_paper(group[0]) for group in groups):
        feet.append(
            "Rows of the tiny model were trained on a CPU on a task of their own with this recipe's method; they are "
            "not comparable with the paper's."
        )
    if any(group[0].scale != "cpu" and _in_paper(group[0]) for group in groups):
        feet.append(
            "The paper's values are of arXiv 2509.07558; the label says where each was read, “not found” that it could "
            "not be."
        )
    return feet


def _only(groups: Groups, setting: Setting) -> Groups:
    return {group: runs for group, runs in groups.items() if group[0] == setting}


# ----------------------------------------------------------------------------------------------------------- tables


def _comparison(name: str, groups: Groups, with_task: bool = False) -> Table | None:
    """Rows model × length × method with what the paper has for CountDown; `with_task`: and the task."""
    if not groups:
        return None
    of_paper = name != "runs"
    columns = [*(["task"] if with_task else []), "model", "length", "method", "Avg@8", DIFFERENCE, "Pass@8"]
    columns += ["verl's best@8", "monotonicity", "seeds", "step"]
    if of_paper:
        columns += (
            ["paper's Avg@8", "paper's Pass@8"]
            if name == "countdown"
            else ["paper's accuracy", f"paper's {DIFFERENCE}"]
        )
    rows: list[list[Cell]] = []
    for group, all_runs in groups.items():
        setting, runs = group[0], _with_validation(all_runs)
        row: list[Cell] = [setting.task] if with_task else []
        row += [_model(setting), _length(setting), _label(group), measures.final_accuracy(runs)]
        row += [_difference(groups, group), measures.final_pass(runs), measures.own_best(runs)]
        row += [measures.monotonicity(runs), _seeds(runs), _step(runs)]
        if name == "countdown":
            row += [paper.cell(setting, group[1], metric) for metric in ("avg@8", "pass@8")]
        elif of_paper:
            row += [paper.cell(setting, group[1], metric) for metric in ("accuracy", "vl_norm_minus_this")]
        rows.append(row)
    feet = [ACCURACY, PAIRED, PASS, MONOTONICITY]
    if any(len(measures.validation_sets(runs)) > 1 for runs in groups.values()):
        feet.append(WEIGHTED)
    feet += _caveats(groups) + (paper.remarks("countdown") if name == "countdown" else [])
    title = TITLES.get(name, "Runs outside of the paper's settings")
    return Table(name, title, columns, rows, [*feet, *_responses(groups)])


def _responses(groups: Groups) -> list[str]:
    """A sentence where a validation has another number of responses than the columns' eight."""
    numbers = {
        int(n)
        for runs in groups.values()
        for run in runs
        for sets in run.validations.values()
        for validation in sets.values()
        for n in (validation.n.min(), validation.n.max())
    } - {measures.K}
    if not numbers:
        return []
    return [
        f"Validations with {', '.join(map(str, sorted(numbers)))} responses for a problem: Avg@8 is over all of them, "
        "Pass@8 over the problems that have eight."
    ]


def _math(groups: Groups) -> Table | None:
    if not groups:
        return None
    found = {name for runs in groups.values() for name in measures.validation_sets(runs)}
    names = [*MATH_SETS, *sorted(found - MATH_SETS.keys())]
    columns = [
        "model",
        "length",
        "method",
        *(MATH_SETS.get(name, name) for name in names),
        "weighted Avg@8",
        DIFFERENCE,
    ]
    columns += ["weighted Pass@8", "verl's best@8", "monotonicity", "seeds", "step", "paper's weighted Avg@8"]
    rows: list[list[Cell]] = []
    for group, all_runs in groups.items():
        setting, runs = group[0], _with_validation(all_runs)
        row: list[Cell] = [_model(setting), _length(setting), _label(group)]
        row += [measures.final_accuracy(runs, name) for name in names]
        row += [measures.final_accuracy(runs), _difference(groups, group), measures.final_pass(runs)]
        row += [measures.own_best(runs), measures.monotonicity(runs), _seeds(runs), _step(runs)]
        rows.append([*row, paper.cell(setting, group[1], "avg@8")])
    feet = [ACCURACY, WEIGHTED, PAIRED, PASS, MONOTONICITY]
    if any(len(measures.set_sizes(run)) < len(measures.validation_sets([run])) for g in groups.values() for run in g):
        feet.append(
            "Where the dumps do not say which validation set a response is of, each set's number is verl's own, "
            "without an interval over problems, and there is no weighted average."
        )
    return Table(
        "math", TITLES["math"], columns, rows, [*feet, *_caveats(groups), *paper.remarks("math"), *_responses(groups)]
    )


def _alpha(groups: Groups) -> Table | None:
    """VL Norm in the settings that have it with another α than the task's, or with several."""
    own = {
        g: r for g, r in groups.items() if g[0].family == "aggregation" and _in_paper(g[0]) and _alpha_of(g) is not None
    }
    chosen: Groups = {}
    for setting in dict.fromkeys(setting for setting, _ in own):
        of_setting = _only(own, setting)
        if {_alpha_of(group) for group in of_setting} != {paper.alpha(setting.task)}:
            chosen |= of_setting
    if not chosen:
        return None
    columns = [
        "task",
        "model",
        "length",
        "α",
        "Avg@8",
        "task's α minus this",
        "Pass@8",
        "monotonicity",
        "seeds",
        "step",
    ]
    rows: list[list[Cell]] = []
    for group, all_runs in chosen.items():
        setting, runs = group[0], _with_validation(all_runs)
        rows.append(
            [
                setting.task, _model(setting), _length(setting), f"{_alpha_of(group):g}", measures.final_accuracy(runs),
                _difference(chosen, group), measures.final_pass(runs), measures.monotonicity(runs), _seeds(runs),
                _step(runs), paper.cell(setting, group[1], "avg@8"),
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
    return Table("alpha", TITLES["alpha"], [*columns, "paper's Avg@8"], rows, [*feet, *_caveats(chosen)])


def _speed_up(groups: Groups, smooth: int) -> Table | None:
    """VL Norm against each other method of its setting, and each of those against VL Norm; raw and smoothed."""
    columns = ["task", "model", "length", "method", "reaches the final accuracy of", "curve", "target"]
    columns += ["its last step", "its own first hit", "first hit", "last step / first hit", "first hit / first hit"]
    rows: list[list[Cell]] = []
    used: Groups = {}
    for setting in dict.fromkeys(setting for setting, _ in groups):
        vl = reference(groups, setting)
        others = [group for group in _only(groups, setting) if group != vl]
        for pair in [(vl, other) for other in others] + [(other, vl) for other in others]:
            if vl is None:
                continue
            one, other = pair[0] or vl, pair[1] or vl
            for window in dict.fromkeys((1, smooth)):
                found = measures.speed_up(_with_validation(groups[one]), _with_validation(groups[other]), window)
                if found is not None:
                    used |= {one: groups[one], other: groups[other]}
                    rows.append(_speed_up_row(one, other, window, found))
    if not rows:
        return None
    feet = [
        f"Target: the reference's accuracy at its last validation; of the smoothed curve, of its trailing mean over "
        f"{smooth} validations. First hit: the first validation at the target or above, of a run's own curve; both "
        "methods are treated alike. Steps are means over seeds, ratios geometric means over seeds with Student's t "
        "interval of their logarithm; no interval where a seed did not reach.",
        "Last step / first hit is the paper's count (its 1000 / 375). It flatters whoever reaches a plateau, since the "
        "reference too had reached its own final accuracy before its last step: first hit / first hit does not.",
        "Steps are those with a validation, so a first hit is known to one validation's distance.",
        *_caveats(used),
    ]
    return Table("speedup", TITLES["speedup"], [*columns, "seeds reached", "paper"], rows, feet, digits=2)


def _speed_up_row(one: Group, other: Group, window: int, found: measures.SpeedUp) -> list[Cell]:
    setting = one[0]
    note = found.note

    def ratio(value: Estimate | None) -> Cell:
        if value is None:
            return "–" if found.reached else "not reached"
        return Estimate(value.value, value.low, value.high, "; ".join(filter(None, [value.note, note])))

    own = paper.known(setting, one[1].partition(":")[0], "speed_up")
    is_papers = own is not None and other[1] == "dapo"
    known = f"{own.value} [{own.label}]" if own is not None and is_papers else paper.NOT_FOUND
    return [
        setting.task, _model(setting), _length(setting), _label(one), _label(other),
        "raw" if window == 1 else f"mean of {window}", Estimate(found.target), f"{found.reference_last:g}",
        "–" if found.reference_first is None else f"{found.reference_first:g}",
        "not reached" if found.first is None else f"{found.first:g}", ratio(found.by_last), ratio(found.by_first),
        f"{found.reached} of {found.pairs}",
        paper.TINY if setting.scale == "cpu" else known,
    ]  # fmt: skip


def inputs(runs: Sequence[Run]) -> Table:
    """Each run that was read, with what was odd."""
    left_out = {id(run) for run in measures.doubles(runs)}
    rows: list[list[Cell]] = []
    for run in runs:
        last = str(int(run.steps[-1])) if len(run.steps) else "none"
        planned = f" of {run.planned_steps}" if run.planned_steps else ""
        notes = [*run.notes, *(["another run has the same seed: left out"] if id(run) in left_out else [])]
        setting = " ".join(filter(None, run.setting)) or "unknown"
        rows.append(
            [
                run.name, str(run.folder), setting, run.method_key, run.seed, f"{last}{planned}",
                len(measures.validated_steps(run)), "; ".join(dict.fromkeys(notes)),
            ]
        )  # fmt: skip
    columns = ["run", "folder", "setting", "method", "seed", "last step", "validations", "notes"]
    return Table("inputs", "What was read", columns, rows, [])
