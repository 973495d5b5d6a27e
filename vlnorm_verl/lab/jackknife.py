"""95% intervals of the lab: a jackknife over blocks, t over prompts, percentiles of a bootstrap.

An unbiased estimate of a squared norm can be negative. Where one that is divided by is, in the estimate or in a
replicate of the jackknife, the result is NaN with a note.
"""

from __future__ import annotations

import math

import numpy as np

from vlnorm_verl.lab.gram import Bools, Floats, Ints
from vlnorm_verl.report.estimates import Estimate, t_half_width, t_quantile

BLOCKS = 16  # of prompts
LOST = "lost in noise"
FOUND = 1.4  # half widths above 0: four such samples in five find it


def blocks_of(count: int) -> Ints:
    """A block for each of `count` prompts, at most BLOCKS of them and of nearly equal size."""
    return np.arange(count) % min(BLOCKS, count)


def kept(blocks: Ints) -> Bools:
    """What is kept, bool [1 + blocks, units]: everything first, then all but one block."""
    return np.concatenate([np.ones((1, len(blocks)), dtype=bool), np.unique(blocks)[:, None] != blocks])


def lost_in_noise(squared_norm: Estimate, prompts: int) -> str:
    """What is said where an unbiased estimate of a squared norm is not above 0; "" where it is.

    With how many prompts would find it: the half width falls as 1/prompts while noise has most of it. If the estimate
    is negative, its interval's upper end is taken for the truth, so that even more may be needed.
    """
    if squared_norm.low > 0:
        return ""
    truth = squared_norm.value if squared_norm.value > 0 else squared_norm.high
    if not truth > 0:
        return LOST
    needed = prompts * (FOUND * (squared_norm.high - squared_norm.value) / truth)
    unit = 10 ** (math.floor(math.log10(needed)) - 1)  # of two digits
    rounded = math.ceil(needed / unit) * unit
    return f"{LOST}; {'about' if squared_norm.value > 0 else 'more than'} {rounded:,.0f} prompts would find it"


def jackknife(values: Floats, log: bool = False, lost: str = LOST) -> list[Estimate]:
    """Estimates with t intervals.

    Args:
        values: a vector of statistics for each row of `kept`, [1 + blocks, K]; NaN for what cannot be said.
        log: whether the interval is made for the logarithm (of ratios and norms). A value ≤ 0 then has none.
        lost: the note of what cannot be said.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.log(values) if log else values
        count = len(values) - 1
        spread = scaled[1:] - scaled[1:].mean(axis=0)
        half = t_quantile(count - 1) * np.sqrt((count - 1) / count * (spread**2).sum(axis=0))
    results = []
    for value, middle, width in zip(values[0], scaled[0], half, strict=True):
        if not np.isfinite(middle) or not np.isfinite(width):
            results.append(Estimate(math.nan, note=lost))
            continue
        low, high = float(middle - width), float(middle + width)
        results.append(Estimate(float(value), *((math.exp(low), math.exp(high)) if log else (low, high))))
    return results


def mean_over_prompts(values: Floats) -> Estimate:
    """Mean of one number a prompt with its t interval; of those that are finite, and then without an interval."""
    known = values[np.isfinite(values)]
    mean = float(known.mean()) if len(known) else math.nan
    if len(known) < max(2, len(values)):
        note = "one prompt" if len(known) == len(values) else f"known for {len(known)} of {len(values)} prompts"
        return Estimate(mean, note=note)
    half = t_half_width(known)
    return Estimate(mean, mean - half, mean + half)


def percentiles(values: Floats) -> Estimate:
    """The first value, with the percentile interval of the others, which are its bootstrap."""
    others = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or len(others) < 0.975 * (len(values) - 1):  # fewer may all be beyond one end
        return Estimate(float(values[0]), note="too few responses")
    return Estimate(float(values[0]), float(np.quantile(others, 0.025)), float(np.quantile(others, 0.975)))
