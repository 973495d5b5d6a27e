"""What the lengths of one optimizer mini-batch say about its aggregation; logged as `actor/vl_norm/…`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from vlnorm_verl.aggregation import Aggregation, LengthFunction, of_each_response


class MiniBatchSums(NamedTuple):
    """Sums over the responses of a mini-batch that have a valid token; L in tokens."""

    summand: float  # Σ summand(L), the only one that the loss needs
    responses: float  # N
    tokens: float  # ΣL
    inverse_length: float  # Σ1/L
    numerator: float  # Σ numerator(L)
    squared_numerator: float  # Σ numerator(L)²
    numerator_tokens: float  # Σ numerator(L)·L


def mini_batch_sums(aggregation: Aggregation, lengths: torch.Tensor) -> torch.Tensor:
    """All of `MiniBatchSums` in its order as one tensor [7], for one all-reduce: sums of different ranks add.

    Args:
        aggregation: the method.
        lengths: valid tokens of each response held here, int64 [B]; B may be 0.

    Returns:
        float64 (float32 on a device without it).
    """
    numerator = aggregation.numerator
    functions: dict[str, LengthFunction] = {
        "summand": aggregation.summand,
        "responses": torch.ones_like,
        "tokens": lambda length: length,
        "inverse_length": torch.reciprocal,
        "numerator": numerator,
        "squared_numerator": lambda length: numerator(length) * numerator(length),
        "numerator_tokens": lambda length: numerator(length) * length,
    }
    return torch.stack([of_each_response(functions[name], lengths) for name in MiniBatchSums._fields]).sum(dim=-1)


def mini_batch_statistics(aggregation: Aggregation, sums: MiniBatchSums, scale: float | None) -> dict[str, float]:
    """Statistics of the whole mini-batch.

    Args:
        aggregation: the method.
        sums: over the whole mini-batch, in which a response has a valid token.
        scale: M in tokens.

    Returns:
        length_mean: arithmetic mean A of L, tokens.
        length_harmonic_mean: harmonic mean H of L, tokens.
        variance_ratio: √(A/H) ≥ 1, the coefficient of variation of Dr. GRPO's (or DAPO's) gradient over that of
            VL Norm with α = 1, as predicted from the lengths if variance is proportional to length.
        effective_responses: (Σx)²/Σx² ≤ N, Kish's effective sample size: how concentrated the weights are, whatever the
            noise of the gradients; for VL Norm this is 1/Σ(M x_i)².
        divisor: c·Σ_j summand(L_j), by which all weights are divided.
        weighted_tokens: Σ_i numerator(L_i) L_i. An aggregated quantity of tokens, such as the entropy, is a mean over
            tokens (by weight) after division by Σ_i x_i L_i = weighted_tokens / divisor; as both are sums over
            responses, their means over mini-batches give that of all of them together.
    """
    mean = sums.tokens / sums.responses
    harmonic = sums.responses / sums.inverse_length
    return {
        "length_mean": mean,
        "length_harmonic_mean": harmonic,
        "variance_ratio": math.sqrt(mean / harmonic),
        "effective_responses": sums.numerator**2 / sums.squared_numerator if sums.squared_numerator else 0.0,
        "divisor": sums.summand * (scale or 0.0) if aggregation.divide_by_m else sums.summand,
        "weighted_tokens": sums.numerator_tokens,
    }


def relative_weight_range(aggregation: Aggregation, lengths: torch.Tensor, sums: MiniBatchSums) -> tuple[float, float]:
    """Smallest and largest weight among `lengths`, relative to the mini-batch's mean weight.

    Args:
        aggregation: the method.
        lengths: valid tokens of each response, int64 [B]; any part of the mini-batch, such as one rank's.
        sums: over the whole mini-batch, in which a response has a valid token.

    Returns:
        min and max of N x_i / Σx, which for VL Norm is M N x_i; 1 means equal weights. (inf, 0) for a part without a
        valid token, so that min and max over parts stay right; (0, 0) if all weights are 0.
    """
    if not sums.numerator:
        return 0.0, 0.0
    numerators = of_each_response(aggregation.numerator, lengths)[lengths > 0]
    if not len(numerators):
        return math.inf, 0.0
    relative = numerators * (sums.responses / sums.numerator)
    return relative.min().item(), relative.max().item()
