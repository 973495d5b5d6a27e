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

from math import isnan

from vlnorm_verl.methods import label_of
from vlnorm_verl.report import measures, paper
from vlnorm_verl.report.configs import differing
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.first_hit import SpeedUp, smoothing, speed_up
from vlnorm_verl.report.groups import Comparison, Group, Groups, by_setting, doubles, runs_of
from vlnorm_verl.report.identity import UNKNOWN_SEED, Setting
from vlnorm_verl.report.table import Cell, Table
from vlnorm_verl.report.verdict import shortened, step_of

Row = dict[str, Cell]  # heading -> cell

TITLES = {
    "results": "Results",
    "details": "More on each method",
    "sets": "Each validation set",
    "speedup": "Steps to another method's final accuracy",
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
LOGGED = (
    "as it was logged, at the last validation. Brackets: 95% interval over seeds, and over problems where there are "
    "dumps."
)
PASS = "Pass@8: 1 − C(n−c, 8)/C(n, 8), unbiased, mean over problems."


def tables(compared: Comparison, smooth: int | None = None) -> list[Table]:
    """Every table that there are rows for, `inputs` last.

    smooth: steps of the speed-up's trailing mean, see `first_hit.smoothing`.
    """
    made = [_results(compared), _details(compared), _sets(compared), _speed_up(compared, smooth), differing(compared)]
    return [table for table in made if table is not None] + [inputs(compared)]


def _table(name: str, rows: list[Row], foot: list[str], **options: object) -> Table | None:
    """Without the columns in which no row says anything; None without a row, or if only setting and method are left."""

    def says(cell: Cell) -> bool:
        if isinstance(cell, Estimate):
            return bool(cell.note) or not isnan(cell.value)
        return cell not in (None, "", paper.NOT_FOUND)

    headings = dict.fromkeys(heading for row in rows for heading in row)
    columns = [heading for heading in headings if any(says(row.get(heading)) for row in rows)]
    if len(columns) < 3:
        return None
    cells = [[row.get(heading) for heading in columns] for row in rows]
    return Table(name, TITLES[name], columns, cells, foot, grouped=True, **options)  # type: ignore[arg-type]


def _start(compared: Comparison, group: Group) -> Row:
    """What every row begins with."""
    return {"setting": compared.titles[group.setting], "method": group.label}


def difference_heading(baseline: str) -> str:
    return f"this minus {label_of(baseline)}" if baseline else DIFFERENCE


def _accuracy(groups: Groups) -> tuple[str, str]:
    """(what the accuracy is called, what it is)."""
    runs = runs_of(groups)
    shares = measures.is_rate(runs) and measures.accuracies_of(runs)[0] <= {"acc"}  # a reward may give half for a try
    return measures.accuracy_name(runs), ACCURACY if shares else LOGGED


# ---------------------------------------------------------------------------------------------------------- accuracy


def _results(compared: Comparison) -> Table | None:
    groups, difference, rows = compared.validated, difference_heading(compared.baseline), []
    heading, what = _accuracy(groups)
    for group, runs in groups.items():
        used = len(measures.final_runs(runs))
        rows.append(
            _start(compared, group)
            | {
                heading: compared.finals[group],
                difference: _difference(compared, group),
                "Pass@8": measures.final_pass(runs),
                "seeds": used if used == len(runs) else f"{used} of {len(runs)}",
                "step": step_of(runs),
            }
        )
    foot = [f"{heading}: {what}", *(["Bold: the highest of its setting."] if _best(compared) else [])]
    foot += _on_difference(compared)
    foot += [PASS] if any(row["Pass@8"] is not None for row in rows) else []
    if any(len(measures.validation_sets(runs)) > 1 for runs in groups.values()):
        foot.append("Several validation sets: weighted by their problems; the interval resamples within each set.")
    foot += [*_at_different_steps(compared), *_other_accuracies(groups)]
    return _table("results", rows, foot, bold=_best(compared), forest=difference)


def _best(compared: Comparison) -> frozenset[int]:
    """The rows with the highest accuracy of their setting, where that has several."""
    settings: dict[Setting, list[tuple[float, int]]] = {}
    for index, (group, final) in enumerate(compared.finals.items()):
        if final is not None and not isnan(final.value):
            settings.setdefault(group.setting, []).append((final.value, -index))  # of equal ones the first
    return frozenset(-max(rows)[1] for rows in settings.values() if len(rows) > 1)


def _difference(compared: Comparison, group: Group) -> Cell:
    """VL Norm minus this, or this minus the baseline."""
    other = compared.references.get(group.setting)
    if other is None or other == group:
        return None
    minuend, subtrahend = (group, other) if compared.baseline else (other, group)
    return measures.difference(compared.validated[minuend], compared.validated[subtrahend])


def _on_difference(compared: Comparison) -> list[str]:
    """On the difference, or on why several methods have none."""
    references, baseline = compared.references, compared.baseline
    if any(references.get(group.setting, group) != group for group in compared.validated):
        better = "this" if baseline else "VL Norm"
        return [
            f"{difference_heading(baseline)}: positive where {better} is better; 95% interval, paired by problem and "
            "by the seeds that both have."
        ]
    if len(compared.validated) == 1 or references:
        return []
    if baseline:
        return [f"No differences: {label_of(baseline)} was not run here."]
    return ["No VL Norm here that the others could be compared with: --baseline METHOD names another method."]


def _at_different_steps(compared: Comparison) -> list[str]:
    steps = {
        compared.titles[setting]: sorted({measures.final_step(runs) or 0 for runs in groups.values()})
        for setting, groups in by_setting(compared.validated).items()
    }
    uneven = [f"{title} ({', '.join(map(str, at))})" for title, at in steps.items() if len(at) > 1]
    return (
        [f"Rows stand at different steps, and a difference is at the last that both have: {'; '.join(uneven)}."]
        if uneven
        else []
    )


def _other_accuracies(groups: Groups) -> list[str]:
    """A sentence where a run's accuracies are not means of eight responses' `acc`."""
    runs, others = runs_of(groups), dict[str, list[str]]()
    for run in runs:
        variables, counts = measures.accuracies_of([run])
        if not counts <= {0} and (variables - {"acc"} or counts != {measures.K}):
            what = f" of {', '.join(sorted(variables))}" if variables - {"acc"} else ""
            others.setdefault(f"mean@{', '.join(map(str, sorted(counts)))}{what}", []).append(run.name)
    if not others:
        return []
    said = [f"{what} ({'all runs' if len(names) == len(runs) else shortened(names)})" for what, names in others.items()]
    return [f"Not Avg@8 of verl's acc: {'; '.join(said)}. Pass@8 is over the problems that have eight responses."]


def _details(compared: Comparison) -> Table | None:
    groups, rows = compared.validated, []
    other_metric = any(run.metric for run in compared.runs)  # the paper's values are of verl's accuracy only
    for group, runs in groups.items():
        row = _start(compared, group)
        row |= {"monotonicity": measures.monotonicity(runs), "verl's best@8": measures.own_best(runs)}
        for metric, heading in OF_PAPER.get(group.setting.family, {}).items():
            row[heading] = None if other_metric else paper.cell(*group, metric)
        rows.append(row)
    foot = [
        "Monotonicity: Kendall's τ-b between step and accuracy over a run's validations. This definition is ours; the "
        "paper's was not found. It punishes a plateau: a method that is at its best early and stays there is lower "
        "than one that still climbs. verl's best@8: a bootstrap with replacement, which lies below Pass@8.",
    ]
    if any(map(paper.covers, (setting for setting, _ in groups))) and not other_metric:
        foot.append("The paper: arXiv 2509.07558; “not found”: that its value could not be; –: not known to be in it.")
        foot += paper.sources(groups, [metric for metrics in OF_PAPER.values() for metric in metrics])
        foot += paper.remarks(group for group in groups if group.setting.family == "aggregation")
    return _table("details", rows, foot)


def _sets(compared: Comparison) -> Table | None:
    groups = {group: runs for group, runs in compared.validated.items() if len(measures.validation_sets(runs)) > 1}
    names = {name for runs in groups.values() for name in measures.validation_sets(runs)}
    rows: list[Row] = []
    for group, runs in groups.items():
        row = _start(compared, group)
        for name in (*(known for known in MATH_SETS if known in names), *sorted(names - MATH_SETS.keys())):
            heading = MATH_SETS.get(name, name)
            row[f"{heading} (set)" if heading in ("setting", "method") else heading] = measures.final_accuracy(
                runs, name
            )
        rows.append(row)
    foot = [": ".join(_accuracy(groups))]
    if any(len(measures.set_sizes(run)) < len(measures.validation_sets([run])) for run in runs_of(groups)):
        foot.append(
            "Where no dump that can be used says which validation set a response is of, each set's number is verl's "
            "own, without an interval over problems, and there is no weighted average."
        )
    return _table("sets", rows, foot)


# ---------------------------------------------------------------------------------------------------------- speed-up


def _speed_up(compared: Comparison, smooth: int | None) -> Table | None:
    rows: list[Row] = []
    hidden: tuple[str, ...] = ()
    for higher, lower, raw in compared.pairs:
        window = smoothing(runs_of(by_setting(compared.validated)[higher.setting]), smooth)
        smoothed = speed_up(compared.validated[higher], measures.final_runs(compared.validated[lower]), window)
        assert smoothed is not None  # there is one where there is the raw one
        row = _start(compared, higher) | {
            "reaches the final accuracy of": lower.label,
            "target": Estimate(raw.target, note=raw.note),
            "at step": _first(raw),
            "that one's first hit": str(raw.reference),
            "last step / first hit": raw.times_sooner or None,
            "first hit / first hit": raw.by_first,
            "smoothed: at step": _first(smoothed) if window > 1 else None,
            "seeds reached": f"{raw.reached} of {raw.pairs}",
            "paper's first hit": _papers_first_hit(higher, lower),
        }
        more: Row = {"smoothed: steps": window}
        for name, hits in (("raw", raw), ("smoothed", smoothed)):
            more |= {
                f"{name}: first hit": hits.own.first,
                f"{name}: validation before": hits.own.before,
                f"{name}: that one's last step": hits.reference.last,
                f"{name}: last step / first hit": hits.by_last,
                f"{name}: first hit / first hit": hits.by_first,
            }
        hidden = tuple(more)
        rows.append(row | more)
    foot = [
        "Target: the other method's accuracy at its last validation, of the seeds that its result is of. A first hit "
        "is the first validation at the target or above, of each seed's own curve, known as far as validations are "
        f"apart: 325–350. Smoothed: trailing mean{'' if smooth else ' of three validations'}. Steps are means over the "
        "seeds that reached, and last step / first hit is the ratio of such means; first hit / first hit is the "
        "geometric mean of the seeds' ratios, with Student's t interval of their logarithm, which knows nothing of the "
        "gaps between validations.",
        "Last step / first hit is the paper's count (its 1000 / 375). It flatters whoever reaches a plateau, since the "
        "other too was at its own final accuracy before its last step: first hit / first hit does not.",
        *paper.sources([pair.higher for pair in compared.pairs], ("first_hit", "speed_up")),
    ]
    return _table("speedup", rows, foot, hidden=hidden, digits_of={"first hit / first hit": 2})


def _first(hits: SpeedUp) -> str:
    if hits.own.first is not None:
        return str(hits.own)
    if not hits.pairs:
        return ""
    return "not reached" if hits.waiting is None else f"not yet (step {hits.waiting})"


def _papers_first_hit(group: Group, other: Group) -> Cell:
    """ "375 (2.67×) [paper, Fig. 2]": when VL Norm reaches DAPO's final accuracy, and the paper's count of it."""
    hit, ratio = (paper.known(*group, metric) for metric in ("first_hit", "speed_up"))
    if hit is None or ratio is None or other.key not in ("dapo", "dapo_norm_as_coded"):
        return None
    return f"{hit.value} ({ratio.value}×) [{hit.label}]"


def inputs(compared: Comparison) -> Table:
    """Each run that was read, with what was odd."""
    left_out = doubles(compared.runs, compared.groups)
    rows: list[list[Cell]] = []
    for run in compared.runs:
        last = str(int(run.steps[-1])) if len(run.steps) else "none"
        planned = f" of {run.planned_steps}" if run.planned_steps else ""
        notes = dict.fromkeys([*run.notes, *["another run has the same seed: left out"] * (run in left_out)])
        what: list[Cell] = [run.name, str(run.folder), " ".join(filter(None, run.setting)) or "unknown"]
        what += [run.method_key, None if run.seed == UNKNOWN_SEED else run.seed]
        rows.append([*what, f"{last}{planned}", len(measures.validated_steps(run)), "; ".join(notes)])
    columns = ["run", "folder", "setting", "method", "seed", "last step", "validations", "notes"]
    return Table("inputs", TITLES["inputs"], columns, rows, hidden=("folder",))
