"""The lab's analysis on gradients whose law is known: it finds β, variances, bias and α, and its intervals hold.

Covered: β = 0.5, 1 and 1.5, correlated tokens, a mean that depends on the length in size and in direction, advantages,
noise without a signal, what is refused. The rates are checked over repetitions with a fixed seed. Not covered:
gradients of a model (test_lab_gradients.py), figures and files (test_lab_report.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vlnorm_verl.files import UserError
from vlnorm_verl.lab import analysis
from vlnorm_verl.lab.analysis import ALPHAS, COMPARED, LOST, REFERENCE, MiniBatches, Responses, mode_of
from vlnorm_verl.lab.store import Group, Stored, grpo_advantages
from vlnorm_verl.report.estimates import Estimate

D = 24
M = 400.0
MU = np.linspace(1.0, 2.0, D) / math.sqrt(D)

Mean = Callable[[np.ndarray], np.ndarray]  # lengths [n] -> E[g | L] [n, D]


def constant(lengths: np.ndarray) -> np.ndarray:
    return np.tile(MU, (len(lengths), 1))


def turning(lengths: np.ndarray) -> np.ndarray:
    """Long responses pull another way."""
    other = np.where(np.arange(D) % 2 == 0, MU, -MU)
    share = (np.log(lengths) - math.log(10)) / math.log(40)
    return (1 - share)[:, None] * MU + share[:, None] * other


def lengths_of(rng: np.random.Generator, n: int) -> np.ndarray:
    """Tokens, 10 to 400, √(A/H) about 1.5."""
    return np.exp(rng.uniform(math.log(10), math.log(400), n)).astype(np.int64)


def group(
    rng: np.random.Generator,
    kind: str,
    n: int,
    beta: float = 1.0,
    v: float = 0.02,
    mean: Mean = constant,
    rho: float = 0.0,
) -> Group:
    """g_i = E[g | L_i] + noise of variance V·L_i^β, as score gradients with A = 1.

    rho: correlation of neighbouring tokens, for which β is 1 and the noise a sum over tokens.
    """
    lengths = lengths_of(rng, n)
    if rho:
        noise = np.array([correlated_sum(rng, length, rho) for length in lengths]) * math.sqrt(v / D)
    else:
        noise = rng.normal(size=(n, D)) * np.sqrt(v / D * lengths[:, None] ** beta)
    return Group(
        kind=kind,
        prompt="",
        lengths=lengths,
        rewards=np.ones(n),
        advantages=np.ones(n),
        score_gradients=(mean(lengths) + noise).astype(np.float32),
        truncated=np.zeros(n, dtype=bool),
    )


def correlated_sum(rng: np.random.Generator, length: int, rho: float) -> np.ndarray:
    """Σ_t ξ_t with corr(ξ_t, ξ_s) = ρ^|t-s| and variance 1."""
    shocks = rng.normal(size=(length, D))
    shocks[1:] *= math.sqrt(1 - rho**2)
    token, total = shocks[0], shocks[0].copy()
    for shock in shocks[1:]:
        token = rho * token + shock
        total += token
    return total


def stored(groups: list[Group], **settings: Any) -> Stored:
    half = D // 2
    return Stored(
        model="synthetic",
        task="synthetic",
        modules=["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"],
        sizes=[half, D - half],
        dimension=D,
        parts={"q_proj": slice(0, half), "k_proj": slice(half, D)},
        projected=False,
        settings={"max_response_length": M, **settings},
        groups=groups,
    )


def pool_of(rng: np.random.Generator, prompts: int = 48, n: int = 8, **law: Any) -> Responses:
    return analysis.responses([group(rng, "pool", n, **law) for _ in range(prompts)])


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the rounds: hundreds of pools are drawn here."""
    monkeypatch.setattr(analysis, "ROUNDS", 16)


def batches_of(pool: Responses, seed: int = 0, alphas: bool = False) -> MiniBatches:
    modes = list(dict.fromkeys([*COMPARED, *(map(mode_of, ALPHAS) if alphas else ())]))
    return MiniBatches(pool, modes, int(pool.prompts.max() + 1) // 8, M, seed)  # the size that `truth` has


def holds(one: Estimate, truth: float) -> bool:
    return one.low <= truth <= one.high


def rate(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


# ------------------------------------------------------------------------------------------------------ inner products


def test_products_are_of_the_gradients_with_their_advantages() -> None:
    rng = np.random.default_rng(1)
    groups = [group(rng, "pool", 3), group(rng, "pool", 4)]
    groups[1].advantages = np.array([1.0, -2.0, 0.0, 0.5])
    of = analysis.responses(groups, slice(2, 9))
    g = np.concatenate([(o.score_gradients * o.advantages[:, None])[:, 2:9] for o in groups]).astype(np.float64)
    np.testing.assert_allclose(of.products, g @ g.T, rtol=1e-6)
    assert of.prompts.tolist() == [0, 0, 0, 1, 1, 1, 1]
    plain = analysis.responses(groups, slice(2, 9), score_only=True).products
    np.testing.assert_allclose(
        plain[4, 3], groups[1].score_gradients[1, 2:9] @ groups[1].score_gradients[0, 2:9], rtol=1e-6
    )


def test_wide_gradients_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group(np.random.default_rng(2), "pool", 5)]
    whole = analysis.responses(groups).products

    class Counting(np.ndarray):
        widest = 0

        def __getitem__(self, key: Any) -> Any:
            Counting.widest = max(Counting.widest, super().__getitem__(key).shape[-1])
            return super().__getitem__(key)

    wide = np.tile(groups[0].score_gradients, 200_000 // D * 20).view(Counting)
    groups[0].score_gradients = wide
    repeated = analysis.responses(groups).products
    np.testing.assert_allclose(repeated, whole * (wide.shape[1] / D), rtol=1e-5)
    assert Counting.widest * 5 <= 2**24


def test_deviations_leave_the_own_response_out() -> None:
    g = np.random.default_rng(3).normal(size=(6, D))
    expected = [((g[i] - np.delete(g, i, axis=0).mean(axis=0)) ** 2).sum() for i in range(6)]
    np.testing.assert_allclose(analysis.deviations(g @ g.T), expected, rtol=1e-9)


def test_unbiased_deviations_are_unbiased_where_variances_differ() -> None:
    rng = np.random.default_rng(4)
    variances = np.array([0.1, 0.1, 1.0, 3.0, 10.0, 30.0])
    draws = []
    for _ in range(4000):
        g = MU + rng.normal(size=(6, D)) * np.sqrt(variances / D)[:, None]
        draws.append(analysis.unbiased_deviations(g @ g.T))
    mean, error = np.mean(draws, axis=0), np.std(draws, axis=0) / math.sqrt(4000)
    assert np.all(np.abs(mean - variances) < 4 * error)


# ---------------------------------------------------------------------------------------------------------------- β


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_the_slope_is_found_at_the_stated_rate(beta: float) -> None:
    rng = np.random.default_rng(int(beta * 10))
    within, over, steep = [], [], []
    for seed in range(40):
        found = analysis.slope([group(rng, "deep", 96, beta) for _ in range(4)], "all", slice(None), True, seed)
        assert found is not None
        within.append(holds(found.mean, beta))
        over.append(holds(found.over_prompts, beta))
        assert abs(found.mean.value - beta) < 0.25
        assert abs(found.log_log.value - beta) < 0.25
        steep.append(found.log_log)
    # The leave-one-out mean flattens it a little, so its interval is for its own expectation.
    expected = float(np.mean([one.value for one in steep]))
    # 95% of 40 is 38; fewer than 33 has a probability below 1 in 100.
    assert rate(within) >= 33 / 40
    assert rate(over) >= 33 / 40
    assert rate([holds(one, expected) for one in steep]) >= 33 / 40


def test_the_slope_is_found_with_advantages_of_groups_and_heavy_tails() -> None:
    """Real groups: rewards are 0 or 1, advantages GRPO's, and the noise of a response has a random scale of its own."""
    rng = np.random.default_rng(5)
    hits = []
    for seed in range(30):
        groups = [group(rng, "deep", 128, 1.2) for _ in range(4)]
        for one in groups:
            scale = np.exp(rng.normal(0, 0.4, size=128))[:, None]
            noise = rng.normal(size=(128, D)) * np.sqrt(0.02 / D * one.lengths[:, None] ** 1.2) * scale
            one.score_gradients = noise.astype(np.float32)  # a score's mean is 0
            one.rewards = (rng.random(128) < 0.4).astype(float)
            one.advantages = grpo_advantages(one.rewards)
        found = analysis.slope(groups, "all", slice(None), False, seed)
        assert found is not None
        hits.append(holds(found.interval, 1.2))
    assert rate(hits) >= 25 / 30


def test_the_mean_of_the_others_does_not_flatten_the_slope() -> None:
    """Few responses: what the others' mean adds to a short response's deviation is larger than its own variance."""
    rng = np.random.default_rng(6)
    groups = [group(rng, "deep", 24, 1.5, v=0.2) for _ in range(150)]
    found = analysis.slope(groups, "all", slice(None), True, 0)
    assert found is not None
    assert abs(found.mean.value - 1.5) < 0.1
    assert found.log_log.value < 1.3


def test_correlated_tokens_steepen_the_slope_of_short_responses() -> None:
    """Σ_t of correlated tokens: variance L + 2 Σ (L-k) ρ^k, so β is above 1 until L is long against 1/(1-ρ)."""
    rng = np.random.default_rng(7)
    rho = 0.98
    found = analysis.slope([group(rng, "deep", 128, rho=rho) for _ in range(4)], "all", slice(None), True, 0)
    assert found is not None
    lengths = np.arange(10, 401)
    exact = np.array([L + 2 * sum((L - k) * rho**k for k in range(1, L)) for L in lengths])
    # The fit's own exponent on the exact variances, with lengths as they are drawn (uniform in log L).
    x = np.exp(np.linspace(math.log(10), math.log(400), 4000))
    expected = analysis.mean_slopes([(x, np.interp(x, lengths, exact))], [np.ones((1, len(x)))])[0]
    assert expected > 1.3
    assert abs(found.mean.value - expected) < 0.15


def test_a_prompt_whose_gradients_are_all_zero_is_left_out() -> None:
    rng = np.random.default_rng(8)
    silent, speaking = group(rng, "deep", 64), group(rng, "deep", 64)
    silent.advantages = np.zeros(64)  # a group of equal rewards
    found = analysis.slope([silent, speaking], "all", slice(None), False, 0)
    assert found is not None
    assert len(found.points) == 1
    assert found.over_prompts.note == "one prompt"
    assert analysis.slope([silent], "all", slice(None), False, 0) is None


def test_the_slope_of_another_part_is_another() -> None:
    rng = np.random.default_rng(9)
    groups = [group(rng, "deep", 128) for _ in range(3)]
    for one in groups:
        noise = rng.normal(size=(128, D - D // 2)) * one.lengths[:, None] ** 0.1
        one.score_gradients[:, D // 2 :] = noise
    parts = stored(groups).parts
    q, k = (analysis.slope(groups, part, parts[part], True, 0) for part in ("q_proj", "k_proj"))
    assert q is not None
    assert k is not None
    assert q.mean.value > 0.8
    assert k.mean.value < 0.4


# ------------------------------------------------------------------------------------------------------- mini-batches


def test_weights_are_those_of_the_product() -> None:
    import torch

    from vlnorm_verl.aggregation import mini_batch_sum, response_weights
    from vlnorm_verl.registry import parse_mode

    lengths = np.array([3, 50, 7, 400, 9])
    members = np.array([[True, True, False, True, False], [False, False, True, False, True]])
    for mode in COMPARED:
        x, z = analysis.weights(mode, lengths, members, M)
        np.testing.assert_allclose(z, members * parse_mode(mode).summand(torch.as_tensor(lengths).double()).numpy())
        for row, chosen in zip(x, members, strict=True):
            L = torch.as_tensor(lengths[chosen])
            total = mini_batch_sum(parse_mode(mode), L)
            np.testing.assert_allclose(
                row[chosen], M * response_weights(parse_mode(mode), L, total, M).numpy(), rtol=1e-12
            )
            assert not row[~chosen].any()


def test_each_round_uses_a_prompt_at_most_once() -> None:
    members = analysis.draw_mini_batches(10, 3, seed=0)
    assert members.shape == (3 * analysis.ROUNDS, 10)
    assert (members.sum(axis=1) == 3).all()
    for first in range(0, len(members), 3):
        assert members[first : first + 3].sum(axis=0).max() == 1


def truth(
    mode: str, beta: float, v: float, mean: Mean, prompts: int = 6, n: int = 8, draws: int = 20_000
) -> dict[str, float]:
    """Moments of G under one aggregation from the law itself, without anything of `analysis`."""
    rng = np.random.default_rng(123)
    N = prompts * n
    L = np.exp(rng.uniform(math.log(10), math.log(400), (draws, N))).astype(np.int64).astype(float)
    name, _, alpha = mode.partition(":")
    x = {
        "grpo_norm": lambda: M / (N * L),
        "dapo_norm": lambda: np.full_like(L, M) / L.sum(axis=1, keepdims=True),
        "dr_grpo_norm": lambda: np.full_like(L, 1 / N),
        "vl_norm": lambda: L ** -float(alpha) / (L ** -float(alpha)).sum(axis=1, keepdims=True),
    }[name]()
    means = mean(L.reshape(-1)).reshape(draws, N, D)
    conditional = np.einsum("bn,bnd->bd", x, means)
    centre = conditional.mean(axis=0)
    spread = ((conditional - centre) ** 2).sum(axis=1).mean() + (x**2 * v * L**beta).sum(axis=1).mean()
    return {"sum_x": x.sum(axis=1).mean(), "variance": spread, "centre": centre}  # type: ignore[dict-item]


@pytest.mark.parametrize(("beta", "mean"), [(1.0, constant), (1.5, constant), (1.0, turning)])
def test_methods_are_measured_at_the_stated_rate(beta: float, mean: Mean) -> None:
    rng = np.random.default_rng(int(10 * beta) + (mean is turning))
    true = {mode: truth(mode, beta, 0.02, mean, draws=3000) for mode in COMPARED}
    reference, least = true[REFERENCE], true["vl_norm:1"]
    unit = reference["centre"] @ reference["centre"]  # type: ignore[operator]
    hits: dict[str, list[bool]] = {"noise": [], "cv": [], "scale": [], "bias": []}
    for seed in range(24):
        methods = analysis.compare(batches_of(pool_of(rng, beta=beta, mean=mean), seed), COMPARED, beta)
        for method in methods:
            t = true[method.mode]
            per_weight = math.sqrt(t["variance"]) / t["sum_x"]
            if method.mode != "vl_norm:1":
                hits["noise"].append(holds(method.noise, per_weight / (math.sqrt(least["variance"]) / least["sum_x"])))
            hits["cv"].append(holds(method.cv, math.sqrt(t["variance"] / (t["centre"] @ t["centre"]))))  # type: ignore[operator]
            if method.mode != REFERENCE:
                hits["scale"].append(holds(method.scale, t["centre"] @ reference["centre"] / unit))  # type: ignore[operator]
                gap = t["centre"] - reference["centre"]
                hits["bias"].append(holds(method.bias, gap @ gap / unit))  # type: ignore[operator]
    # 24 independent pools; the methods of one pool are not independent, so the rates move more than 1/√n.
    assert {name: rate(hit) > 0.85 for name, hit in hits.items()} == dict.fromkeys(hits, True), {
        name: rate(hit) for name, hit in hits.items()
    }


def test_the_closed_forms_predict_what_is_measured_in_their_own_model() -> None:
    methods = analysis.compare(batches_of(pool_of(np.random.default_rng(11), prompts=256, v=1.0)), COMPARED, 1.0)
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
    methods = analysis.compare(batches, COMPARED, 1.0)
    assert any(method.cv.note == LOST for method in methods)
    for method in methods:
        assert math.isnan(method.cv.value) == (method.cv.note == LOST)
        assert np.isfinite(method.noise.value)  # needs no signal


def test_without_a_signal_no_alpha_is_best_at_the_stated_rate() -> None:
    rng = np.random.default_rng(18)
    answered, cosines = [], []
    for seed in range(40):
        batches = batches_of(pool_of(rng, prompts=16, v=1.0, mean=lambda L: np.zeros((len(L), D))), seed, alphas=True)
        answered.append(math.isfinite(analysis.tradeoff(batches, 64).best))
        cosines.append(next(m for m in analysis.compare(batches, COMPARED, 1.0) if m.mode == REFERENCE).cosine)
    assert rate(answered) <= 0.15  # 2.5% by the interval's upper end alone
    assert all(one.note == LOST or one.value == pytest.approx(1.0) for one in cosines)
    assert any(one.note == LOST for one in cosines)


def test_the_jackknife_has_the_spread_of_pools() -> None:
    """Neither too small nor, by the noise of the mini-batches that were drawn, too large."""
    rng = np.random.default_rng(19)
    values, halves = [], []
    for seed in range(60):
        batches = batches_of(pool_of(rng, prompts=64, v=0.3), seed)
        row = batches.row(REFERENCE)
        for statistic in (
            lambda m: np.array([m[row, 1] - m[row, 2]]),  # noqa: B023
            lambda m: np.array([m[row, 2]]),  # noqa: B023
        ):
            one = batches.estimate(statistic)[0]
            values.append(one.value)
            halves.append((one.high - one.low) / 2)
    from scipy.stats import t

    for of in (slice(0, None, 2), slice(1, None, 2)):
        spread = np.std(values[of], ddof=1)
        assert 0.8 < np.mean(halves[of]) / t.ppf(0.975, analysis.BLOCKS - 1) / spread < 1.25


def test_a_replicate_is_the_mini_batch_without_the_block() -> None:
    rng = np.random.default_rng(20)
    pool = pool_of(rng, prompts=12)
    batches = MiniBatches(pool, COMPARED, 3, M, 0)
    block = analysis.blocks_of(12)[pool.prompts]
    for k, mode in enumerate(COMPARED):
        for left_out in (0, 7):
            keep = block != left_out
            x, _ = analysis.weights(mode, pool.lengths, batches.members[:, pool.prompts] & keep, M)
            x0, _ = analysis.weights(REFERENCE, pool.lengths, batches.members[:, pool.prompts] & keep, M)
            own, cross = x @ pool.products @ x.T, x0 @ pool.products @ x.T
            rounds = np.arange(len(x)) // 4  # 12 prompts in mini-batches of 3
            pairs = (rounds[:, None] == rounds) & ~np.eye(len(x), dtype=bool)
            expected = [x.sum(axis=1).mean(), np.diag(own).mean(), own[pairs].mean(), cross[pairs].mean()]
            np.testing.assert_allclose(batches.moments[1 + left_out, k], expected, rtol=1e-9)


def test_too_large_mini_batches_are_refused() -> None:
    pool = pool_of(np.random.default_rng(14), prompts=8)
    with pytest.raises(ValueError, match="mini-batches of 5 prompts from 8: accepted are 1 to 4"):
        MiniBatches(pool, COMPARED, 5, M, 0)


# ------------------------------------------------------------------------------------------------------------------ α


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_without_bias_the_best_alpha_is_beta(beta: float) -> None:
    found = []
    rng = np.random.default_rng(int(100 * beta))
    for seed in range(12):
        best = analysis.tradeoff(batches_of(pool_of(rng, beta=beta, v=0.1), seed, alphas=True), 48)
        found.append(best.best)
        assert best.among[0] <= best.best <= best.among[1]
    assert abs(np.mean(found) - beta) < 0.25


def test_bias_grows_with_alpha_and_large_mini_batches_want_a_smaller_one() -> None:
    pool = pool_of(np.random.default_rng(21), prompts=192, mean=turning, v=0.3)
    batches = batches_of(pool, alphas=True)
    small, large = analysis.tradeoff(batches, 64), analysis.tradeoff(batches, 64 * 40)
    assert small.bias[0].value == pytest.approx(0.0, abs=1e-12)  # α = 0 is the reference
    assert small.bias[-1].value > small.bias[4].value > 0
    assert large.best < small.best
    assert large.variance[3].value == pytest.approx(small.variance[3].value / 40)
    assert large.alignment[0].value > small.alignment[0].value
    assert small.scale[0].value == pytest.approx(1.0)
    assert small.cosine[16].value < small.cosine[4].value < 1.02
    assert max(one.value for one in large.alignment) <= 1.05


def test_alphas_that_the_data_do_not_tell_apart_at_the_stated_rate() -> None:
    """β = 1 and no bias: α = 1 is the best there is, so it must be among the α that are kept."""
    rng = np.random.default_rng(31)
    kept = []
    for seed in range(30):
        one = analysis.tradeoff(batches_of(pool_of(rng, prompts=32, v=0.3), seed, alphas=True), 32)
        kept.append(one.among[0] <= 1.0 <= one.among[1])
    assert rate(kept) >= 0.85


# ------------------------------------------------------------------------------------------------------------- thirds


def test_thirds_of_one_mean_do_not_differ() -> None:
    rng = np.random.default_rng(41)
    across, within, cosines = [], [], []
    for seed in range(20):
        a = analysis.thirds(pool_of(rng, prompts=32), False, seed)
        b = analysis.thirds(analysis.responses([group(rng, "deep", 96) for _ in range(2)]), True, seed)
        assert a is not None
        assert b is not None
        across.append(holds(a.difference[0, 2], 0.0))
        within.append(holds(b.difference[0, 2], 0.0))
        cosines.append(a.cosine[0, 2].value)
    assert rate(across) >= 0.8
    assert rate(within) >= 0.8
    assert abs(np.mean(cosines) - 1.0) < 0.1


def test_thirds_that_differ_are_seen_to() -> None:
    rng = np.random.default_rng(42)
    for within in (False, True):
        groups = [group(rng, "deep", 192, mean=turning) for _ in range(3)]
        of = analysis.responses(groups) if within else pool_of(rng, prompts=96, mean=turning)
        found = analysis.thirds(of, within, 0)
        assert found is not None
        assert found.where == ("within prompts" if within else "across prompts")
        assert found.length[0] < found.length[1] < found.length[2]
        assert found.difference[0, 2].low > 0
        assert found.cosine[0, 2].value < found.cosine[0, 1].value
        middle = turning(np.array([math.exp((math.log(10) + math.log(400)) / 2)]))[0]
        assert found.norm[1].value == pytest.approx(np.linalg.norm(middle), rel=0.3)
        # The floor: noise keeps two halves of one third from agreeing, too.
        assert found.plain[2, 2] < 1
        assert found.plain[0, 2] < min(found.plain[0, 0], found.plain[2, 2])


def test_responses_cut_at_one_length_are_the_long_third() -> None:
    pool = pool_of(np.random.default_rng(44), prompts=24)
    cut = Responses(pool.prompts, np.minimum(pool.lengths, int(np.quantile(pool.lengths, 0.5))), pool.products)
    found = analysis.thirds(cut, False, 0)
    assert found is not None
    assert found.length[2] == cut.lengths.max()
    assert found.length[0] < found.length[1] < found.length[2]


def test_thirds_need_lengths_that_differ() -> None:
    pool = pool_of(np.random.default_rng(43), prompts=8)
    same = Responses(pool.prompts, np.full_like(pool.lengths, 20), pool.products)
    assert analysis.thirds(same, False, 0) is None


# -------------------------------------------------------------------------------------------------------------- growth


def test_the_mean_shrinks_with_length_as_the_weights_do() -> None:
    rng = np.random.default_rng(51)
    groups = []
    for prompt in range(96):
        one = group(rng, "pool", 8, v=0.002)
        shift = math.exp((prompt % 3) - 1)  # prompts with short, middle and long responses
        one.lengths = np.maximum(1, (one.lengths * shift)).astype(np.int64)
        groups.append(one)
    found = analysis.growth(analysis.responses(groups), COMPARED, M, float(MU @ MU), 0)
    assert found is not None
    assert found.length[0] < found.length[1] < found.length[2]
    for mode in COMPARED:
        for norm, along, predicted in zip(found.norm[mode], found.along[mode], found.predicted[mode], strict=True):
            assert norm.value == pytest.approx(predicted, rel=0.25), mode
            assert along.value == pytest.approx(predicted, rel=0.25), mode
    assert found.predicted["vl_norm:1"] == pytest.approx([1, 1, 1])
    assert found.predicted["dapo_norm"][0] > 3 * found.predicted["dapo_norm"][2]
    few = analysis.responses(groups[:11])
    assert analysis.growth(few, COMPARED, M, 1.0, 0) is None


# ---------------------------------------------------------------------------------------------------------- altogether


def test_everything_of_a_model() -> None:
    rng = np.random.default_rng(61)
    groups = [group(rng, "deep", 32) for _ in range(2)] + [group(rng, "pool", 4) for _ in range(24)]
    found = analysis.analyse(stored(groups), "synthetic", "all", mini_batch=320)
    assert (found.drawn, found.prompts, found.speaking, found.deep, found.entries) == (24, 24, 24, (2, 32), D)
    assert [t.responses for t in found.tradeoffs] == [24, 320]
    assert [m.mode for m in found.methods] == list(COMPARED)
    assert {s.part for s in found.slopes} == {"all", "q_proj", "k_proj"}
    assert found.slope is not None
    assert not found.slope.score_only
    assert [t.where for t in found.thirds] == ["across prompts", "within prompts"]


@pytest.mark.parametrize(("deep", "pool"), [(0, 8), (2, 3)])
def test_too_few_prompts_are_refused(deep: int, pool: int) -> None:
    rng = np.random.default_rng(62)
    groups = [group(rng, "deep", 8) for _ in range(deep)] + [group(rng, "pool", 4) for _ in range(pool)]
    with pytest.raises(UserError, match=f"--deep-prompts {deep}, --pool-prompts {pool}: at least 1 and 4"):
        analysis.analyse(stored(groups), "synthetic", "all", mini_batch=320)
