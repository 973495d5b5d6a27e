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

    length: mean length of each third. norm: ‖E[g | third]‖, without the noise's share.
    cosine: {(a, b): cosine of the means of two thirds}, corrected for noise, so that a value above 1 is noise.
    difference: {(a, b): ‖difference of the means‖² over the mean of the two squared norms}; 0 if E[g | L] is the same.
    """

    length: list[float]
    norm: list[Estimate]
    cosine: dict[tuple[int, int], Estimate]
    difference: dict[tuple[int, int], Estimate]


def _edges(lengths: Ints) -> Ints:
    """The largest length of the short and of the middle third, of at least three different lengths.

    Where more than a third of the responses have the longest length (cut at the limit, say), or more than two thirds
    the shortest, they are that third, and the others are halved.
    """
    distinct = np.unique(lengths)
    last = len(distinct) - 1

    def place(share: float, of: Ints) -> int:
        return int(np.searchsorted(distinct, np.quantile(of, share), side="right")) - 1

    first, second = place(1 / 3, lengths), place(2 / 3, lengths)
    if second == last:
        second = last - 1
        first = min(first, place(1 / 2, lengths[lengths < distinct[last]]))
    elif second == 0:
        second = min(place(1 / 2, lengths[lengths > distinct[0]]), last - 1)
    return np.asarray(distinct[[min(first, second - 1), second]])


def thirds(responses: Responses) -> Thirds | None:
    """E[g | third of all lengths] from products of different prompts; None where there are fewer than three lengths."""
    if len(np.unique(responses.lengths)) < 3:
        return None
    third: Ints = np.asarray(np.searchsorted(_edges(responses.lengths), responses.lengths, side="left"))
    onehot = (third[:, None] == np.arange(3)).astype(np.float64)  # [N, 3]
    allowed = (responses.prompts[:, None] != responses.prompts).astype(np.float64)
    products = responses.products * allowed

    def inner(keep: Bools) -> Floats:
        """Products of the means of two thirds [3, 3]."""
        chosen = onehot * keep[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((chosen.T @ products @ chosen) / (chosen.T @ allowed @ chosen))

    prompts = int(responses.prompts.max()) + 1
    inners = [inner(keep) for keep in kept(blocks_of(prompts)[responses.prompts])]
    if not np.isfinite(inners[0]).all():
        return None

    weakest = min(jackknife(np.array([np.diag(m) for m in inners])), key=lambda norm: norm.low)
    lost = lost_in_noise(weakest, prompts) or LOST

    def estimate(statistic: Callable[[Floats], Floats], log: bool = False) -> list[Estimate]:
        return jackknife(np.array([statistic(products_of_means) for products_of_means in inners]), log, lost)

    a, b = np.array(PAIRS).T

    def difference(m: Floats) -> Floats:
        both = np.diag(m)[a] + np.diag(m)[b]
        return relative(both - 2 * m[a, b], both / 2)

    cosines = estimate(lambda m: m[a, b] / (root(np.diag(m)[a]) * root(np.diag(m)[b])))
    return Thirds(
        length=[float(responses.lengths[third == t].mean()) for t in range(3)],
        norm=estimate(lambda m: root(np.diag(m)), log=True),
        cosine=dict(zip(PAIRS, cosines, strict=True)),
        difference=dict(zip(PAIRS, estimate(difference), strict=True)),
    )
