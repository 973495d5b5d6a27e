"""Overlong filtering (DAPO) as an advantage estimator: algorithm.adv_estimator=grpo_overlong_filtering.

Zeroed: the advantage of every token of a response of algorithm.overlong_filtering_length and more tokens, the length
limit. Such a response was cut, or ended with its very last possible token; nothing in the batch tells the two apart,
and the authors' code does not try (its recipe/dapo/dapo_ray_trainer.py:274). All its tokens count, those of tools and
those that rollout correction rejected as well. A session that ended since a tool's output did not fit is shorter.

Not zeroed: anything else. A filtered response stays in its group, so its reward moves the group's mean and standard
deviation. It stays in the response mask, so it counts in every denominator: the ΣL of token-mean, the N of the
sequence means, the ΣL^-α of vl_norm. Its policy loss has no gradient; KL loss and entropy bonus still have theirs.

Advantages are those of `algorithm.adv_estimator=grpo`: verl's compute_advantage (trainer/ppo/ray_trainer.py) and V1's
compute_advantage_for_multi_trajectories (trainer/ppo/v1/utils.py), which takes only the last output of a session into
the group, are called with that name. vlnorm_verl.plugin puts the wrappers below around them. A trainer with code of
its own finds `grpo_overlong_filtering` in verl's registry of estimators.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

ESTIMATOR = "grpo_overlong_filtering"
LENGTH_KEY = "overlong_filtering_length"

# Tokens of each response of the batch whose advantages V1's trainer computes; its padded batch no longer says it.
_lengths: torch.Tensor | None = None


def zero_overlong(advantages: torch.Tensor, lengths: torch.Tensor, limit: int) -> torch.Tensor:
    """The advantages [B x T], those of responses of `limit` and more tokens set to 0. lengths: [B]."""
    return advantages.masked_fill((lengths >= limit).unsqueeze(-1), 0.0)


def up_to_last_valid(response_mask: torch.Tensor) -> torch.Tensor:
    """Tokens of each response up to its last valid one [B]; response_mask: [B x T], 1 for a valid token."""
    positions = torch.arange(1, response_mask.shape[-1] + 1, device=response_mask.device)
    return (response_mask.bool() * positions).amax(dim=-1)


def filtering(stock: Callable[..., Any]) -> Callable[..., Any]:
    """verl's `compute_advantage(data, …, adv_estimator, …, config)` that knows ESTIMATOR; config: `algorithm`'s."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def compute_advantage(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        if given.arguments.get("adv_estimator") != ESTIMATOR:
            return stock(*args, **kwargs)
        if given.arguments.get("config") is None:
            raise ValueError(f"{ESTIMATOR}: compute_advantage needs config=config.algorithm, which has {LENGTH_KEY}")
        from verl.trainer.ppo.core_algos import AdvantageEstimator

        given.arguments["adv_estimator"] = AdvantageEstimator.GRPO
        data = stock(*given.args, **given.kwargs)
        lengths = _lengths
        if lengths is None and "attention_mask" in data.batch:  # of prompt and response
            lengths = data.batch["attention_mask"][:, -data.batch["response_mask"].shape[-1] :].sum(dim=-1)
        if lengths is None:
            lengths = up_to_last_valid(data.batch["response_mask"])
        for key in ("advantages", "returns"):
            data.batch[key] = zero_overlong(data.batch[key], lengths, given.arguments["config"][LENGTH_KEY])
        return data

    return compute_advantage


def with_lengths(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`PPOTrainer._compute_advantage(batch, metrics)` of verl's V1, whose batch has the lengths in its tags."""

    @functools.wraps(stock)
    def _compute_advantage(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        global _lengths
        if self.config.algorithm.adv_estimator == ESTIMATOR:
            _lengths = torch.tensor([tag["response_len"] for tag in batch.tags])
        try:
            return stock(self, batch, *args, **kwargs)
        finally:
            _lengths = None

    return _compute_advantage


def grpo_overlong_filtering(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's GRPO advantages and returns (trainer/ppo/core_algos.py) with overlong filtering, each [B x T].

    `config` is the run's `algorithm`. The mask is all that it is given, so the last valid token tells the length.
    """
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    advantages, returns = compute_grpo_outcome_advantage(
        token_level_rewards=token_level_rewards,
        response_mask=response_mask,
        index=index,
        norm_adv_by_std_in_grpo=config.norm_adv_by_std_in_grpo,
    )
    lengths, limit = up_to_last_valid(response_mask), config[LENGTH_KEY]
    return zero_overlong(advantages, lengths, limit), zero_overlong(returns, lengths, limit)


def register(core_algos: Any) -> None:
    """Put the estimator into verl's registry; core_algos: verl's module, just imported."""
    try:
        core_algos.register_adv_est(ESTIMATOR)(grpo_overlong_filtering)
    except Exception as error:  # the import of verl must go on; check_config refuses the estimator before Ray starts
        logger.warning("vlnorm-verl cannot register %s (%s: %s)", ESTIMATOR, type(error).__name__, error)
