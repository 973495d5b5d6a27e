"""Asks every node of a Ray cluster, before training, whether a run can work there.

A node that lacks verl or this package fails minutes into the start of a run, in a worker's log, or (the plugin) not at
all: verl hides plugin load errors. The answers are named by node here.

Covered: imports and versions, whether torch and vLLM are those for the run, flash-attn, whether the plugin is in verl,
whether the node sees the run's folder and data, logins of loggers. Not covered: drivers and GPUs, network speed, free
disk.
"""

from __future__ import annotations

import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 300.0  # importing torch and verl from a cold shared disk takes minutes


@dataclass(frozen=True)
class NodeReport:
    """What one node answered. `problems` is empty if a run can work there."""

    node: str  # host name or address
    versions: dict[str, str]
    problems: list[str]


def probe(
    mode: str,
    folder: Path,
    files: list[str],
    loggers: list[str],
    environment: dict[str, str],
    on_cpu: bool,
    flash_attention: bool,
) -> list[NodeReport]:
    """Ask each living node of the cluster that RAY_ADDRESS names.

    Args:
        mode: the run's loss_agg_mode.
        folder: the run's folder, which every node must see.
        files: the run's data.
        loggers: the run's `trainer.logger`; verl's driver may be on any node.
        environment: variables that the run's workers get.
        on_cpu: whether the run is on the CPU stack.
        flash_attention: whether the run's model needs flash-attn.

    Raises:
        ConnectionError: there is no cluster at RAY_ADDRESS.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Nested, hence sent by value: a node without this package could not even load a function of it.
    def examine(
        mode: str, token: str, files: list[str], loggers: list[str], on_cpu: bool, flash_attention: bool
    ) -> dict[str, Any]:
        import importlib.metadata
        import os
        import sys

        problems: list[str] = []
        versions = {"python": ".".join(map(str, sys.version_info[:2]))}
        for name in ("verl", "vlnorm_verl"):
            try:
                module = __import__(name)
                versions[name] = str(getattr(module, "__version__", "?"))
            except BaseException as error:
                problems.append(f"cannot import {name} ({type(error).__name__}: {error})")
        for name in ("torch", "ray", "vllm"):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "-"  # vllm has another name on a CPU
        if not problems:
            from vlnorm_verl import machine, plugin

            problems += machine.environment_problems(on_cpu, flash_attention)
            problems += machine.missing_logins(loggers)
            try:
                plugin.require_installed(mode)
            except RuntimeError as error:
                problems.append(str(error))
        if not os.path.exists(token):
            problems.append(f"does not see the run's folder {os.path.dirname(token)}: it must be on a shared disk")
        problems += [f"does not see {file}" for file in files if not os.path.exists(file)]
        return {"versions": versions, "problems": problems}

    try:
        ray.init(address="auto", runtime_env={"env_vars": environment}, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise ConnectionError(
            f"no living Ray cluster that lets us in ({type(error).__name__}: {_last_line(error)}). A cluster that was "
            "started with a token wants RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    token = folder / f".probe-{uuid.uuid4().hex}"
    token.touch()
    try:
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        task = ray.remote(num_cpus=0, max_retries=0)(examine)
        pending = {
            node_id: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
                mode, str(token), files, loggers, on_cpu, flash_attention
            )
            for node_id in nodes
        }
        ray.wait(list(pending.values()), num_returns=len(pending), timeout=TIMEOUT_SECONDS)
        reports = []
        for node_id, answer in pending.items():
            node = f"{nodes[node_id]['NodeManagerHostname']} ({nodes[node_id]['NodeName']})"
            try:
                found = ray.get(answer, timeout=0)
            except ray.exceptions.GetTimeoutError:
                found = {"versions": {}, "problems": [f"no answer within {TIMEOUT_SECONDS:.0f} s"]}
            except ray.exceptions.RayError as error:
                found = {"versions": {}, "problems": [f"{type(error).__name__}: {_last_line(error)}"]}
            reports.append(NodeReport(node, **found))
        return _compared(reports)
    finally:
        token.unlink()
        ray.shutdown()


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _compared(reports: list[NodeReport]) -> list[NodeReport]:
    """The reports, with a problem for each version that differs from this process's own."""
    import verl

    import vlnorm_verl

    own = {
        "python": ".".join(map(str, sys.version_info[:2])),
        "verl": verl.__version__,
        "vlnorm_verl": vlnorm_verl.__version__,
    }
    compared = []
    for report in reports:
        other = [
            f"{name} {report.versions[name]}, but {version} where the run is started"
            for name, version in own.items()
            if report.versions.get(name, version) != version
        ]
        compared.append(NodeReport(report.node, report.versions, report.problems + other))
    return compared
