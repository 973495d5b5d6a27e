"""What releases of verl before 0.9.1 need in order to train on a CPU. In the tests' processes only.

verl 0.7.1 and 0.8.0 have no registry of platforms; from 0.9.0 on the package's own platform is used (vlnorm_verl.cpu).
"""

import contextlib
import importlib.util
import os
from pathlib import Path

import torch


def needed() -> bool:
    """Whether the verl to be imported has no `verl.plugin`; looked up without importing it."""
    spec = importlib.util.find_spec("verl")  # verl reads environment variables at import
    return not (Path(spec.origin).parent / "plugin").is_dir()


def takes_nested_data() -> bool:
    """Whether the losses take the nested batches of the V1 trainer, which 0.8.0 brought (trainer/main_ppo_sync.py)."""
    return importlib.util.find_spec("verl.trainer.ppo.padding_utils") is not None


def prepare() -> None:
    """After `import verl`: FSDP engines for the device type cpu, and the few functions of torch.cuda that they call."""
    from verl.workers.engine.base import EngineRegistry

    importlib.import_module("verl.workers.engine.fsdp")
    for backends in EngineRegistry._engines.values():
        for backend in ("fsdp", "fsdp2"):
            backends[backend]["cpu"] = backends[backend]["cuda"]
    if not takes_nested_data():
        # verl 0.7.1 rounds everything to bfloat16, whatever the model's type (transformer_impl.py:1108 of its engine).
        torch.autocast = lambda *_, **__: contextlib.nullcontext()
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(torch.cpu, name, lambda *_: 0)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cpu, name, lambda *_: None)


def unpad_without_flash_attn() -> None:
    """Up to 0.9.0 verl unpads a padded batch by flash-attn, which needs CUDA; it has the same in torch, for NPUs."""
    from verl.utils import attention_utils, npu_flash_attn_utils

    if not hasattr(attention_utils, "_fallback_unpad_input"):
        names = ("index_first_axis", "pad_input", "rearrange", "unpad_input")
        functions = tuple(getattr(npu_flash_attn_utils, name) for name in names)
        attention_utils._get_attention_functions = lambda: functions


def start_process_group() -> None:
    """verl would ask for "cpu:gloo,cpu:nccl" (utils/distributed.py of 0.8.0); it takes a group that is there."""
    torch.distributed.init_process_group(
        "cpu:gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
