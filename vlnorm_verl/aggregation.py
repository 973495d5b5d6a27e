"""The maths of loss aggregation in RLVR, without any import of verl.

An aggregation turns the token losses of N responses of lengths L_i into one scalar, Σ_i x_i ℓ_i, where ℓ_i is
the sum of response i's token losses. Every method of the paper is a per-response function of the length and one
scalar summed over the whole optimizer mini-batch:

    x_i = numerator(L_i) / (c · Σ_j summand(L_j))        c = M if `divide_by_m` else 1

| method       | mode                | numerator(L) | summand(L) | c | source                          |
|--------------|---------------------|--------------|------------|---|---------------------------------|
| VL Norm      | vl_norm, vl_norm:α  | L^-α         | L^-α       | M | arXiv 2509.07558, VL Norm       |
| GRPO Norm    | grpo_norm           | 1/L          | 1          | 1 | verl's seq-mean-token-mean      |
| DAPO Norm    | dapo_norm           | 1            | L          | 1 | verl's token-mean               |
| Dr. GRPO Norm| dr_grpo_norm        | 1            | 1          | M | verl's seq-mean-token-sum-norm  |

Symbols are the paper's: L_i length in valid response tokens, α the exponent, M a constant in tokens (verl's
`loss_scale_factor`). The sum over j must run over the optimizer mini-batch, across its micro-batches and
data-parallel ranks: a sum over a micro-batch is a different estimator. Hence `aggregate` takes the sum as an
argument and there is no default for it.

A response without a valid token (a padding row, a fully masked one) has weight 0 and is not counted in any sum.
`registry` has the names of the methods and takes new ones, `metrics` says what the lengths of a mini-batch mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

LengthFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Aggregation:
    """x_i = numerator(L_i) / (c · Σ_j summand(L_j)).

    Args:
        numerator: maps lengths ≥ 1 [B] (float64, tokens) to what the weights are proportional to, ≥ 0 [B].
        summand: each response's term > 0 in the one scalar of the mini-batch; same shapes.
        divide_by_m: whether c is M (tokens); otherwise c is 1 and M is not used.
    """

    numerator: LengthFunction
    summand: LengthFunction
    divide_by_m: bool


def response_weights(
    aggregation: Aggregation, lengths: torch.Tensor, total: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """The weights x_i of responses of one mini-batch.

    Args:
        aggregation: the method.
        lengths: valid tokens of each response, int64 [B]; any part of the mini-batch.
        total: Σ_j summand(L_j) over the whole mini-batch, scalar tensor.
        scale: M in tokens, > 0; not used by a method without `divide_by_m`.

    Returns:
        x_i [B] in float64 (float32 on a device without it); all 0 if the mini-batch has no valid token.

    Raises:
        ValueError: M is needed and is not a positive finite number.
    """
    if aggregation.divide_by_m:
        if scale is None or not (0 < scale < math.inf):
            raise ValueError(f"loss_scale_factor={scale!r}: M must be a positive number of tokens")
    else:
        scale = 1.0
    numerators = of_each_response(aggregation.numerator, lengths)
    # The total is 0 only if no response of the mini-batch is valid; then every numerator is 0 and so is every weight.
    # A total of NaN stays: it must show.
    return numerators / (torch.where(total == 0, 1.0, total) * scale)


def mini_batch_sum(aggregation: Aggregation, lengths: torch.Tensor) -> torch.Tensor:
    """Σ_j summand(L_j) of the responses given, scalar; sums of the parts of a mini-batch (micro-batches, ranks) add."""
    return of_each_response(aggregation.summand, lengths).sum()


def aggregate(
    loss_mat: torch.Tensor,
    loss_mask: torch.Tensor,
    aggregation: Aggregation,
    total: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Σ_i x_i Σ_t loss_it over the responses given, which may be any part of a mini-batch.

    Added up over the parts of a mini-batch this is exactly the aggregated loss, however it was split.

    Args:
        loss_mat: token losses [B, T], a whole response in each row, any float dtype (in float16 a long response's
            gradient may be 0 without a scaled loss). Masked entries do not matter, NaN included, and have gradient 0. A
            NaN before them, in a ratio or an advantage, still makes the gradient NaN, as 0 · NaN: mask it there.
        loss_mask: 1 (or True) at valid response tokens [B, T].
        aggregation, total, scale: as in `response_weights`.

    Returns:
        Scalar in the dtype of `loss_mat`, at least float32.
    """
    lengths = response_lengths(loss_mask)
    device = loss_mat.device
    weights = response_weights(aggregation, lengths, total.to(device, weight_dtype(device.type)), scale)
    result_dtype = torch.promote_types(loss_mat.dtype, torch.float32)
    masked = torch.where(loss_mask.bool(), loss_mat, 0.0)  # [B, T] in the dtype of the losses
    response_losses = masked.sum(dim=-1, dtype=result_dtype)  # [B]
    return (weights * response_losses.to(weights.dtype)).sum().to(result_dtype)


# -------------------------------------------------------------------------------------------------------- lengths


def response_lengths(response_mask: torch.Tensor) -> torch.Tensor:
    """Number of valid tokens of each response.

    Args:
        response_mask: 1 (or True) at valid response tokens; [B, T] padded, or a jagged nested tensor [B, j].

    Returns:
        int64 [B].
    """
    if not response_mask.is_nested:
        # torch casts all of the mask to the sum's type first: 4 bytes an entry of a bool mask are better than 8.
        narrow = torch.int32 if response_mask.dtype == torch.bool else torch.int64
        return response_mask.sum(dim=-1, dtype=narrow).to(torch.int64)
    # A running sum over the packed values needs no padded copy and no host sync.
    running = torch.nn.functional.pad(response_mask.values().cumsum(0, dtype=torch.int64), (1, 0))
    offsets, narrowed = response_mask.offsets(), response_mask.lengths()  # a narrowed one keeps the values left out
    ends = offsets[1:] if narrowed is None else offsets[:-1] + narrowed
    return running[ends] - running[offsets[:-1]]


def of_each_response(function: LengthFunction, lengths: torch.Tensor) -> torch.Tensor:
    """function(L_i) [B], 0 where a response has no valid token; lengths: int64 [B], B may be 0.

    In float64 (float32 on a device without it). `function` is given 1 instead of 0, so that no power is infinite.
    """
    exact = lengths.clamp(min=1).to(weight_dtype(lengths.device.type))
    return torch.where(lengths > 0, function(exact), 0.0)


def weight_dtype(device_type: str) -> torch.dtype:
    """float64, or float32 on a device type without it (Apple's mps has none, Huawei's npu no collectives in it)."""
    return torch.float32 if device_type in ("mps", "npu") else torch.float64
