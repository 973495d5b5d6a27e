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
VL Norm loss aggregation, `loss_agg_mode=vl_norm` or `vl_norm:<alpha>` (arXiv 2509.07558):

    loss = sum_i x_i * sum_t loss_it,    x_i = (1 / M) * L_i^-alpha / sum_j L_j^-alpha

L_i is the number of valid tokens of response i, M is `loss_scale_factor`, and the sum over j runs over the whole
optimizer mini-batch: over its micro-batches and over the data-parallel ranks. A response without a valid token
has weight 0.
"""

import math

import torch

ALPHA_MAX = 2.0


def parse_vl_norm(loss_agg_mode: object) -> float | None:
    """Exponent alpha of "vl_norm" (1.0) or "vl_norm:<alpha>"; None if `loss_agg_mode` is another mode.

    Raises:
        ValueError: alpha is not a number in [0, 2].
    """
    name, colon, value = loss_agg_mode.partition(":") if isinstance(loss_agg_mode, str) else ("", "", "")
    if name != "vl_norm":
        return None
    try:
        alpha = float(value) if colon else 1.0
    except ValueError:
        alpha = math.nan
    if not 0.0 <= alpha <= ALPHA_MAX:
        raise ValueError(
            f"Invalid loss_agg_mode: {loss_agg_mode}. Use vl_norm or vl_norm:<alpha> with a number 0 <= alpha <= "
            f"{ALPHA_MAX:g}, e.g. vl_norm:0.75"
        )
    return alpha


def validate_vl_norm(role: str, loss_agg_mode: str, loss_scale_factor: float | None) -> None:
    """Check the configuration of `role` ("actor" or "critic"). Other modes are not checked.

    Raises:
        ValueError: alpha is out of range, or M is not a positive number.
    """
    if parse_vl_norm(loss_agg_mode) is None:
        return
    if loss_scale_factor is None or not 0 < loss_scale_factor < math.inf:
        raise ValueError(
            f"{role}.loss_agg_mode={loss_agg_mode} needs {role}.loss_scale_factor > 0, got {loss_scale_factor}. "
            f"It is a constant number of tokens; set it to e.g. '${{data.max_response_length}}'"
        )


def response_lengths(response_mask: torch.Tensor) -> torch.Tensor:
    """Number of valid tokens per response, (bs,) int64, of a padded (bs, response_length) or a jagged nested mask."""
    if not response_mask.is_nested:
        return response_mask.sum(dim=-1, dtype=torch.int64)
    ends = torch.nn.functional.pad(response_mask.values().cumsum(0, dtype=torch.int64), (1, 0))
    return ends[response_mask.offsets()].diff()


def length_powers(lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """L_i^-alpha, (bs,), 0 where L_i is 0; in float64, or in float32 on devices without (collectives of) float64."""
    dtype = torch.float32 if lengths.device.type in ("mps", "npu") else torch.float64
    return torch.where(lengths > 0, lengths.clamp(min=1).to(dtype) ** -alpha, 0.0)


def vl_norm_loss(
    loss_mat: torch.Tensor,
    loss_mask: torch.Tensor,
    alpha: float,
    loss_scale_factor: float,
    batch_weight_sum: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Contribution of the given responses to the loss of their mini-batch. Contributions of micro-batches add up.

    Args:
        loss_mat: (bs, response_length). Masked entries do not matter, even if they are NaN.
        loss_mask: (bs, response_length)
        alpha: exponent in [0, 2]
        loss_scale_factor: M, in tokens
        batch_weight_sum: sum_j L_j^-alpha over the mini-batch. If None, the given responses are the mini-batch.

    Returns:
        a scalar tensor in the dtype of loss_mat, at least float32
    """
    powers = length_powers(response_lengths(loss_mask), alpha)
    if batch_weight_sum is None:
        batch_weight_sum = powers.sum()
    # The sum is 0 only if there is no valid token in the mini-batch; then the powers are 0, too.
    weights = powers / ((batch_weight_sum if batch_weight_sum > 0 else 1.0) * loss_scale_factor)
    dtype = torch.promote_types(loss_mat.dtype, torch.float32)
    seq_losses = torch.where(loss_mask.bool(), loss_mat, 0.0).sum(dim=-1, dtype=dtype)
    return (weights * seq_losses.to(weights.dtype)).sum().to(dtype)
