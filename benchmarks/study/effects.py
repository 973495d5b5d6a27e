"""The numbers of the analysis: effects of the 2 × 2 design, their tests in order, intervals over blocks, time scales.

`Blocks` are {method: [B] one number a block}, or of curves [B, T], the accuracy of each step. Intervals are of 95%.
Tests in order: Maurer, Hothorn and Lehmacher 1995; two one-sided tests: Schuirmann 1987; probability of improvement:
Agarwal et al. 2021, arXiv 2108.13264.
"""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from vlnorm_verl.report.estimates import LEVEL, TAIL, Estimate, expanded_tail
from vlnorm_verl.report.first_hit import first_hit

Blocks = dict[str, np.ndarray]
GRPO, DAPO, DR_GRPO, VL = "grpo_norm", "dapo_norm", "dr_grpo_norm", "vl_norm:1"
MARGIN = 0.015  # a scale effect within it counts as none
TARGET = 0.5  # accuracy whose first step is compared
RESAMPLES, FITS = 10_000, 500


def weighting_effect(y: Blocks) -> np.ndarray:
    """Of weights 1/L instead of equal ones, mean over both scales, [B]."""
    return np.asarray((y[GRPO] + y[VL] - y[DAPO] - y[DR_GRPO]) / 2)


def scale_effect(y: Blocks) -> np.ndarray:
    """Of the constant scale 1/M instead of one that moves with the lengths, mean over both weightings, [B]."""
    return np.asarray((y[VL] + y[DR_GRPO] - y[GRPO] - y[DAPO]) / 2)


def interaction(y: Blocks) -> np.ndarray:
    """By how much the effect of the scale is larger with weights 1/L than with equal ones, [B]."""
    return np.asarray(y[VL] - y[GRPO] - y[DR_GRPO] + y[DAPO])


def without_levels(y: Blocks, groups: np.ndarray) -> Blocks:
    """Each group of blocks moved to the mean of all: what is left differs by method and run. groups: [B] labels."""
    level = np.mean([*y.values()], axis=0)
    means = np.array([level[groups == group].mean() for group in groups])
    return {method: of - means + level.mean() for method, of in y.items()}


def p_difference(effect: np.ndarray) -> float:
    """Of Student's t, two-sided; 1 where all are 0."""
    return float(stats.ttest_1samp(effect, 0).pvalue) if effect.any() else 1.0


def p_equivalence(effect: np.ndarray) -> float:
    """The larger of the two one-sided tests of |mean| ≥ MARGIN."""
    above = stats.ttest_1samp(effect, -MARGIN, alternative="greater").pvalue
    return float(max(above, stats.ttest_1samp(effect, MARGIN, alternative="less").pvalue))


class Test(NamedTuple):
    """p: None where the test was not made."""

    question: str
    effect: np.ndarray
    p: float | None
    verdict: str


def tests_in_order(y: Blocks) -> list[Test]:
    """Each is made only if the one before is established, so that a study errs with 5% at most."""
    questions: list[tuple[str, np.ndarray, Callable[[np.ndarray], float]]] = [
        ("1. the weighting effect is not 0", weighting_effect(y), p_difference),
        ("2. VL Norm (α = 1) − DAPO Norm is not 0", y[VL] - y[DAPO], p_difference),
        (f"3. the scale effect is within ±{MARGIN}", scale_effect(y), p_equivalence),
    ]
    found, go_on = list[Test](), True
    for question, effect, test in questions:
        p = test(effect) if go_on else None
        go_on = p is not None and p < 1 - LEVEL
        found.append(Test(question, effect, p, "established" if go_on else "not tested" if p is None else "open"))
    return found


def bootstrap(*samples: np.ndarray, statistic: Callable[..., Any] = np.mean) -> Estimate:
    """Expanded percentiles over blocks, samples paired. No interval where nothing varies."""
    value = float(statistic(*samples))
    if all(np.ptp(sample) == 0 for sample in samples):
        return Estimate(value, note="the same in every block")
    level = 1 - 2 * expanded_tail(len(samples[0]) - 1)
    found = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, paired=True, confidence_level=level, method="percentile", rng=0
    ).confidence_interval
    if found.low == found.high:
        return Estimate(value, note="the same in every resample")
    return Estimate(value, float(found.low), float(found.high))


def interquartile_mean(values: np.ndarray, axis: int = -1) -> Any:
    return stats.trim_mean(values, 0.25, axis=axis)


def probability_of_improvement(a: np.ndarray, b: np.ndarray, axis: int = -1) -> Any:
    """That a run of a is better than a run of b, a tie counting half; [..., B] -> [...]."""
    return (np.sign(a[..., :, None] - b[..., None, :]).mean((-2, -1)) + 1) / 2


def correlation(y: Blocks, groups: np.ndarray) -> float:
    """Of two methods over blocks, without the means of groups of blocks; mean over pairs: what pairing can gain."""
    rest = [v - np.array([v[groups == group].mean() for group in groups]) for v in y.values()]
    return float(np.corrcoef(rest)[np.triu_indices(len(rest), 1)].mean())


def p_equal_spread(y: Blocks, groups: np.ndarray) -> float:
    """Of Brown and Forsythe's test that runs of all methods spread alike around their group's level."""
    return float(stats.levene(*without_levels(y, groups).values()).pvalue)


def residual_spread(y: Blocks) -> Estimate:
    """Standard deviation of a run around the means of its method and of its block."""
    table = np.array([*y.values()])
    squares = float(((table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()) ** 2).sum())
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    low, high = (float((squares / stats.chi2.ppf(tail, freedom)) ** 0.5) for tail in (1 - TAIL, TAIL))
    return Estimate((squares / freedom) ** 0.5, low, high)


def steps_to(curves: np.ndarray) -> float:
    """First step at which the mean over blocks of each one's running maximum reaches TARGET; NaN if it never does."""
    best = np.maximum.accumulate(curves, axis=1).mean(0)
    return float(first_hit(np.arange(1, len(best) + 1), best, TARGET) or nan)


def time_scales(curves: Blocks, own_plateaus: bool = False) -> dict[str, float]:
    """τ of a + b·(1 − exp(−step/τ)) for each method, least squares of the means over blocks.

    a is shared, and b, too, unless each method has a plateau of its own.
    """
    means = np.array([of.mean(0) for of in curves.values()])
    plateaus = len(means) if own_plateaus else 1
    step = np.arange(1, means.shape[1] + 1)

    def distance(x: np.ndarray) -> np.ndarray:
        a, b, log_tau = np.split(x, [1, 1 + plateaus])
        return np.asarray((a + b[:, None] * (1 - np.exp(-step / np.exp(log_tau)[:, None])) - means).ravel())

    first = [means[:, 0].mean(), *[np.ptp(means)] * plateaus, *[np.log(len(step) / 2)] * len(means)]
    return dict(zip(curves, np.exp(optimize.least_squares(distance, first).x[-len(means) :]).tolist(), strict=True))


def speed_up(curves: Blocks, steps_of: Callable[[Blocks], dict[str, float]], resamples: int) -> dict[str, Estimate]:
    """How many times fewer steps than DAPO Norm each method has. Expanded percentiles over blocks."""
    blocks = len(curves[DAPO])

    def ratios(chosen: np.ndarray) -> list[float]:
        steps = steps_of({method: of[chosen] for method, of in curves.items()})
        return [steps[DAPO] / steps[method] for method in curves]

    drawn = np.array([ratios(c) for c in np.random.default_rng(0).integers(blocks, size=(resamples, blocks))])
    tail = expanded_tail(blocks - 1)
    # A curve that never reaches TARGET is NaN: 0 at the lower end, ∞ at the upper.
    low = np.quantile(np.nan_to_num(drawn, nan=0.0), tail, axis=0, method="nearest")
    high = np.quantile(np.nan_to_num(drawn, nan=np.inf), 1 - tail, axis=0, method="nearest")
    ends = zip(ratios(np.arange(blocks)), low.tolist(), high.tolist(), strict=True)
    return dict(zip(curves, (Estimate(*end) for end in ends), strict=True))


def speed_ups(curves: Blocks) -> dict[str, list[Estimate]]:
    """By the steps to TARGET, by the τ of one plateau for all methods, by that of a plateau of its own for each."""
    found = [
        speed_up(curves, lambda some: {method: steps_to(of) for method, of in some.items()}, RESAMPLES),
        speed_up(curves, time_scales, FITS),
        speed_up(curves, lambda some: time_scales(some, own_plateaus=True), FITS),
    ]
    return {method: [of[method] for of in found] for method in curves}
