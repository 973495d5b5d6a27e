"""verl's own ppo_trainer config with overrides, as its command line would make it."""

import functools
from typing import Any


@functools.cache
def stock_config() -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return hydra_compose(
            "ppo_trainer",
            [
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
                "data.max_response_length=77",
                "algorithm.adv_estimator=grpo",
                "trainer.n_gpus_per_node=1",
                "++trainer.use_legacy_worker_impl=disable",  # verl 0.7.1's default is to use them
            ],
        )


def compose(*overrides: str) -> Any:
    """Hydra reads each override; composing all of verl's files anew would take half a second a test."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    config = stock_config().copy()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        added = override.is_add() or override.is_force_add()
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=added)
    return config


def actor(**settings: str) -> list[str]:
    return [f"actor_rollout_ref.actor.{key}={value}" for key, value in settings.items()]
