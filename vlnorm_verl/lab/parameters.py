"""Which parameters of a model the lab differentiates by, and the parts of the model that they are in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlnorm_verl.files import UserError

if TYPE_CHECKING:
    import torch

LAST_QKV = "last-qkv"
ALL = "all"

# <layers>.<number>.<…>.<projection>.<weight or bias>: separate as in Qwen and Llama, or fused as in GPT-NeoX or GPT-2.
_SEPARATE = ("q_proj", "k_proj", "v_proj")
_FUSED = ("query_key_value", "qkv_proj", "c_attn", "Wqkv", "W_pack", "qkv")
_QKV = re.compile(rf"^(?:.*?\.)?(\d+)\.(?:.*\.)?({'|'.join(_SEPARATE + _FUSED)})\.(?:weight|bias)$")
_SHOWN = 8  # names in an error message


def select_parameters(model: torch.nn.Module, modules: str) -> dict[str, torch.nn.Parameter]:
    """The parameters to differentiate by; each once, tied ones under their first name.

    Args:
        model: any module.
        modules: "last-qkv" (query, key and value projections of the last layer that has them, weights and biases, as
            in the paper's Figure 4), "all", or a regular expression that is searched in the parameters' names.

    Raises:
        UserError: nothing matches; the message lists what is near.
    """
    # With the second names of tied parameters, so that lm_head finds what is tied to it.
    every = dict(model.named_parameters(remove_duplicate=False))
    names = list(every)
    if modules == ALL:
        wanted = set(names)
    elif modules == LAST_QKV:
        wanted = _last_qkv(names)
    else:
        try:
            pattern = re.compile(modules)
        except re.error as error:
            raise UserError(
                f"--modules {modules!r} is not a regular expression ({error}). Accepted: {LAST_QKV}, {ALL}, or one"
            ) from error
        wanted = {name for name in names if pattern.search(name)}
        if not wanted:
            raise UserError(
                f"--modules {modules!r} matches no parameter. Near: {', '.join(_near(modules, names))}. "
                f"Accepted: {LAST_QKV}, {ALL}, or a regular expression"
            )
    identities = {id(every[name]) for name in wanted}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in identities}


def parts_of(names: Sequence[str]) -> dict[str, list[str]]:
    """The parameters by part: layers ("layer 3", and "other"), or modules ("q_proj") where there is one layer only."""
    layers = [match[1] if (match := re.search(r"(?:^|\.)(\d+)\.", name)) else "" for name in names]
    several = len(set(layers)) > 1
    parts: dict[str, list[str]] = {}
    for name, layer in zip(names, layers, strict=True):
        module = name.rpartition(".")[0].rpartition(".")[2] or name
        part = module if not several else f"layer {layer}" if layer else "other"
        parts.setdefault(part, []).append(name)
    return parts


def _last_qkv(names: list[str]) -> set[str]:
    matches = [(name, int(match[1]), match[2]) for name in names if (match := _QKV.match(name))]
    last = max((layer for _, layer, _ in matches), default=None)
    projections = {name: projection for name, layer, projection in matches if layer == last}
    if set(projections.values()) >= set(_SEPARATE) or set(projections.values()) & set(_FUSED):
        return set(projections)
    candidates = _distinct([name for name in names if "attn" in name.lower() or "attention" in name.lower()] or names)
    raise UserError(
        f"--modules {LAST_QKV}: this model has no {', '.join(_SEPARATE)} and none of {', '.join(_FUSED)} in a numbered "
        f"layer. Give a regular expression; its parameters: {', '.join(candidates[:_SHOWN])}"
    )


def _distinct(names: list[str]) -> list[str]:
    """Without the layers' numbers: one name for the same parameter of all layers."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in names))


def _near(pattern: str, names: list[str]) -> list[str]:
    plain = re.sub(r"\\[a-zA-Z]|[\\^$*+?()\[\]{}|]", "", pattern)
    # Of each name and each part of one, the first such name.
    name_of = {part: name for name in reversed(_distinct(names)) for part in (name, *name.split("."))}
    hits = difflib.get_close_matches(plain.split(".")[-1], name_of, n=_SHOWN, cutoff=0.5)
    return list(dict.fromkeys(name_of[hit] for hit in hits)) or _distinct(names)[:_SHOWN]
