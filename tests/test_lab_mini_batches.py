"""Noise, bias and the best α on gradients whose law is known: they are found, and their intervals hold.

Covered: a mean that is the same for every length and one that turns with it, noise without a signal. Rates are checked
over repetitions with a fixed seed, with a quarter of the rounds of mini-batches: hundreds of pools are drawn here, most
of them by the slow tests.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from tests.lab_laws import MU, D, M, Mean, batches_of, constant, group, holds, pool_of, rate, scaled, truth, turning
from vlnorm_verl.lab import mini_batches
from vlnorm_verl.lab.aggregations import COMPARED, compare, noisy_responses, tradeoff
from vlnorm_verl.lab.gram import Responses, inner_products
from vlnorm_verl.lab.jackknife import BLOCKS, LOST, blocks_of, lost_in_noise
from vlnorm_verl.lab.mini_batches import REFERENCE, MiniBatches, draw_mini_batches, weights
from vlnorm_verl.report.estimates import Estimate


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini_batches, "ROUNDS", 16)


def test_weights_are_those_of_the_product() -> None:
    import torch

    from vlnorm_verl import parse_mode
    from vlnorm_verl.aggregation import response_weights
    from vlnorm_verl.metrics import mini_batch_sums

    lengths = np.array([3, 50, 7, 400, 9])
    members = np.array([[True, True, False, True, False], [False, False, True, False, True]])
    for mode in COMPARED:
        x, z = weights(mode, lengths, members, M)
        np.testing.assert_allclose(z, members * parse_mode(mode).summand(torch.as_tensor(lengths).double()).numpy())
        for row, chosen in zip(x, members, strict=True):
            L = torch.as_tensor(lengths[chosen])
            total = mini_batch_sums(parse_mode(mode), L)[0]
            np.testing.assert_allclose(
                row[chosen], M * response_weights(parse_mode(mode), L, total, M).numpy(), rtol=1e-12
            )
            assert not row[~chosen].any()


def test_each_round_uses_a_prompt_at_most_once() -> None:
    members = draw_mini_batches(10, 3, seed=0)
    assert members.shape == (3 * mini_batches.ROUNDS, 10)
    assert (members.sum(axis=1) == 3).all()
    for first in range(0, len(members), 3):
        assert members[first : first + 3].sum(axis=0).max() == 1


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "mean"), [(1.0, constant), (1.5, constant), (1.0, turning)])
def test_methods_are_measured_at_the_stated_rate(beta: float, mean: Mean) -> None:
    rng = np.random.default_rng(int(10 * beta) + (mean is turning))
    true = {mode: truth(mode, beta, mean) for mode in COMPARED}
    per_weight = {mode: math.sqrt(variance) / sum_x for mode, (sum_x, variance, _) in true.items()}
    reference = true[REFERENCE][2]
    unit = reference @ reference
    hits: dict[str, list[bool]] = {"noise": [], "cv": [], "scale": [], "bias": []}
    for seed in range(24):
        methods = compare(batches_of(pool_of(rng, beta=beta, mean=mean), seed), beta)
        for method in methods:
            _, variance, centre = true[method.mode]
            if method.mode != "vl_norm:1":
                hits["noise"].append(holds(method.noise, per_weight[method.mode] / per_weight["vl_norm:1"]))
            hits["cv"].append(holds(method.cv, math.sqrt(variance / (centre @ centre))))
            if method.mode != REFERENCE:
                hits["scale"].append(holds(method.scale, centre @ reference / unit))
                gap = centre - reference
                hits["bias"].append(holds(method.bias, gap @ gap / unit))
    # 24 independent pools; the methods of one pool are not independent, so the rates move more than 1/√n.
    assert {name: rate(hit) > 0.85 for name, hit in hits.items()} == dict.fromkeys(hits, True), {
        name: rate(hit) for name, hit in hits.items()
    }


def test_noise_is_predicted_by_the_exponent_of_the_variance() -> None:
    methods = compare(batches_of(pool_of(np.random.default_rng(11), prompts=256, v=1.0, beta=1.5)), 1.5)
    for method in methods:
        assert method.noise.value == pytest.approx(method.noise_by_beta, rel=0.1), method.mode
    assert max(abs(method.noise_predicted / method.noise_by_beta - 1) for method in methods) > 0.2


def test_the_closed_forms_predict_what_is_measured_in_their_own_model() -> None:
    methods = compare(batches_of(pool_of(np.random.default_rng(11), prompts=256, v=1.0)), 1.0)
    by_mode = {method.mode: method for method in methods}
    for method in methods:
        # Σx of GRPO Norm and DAPO Norm varies with the lengths, which adds variance; V is large, so it is little.
        assert method.noise.value == pytest.approx(method.noise_predicted, rel=0.08), method.mode
        assert method.cv.value == pytest.approx(method.cv_predicted, rel=0.25), method.mode
        assert method.scale.value == pytest.approx(method.sum_x, rel=0.15), method.mode
    assert by_mode["grpo_norm"].noise.value == pytest.approx(1.0, abs=0.1)  # the CV of VL Norm with α = 1
    assert by_mode["dapo_norm"].noise.value == pytest.approx(by_mode[REFERENCE].noise.value, rel=0.1)
    assert by_mode[REFERENCE].noise.value > 1.3


def test_plug_in_norms_would_fail_where_these_do_not() -> None:
    """Hardly any signal: ‖mean‖² over the pool is mostly noise; the products of disjoint mini-batches are not."""
    unbiased, plug_in = [], []
    rng = np.random.default_rng(12)
    for seed in range(30):
        pool = pool_of(rng, prompts=32, v=2.0)
        batches = batches_of(pool, seed)
        unbiased.append(batches.moments[0, batches.row(REFERENCE), 2])
        plug_in.append(pool.products.mean())
    true = MU @ MU
    assert abs(np.mean(unbiased) - true) < 3 * np.std(unbiased) / math.sqrt(30)
    assert np.mean(plug_in) > true + 3 * np.std(plug_in) / math.sqrt(30)


def test_a_signal_lost_in_noise_is_said_to_be_lost() -> None:
    pool = pool_of(np.random.default_rng(17), prompts=16, v=50.0, mean=lambda L: np.zeros((len(L), D)))
    batches = batches_of(pool)
    methods = compare(batches, 1.0)
    assert any(method.cv.note.startswith(LOST) for method in methods)
    for method in methods:
        assert math.isnan(method.cv.value) == method.cv.note.startswith(LOST)
        assert np.isfinite(method.noise.value)  # needs no signal


def test_a_mean_of_rounding_size_is_lost_in_noise() -> None:
    """Not a variance of 95,314,870 in units of ‖E G‖²."""
    pool = pool_of(np.random.default_rng(17), prompts=16)
    same = pool.prompts[:, None] == pool.prompts
    pool = Responses(pool.prompts, pool.lengths, np.where(same, pool.products, 1e-10))
    for method in compare(batches_of(pool), 1.0):
        assert (method.cv.note, method.bias.note) == (LOST, LOST)


def test_without_a_signal_no_alpha_is_best_at_the_stated_rate() -> None:
    rng = np.random.default_rng(18)
    answered, cosines = [], []
    for seed in range(40):
        batches = batches_of(pool_of(rng, prompts=16, v=1.0, mean=lambda L: np.zeros((len(L), D))), seed, alphas=True)
        answered.append(math.isfinite(tradeoff(batches, 64).best))
        cosines.append(next(m for m in compare(batches, 1.0) if m.mode == REFERENCE).cosine)
    assert rate(answered) <= 0.15  # 2.5% by the interval's upper end alone
    assert all(cosine.note.startswith(LOST) or cosine.value == pytest.approx(1.0) for cosine in cosines)
    assert any(cosine.note.startswith(LOST) for cosine in cosines)


@pytest.mark.slow
def test_as_many_prompts_as_are_said_find_a_signal() -> None:
    """With the mean's share of the noise too: 16 prompts do not find it, and what is said of it is about right."""
    rng = np.random.default_rng(19)
    said = []
    for seed in range(30):
        pool = pool_of(rng, prompts=16, v=1.0, mean=lambda L: 0.45 * constant(L))
        note = MiniBatches(pool, [REFERENCE], 4, M, seed).lost
        said += [int(number) for number in re.findall(r"about ([\d,]+) prompts", note)]
    assert len(said) > 15
    needed = int(np.median(said))
    found = []
    for seed in range(30):
        pool = pool_of(rng, prompts=needed, v=1.0, mean=lambda L: 0.45 * constant(L))
        found.append(not MiniBatches(pool, [REFERENCE], needed // 4, M, seed).lost)
    assert 0.6 <= rate(found) <= 0.99, (needed, rate(found))


@pytest.mark.parametrize(
    ("estimate", "said"),
    [
        (Estimate(1.0, 0.1, 1.9), ""),
        (Estimate(1.0, -1.0, 3.0), f"{LOST}; about 180 prompts would find it"),
        (Estimate(0.01, -1.99, 2.01), f"{LOST}; about 18,000 prompts would find it"),
        (Estimate(-1.0, -3.0, 1.0), f"{LOST}; more than 180 prompts would find it"),
        (Estimate(-2.0, -3.0, -1.0), LOST),
        (Estimate(0.0, 0.0, 0.0), LOST),
        (Estimate(math.nan), LOST),
    ],
)
def test_what_is_lost_in_noise_is_said_with_the_prompts_that_would_find_it(estimate: Estimate, said: str) -> None:
    assert lost_in_noise(estimate, 64) == said


@pytest.mark.slow
def test_the_jackknife_has_the_spread_of_pools() -> None:
    """Neither too small nor, by the noise of the mini-batches that were drawn, too large."""
    rng = np.random.default_rng(19)
    values, halves = [], []
    for seed in range(60):
        batches = batches_of(pool_of(rng, prompts=64, v=0.3), seed)
        row = batches.row(REFERENCE)
        estimates = batches.estimate(lambda m: np.array([m[row, 1] - m[row, 2], m[row, 2]]))  # noqa: B023
        values.append([estimate.value for estimate in estimates])
        halves.append([(estimate.high - estimate.low) / 2 for estimate in estimates])
    from scipy.stats import t

    ratios = np.mean(halves, axis=0) / t.ppf(0.975, BLOCKS - 1) / np.std(values, axis=0, ddof=1)
    assert ((ratios > 0.8) & (ratios < 1.25)).all(), ratios


def test_a_replicate_is_the_mini_batch_without_the_block() -> None:
    rng = np.random.default_rng(20)
    pool = pool_of(rng, prompts=12)
    batches = MiniBatches(pool, COMPARED, 3, M, 0)
    block = blocks_of(12)[pool.prompts]
    for k, mode in enumerate(COMPARED):
        for left_out in (0, 7):
            keep = block != left_out
            x, _ = weights(mode, pool.lengths, batches.members[:, pool.prompts] & keep, M)
            x0, _ = weights(REFERENCE, pool.lengths, batches.members[:, pool.prompts] & keep, M)
            own, cross = x @ pool.products @ x.T, x0 @ pool.products @ x.T
            rounds = np.arange(len(x)) // 4  # 12 prompts in mini-batches of 3
            pairs = (rounds[:, None] == rounds) & ~np.eye(len(x), dtype=bool)
            expected = [x.sum(axis=1).mean(), np.diag(own).mean(), own[pairs].mean(), cross[pairs].mean()]
            np.testing.assert_allclose(batches.moments[1 + left_out, k], expected, rtol=1e-9)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_without_bias_the_best_alpha_is_beta(beta: float) -> None:
    found = []
    rng = np.random.default_rng(int(100 * beta))
    for seed in range(12):
        best = tradeoff(batches_of(pool_of(rng, beta=beta, v=0.1), seed, alphas=True), 48)
        found.append(best.best)
        assert best.among[0] <= best.best <= best.among[1]
    assert abs(np.mean(found) - beta) < 0.25


@pytest.mark.parametrize(("power", "best"), [(1.0, 0.0), (-0.5, 1.5)])
def test_a_shorter_update_is_no_better(power: float, best: float) -> None:
    """E[g | L] ∝ L^power in one direction: of all weights x, those ∝ mean/variance = L^(power − 1) have the least CV.

    The noise is large, so the error is least elsewhere: where the update is shorter.
    """
    rng = np.random.default_rng(int(10 * power) + 50)
    found, of_error = [], []
    for seed in range(6):
        pool = pool_of(rng, prompts=96, mean=scaled(power), v=1.0)
        answer = tradeoff(batches_of(pool, seed, alphas=True), 16)
        found.append(answer.best)
        of_error.append(answer.least_error)
        assert answer.among[0] <= best <= answer.among[1]
        assert math.isnan(answer.recommended) == (best == 0)
    assert abs(np.mean(found) - best) < 0.3
    assert abs(np.mean(of_error) - best) > 0.4


def test_bias_grows_with_alpha_and_large_mini_batches_want_a_smaller_one() -> None:
    pool = pool_of(np.random.default_rng(21), prompts=192, mean=turning, v=0.3)
    batches = batches_of(pool, alphas=True)
    small, large = tradeoff(batches, 64), tradeoff(batches, 64 * 40)
    assert small.bias[0].value == pytest.approx(0.0, abs=1e-12)  # α = 0 is the reference
    assert small.bias[-1].value > small.bias[4].value > 0
    assert large.best < small.best
    assert large.variance[3].value == pytest.approx(small.variance[3].value / 40)
    assert large.alignment[0].value > small.alignment[0].value
    assert small.cosine[16].value < small.cosine[4].value < 1.02
    assert max(estimate.value for estimate in large.alignment) <= 1.05


def test_alphas_that_the_data_do_not_tell_apart_at_the_stated_rate() -> None:
    """β = 1 and no bias: α = 1 is the best there is, so it must be among the α that are kept."""
    rng = np.random.default_rng(31)
    kept = []
    for seed in range(30):
        answer = tradeoff(batches_of(pool_of(rng, prompts=32, v=0.3), seed, alphas=True), 32)
        kept.append(answer.among[0] <= 1.0 <= answer.among[1])
    assert rate(kept) >= 0.85


# ------------------------------------------------------------------------------------------- single responses' noise


def test_a_rare_short_failure_that_carries_the_noise_is_named() -> None:
    groups = [group(np.random.default_rng(40 + prompt), "pool", 8) for prompt in range(16)]
    failure = groups[5]
    failure.lengths[2], failure.rewards[2] = 2, -1.0
    failure.score_gradients[2] *= 10
    batches = batches_of(inner_products(groups))
    named = noisy_responses(batches, {3 + index: of_prompt for index, of_prompt in enumerate(groups)})
    shares = {response.mode: response.share for response in named if (response.prompt, response.response) == (8, 2)}
    g = np.concatenate([of_prompt.score_gradients for of_prompt in groups]).astype(np.float64)
    noise = (batches.x["vl_norm:1"] ** 2).sum(axis=0) * ((g - g.mean(axis=0)) ** 2).sum(axis=1)
    assert shares["vl_norm:1"] == pytest.approx(noise[5 * 8 + 2] / noise.sum())
    assert shares["vl_norm:1"] > shares["vl_norm:0.5"] > shares.get("dapo_norm", 0.0)
    assert {(response.length, response.reward) for response in named if response.prompt == 8} == {(2, -1.0)}


def test_no_response_is_named_where_all_are_alike() -> None:
    groups = [group(np.random.default_rng(prompt), "pool", 8) for prompt in range(32)]
    assert noisy_responses(batches_of(inner_products(groups)), dict(enumerate(groups))) == []
