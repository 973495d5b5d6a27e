"""What verl calls `get_torch_device()` on the CPU: `torch.cpu` plus the functions that verl takes from `torch.cuda`.

A module of its own, because adding attributes to `torch.cpu` would change that for every other library in the
process. Memory figures are the resident memory of this process in bytes, so verl's `perf/max_memory_*` metrics
mean something.
"""

import resource
from typing import Any

import psutil
import torch


def __getattr__(name: str) -> Any:
    """Everything not defined here (Stream, Event, ...) is torch.cpu's."""
    return getattr(torch.cpu, name)


def is_available() -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> torch.device:
    """A device and not an index: an integer means cuda:0 to torch (`tensor.to(0)`)."""
    return torch.device("cpu")


def get_device_name(device: object = None) -> str:
    """verl's name for its table of peak FLOPS (utils/flops_counter.py:77 knows torch.cpu itself only)."""
    return "CPU"


def set_device(device: object = None) -> None:
    """Nothing to select: verl passes the rank's logical device index (single_controller/base/worker.py:281)."""


def synchronize(device: object = None) -> None:
    """Nothing to wait for: CPU operators are synchronous."""


def empty_cache() -> None:
    """No caching allocator."""


def ipc_collect() -> None:
    """No CUDA IPC handles."""


def manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    torch.manual_seed(seed)


def get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    """Called on resume: verl's load_rng_state finds the key "cpu" (utils/checkpoint/checkpoint_manager.py:218)."""
    torch.set_rng_state(state)


def memory_allocated(device: object = None) -> int:
    return int(psutil.Process().memory_info().rss)


def memory_reserved(device: object = None) -> int:
    return memory_allocated()


def max_memory_allocated(device: object = None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def max_memory_reserved(device: object = None) -> int:
    return max_memory_allocated()


def reset_peak_memory_stats(device: object = None) -> None:
    """The kernel's peak cannot be reset."""


def mem_get_info(device: object = None) -> tuple[int, int]:
    """(free, total) bytes of the machine."""
    memory = psutil.virtual_memory()
    return memory.available, memory.total
