"""VL Norm (arXiv 2509.07558, first called ΔL Normalization) for stock verl.

Installing this package is enough: verl finds it through its `verl.plugins` entry point, and
`actor_rollout_ref.actor.loss_agg_mode=vl_norm` works in every verl run.

The names below are the public API; they import no verl.
"""

from vlnorm_verl.aggregation import Aggregation, available, parse_mode, register_aggregation

__all__ = ["Aggregation", "__version__", "available", "parse_mode", "register_aggregation"]

__version__ = "0.1.0"
