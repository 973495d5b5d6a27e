"""vLLM general plugin: what vLLM needs to be verl's rollout engine on a CPU.

Weights. vLLM packs each linear layer's weight for its CPU kernels and then replaces the parameter by an empty one
(vllm 0.28: model_executor/layers/linear.py:202, layers/utils.py:324, 348, 363). verl's first weight sync would
load into those empty parameters and die. Here the parameter is kept (memory: the model twice); verl calls
`process_weights_after_loading` after each sync (vllm_rollout/utils.py, step 3), which packs the new values.

Outputs. vLLM's engine sends every token of every response to its front end, a process of its own, as soon as it is
sampled (v1/engine/core.py:1438; `stream_interval` acts behind that). Where two processes share two cores the front end
slows the engine down. Here the engine keeps a response's tokens and sends EVERY of them at a time, and the rest when it
ends. Left alone: responses with stop strings, which the front end looks for.

Memory. In a container with a limit vLLM counts cached files as used (utils/cpu_resource_utils.py:164), of which there
are gigabytes after an installation. Here it has Ray's count, without them.
"""

import functools
import importlib
import inspect
from collections import defaultdict
from typing import Any

import numpy as np
import wrapt

from vlnorm_verl.cpu import PatchError, is_active

MODULE = "vllm.model_executor.layers.utils"
FUNCTION = "dispatch_cpu_unquantized_gemm"
EVERY = 32  # tokens: what a response that is aborted, to go on after a weight sync, may lose


def register() -> None:
    """Entry point `vlnorm_cpu` of the group `vllm.general_plugins`; called in every vLLM process, maybe twice.

    Raises PatchError if vLLM has no such function any more: training with it would fail at the first sync.
    """
    if not is_active():
        return
    keep_weights(importlib.import_module(MODULE))
    wrapt.register_post_import_hook(send_seldom, "vllm.v1.engine.core")  # for the engine's own process
    wrapt.register_post_import_hook(without_cached_files, "vllm.utils.cpu_resource_utils")


def keep_weights(layers: Any) -> None:
    """See the module's docstring."""
    original = getattr(layers, FUNCTION, None)
    if original is None or "remove_weight" not in inspect.signature(original).parameters:
        raise PatchError(f"vllm: {MODULE}.{FUNCTION}(layer, remove_weight) not found; this vLLM is not supported")
    if getattr(original, "_vlnorm_cpu", False):
        return

    def dispatch_keeping_weight(layer: Any, remove_weight: bool = False) -> None:
        original(layer, remove_weight=False)

    dispatch_keeping_weight._vlnorm_cpu = True  # type: ignore[attr-defined]
    setattr(layers, FUNCTION, dispatch_keeping_weight)


def without_cached_files(resources: Any) -> None:
    """See the module's docstring."""
    original = resources.get_cgroup_memory_limit

    def get_cgroup_memory_limit() -> tuple[int | None, int | None]:
        limit, used = original()
        if limit is None:
            return limit, used
        from ray._private.utils import get_used_memory

        return limit, min(used or 0, get_used_memory())

    resources.get_cgroup_memory_limit = get_cgroup_memory_limit


def send_seldom(core: Any) -> None:
    """See the module's docstring."""
    step = getattr(getattr(core, "EngineCore", None), "step", None)
    if step is None:
        raise PatchError("vllm: vllm.v1.engine.core.EngineCore.step not found; this vLLM is not supported")
    if getattr(step, "_vlnorm_cpu", False):
        return

    @functools.wraps(step)
    def step_and_keep(self: Any) -> Any:
        outputs, executed = step(self)
        kept = self.__dict__.setdefault("_vlnorm_kept", defaultdict(list))
        for batch in (outputs or {}).values():
            batch.outputs = [output for output in batch.outputs if _is_due(output, kept, self.scheduler)]
        if not self.scheduler.has_requests():
            kept.clear()  # of responses that were aborted
        return outputs, executed

    step_and_keep._vlnorm_cpu = True  # type: ignore[attr-defined]
    core.EngineCore.step = step_and_keep


def _is_due(output: Any, kept: dict[str, list[Any]], scheduler: Any) -> bool:
    """Whether this response is to be sent now; what was kept of it is then put before its new tokens."""
    parts = kept[output.request_id]
    parts.append(output)
    request = scheduler.requests.get(output.request_id)
    first = request is not None and request.num_output_tokens == len(output.new_token_ids)
    strings = request is not None and request.sampling_params is not None and request.sampling_params.stop
    if not (output.finished or first or strings or len(parts) == EVERY):
        return False
    if len(parts) > 1:
        output.new_token_ids = [token for part in parts for token in part.new_token_ids]
        if output.new_logprobs is not None:
            columns = zip(*(part.new_logprobs[:3] for part in parts), strict=True)
            output.new_logprobs = type(output.new_logprobs)(*map(np.concatenate, columns))
    del kept[output.request_id]
    return True
