"""Gradients whose law is known, for the tests of the lab: E[g | L] and the variance V·L^β are chosen here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.signal import lfilter

from vlnorm_verl.lab.aggregations import COMPARED, OF_ALPHAS
from vlnorm_verl.lab.gram import Responses, inner_products
from vlnorm_verl.lab.mini_batches import MiniBatches
from vlnorm_verl.lab.store import Group, Stored
from vlnorm_verl.report.estimates import Estimate

D = 24
M = 400.0
MU = np.linspace(1.0, 2.0, D) / math.sqrt(D)

Mean = Callable[[np.ndarray], np.ndarray]  # lengths [n] -> E[g | L] [n, D]


def constant(lengths: np.ndarray) -> np.ndarray:
    return np.tile(MU, (len(lengths), 1))


def scaled(power: float) -> Mean:
    """One direction for every length, its size ∝ L^power; about MU on average."""
    return lambda lengths: (lengths / 100)[:, None] ** power * MU


def turning(lengths: np.ndarray) -> np.ndarray:
    """Long responses pull another way."""
    other = np.where(np.arange(D) % 2 == 0, MU, -MU)
    share = (np.log(lengths) - math.log(10)) / math.log(40)
    return (1 - share)[:, None] * MU + share[:, None] * other


def lengths_of(rng: np.random.Generator, n: int | tuple[int, int]) -> np.ndarray:
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
        lengths=lengths,
        rewards=np.arange(n) % 2.0,
        advantages=np.ones(n),
        score_gradients=(mean(lengths) + noise).astype(np.float32),
        truncated=np.zeros(n, dtype=bool),
    )


def correlated_sum(rng: np.random.Generator, length: int, rho: float) -> np.ndarray:
    """Σ_t ξ_t with corr(ξ_t, ξ_s) = ρ^|t-s| and variance 1."""
    shocks = rng.normal(size=(length, D))
    shocks[1:] *= math.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], shocks, axis=0).sum(axis=0)


def stored(groups: list[Group], **settings: Any) -> Stored:
    half = D // 2
    return Stored(
        settings={"max_response_length": M, **settings},
        entries=D,
        dimension=D,
        parts={"q_proj": slice(0, half), "k_proj": slice(half, D)},
        groups=groups,
    )


def pool_of(rng: np.random.Generator, prompts: int = 48, n: int = 8, **law: Any) -> Responses:
    return inner_products([group(rng, "pool", n, **law) for _ in range(prompts)])


def batches_of(pool: Responses, seed: int = 0, alphas: bool = False) -> MiniBatches:
    modes = COMPARED + (OF_ALPHAS if alphas else ())
    return MiniBatches(pool, modes, int(pool.prompts.max() + 1) // 8, M, seed)  # the size that `truth` has


def holds(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


def rate(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def truth(mode: str, beta: float, mean: Mean) -> tuple[float, float, np.ndarray]:
    """E M Σx, E‖G − E G‖² and E G under one aggregation from the law itself, without anything of `analysis`."""
    rng = np.random.default_rng(123)
    N, v, draws = 48, 0.02, 3000  # responses of `batches_of` a pool of `pool_of`, its noise
    L = lengths_of(rng, (draws, N)).astype(float)
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
    return x.sum(axis=1).mean(), spread, centre
