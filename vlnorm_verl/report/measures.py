"""What the report measures of runs: final accuracy, differences, monotonicity. Tables and figures use it.

"Runs" of a function are the seeds of one method in one setting (a value of `groups.grouped`). Final is the last step at
which at least half of them were validated, also where it is not their last; a seed that is not as far is left out
(`final_runs`). A difference is at the last such step of both methods. Accuracies over several validation sets are
weighted by their number of problems.

Covered: runs with dumps (intervals over problems) and runs with verl's metrics alone (intervals over seeds only). Not
covered: when one method reaches another's accuracy (first_hit.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, nan

import numpy as np

from vlnorm_verl.methods import MEAN_OVER_TOKENS, SUM_OVER_M, method_of
from vlnorm_verl.report import estimates
from vlnorm_verl.report.estimates import Estimate, Scores, kendall, over_seeds, pass_at_k, rank_correlation
from vlnorm_verl.report.run import Logged, Run, Validation, logged_accuracies, value_at

K = 8  # of Pass@k, the paper's
OVER_SEEDS = "over seeds only"

Score = Callable[[Validation], dict[str, float]]  # what each problem scores


def averages(validation: Validation) -> dict[str, float]:
    """The share of correct responses; its mean is Avg@n."""
    return dict(zip(validation.problems, (validation.correct / validation.n).tolist(), strict=True))


def passes(validation: Validation) -> dict[str, float]:
    """Unbiased Pass@K of the problems with K responses; of none where scores are not 0 and 1."""
    kept = np.flatnonzero(validation.binary & (validation.n >= K))
    values = pass_at_k(validation.n[kept], validation.correct[kept], K)
    return dict(zip([validation.problems[index] for index in kept], values.tolist(), strict=True))


def same_seed(runs: Sequence[Run], reference: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Each run with the one of the reference that has its seed."""
    return [(run, other) for run in runs for other in reference if run.seed == other.seed]


# ------------------------------------------------------------------------------------------------------- over steps


def validation_sets(runs: Sequence[Run]) -> list[str]:
    """Names of the validation sets of these runs, sorted."""
    names = {name for run in runs for name in logged_accuracies(run)}
    names |= {name for run in runs for sets in run.validations.values() for name in sets}
    return sorted(names)


def same_sets(runs: Sequence[Run]) -> bool:
    """Whether all of these runs were validated on the same sets; accuracies on others are not comparable."""
    return len({tuple(validation_sets([run])) for run in runs}) < 2


def validated_steps(run: Run) -> list[int]:
    """Steps with a validation that verl logged; of a run without any such metric, those with a dump."""
    logged = {int(s) for acc in logged_accuracies(run).values() for s in run.steps[np.isfinite(acc.values)]}
    return sorted(logged or run.validations)


def unfinished(run: Run) -> bool:
    """Whether its last validation is before its planned end; of a run without a planned end that is not known."""
    return run.planned_steps is not None and max(validated_steps(run), default=0) < run.planned_steps


def set_sizes(run: Run) -> dict[str, int]:
    """Problems of each validation set, from the dumps."""
    sizes: dict[str, int] = {}
    for sets in run.validations.values():
        for name, validation in sets.items():
            sizes[name] = max(sizes.get(name, 0), len(validation.problems))
    return sizes


def has_no_average(run: Run) -> bool:
    """Whether it has several validation sets whose sizes are not all known, so that they have no weighted average."""
    names = validation_sets([run])
    return len(names) > 1 and not set_sizes(run).keys() >= set(names)


def accuracy_curve(run: Run, name: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(steps [T], Avg@n [T]) of one validation set, or of all weighted by size (None).

    verl's own value where it is logged, else the dump's. Empty for several sets of unknown size.
    """
    logged, names = logged_accuracies(run), validation_sets([run]) if name is None else [name]
    sizes = set_sizes(run)
    if name is None and has_no_average(run):
        return np.empty(0, dtype=np.int64), np.empty(0)
    weights = np.array([sizes.get(name, 1) for name in names], dtype=np.float64)
    steps, values = [], []
    for step in validated_steps(run):
        of_sets = [_accuracy_at(run, logged, step, name) for name in names]
        if np.isfinite(of_sets).all():
            steps.append(step)
            values.append(float(weights @ of_sets / weights.sum()))
    return np.array(steps, dtype=np.int64), np.array(values)


def _accuracy_at(run: Run, logged: dict[str, Logged], step: int, name: str) -> float:
    if name in logged and (value := value_at(run, logged[name].values, step)) is not None:
        return value
    validation = run.validations.get(step, {}).get(name)
    return nan if validation is None else float((validation.correct / validation.n).mean())


def entropy_per_token(run: Run) -> np.ndarray | None:
    """`actor/entropy` [T] as nats a token. verl aggregates it by the run's loss_agg_mode, so its scale is the mode's.

    Approximate where the metric is a mean over mini-batches or counts rejected tokens (docs/your-own-run.md).
    None where the sum of the token weights is not known: neither logged by the plugin nor to be had from M.
    """
    entropy = run.metrics.get("actor/entropy")
    if entropy is None:
        return None
    weighted = run.metrics.get("actor/vl_norm/weighted_tokens")
    divisor = run.metrics.get("actor/vl_norm/divisor")
    if weighted is not None and divisor is not None:
        return np.asarray(entropy * divisor / np.where(weighted > 0, weighted, nan))
    kind = method_of(run.mode or run.method).entropy
    if kind == MEAN_OVER_TOKENS:
        return entropy
    lengths = run.metrics.get("response_length/mean")
    if kind == SUM_OVER_M and run.scale_factor and lengths is not None:
        return np.asarray(entropy * run.scale_factor / np.where(lengths > 0, lengths, nan))
    return None


def cut_off_share(run: Run) -> np.ndarray | None:
    """`response_length/clip_ratio` [T] as the share of responses that are cut off at the limit.

    verl counts the responses that are as long as the batch is wide (metric_utils.py:460). The V1 trainer pads a batch
    to its longest response only, so there the share is never 0. As logged where limit or longest is not known.
    """
    share, longest = (run.metrics.get(f"response_length/{name}") for name in ("clip_ratio", "max"))
    if share is None or longest is None or run.limit is None:
        return share
    return np.asarray(np.where(longest < run.limit, 0.0, share))


def trailing_mean(steps: np.ndarray, values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value and those before it that are less than `window` steps away."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.searchsorted(steps, np.asarray(steps) - window, side="right")
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


# ------------------------------------------------------------------------------------------------------- at one step


def shared_steps(runs: Sequence[Run]) -> set[int]:
    """Steps at which at least half of these runs, of those with a validation, were validated; all if there is none.

    One seed that is ahead thus does not leave out the others, and one that died early does not hold them back.
    """
    validated = [steps for run in runs if (steps := validated_steps(run))]
    counts = Counter(step for steps in validated for step in steps)
    return {step for step, count in counts.items() if 2 * count >= len(validated)} or set(counts)


def final_step(runs: Sequence[Run]) -> int | None:
    return max(shared_steps(runs), default=None)


def at_step(runs: Sequence[Run], step: int | None) -> list[Run]:
    """Those of the runs that were validated at a step."""
    return [run for run in runs if step in validated_steps(run)]


def final_runs(runs: Sequence[Run]) -> list[Run]:
    """Those of the runs that final values are of."""
    return at_step(runs, final_step(runs))


def common_step(runs: Sequence[Run], reference: Sequence[Run]) -> int | None:
    """The last step at which at least half of each side were validated, else at which one of each was."""
    steps, other = ({step for run in side for step in validated_steps(run)} for side in (runs, reference))
    return max(shared_steps(runs) & shared_steps(reference) or steps & other, default=None)


def undumped(runs: Sequence[Run], step: int, name: str | None = None) -> list[Run]:
    """Those of the runs without a dump of a step, or of a validation set there, that can be used."""
    names = validation_sets(runs) if name is None else [name]
    return [run for run in runs if any(name not in run.validations.get(step, {}) for name in names)]


def scores(runs: Sequence[Run], step: int, score: Score = averages, name: str | None = None) -> Scores | None:
    """Of each run's validation at a step, on the problems that all runs have.

    None if a run has no dump of it, or if less than half of a run's problems are in all (verl draws another part of the
    validation set for each seed if data.val_max_samples is less than all). Problems without a score (Pass@8 of seven
    responses) are left out; None if that is all of them.
    """
    names = validation_sets(runs) if name is None else [name]
    if undumped(runs, step, name):
        return None
    found = _on_shared_problems([run.validations[step] for run in runs], names, score)
    return None if found is None else Scores(*found, tuple(run.seed for run in runs))


def _on_shared_problems(
    dumped: Sequence[dict[str, Validation]], names: Sequence[str], score: Score
) -> tuple[np.ndarray, tuple[str, ...], tuple[int, ...]] | None:
    """(scores [R, P], problems, sizes of the sets) of R validations; None if less than half of one's are in all."""
    problems: list[str] = []
    sizes, blocks = [], []
    for name in names:
        tables = [score(sets[name]) for sets in dumped]
        shared = sorted(set.intersection(*map(set, tables)))
        if not shared or 2 * len(shared) < max(map(len, tables)):
            return None
        problems += [f"{name}/{problem}" for problem in shared]
        sizes.append(len(shared))
        blocks.append([[table[problem] for problem in shared] for table in tables])
    return np.concatenate(blocks, axis=1), tuple(problems), tuple(sizes)


def final_accuracy(runs: Sequence[Run], name: str | None = None) -> Estimate | None:
    """Avg@n of the last validation; None without a validation or, over several sets, without their sizes."""
    step = final_step(runs)
    return None if step is None else accuracy_at(runs, step, name)


def accuracy_at(runs: Sequence[Run], step: int, name: str | None = None) -> Estimate | None:
    """The same at a step, of the runs that were validated there."""
    runs = at_step(runs, step)
    if not same_sets(runs) and name is None:
        return Estimate(nan, note="other validation sets in each seed")
    if (estimate := _over_problems(runs, step, averages, name)) is not None:
        return estimate
    values = _values_at(runs, step, name)
    if not values:
        return None
    estimate = over_seeds(values, 0.0, 1.0) if is_rate(runs) else over_seeds(values)
    lacking = [str(run.seed) for run in undumped(runs, step, name)]
    note = "no dumps"
    if len(lacking) < len(runs):
        note = f"no usable dump of seed{'s' * (len(lacking) > 1)} {', '.join(lacking)} at step {step}"
    return replace(estimate, note=f"{note}, {OVER_SEEDS}" if len(values) > 1 else note)


def _values_at(runs: Sequence[Run], step: int, name: str | None = None) -> list[float]:
    """The accuracies of the runs that have one at a step, without intervals."""
    curves = [accuracy_curve(run, name) for run in runs]
    return [float(accuracies[steps == step][0]) for steps, accuracies in curves if step in steps]


def final_pass(runs: Sequence[Run]) -> Estimate | None:
    """Unbiased Pass@8 of the last validation; None without dumps of 0/1 scores and eight responses."""
    step = final_step(runs)
    return None if step is None else _over_problems(at_step(runs, step), step, passes)


def _over_problems(runs: Sequence[Run], step: int, score: Score, name: str | None = None) -> Estimate | None:
    """Over problems, and seeds where there are several; None if a run has no dump of the step."""
    table = scores(runs, step, score, name)
    if table is None:
        tables = [of_run for run in runs if (of_run := scores([run], step, score, name)) is not None]
        return estimates.mean_over_own_problems(tables) if len(tables) == len(runs) > 1 else None
    names = validation_sets(runs) if name is None else [name]
    most = sum(max(set_sizes(run).get(name, 0) for run in runs) for name in names)
    used = len(table.problems)
    return estimates.mean(table).noted("" if used == most else f"{used} of {most} problems")


def difference(runs: Sequence[Run], reference: Sequence[Run]) -> Estimate | None:
    """Accuracy of `runs` minus that of `reference` at the last step that both have; None without accuracies there.

    Paired as far as there are dumps of the same problems; where dumps are missing, by seed only. Where fewer than half
    of the problems are the same, or without several seeds that both have, the plain difference, without an interval.
    Seeds that both have are compared, unless that is one of several: then all seeds of both where each has several,
    else that one seed without an interval (it would be of problems only). The note names the step where it is not
    both's last, and how many seeds where not all. NaN with other validation sets.
    """
    if not same_sets([*runs, *reference]):
        return Estimate(nan, note="other validation sets, so no comparison")
    step = common_step(runs, reference)
    if step is None:
        return Estimate(nan, note="no validated step in common")
    notes = [] if final_step(runs) == final_step(reference) == step else [f"at step {step}"]
    every = {run.seed for run in [*runs, *reference]}
    runs, reference = at_step(runs, step), at_step(reference, step)
    shared = {run.seed for run in runs} & {run.seed for run in reference}
    lone = len(shared) == 1 and shared != every and 1 in (len(runs), len(reference))
    if lone or len(shared) > 1:
        runs, reference = ([run for run in side if run.seed in shared] for side in (runs, reference))
        if shared != every:
            notes.append(f"{len(shared)} of {len(every)} seeds" + (": no interval" if lone else ""))
    estimate = _difference_at(runs, reference, step)
    if estimate is None:
        return None
    return (replace(estimate, low=nan, high=nan, one_seed=True) if lone else estimate).noted(*notes)


def _difference_at(runs: Sequence[Run], reference: Sequence[Run], step: int) -> Estimate | None:
    table, other_table = scores(runs, step), scores(reference, step)
    note = "not paired"
    try:
        if table is not None and other_table is not None:
            return estimates.difference(table, other_table)
        pairs = _pairs_of_seeds(runs, reference, step)
        if len(pairs) == len(runs) == len(reference) > 1:
            return estimates.difference_over_own_problems(pairs)
        if len(runs) > 1 and [run.seed for run in runs] == [run.seed for run in reference]:
            ours, theirs = _values_at(runs, step), _values_at(reference, step)
            if len(ours) == len(theirs) == len(runs):
                most = 1.0 if is_rate([*runs, *reference]) else inf
                return over_seeds(np.subtract(ours, theirs).tolist(), -most, most).noted(OVER_SEEDS)
    except estimates.OtherProblems:
        note = "not paired, other problems"
    accuracy, other = accuracy_at(runs, step), accuracy_at(reference, step)
    return None if accuracy is None or other is None else Estimate(accuracy.value - other.value, note=note)


def _pairs_of_seeds(runs: Sequence[Run], reference: Sequence[Run], step: int) -> list[tuple[Scores, Scores]]:
    """The scores of each seed that has a dump on both sides, which may be of problems of its own."""
    pairs = [(scores([run], step), scores([other], step)) for run, other in same_seed(runs, reference)]
    return [(table, other) for table, other in pairs if table is not None and other is not None]


def own_best(runs: Sequence[Run]) -> float | None:
    """verl's best@8/mean at the last validation, mean over seeds and, by size, over validation sets.

    Of the variable that the accuracy is of. It is a bootstrap with replacement of the eight responses, and lies below
    the unbiased Pass@8.
    """
    step, of_runs = final_step(runs), []
    for run in final_runs(runs):
        names, sizes, logged = validation_sets([run]), set_sizes(run), logged_accuracies(run)
        if step is None or has_no_average(run):
            return None
        keys = [f"val-core/{name}/{logged[name].variable}/best@{K}/mean" for name in names if name in logged]
        columns = [run.metrics[key] for key in keys if key in run.metrics]
        values = [value for column in columns if (value := value_at(run, column, step)) is not None]
        if len(values) < len(names):
            return None
        of_runs.append(float(np.average(values, weights=[sizes.get(name, 1) for name in names])))
    return float(np.mean(of_runs)) if of_runs else None


def accuracy_name(runs: Sequence[Run]) -> str:
    """Avg@8, or of how many responses the accuracies are; the metric's name where it is another."""
    _, counts = accuracies_of(runs)
    other = next((run.metric for run in runs if run.metric and counts <= {0}), "")
    return other or (f"Avg@{next(iter(counts))}" if len(counts) == 1 else "Avg@k")


def is_rate(runs: Sequence[Run]) -> bool:
    """Whether the accuracies are means of what is in [0, 1]; a reward beyond it and any other metric have own units."""
    logged = [accuracy.values for run in runs for accuracy in logged_accuracies(run).values()]
    within = not any((values < 0).any() or (values > 1).any() for values in logged)
    return within and accuracy_name(runs) not in {run.metric for run in runs}


def accuracies_of(runs: Sequence[Run]) -> tuple[set[str], set[int]]:
    """What the runs' accuracies are means of: variables of the reward, and numbers of responses to a problem.

    That number is 0 of another metric without dumps.
    """
    logged = [accuracy for run in runs for accuracy in logged_accuracies(run).values()]
    dumped = [validation for run in runs for sets in run.validations.values() for validation in sets.values()]
    counts = {accuracy.n for accuracy in logged} | {int(counts.n.max()) for counts in dumped}
    return {accuracy.variable for accuracy in logged}, (counts - {0}) or counts


def monotonicity(runs: Sequence[Run]) -> Estimate | None:
    """Kendall's τ-b between step and accuracy over the validations of each run, mean over seeds.

    Interval: over seeds; for one seed over problems; none with two validations, where τ is −1 or 1 whatever they are.
    """
    runs = final_runs(runs)
    curves = [accuracy_curve(run) for run in runs]
    if not curves or any(len(steps) < 2 for steps, _ in curves):
        return None
    correlations = [float(kendall(values[None])[0]) for _, values in curves]
    if not np.isfinite(correlations).all():
        return None
    if min(len(steps) for steps, _ in curves) < 3:
        estimate = Estimate(float(np.mean(correlations)), note="two validations")
        return estimate.of_one_seed() if len(runs) == 1 else estimate
    if len(runs) > 1:
        return over_seeds(correlations, -1.0, 1.0)
    steps, curve = curves[0]
    table = _over_steps(runs[0], steps)
    if isinstance(table, str):
        return Estimate(correlations[0], note=table).of_one_seed()
    return rank_correlation(curve, *table)


def _over_steps(run: Run, steps: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]] | str:
    """(scores [T, P] of the problems that every validation has, sizes of the sets), or why there is no such table."""
    names = validation_sets([run])
    dumped = [run.validations.get(int(step), {}) for step in steps]
    if any(name not in sets for sets in dumped for name in names):
        return "no dumps" if not run.validations else "not every validation has a dump"
    found = _on_shared_problems(dumped, names, averages)
    if found is None:
        return "other problems in each validation"
    values, _, sizes = found
    return "a set of one problem" if min(sizes) < 2 else (values, sizes)
