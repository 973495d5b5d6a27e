"""Mini-batches drawn from the pool of prompts, and their gradients under several aggregations, as inner products.

A mini-batch's gradient is G = Σ_i x_i g_i, with the x_i of `vlnorm_verl.aggregation`; here they are multiplied by M, so
that Σ x_i is 1 for Dr. GRPO Norm and VL Norm. ‖E G‖² and every product of means is an average of products of
mini-batches that share no prompt: the plug-in ‖mean‖² is too large by the variance of the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vlnorm_verl.lab.gram import Bools, Floats, Ints, Responses, factor
from vlnorm_verl.lab.jackknife import LOST, blocks_of, jackknife, lost_in_noise
from vlnorm_verl.report.estimates import Estimate

REFERENCE = "dr_grpo_norm"  # Σx = 1 and equal weights: unbiased whatever E[g | L] is
SUM_X, SQUARE, SQUARED_MEAN, CROSS = range(4)  # moments: E Σx, E‖G‖², ‖E G‖², E G·E G(reference)
ROUNDS = 64  # of dealing the pool's prompts out into mini-batches
ROUNDING = 1e-6  # of E‖G‖²: a product of means that is smaller is what float32's rounding may leave of 0


def draw_mini_batches(prompts: int, size: int, seed: int) -> Bools:
    """Which prompts are in which mini-batch: bool [R, prompts], ROUNDS rounds one after the other.

    Each round deals all prompts out into mini-batches of `size` prompts, so that every prompt is used nearly as often
    and no two mini-batches of a round share one.
    """
    rng = np.random.default_rng(seed)
    dealt = [np.argsort(rng.permutation(prompts)) // size for _ in range(ROUNDS)]  # the mini-batch of each prompt
    return np.concatenate([np.arange(prompts // size)[:, None] == of_prompt for of_prompt in dealt])


def weights(mode: str, lengths: Ints, members: Bools, scale: float) -> tuple[Floats, Floats]:
    """M·x_i of each response in each mini-batch, and its summand of the denominator, float64 [R, N]; 0 for the rest.

    Args:
        mode: as in verl's config, `vl_norm:0.75`.
        lengths: int [N]. members: bool [R, N]. scale: M, tokens.
    """
    import torch

    from vlnorm_verl.registry import parse_mode

    aggregation = parse_mode(mode)
    exact = torch.as_tensor(lengths, dtype=torch.float64)
    numerators, terms = aggregation.numerator(exact).numpy(), aggregation.summand(exact).numpy()
    x = members * numerators / (members @ terms)[:, None] * (1.0 if aggregation.divide_by_m else scale)
    return x, members * terms


class MiniBatches:
    """Gradients G of mini-batches drawn from the pool, under several aggregations, as inner products.

    lost: "" where ‖E G(`REFERENCE`)‖² is above 0 by its interval, else what is said instead (`lost_in_noise`).
    """

    def __init__(self, pool: Responses, modes: Sequence[str], size: int, scale: float, seed: int) -> None:
        """
        Args:
            pool: responses of P prompts, numbered from 0.
            modes: what to compare, `REFERENCE` among them; a repeated one counts once.
            size: prompts of a mini-batch, at most P/2, so that a round has two or more.
            scale: M, tokens.
        """
        self.pool = pool
        prompts = int(pool.prompts.max()) + 1
        self.responses = size * len(pool.prompts) / prompts  # of a mini-batch
        self.members = draw_mini_batches(prompts, size, seed)
        of_response = self.members[:, pool.prompts]
        weighted = {mode: weights(mode, pool.lengths, of_response, scale) for mode in modes}
        self.x = {mode: x for mode, (x, _) in weighted.items()}
        self._factor = factor(pool.products)
        self._block = blocks_of(prompts)[pool.prompts]
        references = [gradients for _, gradients in self._gradients(*weighted[REFERENCE])]
        # [1 + blocks, modes, 4]: SUM_X … CROSS of everything, then without one block of prompts at a time.
        self.moments = np.stack(
            [
                [_averages(*replicate, of) for replicate, of in zip(self._gradients(*mode), references, strict=True)]
                for mode in weighted.values()
            ],
            axis=1,
        )
        (squared_norm,) = jackknife(self.moments[:, [self.row(REFERENCE)], SQUARED_MEAN])
        self.lost = lost_in_noise(squared_norm, prompts)

    def _gradients(self, x: Floats, terms: Floats) -> Iterator[tuple[Floats, Floats]]:
        """(Σx [R], G [R, r]) of the mini-batches: with everything, then without one block at a time.

        A mini-batch without a block is the same draw with that block's part of x taken out and its sum of terms made up
        for, so that the replicates differ by the data alone and not by what was drawn. NaN if nothing of it is left.
        """
        whole, total = x @ self._factor, terms.sum(axis=1)
        yield x.sum(axis=1), whole
        for block in np.unique(self._block):
            in_block = self._block == block
            left = total - terms[:, in_block].sum(axis=1)
            made_up = np.divide(total, left, out=np.full_like(left, np.nan), where=left > 1e-9 * total)
            part = x[:, in_block]
            sums = x.sum(axis=1) - part.sum(axis=1)
            yield sums * made_up, (whole - part @ self._factor[in_block]) * made_up[:, None]

    def row(self, mode: str) -> int:
        return list(self.x).index(mode)

    def estimate(self, statistic: Callable[[Floats], Floats], log: bool = False) -> list[Estimate]:
        """Jackknife over prompts of a vector function of the moments [modes, 4]."""
        return jackknife(np.array([statistic(moments) for moments in self.moments]), log, self.lost or LOST)

    def predicted_noise(self, mode: str, beta: float) -> float:
        """√(E Σx² L^β) / E Σx: the closed form's noise for a given sum of weights, in units of √V."""
        x = self.x[mode]
        return float(np.sqrt((x**2 @ self.pool.lengths**beta).mean()) / x.sum(axis=1).mean())


def _averages(sums: Floats, g: Floats, reference: Floats) -> Floats:
    """The moments; SQUARED_MEAN and CROSS over pairs of mini-batches of one round."""
    valid = np.isfinite(sums)
    g, reference = np.where(valid[:, None], g, 0.0), np.where(valid[:, None], reference, 0.0)
    square = (g * g).sum() / valid.sum()
    count = valid.reshape(ROUNDS, -1).sum(axis=1)
    pairs = (count * (count - 1)).sum()

    def of_pairs(other: Floats) -> float:
        """Mean over pairs r ≠ s of one round of g_r·other_s, from the rounds' totals."""
        totals = [v.reshape(ROUNDS, len(v) // ROUNDS, v.shape[1]).sum(axis=1) for v in (g, other)]
        product = float((totals[0] * totals[1]).sum() - (g * other).sum()) / pairs
        return 0.0 if abs(product) < ROUNDING * square else product

    return np.array([sums[valid].mean(), square, of_pairs(g), of_pairs(reference)])
