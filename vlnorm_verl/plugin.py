"""Puts the aggregations of `vlnorm_verl.aggregation` into stock verl. The only module that knows verl's loss path.

`NAMES` below is the one table of verl's names that are relied on, and why; those with a `wrap` are replaced, nothing
else of verl is. One thing is added: the advantage estimator of `vlnorm_verl.paper.overlong`, by verl's own
register_adv_est.
Files and lines are verl 0.9.1's unless said; verl 0.7.1, 0.8.0 and 0.9.0 have the same names, trainers excepted.

How a weight gets from the mini-batch to the loss: `train_batch` sums z(L) over the rank's mini-batch, all-reduces
it over the data-parallel ranks and keeps it in `_mini_batch` while verl runs its micro-batches. Every aggregation
inside (policy loss, entropy, KL, value loss; also of policy losses that users register) reads it there. `agg_loss`
with a gradient and outside of a mini-batch raises: it never sums over a micro-batch instead. Without a gradient
there it computes a metric, such as the trainers' actor/entropy, of the batch that it is given.

Each wrapper is put in place when verl imports the module (wrapt's post-import hooks), so that loading the plugin costs
nothing in processes that never train. A function gets its wrapper as its own code (`_replace`), so that whoever took
the function out of its module before has it too. What a release lacks is logged as a WARNING and leaves stock verl as
it was; a config that asks for one of our modes is then refused with the names that are missing.

A verl that knows `vl_norm` by itself (patched by patches/, or a later release) is left to it: the plugin then only
checks the configuration, fills M, and says so.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import logging
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import wrapt
from omegaconf import OmegaConf, open_dict

from vlnorm_verl import aggregation as maths
from vlnorm_verl.paper import overlong

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
    "loss_agg_mode={mode!r} had no effect: {loss} never called agg_loss with it. Use a policy loss that aggregates by "
    "the mode, or choose one of verl's modes."
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
    lengths: torch.Tensor | None = None  # valid tokens of the micro-batch's responses while its loss runs, int64 [B]
    checked: torch.Tensor | None = None  # the last mask that was found to have these lengths


# A plain global: torch.compile cannot trace a ContextVar.
_mini_batch: _MiniBatch | None = None

# What became of each module of NAMES that verl has imported: None if all is there, else what is lacking.
_outcome: dict[str, str | None] = {}
_registered = False
_stock_agg_loss: Callable[..., torch.Tensor] | None = None  # verl's own; set when verl imports core_algos


# ---------------------------------------------------------------------------------------------------- aggregation


def is_ours(mode: object) -> TypeGuard[str]:
    """Whether this package answers for the mode: it is registered here, and verl does not know it by itself."""
    return maths.is_registered(mode) and not is_verls(mode)


def is_verls(mode: object) -> bool:
    """Whether verl aggregates by the mode: a stock one, or one of a patched tree, a fork, a later release, a user."""
    if not isinstance(mode, str):
        return False
    if mode in STOCK_MODES:
        return True
    core_algos = importlib.import_module(CORE_ALGOS)
    if not maths.is_registered(mode):
        return _accepts(core_algos.agg_loss, mode)
    return _stock_agg_loss is not None and _accepts(_stock_agg_loss, mode)  # None: no plugin in this process


@functools.cache
def _accepts(agg_loss: Callable[..., torch.Tensor], mode: str) -> bool:
    return _answer(agg_loss, mode) != _answer(agg_loss, "no such mode")


def _answer(agg_loss: Callable[..., torch.Tensor], mode: str) -> tuple[type, str, int | None] | None:
    """How an agg_loss takes a mode: None, or what it raises and where; a fork's mode may want more than is known."""
    one = torch.ones(1, 1)
    sizes = {"dp_size": 1, "batch_num_tokens": 1, "global_batch_size": 1, "loss_scale_factor": 1}
    accepted = inspect.signature(agg_loss).parameters
    try:
        agg_loss(one, one, mode, **{name: size for name, size in sizes.items() if name in accepted})
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return type(error), place.filename, place.lineno
    return None


def _extended_agg_loss(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """verl's `agg_loss` with the registered aggregations (trainer/ppo/core_algos.py)."""
    global _stock_agg_loss
    signature = inspect.signature(stock)
    _stock_agg_loss = stock

    @functools.wraps(stock)
    def agg_loss(
        loss_mat: torch.Tensor, loss_mask: torch.Tensor, loss_agg_mode: str, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        mini_batch = _mini_batch
        if mini_batch is None and loss_agg_mode in STOCK_MODES:  # before anything that torch.compile cannot trace
            return stock(loss_mat, loss_mask, loss_agg_mode, *args, **kwargs)
        if not is_ours(loss_agg_mode):
            loss = stock(loss_mat, loss_mask, loss_agg_mode, *args, **kwargs)
            if mini_batch is not None and loss.requires_grad:
                # As a metric it may have any mode; it must not train.
                loss.register_hook(functools.partial(_refuse_gradient, mini_batch.mode, loss_agg_mode))
            return loss
        sizes = signature.bind(loss_mat, loss_mask, loss_agg_mode, *args, **kwargs).arguments
        dp_size, scale = sizes.get("dp_size"), sizes.get("loss_scale_factor")
        differentiated = torch.is_grad_enabled() and loss_mat.requires_grad  # else it is for a metric
        if mini_batch is None and not differentiated and dp_size in (None, 1):
            # verl's agg_loss takes the width of the batch for M too where it is not given.
            width = loss_mask.shape[-1]
            return _aggregate_whole_batch(loss_mat, loss_mask, loss_agg_mode, width if scale is None else scale)
        if mini_batch is None or mini_batch.mode != loss_agg_mode:
            raise RuntimeError(
                f"loss_agg_mode={loss_agg_mode!r} was asked for outside of an optimizer mini-batch of this mode: the "
                "weights need a sum over the whole mini-batch, and a micro-batch does not have it. Train through "
                "BaseEngine.train_batch with a loss function that carries the actor's config "
                "(functools.partial(loss, config=actor_config), as verl's workers do), or choose one of verl's modes."
            )
        # A loss may leave out dp_size and M (the value loss up to verl 0.8.0, users' own): the mini-batch has them.
        for name, given, right in (
            ("dp_size", dp_size, mini_batch.dp_size),
            ("loss_scale_factor", scale, mini_batch.scale),
        ):
            if given not in (None, right):
                raise RuntimeError(
                    f"loss_agg_mode={loss_agg_mode!r}: the loss called agg_loss with {name}={given}, and the "
                    f"mini-batch has {right}. Pass **config.global_batch_info on, or no {name}."
                )
        if differentiated:
            _check_mask(loss_mask, mini_batch)
            mini_batch.aggregated = True
        loss = maths.aggregate(loss_mat, loss_mask, mini_batch.aggregation, mini_batch.total, mini_batch.scale)
        # FSDP and Megatron average gradients over the data-parallel ranks; the mini-batch's loss is their sum.
        return loss * mini_batch.dp_size

    return agg_loss


def _aggregate_whole_batch(loss_mat: torch.Tensor, loss_mask: torch.Tensor, mode: str, scale: float) -> torch.Tensor:
    """For metrics such as the trainers' actor/entropy: the batch given is the whole one, so its sum is the sum."""
    method = maths.parse_mode(mode)
    total = maths.mini_batch_sums(method, maths.response_lengths(loss_mask))[0]
    return maths.aggregate(loss_mat, loss_mask, method, total, scale)


def _refuse_gradient(mode: str, used: str, gradient: torch.Tensor) -> None:
    if gradient.any():
        raise IgnoresMode(
            mode,
            f"aggregates by {used!r} whatever the mode",
            "Choose a policy_loss.loss_mode that uses loss_agg_mode, or set that mode.",
        )


def _check_mask(mask: torch.Tensor, mini_batch: _MiniBatch) -> None:
    """Raises IgnoresMode if a loss aggregates over other tokens than those of the mini-batch's lengths."""
    if (
        mini_batch.lengths is None or mask is mini_batch.checked
    ):  # most losses pass one mask on: one wait for the device
        return
    if not torch.equal(maths.response_lengths(mask).to(mini_batch.lengths.device), mini_batch.lengths):
        raise IgnoresMode(
            mini_batch.mode,
            "or another term of the loss calls agg_loss with another mask than response_mask, whose lengths the "
            "mini-batch is weighted by",
            "Multiply the losses by a mask of your own, agg_loss(losses * keep, response_mask, ...), or sum over it "
            "without agg_loss.",
        )
    mini_batch.checked = mask


def _with_lengths(loss_function: Callable[..., Any], mini_batch: _MiniBatch) -> Callable[..., Any]:
    """The loss function of a micro-batch, `data` (every engine passes it by name), whose lengths are then known."""

    @functools.wraps(loss_function)
    def loss(*args: Any, **kwargs: Any) -> Any:
        mini_batch.lengths = maths.response_lengths(kwargs["data"]["response_mask"])
        try:
            return loss_function(*args, **kwargs)
        finally:
            mini_batch.lengths = mini_batch.checked = None

    return loss


def _watched_policy_losses(stock: Callable[[str], Any]) -> Callable[[str], Any]:
    """`get_policy_loss_fn` (trainer/ppo/core_algos.py): each policy loss must aggregate by the mode of its mini-batch.

    KL and entropy terms, which verl aggregates itself, do not count.
    """

    @functools.wraps(stock)
    def get_policy_loss_fn(loss_name: str) -> Any:
        loss_fn = stock(loss_name)

        @functools.wraps(loss_fn)
        def watched(*args: Any, **kwargs: Any) -> Any:
            mini_batch = _mini_batch
            if mini_batch is None or not torch.is_grad_enabled():
                return loss_fn(*args, **kwargs)
            mini_batch.aggregated = False
            result = loss_fn(*args, **kwargs)
            if not mini_batch.aggregated:
                raise RuntimeError(NO_EFFECT.format(mode=mini_batch.mode, loss=f"the policy loss {loss_name!r}"))
            return result

        return watched

    return get_policy_loss_fn


@contextlib.contextmanager
def _in_mini_batch(mini_batch: _MiniBatch) -> Iterator[None]:
    global _mini_batch
    before, _mini_batch = _mini_batch, mini_batch
    try:
        yield
    finally:
        _mini_batch = before


# --------------------------------------------------------------------------------------------------------- engine


def _summing(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`BaseEngine.train_batch` and `infer_batch` that first sum over the mini-batch (workers/engine/base.py).

    `data` there is this rank's whole mini-batch, after shuffling and before the split into micro-batches. Both call
    forward_backward_batch of the engine; no engine of verl overrides them.
    """

    @functools.wraps(stock)
    def batch(self: Any, data: Any, loss_function: Callable[..., Any] | None = None) -> Any:
        config: Any = getattr(loss_function, "keywords", {}).get("config")
        mode = getattr(config, "loss_agg_mode", None)
        if loss_function is None or not is_ours(mode):
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
            outputs = stock(self, data, _with_lengths(loss_function, mini_batch))
        if stock.__name__ == "train_batch" and self.is_mp_src_rank_with_outputs():
            if not mini_batch.aggregated:
                raise RuntimeError(NO_EFFECT.format(mode=mode, loss="the loss function"))
            outputs["metrics"].update(_mini_batch_metrics(method, lengths, sums, scale))
        return outputs

    return batch


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
        for name, value in maths.mini_batch_statistics(method, values, scale).items()
    }
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

    return __post_init__


@functools.cache
def _say_left_to_verl() -> None:
    logger.warning(
        "This verl has loss_agg_mode=vl_norm itself: vlnorm-verl leaves the aggregation to it (there are no vl_norm/ "
        "metrics then), checks the configuration, and sets loss_scale_factor where it is null."
    )


def check_mode(mode: object, key: str = MODE_KEY) -> None:
    """Raises ValueError unless `mode` is one of ours with a good parameter, and RuntimeError if a patch is missing."""
    maths.parse_mode(mode, key, also_accepted=STOCK_MODES)
    require_installed(mode)


def check_scale(scale: object, key: str = SCALE_KEY) -> None:
    """Raises ValueError unless M is a positive number, or None for the default."""
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (number and 0 < scale < float("inf")):  # type: ignore[operator]
        raise ValueError(
            f"{key}={scale!r}: M must be a positive number of tokens; leave it null for data.max_response_length"
        )


def check_policy_loss(actor: Any) -> None:
    """Try the policy loss of an ActorConfig on a few short responses.

    Raises:
        ValueError: it does not aggregate by `loss_agg_mode`, so that the mode would have no effect, or raises itself;
            the message names those that do.
    """
    name = actor.policy_loss.get("loss_mode", "vanilla")
    if name not in importlib.import_module(CORE_ALGOS).POLICY_LOSS_REGISTRY:
        return  # registered by a module that only workers import; the first mini-batch tells
    if problem := policy_loss_problem(name, actor):
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode={name!r} cannot be used with "
            f"{MODE_KEY}={actor.loss_agg_mode!r}: {problem}. Accepted: {', '.join(accepted_policy_losses(actor))}."
        )


def accepted_policy_losses(actor: Any) -> list[str]:
    """The registered policy losses that aggregate by the mode of an ActorConfig, with its settings; sorted."""
    registered = importlib.import_module(CORE_ALGOS).POLICY_LOSS_REGISTRY
    return [name for name in sorted(registered) if policy_loss_problem(name, actor) is None]


# These choose some tokens of each micro-batch, in every mode: there is no sum over responses to compare with.
CHOOSE_TOKENS = ("clip_cov", "kl_cov")


def policy_loss_problem(name: str, actor: Any) -> str | None:
    """What keeps a registered policy loss from aggregating by the mode of an ActorConfig; None: nothing.

    The loss is called as verl's ppo_loss calls it (workers/utils/losses.py), on four responses at once and one by one,
    where the policy is the one that sampled them and where it has moved, beyond the clip range too. Its gradient must
    be the sum of the single responses' gradients, and half as large when the mini-batch's sum is twice as large.
    """
    lengths = torch.tensor([3, 1, 2, 4])
    noise = torch.Generator().manual_seed(0)
    old = -1 - torch.rand(4, 4, generator=noise, dtype=torch.float64)
    moved = old + torch.tensor([-1.0, -0.05, 0.05, 1.0], dtype=torch.float64)[torch.randperm(4, generator=noise)]
    try:
        for log_prob in (old, moved):
            whole = _trial_gradient(name, actor, log_prob, old, lengths)
            near = functools.partial(torch.allclose, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
            # Twice the mini-batch's sum is half of every weight, so half of all that goes through agg_loss.
            if not near(whole, 2 * _trial_gradient(name, actor, log_prob, old, lengths, factor=2)):
                return "a part of its gradient does not go through agg_loss"
            single = torch.cat([_trial_gradient(name, actor, log_prob, old, lengths, only=i) for i in range(4)])
            if name not in CHOOSE_TOKENS and not near(whole, single):
                return "its gradient depends on which responses share a micro-batch"
    except IgnoresMode as error:
        return f"it {error.problem}"
    except Exception as error:
        return f"it raised {type(error).__name__} on four short responses ({error})"
    return None


def _trial_gradient(
    name: str,
    actor: Any,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    lengths: torch.Tensor,
    factor: int = 1,
    only: int | None = None,
) -> torch.Tensor:
    """The gradient of a policy loss by log_prob [B x T] on a mini-batch, or the row of one response trained alone.

    Args:
        factor: of the mini-batch's sum. only: the response, else all in one micro-batch.
    """
    method = maths.parse_mode(actor.loss_agg_mode)
    total = factor * maths.mini_batch_sums(method, lengths)[0]
    scale = actor.loss_scale_factor or 7.0
    # As in training a micro-batch is padded to its longest response.
    rows, width = (slice(None), 4) if only is None else (slice(only, only + 1), int(lengths[only]))
    log_prob = log_prob[rows, :width].clone().requires_grad_()
    mask = torch.arange(width) < lengths[rows, None]
    tried = copy.copy(actor)
    sizes = {"dp_size": 1, "batch_num_tokens": int(lengths.sum()), "global_batch_size": 4, "loss_scale_factor": scale}
    object.__setattr__(tried, "global_batch_info", sizes)
    mini_batch = _MiniBatch(actor.loss_agg_mode, method, total, dp_size=1, scale=scale, lengths=lengths[rows])
    with _in_mini_batch(mini_batch), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        loss = importlib.import_module(CORE_ALGOS).POLICY_LOSS_REGISTRY[name](
            old_log_prob=old_log_prob[rows, :width].clone(),
            log_prob=log_prob,
            advantages=torch.tensor([[1.0], [-0.5], [-1.0], [0.5]], dtype=torch.float64)[rows]
            .expand(-1, width)
            .clone(),
            response_mask=mask,
            loss_agg_mode=actor.loss_agg_mode,
            config=tried,
            rollout_is_weights=None,
        )[0]
        gradient = torch.autograd.grad(loss, log_prob)[0]
        if not mini_batch.aggregated:
            raise IgnoresMode(actor.loss_agg_mode, "never calls agg_loss", "")
    return torch.nn.functional.pad(gradient, (0, 4 - width))


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
    select = functools.partial(OmegaConf.select, config)
    check_overlong_filtering(config)
    for key in ("actor_rollout_ref.actor", "critic"):
        if "loss_agg_mode" not in (select(key) or {}) or (key == "critic" and not _uses_critic(config)):
            continue
        mode = select(f"{key}.loss_agg_mode")
        if is_verls(mode) and not maths.is_registered(mode):
            continue  # nothing of this package's
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
        horizon = _whole_number(config, "data.max_response_length")
        if key == "critic":
            # verl's critic inherits the actor's mode by interpolation, and CriticConfig accepts any string.
            check_critic_scale(config, horizon)
            continue
        check_scale(role.get("loss_scale_factor"))
        check_rejection(mode, role.policy_loss)
        correction = select("algorithm.rollout_correction") or {}
        if correction.get("bypass_mode") and correction.get("rollout_rs"):
            _refuse_rejection(mode, correction.get("rollout_rs"), "algorithm", "verl's trainers leave it out there")
        if not maths.is_registered(select("critic.loss_agg_mode")):
            _keep_scale(select("critic"))
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
    elif maths.parse_mode(critic.loss_agg_mode).per_token_scale:
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
    (trainer/ppo/v1/trainer_base.py:549), and ours (vlnorm_verl.paper.whole_groups).
    """
    if OmegaConf.select(config, "trainer.v1.trainer_mode") in ("separate_async", "sync_whole_groups"):
        return
    mini_batches = OmegaConf.select(config, "async_training.require_batches")  # of fully_async_policy
    several = (
        mini_batches > 1
        if mini_batches
        else _whole_number(config, "actor_rollout_ref.actor.ppo_mini_batch_size")
        < _whole_number(config, "data.train_batch_size")
    )
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
    limit, longest = config.algorithm.get(overlong.LENGTH_KEY), _whole_number(config, "data.max_response_length")
    if not isinstance(limit, int) or not 0 < limit <= longest:
        raise ValueError(
            f"algorithm.{overlong.LENGTH_KEY}={limit!r}: algorithm.adv_estimator={overlong.ESTIMATOR} needs the length "
            f"from which a response is overlong, in tokens: 1 to data.max_response_length={longest}, "
            f"usually +algorithm.{overlong.LENGTH_KEY}='${{data.max_response_length}}'"
        )


def _whole_number(config: Any, key: str) -> int:
    value = OmegaConf.select(config, key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key}={value!r}: a whole number is needed")
    return value


def _keep_scale(critic: Any) -> None:
    """Keep the M of a critic on a mode of verl's null where it is, though it is an interpolation of the actor's."""
    if critic is not None and "loss_scale_factor" in critic and critic.loss_scale_factor is None:
        critic.loss_scale_factor = None


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


ENGINE, METRIC, V1 = "verl.workers.engine.base", "verl.utils.metric", "verl.trainer.ppo.v1."
OVERLONG = "overlong filtering: verl's GRPO advantages, and how long each response is"

NAMES = (
    VerlName(
        CORE_ALGOS,
        "agg_loss",
        "an if/elif over verl's modes: ours are answered before it",
        _extended_agg_loss,
        ("loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "loss_scale_factor"),
    ),
    VerlName(CORE_ALGOS, "POLICY_LOSS_REGISTRY", "names the policy losses that are accepted"),
    VerlName(
        CORE_ALGOS,
        "get_policy_loss_fn",
        "a policy loss that never aggregates is refused in its first micro-batch",
        _watched_policy_losses,
    ),
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
        _summing,
        ("data", "loss_function"),
    ),
    VerlName(
        ENGINE, "BaseEngine.infer_batch", "the same for losses without gradient", _summing, ("data", "loss_function")
    ),
    VerlName(ENGINE, "BaseEngine.get_data_parallel_group", "the ranks to sum over"),
    VerlName(ENGINE, "BaseEngine.get_data_parallel_size", "undoes the averaging of gradients"),
    VerlName(ENGINE, "BaseEngine.is_mp_src_rank_with_outputs", "the ranks that return metrics"),
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
    VerlName("verl.trainer.ppo.ray_trainer", "compute_advantage", OVERLONG, overlong.filtering, needed=False),
    VerlName(V1 + "utils", "compute_advantage_for_multi_trajectories", OVERLONG, overlong.filtering, needed=False),
    VerlName(V1 + "trainer_base", "PPOTrainer._compute_advantage", OVERLONG, overlong.with_lengths, needed=False),
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


def _register_estimator(core_algos: types.ModuleType) -> None:
    try:
        core_algos.register_adv_est(overlong.ESTIMATOR)(overlong.grpo_overlong_filtering)
    except Exception as error:  # as in _apply; verl itself refuses the name later, check_config before Ray starts
        logger.warning("vlnorm-verl cannot register %s (%s: %s)", overlong.ESTIMATOR, type(error).__name__, error)


def _apply(module: types.ModuleType) -> None:
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


def _problem(module: types.ModuleType, name: VerlName) -> str | None:
    found: Any = module
    for part in name.name.split("."):
        found = getattr(found, part, None)
    if found is None:
        return f"{name.module}.{name.name} ({name.why})"
    missing = [p for p in name.parameters if p not in inspect.signature(found).parameters]
    return f"{', '.join(missing)} of {name.module}.{name.name} ({name.why})" if missing else None


def _wrap(module: types.ModuleType, name: VerlName) -> None:
    if name.wrap is not None:
        *owners, attribute = name.name.split(".")
        owner = functools.reduce(getattr, owners, module)
        found = getattr(owner, attribute)
        if isinstance(found, types.FunctionType) and found.__closure__ is None:
            _replace(found, name.wrap)
        else:  # of a fork or a user, or with super(): whoever took it out of its module keeps what it has
            setattr(owner, attribute, name.wrap(found))


def _call(*args: Any, **kwargs: Any) -> Any:
    return _slot(*args, **kwargs)  # type: ignore[name-defined]  # noqa: F821


def _replace(function: types.FunctionType, wrap: Callable[[Any], Any]) -> None:
    """Makes `function` do what `wrap` makes of it, for everybody who holds it, under whatever name.

    A module that verl imports before the plugin may have said `from verl.trainer.ppo.core_algos import agg_loss`.
    """
    stock = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    functools.update_wrapper(stock, function)
    del stock.__wrapped__  # type: ignore[attr-defined]
    stock.__kwdefaults__ = function.__kwdefaults__
    slot = f"_vlnorm_verl_{function.__name__}"  # in the globals of the function's own module, with which code runs
    function.__globals__[slot] = wrap(stock)
    function.__code__ = _call.__code__.replace(co_names=(slot,), co_name=function.__name__)
    function.__defaults__ = function.__kwdefaults__ = None
    function.__wrapped__ = stock  # type: ignore[attr-defined]


def lacking() -> list[str]:
    """What the installed verl lacks of the names that every run needs."""
    needed = dict.fromkeys(name.module for name in NAMES if name.needed)
    for module_name in needed:
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            _outcome[module_name] = f"{module_name} ({error})"
        else:
            if module_name in _outcome and _is_reloaded(module):
                _apply(module)
    not_patched = [f"{module_name} not patched" for module_name in needed if module_name not in _outcome]
    return [reason for name in needed if (reason := _outcome.get(name))] + not_patched


def _is_reloaded(module: types.ModuleType) -> bool:
    """Whether functions that were wrapped are again as the module's own file has them."""
    if _outcome[module.__name__] is not None:
        return False
    wrapped = [name.name for name in NAMES if name.module == module.__name__ and name.wrap]
    codes = [getattr(functools.reduce(getattr, name.split("."), module), "__code__", None) for name in wrapped]
    return any(code and code.co_filename == module.__file__ for code in codes)


def require_installed(mode: object) -> None:
    """Raises RuntimeError if a name that every run needs is not there, or the plugin is not loaded."""
    if missing := lacking():
        hint = "Run `vlnorm-verl doctor`."
        if _before_0_9():
            hint = "Before verl 0.9.0 it needs VERL_USE_EXTERNAL_MODULES=vlnorm_verl.verl_entry on every node."
        raise RuntimeError(
            f"{MODE_KEY}={mode!r} is not available: vlnorm-verl did not get into the installed verl "
            f"{_verl_version()}, which lacks: {'; '.join(missing)}. {hint}"
        )
