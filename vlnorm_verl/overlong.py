"""Overlong filtering (DAPO) as an advantage estimator: algorithm.adv_estimator=grpo_overlong_filtering.

Zeroed: the advantage of every token of a response with L_i ≥ algorithm.overlong_filtering_length, the length limit.
Such a response was cut, or ended with its very last possible token; nothing in the batch tells the two apart, and the
authors' code does not try (its recipe/dapo/dapo_ray_trainer.py:274).

Not zeroed: anything else. A filtered response stays in its group, so its reward moves the group's mean and standard
deviation. It stays in the response mask, so it counts in every denominator: the ΣL of token-mean, the N of the
sequence means, the ΣL^-α of vl_norm. It contributes no gradient, that is all.
"""

from typing import Any

import numpy as np
import torch

ESTIMATOR = "grpo_overlong_filtering"
LENGTH_KEY = "overlong_filtering_length"


def zero_overlong(advantages: torch.Tensor, response_mask: torch.Tensor, limit: int) -> torch.Tensor:
    """The advantages, those of responses of `limit` and more valid tokens set to 0.

    Args:
        advantages: [B x T].
        response_mask: [B x T], 1 for a valid token. T may be below `limit`: verl pads to the batch's longest response.
        limit: tokens.
    """
    overlong = response_mask.sum(dim=-1, keepdim=True) >= limit  # [B x 1]
    return advantages.masked_fill(overlong, 0.0)


def grpo_overlong_filtering(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's GRPO advantages and returns (trainer/ppo/core_algos.py) with overlong filtering, each [B x T].

    `config` is the run's `algorithm`. vlnorm_verl.plugin registers this function under ESTIMATOR.
    """
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    advantages, returns = compute_grpo_outcome_advantage(
        token_level_rewards=token_level_rewards,
        response_mask=response_mask,
        index=index,
        norm_adv_by_std_in_grpo=config.norm_adv_by_std_in_grpo,
    )
    limit = config[LENGTH_KEY]
    return zero_overlong(advantages, response_mask, limit), zero_overlong(returns, response_mask, limit)
