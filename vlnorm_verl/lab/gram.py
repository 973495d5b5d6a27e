"""Inner products of per-response gradients g_i = A_i s_i (see gradients.py): all that the analysis needs of them.

Numpy only: no model, no verl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from vlnorm_verl.lab.store import Group

Floats: TypeAlias = np.ndarray  # float64
Ints: TypeAlias = np.ndarray  # int64
Bools: TypeAlias = np.ndarray

AT_A_TIME = 2**24  # entries of gradients in float64: 128 MB, however long a gradient is


@dataclass(frozen=True)
class Responses:
    """Responses and the inner products of their gradients.

    prompts: index of the prompt of each, int [N]. lengths: tokens, int [N]. products: g_i·g_j, float64 [N, N].
    """

    prompts: Ints
    lengths: Ints
    products: Floats


def inner_products(groups: Sequence[Group], columns: slice = slice(None), score_only: bool = False) -> Responses:
    """The responses of groups, with the products of a part of their gradients.

    Args:
        groups: of one kind.
        columns: which coordinates of the stored gradients.
        score_only: with A = 1 for every response instead of its advantage. An advantage of a group of equal rewards
            is taken as 0, not as what rounding leaves of it.
    """
    sizes = [len(group.lengths) for group in groups]
    advantages = np.concatenate([np.ones(len(g.lengths)) if score_only else g.advantages * g.mixed for g in groups])
    start, stop, _ = columns.indices(groups[0].score_gradients.shape[1])
    products = np.zeros((sum(sizes), sum(sizes)))
    width = max(1, AT_A_TIME // sum(sizes))
    for first in range(start, stop, width):
        chunk = slice(first, min(first + width, stop))
        part = np.concatenate([np.asarray(group.score_gradients[:, chunk], dtype=np.float64) for group in groups])
        products += part @ part.T
    return Responses(
        prompts=np.repeat(np.arange(len(groups)), sizes),
        lengths=np.concatenate([group.lengths for group in groups]),
        products=products * np.outer(advantages, advantages),
    )


def squared_distances(products: Floats) -> Floats:
    """‖g_i − mean‖² [n], from products [n, n]."""
    distances = np.diag(products) - 2 * products.mean(axis=1) + products.mean()
    return np.maximum(distances, 0.0)  # rounding


def factor(products: Floats) -> Floats:
    """F [N, r] with F Fᵀ = products [N, N]: each gradient in the r ≤ N dimensions that all of them span."""
    values, vectors = np.linalg.eigh(products)
    spanned = values > 1e-12 * values[-1]
    return np.asarray(vectors[:, spanned] * np.sqrt(values[spanned]))


def root(squared_norms: Floats) -> Floats:
    """√; NaN for what is not positive: an unbiased estimate of a squared norm that noise has made negative."""
    return np.sqrt(np.where(squared_norms > 0, squared_norms, np.nan))


def relative(values: Floats, unit: Floats | float) -> Floats:
    """values / unit; NaN where the unit, an unbiased estimate of a squared norm, is not positive."""
    return values / np.where(unit > 0, unit, np.nan)
