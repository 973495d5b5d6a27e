"""Puts the aggregations of `vlnorm_verl.aggregation` into stock verl. The only module that knows verl's insides.

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
    """A policy loss that does not aggregate by `loss_agg_mode`."""


@dataclass
class _MiniBatch:
    """The optimizer mini-batch that this process works on."""

    mode: str
    aggregation: maths.Aggregation
    total: torch.Tensor  # Σ_j z(L_j) over all micro-batches and data-parallel ranks, scalar
    dp_size: int
    scale: float | None  # M
    aggregated: bool = False  # whether agg_loss was called for it


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
    one = torch.ones(1, 1)
    try:
        _stock_agg_loss(one, one, mode, loss_scale_factor=1.0)
    except ValueError as error:
        return "Invalid loss_agg_mode" not in str(error)
    return True


def _extended_agg_loss(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """verl's `agg_loss` with the registered aggregations (trainer/ppo/core_algos.py)."""
    global _stock_agg_loss
    signature = inspect.signature(stock)
    _stock_agg_loss = stock

    @functools.wraps(stock)
    def agg_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs).arguments
        mode, mini_batch = given["loss_agg_mode"], _mini_batch.get()
        if not is_ours(mode):
            if mini_batch is not None:
                raise IgnoresMode(
                    f"{MODE_KEY}={mini_batch.mode!r}, but the policy loss aggregates by {mode!r} whatever "
                    "the mode. Choose a policy_loss.loss_mode that uses loss_agg_mode, or set that mode."
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
        scale = given.get("loss_scale_factor")
        mini_batch.aggregated = True
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


def _watched_policy_losses(stock: Callable[[str], Any]) -> Callable[[str], Any]:
    """`get_policy_loss_fn` of workers/utils/losses.py: each policy loss must aggregate; KL and entropy do not count."""

    @functools.wraps(stock)
    def get_policy_loss_fn(name: str) -> Any:
        loss_fn = stock(name)

        @functools.wraps(loss_fn)
        def watched(*args: Any, **kwargs: Any) -> Any:
            mini_batch = _mini_batch.get()
            if mini_batch is not None:
                mini_batch.aggregated = False
            result = loss_fn(*args, **kwargs)
            if mini_batch is not None and not mini_batch.aggregated:
                raise RuntimeError(NO_EFFECT.format(mode=mini_batch.mode, loss=f"the policy loss {name!r}"))
            return result

        return watched

    return get_policy_loss_fn


def whole_batch_agg_loss(
    loss_mat: torch.Tensor, loss_mask: torch.Tensor, loss_agg_mode: str, **kwargs: Any
) -> torch.Tensor:
    """`agg_loss` for the driver's entropy metric: the batch given is the whole one, so its sum is the sum."""
    from verl.trainer.ppo.core_algos import agg_loss

    if not is_ours(loss_agg_mode):
        return agg_loss(loss_mat=loss_mat, loss_mask=loss_mask, loss_agg_mode=loss_agg_mode, **kwargs)
    method = maths.parse_mode(loss_agg_mode)
    total = maths.mini_batch_sums(method, maths.response_lengths(loss_mask))[0]
    with _in_mini_batch(_MiniBatch(loss_agg_mode, method, total, dp_size=1, scale=None)):
        return agg_loss(loss_mat=loss_mat, loss_mask=loss_mask, loss_agg_mode=loss_agg_mode, **kwargs)


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
    method = maths.parse_mode(actor.loss_agg_mode)
    mask = torch.tensor([[1, 1], [1, 0]])
    total = maths.mini_batch_sums(method, maths.response_lengths(mask))[0]
    mini_batch = _MiniBatch(actor.loss_agg_mode, method, total, dp_size=1, scale=1.0)
    log_prob = torch.full((2, 2), -1.0)
    try:
        with _in_mini_batch(mini_batch), torch.random.fork_rng(devices=[]):
            importlib.import_module(CORE_ALGOS).get_policy_loss_fn(name)(
                old_log_prob=log_prob,
                log_prob=log_prob.clone().requires_grad_(),
                advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
                response_mask=mask.bool(),
                loss_agg_mode=actor.loss_agg_mode,
                config=actor,
                rollout_is_weights=None,
            )
    except IgnoresMode:
        return "it aggregates by a mode of its own, whatever loss_agg_mode is"
    return None if mini_batch.aggregated else "it never calls agg_loss"


def check_rejection(mode: str, policy_loss: Any) -> None:
    """Raises ValueError for a bypass-mode policy loss that rejects tokens inside the micro-batch."""
    correction = policy_loss.get("rollout_correction", None)
    if policy_loss.get("loss_mode") == "bypass_mode" and correction is not None and correction.get("rollout_rs", None):
        _refuse_rejection_in_loss(mode, correction.get("rollout_rs"))


def _refuse_rejection_in_loss(mode: str, rollout_rs: Any) -> None:
    raise ValueError(
        f"algorithm.rollout_correction.rollout_rs={rollout_rs!r} with bypass_mode=true cannot be used with "
        f"{MODE_KEY}={mode!r}: it takes tokens out of a response inside each micro-batch, after the mini-batch's "
        "lengths were summed. Accepted: rollout_rs=null, or bypass_mode=false (tokens are taken out before)."
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
            _refuse_rejection_in_loss(mode, correction.get("rollout_rs"))
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
    engine: Any = role.get(strategy) or {} if strategy in ("torchtitan", "megatron") else {}
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
    if strategy == "megatron":
        old = _before_0_9()
        context, override = engine.get("context_parallel_size", 1), engine.get("override_transformer_config") or {}
        # Megatron-Bridge turns calculate_per_token_loss on with context parallelism; verl's default since 0.9.0.
        bridge = engine.get("use_mbridge", True) and not engine.get("vanilla_mbridge", old)
        per_token = bool(override.get("calculate_per_token_loss", bridge and context > 1))
        if old and engine.get("dynamic_context_parallel"):
            refuse("megatron.dynamic_context_parallel=true", "replicated responses are counted again", "false")
        if old and per_token:
            by_bridge = "calculate_per_token_loss" not in override
            refuse(
                f"megatron.context_parallel_size={context}"
                if by_bridge
                else "megatron.override_transformer_config.calculate_per_token_loss=true",
                "gradients are then added, not averaged",
                "1, or vanilla_mbridge=true" if by_bridge else "false",
            )
        if not old and per_token and context > 1:
            logger.warning(
                "%s.megatron.context_parallel_size=%d with calculate_per_token_loss: verl counts up to %d tokens of "
                "each micro-batch too few: gradients of every loss_agg_mode are too large by the factor T/(T - those "
                "not counted), T the tokens of the mini-batch. The weights of responses are right.",
                key,
                context,
                context - 1,
            )


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
    V1 separate_async is not asked: it draws each mini-batch by itself (trainer/ppo/v1/trainer_base.py:549), whatever
    `shuffle` is.
    """
    if OmegaConf.select(config, "trainer.v1.trainer_mode") == "separate_async":
        return
    mini_batches = OmegaConf.select(config, "async_training.require_batches")  # of fully_async_policy
    several = mini_batches > 1 if mini_batches else actor.ppo_mini_batch_size < config.data.train_batch_size
    if several and not actor.get("shuffle"):
        logger.warning(
            "actor_rollout_ref.actor.shuffle=false with several optimizer mini-batches a rollout batch: verl orders "
            "responses by when they were finished, so each mini-batch holds responses of similar lengths, and "
            "loss_agg_mode=%s has little left to weigh. Set actor_rollout_ref.actor.shuffle=true for mini-batches "
            "drawn at random.",
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
    """What the installed verl lacks of the names that every run needs, and what else was found lacking on the way."""
    needed = dict.fromkeys(name.module for name in NAMES if name.needed)
    for module_name in needed:
        try:
            importlib.import_module(module_name)
        except ImportError as error:
            _outcome[module_name] = f"{module_name} ({error})"
    not_patched = [f"{module_name} not patched" for module_name in needed if module_name not in _outcome]
    return [reason for reason in _outcome.values() if reason] + not_patched


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
