"""What the report measures of runs: final accuracy, differences, monotonicity, speed-up. Tables and figures use it.

"Runs" of a function are the seeds of one method in one setting (a value of `grouped`). Final is the last step at which
any of them was validated, also where it is not their last; a seed that is not as far is left out (`final_runs`). A
difference is at the last step at which both methods were. Accuracies over several validation sets are weighted by
their number of problems.

Covered: runs with dumps (intervals over problems) and runs with verl's metrics alone (intervals over seeds only).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import nan

import numpy as np

from vlnorm_verl.report import estimates, paper
from vlnorm_verl.report.estimates import (
    Estimate,
    Scores,
    average,
    over_seeds,
    pass_at_k,
    rank_correlation,
)
from vlnorm_verl.report.readers import Logged, logged_accuracies, value_at
from vlnorm_verl.report.runs import Run, Setting, Validation

K = 8  # of Pass@k, the paper's
Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]  # responses [P], correct [P] -> score [P]
Group = tuple[Setting, str]


def pass_at_8(n: np.ndarray, correct: np.ndarray) -> np.ndarray:
    return pass_at_k(n, correct, K)


def grouped(runs: Sequence[Run]) -> dict[Group, list[Run]]:
    """{(setting, method_key): its runs by seed}, in the order of the first run of each.

    Of two runs with the same seed the one with more steps is taken, since they are one sample; see `doubles`.
    """
    groups: dict[Group, dict[int, Run]] = {}
    for run in runs:
        seeds = groups.setdefault((run.setting, run.method_key), {})
        if run.seed not in seeds or len(run.steps) > len(seeds[run.seed].steps):
            seeds[run.seed] = run
    return {group: [seeds[seed] for seed in sorted(seeds)] for group, seeds in groups.items()}


def doubles(runs: Sequence[Run]) -> list[Run]:
    """The runs that `grouped` leaves out."""
    kept = {id(run) for group in grouped(runs).values() for run in group}
    return [run for run in runs if id(run) not in kept]


def of_seed(runs: Sequence[Run], seed: int) -> Run | None:
    return next((run for run in runs if run.seed == seed), None)


# ------------------------------------------------------------------------------------------------------- over steps


def validation_sets(runs: Sequence[Run]) -> list[str]:
    """Names of the validation sets of these runs, sorted."""
    names = {name for run in runs for name in logged_accuracies(run.metrics)}
    names |= {name for run in runs for sets in run.validations.values() for name in sets}
    return sorted(names)


def validated_steps(run: Run) -> list[int]:
    """Steps with a validation that verl logged; of a run without any such metric, those with a dump."""
    logged = {int(s) for one in logged_accuracies(run.metrics).values() for s in run.steps[np.isfinite(one.values)]}
    return sorted(logged or run.validations)


def unfinished(run: Run) -> bool:
    """Whether its last validation is before its planned end; of a run without a planned end that is not known."""
    return run.planned_steps is not None and max(validated_steps(run), default=0) < run.planned_steps


def set_sizes(run: Run) -> dict[str, int]:
    """Problems of each validation set, from the dumps."""
    sizes: dict[str, int] = {}
    for step in sorted(run.validations):
        for name, validation in run.validations[step].items():
            sizes[name] = max(sizes.get(name, 0), len(validation.problems))
    return sizes


def accuracy_curve(run: Run, name: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(steps [T], Avg@n [T]) of one validation set, or of all weighted by size (None).

    verl's own value where it is logged, else the dump's. Empty for several sets of unknown size.
    """
    logged, names = logged_accuracies(run.metrics), validation_sets([run]) if name is None else [name]
    sizes = set_sizes(run)
    if len(names) > 1 and not all(one in sizes for one in names):
        return np.empty(0, dtype=np.int64), np.empty(0)
    weights = np.array([sizes.get(one, 1) for one in names], dtype=np.float64)
    steps, values = [], []
    for step in validated_steps(run):
        of_sets = [_accuracy_at(run, logged, step, one) for one in names]
        if of_sets and np.isfinite(of_sets).all():
            steps.append(step)
            values.append(float(weights @ of_sets / weights.sum()))
    return np.array(steps, dtype=np.int64), np.array(values)


def _accuracy_at(run: Run, logged: dict[str, Logged], step: int, name: str) -> float:
    if name in logged and (own := value_at(run, logged[name].values, step)) is not None:
        return own
    validation = run.validations.get(step, {}).get(name)
    return nan if validation is None else float(average(validation.n, validation.correct).mean())


# Modes whose aggregated entropy is a mean over tokens already (all tokens alike, or each response's mean).
MEANS_OVER_TOKENS = {
    "dapo_norm", "grpo_norm", "dapo", "overlong_filtering", "soft_punishment", "token-mean", "seq-mean-token-mean",
}  # fmt: skip
SUMS_OVER_M = {"dr_grpo_norm", "dr_grpo", "seq-mean-token-sum-norm"}


def entropy_per_token(run: Run) -> np.ndarray | None:
    """`actor/entropy` [T] as nats a token. verl aggregates it by the run's loss_agg_mode, so its scale is the mode's.

    None where the sum of the token weights is not known: neither logged by the plugin nor to be had from M.
    """
    entropy = run.metrics.get("actor/entropy")
    if entropy is None:
        return None
    weighted = run.metrics.get("actor/vl_norm/weighted_tokens")
    denominator = run.metrics.get("actor/vl_norm/denominator")
    if weighted is not None and denominator is not None:
        return np.asarray(entropy * denominator / np.where(weighted > 0, weighted, nan))
    if run.method in MEANS_OVER_TOKENS:
        return entropy
    lengths = run.metrics.get("response_length/mean")
    if run.method in SUMS_OVER_M and run.scale_factor and lengths is not None:
        return np.asarray(entropy * run.scale_factor / np.where(lengths > 0, lengths, nan))
    return None


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and the `window` − 1 before it, of fewer at the beginning."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def first_hit(steps: np.ndarray, values: np.ndarray, target: float) -> int | None:
    """First step at which the curve is at the target or above; None if it never is."""
    reached = np.flatnonzero(values >= target - 1e-9)  # verl's mean and a sum of it differ in the last bit
    return int(steps[reached[0]]) if len(reached) else None


# ------------------------------------------------------------------------------------------------------- at one step


def final_step(runs: Sequence[Run]) -> int | None:
    """The last step at which any of these runs was validated."""
    return max((steps[-1] for run in runs if (steps := validated_steps(run))), default=None)


def at_step(runs: Sequence[Run], step: int | None) -> list[Run]:
    """Those of the runs that were validated at a step."""
    return [run for run in runs if step in validated_steps(run)]


def final_runs(runs: Sequence[Run]) -> list[Run]:
    """Those of the runs that final values are of."""
    return at_step(runs, final_step(runs))


def common_step(runs: Sequence[Run], reference: Sequence[Run]) -> int | None:
    """The last step at which a run of each side was validated."""
    steps, other = ({step for run in side for step in validated_steps(run)} for side in (runs, reference))
    return max(steps & other, default=None)


def scores(runs: Sequence[Run], step: int, measure: Measure = average, name: str | None = None) -> Scores | None:
    """Of each run's validation at a step, on the problems that all runs have.

    None if a run has no dump of it, or if less than half of a run's problems are in all (verl draws another part of the
    validation set for each seed if data.val_max_samples is less than all). Problems for which the measure is not
    defined (Pass@8 of seven responses) are left out.

    Raises:
        ValueError: the measure is defined for none of them.
    """
    names = validation_sets(runs) if name is None else [name]
    if not runs or not names:
        return None
    tables: list[dict[str, dict[str, float]]] = []
    for run in runs:
        found = run.validations.get(step, {})
        if any(one not in found for one in names):
            return None
        tables.append({one: _by_problem(found[one], measure) for one in names})
    problems, sizes = [], []
    for one in names:
        shared = set.intersection(*(set(table[one]) for table in tables))
        if 2 * len(shared) < max(len(table[one]) for table in tables):
            return None
        problems.append(sorted(shared))
        sizes.append(len(shared))
    values = [[table[one][p] for one, part in zip(names, problems, strict=True) for p in part] for table in tables]
    return Scores(
        values=np.array(values),
        problems=tuple(f"{one}/{p}" for one, part in zip(names, problems, strict=True) for p in part),
        sizes=tuple(sizes),
        seeds=tuple(run.seed for run in runs),
    )


def _by_problem(validation: Validation, measure: Measure) -> dict[str, float]:
    n, correct, problems = validation.n, validation.correct, validation.problems
    if measure is pass_at_8 and not validation.binary:
        raise ValueError("Pass@8 needs scores of 0 and 1")
    if measure is pass_at_8 and (n >= K).any():
        enough = n >= K
        n, correct = n[enough], correct[enough]
        problems = [problem for problem, keep in zip(problems, enough, strict=True) if keep]
    return dict(zip(problems, measure(n, correct).tolist(), strict=True))


def final_accuracy(runs: Sequence[Run], name: str | None = None) -> Estimate | None:
    """Avg@n of the last validation; None without a validation or, over several sets, without their sizes."""
    step = final_step(runs)
    return None if step is None else accuracy_at(runs, step, name)


def accuracy_at(runs: Sequence[Run], step: int, name: str | None = None) -> Estimate | None:
    """The same at a step, of the runs that were validated there."""
    runs = at_step(runs, step)
    table = scores(runs, step, average, name)
    if table is not None:
        return _noted(estimates.mean(table), table, runs, name)
    if (own := _over_own_problems(runs, step, average, name)) is not None:
        return own
    curves = [accuracy_curve(run, name) for run in runs]
    values = [float(found[steps == step][0]) for steps, found in curves if step in steps]
    if not values:
        return None
    found = over_seeds(values, 0.0, 1.0)
    return replace(found, note="no dumps, over seeds only" if len(values) > 1 else "no dumps")


def final_pass(runs: Sequence[Run], name: str | None = None) -> Estimate | None:
    """Unbiased Pass@8 of the last validation; None without dumps of 0/1 scores and eight responses."""
    step, runs = final_step(runs), final_runs(runs)
    if step is None:
        return None
    try:
        table = scores(runs, step, pass_at_8, name)
        return (
            _over_own_problems(runs, step, pass_at_8, name)
            if table is None
            else _noted(estimates.mean(table), table, runs, name)
        )
    except ValueError:
        return None


def _over_own_problems(runs: Sequence[Run], step: int, measure: Measure, name: str | None) -> Estimate | None:
    tables = [table for run in runs if (table := scores([run], step, measure, name)) is not None]
    return estimates.mean_over_own_problems(tables) if len(tables) == len(runs) > 1 else None


def _noted(estimate: Estimate, table: Scores, runs: Sequence[Run], name: str | None) -> Estimate:
    """With a note if some of the problems could not be used."""
    sizes = [set_sizes(run) for run in runs]
    names = validation_sets(runs) if name is None else [name]
    most = sum(max(size.get(one, 0) for size in sizes) for one in names)
    if len(table.problems) == most:
        return estimate
    return _with_note(estimate, f"{len(table.problems)} of {most} problems")


def _with_note(estimate: Estimate, *notes: str) -> Estimate:
    return replace(estimate, note="; ".join(filter(None, [estimate.note, *notes])))


def difference(runs: Sequence[Run], reference: Sequence[Run], name: str | None = None) -> Estimate | None:
    """Accuracy of `runs` minus that of `reference` at the last step that both have; None without accuracies there.

    Paired as far as there are dumps of the same problems; else the plain difference, without an interval. Seeds that
    both have are the ones compared, if there is any. The note names the step where it is not the last of both, and how
    many seeds it is of where that is not all.
    """
    step = common_step(runs, reference)
    if step is None:
        return Estimate(nan, note="no validated step in common")
    notes = [] if final_step(runs) == final_step(reference) == step else [f"at step {step}"]
    every = {run.seed for run in [*runs, *reference]}
    runs, reference = at_step(runs, step), at_step(reference, step)
    shared = {run.seed for run in runs} & {run.seed for run in reference}
    if shared:
        runs, reference = ([run for run in side if run.seed in shared] for side in (runs, reference))
        if shared != every:
            notes.append(f"{len(shared)} of {len(every)} seeds")
    found = _difference_at(runs, reference, step, name)
    return None if found is None else _with_note(found, *notes)


def _difference_at(runs: Sequence[Run], reference: Sequence[Run], step: int, name: str | None) -> Estimate | None:
    a, b = scores(runs, step, average, name), scores(reference, step, average, name)
    if a is not None and b is not None:
        try:
            return estimates.difference(a, b)
        except ValueError:
            return None
    if (own := _own_difference(runs, reference, step, name)) is not None:
        return own
    one, other = accuracy_at(runs, step, name), accuracy_at(reference, step, name)
    return None if one is None or other is None else Estimate(one.value - other.value, note="not paired")


def _own_difference(runs: Sequence[Run], reference: Sequence[Run], step: int, name: str | None) -> Estimate | None:
    """Over seeds that have each their own problems; None if not every seed is on both sides with a dump."""
    pairs = []
    for run in runs:
        other = of_seed(reference, run.seed)
        a, b = scores([run], step, average, name), scores([other] if other else [], step, average, name)
        if a is None or b is None:
            return None
        pairs.append((a, b))
    if len(pairs) < 2 or len(pairs) != len(reference):
        return None
    try:
        return estimates.difference_over_own_problems(pairs)
    except ValueError:
        return None


def own_best(runs: Sequence[Run]) -> float | None:
    """verl's best@8/mean at the last validation, mean over seeds and, by size, over validation sets.

    Of the variable that the accuracy is of. It is a bootstrap with replacement of the eight responses, and lies below
    the unbiased Pass@8.
    """
    step, found = final_step(runs), []
    for run in final_runs(runs):
        names, sizes, logged = validation_sets([run]), set_sizes(run), logged_accuracies(run.metrics)
        if step is None or (len(names) > 1 and not all(name in sizes for name in names)):
            return None
        columns = [
            run.metrics.get(f"val-core/{name}/{logged[name].variable}/best@{K}/mean") if name in logged else None
            for name in names
        ]
        values = [None if column is None else value_at(run, column, step) for column in columns]
        known = [value for value in values if value is not None]
        if len(known) < len(names):
            return None
        found.append(float(np.average(known, weights=[sizes.get(name, 1) for name in names])))
    return float(np.mean(found)) if found else None


def accuracies_of(runs: Sequence[Run]) -> tuple[set[str], set[int]]:
    """What the runs' accuracies are means of: variables of the reward, and numbers of responses to a problem."""
    logged = [one for run in runs for one in logged_accuracies(run.metrics).values()]
    counts = {one.n for one in logged}
    for sets in (sets for run in runs for sets in run.validations.values()):
        counts |= {int(one.n.max()) for one in sets.values() if len(one.n)}
    return {one.variable for one in logged}, counts


def monotonicity(runs: Sequence[Run]) -> Estimate | None:
    """Kendall's τ-b between step and accuracy over the validations of each run, mean over seeds.

    Interval: over seeds; for one seed over problems; none with two validations, where τ is −1 or 1 whatever they are.
    """
    from scipy.stats import kendalltau

    runs = final_runs(runs)
    curves = [accuracy_curve(run) for run in runs]
    if not curves or any(len(steps) < 2 for steps, _ in curves):
        return None
    # Rounded, so that accuracies that are equal but for their last bit are ties.
    found = [float(kendalltau(steps, np.round(values, 9)).statistic) for steps, values in curves]
    if not np.isfinite(found).all():
        return None
    one_seed = "one seed" if len(runs) == 1 else ""
    if min(len(steps) for steps, _ in curves) < 3:
        return _with_note(Estimate(float(np.mean(found)), note=one_seed), "two validations")
    if len(runs) > 1:
        return over_seeds(found, -1.0, 1.0)
    steps = curves[0][0]
    table = _over_steps(runs[0], steps)
    if isinstance(table, str):
        return _with_note(Estimate(found[0], note=one_seed), table)
    return replace(rank_correlation(steps, *table), value=found[0])


def _over_steps(run: Run, steps: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]] | str:
    """(scores [T, P] of the problems that every validation has, sizes of the sets), or why there is no such table."""
    names = validation_sets([run])
    if any(name not in run.validations.get(int(step), {}) for step in steps for name in names):
        return "no dumps" if not run.validations else "not every validation has a dump"
    blocks, sizes = [], []
    for name in names:
        tables = [_by_problem(run.validations[int(step)][name], average) for step in steps]
        shared = sorted(set.intersection(*map(set, tables)))
        if len(shared) < 2:
            return "a set of one problem" if max(map(len, tables)) == 1 else "other problems in each validation"
        blocks.append(np.array([[table[problem] for problem in shared] for table in tables]))
        sizes.append(len(shared))
    return np.concatenate(blocks, axis=1), tuple(sizes)


# --------------------------------------------------------------------------------------------------------- speed-up


@dataclass(frozen=True)
class Reach:
    """One seed: when two methods reach the final accuracy of the second, the reference. Steps; None is never."""

    target: float
    reference_last: int
    reference_first: int
    first: int | None
    last: int
    above_start: bool  # whether the target was not met already by the validation before the first step


def reach(run: Run, reference: Run, smooth: int) -> Reach | None:
    """smooth: validations in the trailing mean that both curves and the target are taken of; 1 is raw.

    None if either has no validation after its first step.
    """
    curves = [accuracy_curve(run), accuracy_curve(reference)]
    if any(not len(steps) or steps[-1] <= 0 for steps, _ in curves):
        return None
    (steps, values), (reference_steps, reference_values) = (
        (steps, trailing_mean(values, smooth)) for steps, values in curves
    )
    target = float(reference_values[-1])
    begun, reference_begun = steps > 0, reference_steps > 0
    starts = [*values[~begun], *reference_values[~reference_begun]]
    reference_first = first_hit(reference_steps[reference_begun], reference_values[reference_begun], target)
    assert reference_first is not None  # its last value is the target
    return Reach(
        target=target,
        reference_last=int(reference_steps[-1]),
        reference_first=reference_first,
        first=first_hit(steps[begun], values[begun], target),
        last=int(steps[-1]),
        above_start=all(start < target for start in starts),
    )


@dataclass(frozen=True)
class SpeedUp:
    """A method against a reference over their seeds.

    pairs: seeds that can be compared: the reference is finished, and its final accuracy was not there before training.
    reached: how many of them reached it. All values are means over these, or over all pairs where none did; NaN
    without any pair.
    waiting: the last validation of the pair that is the least far of those that may still reach it.
    """

    pairs: int
    reached: int
    target: float
    reference_last: float
    reference_first: float
    first: float | None
    by_last: Estimate | None  # the paper's count: reference's last step / first hit
    by_first: Estimate | None  # reference's first hit / first hit
    waiting: int | None
    note: str


def speed_up(runs: Sequence[Run], reference: Sequence[Run], smooth: int) -> SpeedUp | None:
    """Ratios are geometric means over seeds, with a t interval of their logarithms where every seed reached.

    Seeds are paired by number if any is in both, else in their order: independent samples may be paired at will. None
    if no pair has validations after the first step.
    """
    notes = []
    if {run.seed for run in runs} & {run.seed for run in reference}:
        pairs = [(run, other) for run in runs if (other := of_seed(reference, run.seed)) is not None]
    else:
        pairs = list(zip(runs, reference, strict=False))
        notes.append("other seeds")
    found = [(run, other, one) for run, other in pairs if (one := reach(run, other, smooth)) is not None]
    if not found:
        return None
    finished = [entry for entry in found if not unfinished(entry[1])]
    if len(finished) < len(found):
        steps = {max(validated_steps(other)) for _, other, _ in found if unfinished(other)}
        planned = max(other.planned_steps or 0 for _, other, _ in found)
        where = f"step {_span(steps)} of {planned}"
        notes.append(f"the reference is not finished ({where})" + (_of_seeds(finished, found) if finished else ""))
    usable = [entry for entry in finished if entry[2].above_start]
    if len(usable) < len(finished):
        notes.append("the target was met before training" + (_of_seeds(usable, finished) if usable else ""))
    reached = [one for _, _, one in usable if one.first is not None]
    waiting = [one.last for run, _, one in usable if one.first is None and unfinished(run)]
    shown = reached or [one for _, _, one in usable]
    firsts = [one.first for one in reached if one.first is not None]
    complete = len(reached) == len(usable)
    return SpeedUp(
        pairs=len(usable),
        reached=len(reached),
        target=_mean([one.target for one in shown]),
        reference_last=_mean([one.reference_last for one in shown]),
        reference_first=_mean([one.reference_first for one in shown]),
        first=_mean(firsts) if firsts else None,
        by_last=_ratio([one.reference_last / one.first for one in reached if one.first], complete),
        by_first=_ratio([one.reference_first / one.first for one in reached if one.first], complete),
        waiting=min(waiting, default=None),
        note="; ".join(notes),
    )


def _span(steps: set[int]) -> str:
    return str(min(steps)) if len(steps) == 1 else f"{min(steps)}–{max(steps)}"


def _of_seeds(left: Sequence[object], every: Sequence[object]) -> str:
    return f" in {len(every) - len(left)} of {len(every)} seeds, which are left out"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else nan


def _ratio(ratios: list[float], complete: bool) -> Estimate | None:
    if not ratios:
        return None
    found = over_seeds(np.log(ratios).tolist())
    value = float(np.exp(found.value))
    if not complete:
        return Estimate(value, note=f"of the {'seed' if len(ratios) == 1 else f'{len(ratios)} seeds'} that reached")
    return Estimate(value, float(np.exp(found.low)), float(np.exp(found.high)), found.note)


# ---------------------------------------------------------------------------------------------------- which VL Norm


def main_vl_norm(setting: Setting, method_keys: Iterable[str]) -> str | None:
    """The VL Norm that other methods of a setting are compared with.

    With the task's α in the paper's settings, and none if that was not run; elsewhere with α = 1 if there is one, else
    with the largest.
    """
    found = {alpha: key for key in method_keys if (alpha := alpha_of(key)) is not None}
    of_paper = paper.has(setting)
    own = paper.alpha(setting.task) if of_paper else 1.0
    if own in found:
        return found[own]
    return None if of_paper or not found else found[max(found)]


def alpha_of(method_key: str) -> float | None:
    method, _, number = method_key.partition(":")
    return float(number) if method == "vl_norm" and number else None
