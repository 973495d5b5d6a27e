# Copyright 2024 Bytedance Ltd. and/or its affiliates
# Copyright 2025 Individual Contributor: the authors of vlnorm-verl
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Registry of loss aggregation modes, the values of `loss_agg_mode`.

An aggregation gets the loss matrix of a micro-batch and numbers of the global batch, and returns a scalar whose sum
over the micro-batches, averaged over the data-parallel ranks, is the loss of the global batch. Hence every mode
multiplies by `dp_size`.

A mode whose weights depend on all responses of the mini-batch declares `length_stat`, a function of the response
lengths. The engine sums it over the mini-batch, with one all-reduce, and hands the sum over as `batch_stat_sum`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import verl.utils.torch_functional as verl_F

# fn(loss_mat, loss_mask, **batch_info) -> scalar tensor; batch_info is documented in `register_loss_agg`.
LossAggFn = Callable[..., torch.Tensor]
# lengths (bs,), at least 1, in float64 (float32 on devices without it) -> (bs,)
LengthStat = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LossAgg:
    """A registered aggregation mode."""

    fn: LossAggFn
    length_stat: LengthStat | None = None


LOSS_AGG_REGISTRY: dict[str, LossAgg] = {}


def register_loss_agg(name: str, length_stat: LengthStat | None = None) -> Callable[[LossAggFn], LossAggFn]:
    """Register an aggregation mode with the given name, as `loss_agg_mode=<name>`.

    The function is called as fn(loss_mat, loss_mask, **batch_info). It takes the arguments it needs by name and the
    others by `**_`:

        loss_mat: micro batch loss matrix, (bs, response_length)
        loss_mask: micro batch loss mask, (bs, response_length)
        dp_size: data parallel size
        batch_num_tokens: number of valid tokens in global batch, or None
        global_batch_size: global batch size, or None
        loss_scale_factor: the config key of that name, or None
        batch_stat_sum: sum of `length_stat` over the responses of the global batch that have a valid token;
            None without `length_stat`

    The mode must be registered in every process, on the driver before the config is validated, e.g. in a module of
    the `verl.plugins` entry point group.

    Args:
        name: value of `loss_agg_mode`
        length_stat: per-response statistic whose sum over the mini-batch the function needs

    Returns:
        function: Decorator function that registers the aggregation function.
    """

    def decorator(fn: LossAggFn) -> LossAggFn:
        if name in LOSS_AGG_REGISTRY and LOSS_AGG_REGISTRY[name].fn != fn:
            raise ValueError(f"loss_agg_mode {name} has already been registered: {LOSS_AGG_REGISTRY[name].fn} vs {fn}")
        LOSS_AGG_REGISTRY[name] = LossAgg(fn, length_stat)
        return fn

    return decorator


def get_loss_agg(name: str) -> LossAgg:
    """Get the aggregation mode with a given name.

    Raises:
        ValueError: no mode of this name is registered.
    """
    if name not in LOSS_AGG_REGISTRY:
        raise ValueError(f"Invalid loss_agg_mode: {name}. Registered modes are: {list(LOSS_AGG_REGISTRY)}")
    return LOSS_AGG_REGISTRY[name]


def sum_length_stat(response_mask: torch.Tensor, length_stat: LengthStat, device=None) -> torch.Tensor:
    """Sum of `length_stat` over the responses with a valid token.

    Args:
        response_mask: padded (bs, response_length) or jagged nested
        length_stat: the statistic
        device: device of the result; that of the mask by default

    Returns:
        a scalar tensor in float64, or in float32 on devices without (collectives of) float64
    """
    if response_mask.is_nested:
        ends = torch.nn.functional.pad(response_mask.values().cumsum(0, dtype=torch.int64), (1, 0))
        lengths = ends[response_mask.offsets()].diff()
    else:
        lengths = response_mask.sum(dim=-1, dtype=torch.int64)
    lengths = lengths.to(device) if device is not None else lengths
    dtype = torch.float32 if lengths.device.type in ("mps", "npu") else torch.float64
    return torch.where(lengths > 0, length_stat(lengths.clamp(min=1).to(dtype)), 0.0).sum()


@register_loss_agg("token-mean")
def agg_token_mean(loss_mat, loss_mask, *, dp_size, batch_num_tokens, **_):
    """Mean over the valid tokens of the global batch."""
    if batch_num_tokens is None:
        if dp_size > 1:
            raise ValueError("(global) batch_num_tokens is required when dp_size > 1")
        batch_num_tokens = loss_mask.sum()
    return verl_F.masked_sum(loss_mat, loss_mask) / batch_num_tokens * dp_size


@register_loss_agg("token-sum")
def agg_token_sum(loss_mat, loss_mask, *, dp_size, **_):
    """Sum over the valid tokens of the global batch."""
    return verl_F.masked_sum(loss_mat, loss_mask) * dp_size


@register_loss_agg("seq-mean-token-sum")
def agg_seq_mean_token_sum(loss_mat, loss_mask, *, dp_size, global_batch_size, **_):
    """Mean over responses of the sum over their tokens."""
    seq_losses = torch.sum(loss_mat * loss_mask, dim=-1)
    seq_mask = (torch.sum(loss_mask, dim=-1) > 0).float()
    return _seq_mean(seq_losses, seq_mask, dp_size, global_batch_size)


@register_loss_agg("seq-mean-token-sum-norm")
def agg_seq_mean_token_sum_norm(loss_mat, loss_mask, *, dp_size, global_batch_size, loss_scale_factor, **_):
    """seq-mean-token-sum divided by `loss_scale_factor`, or by the width of the mask if that is None."""
    loss = agg_seq_mean_token_sum(loss_mat, loss_mask, dp_size=dp_size, global_batch_size=global_batch_size)
    return loss / (loss_mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)


@register_loss_agg("seq-mean-token-mean")
def agg_seq_mean_token_mean(loss_mat, loss_mask, *, dp_size, global_batch_size, **_):
    """Mean over responses of the mean over their tokens."""
    seq_lens = torch.sum(loss_mask, dim=-1)
    seq_losses = torch.sum(loss_mat * loss_mask, dim=-1) / (seq_lens + 1e-8)
    return _seq_mean(seq_losses, (seq_lens > 0).float(), dp_size, global_batch_size)


def _seq_mean(seq_losses, seq_mask, dp_size, global_batch_size):
    """Mean over the responses of the global batch; fully masked responses add nothing."""
    if global_batch_size is None:
        if dp_size > 1:
            raise ValueError("global_batch_size is required when dp_size > 1")
        global_batch_size = seq_mask.sum()
    return verl_F.masked_sum(seq_losses, seq_mask) / global_batch_size * dp_size
