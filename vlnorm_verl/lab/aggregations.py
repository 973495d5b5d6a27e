"""The aggregations on mini-batches of the pool: noise and bias, predicted and measured; which α to use.

Closed forms: the paper's Table 1. Intervals are a jackknife that leaves out a block of prompts at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vlnorm_verl.lab.gram import Floats, relative, root, squared_distances
from vlnorm_verl.lab.mini_batches import CROSS, REFERENCE, SQUARE, SQUARED_MEAN, SUM_X, MiniBatches
from vlnorm_verl.lab.store import Group
from vlnorm_verl.methods import join
from vlnorm_verl.report.estimates import Estimate

ALPHAS = tuple(0.125 * step for step in range(17))  # 0 to 2, the range that the plugin accepts
OF_ALPHAS = tuple(join("vl_norm", alpha) for alpha in ALPHAS)
LEAST_VARIANCE = "vl_norm:1"
SCRIPTS_ALPHAS = (1.0, 0.75)  # of the authors' CountDown and Math
COMPARED = ("grpo_norm", "dapo_norm", REFERENCE, "vl_norm:0.5", "vl_norm:0.75", LEAST_VARIANCE)
LARGE_SHARE = 0.1  # of an aggregation's noise: a response that has more is named


@dataclass(frozen=True)
class Comparison:
    """One aggregation on mini-batches of the pool, predicted and measured.

    sum_x: E Σ M x_i. By the model this is also the length of E G in units of Dr. GRPO's: compare `scale`.
    scale: component of E G along Dr. GRPO's E G, in units of its length, measured.
    cosine: between E G and Dr. GRPO's E G; 1 by the model.
    noise, noise_predicted, noise_by_beta: standard deviation of G for a given sum of weights, over that of VL Norm with
        α = 1: measured; by the closed forms (variance ∝ L); by variance ∝ L^β with the measured β.
    cv, cv_predicted: coefficient of variation of G, √(E‖G − E G‖²)/‖E G‖.
    bias: ‖E G − E G(Dr. GRPO)‖² in units of ‖E G(Dr. GRPO)‖², without the noise's share, so it can be negative; by the
        model it is (sum_x − 1)².
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
    bias: Estimate


@dataclass(frozen=True)
class Statistics:
    """Some aggregations' statistics, each a function of `MiniBatches.moments` [modes, 4]; NaN where lost in noise.

    rows: of the aggregations. reference: row of Dr. GRPO Norm. shrink: of the variance, for another mini-batch size.
    """

    rows: list[int]
    reference: int
    shrink: float = 1.0

    def variance(self, m: Floats) -> Floats:
        return (m[self.rows, SQUARE] - m[self.rows, SQUARED_MEAN]) * self.shrink

    def bias(self, m: Floats) -> Floats:
        return m[self.rows, SQUARED_MEAN] - 2 * m[self.rows, CROSS] + m[self.reference, SQUARED_MEAN]

    def error(self, m: Floats) -> Floats:
        return self.bias(m) + self.variance(m)

    def scale(self, m: Floats) -> Floats:
        return self.in_units(m[self.rows, CROSS], m)

    def cosine(self, m: Floats) -> Floats:
        return m[self.rows, CROSS] / (root(m[self.rows, SQUARED_MEAN]) * root(m[self.reference, SQUARED_MEAN]))

    def projection(self, m: Floats) -> Floats:
        """Alignment times ‖E G(Dr. GRPO)‖, which is common to all."""
        return m[self.rows, CROSS] / root(m[self.rows, SQUARED_MEAN] + self.variance(m))

    def alignment(self, m: Floats) -> Floats:
        return self.projection(m) / root(m[self.reference, SQUARED_MEAN])

    def in_units(self, values: Floats, m: Floats) -> Floats:
        """In units of ‖E G(Dr. GRPO)‖²."""
        return relative(values, m[self.reference, SQUARED_MEAN])


def compare(batches: MiniBatches, beta: float) -> list[Comparison]:
    """The table of methods, `COMPARED`. `beta`: measured exponent of the variance, NaN if there is none."""
    statistics = Statistics([batches.row(mode) for mode in COMPARED], batches.row(REFERENCE))
    least = COMPARED.index(LEAST_VARIANCE)

    def noise(m: Floats) -> Floats:
        per_weight = root(statistics.variance(m)) / m[statistics.rows, SUM_X]
        return per_weight / per_weight[least]

    mean_square = batches.moments[0, statistics.reference, SQUARED_MEAN]  # ‖μ‖²
    per_token = (np.diag(batches.pool.products).mean() - mean_square) / batches.pool.lengths.mean()  # V
    by_length, by_beta = (
        np.array([batches.predicted_noise(mode, exponent) for mode in COMPARED]) for exponent in (1.0, beta)
    )
    columns = (
        batches.moments[0, statistics.rows, SUM_X].tolist(),
        batches.estimate(statistics.scale),
        batches.estimate(statistics.cosine),
        batches.estimate(noise, log=True),
        (by_length / by_length[least]).tolist(),
        (by_beta / by_beta[least]).tolist(),
        batches.estimate(lambda m: root(statistics.variance(m)) / root(m[statistics.rows, SQUARED_MEAN]), log=True),
        (np.sqrt(relative(per_token, mean_square)) * by_length).tolist(),
        batches.estimate(lambda m: statistics.in_units(statistics.bias(m), m)),
    )
    return [Comparison(*row) for row in zip(COMPARED, *columns, strict=True)]


@dataclass(frozen=True)
class Tradeoff:
    """Alignment of VL Norm(α) with Dr. GRPO's E G; bias, variance and error about it in units of ‖E G(Dr. GRPO)‖².

    One of each list for each of `ALPHAS`. bias, cosine: as in `Comparison`, of the mini-batches drawn: VL Norm
    normalises within each, so the part of the bias that is between prompts grows with the mini-batch, a little.
    variance, error: of a mini-batch of `responses` responses, the variance scaled from those drawn as 1/size.
    alignment: E G·E G(Dr. GRPO) / √(E‖G‖² ‖E G(Dr. GRPO)‖²), which no factor common to all updates changes; 1 is an
    update without noise, and 1 − alignment² the least error of G times any such factor. It decides, since the error
    itself rewards a shorter update, whose variance is smaller, and the learning rate or Adam undo that. best: the α of
    the largest alignment; NaN where it is lost in noise (`MiniBatches.lost`). among: the least and largest α whose
    alignment the data do not tell from the best one's. least_error: the α of least error.
    """

    responses: int
    bias: list[Estimate]
    cosine: list[Estimate]
    variance: list[Estimate]
    error: list[Estimate]
    alignment: list[Estimate]
    best: float
    among: tuple[float, float]
    least_error: float
    lost: str

    @property
    def recommended(self) -> float:
        """The authors' α nearest to the best where the data allow one, since it is tested, else the best.

        NaN where the data do not show that any α beats α = 0.
        """
        low, high = self.among
        if not low > 0:
            return math.nan
        usual = [alpha for alpha in SCRIPTS_ALPHAS if low <= alpha <= high]
        return min(usual, key=lambda alpha: abs(alpha - self.best), default=self.best)


def tradeoff(batches: MiniBatches, responses_of_batch: int) -> Tradeoff:
    """Which α is aligned best, and what the data say against the others.

    Args:
        batches: with the modes `OF_ALPHAS`.
        responses_of_batch: responses of the optimizer mini-batch that the answer is for.
    """
    rows = [batches.row(mode) for mode in OF_ALPHAS]
    statistics = Statistics(rows, batches.row(REFERENCE), shrink=batches.responses / responses_of_batch)
    aligned = batches.estimate(statistics.alignment)
    best = int(np.argmax(np.nan_to_num([estimate.value for estimate in aligned], nan=-np.inf)))
    # Differences in their own unit: the reference's norm, common to all, is the noisiest number here.
    behind = batches.estimate(lambda m: statistics.projection(m)[best] - statistics.projection(m))
    alike = [alpha for alpha, gap in zip(ALPHAS, behind, strict=True) if not gap.low > 0]
    known = not batches.lost
    return Tradeoff(
        responses=responses_of_batch,
        bias=batches.estimate(lambda m: statistics.in_units(statistics.bias(m), m)),
        cosine=batches.estimate(statistics.cosine),
        variance=batches.estimate(lambda m: statistics.in_units(statistics.variance(m), m), log=True),
        error=batches.estimate(lambda m: statistics.in_units(statistics.error(m), m), log=True),
        alignment=aligned,
        best=ALPHAS[best] if known else math.nan,
        among=(min(alike), max(alike)) if known else (math.nan, math.nan),
        least_error=ALPHAS[int(np.argmin(statistics.error(batches.moments[0])))] if known else math.nan,
        lost=batches.lost,
    )


@dataclass(frozen=True)
class NoisyResponse:
    """A single response that has more than LARGE_SHARE of an aggregation's noise.

    An interval knows the responses that were sampled: how often one like this occurs, it does not know.

    prompt: number of its prompt, as its gradients' file. response: its row there. share: of Σ x_i² ‖g_i − mean g‖².
    """

    mode: str
    prompt: int
    response: int
    length: int
    reward: float
    share: float


def noisy_responses(batches: MiniBatches, pool: dict[int, Group]) -> list[NoisyResponse]:
    """Those of the pool, largest share first within each of `COMPARED`.

    Args:
        batches: drawn from the pool's responses, in the pool's order.
        pool: {number of the prompt: its group}.
    """
    at = [(prompt, response) for prompt, group in pool.items() for response in range(len(group.lengths))]
    named = []
    for mode in COMPARED:
        noise = (batches.x[mode] ** 2).mean(axis=0) * squared_distances(batches.pool.products)
        shares = relative(noise, noise.sum())
        for index in np.argsort(-shares, kind="stable")[: int((shares > LARGE_SHARE).sum())]:
            prompt, response = at[index]
            group = pool[prompt]
            length, reward = int(group.lengths[response]), float(group.rewards[response])
            named.append(NoisyResponse(mode, prompt, response, length, reward, float(shares[index])))
    return named
