"""What "unbiased" assumes: E[g | length] is the same for short, middle and long responses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlnorm_verl.lab.gram import Bools, Floats, Ints, Responses, relative, root
from vlnorm_verl.lab.jackknife import LOST, blocks_of, jackknife, kept, lost_in_noise
from vlnorm_verl.report.estimates import Estimate

THIRDS = ("short", "middle", "long")
PAIRS = ((0, 1), (1, 2), (0, 2))


@dataclass(frozen=True)
class Thirds:
    """E[g | third of the lengths], short to long.

    where: "across prompts" (thirds of all lengths of the pool) or "within prompts" (of each prompt's own lengths).
    length: mean length of each third. norm: ‖E[g | third]‖, without the noise's share.
    cosine: {(a, b): cosine of the means of two thirds}, corrected for noise, so that a value above 1 is noise.
    difference: {(a, b): ‖difference of the means‖² over the mean of the two squared norms}; 0 if E[g | L] is the same.
    """

    where: str
    length: list[float]
    norm: list[Estimate]
    cosine: dict[tuple[int, int], Estimate]
    difference: dict[tuple[int, int], Estimate]


def thirds(responses: Responses, within: bool) -> Thirds | None:
    """E[g | third] from products of different prompts, or (`within`) of different responses of one prompt.

    None where there are fewer than three lengths. Prompts with fewer are left out.
    """
    third: Ints = np.full(len(responses.lengths), -1)
    groups = responses.prompts if within else np.zeros(len(third))
    for scope in (groups == group for group in np.unique(groups)):
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
    units = int(position.max()) + 1
    inners = [inner(keep) for keep in kept(blocks_of(units)[position])]

    weakest = min(jackknife(np.array([np.diag(m) for m in inners])), key=lambda norm: norm.low)
    lost = lost_in_noise(weakest, units, "responses to each prompt" if within else "prompts") or LOST

    def estimate(statistic: Callable[[Floats], Floats], log: bool = False) -> list[Estimate]:
        with np.errstate(invalid="ignore", divide="ignore"):
            return jackknife(np.array([statistic(products_of_means) for products_of_means in inners]), log, lost)

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
        difference=dict(zip(PAIRS, estimate(difference), strict=True)),
    )
