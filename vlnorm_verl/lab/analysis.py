"""What per-response gradients say about loss aggregation. Inner products and numpy only: no model, no verl.

Response i of length L_i has, on policy, the gradient g_i = A_i s_i with the score gradient s_i = Σ_t ∇ log π(o_it).
A mini-batch's gradient is G = Σ_i x_i g_i, with the x_i of `vlnorm_verl.aggregation`; here they are multiplied by M, so
that Σ x_i is 1 for Dr. GRPO Norm and VL Norm.

Two kinds of groups are read (see `store.Group`):

    deep    few prompts with many responses: how ‖g_i − E g_i‖² grows with L_i (the paper's Figure 4)
    pool    many prompts with few responses, as in training: mini-batches are drawn from them (Figures 1 and 5, Table 1)

How noise is kept out of the answers:

- ‖E G‖² and every product of means is an average of products of mini-batches that share no prompt. The plug-in
  ‖mean‖² is too large by the variance of the mean.
- ‖g_i − E g_i‖² takes the mean of the other responses (leave one out). What their noise adds is taken off before β is
  fitted to the mean of the deviations (`unbiased_deviations`).
- Intervals are 95%: bootstrap of the responses for β, else a jackknife that leaves out a block of prompts at a time.
  An unbiased estimate of a squared norm can be negative. Where one that is divided by is, in the estimate or in a
  replicate of the jackknife, the result is NaN with a note.

Covered: one model at a time. Not covered: gradients off policy (clipping), several updates, Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from vlnorm_verl.files import UserError
from vlnorm_verl.lab.store import Group, Stored
from vlnorm_verl.report.estimates import Estimate

Floats: TypeAlias = np.ndarray  # float64
Ints: TypeAlias = np.ndarray  # int64
Bools: TypeAlias = np.ndarray

ALPHAS = tuple(round(0.125 * step, 3) for step in range(17))  # 0 to 2, the range that the plugin accepts
REFERENCE = "dr_grpo_norm"  # Σx = 1 and equal weights: unbiased whatever E[g | L] is
LEAST_VARIANCE = "vl_norm:1"
COMPARED = ("grpo_norm", "dapo_norm", REFERENCE, "vl_norm:0.5", "vl_norm:0.75", LEAST_VARIANCE)
THIRDS = ("short", "middle", "long")
BLOCKS = 16  # of prompts (or responses), for the jackknife
ROUNDS = 64  # of dealing the pool's prompts out into mini-batches
RESAMPLES = 500
LOST = "lost in noise"
BETAS = np.linspace(-2.0, 5.0, 141)  # where β is looked for


@dataclass(frozen=True)
class Responses:
    """Responses and the inner products of their gradients.

    prompts: index of the prompt of each, int [N]. lengths: tokens, int [N]. products: g_i·g_j, float64 [N, N].
    """

    prompts: Ints
    lengths: Ints
    products: Floats

    def of(self, chosen: Bools) -> Responses:
        """Those where `chosen` [N] is true."""
        return Responses(self.prompts[chosen], self.lengths[chosen], self.products[np.ix_(chosen, chosen)])


def responses(groups: Sequence[Group], columns: slice = slice(None), score_only: bool = False) -> Responses:
    """The responses of groups, with the products of a part of their gradients.

    Args:
        groups: of one kind.
        columns: which coordinates of the stored gradients.
        score_only: with A = 1 for every response instead of its advantage.
    """
    sizes = [len(group.lengths) for group in groups]
    advantages = np.concatenate(
        [np.ones(n) if score_only else g.advantages for n, g in zip(sizes, groups, strict=True)]
    )
    start, stop, _ = columns.indices(groups[0].score_gradients.shape[1])
    gram = np.zeros((sum(sizes), sum(sizes)))
    width = max(1, 2**24 // sum(sizes))  # columns at a time: at most 128 MB in float64, however large the gradients
    for first in range(start, stop, width):
        chunk = slice(first, min(first + width, stop))
        part = np.concatenate([np.asarray(group.score_gradients[:, chunk], dtype=np.float64) for group in groups])
        gram += part @ part.T
    return Responses(
        prompts=np.repeat(np.arange(len(groups)), sizes),
        lengths=np.concatenate([np.asarray(group.lengths, dtype=np.int64) for group in groups]),
        products=gram * np.outer(advantages, advantages),
    )


# ------------------------------------------------------------------------------------------- deviation against length


def deviations(products: Floats) -> Floats:
    """‖g_i − mean of the others‖² [n] of the responses of one prompt, from their products [n, n], n ≥ 3."""
    n = len(products)
    return _squared_distances(products) * (n / (n - 1)) ** 2


def unbiased_deviations(products: Floats) -> Floats:
    """An unbiased estimate of E‖g_i − μ‖² for each response [n]; can be negative. n ≥ 3.

    With e_i = ‖g_i − mean‖² and V_i = E‖g_i − μ‖²: E e_i = V_i (1 − 2/n) + ΣV/n², and E Σe = ΣV (1 − 1/n).
    """
    n = len(products)
    e = _squared_distances(products)
    return (e - e.sum() / (n * (n - 1))) / (1 - 2 / n)


def _squared_distances(products: Floats) -> Floats:
    """‖g_i − mean‖² [n]."""
    distances = np.diag(products) - 2 * products.mean(axis=1) + products.mean()
    return np.maximum(distances, 0.0)  # rounding


Points = list[tuple[Floats, Floats]]  # (L, d) of each prompt [n]


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
    with np.errstate(invalid="ignore"):
        root = BETAS[at] + (BETAS[1] - BETAS[0]) * high / (high - low)
    return np.where(falls.any(axis=1), root, np.nan)


@dataclass(frozen=True)
class Slope:
    """How ‖g_i − E g_i‖² grows with L_i on the deep prompts.

    log_log: exponent of Figure 4's points, bootstrap over the responses of these prompts.
    mean: exponent of the mean (`mean_slopes`), the same bootstrap. α = this β has the least variance.
    over_prompts: mean of the single prompts' `each`, t interval: for the mean β of the task's prompts.
    each: exponents of the mean of the single prompts.
    points: (L, d) of each prompt, d by leave-one-out.
    """

    part: str
    score_only: bool
    log_log: Estimate
    mean: Estimate
    over_prompts: Estimate
    each: list[float]
    points: Points

    @property
    def interval(self) -> Estimate:
        """`mean` with the half width of the wider of the two intervals."""
        half = max(float(np.nan_to_num(one.high - one.low)) / 2 for one in (self.mean, self.over_prompts))
        known = half > 0 and math.isfinite(self.mean.value)
        return Estimate(self.mean.value, self.mean.value - half, self.mean.value + half) if known else self.mean


def slope(groups: Sequence[Group], part: str, columns: slice, score_only: bool, seed: int) -> Slope | None:
    """β of the deep groups. None if no prompt has gradients that differ (all rewards equal)."""
    left_out, unbiased = [], []
    for group in groups:
        one = responses([group], columns, score_only)
        d = deviations(one.products)
        if len(d) >= 3 and np.all(d > 0) and len(np.unique(one.lengths)) > 1:
            lengths: Floats = one.lengths.astype(np.float64)
            left_out.append((lengths, d))
            unbiased.append((lengths, unbiased_deviations(one.products)))
    if not left_out:
        return None
    rng = np.random.default_rng(seed)
    counts = []
    for lengths, _ in left_out:
        n = len(lengths)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
        counts.append(np.concatenate([np.ones((1, n)), drawn]))  # the sample itself first
    each = [float(mean_slopes([point], [count[:1]])[0]) for point, count in zip(unbiased, counts, strict=True)]
    return Slope(
        part=part,
        score_only=score_only,
        log_log=_percentiles(log_log_slopes(left_out, counts)),
        mean=_percentiles(mean_slopes(unbiased, counts)),
        over_prompts=_t_interval(np.array(each)),
        each=each,
        points=left_out,
    )


def _percentiles(values: Floats) -> Estimate:
    """The first value, with the percentile interval of the others."""
    others = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or len(others) < 0.9 * (len(values) - 1):
        return Estimate(float(values[0]), note="too few responses")
    return Estimate(float(values[0]), float(np.quantile(others, 0.025)), float(np.quantile(others, 0.975)))


def _t_interval(values: Floats) -> Estimate:
    from scipy.stats import t

    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Estimate(float(values.mean()) if len(values) else math.nan, note="one prompt")
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


# ------------------------------------------------------------------------------------------------------- the jackknife


def blocks_of(count: int) -> Ints:
    """A block for each of `count` prompts, at most BLOCKS of them and of nearly equal size."""
    return np.arange(count) % min(BLOCKS, count)


def kept(blocks: Ints) -> Bools:
    """What is kept, bool [1 + blocks, units]: everything first, then all but one block."""
    return np.concatenate([np.ones((1, len(blocks)), dtype=bool), np.unique(blocks)[:, None] != blocks])


def jackknife(values: Floats, log: bool = False) -> list[Estimate]:
    """Estimates with 95% t intervals.

    Args:
        values: a vector of statistics for each row of `kept`, [1 + blocks, K]; NaN for what cannot be said.
        log: whether the interval is made for the logarithm (of ratios and norms). A value ≤ 0 then has none.
    """
    from scipy.stats import t

    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.log(values) if log else values
    count = len(values) - 1
    spread = scaled[1:] - scaled[1:].mean(axis=0)
    half = t.ppf(0.975, count - 1) * np.sqrt((count - 1) / count * (spread**2).sum(axis=0))
    results = []
    for value, middle, width in zip(values[0], scaled[0], half, strict=True):
        if not np.isfinite(middle) or not np.isfinite(width):
            results.append(Estimate(math.nan, note=LOST))
            continue
        low, high = float(middle - width), float(middle + width)
        results.append(Estimate(float(value), *((math.exp(low), math.exp(high)) if log else (low, high))))
    return results


def _root(values: Floats) -> Floats:
    """√, NaN for what is not positive: an unbiased estimate of a squared norm that noise has made negative."""
    return np.sqrt(np.where(values > 0, values, np.nan))


# ------------------------------------------------------------------------------------------- mini-batches from the pool


def factor(products: Floats) -> Floats:
    """F [N, r] with F Fᵀ = products [N, N]: each gradient in the r ≤ N dimensions that all of them span."""
    values, vectors = np.linalg.eigh(products)
    kept = values > 1e-12 * max(values[-1], 0.0)
    return np.asarray(vectors[:, kept] * np.sqrt(values[kept]))


def draw_mini_batches(prompts: int, size: int, seed: int) -> Bools:
    """Which prompts are in which mini-batch: bool [R, prompts], ROUNDS rounds one after the other.

    Each round deals all prompts out into mini-batches of `size` prompts, so that every prompt is used nearly as often
    and no two mini-batches of a round share one.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(ROUNDS):
        order = rng.permutation(prompts)
        for first in range(0, prompts - size + 1, size):
            row: Bools = np.zeros(prompts, dtype=bool)
            row[order[first : first + size]] = True
            rows.append(row)
    return np.array(rows)


def weights(mode: str, lengths: Ints, members: Bools, scale: float) -> tuple[Floats, Floats]:
    """M·x_i of each response in each mini-batch, and its z(L_i), float64 [R, N]; 0 where it is not a member.

    Args:
        mode: as in verl's config, `vl_norm:0.75`.
        lengths: int [N]. members: bool [R, N]. scale: M, tokens.
    """
    import torch

    from vlnorm_verl.registry import parse_mode

    aggregation = parse_mode(mode)
    exact = torch.as_tensor(lengths, dtype=torch.float64)
    numerators, summands = aggregation.numerator(exact).numpy(), aggregation.summand(exact).numpy()
    x = members * numerators / (members @ summands)[:, None] * (1.0 if aggregation.divide_by_m else scale)
    return x, members * summands


class MiniBatches:
    """Gradients G of mini-batches drawn from the pool, under several aggregations, as inner products."""

    def __init__(self, pool: Responses, modes: Sequence[str], size: int, scale: float, seed: int) -> None:
        """
        Args:
            pool: responses of P prompts, numbered from 0.
            modes: what to compare; `REFERENCE` must be one of them.
            size: prompts of a mini-batch, at most P/2, so that a round has two or more.
            scale: M, tokens.
        """
        self.modes, self.size, self.pool = list(modes), size, pool
        self.prompts = int(pool.prompts.max()) + 1
        if not 1 <= size <= self.prompts // 2:
            raise ValueError(
                f"mini-batches of {size} prompts from {self.prompts}: accepted are 1 to {self.prompts // 2}"
            )
        self.members = draw_mini_batches(self.prompts, size, seed)
        of_response = self.members[:, pool.prompts]
        both = {mode: weights(mode, pool.lengths, of_response, scale) for mode in self.modes}
        self.x = {mode: x for mode, (x, _) in both.items()}
        self._factor = factor(pool.products)
        self._block = blocks_of(self.prompts)[pool.prompts]
        gradients = {mode: self._gradients(x, z) for mode, (x, z) in both.items()}
        # [1 + blocks, modes, 4]: E Σx, E‖G‖², ‖E G‖² and E G·E G(reference); of everything, then without the responses
        # of one block of prompts at a time.
        self.moments = np.stack(
            [
                [self._averages(*one, reference[1]) for one, reference in zip(of, gradients[REFERENCE], strict=True)]
                for of in gradients.values()
            ],
            axis=1,
        )

    def _gradients(self, x: Floats, z: Floats) -> list[tuple[Floats, Floats]]:
        """(Σx [R], G [R, r]) of the mini-batches: with everything, then without one block at a time.

        A mini-batch without a block is the same draw with that block's part of x taken out and Σ_j z_j made up for, so
        that the replicates differ by the data alone and not by what was drawn. NaN if nothing of it is left.
        """
        whole = x @ self._factor
        found = [(x.sum(axis=1), whole)]
        for name in np.unique(self._block):
            at = self._block == name
            left = z.sum(axis=1) - z[:, at].sum(axis=1)
            up = np.divide(z.sum(axis=1), left, out=np.full_like(left, np.nan), where=left > 1e-9 * z.sum(axis=1))
            part = x[:, at]
            found.append(((x.sum(axis=1) - part.sum(axis=1)) * up, (whole - part @ self._factor[at]) * up[:, None]))
        return found

    def _averages(self, sums: Floats, g: Floats, reference: Floats) -> Floats:
        """E Σx, E‖G‖², ‖E G‖², E G·E G(reference); the last two over pairs of mini-batches of one round."""
        there = np.isfinite(sums)
        g, reference = np.where(there[:, None], g, 0.0), np.where(there[:, None], reference, 0.0)

        def of_pairs(a: Floats, b: Floats) -> float:
            """Σ over pairs r ≠ s of one round of a_r·b_s, from the rounds' totals."""
            totals = [v.reshape(ROUNDS, -1, v.shape[1]).sum(axis=1) for v in (a, b)]
            return float((totals[0] * totals[1]).sum() - (a * b).sum())

        count = there.reshape(ROUNDS, -1).sum(axis=1)
        pairs = (count * (count - 1)).sum()
        return np.array(
            [
                sums[there].mean(),
                (g * g).sum() / there.sum(),
                of_pairs(g, g) / pairs if pairs else math.nan,
                of_pairs(g, reference) / pairs if pairs else math.nan,
            ]
        )

    def row(self, mode: str) -> int:
        return self.modes.index(mode)

    def estimate(self, statistic: Callable[[Floats], Floats], log: bool = False) -> list[Estimate]:
        """Jackknife over prompts of a vector function of the moments [modes, 4]."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return jackknife(np.array([statistic(moments) for moments in self.moments]), log)

    def predicted_noise(self, mode: str, beta: float) -> float:
        """√(E Σx² L^β) / E Σx: the closed form's noise for a given sum of weights, in units of √V."""
        x = self.x[mode]
        return float(np.sqrt((x**2 @ self.pool.lengths.astype(np.float64) ** beta).mean()) / x.sum(axis=1).mean())


@dataclass(frozen=True)
class Method:
    """One aggregation on mini-batches of the pool, predicted and measured.

    sum_x: E Σ M x_i. By the model this is also the length of E G in units of Dr. GRPO's: compare `scale`.
    scale: component of E G along Dr. GRPO's E G, in units of its length, measured.
    cosine: between E G and Dr. GRPO's E G; 1 by the model.
    noise, noise_predicted, noise_by_beta: standard deviation of G for a given sum of weights, over that of VL Norm with
        α = 1: measured; by the closed forms (variance ∝ L); by variance ∝ L^β with the measured β.
    cv, cv_predicted: coefficient of variation of G, √(E‖G − E G‖²)/‖E G‖.
    variance: E‖G − E G‖² in units of ‖E G(Dr. GRPO)‖².
    bias: ‖E G − E G(Dr. GRPO)‖² in the same units, without the noise's share, so it can be negative; by the model it is
        (sum_x − 1)².
    """

    mode: str
    sum_x: float
    scale: Estimate
    cosine: Estimate
    noise: Estimate
    noise_predicted: float
    noise_by_beta: float
    cv: Estimate
    cv_predicted: float
    variance: Estimate
    bias: Estimate


def compare(batches: MiniBatches, modes: Sequence[str], beta: float) -> list[Method]:
    """The table of methods. `beta`: measured exponent of the variance, NaN if there is none."""
    chosen = [batches.row(mode) for mode in modes]
    reference, least = batches.row(REFERENCE), batches.row(LEAST_VARIANCE)

    def variance(m: Floats) -> Floats:
        return m[:, 1] - m[:, 2]

    def noise(m: Floats) -> Floats:
        per_weight = _root(variance(m)) / m[:, 0]
        return per_weight[chosen] / per_weight[least]

    def bias(m: Floats) -> Floats:
        return _relative((m[:, 2] - 2 * m[:, 3] + m[reference, 2])[chosen], m[reference, 2])

    scale = batches.estimate(lambda m: _relative(m[chosen, 3], m[reference, 2]))
    cosine = batches.estimate(lambda m: m[chosen, 3] / (_root(m[chosen, 2]) * _root(m[reference, 2])))
    noises = batches.estimate(noise, log=True)
    cv = batches.estimate(lambda m: _root(variance(m)[chosen]) / _root(m[chosen, 2]), log=True)
    biases = batches.estimate(bias)
    variances = batches.estimate(lambda m: _relative(variance(m)[chosen], m[reference, 2]), log=True)
    mean_square = batches.moments[0, reference, 2]  # ‖μ‖²
    per_token = (np.diag(batches.pool.products).mean() - mean_square) / batches.pool.lengths.mean()  # V
    predicted = {mode: batches.predicted_noise(mode, 1.0) for mode in modes}
    by_beta = {mode: batches.predicted_noise(mode, beta) for mode in (*modes, LEAST_VARIANCE)}
    return [
        Method(
            mode=mode,
            sum_x=float(batches.x[mode].sum(axis=1).mean()),
            scale=scale[k],
            cosine=cosine[k],
            noise=noises[k],
            noise_predicted=predicted[mode] / batches.predicted_noise(LEAST_VARIANCE, 1.0),
            noise_by_beta=by_beta[mode] / by_beta[LEAST_VARIANCE],
            cv=cv[k],
            cv_predicted=math.sqrt(per_token / mean_square) * predicted[mode] if mean_square > 0 else math.nan,
            variance=variances[k],
            bias=biases[k],
        )
        for k, mode in enumerate(modes)
    ]


def _relative(values: Floats, unit: Floats) -> Floats:
    """values / unit; NaN if the unit, an unbiased estimate of a squared norm, is not positive."""
    return values / unit if unit > 0 else np.full_like(values, np.nan)


# ------------------------------------------------------------------------------------------------------------ which α


@dataclass(frozen=True)
class Tradeoff:
    """Bias, variance and mean squared error of VL Norm(α) about Dr. GRPO's E G, in units of ‖E G(Dr. GRPO)‖².

    alphas [K]. bias, scale, cosine: as in `Method`, of the mini-batches drawn: VL Norm normalises within a mini-batch,
    so the part of the bias that is between prompts grows with the mini-batch, a little. variance, error: of a
    mini-batch of `responses` responses, the variance scaled from those drawn as 1/size. best: the α of least error; NaN
    where ‖E G(Dr. GRPO)‖² is not above 0 by its interval. among: the least and largest α whose error the data do not
    tell from the best one's. alignment: E G·E G(Dr. GRPO) / √(E‖G‖² ‖E G(Dr. GRPO)‖²), which no factor common to all
    updates changes; 1 is an update without noise. best_aligned: the α of the largest.
    """

    responses: int
    alphas: Sequence[float]
    bias: list[Estimate]
    scale: list[Estimate]
    cosine: list[Estimate]
    variance: list[Estimate]
    error: list[Estimate]
    alignment: list[Estimate]
    best: float
    among: tuple[float, float]
    best_aligned: float


def tradeoff(batches: MiniBatches, responses_of_batch: int) -> Tradeoff:
    """Mean squared error against α.

    Args:
        batches: with the modes `vl_norm:α` of all `ALPHAS`.
        responses_of_batch: responses of the optimizer mini-batch that the answer is for.
    """
    rows = [batches.row(mode_of(alpha)) for alpha in ALPHAS]
    reference = batches.row(REFERENCE)
    drawn = batches.size * len(batches.pool.prompts) / batches.prompts  # responses of a mini-batch drawn
    shrink = drawn / responses_of_batch

    def parts(m: Floats) -> tuple[Floats, Floats]:
        bias = m[rows, 2] - 2 * m[rows, 3] + m[reference, 2]
        return bias, (m[rows, 1] - m[rows, 2]) * shrink

    def error(m: Floats) -> Floats:
        bias, variance = parts(m)
        return bias + variance

    def alignment(m: Floats) -> Floats:
        return m[rows, 3] / (_root(m[rows, 2] + parts(m)[1]) * _root(m[reference, 2]))

    best = int(np.argmin(error(batches.moments[0])))
    # Differences in their own unit: the reference's norm, common to all, is the noisiest number here.
    behind = batches.estimate(lambda m: error(m) - error(m)[best])
    alike = [a for a, one in zip(ALPHAS, behind, strict=True) if a == ALPHAS[best] or not one.low > 0]
    known = batches.estimate(lambda m: m[[reference], 2])[0].low > 0
    aligned = batches.estimate(alignment)
    return Tradeoff(
        responses=responses_of_batch,
        alphas=ALPHAS,
        bias=batches.estimate(lambda m: _relative(parts(m)[0], m[reference, 2])),
        scale=batches.estimate(lambda m: _relative(m[rows, 3], m[reference, 2])),
        cosine=batches.estimate(lambda m: m[rows, 3] / (_root(m[rows, 2]) * _root(m[reference, 2]))),
        variance=batches.estimate(lambda m: _relative(parts(m)[1], m[reference, 2]), log=True),
        error=batches.estimate(lambda m: _relative(error(m), m[reference, 2]), log=True),
        alignment=aligned,
        best=ALPHAS[best] if known else math.nan,
        among=(min(alike), max(alike)) if known else (math.nan, math.nan),
        best_aligned=max(zip(ALPHAS, aligned, strict=True), key=lambda one: one[1].value)[0] if known else math.nan,
    )


def mode_of(alpha: float) -> str:
    return f"vl_norm:{alpha:g}"


# ------------------------------------------------------------------------------- what "unbiased" assumes: E[g | length]


@dataclass(frozen=True)
class Thirds:
    """E[g | third of the lengths], short to long.

    where: "across prompts" (thirds of all lengths of the pool) or "within prompts" (of each deep prompt's lengths).
    length: mean length of each third. norm: ‖E[g | third]‖, without the noise's share.
    cosine: {(a, b): cosine of the means of two thirds}, corrected for noise, so that a value above 1 is noise.
    plain: {(a, b): cosine of the plain means of two disjoint halves of the data}; with a = b it is the noise floor:
        what two halves of one and the same third agree in.
    difference: {(a, b): ‖difference of the means‖² over the mean of the two squared norms}; 0 if E[g | L] is the same.
    """

    where: str
    length: list[float]
    norm: list[Estimate]
    cosine: dict[tuple[int, int], Estimate]
    plain: dict[tuple[int, int], float]
    difference: dict[tuple[int, int], Estimate]


PAIRS = ((0, 1), (1, 2), (0, 2))


def thirds(of: Responses, within: bool, seed: int) -> Thirds | None:
    """E[g | third] from products of different prompts, or (`within`) of different responses of one prompt.

    None where there are fewer than three lengths. Prompts with fewer are left out.
    """
    third: Ints = np.full(len(of.lengths), -1)
    scopes = [of.prompts == p for p in np.unique(of.prompts)] if within else [np.ones(len(third), dtype=bool)]
    for scope in scopes:
        distinct = np.unique(of.lengths[scope])
        if len(distinct) < 3:
            continue
        # Where many responses were cut at one length, those are the long third.
        edges = np.minimum(np.quantile(of.lengths[scope], [1 / 3, 2 / 3]), distinct[[-3, -2]])
        third[scope] = np.searchsorted(edges, of.lengths[scope], side="left")
    onehot = (third[:, None] == np.arange(3)).astype(np.float64)  # [N, 3]
    if onehot.sum(axis=0).min() < 2:
        return None
    same = of.prompts[:, None] == of.prompts
    allowed = (same & ~np.eye(len(same), dtype=bool) if within else ~same).astype(np.float64)
    products = of.products * allowed

    def inner(keep: Bools) -> Floats:
        """Products of the means of two thirds [3, 3]."""
        chosen = onehot * keep[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            return (chosen.T @ products @ chosen) / (chosen.T @ allowed @ chosen)

    # Blocks of prompts; within prompts, of responses, so that what is said is said of these prompts.
    position = np.concatenate([np.arange(n) for n in np.bincount(of.prompts)]) if within else of.prompts
    inners = [inner(keep) for keep in kept(blocks_of(int(position.max()) + 1)[position])]

    def estimate(statistic: Callable[[Floats], Floats], log: bool = False) -> list[Estimate]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return jackknife(np.array([statistic(products_of_means) for products_of_means in inners]), log)

    a, b = np.array(PAIRS).T

    def difference(m: Floats) -> Floats:
        d = np.diag(m)
        scale = (d[a] + d[b]) / 2
        return (d[a] + d[b] - 2 * m[a, b]) / np.where(scale > 0, scale, np.nan)

    cosines = estimate(lambda m: m[a, b] / (_root(np.diag(m)[a]) * _root(np.diag(m)[b])))
    return Thirds(
        where="within prompts" if within else "across prompts",
        length=[float(of.lengths[third == t].mean()) for t in range(3)],
        norm=estimate(lambda m: _root(np.diag(m)), log=True),
        cosine=dict(zip(PAIRS, cosines, strict=True)),
        plain=_half_cosines(of, third, within, seed),
        difference=dict(zip(PAIRS, estimate(difference), strict=True)),
    )


def _half_cosines(
    of: Responses, third: Ints, within: bool, seed: int, splits: int = 100
) -> dict[tuple[int, int], float]:
    """Mean over random halves of cos(mean of third a in one half, mean of third b in the other)."""
    rng = np.random.default_rng(seed)
    scopes = [of.prompts == p for p in np.unique(of.prompts)] if within else [np.ones(len(third), dtype=bool)]
    pairs = [*PAIRS, *((t, t) for t in range(3))]
    found: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    for _ in range(splits):
        in_first = (
            rng.random(len(third)) < 0.5 if within else (rng.permutation(of.prompts.max() + 1) % 2 == 0)[of.prompts]
        )
        for scope in scopes:
            means = np.array(
                [[(scope & (in_first == half) & (third == t)) for t in range(3)] for half in (True, False)]
            )
            counts = means.sum(axis=-1, keepdims=True)
            if counts.min() == 0:
                continue
            first, second = means / counts
            norms = [np.sqrt(np.einsum("ti,ij,tj->t", m, of.products, m)) for m in (first, second)]
            cross = first @ of.products @ second.T
            for x, y in pairs:
                if norms[0][x] * norms[1][y] > 0:
                    found[x, y].append(cross[x, y] / (norms[0][x] * norms[1][y]))
    return {pair: float(np.mean(values)) if values else math.nan for pair, values in found.items()}


# ------------------------------------------------------------------------------------ the mean gradient as lengths grow


@dataclass(frozen=True)
class Growth:
    """‖E G‖ of each method on prompts with short, middle and long responses, in units of Dr. GRPO's over all prompts.

    length: mean length of each class of prompts. norm: {mode: measured, one for each class}. predicted: {mode: E Σ M
    x_i}, which is the norm if E g is the same for all prompts and lengths. along: {mode: component along Dr. GRPO's E G
    of the same class, in units of its length}: what the weights alone change.
    """

    length: list[float]
    norm: dict[str, list[Estimate]]
    predicted: dict[str, list[float]]
    along: dict[str, list[Estimate]]


def growth(pool: Responses, modes: Sequence[str], scale: float, unit: float, seed: int) -> Growth | None:
    """None if the pool has fewer than 12 prompts: four in each class are the least to draw from.

    unit: ‖E G‖² of Dr. GRPO over the whole pool; taken as known.
    """
    prompts = int(pool.prompts.max()) + 1
    if prompts < 12:
        return None
    means = np.bincount(pool.prompts, weights=pool.lengths) / np.bincount(pool.prompts)
    result = Growth([], {mode: [] for mode in modes}, {mode: [] for mode in modes}, {mode: [] for mode in modes})
    for chosen in np.array_split(np.argsort(means, kind="stable"), 3):
        part = pool.of(np.isin(pool.prompts, chosen))
        part = Responses(np.unique(part.prompts, return_inverse=True)[1], part.lengths, part.products)
        batches = MiniBatches(part, modes, max(1, len(chosen) // 4), scale, seed)
        reference = batches.row(REFERENCE)
        norms = batches.estimate(lambda m: _root(m[:, 2] / unit if unit > 0 else m[:, 2] * np.nan), log=True)
        along = batches.estimate(lambda m, r=reference: _relative(m[:, 3], m[r, 2]))  # type: ignore[misc]
        result.length.append(float(part.lengths.mean()))
        for k, mode in enumerate(modes):
            result.norm[mode].append(norms[k])
            result.along[mode].append(along[k])
            result.predicted[mode].append(float(batches.x[mode].sum(axis=1).mean()))
    return result


# ------------------------------------------------------------------------------------------------------ all of a model


@dataclass(frozen=True)
class Analysis:
    """All that is said of one model by the gradients of some of its parameters.

    name: of the model. gradients: which parameters. entries: how many numbers; columns: projected to so many. lengths:
    of the pool's responses. reward: mean of the pool's. truncated: share of its responses that were cut. prompts: of
    the pool; speaking: those of them whose rewards differ, so that they have advantages. deep: [prompts, responses of
    each]. drawn: responses of a mini-batch drawn from the pool.
    """

    name: str
    gradients: str
    entries: int
    columns: int
    settings: dict[str, Any]
    lengths: Ints
    reward: float
    truncated: float
    prompts: int
    speaking: int
    deep: tuple[int, int]
    slopes: list[Slope]
    methods: list[Method]
    drawn: int
    tradeoffs: list[Tradeoff]
    thirds: list[Thirds]
    growth: Growth | None

    @property
    def slope(self) -> Slope | None:
        """β of all selected parameters with the real advantages."""
        return next((s for s in self.slopes if s.part == "all" and not s.score_only), None)


def analyse(stored: Stored, name: str, gradients: str, mini_batch: int, seed: int = 0) -> Analysis:
    """Everything, of one model's stored gradients.

    Args:
        name, gradients: see `Analysis`.
        mini_batch: responses of the optimizer mini-batch for which an α is wanted.

    Raises:
        UserError: there are no deep prompts, or too few in the pool.
    """
    deep = [group for group in stored.groups if group.kind == "deep"]
    pool = [group for group in stored.groups if group.kind == "pool"]
    if not deep or len(pool) < 4:
        raise UserError(
            f"--deep-prompts {len(deep)}, --pool-prompts {len(pool)}: at least 1 and 4 are needed; deep ones for how "
            "variance grows with length, the pool for mini-batches"
        )
    parts = {"all": slice(0, stored.dimension)} | (stored.parts if len(stored.parts) > 1 else {})
    slopes = [
        found
        for score_only in (True, False)
        for part, columns in parts.items()
        if (found := slope(deep, part, columns, score_only, seed))
    ]
    beta = next((s.mean.value for s in slopes if s.part == "all" and not s.score_only), math.nan)
    of_pool, of_deep = responses(pool), responses(deep)
    scale = float(stored.settings["max_response_length"])
    modes = list(dict.fromkeys([*COMPARED, *map(mode_of, ALPHAS)]))
    size = max(1, len(pool) // 4)
    batches = MiniBatches(of_pool, modes, size, scale, seed)
    drawn = round(size * len(of_pool.lengths) / len(pool))
    return Analysis(
        name=name,
        gradients=gradients,
        entries=sum(stored.sizes),
        columns=stored.dimension,
        settings=stored.settings,
        lengths=of_pool.lengths,
        reward=float(np.mean([group.rewards.mean() for group in pool])),
        truncated=float(np.mean([group.truncated.mean() for group in pool])),
        prompts=len(pool),
        speaking=sum(bool(group.advantages.any()) for group in pool),
        deep=(len(deep), len(deep[0].lengths)),
        slopes=slopes,
        methods=compare(batches, COMPARED, beta),
        drawn=drawn,
        tradeoffs=[tradeoff(batches, responses_) for responses_ in dict.fromkeys((drawn, mini_batch))],
        thirds=[t for t in (thirds(of_pool, False, seed), thirds(of_deep, True, seed)) if t],
        growth=growth(of_pool, COMPARED, scale, batches.moments[0, batches.row(REFERENCE), 2], seed),
    )
