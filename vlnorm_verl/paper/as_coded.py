"""Two of the paper's methods as the authors' code has them, which is not as this package has them.

    method               this package                      the authors' code
    dapo_norm_as_coded   Σ g_i / Σ L_i of a mini-batch      the same of each micro-batch, then the mean of these
                                                           (verl/workers/actor/dp_actor.py, core_algos.agg_loss)
    vl_norm_as_coded     Σ_j L_j^-α over the mini-batch    Σ_j L_j^-α over the rollout batch, in the advantages
                                                           (verl/trainer/ppo/core_algos.py, use_grpopp)

File names are those of github.com/zerolllin/Delta-L-Normalization, a verl of June 2025.

dapo_norm_as_coded depends on the micro-batch size and on which responses share a micro-batch: alone among all methods
here, on purpose. It is a policy loss, since only the worker knows its micro-batches. Those of dynamic size count by
their responses, as in that code.

A run loads this module by verl's own actor_rollout_ref.model.external_lib=vlnorm_verl.paper.as_coded, which the trainer
and every worker import (workers/config/model.py:149); recipes/config/method has the other keys.
"""

from typing import Any

import numpy as np
import torch
from verl.trainer.ppo import core_algos

from vlnorm_verl.aggregation import mini_batch_sum, response_lengths, response_weights
from vlnorm_verl.registry import vl_norm

ESTIMATOR, ALPHA_KEY = "grpo_vl_norm_as_coded", "vl_norm_as_coded_alpha"
POLICY_LOSS = "dapo_norm_as_coded"


@core_algos.register_adv_est(ESTIMATOR)
def grpo_vl_norm_as_coded(
    token_level_rewards: torch.Tensor, response_mask: torch.Tensor, index: np.ndarray, config: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's GRPO advantages times N L_i^-α / Σ_j L_j^-α over the N responses of the rollout batch, twice [B x T].

    Scaling advantages is exact for verl's clipped loss, which is homogeneous in them. With seq-mean-token-sum-norm a
    mini-batch's update is then Σ_i g_i L_i^-α / (M · N_mini-batch · mean_j L_j^-α), the mean over the rollout batch.

    Args:
        token_level_rewards, response_mask [B x T], index [B] (the prompt of each response): as in verl's estimators.
        config: the run's `algorithm`, with α under ALPHA_KEY; ValueError if it is out of range.
    """
    advantages, _ = core_algos.compute_grpo_outcome_advantage(
        token_level_rewards=token_level_rewards,
        response_mask=response_mask,
        index=index,
        norm_adv_by_std_in_grpo=config.norm_adv_by_std_in_grpo,
    )
    method, lengths = vl_norm(config[ALPHA_KEY]), response_lengths(response_mask)
    weights = response_weights(method, lengths, mini_batch_sum(method, lengths), scale=1.0)
    relative = weights * (lengths > 0).sum()  # [B], mean 1
    weighted = advantages * relative.unsqueeze(-1).to(advantages.dtype)
    return weighted, weighted


@core_algos.register_policy_loss(POLICY_LOSS)
def dapo_norm_as_coded(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """verl's clipped loss, as the mean over the tokens of this micro-batch times its share of the responses.

    Tensors are [micro-batch x T]. Added up over the micro-batches of a mini-batch, and averaged over ranks as the
    engine does, this is the mean of the micro-batches' token means.

    Raises:
        ValueError: loss_agg_mode is not token-mean.
    """
    if loss_agg_mode != "token-mean":
        raise ValueError(f"policy_loss.loss_mode={POLICY_LOSS} needs loss_agg_mode=token-mean, not {loss_agg_mode!r}")
    loss, metrics = core_algos.compute_policy_loss_vanilla(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
    )
    mini_batch = config.global_batch_info
    tokens = response_mask.sum().clamp(min=1)
    share = len(response_mask) / mini_batch["global_batch_size"]
    return loss * share * (mini_batch["batch_num_tokens"] / tokens), metrics  # verl has divided by the mini-batch's
