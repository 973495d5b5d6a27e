"""Policy losses that ignore the mode, so that `loss_agg_mode=vl_norm` would have no effect or another one.

There is one mechanism: a loss runs inside of a `MiniBatch`, and what it asks `agg_loss` for must be that mini-batch's.
It is used in two places, since each sees what the other cannot:

- `check` tries the policy loss of a run before Ray starts, on four short responses, where gradients can be compared as
  well: that shows a term beside agg_loss, and a dependence on the micro-batch.
- `watched` has every policy loss run so in training, by the responses that there are: this shows a loss that never
  calls agg_loss, or with another mode, mask or M, also if only workers register it, or if it depends on the data. KL
  and entropy terms, which verl aggregates itself, do not count there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from vlnorm_verl import registry
from vlnorm_verl.aggregation import mini_batch_sum
from vlnorm_verl.plugin.mini_batch import IgnoresMode, MiniBatch, current, working_on
from vlnorm_verl.plugin.names import MODE_KEY

# These choose some tokens of each micro-batch, in every mode: there is no sum over responses to compare with.
CHOOSE_TOKENS = ("clip_cov", "kl_cov")
# Four responses: a mini-batch that is padded to its longest one.
LENGTHS = torch.tensor([3, 1, 2, 4])
ADVANTAGES = torch.tensor([[1.0], [0.5], [-1.0], [-0.5]], dtype=torch.float64)
# How far the policy moved: beyond the clip range, but no response as a whole, nor each of its tokens. An importance
# weight with bounds on both sides would be 0 there, on which verl's own statistics of the weights fail.
MOVED = torch.tensor([[1.0, -1, 0.05, 0], [0.05, 0, 0, 0], [0.05, -0.05, 0, 0], [1, -1, 0.05, -0.05]]).double()
M = 7.0  # where the run's is not known yet


def watched(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`get_policy_loss_fn` (trainer/ppo/core_algos.py): a policy loss must aggregate by the mode of its mini-batch."""

    @functools.wraps(stock)
    def get_policy_loss_fn(*args: Any, **kwargs: Any) -> Any:
        policy_loss = stock(*args, **kwargs)
        loss_name = [*args, *kwargs.values()][0]

        @functools.wraps(policy_loss)
        def watched_policy_loss(*args: Any, **kwargs: Any) -> Any:
            mini_batch = current()
            if mini_batch is None:
                return policy_loss(*args, **kwargs)
            with mini_batch.must_aggregate(f"the policy loss {loss_name!r}"):
                return policy_loss(*args, **kwargs)

        return watched_policy_loss

    return get_policy_loss_fn


def check(actor: Any) -> bool:
    """Try the policy loss of an ActorConfig. False if it could not be tried, since only workers know it.

    Raises:
        ValueError: it does not aggregate by `loss_agg_mode`, or raises itself; the message names those that do.
    """
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    name = actor.policy_loss.get("loss_mode", "vanilla")
    if rejection := correction_of(name, actor).get("rollout_rs", None):
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.rollout_correction.rollout_rs={rejection!r} with policy_loss."
            f"loss_mode={name} cannot be used with {MODE_KEY}={actor.loss_agg_mode!r}: it takes tokens out of a "
            "response inside each micro-batch, after the mini-batch's lengths were summed. Accepted: rollout_rs=null; "
            "or another loss_mode with algorithm.rollout_correction.rollout_rs and "
            "algorithm.rollout_correction.bypass_mode=false, which takes the tokens out before."
        )
    if name not in POLICY_LOSS_REGISTRY:
        return False
    if reason := problem(name, actor):
        accepted = [other for other in sorted(POLICY_LOSS_REGISTRY) if problem(other, actor) is None]
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={name!r} cannot be used with "
            f"{MODE_KEY}={actor.loss_agg_mode!r}: {reason}. Accepted: {', '.join(accepted)}."
        )
    return True


def correction_of(name: str, actor: Any) -> Any:
    """verl's settings of rollout correction, which only bypass_mode applies inside of the policy loss."""
    return (actor.policy_loss.get("rollout_correction", None) or {}) if name == "bypass_mode" else {}


def problem(name: str, actor: Any) -> str | None:
    """What keeps a registered policy loss from aggregating by the mode of an ActorConfig; None: nothing.

    It is tried where the policy is the one that sampled the responses and where it has moved, beyond the clip range
    too. Its gradient must be the sum of the single responses' gradients, and half as large when the mini-batch's sum is
    twice as large.
    """
    # The latter divides by a mean over the ranks' micro-batches, in every mode.
    normalized = correction_of(name, actor).get("rollout_is_batch_normalize", False)
    by_micro_batch = name in CHOOSE_TOKENS or normalized
    noise = torch.Generator().manual_seed(0)
    old = -1 - torch.rand(4, 4, generator=noise, dtype=torch.float64)
    try:
        for log_prob in (old, old + MOVED):
            gradient = functools.partial(trial_gradient, name, actor, log_prob, old)
            whole = gradient()
            near = functools.partial(torch.allclose, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
            # Twice the mini-batch's sum is half of every weight, so half of all that goes through agg_loss.
            if not near(whole, 2 * gradient(factor=2)):
                return "a part of its gradient does not go through agg_loss"
            if not by_micro_batch and not near(whole, torch.cat([gradient(only=i) for i in range(4)])):
                return "its gradient depends on which responses share a micro-batch"
    except IgnoresMode as error:
        return error.problem
    except Exception as error:
        return (
            f"it raised {type(error).__name__} on four short responses ({error}). One that needs a GPU or a process "
            "group can be registered in a module of actor_rollout_ref.model.external_lib, which only workers import: "
            "then it is not tried"
        )
    return None


def trial_gradient(
    name: str,
    actor: Any,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    factor: int = 1,
    only: int | None = None,
) -> torch.Tensor:
    """The gradient of a policy loss by log_prob [4, 4] on a mini-batch, or the row of one response trained alone.

    The loss is called as verl's ppo_loss calls it (workers/utils/losses.py).

    Args:
        factor: of the mini-batch's sum. only: the response, else all in one micro-batch.
    """
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    method = registry.parse_mode(actor.loss_agg_mode)
    scale = actor.loss_scale_factor or M
    # As in training a micro-batch is padded to its longest response.
    rows, width = (slice(None), 4) if only is None else (slice(only, only + 1), int(LENGTHS[only]))
    log_prob = log_prob[rows, :width].clone().requires_grad_()
    config = copy.copy(actor)
    sizes = {"dp_size": 1, "batch_num_tokens": int(LENGTHS.sum()), "global_batch_size": 4, "loss_scale_factor": scale}
    object.__setattr__(config, "global_batch_info", sizes)
    total = factor * mini_batch_sum(method, LENGTHS)
    mini_batch = MiniBatch(actor.loss_agg_mode, method, total, dp_size=1, scale=scale, lengths=LENGTHS[rows])
    with working_on(mini_batch), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        loss, _ = get_policy_loss_fn(name)(
            old_log_prob=old_log_prob[rows, :width].clone(),
            log_prob=log_prob,
            advantages=ADVANTAGES[rows].expand(-1, width).clone(),
            response_mask=torch.arange(width) < LENGTHS[rows, None],
            loss_agg_mode=actor.loss_agg_mode,
            config=config,
            rollout_is_weights=None,
        )
        gradient = torch.autograd.grad(loss, log_prob)[0]
    return torch.nn.functional.pad(gradient, (0, 4 - width))
