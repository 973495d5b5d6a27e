"""Who answers for a mode: this package, or verl by itself (a patched tree, a fork, a later release, a user)."""

from __future__ import annotations

import functools
import importlib
import inspect
import traceback
from collections.abc import Callable
from typing import TypeGuard

import torch

from vlnorm_verl import registry
from vlnorm_verl.plugin.names import CORE_ALGOS, STOCK_MODES

# verl's own; set when verl imports core_algos.
stock_agg_loss: Callable[..., torch.Tensor] | None = None


def is_ours(mode: object) -> TypeGuard[str]:
    """Whether this package answers for the mode: it is registered here, and verl does not know it by itself."""
    if not registry.is_registered(mode):
        return False
    return stock_agg_loss is None or not _accepts(stock_agg_loss, mode)  # None: no plugin in this process


def only_verls(mode: object) -> bool:
    """Whether the mode is verl's and not registered here: a stock one, or one of a fork, a later release, a user."""
    if not isinstance(mode, str) or registry.is_registered(mode):
        return False
    return mode in STOCK_MODES or verl_accepts(mode)


def verl_accepts(mode: str) -> bool:
    """Whether the installed verl has the mode ("token-sum" came with 0.9.0)."""
    return _accepts(importlib.import_module(CORE_ALGOS).agg_loss, mode)


@functools.cache
def _accepts(agg_loss: Callable[..., torch.Tensor], mode: str) -> bool:
    return _answer(agg_loss, mode) != _answer(agg_loss, "no such mode")


def _answer(agg_loss: Callable[..., torch.Tensor], mode: str) -> tuple[type, str, int | None] | None:
    """How an agg_loss takes a mode: None, or what it raises and where; a fork's mode may want more than is known."""
    loss = mask = torch.ones(1, 1)
    sizes = {"dp_size": 1, "batch_num_tokens": 1, "global_batch_size": 1, "loss_scale_factor": 1}
    accepted = inspect.signature(agg_loss).parameters
    try:
        agg_loss(loss, mask, mode, **{name: size for name, size in sizes.items() if name in accepted})
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return type(error), place.filename, place.lineno
    return None
