"""VL Norm (arXiv 2509.07558, first called ΔL Normalization) for stock verl.

With verl 0.9 installing this package is enough: verl finds it through its `verl.plugins` entry point, and takes
`actor_rollout_ref.actor.loss_agg_mode=vl_norm` (docs/support.md has older releases).

The names below are the public API; they import no verl.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlnorm_verl.aggregation import Aggregation
    from vlnorm_verl.registry import available, parse_mode, register_aggregation

__all__ = ["Aggregation", "__version__", "available", "parse_mode", "register_aggregation"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The public names when they are asked for: they import torch, which `vlnorm-verl --help` need not wait for."""
    if name in __all__:
        from vlnorm_verl import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
