"""What keeps a run from starting a Ray of its own on this machine, beside what `machine.py` sees."""

from __future__ import annotations

import os

from vlnorm_verl import machine

SOCKET_BYTES = 107  # of a path, in Linux


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
