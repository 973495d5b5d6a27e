"""Puts the aggregations of `vlnorm_verl.aggregation` into stock verl. The only module that knows verl's loss path.

`NAMES` below is the one table of verl's names that are relied on, and why; those with a `wrap` are replaced, nothing
else of verl is. One thing is added: the advantage estimator of `vlnorm_verl.overlong`, by verl's own register_adv_est.
Files and lines are verl 0.9.1's unless said; verl 0.7.1, 0.8.0 and 0.9.0 have the same names, trainers excepted.

How a weight gets from the mini-batch to the loss: `train_batch` sums z(L) over the rank's mini-batch, all-reduces
it over the data-parallel ranks and holds it in a context variable while verl runs its micro-batches. Every
aggregation inside (policy loss, entropy, KL, value loss; also of policy losses that users register) reads it
there. `agg_loss` outside such a context has no mini-batch to sum over and raises: it never sums over a
micro-batch instead.

Each wrapper is put in place when verl imports the module (wrapt's post-import hooks), so that loading the plugin costs
nothing in processes that never train. What a release lacks is logged as a WARNING and leaves stock verl as it was;
a config that asks for one of our modes is then refused with the names that are missing.

A verl that knows `vl_norm` by itself (patched by patches/, or a later release) is left to it: the plugin then only
checks the configuration, fills M, and says so.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeGuard

import torch
import wrapt
from omegaconf import OmegaConf, open_dict

from vlnorm_verl import aggregation as maths
from vlnorm_verl import overlong

logger = logging.getLogger(__name__)

MODE_KEY = "actor_rollout_ref.actor.loss_agg_mode"
SCALE_KEY = "actor_rollout_ref.actor.loss_scale_factor"
CORE_ALGOS = "verl.trainer.ppo.core_algos"
STOCK_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
# Releases that the exactness tests were run on (recipes/test_releases.sh). Others are tried, with a warning.
TESTED_RELEASES = ("0.7.1", "0.8.0", "0.9.0", "0.9.1")


NO_EFFECT = (
    "loss_agg_mode={mode!r} had no effect: {loss} never called agg_loss. Use a policy loss that aggregates by the "
    "mode, or choose one of verl's modes."
)


class IgnoresMode(ValueError):
    """A policy loss that does not aggregate by `loss_agg_mode`. problem: what it does, as half a sentence."""

    def __init__(self, mode: str, problem: str, remedy: str) -> None:
        super().__init__(f"{MODE_KEY}={mode!r}, but the policy loss {problem}. {remedy}")
        self.problem = problem


@dataclass
class _MiniBatch:
    """The optimizer mini-batch that this process works on."""

    mode: str
    aggregation: maths.Aggregation
    total: torch.Tensor  # Σ_j z(L_j) over all micro-batches and data-parallel ranks, scalar
    dp_size: int
    scale: float | None  # M
    aggregated: bool = False  # whether agg_loss was called for it, for a loss and not for a metric
    policy_mask: torch.Tensor | None = None  # response_mask [B, T] of the micro-batch while its policy loss runs


_mini_batch: ContextVar[_MiniBatch | None] = ContextVar("vlnorm_verl_mini_batch", default=None)

# What became of each module of NAMES that verl has imported: None if all is there, else what is lacking.
_outcome: dict[str, str | None] = {}
_registered = False
_stock_agg_loss: Callable[..., torch.Tensor] | None = None  # verl's own; set when verl imports core_algos


# ---------------------------------------------------------------------------------------------------- aggregation


def is_ours(mode: object) -> TypeGuard[str]:
    """Whether this package answers for the mode: it is registered here, and verl does not know it by itself."""
    return maths.is_registered(mode) and not is_verls(mode)


def is_verls(mode: str) -> bool:
    """Whether verl's own agg_loss has the mode: a stock one, or one of a patched tree, a fork or a later release."""
    return mode in STOCK_MODES or _verl_aggregates(mode)


@functools.cache
def _verl_aggregates(mode: str) -> bool:
    importlib.import_module(CORE_ALGOS)
    if _stock_agg_loss is None:  # the plugin is not in this process
        return False
    return _stock_answer(mode) != _stock_answer("no-such-mode")


def _stock_answer(mode: str) -> tuple[type, str] | None:
    """How verl's own agg_loss takes a mode: None, or its exception with the mode's name taken out."""
    assert _stock_agg_loss is not None
    one = torch.ones(1, 1)
    sizes = {"dp_size": 1, "batch_num_tokens": 1, "global_batch_size": 1, "loss_scale_factor": 1}
    accepted = inspect.signature(_stock_agg_loss).parameters
    try:
        _stock_agg_loss(one, one, mode, **{name: size for name, size in sizes.items() if name in accepted})
    except Exception as error:  # a fork's mode may want more than is known here
        return type(error), str(error).replace(mode, "")
    return None


def _extended_agg_loss(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """verl's `agg_loss` with the registered aggregations (trainer/ppo/core_algos.py)."""
    global _stock_agg_loss
    signature = inspect.signature(stock)
    _stock_agg_loss = stock

    @functools.wraps(stock)
    def agg_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs).arguments
        mode, mini_batch = given["loss_agg_mode"], _mini_batch.get()
        differentiated = torch.is_grad_enabled() and given["loss_mat"].requires_grad  # else it is for a metric
        if not is_ours(mode):
            if mini_batch is not None and differentiated:
                raise IgnoresMode(
                    mini_batch.mode,
                    f"aggregates by {mode!r} whatever the mode",
                    "Choose a policy_loss.loss_mode that uses loss_agg_mode, or set that mode.",
                )
            return stock(*args, **kwargs)
        if mini_batch is None or mini_batch.mode != mode:
            raise RuntimeError(
                f"loss_agg_mode={mode!r} was asked for outside of an optimizer mini-batch of this mode: the "
                "weights need a sum over the whole mini-batch, and a micro-batch does not have it. Train through "
                "BaseEngine.train_batch with a loss function that carries the actor's config "
                "(functools.partial(loss, config=actor_config), as verl's workers do), or choose one of verl's modes."
            )
        # A loss may leave out dp_size and M (the value loss up to verl 0.8.0, users' own): the mini-batch has them.
        dp_size = given.get("dp_size", mini_batch.dp_size)
        if dp_size != mini_batch.dp_size:
            raise RuntimeError(
                f"loss_agg_mode={mode!r}: the loss was called with dp_size={dp_size} on {mini_batch.dp_size} "
                "data-parallel ranks; pass **config.global_batch_info on, or no dp_size."
            )
        if differentiated and mini_batch.policy_mask is not None:
            _check_mask(given["loss_mask"], mini_batch.policy_mask, mode)
        scale = given.get("loss_scale_factor")
        mini_batch.aggregated |= differentiated
        loss = maths.aggregate(
            given["loss_mat"],
            given["loss_mask"],
            mini_batch.aggregation,
            mini_batch.total,
            mini_batch.scale if scale is None else scale,
        )
        # FSDP and Megatron average gradients over the data-parallel ranks; the mini-batch's loss is their sum.
        return loss * dp_size

    return agg_loss


def _check_mask(mask: torch.Tensor, response_mask: torch.Tensor, mode: str) -> None:
    """Raises IgnoresMode if a policy loss aggregates over other tokens than those of the mini-batch's lengths."""
    # The same tensor as a rule, so that nothing on the device is waited for.
    if mask is not response_mask and not torch.equal(mask.bool(), response_mask.bool()):
        raise IgnoresMode(
            mode,
            "calls agg_loss with another mask than response_mask, whose lengths the mini-batch is weighted by",
            "Multiply the losses by a mask of your own instead: agg_loss(losses * keep, response_mask, ...).",
        )


def _watched_policy_losses(stock: Callable[[str], Any]) -> Callable[[str], Any]:
    """`get_policy_loss_fn` of workers/utils/losses.py: each policy loss must aggregate, and over all of response_mask.

    KL and entropy terms, which verl aggregates itself, do not count.
    """

    @functools.wraps(stock)
    def get_policy_loss_fn(name: str) -> Any:
        loss_fn = stock(name)

        @functools.wraps(loss_fn)
        def watched(*args: Any, **kwargs: Any) -> Any:
            mini_batch = _mini_batch.get()
            if mini_batch is None:
                return loss_fn(*args, **kwargs)
            mini_batch.aggregated, mini_batch.policy_mask = False, kwargs.get("response_mask")
            result = loss_fn(*args, **kwargs)
            mini_batch.policy_mask = None
            if not mini_batch.aggregated:
                raise RuntimeError(NO_EFFECT.format(mode=mini_batch.mode, loss=f"the policy loss {name!r}"))
            return result

        return watched

    return get_policy_loss_fn


def whole_batch_agg_loss(
    loss_mat: torch.Tensor, loss_mask: torch.Tensor, loss_agg_mode: str, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """`agg_loss` for the driver's entropy metric: the batch given is the whole one, so its sum is the sum."""
    from verl.trainer.ppo.core_algos import agg_loss

    if not is_ours(loss_agg_mode):
        return agg_loss(loss_mat, loss_mask, loss_agg_mode, *args, **kwargs)
    method = maths.parse_mode(loss_agg_mode)
    total = maths.mini_batch_sums(method, maths.response_lengths(loss_mask))[0]
    with _in_mini_batch(_MiniBatch(loss_agg_mode, method, total, dp_size=1, scale=None)):
        return agg_loss(loss_mat, loss_mask, loss_agg_mode, *args, **kwargs)


def _whole_batch(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    # One function of this module, not a closure: Ray pickles the trainer of verl 0.8.0's __main__ with it, by name.
    return whole_batch_agg_loss


@contextlib.contextmanager
def _in_mini_batch(mini_batch: _MiniBatch) -> Iterator[None]:
    token = _mini_batch.set(mini_batch)
    try:
        yield
    finally:
        _mini_batch.reset(token)


# --------------------------------------------------------------------------------------------------------- engine


def _summing_train_batch(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`BaseEngine.train_batch` that first sums over the mini-batch (workers/engine/base.py).

    `data` there is this rank's whole mini-batch, after shuffling and before the split into micro-batches. It calls
    forward_backward_batch and optimizer_step of the engine; no engine of verl overrides it.
    """

    @functools.wraps(stock)
    def train_batch(self: Any, data: Any, loss_function: Callable[..., Any]) -> Any:
        config: Any = getattr(loss_function, "keywords", {}).get("config")
        mode = getattr(config, "loss_agg_mode", None)
        if not is_ours(mode):
            return stock(self, data, loss_function)

        check_reduction(self, mode)
        scale = getattr(config, "loss_scale_factor", None)  # the critic's config has none up to verl 0.8.0
        method = maths.parse_mode(mode)
        # Not `loss_mask`: verl's rollout correction takes tokens out of `response_mask` only.
        lengths = maths.response_lengths(data["response_mask"])
        sums = maths.mini_batch_sums(method, lengths)
        sums = _sum_over_data_parallel_ranks(self, sums)
        mini_batch = _MiniBatch(mode, method, sums[0], self.get_data_parallel_size(), scale)
        with _in_mini_batch(mini_batch):
            outputs = stock(self, data, loss_function)
        if self.is_mp_src_rank_with_outputs():
            if not mini_batch.aggregated:
                raise RuntimeError(NO_EFFECT.format(mode=mode, loss="the loss function"))
            outputs["metrics"].update(_mini_batch_metrics(method, lengths, sums, scale))
        return outputs

    return train_batch


def check_reduction(engine: Any, mode: str) -> None:
    """What check_engine cannot see: Megatron-Bridge sets calculate_per_token_loss by itself for some models.

    Raises:
        RuntimeError: the engine adds gradients over ranks where verl takes them for averaged (verl 0.7.1 and 0.8.0).
    """
    if not getattr(getattr(engine, "tf_config", None), "calculate_per_token_loss", False):
        return
    if _before_0_9():
        raise RuntimeError(
            f"loss_agg_mode={mode!r}: Megatron adds the gradients of this model over its ranks (its "
            f"calculate_per_token_loss is on), and verl {_verl_version()} takes them for averaged. Accepted: "
            "megatron.vanilla_mbridge=true, or context_parallel_size=1 without an override of calculate_per_token_loss."
        )
    layout = engine.engine_config
    if layout.context_parallel_size > 1 and not layout.dynamic_context_parallel:
        _warn_of_uncounted_tokens(layout.context_parallel_size)


@functools.cache
def _warn_of_uncounted_tokens(context_parallel_size: int) -> None:
    logger.warning(
        "megatron.context_parallel_size=%d with calculate_per_token_loss, which the model's provider has set: verl "
        "counts up to %d tokens of each micro-batch too few, so that gradients of every loss_agg_mode are too large by "
        "the factor T/(T - those not counted), T the tokens of the mini-batch. The weights of responses are right.",
        context_parallel_size,
        context_parallel_size - 1,
    )


def _sum_over_data_parallel_ranks(engine: Any, sums: torch.Tensor) -> torch.Tensor:
    from verl.utils.device import get_device_id

    group, size = engine.get_data_parallel_group(), engine.get_data_parallel_size()
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    if ranks != size:
        raise RuntimeError(
            f"{type(engine).__name__} has {size} data-parallel ranks, and a process group of {ranks} for them: the "
            "mini-batch sum of loss_agg_mode cannot be made. Choose one of verl's modes."
        )
    device = torch.device(get_device_id())
    sums = sums.to(device, maths.weight_dtype(device.type))
    if group is not None:
        # Here, not in the loss: every rank comes by once per mini-batch, even one whose rows are all masked.
        torch.distributed.all_reduce(sums, group=group)
    return sums


def _mini_batch_metrics(
    method: maths.Aggregation, lengths: torch.Tensor, sums: torch.Tensor, scale: float | None
) -> dict[str, Any]:
    """Metrics under `vl_norm/`; verl adds the role's prefix, so they are logged as `actor/vl_norm/…`."""
    from verl.utils.metric import AggregationType, Metric

    # verl has just read the gradient norm on the host; nothing on the device is left to wait for.
    values = sums.tolist()
    low, high = maths.relative_weight_range(method, lengths.to(sums.device), sums).tolist()
    if values[1] == 0:  # no valid token on any rank: there is no smallest weight
        low = 0.0
    metrics = {
        f"vl_norm/{name}": Metric(AggregationType.MEAN, value)
        for name, value in maths.mini_batch_statistics(values).items()
    }
    # Only a method that does not use M has got here without one: agg_loss raises for the others.
    metrics["vl_norm/token_weight"] = Metric(AggregationType.MEAN, maths.token_weight(method, values, scale or 1.0))
    metrics["vl_norm/weight_min"] = Metric(AggregationType.MIN, low)
    metrics["vl_norm/weight_max"] = Metric(AggregationType.MAX, high)
    return metrics


# ---------------------------------------------------------------------------------------------------------- config


def _checked_post_init(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """`ActorConfig.__post_init__` that knows the registered modes (workers/config/actor.py)."""

    @functools.wraps(stock)
    def __post_init__(self: Any) -> None:
        mode = self.loss_agg_mode
        if not maths.is_registered(mode):
            if not is_verls(mode):
                check_mode(mode)
            stock(self)
            return
        check_mode(mode)
        check_scale(self.loss_scale_factor)
        check_rejection(mode, self.policy_loss)
        if not is_ours(mode):
            _say_left_to_verl()
            stock(self)
            return
        # The stock check of everything else ends with an allow-list of verl's modes, so it is shown one of those.
        object.__setattr__(self, "loss_agg_mode", STOCK_MODES[0])
        try:
            stock(self)
        finally:
            object.__setattr__(self, "loss_agg_mode", mode)
        check_policy_loss(self)

    return __post_init__


@functools.cache
def _say_left_to_verl() -> None:
    logger.warning(
        "This verl has loss_agg_mode=vl_norm itself: vlnorm-verl leaves the aggregation to it (there are no vl_norm/ "
        "metrics then), checks the configuration, and sets loss_scale_factor where it is null."
    )


def check_mode(mode: str, key: str = MODE_KEY) -> None:
    """Raises ValueError unless `mode` is one of ours with a good parameter, and RuntimeError if a patch is missing."""
    maths.parse_mode(mode, key, also_accepted=STOCK_MODES)
    require_installed(mode)


def check_scale(scale: float | None, key: str = SCALE_KEY) -> None:
    """Raises ValueError unless M is a positive number, or None for the default."""
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(
            f"{key}={scale!r}: M must be a positive number of tokens; leave it null for data.max_response_length"
        )


def check_policy_loss(actor: Any) -> None:
    """Try the policy loss of an ActorConfig on two short responses.

    Raises:
        ValueError: it does not aggregate by `loss_agg_mode`, so that the mode would have no effect; the message names
            those that do.
    """
    name = actor.policy_loss.get("loss_mode", "vanilla")
    registry = importlib.import_module(CORE_ALGOS).POLICY_LOSS_REGISTRY
    if name not in registry:
        return  # registered by a module that only workers import; the first mini-batch tells
    try:
        problem = policy_loss_problem(name, actor)
    except Exception as error:  # a user's loss may need more than the trial gives it; the first mini-batch tells
        logger.warning("policy loss %r could not be tried before the run (%s: %s)", name, type(error).__name__, error)
        return
    if problem:
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={name!r} cannot be used with "
            f"{MODE_KEY}={actor.loss_agg_mode!r}: {problem}. Accepted: {', '.join(accepted_policy_losses(actor))}."
        )


def accepted_policy_losses(actor: Any) -> list[str]:
    """The registered policy losses that aggregate by the mode of an ActorConfig, sorted."""
    accepted = []
    for name in sorted(importlib.import_module(CORE_ALGOS).POLICY_LOSS_REGISTRY):
        with contextlib.suppress(Exception):  # it needs settings of its own, and may be right with them
            if policy_loss_problem(name, actor):
                continue
        accepted.append(name)
    return accepted


def policy_loss_problem(name: str, actor: Any) -> str | None:
    """What keeps a registered policy loss from aggregating by the mode of an ActorConfig; None: nothing."""
    loss_fn = importlib.import_module(CORE_ALGOS).get_policy_loss_fn(name)
    method = maths.parse_mode(actor.loss_agg_mode)
    mask = torch.tensor([[1, 1], [1, 0]])
    total = maths.mini_batch_sums(method, maths.response_lengths(mask))[0]
    gradients = []
    for factor in (1, 2):
        mini_batch = _MiniBatch(
            actor.loss_agg_mode, method, factor * total, dp_size=1, scale=1.0, policy_mask=mask.bool()
        )
        old_log_prob = torch.full((2, 2), -1.0)
        log_prob = old_log_prob.clone().requires_grad_()
        try:
            with _in_mini_batch(mini_batch), torch.random.fork_rng(devices=[]):
                loss = loss_fn(
                    old_log_prob=old_log_prob,
                    log_prob=log_prob,
                    advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
                    response_mask=mini_batch.policy_mask,
                    loss_agg_mode=actor.loss_agg_mode,
                    config=actor,
                    rollout_is_weights=None,
                )[0]
        except IgnoresMode as error:
            return f"it {error.problem}"
        if not mini_batch.aggregated:
            return "it never calls agg_loss"
        gradients.append(torch.autograd.grad(loss, log_prob)[0])
    # Twice the mini-batch sum is half of every weight, so half of all that goes through agg_loss.
    if not torch.allclose(gradients[0], 2 * gradients[1], rtol=1e-4, atol=1e-6):
        return "a part of its gradient does not go through agg_loss"
    return None


def check_rejection(mode: str, policy_loss: Any) -> None:
    """Raises ValueError for a bypass-mode policy loss that rejects tokens inside the micro-batch."""
    correction = policy_loss.get("rollout_correction", None)
    if policy_loss.get("loss_mode") == "bypass_mode" and correction is not None and correction.get("rollout_rs", None):
        _refuse_rejection(
            mode,
            correction.get("rollout_rs"),
            "actor_rollout_ref.actor.policy_loss",
            "it takes tokens out of a response inside each micro-batch, after the mini-batch's lengths were summed",
        )


def _refuse_rejection(mode: str, rollout_rs: Any, section: str, why: str) -> None:
    raise ValueError(
        f"{section}.rollout_correction.rollout_rs={rollout_rs!r} with bypass_mode=true cannot be used with "
        f"{MODE_KEY}={mode!r}: {why}. Accepted: rollout_rs=null, or bypass_mode=false (tokens are taken out before)."
    )


def check_config(config: Any) -> None:
    """Check our modes in a run's whole config, on the driver before Ray starts, and fill M. May be called again.

    Raises:
        ValueError: a key has a value that cannot be trained exactly; the message names both and what is accepted.
        RuntimeError: a patch that the mode needs did not apply to the installed verl.
    """
    _patch_main()
    select = functools.partial(OmegaConf.select, config)
    check_overlong_filtering(config)
    for key in ("actor_rollout_ref.actor", "critic"):
        mode = select(f"{key}.loss_agg_mode")
        if mode is None or (is_verls(mode) and not maths.is_registered(mode)):
            continue  # a mode of verl's, and nothing of this package's
        check_mode(mode, f"{key}.loss_agg_mode")
        role = select(key)
        default = "auto" if _verl_version().startswith("0.7.") else "disable"
        legacy = select("trainer.use_legacy_worker_impl", default=default)
        if legacy != "disable":
            raise ValueError(
                f"trainer.use_legacy_worker_impl={legacy!r} cannot be used with {key}.loss_agg_mode={mode!r}: the "
                "legacy workers have no mini-batch sum. Accepted: disable"
            )
        check_engine(role, key)
        horizon = config.data.max_response_length
        if key == "critic":
            # verl's critic inherits the actor's mode by interpolation, and CriticConfig accepts any string.
            check_critic_scale(config, horizon)
            continue
        check_scale(role.get("loss_scale_factor"))
        check_rejection(mode, role.policy_loss)
        correction = select("algorithm.rollout_correction") or {}
        if correction.get("bypass_mode") and correction.get("rollout_rs"):
            _refuse_rejection(mode, correction.get("rollout_rs"), "algorithm", "verl's trainers leave it out there")
        fill_scale(role, horizon)
        warn_of_sorted_mini_batches(role, config)
        warn_of_untested_release()
        if is_ours(mode):
            check_policy_loss(_actor_config(role))


def check_critic_scale(config: Any, max_response_length: int) -> None:
    """Check and fill the critic's M. Raises ValueError if it needs one and cannot have one (up to verl 0.8.0)."""
    critic = config.critic
    if "loss_scale_factor" in critic:
        check_scale(critic.get("loss_scale_factor"), "critic.loss_scale_factor")
        fill_scale(critic, max_response_length)
    elif maths.parse_mode(critic.loss_agg_mode).per_token_scale and _uses_critic(config):
        raise ValueError(
            f"critic.loss_agg_mode={critic.loss_agg_mode!r} needs M, and the critic of verl {_verl_version()} "
            "has no loss_scale_factor. Accepted: verl's own modes, such as token-mean, and grpo_norm, dapo_norm"
        )


def check_engine(role: Any, key: str) -> None:
    """Refuse layouts of an engine in which gradients are not reduced as its data-parallel size says (docs/engines.md).

    Args:
        role: the run's config of the actor or the critic. key: what it is called there.

    Raises:
        ValueError: names the key, the value and what is accepted.
    """

    def refuse(name: str, why: str, accepted: str) -> None:
        raise ValueError(
            f"{key}.{name} cannot be used with {key}.loss_agg_mode={role.loss_agg_mode!r} and verl {_verl_version()}: "
            f"{why}. Accepted: {accepted}"
        )

    strategy = role.get("strategy")
    megatron = strategy in ("megatron", "mindspeed")  # up to verl 0.9.0 MindSpeed is a strategy, with Megatron's keys
    engine: Any = role.get(strategy) or {} if megatron or strategy == "torchtitan" else {}
    if strategy == "torchtitan":
        if engine.get("context_parallel_size", 1) > 1:
            refuse(
                f"torchtitan.context_parallel_size={engine.context_parallel_size}",
                "its ranks are given different responses but are not counted as data-parallel",
                "1",
            )
        if engine.get("data_parallel_replicate_size", 1) > 1 and engine.get("data_parallel_shard_size", 1) == 1:
            refuse(
                f"torchtitan.data_parallel_replicate_size={engine.data_parallel_replicate_size}",
                "with data_parallel_shard_size=1 gradients of the replicas are added, not averaged",
                "1, or data_parallel_shard_size > 1",
            )
    if megatron:
        old, dynamic = _before_0_9(), engine.get("dynamic_context_parallel", False)
        override = engine.get("override_transformer_config") or {}
        per_token = f"{strategy}.override_transformer_config.calculate_per_token_loss=true"
        if old and dynamic:
            refuse(f"{strategy}.dynamic_context_parallel=true", "replicated responses are counted again", "false")
        # Where it is Megatron-Bridge that sets it, only the engine knows: check_reduction.
        if override.get("calculate_per_token_loss"):
            if old:
                refuse(per_token, "gradients are then added, not averaged", "false")
            if engine.get("context_parallel_size", 1) > 1 and not dynamic:
                refuse(per_token, "verl counts too few tokens with context_parallel_size > 1", "false")


def _actor_config(actor: Any) -> Any:
    """The ActorConfig of a run's config. Not every trainer makes one before Ray starts, and Hydra wraps its errors."""
    stock = actor.copy()
    stock.loss_agg_mode = STOCK_MODES[0]
    made = importlib.import_module("verl.utils.config").omega_conf_to_dataclass(stock)
    object.__setattr__(made, "loss_agg_mode", actor.loss_agg_mode)
    return made


def _uses_critic(config: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl warns that there is none; it will again when it asks itself
        return bool(importlib.import_module("verl.trainer.ppo.utils").need_critic(config))


def _verl_version() -> str:
    return str(importlib.import_module("verl").__version__)


def _before_0_9() -> bool:
    return _verl_version().startswith(("0.7.", "0.8."))


def warn_of_untested_release() -> None:
    if _verl_version() not in TESTED_RELEASES:
        logger.warning(
            "vlnorm-verl has not been tested with verl %s (tested: %s). Every name that it relies on is there; whether "
            "gradients are exact is not known.",
            _verl_version(),
            ", ".join(TESTED_RELEASES),
        )


def _checking_config(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`validate_config` (utils/config.py) or `run_ppo` (trainer/main_ppo.py) with `check_config` before it."""

    @functools.wraps(stock)
    def checked(config: Any, *args: Any, **kwargs: Any) -> Any:
        check_config(config)
        return stock(config, *args, **kwargs)

    return checked


def warn_of_sorted_mini_batches(actor: Any, config: Any) -> None:
    """Warn where the mini-batches of a rollout batch will hold responses of similar lengths each.

    verl keeps the order of the rollout batch unless told to shuffle. The V1 trainer's replay buffer returns responses
    in the order in which they were finished (trainer/ppo/v1/replay_buffer.py), the V0 trainer's `_balance_batch` sorts
    each rank's share by length (trainer/ppo/ray_trainer.py:1240). Both put short responses into the first mini-batch.
    Two of V1's trainers are not asked, whatever `shuffle` is: separate_async, which draws each mini-batch by itself
    (trainer/ppo/v1/trainer_base.py:549), and ours (vlnorm_verl.whole_groups).
    """
    if OmegaConf.select(config, "trainer.v1.trainer_mode") in ("separate_async", "sync_whole_groups"):
        return
    mini_batches = OmegaConf.select(config, "async_training.require_batches")  # of fully_async_policy
    several = mini_batches > 1 if mini_batches else actor.ppo_mini_batch_size < config.data.train_batch_size
    if several and not actor.get("shuffle"):
        logger.warning(
            "actor_rollout_ref.actor.shuffle=false with several optimizer mini-batches a rollout batch: verl orders "
            "responses by when they were finished, so each mini-batch holds responses of similar lengths, and "
            "loss_agg_mode=%s has little left to weigh. Set trainer.v1.trainer_mode=sync_whole_groups (verl 0.9's "
            "synchronous trainer) for mini-batches of whole prompt groups in random order, as the paper has them, or "
            "with any trainer actor_rollout_ref.actor.shuffle=true for single responses drawn at random.",
            actor.loss_agg_mode,
        )


def check_overlong_filtering(config: Any) -> None:
    """Raises ValueError if overlong filtering is asked for without its length; before Ray starts, not at step 1."""
    if OmegaConf.select(config, "algorithm.adv_estimator") != overlong.ESTIMATOR:
        return
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    get_adv_estimator_fn(overlong.ESTIMATOR)  # raises if it could not be registered
    limit, longest = config.algorithm.get(overlong.LENGTH_KEY), config.data.max_response_length
    if not isinstance(limit, int) or not 0 < limit <= longest:
        raise ValueError(
            f"algorithm.{overlong.LENGTH_KEY}={limit!r}: algorithm.adv_estimator={overlong.ESTIMATOR} needs the length "
            f"from which a response is overlong, in tokens: 1 to data.max_response_length={longest}, "
            f"usually +algorithm.{overlong.LENGTH_KEY}='${{data.max_response_length}}'"
        )


def fill_scale(role: Any, max_response_length: int) -> None:
    """M = the run's maximum response length where `loss_scale_factor` is null; verl's critic inherits the actor's."""
    if role.get("loss_scale_factor") is None:
        with open_dict(role):
            role.loss_scale_factor = max_response_length


# ---------------------------------------------------------------------------------------------------- installation


@dataclass(frozen=True)
class VerlName:
    """A name of verl that is relied on."""

    module: str
    name: str  # a name of the module, or Class.attribute
    why: str
    wrap: Callable[[Any], Any] | None = None  # makes what replaces it
    parameters: tuple[str, ...] = ()  # that it must take
    # Whether every run of ours needs it. The others belong to single trainers, which not every release has.
    needed: bool = True


ENGINE, METRIC = "verl.workers.engine.base", "verl.utils.metric"
ENTROPY = "the driver's actor/entropy metric, over the whole rollout batch with no mini-batch around it"

NAMES = (
    VerlName(
        CORE_ALGOS,
        "agg_loss",
        "an if/elif over verl's modes: ours are answered before it",
        _extended_agg_loss,
        ("loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "loss_scale_factor"),
    ),
    VerlName(CORE_ALGOS, "POLICY_LOSS_REGISTRY", "names the policy losses that are accepted"),
    VerlName(CORE_ALGOS, "get_policy_loss_fn", "the policy loss is tried before the run"),
    VerlName(CORE_ALGOS, "register_adv_est", "adds overlong filtering"),
    VerlName(CORE_ALGOS, "get_adv_estimator_fn", "tells whether that was done"),
    VerlName(
        "verl.workers.config.actor",
        "ActorConfig.__post_init__",
        "has an allow-list of modes: ours are checked and let through",
        _checked_post_init,
    ),
    VerlName(
        ENGINE,
        "BaseEngine.train_batch",
        "sees a rank's whole optimizer mini-batch before it is split: the place of the one all-reduce",
        _summing_train_batch,
        ("data", "loss_function"),
    ),
    VerlName(ENGINE, "BaseEngine.get_data_parallel_group", "the ranks to sum over"),
    VerlName(ENGINE, "BaseEngine.get_data_parallel_size", "undoes the averaging of gradients"),
    VerlName(ENGINE, "BaseEngine.is_mp_src_rank_with_outputs", "the ranks that return metrics"),
    VerlName(
        "verl.workers.utils.losses",
        "get_policy_loss_fn",
        "a policy loss that never aggregates is refused in its first micro-batch",
        _watched_policy_losses,
    ),
    VerlName("verl.utils.device", "get_device_id", "where the sum is all-reduced"),
    VerlName(METRIC, "Metric", "how a metric is combined over mini-batches and ranks"),
    VerlName(METRIC, "AggregationType", "the same"),
    VerlName(
        "verl.utils.config",
        "validate_config",
        "sees the whole config before workers start: refuses what cannot be exact, fills M",
        _checking_config,
        ("config",),
    ),
    VerlName("verl.utils.config", "omega_conf_to_dataclass", "makes the actor's config, which is then checked"),
    VerlName("verl.trainer.ppo.utils", "need_critic", "whether there is a critic to check"),
    VerlName(
        "verl.trainer.main_ppo",
        "run_ppo",
        "the same as validate_config, for fully_async_policy, which calls only this",
        _checking_config,
        ("config",),
        needed=False,
    ),
    VerlName("verl.trainer.ppo.ray_trainer", "agg_loss", ENTROPY, _whole_batch, needed=False),
    VerlName("verl.trainer.ppo.v1.trainer_base", "agg_loss", ENTROPY, _whole_batch, needed=False),  # since 0.9.0
    VerlName("verl.trainer.main_ppo_sync", "agg_loss", ENTROPY, _whole_batch, needed=False),  # 0.8.0's V1 trainer
    VerlName("verl.experimental.separation.ray_trainer", "agg_loss", ENTROPY, _whole_batch, needed=False),
)


def register() -> None:
    """Have every name above checked and wrapped as soon as verl imports its module. May be called again."""
    global _registered
    if _registered:
        return
    _registered = True
    for module_name in dict.fromkeys(name.module for name in NAMES):
        wrapt.register_post_import_hook(_apply, module_name)
    wrapt.register_post_import_hook(_register_estimator, CORE_ALGOS)


def _register_estimator(core_algos: ModuleType) -> None:
    try:
        core_algos.register_adv_est(overlong.ESTIMATOR)(overlong.grpo_overlong_filtering)
    except Exception as error:  # as in _apply; verl itself refuses the name later, check_config before Ray starts
        logger.warning("vlnorm-verl cannot register %s (%s: %s)", overlong.ESTIMATOR, type(error).__name__, error)


def _apply(module: ModuleType) -> None:
    """Check the names of a module that verl has just imported; wrap them if all are as expected, else none."""
    names = [name for name in NAMES if name.module == module.__name__]
    lacking = [problem for name in names if (problem := _problem(module, name))]
    try:
        if not lacking:
            for name in names:
                _wrap(module, name)
    except Exception as error:  # the import of verl must go on; whoever asks for our modes is told in require_installed
        lacking = [f"{module.__name__}: {type(error).__name__}: {error}"]
    _outcome[module.__name__] = "; ".join(lacking) or None
    if lacking:
        logger.warning("vlnorm-verl cannot extend this release of verl: it lacks %s", "; ".join(lacking))


def _problem(module: ModuleType, name: VerlName) -> str | None:
    found: Any = module
    for part in name.name.split("."):
        found = getattr(found, part, None)
    if found is None:
        return f"{name.module}.{name.name} ({name.why})"
    missing = [p for p in name.parameters if p not in inspect.signature(found).parameters]
    return f"{', '.join(missing)} of {name.module}.{name.name} ({name.why})" if missing else None


def _wrap(module: ModuleType, name: VerlName) -> None:
    if name.wrap is not None:
        *owners, attribute = name.name.split(".")
        owner = functools.reduce(getattr, owners, module)
        setattr(owner, attribute, name.wrap(getattr(owner, attribute)))


def _patch_main() -> None:
    """verl 0.8.0 runs its V1 trainer as __main__ (python -m verl.trainer.main_ppo_sync), which no import hook sees."""
    main = sys.modules["__main__"]
    run_as = getattr(getattr(main, "__spec__", None), "name", None)
    for name in NAMES:
        if name.module == run_as and name.wrap is _whole_batch:
            _wrap(main, name)


def lacking() -> list[str]:
    """What the installed verl lacks of the names that every run needs."""
    needed = dict.fromkeys(name.module for name in NAMES if name.needed)
    for module_name in needed:
        try:
            importlib.import_module(module_name)
        except ImportError as error:
            _outcome[module_name] = f"{module_name} ({error})"
    not_patched = [f"{module_name} not patched" for module_name in needed if module_name not in _outcome]
    return [reason for name in needed if (reason := _outcome.get(name))] + not_patched


def require_installed(mode: str) -> None:
    """Raises RuntimeError if a name that every run needs is not there, or the plugin is not loaded."""
    if missing := lacking():
        hint = "Run `vlnorm-verl doctor`."
        if _before_0_9():
            hint = "Before verl 0.9.0 it needs VERL_USE_EXTERNAL_MODULES=vlnorm_verl.verl_entry on every node."
        raise RuntimeError(
            f"{MODE_KEY}={mode!r} is not available: vlnorm-verl did not get into the installed verl "
            f"{_verl_version()}, which lacks: {'; '.join(missing)}. {hint}"
        )
