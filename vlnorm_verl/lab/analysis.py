"""All that per-response gradients of one model say about loss aggregation.

Two kinds of prompts are read (see `store.Group`): "slope" prompts with many responses each, for how variance grows with
length, and the "pool" of many prompts with few responses, as in training, from which mini-batches are drawn.

Covered: one model at a time. Not covered: gradients off policy (clipping), several updates, Adam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlnorm_verl.lab import aggregations
from vlnorm_verl.lab.aggregations import COMPARED, OF_ALPHAS, Comparison, NoisyResponse, Tradeoff
from vlnorm_verl.lab.gram import Ints, inner_products
from vlnorm_verl.lab.length_means import Thirds, thirds
from vlnorm_verl.lab.mini_batches import MiniBatches
from vlnorm_verl.lab.slopes import Slope, slope
from vlnorm_verl.lab.store import Stored


@dataclass(frozen=True)
class Analysis:
    """All that is said of one model by the gradients of some of its parameters.

    name: of the model. gradients: which parameters. entries: how many numbers; columns: projected to so many. lengths:
    of the pool's responses. reward: mean of the pool's. truncated: share of its responses that were cut. prompts: of
    the pool; mixed: those of them whose rewards differ, so that they have advantages. slope_prompts: prompts with many
    responses, and how many. slope: the one of `slopes` of all these parameters with the real advantages. drawn:
    responses of a mini-batch drawn from the pool.
    """

    name: str
    gradients: str
    entries: int
    columns: int
    settings: dict[str, Any]
    lengths: Ints
    reward: float
    truncated: float
    prompts: int
    mixed: int
    slope_prompts: tuple[int, int]
    slopes: list[Slope]
    slope: Slope | None
    methods: list[Comparison]
    noisy: list[NoisyResponse]
    drawn: int
    tradeoff: Tradeoff
    thirds: Thirds | None


def analyse(stored: Stored, name: str, gradients: str, mini_batch: int, seed: int = 0) -> Analysis:
    """Everything, of one model's stored gradients.

    Args:
        stored: of at least one prompt with many responses, and four in the pool.
        name, gradients: see `Analysis`.
        mini_batch: responses of the optimizer mini-batch for which an α is wanted.
        seed: of the mini-batches that are drawn and of the bootstrap.
    """
    many = [group for group in stored.groups if group.kind == "slope"]
    pool = {number: group for number, group in enumerate(stored.groups) if group.kind == "pool"}
    parts = {"all": slice(0, stored.dimension)} | (stored.parts if len(stored.parts) > 1 else {})
    every = [slope(many, part, at, score_only, seed) for score_only in (True, False) for part, at in parts.items()]
    slopes = [of_part for of_part in every if of_part]
    of_all = next((s for s in slopes if s.part == "all" and not s.score_only), None)
    beta = of_all.mean.value if of_all else math.nan
    of_pool = inner_products(list(pool.values()))
    scale = float(stored.settings["max_response_length"])
    batches = MiniBatches(of_pool, COMPARED + OF_ALPHAS, len(pool) // 4, scale, seed)
    return Analysis(
        name=name,
        gradients=gradients,
        entries=stored.entries,
        columns=stored.dimension,
        settings=stored.settings,
        lengths=of_pool.lengths,
        reward=float(np.mean([group.rewards.mean() for group in pool.values()])),
        truncated=float(np.mean([group.truncated.mean() for group in pool.values()])),
        prompts=len(pool),
        mixed=sum(group.mixed for group in pool.values()),
        slope_prompts=(len(many), len(many[0].lengths)),
        slopes=slopes,
        slope=of_all,
        methods=aggregations.compare(batches, beta),
        noisy=aggregations.noisy_responses(batches, pool),
        drawn=round(batches.responses),
        tradeoff=aggregations.tradeoff(batches, mini_batch),
        thirds=thirds(of_pool),
    )


def of_most_parameters(analyses: Sequence[Analysis]) -> list[Analysis]:
    """Of each model, what the most parameters say: the update is of all of them."""
    names = dict.fromkeys(analysis.name for analysis in analyses)
    return [max((a for a in analyses if a.name == name), key=lambda a: a.entries) for name in names]
