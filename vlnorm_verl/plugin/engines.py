"""Layouts of engines in which gradients are not reduced as their data-parallel size says (docs/engines.md)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

from vlnorm_verl.plugin import releases
from vlnorm_verl.plugin.names import verl_version

logger = logging.getLogger(__name__)


def check_layout(role: Any, key: str) -> None:
    """Refuse what the run's config says of a layout that cannot be exact.

    Args:
        role: the run's config of the actor or the critic. key: what it is called there.

    Raises:
        ValueError: names the key, the value and what is accepted.
    """
    for setting, why, accepted in problems(role):
        raise ValueError(
            f"{key}.{role.strategy}.{setting} cannot be used with {key}.loss_agg_mode={role.loss_agg_mode!r} and verl "
            f"{verl_version()}: {why}. Accepted: {accepted}"
        )


def problems(role: Any) -> Iterator[tuple[str, str, str]]:
    """(setting below the engine's key, why it cannot be used, what is accepted)."""
    strategy = role.get("strategy")
    if strategy == "torchtitan":
        yield from _torchtitan(role.get(strategy) or {})
    if strategy in ("megatron", "mindspeed"):  # up to verl 0.9.0 MindSpeed is a strategy, with Megatron's keys
        yield from _megatron(role.get(strategy) or {})


def _torchtitan(layout: Any) -> Iterator[tuple[str, str, str]]:
    context, replicas = layout.get("context_parallel_size", 1), layout.get("data_parallel_replicate_size", 1)
    if context > 1:
        why = "its ranks are given different responses but are not counted as data-parallel"
        yield f"context_parallel_size={context}", why, "1"
    if replicas > 1 and layout.get("data_parallel_shard_size", 1) == 1:
        why = "with data_parallel_shard_size=1 gradients of the replicas are added, not averaged"
        yield f"data_parallel_replicate_size={replicas}", why, "1, or data_parallel_shard_size > 1"


def _megatron(layout: Any) -> Iterator[tuple[str, str, str]]:
    # Where it is Megatron-Bridge that sets it, only the engine knows: check_engine.
    adds_gradients = (layout.get("override_transformer_config") or {}).get("calculate_per_token_loss", False)
    if releases.before_0_9():
        yield from releases.megatron_layouts(layout, adds_gradients)
    elif adds_gradients and layout.get("context_parallel_size", 1) > 1 and not layout.get("dynamic_context_parallel"):
        setting = "override_transformer_config.calculate_per_token_loss=true"
        yield setting, "verl counts too few tokens with context_parallel_size > 1", "false"


def check_engine(engine: Any, mode: str) -> None:
    """What check_layout cannot see: how many ranks there are, and that Megatron-Bridge sets calculate_per_token_loss by
    itself for some models.

    Raises:
        RuntimeError: the engine leaves each rank its own gradients (FSDP1), or adds gradients over ranks where verl
            takes them for averaged (verl 0.7.1 and 0.8.0).
    """
    strategy = getattr(getattr(engine, "engine_config", None), "strategy", None)
    mesh = engine.device_mesh if strategy == "fsdp" else None
    # torch takes a mesh with one rank to shard over for one rank in all (distributed/fsdp/_init_utils.py:430).
    if mesh is not None and mesh.ndim == 2 and mesh.size(1) == 1:
        raise RuntimeError(
            f"loss_agg_mode={mode!r}: with strategy=fsdp and fsdp_config.fsdp_size=1 torch's FSDP1 leaves each of the "
            f"{mesh.size()} ranks its own gradients (verl-project/verl#7493), in verl's modes, too. Accepted: "
            "fsdp_size=-1, fsdp_size of at least 2, or strategy=fsdp2."
        )
    if not getattr(getattr(engine, "tf_config", None), "calculate_per_token_loss", False):
        return
    if releases.before_0_9():
        releases.refuse_added_gradients(mode)
    layout = engine.engine_config
    if layout.context_parallel_size > 1 and not layout.dynamic_context_parallel:
        warn_of_uncounted_tokens(layout.context_parallel_size)


@functools.cache
def warn_of_uncounted_tokens(context_parallel_size: int) -> None:
    logger.warning(
        "megatron.context_parallel_size=%d with calculate_per_token_loss, which the model's provider has set: verl "
        "counts up to %d tokens of each micro-batch too few, so that gradients of every loss_agg_mode are too large by "
        "the factor T/(T - those not counted), T the tokens of the mini-batch. The weights of responses are right.",
        context_parallel_size,
        context_parallel_size - 1,
    )
