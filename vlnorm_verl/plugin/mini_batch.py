"""The optimizer mini-batch that this process works on: its sum, and whether losses aggregate by its mode.

Each loss inside of it (policy loss, entropy, KL, value loss, users' own) calls verl's `agg_loss` on a micro-batch, and
finds the mini-batch here. A loss raises `IgnoresMode` if it never calls agg_loss, or calls it with another mode, mask,
M or dp_size than the mini-batch's. A term beside agg_loss is not seen here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vlnorm_verl import aggregation
from vlnorm_verl.plugin.names import MODE_KEY


class IgnoresMode(ValueError):
    """A loss that does not aggregate by `loss_agg_mode`. problem: what it does, as a clause."""

    def __init__(self, mode: str, problem: str, remedy: str) -> None:
        super().__init__(mode, problem, remedy)  # what unpickling, of a Ray worker's, passes on
        self.problem = problem

    def __str__(self) -> str:
        mode, problem, remedy = self.args
        return f"{MODE_KEY}={mode!r}, but {problem}. {remedy}"


@dataclass
class MiniBatch:
    mode: str
    method: aggregation.Aggregation
    total: torch.Tensor  # Σ_j summand(L_j) over all micro-batches and data-parallel ranks, scalar
    dp_size: int
    scale: float | None  # M
    lengths: torch.Tensor | None = None  # valid tokens of the micro-batch's responses while its loss runs, int64 [B]
    aggregated: bool = False  # whether agg_loss was called with its mode, for a loss and not for a metric
    other_mode: str | None = None  # the last one that agg_loss was called with for what has a gradient
    checked: torch.Tensor | None = None  # the last mask that was found to have these lengths

    def aggregate(
        self, loss_mat: torch.Tensor, loss_mask: torch.Tensor, dp_size: int | None, scale: float | None
    ) -> torch.Tensor:
        """dp_size · Σ_i x_i Σ_t loss_it of a part of the mini-batch; tensors are [B, T].

        dp_size, scale: what the loss passes on; None where it leaves them out (the value loss up to verl 0.8.0, users'
        own).

        Raises:
            IgnoresMode: they, or the lengths of the mask, are not the mini-batch's.
        """
        for name, given, right in (("dp_size", dp_size, self.dp_size), ("loss_scale_factor", scale, self.scale)):
            if given not in (None, right):
                raise IgnoresMode(
                    self.mode,
                    f"a loss calls agg_loss with {name}={given}, and the mini-batch has {right}",
                    f"Pass **config.global_batch_info on, or no {name}.",
                )
        if torch.is_grad_enabled() and loss_mat.requires_grad:  # else it is for a metric
            self._check_mask(loss_mask)
            self.aggregated = True
        loss = aggregation.aggregate(loss_mat, loss_mask, self.method, self.total, self.scale)
        # FSDP and Megatron average gradients over the data-parallel ranks; the mini-batch's loss is their sum.
        return loss * self.dp_size

    def _check_mask(self, mask: torch.Tensor) -> None:
        if self.lengths is None or mask is self.checked:  # most losses pass one mask on: one wait for the device
            return
        if not torch.equal(aggregation.response_lengths(mask).to(self.lengths.device), self.lengths):
            raise IgnoresMode(
                self.mode,
                "a loss calls agg_loss with another mask than response_mask, whose lengths the mini-batch is weighted "
                "by",
                "For some of its tokens: agg_loss(losses * keep, response_mask, ...). Tokens outside of it have no "
                "weight: sum over them without agg_loss.",
            )
        self.checked = mask

    def only_a_metric(self, loss: torch.Tensor, mode: str) -> torch.Tensor:
        """A loss aggregated by another mode, as a metric may be; a gradient that comes to it raises IgnoresMode."""
        if loss.requires_grad:
            self.other_mode = mode
            loss.register_hook(functools.partial(self._refuse_gradient, mode))
        return loss

    def _refuse_gradient(self, mode: str, gradient: torch.Tensor) -> None:
        if gradient.any():
            raise IgnoresMode(
                self.mode,
                f"a loss calls agg_loss with {mode!r} whatever the mode",
                "Choose a policy_loss.loss_mode that uses loss_agg_mode, or set that mode.",
            )

    @contextlib.contextmanager
    def must_aggregate(self, loss_name: str) -> Iterator[None]:
        """Raises IgnoresMode if what runs inside, for a gradient, never calls agg_loss with the mini-batch's mode.

        Without a valid token (padding, rejected responses) a loss may be 0 by itself.
        """
        before, self.aggregated, self.other_mode = self.aggregated, False, None
        yield
        empty = self.lengths is not None and not self.aggregated and not self.lengths.any()
        if torch.is_grad_enabled() and not self.aggregated and not empty:
            raise IgnoresMode(
                self.mode,
                f"{loss_name} calls agg_loss with {self.other_mode!r} whatever the mode"
                if self.other_mode
                else f"{loss_name} never calls agg_loss",
                "Choose a loss that aggregates by loss_agg_mode, or one of verl's modes.",
            )
        self.aggregated |= before

    def watch(self, loss_function: Callable[..., Any]) -> Callable[..., Any]:
        """The loss function of a micro-batch, `data` (every engine passes it by name), whose lengths are then known."""

        @functools.wraps(loss_function)
        def loss(*args: Any, **kwargs: Any) -> Any:
            if "student_logits" in kwargs:  # top-k distillation asks the same function for each token's loss first
                return loss_function(*args, **kwargs)
            self.lengths = aggregation.response_lengths(kwargs["data"]["response_mask"])
            try:
                with self.must_aggregate("the loss function"):
                    return loss_function(*args, **kwargs)
            finally:
                self.lengths = self.checked = None

        return loss


# A plain global: torch.compile cannot trace a ContextVar.
_current: MiniBatch | None = None


def current() -> MiniBatch | None:
    return _current


@contextlib.contextmanager
def working_on(mini_batch: MiniBatch) -> Iterator[None]:
    global _current
    before, _current = _current, mini_batch
    try:
        yield
    finally:
        _current = before
