"""What "unbiased" assumes: E[g | length] by thirds of the lengths, and the mean gradient as lengths grow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlnorm_verl.lab.aggregations import COMPARED
from vlnorm_verl.lab.gram import Bools, Floats, Ints, Responses, relative, root
from vlnorm_verl.lab.jackknife import blocks_of, jackknife, kept
from vlnorm_verl.lab.mini_batches import CROSS, REFERENCE, SQUARED_MEAN, MiniBatches
from vlnorm_verl.report.estimates import Estimate

THIRDS = ("short", "middle", "long")
PAIRS = ((0, 1), (1, 2), (0, 2))
HALVES = 100  # random ones, of the plain cosines
LEAST_PROMPTS = 12  # of the pool for `growth`: four in each third are the least to draw from


@dataclass(frozen=True)
class Thirds:
    """E[g | third of the lengths], short to long.

    where: "across prompts" (thirds of all lengths of the pool) or "within prompts" (of each prompt's own lengths).
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


def thirds(responses: Responses, within: bool, seed: int) -> Thirds | None:
    """E[g | third] from products of different prompts, or (`within`) of different responses of one prompt.

    None where there are fewer than three lengths. Prompts with fewer are left out.
    """
    third: Ints = np.full(len(responses.lengths), -1)
    scopes = (
        [responses.prompts == p for p in np.unique(responses.prompts)] if within else [np.ones(len(third), dtype=bool)]
    )
    for scope in scopes:
        distinct = np.unique(responses.lengths[scope])
        if len(distinct) < 3:
            continue
        # Where many responses were cut at one length, those are the long third.
        edges = np.minimum(np.quantile(responses.lengths[scope], [1 / 3, 2 / 3]), distinct[[-3, -2]])
        third[scope] = np.searchsorted(edges, responses.lengths[scope], side="left")
    onehot = (third[:, None] == np.arange(3)).astype(np.float64)  # [N, 3]
    if onehot.sum(axis=0).min() < 2:
        return None
    same = responses.prompts[:, None] == responses.prompts
    allowed = (same & ~np.eye(len(same), dtype=bool) if within else ~same).astype(np.float64)
    products = responses.products * allowed

    def inner(keep: Bools) -> Floats:
        """Products of the means of two thirds [3, 3]."""
        chosen = onehot * keep[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            return (chosen.T @ products @ chosen) / (chosen.T @ allowed @ chosen)

    # Blocks of prompts; within prompts, of responses, so that what is said is said of these prompts.
    position = np.concatenate([np.arange(n) for n in np.bincount(responses.prompts)]) if within else responses.prompts
    inners = [inner(keep) for keep in kept(blocks_of(int(position.max()) + 1)[position])]

    def estimate(statistic: Callable[[Floats], Floats], log: bool = False) -> list[Estimate]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return jackknife(np.array([statistic(products_of_means) for products_of_means in inners]), log)

    a, b = np.array(PAIRS).T

    def difference(m: Floats) -> Floats:
        both = np.diag(m)[a] + np.diag(m)[b]
        return relative(both - 2 * m[a, b], both / 2)

    cosines = estimate(lambda m: m[a, b] / (root(np.diag(m)[a]) * root(np.diag(m)[b])))
    return Thirds(
        where="within prompts" if within else "across prompts",
        length=[float(responses.lengths[third == t].mean()) for t in range(3)],
        norm=estimate(lambda m: root(np.diag(m)), log=True),
        cosine=dict(zip(PAIRS, cosines, strict=True)),
        plain=_half_cosines(responses, scopes, third, within, seed),
        difference=dict(zip(PAIRS, estimate(difference), strict=True)),
    )


def _half_cosines(
    responses: Responses, scopes: list[Bools], third: Ints, within: bool, seed: int
) -> dict[tuple[int, int], float]:
    """Mean over random halves of cos(mean of third a in one half, mean of third b in the other); NaN without any."""
    rng = np.random.default_rng(seed)
    cosines: dict[tuple[int, int], list[float]] = {pair: [] for pair in (*PAIRS, *((t, t) for t in range(3)))}
    for _ in range(HALVES):
        in_first = (
            rng.random(len(third)) < 0.5
            if within
            else (rng.permutation(responses.prompts.max() + 1) % 2 == 0)[responses.prompts]
        )
        for scope in scopes:
            members = np.array(
                [[(scope & (in_first == half) & (third == t)) for t in range(3)] for half in (True, False)]
            )
            counts = members.sum(axis=-1, keepdims=True)
            if counts.min() == 0:
                continue
            first, second = members / counts
            norms = [np.sqrt(np.einsum("ti,ij,tj->t", m, responses.products, m)) for m in (first, second)]
            cross = first @ responses.products @ second.T
            for (a, b), of_pair in cosines.items():
                if norms[0][a] * norms[1][b] > 0:
                    of_pair.append(cross[a, b] / (norms[0][a] * norms[1][b]))
    return {pair: float(np.mean(values)) if values else math.nan for pair, values in cosines.items()}


@dataclass(frozen=True)
class Growth:
    """‖E G‖ of each of `COMPARED` on a third of the prompts: those with short, middle or long responses.

    length: mean length. norm: in units of Dr. GRPO's over all prompts. predicted: E Σ M x_i, which is the norm if E g
    is the same for all prompts and lengths. along: component along Dr. GRPO's E G of the same prompts, in units of its
    length: what the weights alone change.
    """

    length: float
    norm: dict[str, Estimate]
    predicted: dict[str, float]
    along: dict[str, Estimate]


def growth(pool: Responses, scale: float, unit: float, seed: int) -> list[Growth]:
    """Short to long; empty if the pool has fewer than LEAST_PROMPTS prompts.

    unit: ‖E G‖² of Dr. GRPO over the whole pool; taken as known.
    """
    means = np.bincount(pool.prompts, weights=pool.lengths) / np.bincount(pool.prompts)
    if len(means) < LEAST_PROMPTS:
        return []
    reference = COMPARED.index(REFERENCE)
    found = []
    for chosen in np.array_split(np.argsort(means, kind="stable"), 3):
        part = pool.of(np.isin(pool.prompts, chosen))
        batches = MiniBatches(part, COMPARED, len(chosen) // 4, scale, seed)
        norms = batches.estimate(lambda m: root(relative(m[:, SQUARED_MEAN], unit)), log=True)
        along = batches.estimate(lambda m: relative(m[:, CROSS], m[reference, SQUARED_MEAN]))
        found.append(
            Growth(
                length=float(part.lengths.mean()),
                norm=dict(zip(COMPARED, norms, strict=True)),
                predicted={mode: float(batches.x[mode].sum(axis=1).mean()) for mode in COMPARED},
                along=dict(zip(COMPARED, along, strict=True)),
            )
        )
    return found
