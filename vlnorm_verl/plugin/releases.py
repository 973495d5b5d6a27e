"""All that is here for verl 0.7.1 and 0.8.0 alone. It goes with their support, and nothing else with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from vlnorm_verl.aggregation import Aggregation
from vlnorm_verl.plugin.names import verl_version


def before_0_9() -> bool:
    return verl_version().startswith(("0.7.", "0.8."))


def how_to_load() -> str:
    """What a message says to whoever has a verl that the plugin did not get into."""
    if before_0_9():
        return "Before verl 0.9.0 it needs VERL_USE_EXTERNAL_MODULES=vlnorm_verl.verl_entry on every node."
    return "Run `vlnorm-verl doctor`."


def check_workers(config: Any, key: str, mode: str) -> None:
    """Raises ValueError for the workers that verl had before its engines: they train without train_batch."""
    default = "auto" if verl_version().startswith("0.7.") else "disable"
    legacy = OmegaConf.select(config, "trainer.use_legacy_worker_impl", default=default)
    if legacy != "disable":
        raise ValueError(
            f"trainer.use_legacy_worker_impl={legacy!r} cannot be used with {key}={mode!r}: the legacy workers have no "
            "mini-batch sum. Accepted: disable"
        )


def check_critic_without_m(mode: str, aggregation: Aggregation) -> None:
    """Raises ValueError for a method that needs M, where the critic's config has no loss_scale_factor."""
    if aggregation.divide_by_m:
        raise ValueError(
            f"critic.loss_agg_mode={mode!r} needs M, and the critic of verl {verl_version()} has no loss_scale_factor. "
            "Accepted: verl's own modes, such as token-mean, and grpo_norm, dapo_norm"
        )


def megatron_layouts(layout: Any, adds_gradients: bool) -> Iterator[tuple[str, str, str]]:
    """(setting, why it cannot be used, what is accepted) of Megatron's settings; as engines.problems."""
    if layout.get("dynamic_context_parallel"):
        yield "dynamic_context_parallel=true", "replicated responses are counted again", "false"
    if adds_gradients:
        setting = "override_transformer_config.calculate_per_token_loss=true"
        yield setting, "gradients are then added, not averaged", "false"


def refuse_added_gradients(mode: str) -> None:
    """Raises RuntimeError: Megatron adds gradients over ranks, which these releases take for averaged."""
    raise RuntimeError(
        f"loss_agg_mode={mode!r}: Megatron adds the gradients of this model over its ranks (its "
        f"calculate_per_token_loss is on), and verl {verl_version()} takes them for averaged. Accepted: "
        "megatron.vanilla_mbridge=true, or context_parallel_size=1 without an override of calculate_per_token_loss."
    )
