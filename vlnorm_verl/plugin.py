"""Puts the aggregations of `vlnorm_verl.aggregation` into stock verl. The only module that knows verl's insides.

Names of verl that are touched, and why (files of verl 0.9.1; nothing else of verl is replaced). One thing is added:
the advantage estimator of `vlnorm_verl.overlong`, through verl's own register_adv_est.

| name                                               | why                                                      |
|----------------------------------------------------|----------------------------------------------------------|
| trainer/ppo/core_algos.py  agg_loss                | an if/elif over verl's modes: ours are answered before   |
| workers/config/actor.py  ActorConfig.__post_init__ | its allow-list of modes: ours are checked and let through|
| workers/engine/base.py  BaseEngine.train_batch     | sees a rank's whole optimizer mini-batch before it is    |
|                                                    | split: the place of the one all-reduce                   |
| utils/config.py  validate_config                   | sees the whole config on the driver before Ray starts:   |
|                                                    | refuses what cannot be exact, fills M                    |
| trainer/main_ppo.py  run_ppo                       | the same for fully_async_policy, which starts by it      |
|                                                    | without validate_config                                  |
| trainer/ppo/ray_trainer.py  agg_loss               | the driver's `actor/entropy` metric over the whole       |
| trainer/ppo/v1/trainer_base.py  agg_loss           | rollout batch, with no mini-batch around it              |
| experimental/separation/ray_trainer.py  agg_loss   |                                                          |

How a weight gets from the mini-batch to the loss: `train_batch` sums z(L) over the rank's mini-batch, all-reduces
it over the data-parallel ranks and holds it in a context variable while verl runs its micro-batches. Every
aggregation inside (policy loss, entropy, KL, value loss; also of policy losses that users register) reads it
there. `agg_loss` outside such a context has no mini-batch to sum over and raises: it never sums over a
micro-batch instead.

Each patch is applied when verl imports the module (wrapt's post-import hooks), so that loading the plugin costs
nothing in processes that never train. A patch that fails is logged as a WARNING and leaves stock verl as it was;
a config that asks for one of our modes is then refused with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import wrapt

from vlnorm_verl import aggregation as maths
from vlnorm_verl import overlong

logger = logging.getLogger(__name__)

MODE_KEY = "actor_rollout_ref.actor.loss_agg_mode"
SCALE_KEY = "actor_rollout_ref.actor.loss_scale_factor"
STOCK_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)
# Policy losses of verl that do not aggregate by `loss_agg_mode`, and what they do instead.
_IGNORES_MODE = {
    "geo_mean": "it averages over responses by itself and never calls agg_loss",
    "sapo": "it aggregates by seq-mean-token-mean whatever the mode",
}


@dataclass
class _MiniBatch:
    """The optimizer mini-batch that this process works on."""

    mode: str
    aggregation: maths.Aggregation
    total: torch.Tensor  # Σ_j z(L_j) over all micro-batches and data-parallel ranks, scalar
    dp_size: int
    aggregated: bool = False  # whether agg_loss was called for it


_mini_batch: ContextVar[_MiniBatch | None] = ContextVar("vlnorm_verl_mini_batch", default=None)

# What became of each patch: module name -> None if applied, else the reason. Modules not imported yet are absent.
_outcome: dict[str, str | None] = {}
_registered = False


# ---------------------------------------------------------------------------------------------------- aggregation


def _extended_agg_loss(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """verl's `agg_loss` with the registered aggregations (trainer/ppo/core_algos.py)."""

    @functools.wraps(stock)
    def agg_loss(
        loss_mat: torch.Tensor,
        loss_mask: torch.Tensor,
        loss_agg_mode: str,
        dp_size: int = 1,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        loss_scale_factor: float | None = None,
    ) -> torch.Tensor:
        mini_batch = _mini_batch.get()
        if not maths.is_registered(loss_agg_mode):
            if mini_batch is not None:
                raise ValueError(
                    f"{MODE_KEY}={mini_batch.mode!r}, but the policy loss aggregates by {loss_agg_mode!r} whatever "
                    "the mode. Choose a policy_loss.loss_mode that uses loss_agg_mode, or set that mode."
                )
            return stock(
                loss_mat,
                loss_mask,
                loss_agg_mode,
                dp_size,
                batch_num_tokens,
                global_batch_size,
                loss_scale_factor,
            )
        if mini_batch is None or mini_batch.mode != loss_agg_mode:
            raise RuntimeError(
                f"loss_agg_mode={loss_agg_mode!r} was asked for outside of an optimizer mini-batch of this mode: the "
                "weights need a sum over the whole mini-batch, and a micro-batch does not have it. Train through "
                "BaseEngine.train_batch with a loss function that carries the actor's config "
                "(functools.partial(loss, config=actor_config), as verl's workers do), or choose one of verl's modes."
            )
        if dp_size != mini_batch.dp_size:
            raise RuntimeError(
                f"loss_agg_mode={loss_agg_mode!r}: the loss was called with dp_size={dp_size} on "
                f"{mini_batch.dp_size} data-parallel ranks; a policy loss must pass **config.global_batch_info on."
            )
        mini_batch.aggregated = True
        loss = maths.aggregate(loss_mat, loss_mask, mini_batch.aggregation, mini_batch.total, loss_scale_factor)
        # FSDP and Megatron average gradients over the data-parallel ranks; the mini-batch's loss is their sum.
        return loss * dp_size

    return agg_loss


def _whole_batch_agg_loss(agg_loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`agg_loss` for the driver's entropy metric: the batch given is the whole one, so its sum is the sum."""

    @functools.wraps(agg_loss)
    def whole_batch(loss_mat: torch.Tensor, loss_mask: torch.Tensor, loss_agg_mode: str, **kwargs: Any) -> torch.Tensor:
        if not maths.is_registered(loss_agg_mode):
            return agg_loss(loss_mat=loss_mat, loss_mask=loss_mask, loss_agg_mode=loss_agg_mode, **kwargs)
        method = maths.parse_mode(loss_agg_mode)
        total = maths.mini_batch_sums(method, maths.response_lengths(loss_mask))[0]
        with _in_mini_batch(_MiniBatch(loss_agg_mode, method, total, dp_size=1)):
            return agg_loss(loss_mat=loss_mat, loss_mask=loss_mask, loss_agg_mode=loss_agg_mode, **kwargs)

    return whole_batch


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
        if not maths.is_registered(mode):
            return stock(self, data, loss_function)

        method = maths.parse_mode(mode)
        # Not `loss_mask`: verl's rollout correction takes tokens out of `response_mask` only.
        lengths = maths.response_lengths(data["response_mask"])
        sums = maths.mini_batch_sums(method, lengths)
        sums = _sum_over_data_parallel_ranks(self, sums)
        mini_batch = _MiniBatch(mode, method, sums[0], self.get_data_parallel_size())
        with _in_mini_batch(mini_batch):
            outputs = stock(self, data, loss_function)
        if self.is_mp_src_rank_with_outputs():
            if not mini_batch.aggregated:
                raise RuntimeError(
                    f"loss_agg_mode={mode!r} had no effect: the loss function never called agg_loss. Use a policy "
                    "loss that aggregates by the mode, or choose one of verl's modes."
                )
            outputs["metrics"].update(_mini_batch_metrics(method, lengths, sums, config.loss_scale_factor))
        return outputs

    return train_batch


def _sum_over_data_parallel_ranks(engine: Any, sums: torch.Tensor) -> torch.Tensor:
    from verl.utils.device import get_device_id

    group = engine.get_data_parallel_group()
    if group is None and engine.get_data_parallel_size() > 1:
        raise RuntimeError(
            f"{type(engine).__name__} has {engine.get_data_parallel_size()} data-parallel ranks and no process group "
            "for them: the mini-batch sum of loss_agg_mode cannot be made. Choose one of verl's modes."
        )
    device = torch.device(get_device_id())
    sums = sums.to(device, maths.weight_dtype(device.type))
    if group is not None:
        # Here, not in the loss: every rank comes by once per mini-batch, even one whose rows are all masked.
        torch.distributed.all_reduce(sums, group=group)
    return sums


def _mini_batch_metrics(
    method: maths.Aggregation, lengths: torch.Tensor, sums: torch.Tensor, scale: float
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
    metrics["vl_norm/token_weight"] = Metric(AggregationType.MEAN, maths.token_weight(method, values, scale))
    metrics["vl_norm/weight_min"] = Metric(AggregationType.MIN, low)
    metrics["vl_norm/weight_max"] = Metric(AggregationType.MAX, high)
    return metrics


# ---------------------------------------------------------------------------------------------------------- config


def _checked_post_init(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """`ActorConfig.__post_init__` that knows the registered modes (workers/config/actor.py)."""

    @functools.wraps(stock)
    def __post_init__(self: Any) -> None:
        mode = self.loss_agg_mode
        if mode in STOCK_MODES:
            stock(self)
            return
        check_mode(mode)
        check_scale(self.loss_scale_factor)
        check_policy_loss(mode, self.policy_loss)
        # The stock check of everything else ends with an allow-list of verl's modes, so it is shown one of those.
        object.__setattr__(self, "loss_agg_mode", STOCK_MODES[0])
        try:
            stock(self)
        finally:
            object.__setattr__(self, "loss_agg_mode", mode)

    return __post_init__


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


def check_policy_loss(mode: str, policy_loss: Any) -> None:
    """Raises ValueError for a policy loss whose aggregation would not be the mode's."""
    loss_mode = policy_loss.get("loss_mode", "vanilla")
    key = "actor_rollout_ref.actor.policy_loss.loss_mode"
    if loss_mode in _IGNORES_MODE:
        raise ValueError(
            f"{key}={loss_mode!r} cannot be used with {MODE_KEY}={mode!r}: {_IGNORES_MODE[loss_mode]}. "
            "Accepted: a policy loss that aggregates by the mode, such as vanilla, gspo, gpg, dppo_tv, cispo."
        )
    correction = policy_loss.get("rollout_correction", None)
    if loss_mode == "bypass_mode" and correction is not None and correction.get("rollout_rs", None):
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
    actor, critic, horizon = config.actor_rollout_ref.actor, config.critic, config.data.max_response_length
    check_overlong_filtering(config.algorithm, horizon)
    if actor.loss_agg_mode not in STOCK_MODES:
        check_mode(actor.loss_agg_mode)
        check_scale(actor.get("loss_scale_factor"))
        check_policy_loss(actor.loss_agg_mode, actor.policy_loss)
        correction = config.algorithm.get("rollout_correction") or {}
        if correction.get("bypass_mode") and correction.get("rollout_rs"):
            _refuse_rejection_in_loss(actor.loss_agg_mode, correction.get("rollout_rs"))
        legacy = config.trainer.get("use_legacy_worker_impl", "disable")
        if legacy != "disable":
            raise ValueError(
                f"trainer.use_legacy_worker_impl={legacy!r} cannot be used with {MODE_KEY}="
                f"{actor.loss_agg_mode!r}: the legacy actor has no mini-batch sum. Accepted: disable"
            )
        fill_scale(actor, horizon)
        warn_of_sorted_mini_batches(actor, config.data.train_batch_size)
    # verl's critic inherits the actor's mode by interpolation, and CriticConfig accepts any string.
    if critic.loss_agg_mode not in STOCK_MODES:
        check_mode(critic.loss_agg_mode, "critic.loss_agg_mode")
        check_scale(critic.get("loss_scale_factor"), "critic.loss_scale_factor")
        fill_scale(critic, horizon)


def _checking_config(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`validate_config` (utils/config.py) or `run_ppo` (trainer/main_ppo.py) with `check_config` before it."""

    @functools.wraps(stock)
    def checked(config: Any, *args: Any, **kwargs: Any) -> Any:
        check_config(config)
        return stock(config, *args, **kwargs)

    return checked


def warn_of_sorted_mini_batches(actor: Any, train_batch_size: int) -> None:
    """Warn where the mini-batches of a rollout batch will hold responses of similar lengths each.

    verl keeps the order of the rollout batch unless told to shuffle. The V1 trainer's replay buffer returns responses
    in the order in which they were finished (trainer/ppo/v1/replay_buffer.py), the V0 trainer's `_balance_batch` sorts
    each rank's share by length (trainer/ppo/ray_trainer.py:1240). Both put short responses into the first mini-batch.
    """
    if actor.ppo_mini_batch_size < train_batch_size and not actor.get("shuffle"):
        logger.warning(
            "actor_rollout_ref.actor.shuffle=false with several optimizer mini-batches a rollout batch: verl orders "
            "responses by when they were finished, so each mini-batch holds responses of similar lengths, and "
            "loss_agg_mode=%s has little left to weigh. Set actor_rollout_ref.actor.shuffle=true for mini-batches "
            "drawn at random.",
            actor.loss_agg_mode,
        )


def check_overlong_filtering(algorithm: Any, max_response_length: int) -> None:
    """Raises ValueError if overlong filtering is asked for without its length; before Ray starts, not at step 1."""
    if algorithm.adv_estimator != overlong.ESTIMATOR:
        return
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    get_adv_estimator_fn(overlong.ESTIMATOR)  # raises if it could not be registered
    limit = algorithm.get(overlong.LENGTH_KEY)
    if not isinstance(limit, int) or not 0 < limit <= max_response_length:
        raise ValueError(
            f"algorithm.{overlong.LENGTH_KEY}={limit!r}: algorithm.adv_estimator={overlong.ESTIMATOR} needs the length "
            f"from which a response is overlong, in tokens: 1 to data.max_response_length={max_response_length}, "
            f"usually +algorithm.{overlong.LENGTH_KEY}='${{data.max_response_length}}'"
        )


def fill_scale(role: Any, max_response_length: int) -> None:
    """M = the run's maximum response length where `loss_scale_factor` is null; verl's critic inherits the actor's."""
    from omegaconf import open_dict

    if role.get("loss_scale_factor") is None:
        with open_dict(role):
            role.loss_scale_factor = max_response_length


# ---------------------------------------------------------------------------------------------------- installation


@dataclass(frozen=True)
class _Patch:
    owner: str  # class in the module, or "" for the module itself
    name: str
    wrap: Callable[[Any], Any]


_PATCHES: dict[str, _Patch] = {
    "verl.trainer.ppo.core_algos": _Patch("", "agg_loss", _extended_agg_loss),
    "verl.workers.config.actor": _Patch("ActorConfig", "__post_init__", _checked_post_init),
    "verl.workers.engine.base": _Patch("BaseEngine", "train_batch", _summing_train_batch),
    "verl.utils.config": _Patch("", "validate_config", _checking_config),
    "verl.trainer.main_ppo": _Patch("", "run_ppo", _checking_config),
    "verl.trainer.ppo.ray_trainer": _Patch("", "agg_loss", _whole_batch_agg_loss),
    "verl.trainer.ppo.v1.trainer_base": _Patch("", "agg_loss", _whole_batch_agg_loss),
    "verl.experimental.separation.ray_trainer": _Patch("", "agg_loss", _whole_batch_agg_loss),
}
# Without these no run of ours can train; the others belong to single trainers and workers.
_NEEDED = ("verl.trainer.ppo.core_algos", "verl.workers.engine.base")


def register() -> None:
    """Arrange for every patch above to be applied as soon as verl imports its module. May be called again."""
    global _registered
    if _registered:
        return
    _registered = True
    for module_name in _PATCHES:
        wrapt.register_post_import_hook(_apply, module_name)
    wrapt.register_post_import_hook(_register_estimator, "verl.trainer.ppo.core_algos")


def _register_estimator(core_algos: ModuleType) -> None:
    try:
        core_algos.register_adv_est(overlong.ESTIMATOR)(overlong.grpo_overlong_filtering)
    except Exception as error:  # as in _apply; verl itself refuses the name later, check_config before Ray starts
        logger.warning("vlnorm-verl cannot register %s (%s: %s)", overlong.ESTIMATOR, type(error).__name__, error)


def _apply(module: ModuleType) -> None:
    patch = _PATCHES[module.__name__]
    try:
        owner = getattr(module, patch.owner) if patch.owner else module
        setattr(owner, patch.name, patch.wrap(getattr(owner, patch.name)))
        _outcome[module.__name__] = None
    except Exception as error:  # the import of verl must go on; whoever asks for our modes is told in require_installed
        what = ".".join(filter(None, (module.__name__, patch.owner, patch.name)))
        reason = f"{what}: {type(error).__name__}: {error}"
        _outcome[module.__name__] = reason
        logger.warning("vlnorm-verl cannot extend this release of verl (%s)", reason)


def require_installed(mode: str) -> None:
    """Raises RuntimeError if a patch that every run needs did not apply to the installed verl."""
    for module_name in _NEEDED:
        importlib.import_module(module_name)
    failed = [reason for reason in _outcome.values() if reason]
    missing = [name for name in _NEEDED if name not in _outcome]
    if failed or missing:
        raise RuntimeError(
            f"{MODE_KEY}={mode!r} is not available: vlnorm-verl did not get into the installed verl "
            f"({'; '.join(failed + [f'{name} not patched' for name in missing])}). Run `vlnorm-verl doctor`."
        )
