"""Asks every node of a Ray cluster, before training, whether a run can work there.

A node that lacks verl or this package fails minutes into the start of a run, in a worker's log, or (the plugin) not at
all: verl hides plugin load errors. The answers are named by node here.

Covered: imports and versions, whether torch and vLLM are those for the run, flash-attn, whether the plugin is in verl,
whether the node sees the run's folder, data and model, logins of loggers, Ray's CPUs and GPUs; of the cluster, whether
another verl run is on it. Not covered: drivers, network speed, free disk.
"""

from __future__ import annotations

import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vlnorm_verl.files import UserError
from vlnorm_verl.runs.config import data_files, is_cpu, model_folder, wants_flash_attention

TIMEOUT_SECONDS = 300.0  # importing torch and verl from a cold shared disk takes minutes


@dataclass(frozen=True)
class NodeReport:
    """What one node answered. `problems` is empty if a run can work there."""

    node: str  # host name and address
    cpus: float  # that Ray has there
    gpus: float
    versions: dict[str, str]
    problems: list[str]


def probe(config: DictConfig, environment: dict[str, str]) -> list[NodeReport]:
    """Ask each living node of the cluster that RAY_ADDRESS names.

    environment: variables that the run's workers get.

    Raises:
        UserError: there is no cluster at RAY_ADDRESS, or another verl run is on it.
    """
    import ray
    import verl
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    import vlnorm_verl

    # Nested, hence sent by value: a node without this package could not even load a function of it.
    def examine(run: dict[str, Any]) -> dict[str, Any]:
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
            from vlnorm_verl.runs.logins import missing_logins

            problems += map(str, machine.environment_problems(run["on_cpu"], run["flash_attention"]))
            problems += missing_logins(run["loggers"])  # verl's driver may be on any node
            try:
                plugin.require_installed(run["mode"])
            except RuntimeError as error:
                problems.append(str(error))
        token = run["token"]
        if not os.path.exists(token):
            problems.append(f"does not see the run's folder {os.path.dirname(token)}: it must be on a shared disk")
        problems += [f"does not see {file}" for file in run["files"] if not os.path.exists(file)]
        for name, version in run["versions"].items():
            if versions.get(name, version) != version:
                problems.append(f"{name} {versions[name]}, but {version} where the run is started")
        return {"versions": versions, "problems": problems}

    try:
        ray.init(address="auto", runtime_env={"env_vars": environment}, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise UserError(
            f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: no living Ray cluster that lets us in "
            f"({type(error).__name__}: {_last_line(error)}). A cluster that was started with a token wants "
            "RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    token = Path(config.recipe.folder) / f".probe-{uuid.uuid4().hex}"
    token.touch()
    reward = (config.reward.custom_reward_function.path or "").removeprefix("file://")
    files = (*data_files(config), model_folder(config), None if "://" in reward else reward)  # pkg://… is imported
    run = {
        "mode": config.actor_rollout_ref.actor.loss_agg_mode,
        "token": str(token),
        "files": [str(file) for file in files if file],
        "loggers": list(config.trainer.logger),
        "on_cpu": is_cpu(config),
        "flash_attention": wants_flash_attention(config),
        "versions": {
            "python": ".".join(map(str, sys.version_info[:2])),
            "verl": verl.__version__,
            "vlnorm_verl": vlnorm_verl.__version__,
        },
    }
    try:
        refuse_second_run()
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        task = ray.remote(num_cpus=0, max_retries=0)(examine)
        there = {node_id: NodeAffinitySchedulingStrategy(node_id, soft=False) for node_id in nodes}
        pending = {node_id: task.options(scheduling_strategy=there[node_id]).remote(run) for node_id in nodes}
        ray.wait(list(pending.values()), num_returns=len(pending), timeout=TIMEOUT_SECONDS)
        reports = []
        for node_id, answer in pending.items():
            node = nodes[node_id]
            name, resources = f"{node['NodeManagerHostname']} ({node['NodeName']})", node["Resources"]
            known = name, resources.get("CPU", 0.0), resources.get("GPU", 0.0)
            try:
                report = NodeReport(*known, **ray.get(answer, timeout=0))
            except ray.exceptions.GetTimeoutError:
                report = NodeReport(*known, {}, [f"no answer within {TIMEOUT_SECONDS:.0f} s"])
            except ray.exceptions.RayError as error:
                report = NodeReport(*known, {}, [f"{type(error).__name__}: {_last_line(error)}"])
            reports.append(report)
        return reports
    finally:
        token.unlink()
        ray.shutdown()


def refuse_second_run() -> None:
    """
    Raises:
        UserError: a verl run is on the Ray cluster that this process is connected to. Of two that start within a minute
            neither is refused: verl makes the actor in its own process (trainer/main_ppo.py:149), after this.
    """
    import ray

    try:
        ray.get_actor("TransferQueueController", namespace="transfer_queue")  # transfer_queue/interface.py:119
    except ValueError:
        return
    raise UserError(
        "another verl run is on this Ray cluster: verl's TransferQueue has one name for all of them, so both would "
        "train on each other's responses. Wait for it, or take a Ray cluster of its own"
    )


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]
