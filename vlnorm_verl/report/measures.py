"""What the report measures of runs: final accuracy, differences, monotonicity, speed-up. Tables and figures use it.

"Runs" of a function are the seeds of one method in one setting (a value of `grouped`). Final is a run's last
validation, also where the run is not finished; accuracies over several validation sets are weighted by their number of
problems.

Covered: runs with dumps (intervals over problems) and runs with verl's metrics alone (intervals over seeds only).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from vlnorm_verl.report import estimates
from vlnorm_verl.report.estimates import (
    Estimate,
    Scores,
    average,
    over_seeds,
    pass_at_k,
    rank_correlation,
)
from vlnorm_verl.report.readers import accuracy_columns
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
    names = {name for run in runs for name in accuracy_columns(run.metrics)}
    names |= {name for run in runs for sets in run.validations.values() for name in sets}
    return sorted(names)


def validated_steps(run: Run) -> list[int]:
    """Steps with a validation that verl logged; of a run without any such metric, those with a dump."""
    logged = {int(s) for column in accuracy_columns(run.metrics).values() for s in run.steps[np.isfinite(column)]}
    return sorted(logged or run.validations)


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
    metrics, names = accuracy_columns(run.metrics), validation_sets([run]) if name is None else [name]
    sizes = set_sizes(run)
    if len(names) > 1 and not all(one in sizes for one in names):
        return np.empty(0, dtype=np.int64), np.empty(0)
    weights = np.array([sizes.get(one, 1) for one in names], dtype=np.float64)
    steps, values = [], []
    for step in validated_steps(run):
        of_sets = [_accuracy_at(run, metrics, step, one) for one in names]
        if of_sets and np.isfinite(of_sets).all():
            steps.append(step)
            values.append(float(weights @ of_sets / weights.sum()))
    return np.array(steps, dtype=np.int64), np.array(values)


def _accuracy_at(run: Run, metrics: dict[str, np.ndarray], step: int, name: str) -> float:
    at = int(np.searchsorted(run.steps, step))
    if name in metrics and at < len(run.steps) and run.steps[at] == step and np.isfinite(metrics[name][at]):
        return float(metrics[name][at])
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
    weight = run.metrics.get("actor/vl_norm/token_weight")
    if weight is not None:
        return np.asarray(entropy / np.where(weight > 0, weight, nan))
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


# ----------------------------------------------------------------------------------------------- at the last validation


def final_steps(runs: Sequence[Run]) -> list[int]:
    return [steps[-1] for run in runs if (steps := validated_steps(run))]


def scores(runs: Sequence[Run], measure: Measure = average, name: str | None = None) -> Scores | None:
    """Of each run's last validation, on the problems that all runs have.

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
        steps = validated_steps(run)
        found = run.validations.get(steps[-1], {}) if steps else {}
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
    table = scores(runs, average, name)
    if table is not None:
        return _noted(estimates.mean(table), table, runs, name)
    if (own := _over_own_problems(runs, average, name)) is not None:
        return own
    finals = [float(curve[1][-1]) for run in runs if len((curve := accuracy_curve(run, name))[0])]
    if not finals:
        return None
    found = over_seeds(finals, 0.0, 1.0)
    return Estimate(found.value, found.low, found.high, "no dumps, over seeds only" if len(finals) > 1 else "no dumps")


def final_pass(runs: Sequence[Run], name: str | None = None) -> Estimate | None:
    """Unbiased Pass@8 of the last validation; None without dumps of 0/1 scores and eight responses."""
    try:
        table = scores(runs, pass_at_8, name)
        return (
            _over_own_problems(runs, pass_at_8, name)
            if table is None
            else _noted(estimates.mean(table), table, runs, name)
        )
    except ValueError:
        return None


def _over_own_problems(runs: Sequence[Run], measure: Measure, name: str | None) -> Estimate | None:
    tables = [table for run in runs if (table := scores([run], measure, name)) is not None]
    return estimates.mean_over_own_problems(tables) if len(tables) == len(runs) > 1 else None


def _noted(estimate: Estimate, table: Scores, runs: Sequence[Run], name: str | None) -> Estimate:
    """With a note if some of the problems could not be used."""
    sizes = [set_sizes(run) for run in runs]
    names = validation_sets(runs) if name is None else [name]
    most = sum(max(size.get(one, 0) for size in sizes) for one in names)
    if len(table.problems) == most:
        return estimate
    note = "; ".join(filter(None, [estimate.note, f"{len(table.problems)} of {most} problems"]))
    return Estimate(estimate.value, estimate.low, estimate.high, note)


def difference(runs: Sequence[Run], reference: Sequence[Run], name: str | None = None) -> Estimate | None:
    """Final accuracy of `runs` minus that of `reference`; None if one has none or they share no problem.

    Paired as far as there are dumps of the same problems; else the plain difference, without an interval.
    """
    a, b = scores(runs, average, name), scores(reference, average, name)
    if a is not None and b is not None:
        try:
            return estimates.difference(a, b)
        except ValueError:
            return None
    if (own := _own_difference(runs, reference, name)) is not None:
        return own
    one, other = final_accuracy(runs, name), final_accuracy(reference, name)
    return None if one is None or other is None else Estimate(one.value - other.value, note="not paired")


def _own_difference(runs: Sequence[Run], reference: Sequence[Run], name: str | None) -> Estimate | None:
    """Over seeds that have each their own problems; None if not every seed is on both sides with a dump."""
    pairs = []
    for run in runs:
        other = of_seed(reference, run.seed)
        a, b = scores([run], average, name), scores([other] if other else [], average, name)
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

    It is a bootstrap with replacement of the eight responses, and lies below the unbiased Pass@8.
    """
    found = []
    for run in runs:
        steps, names, sizes = validated_steps(run), validation_sets([run]), set_sizes(run)
        if not steps or (len(names) > 1 and not all(name in sizes for name in names)):
            return None
        at = int(np.searchsorted(run.steps, steps[-1]))
        columns = [run.metrics.get(f"val-core/{name}/acc/best@{K}/mean") for name in names]
        if at == len(run.steps) or any(column is None for column in columns):
            return None
        values = [column[at] for column in columns if column is not None]
        found.append(float(np.average(values, weights=[sizes.get(name, 1) for name in names])))
    return float(np.mean(found)) if found and np.isfinite(found).all() else None


def monotonicity(runs: Sequence[Run]) -> Estimate | None:
    """Kendall's τ-b between step and accuracy over the validations of each run, mean over seeds.

    Interval: over seeds; for one seed over problems.
    """
    from scipy.stats import kendalltau

    curves = [accuracy_curve(run) for run in runs]
    if not curves or any(len(steps) < 2 for steps, _ in curves):
        return None
    if len(runs) > 1:
        # Rounded, so that accuracies that are equal but for their last bit are ties.
        found = [float(kendalltau(steps, np.round(values, 9)).statistic) for steps, values in curves]
        return over_seeds(found, -1.0, 1.0) if np.isfinite(found).all() else None
    steps, values = curves[0]
    tau = float(kendalltau(steps, np.round(values, 9)).statistic)
    if not np.isfinite(tau):
        return None
    table = _over_steps(runs[0], steps)
    if table is None:
        return Estimate(tau, note="one seed, no dumps")
    found_over_problems = rank_correlation(steps, *table)
    return Estimate(tau, found_over_problems.low, found_over_problems.high, "one seed")


def _over_steps(run: Run, steps: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]] | None:
    """(scores [T, P] of the problems that every validation has, sizes of the sets)."""
    names = validation_sets([run])
    if any(name not in run.validations.get(int(step), {}) for step in steps for name in names):
        return None
    blocks, sizes = [], []
    for name in names:
        tables = [_by_problem(run.validations[int(step)][name], average) for step in steps]
        shared = sorted(set.intersection(*map(set, tables)))
        if len(shared) < 2:
            return None
        blocks.append(np.array([[table[problem] for problem in shared] for table in tables]))
        sizes.append(len(shared))
    return np.concatenate(blocks, axis=1), tuple(sizes)


# --------------------------------------------------------------------------------------------------------- speed-up


@dataclass(frozen=True)
class Reach:
    """One seed: when two methods reach the final accuracy of the second, the reference. Steps; None is never."""

    target: float
    reference_last: int
    reference_first: int | None
    first: int | None
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
    return Reach(
        target=target,
        reference_last=int(reference_steps[-1]),
        reference_first=first_hit(reference_steps[reference_begun], reference_values[reference_begun], target),
        first=first_hit(steps[begun], values[begun], target),
        above_start=all(start < target for start in starts),
    )


@dataclass(frozen=True)
class SpeedUp:
    """A method against a reference over their seeds; steps and target are means over seeds that reached."""

    pairs: int
    reached: int
    target: float
    reference_last: float
    reference_first: float | None
    first: float | None
    by_last: Estimate | None  # the paper's count: reference's last step / first hit
    by_first: Estimate | None  # reference's first hit / first hit
    note: str


def speed_up(runs: Sequence[Run], reference: Sequence[Run], smooth: int) -> SpeedUp | None:
    """Ratios are geometric means over seeds, with a t interval of their logarithms where every seed reached.

    Seeds are paired by number if any is in both, else in their order: independent samples may be paired at will.
    """
    note = ""
    if {run.seed for run in runs} & {run.seed for run in reference}:
        pairs = [(run, other) for run in runs if (other := of_seed(reference, run.seed)) is not None]
    else:
        pairs = list(zip(runs, reference, strict=False))
        note = "other seeds"
    found = [one for run, other in pairs if (one := reach(run, other, smooth)) is not None]
    if not found:
        return None
    reached = [one for one in found if one.first is not None]
    usable = [one for one in reached if one.above_start and one.reference_first is not None]
    if not all(one.above_start for one in found):
        note = "; ".join(filter(None, [note, "the target was met before training"]))
    complete = len(usable) == len(found)
    return SpeedUp(
        pairs=len(found),
        reached=len(reached),
        target=float(np.mean([one.target for one in found])),
        reference_last=float(np.mean([one.reference_last for one in found])),
        reference_first=_mean_or_none([one.reference_first for one in found if one.reference_first is not None]),
        first=_mean_or_none([one.first for one in reached if one.first is not None]),
        by_last=_ratio([one.reference_last / one.first for one in usable if one.first], complete),
        by_first=_ratio([(one.reference_first or nan) / one.first for one in usable if one.first], complete),
        note=note,
    )


def _mean_or_none(values: list[int]) -> float | None:
    return float(np.mean(values)) if values else None


def _ratio(ratios: list[float], complete: bool) -> Estimate | None:
    if not ratios:
        return None
    found = over_seeds(np.log(ratios).tolist())
    value = float(np.exp(found.value))
    if not complete:
        return Estimate(value, note=f"of the {len(ratios)} seeds that reached")
    return Estimate(value, float(np.exp(found.low)), float(np.exp(found.high)), found.note)
