"""Puts the registered aggregations into stock verl. The only folder that knows verl's loss path.

`WRAPPERS` below is all of verl that is replaced, `names.NAMES` all that is relied on, and why. One thing is added: the
advantage estimator of `vlnorm_verl.paper.overlong`, by verl's own register_adv_est.

    hooks        agg_loss, and train_batch with the one all-reduce of a mini-batch
    mini_batch   what a loss finds of its mini-batch, and what it must do with it
    policy_loss  policy losses that ignore the mode
    engines      layouts that cannot be exact
    checks       the rest of the configuration
    modes        whether a mode is ours or verl's own
    names        verl's names, as data
    install      how they are replaced
    releases     all that is for verl 0.7.1 and 0.8.0 alone

A verl that knows `vl_norm` by itself (patched by patches/, or a later release) is left to it: the plugin then only
checks the configuration, fills M, and says so.
"""

from __future__ import annotations

import functools

import wrapt

from vlnorm_verl.paper import overlong
from vlnorm_verl.plugin import checks, hooks, install, policy_loss
from vlnorm_verl.plugin.install import lacking, require_installed
from vlnorm_verl.plugin.names import CORE_ALGOS

__all__ = ["lacking", "register", "require_installed"]

WRAPPERS = {
    (CORE_ALGOS, "agg_loss"): hooks.extended_agg_loss,
    (CORE_ALGOS, "get_policy_loss_fn"): policy_loss.watched,
    ("verl.workers.engine.base", "BaseEngine.train_batch"): hooks.with_mini_batch,
    ("verl.workers.engine.base", "BaseEngine.infer_batch"): hooks.with_mini_batch,
    ("verl.workers.config.actor", "ActorConfig.__post_init__"): checks.with_our_modes,
    ("verl.utils.config", "validate_config"): checks.with_checked_config,
    ("verl.trainer.main_ppo", "run_ppo"): checks.with_checked_config,
    ("verl.trainer.ppo.ray_trainer", "RayPPOTrainer.__init__"): checks.with_refused_whole_groups,
    ("verl.trainer.ppo.ray_trainer", "compute_advantage"): overlong.filtering,
    ("verl.trainer.ppo.v1.utils", "compute_advantage_for_multi_trajectories"): overlong.filtering,
    ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_advantage"): overlong.with_lengths,
}


@functools.cache
def register() -> None:
    """Have verl's names checked and wrapped as soon as verl imports their modules. May be called again."""
    install.wrap_on_import(WRAPPERS)
    wrapt.register_post_import_hook(overlong.register, CORE_ALGOS)
