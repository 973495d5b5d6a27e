"""A recipe on more than this machine: what changes on a Ray cluster that exists already, and how a run gets to one.

Covered: the overrides and variables that its workers need, the question to every node whether the run can work there,
`ray job submit`, `sbatch` and a KubeRay RayJob of a launch. The files that the last two need are in recipes/cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vlnorm_verl import recipe
from vlnorm_verl.cpu import cpu_environment
from vlnorm_verl.recipe import RecipeError

PLUGIN = "vlnorm_verl.verl_entry"
ENV_VARS = "ray_kwargs.ray_init.runtime_env.env_vars"
RAYJOB_NAME = 47  # characters that KubeRay takes for the name of a RayJob
# Not sent to a cluster with `ray job submit`, beside what .gitignore has (Ray reads it).
NOT_SHIPPED = ["/runs", "/data", "/docs", "/tests"]


# ----------------------------------------------------------------------------------------- on a cluster that is there


def with_cluster(overrides: list[str], config: DictConfig, metrics: Path) -> list[str]:
    """The trainer's overrides for an existing Ray cluster: it has its own resources, its workers need our variables."""
    variables = worker_variables(config) | {"VERL_FILE_LOGGER_PATH": str(metrics.resolve())}
    settings = ["ray_kwargs.ray_init.address=auto"]
    if config.recipe.scale == "cpu":
        # Only a Ray that verl starts itself may be given resources, and only its workers are forked by the zygote.
        settings += [f"ray_kwargs.ray_init.{key}=null" for key in ("num_cpus", "num_gpus", "object_store_memory")]
        settings += ["ray_kwargs.ray_init.runtime_env.py_executable=null", "~ray_kwargs.ray_init.include_dashboard"]
    # The user may have given one of the variables, too; then it is already in ours, and Hydra wants each key once.
    kept = recipe.without(overrides, *(f"{ENV_VARS}.{name}" for name in variables))
    settings += [f"++{recipe.override(f'{ENV_VARS}.{name}', value)}" for name, value in variables.items()]
    return [*kept, *settings]


def worker_variables(config: DictConfig) -> dict[str, str]:
    """Environment variables that the workers of an existing cluster must be given; the user's own win."""
    given = {name: str(value) for name, value in (OmegaConf.select(config, ENV_VARS) or {}).items()}
    variables = {}
    if os.environ.get("VERL_PLATFORM") == "cpu":
        variables = {k: v for k, v in cpu_environment().items() if not k.startswith("VLNORM_")}
    # Loads the plugin where the package is importable but not installed (sent by `ray job submit`). First of all, so
    # that a loss function of the user's own finds it in verl.
    modules = [
        PLUGIN,
        *given.get("VERL_USE_EXTERNAL_MODULES", os.environ.get("VERL_USE_EXTERNAL_MODULES", "")).split(","),
    ]
    given["VERL_USE_EXTERNAL_MODULES"] = ",".join(dict.fromkeys(name.strip() for name in modules if name.strip()))
    return variables | given


def check_nodes(config: DictConfig, console: Console) -> None:
    """Raises RecipeError that names each node of the cluster where the run could not work."""
    from vlnorm_verl.probe import probe

    files = [config.data.train_files, config.data.val_files]
    flat = [file for entry in files for file in ([entry] if isinstance(entry, str) else entry)]
    with console.status("asking every node of the Ray cluster …"):
        try:
            reports = probe(
                config.actor_rollout_ref.actor.loss_agg_mode, Path(config.recipe.folder), flat, worker_variables(config)
            )
        except ConnectionError as error:
            raise RecipeError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error}") from error
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        console.print(f"node {report.node}: {versions or 'no answer'}", markup=False, highlight=False, soft_wrap=True)
    bad = [f"node {report.node}: {problem}" for report in reports for problem in report.problems]
    if bad:
        raise RecipeError("the run cannot work on every node:\n  " + "\n  ".join(bad))


# ------------------------------------------------------------------------------------------------- the way to a cluster
# `arguments` are those of `vlnorm-verl launch`: flags, choices and overrides.


def submit_command(recipes: Path, arguments: list[str], config: DictConfig) -> list[str]:
    """`ray job submit` of a launch, with this project's folder, to the cluster of RAY_ADDRESS=http://…

    The launcher in the job finds the cluster by the RAY_ADDRESS that Ray gives it.
    """
    return [
        str(Path(sys.executable).with_name("ray")),
        "job",
        "submit",
        f"--address={os.environ['RAY_ADDRESS']}",
        f"--submission-id={config.recipe.name}-seed{config.recipe.seed}-{time.strftime('%Y%m%d-%H%M%S')}",
        f"--working-dir={recipes.resolve().parent}",
        f"--runtime-env-json={json.dumps({'excludes': NOT_SHIPPED})}",
        "--",
        *_elsewhere(recipes, arguments),
    ]


def sbatch_command(recipes: Path, arguments: list[str], config: DictConfig) -> list[str]:
    """`sbatch` of a launch; the job's script is recipes/cluster/slurm.sbatch."""
    return [
        "sbatch",
        f"--nodes={config.trainer.nnodes}",
        f"--gpus-per-node={config.trainer.n_gpus_per_node}",
        f"--job-name={config.recipe.name}-seed{config.recipe.seed}",
        str(recipes / "cluster" / "slurm.sbatch"),
        *arguments,
    ]


def rayjob(recipes: Path, arguments: list[str], config: DictConfig) -> str:
    """The RayJob manifest of recipes/cluster/rayjob.yaml for a launch."""
    text = (recipes / "cluster" / "rayjob.yaml").read_text()
    name = re.sub(r"[^a-z0-9]+", "-", f"{config.recipe.name}-seed{config.recipe.seed}".lower())
    if len(name) > RAYJOB_NAME:
        name = f"{name[: RAYJOB_NAME - 7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    for placeholder, value in {
        "${NAME}": name,
        "${ENTRYPOINT}": json.dumps(shlex.join(_elsewhere(recipes, arguments))),
        "${WORKERS}": str(config.trainer.nnodes - 1),
        "${GPUS}": str(config.trainer.n_gpus_per_node),
    }.items():
        text = text.replace(placeholder, value)
    return text


def _elsewhere(recipes: Path, arguments: list[str]) -> list[str]:
    """The launch as a command in the project's folder on another machine."""
    return ["python", "-m", "vlnorm_verl", "launch", "--recipes", recipes.name, *arguments]
