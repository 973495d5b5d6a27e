"""The CPU as a verl platform (verl.plugin.platform.PlatformBase).

verl 0.9.1 has platforms for CUDA, ROCm and NPU only. This one is chosen by VERL_PLATFORM=cpu and by nothing else.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

from vlnorm_verl.cpu import device


class PlatformCPU(PlatformBase):
    """CPU with gloo collectives and shared-memory weight transfer; Ray counts logical GPUs."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> Any:
        return device

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """False: every machine has a CPU, so auto-detection (platform_manager.py:97) must never choose it."""
        return False

    def current_device(self) -> torch.device:
        return device.current_device()

    def device_count(self) -> int:
        return device.device_count()

    def set_device(self, device_index: int) -> None:
        device.set_device(device_index)

    def synchronize(self, device_index: int | None = None) -> None:
        device.synchronize(device_index)

    def manual_seed(self, seed: int) -> None:
        device.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        device.manual_seed_all(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """No caching allocator."""

    def empty_cache(self) -> None:
        device.empty_cache()

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """The variable that Ray sets for its resource "GPU"; nobody on a CPU reads it."""
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        """ "GPU": verl counts only GPU and NPU (single_controller/ray/base.py:230, vllm_async_server.py:1348).

        A run declares as many logical GPUs as it has ranks (ray_kwargs.ray_init.num_gpus).
        """
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        """False: weights go to vLLM through shared memory (bucketed_weight_transfer.py:191)."""
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        """The rollout's thread count, VLNORM_ROLLOUT_THREADS (default 1).

        A second thread makes vLLM alone faster, and the trainer's vLLM slower: the threads wait for each other at every
        operator, while the agent loop and the front end want the cores, too.
        """
        return {"OMP_NUM_THREADS": os.environ.get("VLNORM_ROLLOUT_THREADS", "1")}

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """No device profiler."""

    def profiler_stop(self) -> None:
        """No device profiler."""

    def cudart(self) -> None:
        return None


def register() -> None:
    """Make VERL_PLATFORM=cpu known to verl."""
    PlatformRegistry.register("cpu")(PlatformCPU)
