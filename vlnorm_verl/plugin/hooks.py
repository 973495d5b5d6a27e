"""verl's loss path with the registered aggregations: `agg_loss`, and the mini-batch around it.

How a weight gets from the mini-batch to the loss: `train_batch` sums over the rank's mini-batch, all-reduces the sum
over the data-parallel ranks and keeps it in a `MiniBatch` while verl runs its micro-batches. Every aggregation inside
reads it there. `agg_loss` with a gradient and outside of a mini-batch raises: it never sums over a micro-batch instead.
Without a gradient there it computes a metric, such as the trainers' actor/entropy, of the batch that it is given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from vlnorm_verl import aggregation, registry
from vlnorm_verl.metrics import MiniBatchSums, mini_batch_statistics, mini_batch_sums, relative_weight_range
from vlnorm_verl.plugin import modes
from vlnorm_verl.plugin.engines import check_engine
from vlnorm_verl.plugin.mini_batch import MiniBatch, current, working_on


def extended_agg_loss(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """verl's `agg_loss` with the registered aggregations (trainer/ppo/core_algos.py)."""
    signature = inspect.signature(stock)
    modes.stock_agg_loss = stock

    @functools.wraps(stock)
    def agg_loss(
        loss_mat: torch.Tensor, loss_mask: torch.Tensor, loss_agg_mode: str, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        mini_batch = current()
        if not modes.is_ours(loss_agg_mode):  # torch.compile traces this far
            loss = stock(loss_mat, loss_mask, loss_agg_mode, *args, **kwargs)
            return loss if mini_batch is None else mini_batch.only_a_metric(loss, loss_agg_mode)
        sizes = signature.bind(loss_mat, loss_mask, loss_agg_mode, *args, **kwargs).arguments
        dp_size, scale = sizes.get("dp_size"), sizes.get("loss_scale_factor")
        if mini_batch is not None and mini_batch.mode == loss_agg_mode:
            return mini_batch.aggregate(loss_mat, loss_mask, dp_size, scale)
        differentiated = torch.is_grad_enabled() and loss_mat.requires_grad
        if mini_batch is None and not differentiated and dp_size in (None, 1):
            # A metric such as the trainers' actor/entropy: this batch is the whole one, so its sum is the sum.
            method = registry.parse_mode(loss_agg_mode)
            total = aggregation.mini_batch_sum(method, aggregation.response_lengths(loss_mask))
            if scale is None:
                scale = loss_mask.shape[-1]  # as in verl's agg_loss
            return aggregation.aggregate(loss_mat, loss_mask, method, total, scale)
        raise RuntimeError(
            f"loss_agg_mode={loss_agg_mode!r} was asked for outside of an optimizer mini-batch of this mode: the "
            "weights need a sum over the whole mini-batch, and a micro-batch does not have it. Train through "
            "BaseEngine.train_batch with a loss function that carries the actor's config "
            "(functools.partial(loss, config=actor_config), as verl's workers do), or choose one of verl's modes."
        )

    return agg_loss


def with_mini_batch(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`BaseEngine.train_batch` and `infer_batch` that first sum over the mini-batch (workers/engine/base.py).

    `data` there is this rank's whole mini-batch, after shuffling and before the split into micro-batches. Both call
    forward_backward_batch of the engine; no engine of verl overrides them.
    """

    @functools.wraps(stock)
    def batch(self: Any, data: Any, loss_function: Any = None, *args: Any, **kwargs: Any) -> Any:
        config: Any = getattr(loss_function, "keywords", {}).get("config")
        mode = getattr(config, "loss_agg_mode", None)
        if not modes.is_ours(mode):
            return stock(self, data, loss_function, *args, **kwargs)

        check_engine(self, mode)
        scale = getattr(config, "loss_scale_factor", None)  # the critic's config has none up to verl 0.8.0
        method = registry.parse_mode(mode)
        if method.divide_by_m and scale is None:
            raise ValueError(
                f"loss_agg_mode={mode!r} needs M, and loss_scale_factor is null here. verl's validate_config "
                "(verl.utils.config) fills it, and has the run checked: call it before the workers start, as verl's "
                "main_ppo does"
            )
        # Not `loss_mask`: verl's rollout correction takes tokens out of `response_mask` only.
        lengths = aggregation.response_lengths(data["response_mask"])
        sums = sum_over_data_parallel_ranks(self, mini_batch_sums(method, lengths))
        mini_batch = MiniBatch(mode, method, MiniBatchSums(*sums).summand, self.get_data_parallel_size(), scale)
        with working_on(mini_batch):
            outputs = stock(self, data, mini_batch.watch(loss_function), *args, **kwargs)
        if stock.__name__ == "train_batch" and self.is_mp_src_rank_with_outputs():
            # verl has just read the gradient norm on the host; nothing on the device is left to wait for.
            of_all_ranks = MiniBatchSums(*sums.tolist())
            if of_all_ranks.responses:  # else it is padding alone, and has no part in verl's mean over mini-batches
                outputs["metrics"].update(metrics(method, lengths, of_all_ranks, scale))
        return outputs

    return batch


def sum_over_data_parallel_ranks(engine: Any, sums: torch.Tensor) -> torch.Tensor:
    """The one all-reduce of a mini-batch.

    Raises:
        RuntimeError: the engine's group is of another size than it says.
    """
    from verl.utils.device import get_device_id

    group, size = engine.get_data_parallel_group(), engine.get_data_parallel_size()
    ranks = 1 if group is None else torch.distributed.get_world_size(group)
    if ranks != size:
        raise RuntimeError(
            f"{type(engine).__name__} has {size} data-parallel ranks, and a process group of {ranks} for them: the "
            "mini-batch sum of loss_agg_mode cannot be made. Choose one of verl's modes."
        )
    device = torch.device(get_device_id())
    sums = sums.to(device, aggregation.weight_dtype(device.type))
    if group is not None:
        # Here, not in the loss: every rank comes by once per mini-batch, even one whose rows are all masked.
        torch.distributed.all_reduce(sums, group=group)
    return sums


def metrics(
    method: aggregation.Aggregation, lengths: torch.Tensor, sums: MiniBatchSums, scale: float | None
) -> dict[str, Any]:
    """Metrics under `vl_norm/`; verl adds the role's prefix, so they are logged as `actor/vl_norm/…`."""
    from verl.utils.metric import AggregationType, Metric

    low, high = relative_weight_range(method, lengths, sums)
    statistics = mini_batch_statistics(method, sums, scale)
    return {
        **{f"vl_norm/{name}": Metric(AggregationType.MEAN, value) for name, value in statistics.items()},
        "vl_norm/weight_min": Metric(AggregationType.MIN, low),
        "vl_norm/weight_max": Metric(AggregationType.MAX, high),
    }
