"""The run's configuration: refuse what cannot be exact before Ray starts, warn, and fill M."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf, open_dict

from vlnorm_verl import registry
from vlnorm_verl.aggregation import Aggregation
from vlnorm_verl.paper import overlong
from vlnorm_verl.plugin import policy_loss, releases
from vlnorm_verl.plugin.engines import check_layout
from vlnorm_verl.plugin.install import require_installed
from vlnorm_verl.plugin.modes import is_ours, only_verls, verl_accepts
from vlnorm_verl.plugin.names import MODE_KEY, SCALE_KEY, STOCK_MODES, WHOLE_GROUPS, untested_release

logger = logging.getLogger(__name__)

TRAINER_MODE = "trainer.v1.trainer_mode"


def with_checked_config(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`validate_config` (utils/config.py) or `run_ppo` (trainer/main_ppo.py) with `check_config` before it."""

    @functools.wraps(stock)
    def checked(config: Any, *args: Any, **kwargs: Any) -> Any:
        check_config(config)
        return stock(config, *args, **kwargs)

    return checked


def with_our_modes(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """`ActorConfig.__post_init__` that knows the registered modes (workers/config/actor.py)."""

    @functools.wraps(stock)
    def __post_init__(self: Any) -> None:
        mode = self.loss_agg_mode
        if only_verls(mode):
            return stock(self)
        check_mode(mode)
        check_scale(self.loss_scale_factor)
        if not is_ours(mode):
            say(
                "This verl has loss_agg_mode=vl_norm itself: vlnorm-verl leaves the aggregation to it (there are no "
                "vl_norm/ metrics then), checks the configuration, and sets loss_scale_factor where it is null."
            )
            return stock(self)
        # The stock check of everything else ends with an allow-list of verl's modes, so it is shown one of those.
        object.__setattr__(self, "loss_agg_mode", STOCK_MODES[0])
        try:
            stock(self)
        finally:
            object.__setattr__(self, "loss_agg_mode", mode)

    return __post_init__


@functools.cache
def say(text: str) -> None:
    """A warning, once a process: verl's main_ppo has a configuration checked by validate_config and by run_ppo."""
    logger.warning(text)


def check_config(config: Any) -> None:
    """Check our modes in a run's whole config, on the driver before Ray starts, and fill M. May be called again.

    Raises:
        ValueError: a key has a value that cannot be trained exactly; the message names both and what is accepted.
        RuntimeError: a patch that the mode needs did not apply to the installed verl.
    """
    check_overlong_filtering(config)
    check_trainer_mode(config)
    for key in ("actor_rollout_ref.actor", "critic"):
        role = OmegaConf.select(config, key)
        if "loss_agg_mode" not in (role or {}) or (key == "critic" and not has_critic(config)):
            continue
        mode = role.loss_agg_mode
        if only_verls(mode):
            continue
        check_mode(mode, f"{key}.loss_agg_mode")
        releases.check_workers(config, f"{key}.loss_agg_mode", mode)
        check_layout(role, key)
        if key == "critic":
            # verl's critic inherits the actor's mode by interpolation, and CriticConfig accepts any string.
            check_critic(config, role)
        else:
            check_actor(config, role)


def uses_v0(config: Any) -> bool:
    """Whether the run's trainer is V0's or made from it (one_step_off_policy, fully_async_policy).

    verl 0.7.1 and 0.8.0 have no trainer.use_v1: their main_ppo is V0's, and no key tells 0.8.0's main_ppo_sync from it.
    """
    return not OmegaConf.select(config, "trainer.use_v1") or "rollout" in config or "async_training" in config


def check_trainer_mode(config: Any) -> None:
    """Raises ValueError where our trainer is asked for and verl would start another one, which ignores the key."""
    if uses_v0(config):
        refuse_whole_groups(config)


def refuse_whole_groups(config: Any) -> None:
    if OmegaConf.select(config, TRAINER_MODE) == WHOLE_GROUPS:
        raise ValueError(
            f"{TRAINER_MODE}={WHOLE_GROUPS}: this run's trainer is not one of V1's, and verl ignores the key there. "
            "Accepted: trainer.use_v1=true with verl.trainer.main_ppo of verl 0.9 or later; for other trainers "
            "actor_rollout_ref.actor.shuffle=true."
        )


def with_refused_whole_groups(stock: Callable[..., None]) -> Callable[..., None]:
    """`RayPPOTrainer.__init__` (trainer/ppo/ray_trainer.py): V0's trainer, whatever a main program's trainer.use_v1."""

    @functools.wraps(stock)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        refuse_whole_groups(config)
        stock(self, config, *args, **kwargs)

    return __init__


def check_actor(config: Any, actor: Any) -> None:
    check_scale(actor.get("loss_scale_factor"))
    correction = OmegaConf.select(config, "algorithm.rollout_correction") or {}
    if correction.get("bypass_mode") and (rejection := correction.get("rollout_rs")):
        raise ValueError(
            f"algorithm.rollout_correction.rollout_rs={rejection!r} with bypass_mode=true cannot be used with "
            f"{MODE_KEY}={actor.loss_agg_mode!r}: verl's trainers reject nothing there. Accepted: rollout_rs=null, or "
            "bypass_mode=false."
        )
    keep_scale_of_critic(OmegaConf.select(config, "critic") or {})
    fill_scale(actor, whole_number(config, "data.max_response_length"))
    warn_of_sorted_mini_batches("actor_rollout_ref.actor", actor, config)
    if registry.parse_mode(actor.loss_agg_mode).divide_by_m:
        warn_of_losses_beside(config, actor)
    if untested := untested_release():
        say(untested)
    if is_ours(actor.loss_agg_mode):
        from verl.utils.config import omega_conf_to_dataclass

        if not policy_loss.check(omega_conf_to_dataclass(actor)):
            warn_of_untried_policy_loss(actor.policy_loss.loss_mode)


def check_critic(config: Any, critic: Any) -> None:
    if "loss_scale_factor" in critic:
        check_scale(critic.get("loss_scale_factor"), "critic.loss_scale_factor")
        fill_scale(critic, whole_number(config, "data.max_response_length"))
        warn_of_sorted_mini_batches("critic", critic, config)
    else:
        releases.check_critic_without_m(critic.loss_agg_mode, registry.parse_mode(critic.loss_agg_mode))


def check_mode(mode: object, key: str = MODE_KEY) -> None:
    """Raises ValueError unless `mode` is one of ours with a good parameter, and RuntimeError if a patch is missing."""
    method = registry.parse_mode(mode, key, also_accepted=filter(verl_accepts, STOCK_MODES))
    check_functions(method, f"{key}={mode!r}")
    require_installed(mode)


def check_functions(method: Aggregation, where: str) -> None:
    """Raises ValueError unless numerator and summand are finite, ≥ 0 and > 0, and of each length by itself."""
    lengths = torch.tensor([3.0, 1.0, 1000.0, 2.0], dtype=torch.float64)
    for name, function in (("numerator", method.numerator), ("summand", method.summand)):
        # A function may be a constant.
        together, *apart = (function(part) * torch.ones_like(part) for part in (lengths, *lengths.split(1)))
        alone = torch.cat(apart)
        wrong = (together < 0) if name == "numerator" else (together <= 0)
        if (wrong | ~together.isfinite()).any() or not torch.allclose(together, alone, rtol=1e-12):
            raise ValueError(
                f"{where}: {name} must give each length a finite number {'≥' if name == 'numerator' else '>'} 0, "
                f"whatever the other lengths are. Of {lengths.tolist()} tokens it gives {together.tolist()} together, "
                f"and {alone.tolist()} one by one"
            )


def check_scale(scale: object, key: str = SCALE_KEY) -> None:
    """Raises ValueError unless M is a positive number, or None for the default."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(
            f"{key}={scale!r}: M must be a positive number of tokens; leave it null for data.max_response_length"
        )


def keep_scale_of_critic(critic: Any) -> None:
    """Keep the M of a critic on a mode of verl's null where it is, though it is an interpolation of the actor's."""
    ours = registry.is_registered(critic.get("loss_agg_mode"))
    if not ours and "loss_scale_factor" in critic and critic.loss_scale_factor is None:
        critic.loss_scale_factor = None


def fill_scale(role: Any, max_response_length: int) -> None:
    """M = the run's maximum response length where `loss_scale_factor` is null; verl's critic inherits the actor's."""
    if role.get("loss_scale_factor") is None:
        with open_dict(role):
            role.loss_scale_factor = max_response_length


def whole_number(config: Any, key: str) -> int:
    value = OmegaConf.select(config, key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key}={value!r}: a whole number is needed")
    return value


def has_critic(config: Any) -> bool:
    from verl.trainer.ppo.utils import need_critic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl warns that there is none; it will again when it asks itself
        return bool(need_critic(config))


def warn_of_untried_policy_loss(name: str) -> None:
    """Workers refuse a loss that does not aggregate by the mode; a term beside agg_loss shows only when it is tried."""
    say(
        f"actor_rollout_ref.actor.policy_loss.loss_mode={name!r} is not registered in this process, so it was not "
        "tried: a term of it beside agg_loss would be trained without the mode's weights. Register it in a module "
        "that every process imports, named in VERL_USE_EXTERNAL_MODULES or by an entry point verl.plugins."
    )


def warn_of_sorted_mini_batches(key: str, role: Any, config: Any) -> None:
    """Warn where the mini-batches of a rollout batch will hold responses of similar lengths each, of actor or critic.

    verl keeps the order of the rollout batch unless told to shuffle. The V1 trainer's replay buffer returns responses
    in the order in which they were finished (trainer/ppo/v1/replay_buffer.py). The V0 trainer's `_balance_batch` puts
    each rank's share in the order short, long, short (trainer/ppo/ray_trainer.py:1240), of which each half has all
    lengths; without it whole prompt groups stay together. Two of V1's trainers are not asked: ours
    (vlnorm_verl.paper.whole_groups), which ignores `shuffle`, and separate_async, which draws each mini-batch by itself
    (trainer/ppo/v1/trainer_base.py:549). What it draws is cut only if sessions have several outputs, which no key says.
    """
    v0, asynchronous = uses_v0(config), OmegaConf.select(config, "async_training.require_batches")
    if not v0 and OmegaConf.select(config, TRAINER_MODE) in ("separate_async", WHOLE_GROUPS):
        return
    if v0 and not asynchronous and not OmegaConf.select(config, "trainer.balance_batch"):
        return
    mini_batches = asynchronous or (
        whole_number(config, "data.train_batch_size") / whole_number(config, f"{key}.ppo_mini_batch_size")
    )
    if mini_batches > (2 if v0 else 1) and not role.get("shuffle"):
        order, ours = "by length", ""
        if not v0:
            order = "by when they were finished"
            ours = (
                f", or, with the synchronous trainer of verl 0.9's main_ppo, {TRAINER_MODE}={WHOLE_GROUPS} for "
                "mini-batches of whole prompt groups in random order"
            )
        say(
            f"{key}.shuffle=false with several optimizer mini-batches a rollout batch: verl orders "
            f"responses {order}, so each mini-batch holds responses of similar lengths, and "
            f"loss_agg_mode={role.loss_agg_mode} has little left to weigh. Set {key}.shuffle=true for "
            f"single responses drawn at random{ours}."
        )


def warn_of_losses_beside(config: Any, actor: Any) -> None:
    """Losses that Megatron adds to each micro-batch by itself, without `agg_loss`, and their coefficients."""
    prediction = OmegaConf.select(config, "actor_rollout_ref.model.mtp") or {}
    experts = OmegaConf.select(actor, "megatron.override_transformer_config") or {}
    beside = []
    if prediction.get("enable") and prediction.get("enable_train"):
        beside.append("actor_rollout_ref.model.mtp.mtp_loss_scaling_factor")
    if experts.get("moe_router_load_balancing_type") not in (None, "none"):
        beside.append("moe_aux_loss_coeff")
    if experts.get("moe_z_loss_coeff"):
        beside.append("moe_z_loss_coeff")
    if beside:
        say(
            f"The loss that {' and '.join(beside)} multiplies is a mean over each micro-batch, whatever loss_agg_mode "
            f"is. The rest of the gradient is exact, and about (mean response length)/M as large as under token-mean: "
            f"scale the coefficient by that, or set {SCALE_KEY} to the mean response length."
        )


def check_overlong_filtering(config: Any) -> None:
    """Raises ValueError if overlong filtering is asked for without its length; before Ray starts, not at step 1."""
    if OmegaConf.select(config, "algorithm.adv_estimator") != overlong.ESTIMATOR:
        return
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    get_adv_estimator_fn(overlong.ESTIMATOR)  # raises if it could not be registered
    limit, longest = config.algorithm.get(overlong.LENGTH_KEY), whole_number(config, "data.max_response_length")
    if type(limit) is not int or not 0 < limit <= longest:  # True is an int, too
        raise ValueError(
            f"algorithm.{overlong.LENGTH_KEY}={limit!r}: algorithm.adv_estimator={overlong.ESTIMATOR} needs the length "
            f"from which a response is overlong, in tokens: 1 to data.max_response_length={longest}, "
            f"usually +algorithm.{overlong.LENGTH_KEY}='${{data.max_response_length}}'"
        )
    context = OmegaConf.select(config, "actor_rollout_ref.rollout.max_model_len")
    if context is None:  # the model's own, which only a worker knows
        return
    sglang = OmegaConf.select(config, "actor_rollout_ref.rollout.name") == "sglang"  # verl keeps one token free there
    if context < (needed := whole_number(config, "data.max_prompt_length") + limit + sglang):
        raise ValueError(
            f"actor_rollout_ref.rollout.max_model_len={context}: behind a long prompt a response is cut before it has "
            f"algorithm.{overlong.LENGTH_KEY}={limit} tokens, and would not be filtered. Accepted: at least "
            f"data.max_prompt_length + algorithm.{overlong.LENGTH_KEY}{' + 1' * sglang} = {needed}"
        )
