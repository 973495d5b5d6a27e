"""Limits of this machine that would stop a run: CPUs, the length of a path, memory, open files, disk.

Not covered: other nodes of a cluster.
"""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from vlnorm_verl import machine

SOCKET_BYTES = 107  # of a path, in Linux
SHARED_MEMORY_GB = 10  # verl's own containers have it; a container's default is 0.064
OPEN_FILES = 8192  # of a process. ray.init raises the soft limit (ray/_private/worker.py:1763), slurm.sbatch too
CPU_RUN_GB, CPU_RANK_GB = 7, 3.5  # of memory: a run of the tiny model on one rank, and each more (docs/cpu.md)
CHECKPOINT_BYTES = 12  # a parameter: fp32 weights, Adam's moments
PARAMETERS = {"3b": 3.09e9, "7b": 7.62e9}  # Qwen2.5


def sockets_problem() -> machine.Defect | None:
    """Why Ray could not open its sockets (ray/_private/node.py): their path has a limit, and begins with TMPDIR."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "/tmp")
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    socket = os.path.join(folder, "ray", session, "sockets", "plasma_store")
    if (excess := len(os.fsencode(socket)) - SOCKET_BYTES) <= 0:
        return None
    allowed = len(os.fsencode(folder)) - excess
    return machine.Defect(
        f"{name}={folder} is too long for Ray's sockets ({allowed} bytes at most)", f"Set {name}=/tmp"
    )


def cpus_problem(needed: int, told: int | None) -> machine.Defect | None:
    """Why Ray would wait for ever (verl's single_controller/ray/base.py:160 has no time limit).

    told: how many Ray is told that there are; None: it counts this machine's.
    """
    if (found := machine.cpus() if told is None else told) >= needed:
        return None
    what = "this machine has" if told is None else "ray_kwargs.ray_init.num_cpus is"
    return machine.Defect(
        f"verl reserves {needed} CPUs of Ray, and {what} {found}: the run would wait for ever",
        "Take fewer GPUs (on the CPU: ranks) by trainer.n_gpus_per_node, or tell Ray of as many CPUs, there or not: "
        f"ray_kwargs.ray_init.num_cpus={needed}",
    )


def memory_problem(ranks: int) -> machine.Defect | None:
    """Why the kernel, or Ray, might end a run on the CPU. It may still fit, by swap."""
    free = machine.free_memory() / 1e9
    needed = CPU_RUN_GB + CPU_RANK_GB * (ranks - 1)
    if free >= needed:
        return None
    return machine.Defect(
        f"{free:.1f} GB of memory are free; a run of the tiny model can take {needed:g}",
        "Close other programs; in WSL2 raise memory= in .wslconfig; in a container, --memory; of a batch job, --mem",
    )


def tight(folder: Path, models: tuple[str, ...] = tuple(PARAMETERS)) -> list[machine.Defect]:
    """What ends a run late: a small /dev/shm, few open files, a disk too small for the checkpoints in `folder`."""
    problems = []
    shared = shutil.disk_usage("/dev/shm").total / 1e9
    if shared < SHARED_MEMORY_GB:
        problems.append(
            machine.Defect(
                f"/dev/shm has {shared:.2g} GB; Ray's object store and NCCL want {SHARED_MEMORY_GB} and more",
                "In a container: --shm-size=64g, or --ipc=host",
            )
        )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        problems.append(
            machine.Defect(
                f"a process here may open {files} files at most; Ray wants {OPEN_FILES} and more",
                "Raise the hard limit (`ulimit -Hn`); in a container: --ulimit nofile=65536",
            )
        )
    there = machine.nearest(folder.absolute())
    free = shutil.disk_usage(there).free / 1e9
    missing = max(0, 2 - len([*folder.glob("checkpoints/global_step_*")]))  # of the two that a run keeps
    needs = {name: missing * CHECKPOINT_BYTES * PARAMETERS[name] / 1e9 for name in models if name in PARAMETERS}
    if too_large := [f"{need:.0f} GB with model={name}" for name, need in needs.items() if need > free]:
        problems.append(
            machine.Defect(
                f"{there} has {free:.0f} GB free; the two checkpoints that a run keeps take {', '.join(too_large)}",
                "Put runs on a larger disk: recipe.root=…",
            )
        )
    return problems
