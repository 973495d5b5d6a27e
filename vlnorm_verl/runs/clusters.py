"""A recipe on more than this machine: what changes on a Ray cluster that exists already, and how a run gets to one.

Covered: the settings and variables that its workers need, the question to every node whether the run can work there,
`ray job submit`, `sbatch` and a KubeRay RayJob of a launch. The files that the last two need are in recipes/cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import string
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vlnorm_verl.cpu import cpu_environment
from vlnorm_verl.files import UserError
from vlnorm_verl.runs.config import CPUS_PER_GPU, is_cpu, reserved_cpus
from vlnorm_verl.runs.probe import probe
from vlnorm_verl.runs.process import log_variables

PLUGIN, MODULES = "vlnorm_verl.verl_entry", "VERL_USE_EXTERNAL_MODULES"
# Variables of whoever starts a run on an existing cluster that its workers get, too.
FORWARDED = (
    *("WANDB_*", "SWANLAB_*", "MLFLOW_*", "TRACKIO_*", "HF_*", "TOKENIZERS_*", "NCCL_*", "GLOO_*"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
)
RAY_INIT = "ray_kwargs.ray_init"
ENV_VARS = f"{RAY_INIT}.runtime_env.env_vars"
RAYJOB_NAME = 47  # characters that KubeRay takes for the name of a RayJob
# Not sent to a cluster with `ray job submit`, beside what .gitignore has (Ray reads it).
NOT_SHIPPED = ["/runs", "/data", "/docs", "/tests"]
# Seconds between two questions after a submitted job, and how many Ray's dashboard may leave without an answer.
ASK_S, UNANSWERED = 10.0, 30


# ----------------------------------------------------------------------------------------- on a cluster that is there


def check_address(address: str) -> None:
    """Raises UserError for a RAY_ADDRESS that Ray would end with a traceback for, or start a Ray of its own."""
    # `ray://`, Ray's client, is not tried and not refused.
    if address and not re.fullmatch(r"auto|(https?|ray)://\S+|([^\s:/]+|\[[^\s/\]]+\]):\d+", address):
        raise UserError(
            f"RAY_ADDRESS={address}: accepted are host:port, auto (the Ray of this machine) and http://host:8265 (`ray "
            "job submit`); without it a run starts a Ray of its own"
        )


def settings(config: DictConfig, metrics: Path) -> dict[str, Any]:
    """What a run has set on an existing Ray cluster: that has its own resources, its workers need our variables."""
    variables = worker_variables(config) | log_variables(metrics)
    changed: dict[str, Any] = {f"{RAY_INIT}.address": "auto"}
    if is_cpu(config):
        # Only a Ray that verl starts itself may be given resources, and only its workers are forked by the zygote.
        own = ("num_cpus", "num_gpus", "object_store_memory", "include_dashboard", "runtime_env.py_executable")
        changed |= {f"{RAY_INIT}.{key}": None for key in own}
    return changed | {f"{ENV_VARS}.{name}": value for name, value in variables.items()}


def worker_variables(config: DictConfig) -> dict[str, str]:
    """Environment variables that the workers of an existing cluster must be given; the user's own win."""
    given = {name: str(value) for name, value in (OmegaConf.select(config, ENV_VARS) or {}).items()}
    variables = {}
    if is_cpu(config):
        variables = {k: v for k, v in cpu_environment().items() if not k.startswith("VLNORM_")}
    # Loads the plugin where the package is importable but not installed (sent by `ray job submit`). First of all, so
    # that a loss function of the user's own finds it in verl.
    modules = [PLUGIN, *given.get(MODULES, os.environ.get(MODULES, "")).split(",")]
    given[MODULES] = ",".join(dict.fromkeys(name.strip() for name in modules if name.strip()))
    return variables | given


def forwarded() -> dict[str, str]:
    """The variables of FORWARDED that are set here."""
    return {k: v for k, v in os.environ.items() if any(fnmatchcase(k, pattern) for pattern in FORWARDED)}


def job_environment() -> dict[str, str]:
    """Environment of the trainer by which Ray gives its workers what is `forwarded`.

    Ray merges this job configuration into that of `ray.init` (ray/_private/worker.py:1789); `ray job submit` works by
    it, and verl reads it (trainer/constants_ppo.py:103). verl's own door, ray_kwargs, would put API keys into verl's
    log and into the configuration that it hands to wandb.
    """
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    job = {"runtime_env": {}, "metadata": {}} | json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    job["runtime_env"]["env_vars"] = forwarded() | job["runtime_env"].get("env_vars", {})
    # Where both name a variable, verl's value is taken instead of an error.
    return {RAY_JOB_CONFIG_JSON_ENV_VAR: json.dumps(job), "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1"}


def check_nodes(config: DictConfig, console: Console) -> None:
    """Raises UserError that names each node of the cluster where the run could not work, or says that there is none."""
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # see job_environment
    with console.status("asking every node of the Ray cluster …"):
        reports = probe(config, forwarded() | worker_variables(config))
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        console.print(f"node {report.node}: {versions or 'no answer'}", markup=False, highlight=False, soft_wrap=True)
    bad = [f"node {report.node}: {problem}" for report in reports for problem in report.problems]
    needed, cpus = reserved_cpus(config), sum(report.cpus for report in reports)
    if cpus < needed:
        bad.append(
            f"all nodes: verl reserves {needed} CPUs of Ray, and they have {cpus:g}: the run would wait for ever. "
            "`ray start --num-cpus=…` tells Ray of more than there are (on SLURM: VLNORM_RAY_OPTIONS=--num-cpus=…)"
        )
    # verl adds up GPUs (single_controller/ray/base.py:226), and then waits for so many with their CPUs on one node.
    nodes, gpus = config.trainer.nnodes, config.trainer.n_gpus_per_node
    places = sum(int(min(report.gpus // gpus, report.cpus // (CPUS_PER_GPU * gpus))) for report in reports)
    if places < nodes:
        there = "; ".join(f"{report.node} has {report.gpus:g} GPUs, {report.cpus:g} CPUs" for report in reports)
        bad.append(
            f"all nodes: of trainer.nnodes={nodes} groups of {gpus} GPUs (trainer.n_gpus_per_node) and "
            f"{CPUS_PER_GPU * gpus} CPUs, each on one node, Ray can place {places}: {there}. Take fewer, or tell Ray "
            "of what it does not see by `ray start --num-gpus=… --num-cpus=…`"
        )
    if bad:
        raise UserError("the run cannot work on every node:\n  " + "\n  ".join(bad))


# ------------------------------------------------------------------------------------------------- the way to a cluster
# `arguments` are those of `vlnorm-verl launch`: flags, choices and overrides.


def submit(recipes: Path, arguments: list[str], config: DictConfig, console: Console) -> int:
    """`ray job submit` of a launch, with this project's folder, to the cluster of RAY_ADDRESS=http://….

    Follows its log. Returns 0 if it succeeded. The launcher in the job finds the cluster by the address that Ray gives
    it.
    """
    job = f"{config.recipe.name}-seed{config.recipe.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:  # not on the command line: it may have keys in it
        # The launcher and verl's driver are in the job, where the package is only sent along: see worker_variables.
        variables = forwarded() | {MODULES: worker_variables(config)[MODULES]}
        json.dump({"excludes": NOT_SHIPPED, "env_vars": variables}, file)
        file.flush()
        command = [
            *_ray_job("submit"),
            "--no-wait",  # its own exit code is 0, too, where the log of a job that runs on was lost
            f"--submission-id={job}",
            f"--working-dir={recipes.resolve().parent}",
            f"--runtime-env={file.name}",
            "--",
            *_elsewhere(recipes, arguments),
        ]
        console.print(shlex.join(command), markup=False, highlight=False, soft_wrap=True)
        if code := subprocess.call(command):
            return code
    return _follow(job, console)


def _ray_job(verb: str) -> list[str]:
    # A Python of the system has its scripts, `ray` too, elsewhere.
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    return [*ray, "job", verb, f"--address={os.environ['RAY_ADDRESS']}"]


def _follow(job: str, console: Console) -> int:
    """Show the log of a job until that has ended. Returns 0 if it succeeded.

    Raises:
        UserError: the cluster no longer answers.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    headers = json.loads(os.environ.get("RAY_JOB_HEADERS", "null"))  # as `ray job` reads them
    unanswered, last = 0, ""
    while unanswered < UNANSWERED:
        if not unanswered:
            subprocess.call([*_ray_job("logs"), "--follow", job])
        try:
            status = JobSubmissionClient(os.environ["RAY_ADDRESS"], headers=headers).get_job_status(job)
        except (OSError, RuntimeError) as error:  # no connection, no answer, another answer
            unanswered, last = unanswered + 1, str(error)
        else:
            if status.is_terminal():
                return int(status != JobStatus.SUCCEEDED)
            unanswered = 0
            console.print(f"{job}: the log has ended, the job has not. The log once more:")
        time.sleep(ASK_S)
    raise UserError(
        f"{os.environ['RAY_ADDRESS']} has not told the status of {job} for {ASK_S * UNANSWERED / 60:.0f} minutes; it "
        f"may run on. The last answer: {last}"
    )


def sbatch_command(recipes: Path, arguments: list[str], config: DictConfig) -> list[str]:
    """`sbatch` of a launch; the job's script is recipes/cluster/slurm.sbatch."""
    folder = Path(config.recipe.folder)
    return [
        "sbatch",
        f"--nodes={config.trainer.nnodes}",
        *([] if is_cpu(config) else [f"--gpus-per-node={config.trainer.n_gpus_per_node}"]),
        # Submitted twice, a run waits for itself: for jobs of one name, so that is of the run's folder alone.
        f"--job-name={folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}",
        "--dependency=singleton",
        str((recipes / "cluster" / "slurm.sbatch").resolve()),
        *arguments,
    ]


def rayjob(recipes: Path, arguments: list[str], config: DictConfig) -> str:
    """The RayJob manifest of recipes/cluster/rayjob.yaml for a launch."""
    text = (recipes / "cluster" / "rayjob.yaml").read_text()
    name = re.sub(r"[^a-z0-9]+", "-", f"{config.recipe.name}-seed{config.recipe.seed}".lower())
    if len(name) > RAYJOB_NAME:
        name = f"{name[: RAYJOB_NAME - 7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return string.Template(text).substitute(
        NAME=name,
        ENTRYPOINT=json.dumps(shlex.join(_elsewhere(recipes, arguments))),
        WORKERS=config.trainer.nnodes - 1,
        GPUS=config.trainer.n_gpus_per_node,
    )


def _elsewhere(recipes: Path, arguments: list[str]) -> list[str]:
    """The launch as a command in the project's folder on another machine."""
    return ["python", "-m", "vlnorm_verl", "launch", "--recipes", recipes.name, *arguments]
