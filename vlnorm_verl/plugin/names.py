"""verl's names that are relied on, and why, as data.

Files and lines named in this folder are verl 0.9.1's unless said; verl 0.7.1, 0.8.0 and 0.9.0 have the same names,
trainers excepted.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

MODE_KEY = "actor_rollout_ref.actor.loss_agg_mode"
SCALE_KEY = "actor_rollout_ref.actor.loss_scale_factor"
WHOLE_GROUPS = "sync_whole_groups"  # our trainer.v1.trainer_mode (vlnorm_verl.paper.whole_groups)
STOCK_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
# Releases that the exactness tests were run on (recipes/test_releases.sh). Others are tried, with a warning.
TESTED_RELEASES = ("0.7.1", "0.8.0", "0.9.0", "0.9.1")


@dataclass(frozen=True)
class VerlName:
    """A name of verl that is relied on. Those that are replaced have their wrapper in `plugin.WRAPPERS`."""

    module: str
    name: str  # a name of the module, or Class.attribute
    why: str
    parameters: tuple[str, ...] = ()  # that it must take
    # Whether every run of ours needs it. The others belong to single trainers, which not every release has.
    needed: bool = True


CORE_ALGOS = "verl.trainer.ppo.core_algos"
_ENGINE, _V1 = "verl.workers.engine.base", "verl.trainer.ppo.v1"
_METRIC, _CONFIG = "verl.utils.metric", "verl.utils.config"
_BATCH, _ADVANTAGES = ("data", "loss_function"), ("adv_estimator", "config")
_OVERLONG = "overlong filtering: verl's GRPO advantages, and how long each response is"

NAMES = (
    VerlName(
        CORE_ALGOS,
        "agg_loss",
        "an if/elif over verl's modes: ours are answered before it",
        ("loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "loss_scale_factor"),
    ),
    VerlName(CORE_ALGOS, "POLICY_LOSS_REGISTRY", "names the policy losses that are accepted"),
    VerlName(CORE_ALGOS, "get_policy_loss_fn", "a policy loss that ignores the mode is refused in its micro-batch"),
    VerlName(CORE_ALGOS, "register_adv_est", "adds overlong filtering"),
    VerlName(CORE_ALGOS, "get_adv_estimator_fn", "tells whether that was done"),
    VerlName(
        "verl.workers.config.actor",
        "ActorConfig.__post_init__",
        "has an allow-list of modes: ours are checked and let through",
    ),
    VerlName(
        _ENGINE,
        "BaseEngine.train_batch",
        "sees a rank's whole optimizer mini-batch before it is split: the place of the one all-reduce",
        _BATCH,
    ),
    VerlName(_ENGINE, "BaseEngine.infer_batch", "the same for losses without gradient", _BATCH),
    VerlName(_ENGINE, "BaseEngine.get_data_parallel_group", "the ranks to sum over"),
    VerlName(_ENGINE, "BaseEngine.get_data_parallel_size", "undoes the averaging of gradients"),
    VerlName(_ENGINE, "BaseEngine.is_mp_src_rank_with_outputs", "the ranks that return metrics"),
    VerlName("verl.utils.device", "get_device_id", "where the sum is all-reduced"),
    VerlName(_METRIC, "Metric", "how a metric is combined over mini-batches and ranks"),
    VerlName(_METRIC, "AggregationType", "the same"),
    VerlName(
        _CONFIG,
        "validate_config",
        "sees the whole config before workers start: refuses what cannot be exact, fills M",
        ("config",),
    ),
    VerlName(_CONFIG, "omega_conf_to_dataclass", "makes the actor's config, which is then checked"),
    VerlName("verl.trainer.ppo.utils", "need_critic", "whether there is a critic to check"),
    VerlName(
        "verl.trainer.main_ppo",
        "run_ppo",
        "the same as validate_config, for fully_async_policy, which calls only this",
        ("config",),
        needed=False,
    ),
    VerlName(
        "verl.trainer.ppo.ray_trainer",
        "RayPPOTrainer.__init__",
        "refuses a trainer_mode that V0 ignores, in main programs of one's own too",
        ("config",),
        needed=False,
    ),
    VerlName("verl.trainer.ppo.ray_trainer", "compute_advantage", _OVERLONG, _ADVANTAGES, needed=False),
    VerlName(f"{_V1}.utils", "compute_advantage_for_multi_trajectories", _OVERLONG, _ADVANTAGES, needed=False),
    VerlName(f"{_V1}.trainer_base", "PPOTrainer._compute_advantage", _OVERLONG, needed=False),
)


def verl_version() -> str:
    return str(importlib.import_module("verl").__version__)


def untested_release() -> str:
    """What to say of the verl that is imported; "" if it was tested."""
    if verl_version() in TESTED_RELEASES:
        return ""
    return (
        f"vlnorm-verl has not been tested with verl {verl_version()} (tested: {', '.join(TESTED_RELEASES)}). Every "
        "name that it relies on is there; whether gradients are exact is not known."
    )
