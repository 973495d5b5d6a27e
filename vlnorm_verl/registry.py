"""Names of aggregations in verl's config, `<name>` or `<name>:<number>`, and the four methods of the paper.

A new method is a factory of an `Aggregation`, registered under the name to use in verl's config:

    @register_aggregation("sqrt_norm")
    def sqrt_norm() -> Aggregation:  # x_i = L_i^-½ / (M · Σ_j L_j^-½)
        return Aggregation(numerator=lambda L: L**-0.5, summand=lambda L: L**-0.5, divide_by_m=True)
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from typing import TypeGuard

import torch

from .aggregation import Aggregation  # relative: docs/api.md has these two files copied into other packages

ALPHA_MAX = 2.0

Factory = Callable[..., Aggregation]
_REGISTRY: dict[str, Factory] = {}
# verl's own modes are written with hyphens, so a name of this form can never hide one of them.
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def register_aggregation(name: str) -> Callable[[Factory], Factory]:
    """Decorator: make an aggregation usable as `loss_agg_mode=<name>` or `<name>:<number>`.

    The factory takes no argument, or one number (with a default), and raises ValueError on a bad one. It must be
    registered in every process (docs/extending.md).

    Raises:
        ValueError: the name is taken, or is not lower-case letters, digits and underscores.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"aggregation name {name!r}: use lower-case letters, digits and underscores")

    def decorator(factory: Factory) -> Factory:
        if name in _REGISTRY:
            raise ValueError(f"aggregation {name!r} is registered already; choose another name")
        _REGISTRY[name] = factory
        return factory

    return decorator


def available() -> tuple[str, ...]:
    """Names of the registered aggregations, sorted."""
    return tuple(sorted(_REGISTRY))


def is_registered(mode: object) -> TypeGuard[str]:
    """Whether `mode` names an aggregation of this registry, whatever its parameter."""
    return isinstance(mode, str) and mode.partition(":")[0] in _REGISTRY


def parse_mode(mode: object, key: str = "loss_agg_mode", also_accepted: Iterable[str] = ()) -> Aggregation:
    """Aggregation of a config string `<name>` or `<name>:<number>`.

    Args:
        mode: value of the config key, such as "vl_norm" (α = 1) or "vl_norm:0.75".
        key: name of the config key, for the messages.
        also_accepted: modes that the caller handles itself (verl's own), for the messages.

    Raises:
        ValueError: unknown name (with the nearest ones), or a parameter that the method does not take.
    """
    name, colon, parameter = str(mode).partition(":")
    factory = _REGISTRY.get(name)
    if factory is None:
        raise ValueError(_unknown_mode_message(mode, key, also_accepted))
    if not colon:
        return factory()
    if not inspect.signature(factory).parameters:
        raise ValueError(f"{key}={mode!r}: {name} takes no parameter; write {key}={name}")
    try:
        value = float(parameter)
    except ValueError:
        raise ValueError(
            f"{key}={mode!r}: {parameter!r} is not a number; write for instance {key}={name}:0.75"
        ) from None
    try:
        return factory(value)
    except ValueError as error:
        raise ValueError(f"{key}={mode!r}: {error}") from None


def _unknown_mode_message(mode: object, key: str, also_accepted: Iterable[str]) -> str:
    accepted = [*available(), *also_accepted]
    # "VL-Norm", "vlnorm" and "vl_norm" differ in case and separators only: compare without them first.
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in reversed(accepted)}
    wanted = re.sub(r"[^a-z0-9]", "", str(mode).partition(":")[0].lower())
    nearest = [plain[hit] for hit in difflib.get_close_matches(wanted, plain, n=2, cutoff=0.6)]
    hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    return (
        # verl's own words first, which its tests ask for
        f"Invalid loss_agg_mode: {key}={mode!r} is not known.{hint} "
        f"Accepted: {', '.join(accepted)}; vl_norm:<α> with 0 ≤ α ≤ {ALPHA_MAX:g}."
    )


@register_aggregation("vl_norm")
def vl_norm(alpha: float = 1.0) -> Aggregation:
    """VL Norm: x_i = (1/M) · L_i^-α / Σ_j L_j^-α (arXiv 2509.07558).

    α = 1 is the least-variance weighting with Σ x_i = 1/M if the variance of a response's gradient is
    proportional to its length; α = 0 is Dr. GRPO Norm. The paper uses [0, 1]; up to 2 is accepted, since a
    measured variance exponent can exceed 1.
    """
    if not 0.0 <= alpha <= ALPHA_MAX:  # False for NaN
        raise ValueError(f"α = {alpha:g} is out of range; accepted: 0 ≤ α ≤ {ALPHA_MAX:g}")

    def power(lengths: torch.Tensor) -> torch.Tensor:
        return lengths**-alpha

    return Aggregation(numerator=power, summand=power, divide_by_m=True)


@register_aggregation("grpo_norm")
def grpo_norm() -> Aggregation:
    """GRPO Norm: x_i = 1/(N L_i), N the number of responses with a valid token."""
    return Aggregation(numerator=torch.reciprocal, summand=torch.ones_like, divide_by_m=False)


@register_aggregation("dapo_norm")
def dapo_norm() -> Aggregation:
    """DAPO Norm: x_i = 1/Σ_j L_j."""
    return Aggregation(numerator=torch.ones_like, summand=lambda lengths: lengths, divide_by_m=False)


@register_aggregation("dr_grpo_norm")
def dr_grpo_norm() -> Aggregation:
    """Dr. GRPO Norm: x_i = 1/(N M), N the number of responses with a valid token."""
    return Aggregation(numerator=torch.ones_like, summand=torch.ones_like, divide_by_m=True)
