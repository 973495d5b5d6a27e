"""The aggregation of docs/extending.md: runs of the study import it by VERL_USE_EXTERNAL_MODULES."""

import torch

from vlnorm_verl import Aggregation, register_aggregation


@register_aggregation("floor_norm")  # then: loss_agg_mode=floor_norm, or floor_norm:64
def floor_norm(floor: float = 32.0) -> Aggregation:
    if not 0 < floor < float("inf"):
        raise ValueError(f"floor = {floor:g} is out of range; accepted: a positive number of tokens")

    def weight(lengths: torch.Tensor) -> torch.Tensor:
        return 1 / lengths.clamp(min=floor)

    return Aggregation(numerator=weight, summand=weight, divide_by_m=True)
