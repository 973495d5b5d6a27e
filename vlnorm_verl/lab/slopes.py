"""How ‖g_i − E g_i‖² grows with the length L_i: the exponent β of the paper's Figure 4, on prompts with many responses.

E g_i of a prompt is the mean of its other responses (leave one out). What their noise adds is taken off before β is
fitted to the mean of the deviations (`unbiased_deviations`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlnorm_verl.lab.gram import Floats, Ints, inner_products, squared_distances
from vlnorm_verl.lab.jackknife import mean_over_prompts, percentiles
from vlnorm_verl.lab.store import Group
from vlnorm_verl.report.estimates import Estimate

RESAMPLES = 500
BETAS = np.linspace(-2.0, 5.0, 141)  # where β is looked for


def deviations(products: Floats) -> Floats:
    """‖g_i − mean of the others‖² [n] of the responses of one prompt, from their products [n, n], n ≥ 3."""
    n = len(products)
    return squared_distances(products) * (n / (n - 1)) ** 2


def unbiased_deviations(products: Floats) -> Floats:
    """An unbiased estimate of E‖g_i − μ‖² for each response [n]; can be negative. n ≥ 3.

    With e_i = ‖g_i − mean‖² and V_i = E‖g_i − μ‖²: E e_i = V_i (1 − 2/n) + ΣV/n², and E Σe = ΣV (1 − 1/n).
    """
    n = len(products)
    e = squared_distances(products)
    return (e - e.sum() / (n * (n - 1))) / (1 - 2 / n)


Points = list[tuple[Ints, Floats]]  # (L, d) of each prompt [n]


def log_log_slopes(points: Points, counts: Sequence[Floats]) -> Floats:
    """Least squares of log d on log L with an intercept for each prompt; d > 0.

    counts: how often each response is taken, [R, n] of each prompt: R resamples.

    Returns:
        [R].
    """
    across, along = 0.0, 0.0
    for (lengths, d), count in zip(points, counts, strict=True):
        x, y = np.log(lengths), np.log(d)
        n = count.sum(axis=1)
        across = across + count @ x**2 - (count @ x) ** 2 / n
        along = along + count @ (x * y) - (count @ x) * (count @ y) / n
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample of one length has no slope
        return np.asarray(along / across)


def mean_slopes(points: Points, counts: Sequence[Floats]) -> Floats:
    """β of E d = c L^β with a constant c for each prompt: quasi-likelihood of a gamma model; single d may be negative.

    The least squares of log d answer another question: they fit the mean of the logarithm, which the distribution of d
    around its mean shifts. The variance of a mini-batch is made of means of d.

    β is the root of Σ_p n_p [mean of log L weighted by d L^-β − mean of log L] = 0, which falls with β.

    counts: as for `log_log_slopes`.

    Returns:
        [R]; NaN where there is no root between the ends of `BETAS`.
    """
    total = 0.0
    for (lengths, d), count in zip(points, counts, strict=True):
        x = np.log(lengths) - np.log(lengths).mean()
        weighted = d[:, None] * np.exp(-np.outer(x, BETAS))  # [n, betas]
        below = count @ weighted
        n = count.sum(axis=1, keepdims=True)
        total = (
            total + n * (count @ (weighted * x[:, None])) / np.where(below > 0, below, np.nan) - (count @ x)[:, None]
        )
    scores = np.asarray(total)
    falls = (scores[:, :-1] > 0) & (scores[:, 1:] <= 0)
    at = falls.argmax(axis=1)
    rows = np.arange(len(scores))
    high, low = scores[rows, at], scores[rows, at + 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        solution = BETAS[at] + (BETAS[1] - BETAS[0]) * high / (high - low)
    return np.where(falls.any(axis=1), solution, np.nan)


@dataclass(frozen=True)
class Slope:
    """How ‖g_i − E g_i‖² grows with L_i on the prompts with many responses.

    log_log: exponent of Figure 4's points, bootstrap over the responses of these prompts.
    mean: exponent of the mean (`mean_slopes`), the same bootstrap. α = this β has the least variance if E[g | L], and
    the variance at a given length, are the same for all prompts and lengths.
    over_prompts: mean of the single prompts' exponents, t interval: for the mean β of the task's prompts. Without an
    interval where a prompt's is beyond `BETAS`: the others would be selected by their value.
    points: (L, d) of each prompt, d by leave-one-out.
    """

    part: str
    score_only: bool
    log_log: Estimate
    mean: Estimate
    over_prompts: Estimate
    points: Points

    @property
    def interval(self) -> Estimate:
        """`mean` with an interval that holds its own, which may be skewed, and one as wide as that over prompts."""
        value, half = self.mean.value, (self.over_prompts.high - self.over_prompts.low) / 2
        if math.isfinite(half):
            return Estimate(value, min(self.mean.low, value - half), max(self.mean.high, value + half), self.mean.note)
        return Estimate(value, note=self.over_prompts.note)


def slope(groups: Sequence[Group], part: str, columns: slice, score_only: bool, seed: int) -> Slope | None:
    """β of some columns of the groups' gradients. None if no prompt has gradients and lengths that differ."""
    left_out, unbiased = [], []
    for group in groups:
        of_prompt = inner_products([group], columns, score_only)
        d = deviations(of_prompt.products)
        if np.all(d > 0) and len(np.unique(of_prompt.lengths)) > 1:
            left_out.append((of_prompt.lengths, d))
            unbiased.append((of_prompt.lengths, unbiased_deviations(of_prompt.products)))
    if not left_out:
        return None
    rng = np.random.default_rng(seed)
    counts = []
    for lengths, _ in left_out:
        n = len(lengths)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
        counts.append(np.concatenate([np.ones((1, n)), drawn]))  # the sample itself first
    each = [mean_slopes([point], [count[:1]])[0] for point, count in zip(unbiased, counts, strict=True)]
    return Slope(
        part=part,
        score_only=score_only,
        log_log=percentiles(log_log_slopes(left_out, counts)),
        mean=percentiles(mean_slopes(unbiased, counts)),
        over_prompts=mean_over_prompts(np.array(each)),
        points=left_out,
    )
