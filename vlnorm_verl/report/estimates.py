"""Estimates of accuracy with 95% intervals: Avg@k, Pass@k, differences, rank correlation. No files, no runs.

Scores are a table [S × P]: S seeds of a method (one training run each), P problems that all of them answered. Problems
and seeds are both samples, and they are crossed: the same problems for every seed.

| what is given | interval                                                                                            |
|---------------|-----------------------------------------------------------------------------------------------------|
| one seed      | bootstrap over problems (a problem's responses stay together), percentiles at Hesterberg's expanded |
|               | levels; widened where Wilson's interval of the same variance reaches further (rates near 0 or 1)    |
| several seeds | half² = t²(S−1)·V_S + t²(P−1)·max(0, V_P − V_E), at least t²(P−1)·V_P, by moments of the two-way   |
|               | table: V_S and V_P are the variances of the means of seeds and of problems over their number, V_E   |
|               | the rest, which both contain; a rate's interval is of Wilson's form                                 |
| … with other  | t over the S means, not narrower than the problems alone give (verl draws other problems for each   |
| problems each | seed where data.val_max_samples is less than the set)                                               |
| difference    | the same of the per-problem differences, without Wilson's form; see `difference`                    |
| all 0 or 1    | Clopper-Pearson of P trials, one response to each problem, since nothing can be resampled           |

Why no bootstrap over seeds: percentiles of resampled seeds lie inside the range of the S measured means. Why a t of its
own for each component (Howe 1974) and not Satterthwaite's degrees of freedom for the sum: with two or three seeds those
are themselves a guess, and the interval covers 86 to 92% where seeds differ about as much as problems; this one covers
94 to 99%, since nothing is taken from the seeds' variance that happens to be small. It is wider where seeds do not
matter: a mean's twice with S = 2, a paired difference's four times. An interval of one seed holds for that one training
run, and the tables say "one seed". What still covers too little: rates below 5% on 30 problems (down to 86%). Measured:
benchmarks/coverage.py.

Sources: Hesterberg 2015, "What teachers should know about the bootstrap", for the levels; Owen 2007, "The pigeonhole
bootstrap", for variances in crossed tables; Chen et al. 2021, arXiv 2107.03374, for Pass@k.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000  # the ends of the interval then have a Monte-Carlo error of 1.4% of its half width
RESAMPLING_SEED = 0
TAIL = (1 - LEVEL) / 2
NOTHING = 1e-9  # a half width or a spread below it is rounding


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; `low` and `high` are NaN where there is none.

    note: what to know of it. one_seed: whether it says nothing of how seeds vary.
    """

    value: float
    low: float = nan
    high: float = nan
    note: str = ""
    one_seed: bool = False

    @property
    def state(self) -> str:
        """Of a difference: "established" (the interval does not reach 0), "open", "one seed" or "no interval"."""
        if self.one_seed:
            return "one seed"
        if not isfinite(self.low):
            return "no interval"
        return "established" if self.low > 0 or self.high < 0 else "open"

    def of_one_seed(self) -> Estimate:
        return replace(self, note="; ".join(filter(None, ("one seed", self.note))), one_seed=True)

    def noted(self, *notes: str) -> Estimate:
        """With these notes behind its own."""
        return replace(self, note="; ".join(filter(None, (self.note, *notes))))


class OtherProblems(ValueError):
    """Two samples of scores have too few problems in common to be paired by them."""


@dataclass(frozen=True)
class Scores:
    """What the seeds of one method scored on the problems of one or more validation sets.

    values: [S, P] score of each problem in each seed, in [0, 1].
    problems: P identities. Those of one set stand together, sets in the order of `sizes`.
    sizes: problems of each set; resampling is within a set, and the mean over all problems weights sets by size.
    seeds: S numbers.
    """

    values: np.ndarray
    problems: tuple[str, ...]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]


def pass_at_k(n: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased chance that one of k responses is correct, 1 − C(n−c, k) / C(n, k), of each problem [P].

    As a product of k factors, so that no binomial coefficient has to be held. n ≥ k ≥ 1 and whole correct responses are
    the caller's to see to.
    """
    failing = np.ones(n.shape)
    for i in range(k):
        failing *= np.maximum(n - correct - i, 0) / (n - i)
    return 1.0 - failing


# ---------------------------------------------------------------------------------------------------------- intervals


def mean(scores: Scores) -> Estimate:
    """Mean over problems and seeds, in [0, 1]."""
    estimate = _interval([scores.values], scores.sizes, rate=True)
    return estimate.of_one_seed() if len(scores.seeds) == 1 else estimate


def difference(a: Scores, b: Scores) -> Estimate:
    """Mean of a minus mean of b over the problems that both have, in [−1, 1]; the note says how many, if not all.

    Problems are paired. Seeds are paired if both have the same seed numbers (one data order, one start); else they are
    independent samples and the variance over seeds of both adds. Where one of the two has a single seed, nothing is
    known of how seeds vary: over problems only, and the note says so.

    Raises:
        OtherProblems: less than half of the problems of one are in both.
    """
    most = max(len(a.problems), len(b.problems))
    a, b = _on_common_problems(a, b)
    if lone := 1 in (len(a.seeds), len(b.seeds)):
        samples = [(a.values.mean(0) - b.values.mean(0))[None]]
    else:
        samples = [a.values - b.values] if a.seeds == b.seeds else [a.values, b.values]
    estimate = _interval(samples, a.sizes, rate=False)
    note = "" if len(a.problems) == most else f"{len(a.problems)} of {most} problems"
    return (estimate.of_one_seed() if lone else estimate).noted(note)


def mean_over_own_problems(tables: Sequence[Scores]) -> Estimate:
    """Mean of seeds that each have problems of their own: one Scores of one seed for each."""
    return _nested([table.values[0] for table in tables], [table.sizes for table in tables], rate=True)


def difference_over_own_problems(pairs: Sequence[tuple[Scores, Scores]]) -> Estimate:
    """The same of a minus b, paired in each seed by the problems of that seed.

    Raises:
        OtherProblems: in one of them, see `difference`.
    """
    shared = [_on_common_problems(a, b) for a, b in pairs]
    return _nested([(a.values - b.values)[0] for a, b in shared], [a.sizes for a, _ in shared], rate=False)


def _nested(values: list[np.ndarray], sizes: list[tuple[int, ...]], rate: bool) -> Estimate:
    """Seeds and problems vary together: Student's t over the seeds' means, not narrower than the problems alone."""
    means, note = np.array([of_seed.mean() for of_seed in values]), "other problems in each seed"
    value, count = float(means.mean()), len(means)
    if min(map(min, sizes)) < 2:
        return Estimate(value, note=note).noted("a set of one problem")
    within = [_over_problems(of_seed, size) for of_seed, size in zip(values, sizes, strict=True)]
    of_problems = sum(variance for variance, _ in within) / count**2
    quantile = t_quantile(sum(freedom for _, freedom in within))
    half = max(t_half_width(means), quantile * of_problems**0.5)
    return _around(value, half, min(map(len, values)), rate).noted(note)


def over_seeds(values: Sequence[float], low: float = -np.inf, high: float = np.inf) -> Estimate:
    """Mean of one number per seed with Student's t interval, cut to [low, high]."""
    numbers = np.asarray(values, dtype=np.float64)
    value = float(numbers.mean())
    if len(numbers) < 2:
        return Estimate(value).of_one_seed()
    if np.ptp(numbers) <= 1e-6 * np.abs(numbers).max():  # tensorboard's float32
        return Estimate(value, note="the same in every seed")
    half = t_half_width(numbers)
    return Estimate(value, max(low, value - half), min(high, value + half))


def t_half_width(values: np.ndarray) -> float:
    """Half the width of Student's 95% interval of the mean of two values or more."""
    return float(t_quantile(len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def rank_correlation(curve: np.ndarray, values: np.ndarray, sizes: tuple[int, ...]) -> Estimate:
    """Kendall's τ-b between the order of validations and the score of one run, interval over problems.

    The bootstrap gives the standard error only, and the interval is normal around τ: a resampled curve is noisier than
    the measured one, so its τ lies lower on average and percentiles would too.

    Args:
        curve: [T] mean score of each validation, which may be of more problems than `values`.
        values: [T, P] score of each problem at each.
        sizes: as in Scores.
    """
    from scipy.stats import norm

    value = float(kendall(curve[None])[0])
    if not isfinite(value):
        return Estimate(nan, note="constant")
    resampled = kendall(resampled_means(values, sizes))
    resampled = resampled[np.isfinite(resampled)]
    spread = float(resampled.std()) if len(resampled) else 0.0
    if spread < NOTHING:
        return Estimate(value, note="the same in every resample").of_one_seed()
    half = float(norm.isf(TAIL)) * spread
    return Estimate(value, max(-1.0, value - half), min(1.0, value + half)).of_one_seed()


def kendall(curves: np.ndarray) -> np.ndarray:
    """τ-b [B] of curves [B, T] against their order, which has no ties; NaN for a constant curve.

    Values that are equal but for their last bits are ties.
    """
    length = curves.shape[1]
    concordant, untied = np.zeros(len(curves)), np.zeros(len(curves))
    for lag in range(1, length):
        rise = curves[:, lag:] - curves[:, :-lag]
        up, down = (rise > 5e-10).sum(1), (rise < -5e-10).sum(1)
        concordant += up - down
        untied += up + down
    with np.errstate(invalid="ignore"):
        return np.asarray(concordant / np.sqrt(untied * (length * (length - 1) / 2)))


@functools.lru_cache(maxsize=4)  # 40 kB a problem each; Math has four sets
def resampling_counts(sizes: tuple[int, ...]) -> np.ndarray:
    """How often each resample has each problem, float32 [RESAMPLES, P]; one table for all runs on these problems.

    The same table for every run makes differences of resampled means paired.
    """
    generator = np.random.default_rng(RESAMPLING_SEED)
    counts: np.ndarray = np.empty((RESAMPLES, sum(sizes)), dtype=np.float32)
    start = 0
    for size in sizes:
        # In parts, since all that is drawn would take 160 kB a problem.
        for block in np.split(counts[:, start : start + size], RESAMPLES // 500):
            drawn = generator.integers(size, size=block.shape) + np.arange(len(block))[:, None] * size
            block[:] = np.bincount(drawn.ravel(), minlength=block.size).reshape(block.shape)
        start += size
    return counts


def resampled_means(values: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Mean over problems of each row of values [T, P] in each resample, [RESAMPLES, T]."""
    return np.asarray(resampling_counts(sizes) @ values.T.astype(np.float32) / values.shape[1], dtype=np.float64)


def _interval(samples: list[np.ndarray], sizes: tuple[int, ...], rate: bool) -> Estimate:
    """Of the mean of a sample [S, P], or of the first's minus the second's, whose seeds are independent of the first's.

    rate: whether it lies in [0, 1], else in [−1, 1].
    """
    first, *others = samples
    value = float(first.mean() - sum(other.mean() for other in others))
    of_problems = first.mean(0) - sum(other.mean(0) for other in others)
    if min(sizes) < 2:
        return Estimate(value, note="a set of one problem")
    variance, freedom = _over_problems(of_problems, sizes)
    quantile = t_quantile(freedom)
    half = quantile * variance**0.5
    if several := len(first) > 1:
        rest = sum(_rest(values, sizes) for values in samples)
        of_seeds = sum(t_half_width(values.mean(1)) ** 2 for values in samples)
        half = max(half, (of_seeds + quantile**2 * max(0.0, variance - rest)) ** 0.5)
    estimate = _around(value, half, len(of_problems), rate)
    if several or half < NOTHING:
        return estimate
    means = resampled_means(of_problems[None], sizes)[:, 0]
    tail = expanded_tail(freedom)
    low, high = float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))
    if rate:
        low, high = min(low, estimate.low), max(high, estimate.high)
    return _cut(value, low, high, rate)


def _around(value: float, half: float, trials: int, rate: bool) -> Estimate:
    """value ± half, of a rate in Wilson's form; without an interval where nothing varies, unless all is 0 or all 1."""
    if half < NOTHING:
        if rate and value in (0.0, 1.0):
            return Estimate(value, *_all_alike(value, trials))
        return Estimate(value, note="the same in every problem")
    low, high = _wilson(value, half) if rate else (value - half, value + half)
    return _cut(value, low, high, rate)


def _cut(value: float, low: float, high: float, rate: bool) -> Estimate:
    return Estimate(value, max(0.0 if rate else -1.0, float(low)), min(1.0, float(high)))


def t_quantile(freedom: float) -> float:
    """Of Student's t at this module's level, both sides."""
    from scipy.stats import t

    return float(t.isf(TAIL, freedom))


def _wilson(value: float, half: float) -> tuple[float, float]:
    """Wilson's interval of a rate whose symmetric one is value ± half: of half = t·√(p(1−p)/n), solved for n."""
    ratio = half**2 / (value * (1 - value))  # t²/n
    centre, width = value + ratio / 2, float(np.sqrt(half**2 + ratio**2 / 4))
    return (centre - width) / (1 + ratio), (centre + width) / (1 + ratio)


def expanded_tail(freedom: float) -> float:
    """Tail probability of the percentile interval that makes up for its narrowness (Hesterberg 2015, equation 8)."""
    from scipy.stats import norm

    return float(norm.sf(np.sqrt((freedom + 1) / freedom) * t_quantile(freedom)))


def _over_problems(values: np.ndarray, sizes: tuple[int, ...]) -> tuple[float, float]:
    """(variance of the mean of values [P], its degrees of freedom); sets are strata."""
    parts = np.array([block.var(ddof=1) * len(block) for block in _sets(values, sizes)]) / len(values) ** 2
    total, squares = float(parts.sum()), float((parts**2 / (np.array(sizes) - 1)).sum())
    return total, total**2 / squares if squares > 0 else float(sum(sizes) - len(sizes))


def _sets(values: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1], axis=-1)


def _rest(values: np.ndarray, sizes: tuple[int, ...]) -> float:
    """The part of the variance of the mean of values [S, P] that is neither seeds' nor problems'."""
    seeds, problems = values.shape
    total = 0.0
    for block in _sets(values, sizes):
        rest = block - block.mean(0) - block.mean(1, keepdims=True) + block.mean()
        size = block.shape[1]
        total += float((rest**2).sum()) / ((seeds - 1) * (size - 1)) * size / (seeds * problems**2)
    return total


def _all_alike(value: float, trials: int) -> tuple[float, float]:
    """Clopper-Pearson's interval after `trials` equal results: one response to each problem would be such a trial."""
    from scipy.stats import binomtest

    interval = binomtest(round(value) * trials, trials).proportion_ci(LEVEL, method="exact")
    return float(interval.low), float(interval.high)


def _on_common_problems(a: Scores, b: Scores) -> tuple[Scores, Scores]:
    """Both on the problems that both have; at least half of those of either, in each set: else it is another mean."""
    if a.problems == b.problems and a.sizes == b.sizes:
        return a, b
    if len(a.sizes) != len(b.sizes):
        raise OtherProblems("the two were not scored on the same validation sets")
    place = {problem: index for index, problem in enumerate(b.problems)}
    kept = [index for index, problem in enumerate(a.problems) if problem in place]
    problems = tuple(a.problems[index] for index in kept)
    set_of: np.ndarray = np.repeat(np.arange(len(a.sizes)), a.sizes)
    sizes = tuple(np.bincount(set_of[kept], minlength=len(a.sizes)).tolist())
    if any(2 * size < max(most) for size, *most in zip(sizes, a.sizes, b.sizes, strict=True)):
        raise OtherProblems("the two have less than half of their problems in common")
    in_b = [place[problem] for problem in problems]
    return Scores(a.values[:, kept], problems, sizes, a.seeds), Scores(b.values[:, in_b], problems, sizes, b.seeds)
