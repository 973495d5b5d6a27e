"""The maths of loss aggregation in RLVR, without any import of verl.

An aggregation turns the token losses of N responses of lengths L_i into one scalar, Σ_i x_i ℓ_i, where ℓ_i is
the sum of response i's token losses. Every method of the paper is a per-response function of the length and one
scalar summed over the whole optimizer mini-batch:

    x_i = u(L_i) / (c · Σ_j z(L_j))        c = M if `per_token_scale` else 1

| method       | mode                | u(L)   | z(L)   | c | source                          |
|--------------|---------------------|--------|--------|---|---------------------------------|
| VL Norm      | vl_norm, vl_norm:α  | L^-α   | L^-α   | M | arXiv 2509.07558, VL Norm       |
| GRPO Norm    | grpo_norm           | 1/L    | 1      | 1 | verl's seq-mean-token-mean      |
| DAPO Norm    | dapo_norm           | 1      | L      | 1 | verl's token-mean               |
| Dr. GRPO Norm| dr_grpo_norm        | 1      | 1      | M | verl's seq-mean-token-sum-norm  |

Symbols are the paper's: L_i length in valid response tokens, α the exponent, M a constant in tokens (verl's
`loss_scale_factor`). The sum over j must run over the optimizer mini-batch, across its micro-batches and
data-parallel ranks: Σ_j z(L_j) over a micro-batch is a different estimator. Hence `aggregate` takes the sum as an
argument and there is no default for it.

A new method is a factory of an `Aggregation`, registered under the name to use in verl's config:

    @register_aggregation("sqrt_norm")
    def sqrt_norm() -> Aggregation:
        return Aggregation(u=lambda L: L**-0.5, z=lambda L: L**-0.5, per_token_scale=True)

A response without a valid token (a padding row, a fully masked one) has weight 0 and is not counted in any sum.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeGuard

import torch

LengthFunction = Callable[[torch.Tensor], torch.Tensor]
ALPHA_MAX = 2.0


@dataclass(frozen=True)
class Aggregation:
    """x_i = u(L_i) / (c · Σ_j z(L_j)).

    Args:
        u: per-response numerator; maps lengths ≥ 1 [B] (float64, tokens) to weights ≥ 0 [B].
        z: per-response summand > 0 of the one scalar of the mini-batch; same shapes.
        per_token_scale: whether c is M (tokens); otherwise c is 1 and M is not used.
    """

    u: LengthFunction
    z: LengthFunction
    per_token_scale: bool


Factory = Callable[..., Aggregation]
_REGISTRY: dict[str, Factory] = {}
# verl's own modes are written with hyphens, so a name of this form can never hide one of them.
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def register_aggregation(name: str) -> Callable[[Factory], Factory]:
    """Decorator: make an aggregation usable as `loss_agg_mode=<name>` or `<name>:<number>`.

    The factory takes no argument, or one number (with a default), and raises ValueError on a bad one. It must be
    registered in every process: do it in a module named in your own `verl.plugins` entry point.

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

    return Aggregation(u=power, z=power, per_token_scale=True)


@register_aggregation("grpo_norm")
def grpo_norm() -> Aggregation:
    """GRPO Norm: x_i = 1/(N L_i), N the number of responses with a valid token."""
    return Aggregation(u=torch.reciprocal, z=torch.ones_like, per_token_scale=False)


@register_aggregation("dapo_norm")
def dapo_norm() -> Aggregation:
    """DAPO Norm: x_i = 1/Σ_j L_j."""
    return Aggregation(u=torch.ones_like, z=lambda lengths: lengths, per_token_scale=False)


@register_aggregation("dr_grpo_norm")
def dr_grpo_norm() -> Aggregation:
    """Dr. GRPO Norm: x_i = 1/(N M), N the number of responses with a valid token."""
    return Aggregation(u=torch.ones_like, z=torch.ones_like, per_token_scale=True)


def weight_dtype(device_type: str) -> torch.dtype:
    """float64, or float32 on a device type without it (Apple's mps has none, Huawei's npu no collectives in it)."""
    return torch.float32 if device_type in ("mps", "npu") else torch.float64


def response_lengths(response_mask: torch.Tensor) -> torch.Tensor:
    """Number of valid tokens of each response.

    Args:
        response_mask: 1 (or True) at valid response tokens; [B, T] padded, or a jagged nested tensor [B, j].

    Returns:
        int64 [B].
    """
    if not response_mask.is_nested:
        # torch casts all of the mask to the sum's type first: 4 bytes an entry of a bool mask are better than 8.
        narrow = torch.int32 if response_mask.dtype == torch.bool else torch.int64
        return response_mask.sum(dim=-1, dtype=narrow).to(torch.int64)
    # A running sum over the packed values needs no padded copy and no host sync.
    running = torch.nn.functional.pad(response_mask.values().cumsum(0, dtype=torch.int64), (1, 0))
    offsets, narrowed = response_mask.offsets(), response_mask.lengths()  # a narrowed one keeps the values left out
    ends = offsets[1:] if narrowed is None else offsets[:-1] + narrowed
    return running[ends] - running[offsets[:-1]]


def _positive(lengths: torch.Tensor) -> torch.Tensor:
    """Lengths in the weight dtype; 1 stands in for 0, whose terms the callers mask, so that no power is infinite."""
    return lengths.clamp(min=1).to(weight_dtype(lengths.device.type))


def _numerators(aggregation: Aggregation, lengths: torch.Tensor) -> torch.Tensor:
    """u(L_i) [B] in the weight dtype, 0 where a response has no valid token."""
    return torch.where(lengths > 0, aggregation.u(_positive(lengths)), 0.0)


def mini_batch_sums(aggregation: Aggregation, lengths: torch.Tensor) -> torch.Tensor:
    """What has to be summed over the micro-batches and data-parallel ranks of one optimizer mini-batch.

    Args:
        aggregation: the method.
        lengths: valid tokens of each response held here, int64 [B]; B may be 0.

    Returns:
        [7] in float64 (float32 on a device without it): Σz, N, ΣL, Σ1/L, Σu, Σu², ΣuL over the responses with a valid
        token. Only the first is needed for the loss; the others are for `mini_batch_statistics`, and travel in the same
        all-reduce. Sums of different ranks add.
    """
    exact = _positive(lengths)
    u = aggregation.u(exact)
    rows = torch.stack([aggregation.z(exact), torch.ones_like(exact), exact, exact.reciprocal(), u, u * u, u * exact])
    return torch.where(lengths > 0, rows, 0.0).sum(dim=-1)


def response_weights(
    aggregation: Aggregation, lengths: torch.Tensor, total: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """The weights x_i of responses of one mini-batch.

    Args:
        aggregation: the method.
        lengths: valid tokens of each response, int64 [B]; any part of the mini-batch.
        total: Σ_j z(L_j) over the whole mini-batch, scalar tensor.
        scale: M in tokens, > 0; not used by a method without `per_token_scale`.

    Returns:
        x_i [B] in float64 (float32 on a device without it); all 0 if the mini-batch has no valid token.

    Raises:
        ValueError: M is needed and is not a positive finite number.
    """
    if aggregation.per_token_scale:
        if scale is None or not (0 < scale < math.inf):
            raise ValueError(f"loss_scale_factor={scale!r}: M must be a positive number of tokens")
    else:
        scale = 1.0
    u = _numerators(aggregation, lengths)
    # Σz is 0 only if no response of the mini-batch is valid; then every u is 0 and so is every weight.
    return u / (torch.where(total > 0, total, 1.0) * scale)


def aggregate(
    loss_mat: torch.Tensor,
    loss_mask: torch.Tensor,
    aggregation: Aggregation,
    total: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Σ_i x_i Σ_t loss_it over the responses given, which may be any part of a mini-batch.

    Added up over the parts of a mini-batch this is exactly the aggregated loss, however it was split.

    Args:
        loss_mat: token losses [B, T], any float dtype. Masked entries do not matter, NaN included.
        loss_mask: 1 (or True) at valid response tokens [B, T].
        aggregation, total, scale: as in `response_weights`.

    Returns:
        Scalar in the dtype of `loss_mat`, at least float32.
    """
    lengths = response_lengths(loss_mask)
    weights = response_weights(aggregation, lengths, total.to(loss_mat.device), scale)
    result_dtype = torch.promote_types(loss_mat.dtype, torch.float32)
    masked = torch.where(loss_mask.bool(), loss_mat, 0.0)  # [B, T] in the dtype of the losses
    response_losses = masked.sum(dim=-1, dtype=result_dtype)  # [B]
    return (weights * response_losses.to(weights.dtype)).sum().to(result_dtype)


def mini_batch_statistics(aggregation: Aggregation, sums: list[float], scale: float | None) -> dict[str, float]:
    """What the lengths of one mini-batch say about the aggregation.

    Args:
        aggregation, scale: as in `response_weights`.
        sums: `mini_batch_sums`, added up over the whole mini-batch.

    Returns:
        length_mean: arithmetic mean A of L, tokens.
        length_harmonic_mean: harmonic mean H of L, tokens.
        variance_ratio: √(A/H) ≥ 1, the coefficient of variation of Dr. GRPO's (or DAPO's) gradient over that of
            VL Norm with α = 1, as predicted from the lengths if variance is proportional to length.
        effective_responses: (Σx)²/Σx² ≤ N; for VL Norm this is 1/Σ(M x_i)².
        denominator: c·Σ_j z(L_j), by which all weights are divided.
        weighted_tokens: Σ_i u(L_i) L_i. An aggregated quantity of tokens, such as the entropy, is a mean over tokens
            (by weight) after division by Σ_i x_i L_i = weighted_tokens / denominator; as both are sums over responses,
            their means over mini-batches give that of all of them together.
        All 0 if no response has a valid token.
    """
    total, count, tokens, inverse, u, u_squared, weighted_tokens = sums
    mean, harmonic = (tokens / count, count / inverse) if count else (0.0, 0.0)
    return {
        "length_mean": mean,
        "length_harmonic_mean": harmonic,
        "variance_ratio": math.sqrt(mean / harmonic) if count else 0.0,
        "effective_responses": u * u / u_squared if u_squared else 0.0,
        "denominator": total * (scale or 0.0) if aggregation.per_token_scale else total,
        "weighted_tokens": weighted_tokens,
    }


def relative_weight_range(aggregation: Aggregation, lengths: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Smallest and largest weight among `lengths`, relative to the mini-batch's mean weight.

    Args:
        aggregation: the method.
        lengths: valid tokens of each response, int64 [B]; any part of the mini-batch, such as one rank's.
        sums: `mini_batch_sums` over the whole mini-batch [7].

    Returns:
        [2]: min and max of N x_i / Σx, which for VL Norm is M N x_i; 1 means equal weights. (inf, 0) for a part
        without a valid token, so that min and max over parts stay right.
    """
    relative = _numerators(aggregation, lengths) * (sums[1] / torch.where(sums[4] > 0, sums[4], 1.0))
    low = torch.where(lengths > 0, relative, math.inf)
    # The appended value is what is left where B = 0, which min and max of an empty tensor refuse.
    return torch.stack(
        [
            torch.cat([low, low.new_full((1,), math.inf)]).min(),
            torch.cat([relative, relative.new_zeros(1)]).max(),
        ]
    )
