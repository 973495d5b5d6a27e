"""Inner products and β on gradients of known law: β = 0.5, 1 and 1.5, correlated tokens, heavy tails, few responses.

Rates of intervals are checked over repetitions with a fixed seed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.lab_laws import MU, D, group, holds, rate, stored
from vlnorm_verl.lab import gram
from vlnorm_verl.lab.gram import inner_products
from vlnorm_verl.lab.jackknife import mean_over_prompts
from vlnorm_verl.lab.slopes import Points, Slope, deviations, mean_slopes, slope, unbiased_deviations
from vlnorm_verl.lab.store import grpo_advantages
from vlnorm_verl.report.estimates import Estimate


def test_products_are_of_the_gradients_with_their_advantages() -> None:
    rng = np.random.default_rng(1)
    groups = [group(rng, "pool", 3), group(rng, "pool", 4)]
    groups[1].advantages = np.array([1.0, -2.0, 0.0, 0.5])
    of = inner_products(groups, slice(2, 9))
    g = np.concatenate([(o.score_gradients * o.advantages[:, None])[:, 2:9] for o in groups]).astype(np.float64)
    np.testing.assert_allclose(of.products, g @ g.T, rtol=1e-6)
    assert of.prompts.tolist() == [0, 0, 0, 1, 1, 1, 1]
    plain = inner_products(groups, slice(2, 9), score_only=True).products
    np.testing.assert_allclose(
        plain[4, 3], groups[1].score_gradients[1, 2:9] @ groups[1].score_gradients[0, 2:9], rtol=1e-6
    )


def test_wide_gradients_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    class Counting(np.ndarray):
        def __getitem__(self, key: Any) -> Any:
            widths.append(super().__getitem__(key).shape[-1])
            return super().__getitem__(key)

    groups = [group(np.random.default_rng(2), "pool", 5)]
    whole = inner_products(groups).products
    groups[0].score_gradients = groups[0].score_gradients.view(Counting)
    monkeypatch.setattr(gram, "AT_A_TIME", 5 * 7)
    np.testing.assert_allclose(inner_products(groups).products, whole, rtol=1e-9)
    assert widths == [7, 7, 7, 3]


def test_deviations_leave_the_own_response_out() -> None:
    g = np.random.default_rng(3).normal(size=(6, D))
    expected = [((g[i] - np.delete(g, i, axis=0).mean(axis=0)) ** 2).sum() for i in range(6)]
    np.testing.assert_allclose(deviations(g @ g.T), expected, rtol=1e-9)


def test_unbiased_deviations_are_unbiased_where_variances_differ() -> None:
    rng = np.random.default_rng(4)
    variances = np.array([0.1, 0.1, 1.0, 3.0, 10.0, 30.0])
    draws = []
    for _ in range(4000):
        g = MU + rng.normal(size=(6, D)) * np.sqrt(variances / D)[:, None]
        draws.append(unbiased_deviations(g @ g.T))
    mean, error = np.mean(draws, axis=0), np.std(draws, axis=0) / math.sqrt(4000)
    assert np.all(np.abs(mean - variances) < 4 * error)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_the_slope_is_found_at_the_stated_rate(beta: float) -> None:
    rng = np.random.default_rng(int(beta * 10))
    within, over, steep = [], [], []
    for seed in range(40):
        found = slope([group(rng, "slope", 96, beta) for _ in range(4)], "all", slice(None), True, seed)
        assert found is not None
        within.append(holds(found.mean, beta))
        over.append(holds(found.over_prompts, beta))
        assert abs(found.mean.value - beta) < 0.25
        assert abs(found.log_log.value - beta) < 0.25
        steep.append(found.log_log)
    # The leave-one-out mean flattens it a little, so its interval is for its own expectation.
    expected = float(np.mean([estimate.value for estimate in steep]))
    # 95% of 40 is 38; fewer than 33 has a probability below 1 in 100.
    assert rate(within) >= 33 / 40
    assert rate(over) >= 33 / 40
    assert rate([holds(estimate, expected) for estimate in steep]) >= 33 / 40


def test_the_slope_is_found_with_advantages_of_groups_and_heavy_tails() -> None:
    """Real groups: rewards are 0 or 1, advantages GRPO's, and the noise of a response has a random scale of its own."""
    rng = np.random.default_rng(5)
    hits = []
    for seed in range(30):
        groups = [group(rng, "slope", 128, 1.2) for _ in range(4)]
        for of_prompt in groups:
            scale = np.exp(rng.normal(0, 0.4, size=128))[:, None]
            noise = rng.normal(size=(128, D)) * np.sqrt(0.02 / D * of_prompt.lengths[:, None] ** 1.2) * scale
            of_prompt.score_gradients = noise.astype(np.float32)  # a score's mean is 0
            of_prompt.rewards = (rng.random(128) < 0.4).astype(float)
            of_prompt.advantages = grpo_advantages(of_prompt.rewards)
        found = slope(groups, "all", slice(None), False, seed)
        assert found is not None
        hits.append(holds(found.interval, 1.2))
    assert rate(hits) >= 25 / 30


def test_the_mean_of_the_others_does_not_flatten_the_slope() -> None:
    """Few responses: what the others' mean adds to a short response's deviation is larger than its own variance."""
    rng = np.random.default_rng(6)
    groups = [group(rng, "slope", 24, 1.5, v=0.2) for _ in range(150)]
    found = slope(groups, "all", slice(None), True, 0)
    assert found is not None
    assert abs(found.mean.value - 1.5) < 0.1
    assert found.log_log.value < 1.3


def test_correlated_tokens_steepen_the_slope_of_short_responses() -> None:
    """Σ_t of correlated tokens: variance L + 2 Σ (L-k) ρ^k, so β is above 1 until L is long against 1/(1-ρ)."""
    rng = np.random.default_rng(7)
    rho = 0.98
    found = slope([group(rng, "slope", 128, rho=rho) for _ in range(4)], "all", slice(None), True, 0)
    assert found is not None
    lengths = np.arange(10, 401)
    exact = np.array([L + 2 * sum((L - k) * rho**k for k in range(1, L)) for L in lengths])
    # The fit's own exponent on the exact variances, with lengths as they are drawn (uniform in log L).
    x = np.exp(np.linspace(math.log(10), math.log(400), 4000))
    expected = mean_slopes([(x, np.interp(x, lengths, exact))], [np.ones((1, len(x)))])[0]
    assert expected > 1.3
    assert abs(found.mean.value - expected) < 0.15


@pytest.mark.parametrize("reward", [0.0, 0.1])
def test_a_prompt_of_equal_rewards_says_nothing_with_advantages(reward: float) -> None:
    """Of eight rewards of 0.1 float32's mean is not 0.1: verl's advantages are then not quite 0."""
    rng = np.random.default_rng(8)
    equal, differing = group(rng, "slope", 64), group(rng, "slope", 64)
    equal.rewards = np.full(64, reward)
    equal.advantages = grpo_advantages(equal.rewards)
    found = slope([equal, differing], "all", slice(None), False, 0)
    assert found is not None
    assert len(found.points) == 1
    assert found.over_prompts.note == "one prompt"
    assert slope([equal], "all", slice(None), False, 0) is None
    scores = slope([equal, differing], "all", slice(None), True, 0)
    assert scores is not None
    assert len(scores.points) == 2


def test_prompts_without_a_beta_are_counted() -> None:
    assert mean_over_prompts(np.array([math.nan] * 15 + [1.5])) == Estimate(1.5, note="known for 1 of 16 prompts")
    assert mean_over_prompts(np.full(16, math.nan)).note == "known for 0 of 16 prompts"
    # An interval of the others would be of prompts that are selected by their β.
    assert np.isnan(mean_over_prompts(np.array([math.nan, *np.linspace(0.5, 1.5, 15)])).low)


def test_the_interval_of_beta_holds_its_own_and_one_as_wide_as_that_over_prompts() -> None:
    skewed, prompts = Estimate(4.5, 1.0, 4.75), Estimate(3.0, 1.5, 4.5)
    points: Points = [(np.ones(3), np.ones(3))] * 2
    both = Slope("all", False, skewed, skewed, prompts, points).interval
    assert (both.value, both.low, both.high) == (4.5, 1.0, 6.0)
    few = Estimate(3.0, note="known for 1 of 2 prompts")
    assert Slope("all", False, skewed, skewed, few, points).interval == Estimate(4.5, note=few.note)


def test_the_slope_of_another_part_is_another() -> None:
    rng = np.random.default_rng(9)
    groups = [group(rng, "slope", 128) for _ in range(3)]
    for of_prompt in groups:
        noise = rng.normal(size=(128, D - D // 2)) * of_prompt.lengths[:, None] ** 0.1
        of_prompt.score_gradients[:, D // 2 :] = noise
    parts = stored(groups).parts
    q, k = (slope(groups, part, parts[part], True, 0) for part in ("q_proj", "k_proj"))
    assert q is not None
    assert k is not None
    assert q.mean.value > 0.8
    assert k.mean.value < 0.4
