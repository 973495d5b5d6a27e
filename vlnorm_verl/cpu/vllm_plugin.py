"""vLLM general plugin: lets verl write new weights into a vLLM that runs on the CPU.

vLLM packs each linear layer's weight for its CPU kernels and then replaces the parameter by an empty one
(vllm 0.28: model_executor/layers/linear.py:202, layers/utils.py:324, 348, 363). verl's first weight sync would
load into those empty parameters and die. Here the parameter is kept (memory: the model twice); verl calls
`process_weights_after_loading` after each sync (vllm_rollout/utils.py, step 3), which packs the new values.
"""

import importlib
import inspect
from typing import Any

from vlnorm_verl.cpu import PatchError, is_active

MODULE = "vllm.model_executor.layers.utils"
FUNCTION = "dispatch_cpu_unquantized_gemm"


def register() -> None:
    """Entry point `vlnorm_cpu` of the group `vllm.general_plugins`; called in every vLLM process, maybe twice.

    Raises PatchError if vLLM has no such function any more: training with it would fail at the first sync.
    """
    if not is_active():
        return
    layers = importlib.import_module(MODULE)
    original = getattr(layers, FUNCTION, None)
    if original is None or "remove_weight" not in inspect.signature(original).parameters:
        raise PatchError(f"vllm: {MODULE}.{FUNCTION}(layer, remove_weight) not found; this vLLM is not supported")
    if getattr(original, "_vlnorm_cpu", False):
        return

    def dispatch_keeping_weight(layer: Any, remove_weight: bool = False) -> None:
        original(layer, remove_weight=False)

    dispatch_keeping_weight._vlnorm_cpu = True  # type: ignore[attr-defined]
    setattr(layers, FUNCTION, dispatch_keeping_weight)
