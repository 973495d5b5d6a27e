"""`vlnorm-verl launch`: the one launcher behind the scripts in recipes/. verl and Ray do the training.

Where a run happens:

    RAY_ADDRESS not set               here, with a Ray of its own
    RAY_ADDRESS=host:port or auto     here, on that Ray cluster (SLURM and Kubernetes end up in this case)
    RAY_ADDRESS=http://host:8265      there: `ray job submit` of this same command, with this project's folder
    --on slurm                        `sbatch recipes/cluster/slurm.sbatch` of this same command
    --on kubernetes                   nowhere: prints a KubeRay RayJob of this same command

The folder of a run (`recipe.folder`), on a disk that every node sees:

    config.yaml         the whole configuration of the first start; a later start must agree with it
    checkpoints/        verl's; the same command again goes on from the last
    rollouts/, validation/    every response, as verl dumps them
    train.log, metrics-NNN.jsonl, .lock      see vlnorm_verl/running.py
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from vlnorm_verl import recipe
from vlnorm_verl.cpu import cpu_environment
from vlnorm_verl.recipe import CONFIG_NAME, RecipeError, compose, hydra_overrides
from vlnorm_verl.running import (
    STOP_SIGNALS,
    TrainingFailed,
    last_lines,
    locked,
    next_metrics,
    progress_line,
    read_metrics,
    train,
)

PROJECT = Path(__file__).parent.parent
SMOKE_STEPS = 2
RAYJOB_NAME = 47  # characters that KubeRay takes for the name of a RayJob
# What may change between two starts of one run: how long it is, where it lies, what it prints and keeps. Not the number
# of GPUs: verl's FSDP checkpoints are read by as many ranks as wrote them.
MAY_CHANGE = (
    "trainer.total_training_steps",
    "trainer.total_epochs",
    "trainer.logger",
    "trainer.save_freq",
    "trainer.test_freq",
    "trainer.val_before_train",
    "trainer.max_actor_ckpt_to_keep",
    "trainer.log_val_generations",
    "recipe.steps",
    "recipe.root",
    "recipe.data",
    "recipe.folder",
    "data.train_files",
    "data.val_files",
    "trainer.default_local_dir",
    "trainer.rollout_data_dir",
    "trainer.validation_data_dir",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "ray_kwargs.",
)
# Not sent to a cluster with `ray job submit`, beside what .gitignore has (Ray reads it).
NOT_SHIPPED = ["/runs", "/data", "/docs", "/tests"]


@dataclass(frozen=True)
class Request:
    """What the user asked for. `overrides` are Hydra's, group choices included."""

    recipes: Path  # the folder recipes/
    overrides: list[str] = field(default_factory=list)
    dry_run: bool = False
    smoke: bool = False
    loggers: list[str] = field(default_factory=list)
    on: str = ""  # "", "slurm" or "kubernetes"

    @property
    def config_folder(self) -> Path:
        return self.recipes / "config"


def launch(request: Request, console: Console | None = None) -> int:
    """Run, submit or only check one recipe. Returns the exit code: 2 for what is wrong with the request."""
    console = console or Console()
    try:
        return _launch(request, console)
    except RecipeError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2


def _launch(request: Request, console: Console) -> int:
    if request.on not in ("", "slurm", "kubernetes"):
        raise RecipeError(f"--on {request.on}: accepted are slurm and kubernetes; without it RAY_ADDRESS decides")
    prepare_environment(request)
    overrides = complete_overrides(request)
    config = compose(request.config_folder, overrides)
    recipe.validate(config)
    if request.dry_run:
        show(request, config, overrides, console)
        return 0
    if request.on == "kubernetes":
        print(rayjob(request, config))
        return 0
    if request.on == "slurm":
        return subprocess.call(sbatch_command(request, config))
    if os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        return submit(request, config, overrides, console)
    return run_here(request, config, overrides, console)


# ------------------------------------------------------------------------------------------------------ the command


def complete_overrides(request: Request) -> list[str]:
    """The user's overrides, before them what the launcher itself decides."""
    first = compose(request.config_folder, request.overrides)
    # Absolute, since verl's processes have working directories of their own.
    own = [f"recipe.root={Path(first.recipe.root).resolve()}", f"recipe.data={Path(first.recipe.data).resolve()}"]
    if request.loggers:
        unknown = [name for name in request.loggers if name not in recipe.LOGGERS]
        if unknown:
            raise RecipeError(f"--logger {','.join(request.loggers)}: accepted are {', '.join(recipe.LOGGERS)}")
        own.append(f"trainer.logger=[{','.join(dict.fromkeys(['console', 'file', *request.loggers]))}]")
    if request.smoke:
        own += [
            f"trainer.total_training_steps={SMOKE_STEPS}",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            "trainer.save_freq=-1",
            f"recipe.folder={smoke_folder(Path(first.recipe.root).resolve(), first.recipe.name)}",
        ]
    kept = [o for o in request.overrides if not o.startswith(("recipe.root=", "recipe.data="))]
    return own + kept


def _is_cpu(request: Request) -> bool:
    return "scale=cpu" in request.overrides


def prepare_environment(request: Request) -> None:
    """The environment of scale=cpu, before anything imports verl (composing does): verl looks for its platform then."""
    if _is_cpu(request):
        os.environ.update(cpu_environment())


def smoke_folder(root: Path, name: str) -> Path:
    """A new folder for each smoke run: it is measured, not resumed."""
    number = 0
    while (folder := root / "smoke" / f"{name}-{number:03d}").exists():
        number += 1
    return folder


def trainer_command(request: Request, overrides: list[str], on_cluster: bool) -> list[str]:
    """The command line of verl's trainer."""
    arguments = [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        f"--config-path={request.config_folder.resolve()}",
        f"--config-name={CONFIG_NAME}",
        "hydra.run.dir=${recipe.folder}",
        *hydra_overrides(overrides),
    ]
    if on_cluster:
        arguments += cluster_overrides(overrides)
    return arguments


def cluster_overrides(overrides: list[str]) -> list[str]:
    """What changes on a Ray cluster that exists already: it has its own resources, its workers need our variables."""
    settings = ["ray_kwargs.ray_init.address=auto"]
    settings += [
        f"+ray_kwargs.ray_init.runtime_env.env_vars.{name}='{value}'" for name, value in worker_variables().items()
    ]
    if "scale=cpu" in overrides:
        # Only a Ray that verl starts itself may be given resources, and only its workers are forked by the zygote.
        settings += [f"ray_kwargs.ray_init.{key}=null" for key in ("num_cpus", "num_gpus", "object_store_memory")]
        settings += ["ray_kwargs.ray_init.runtime_env.py_executable=null", "~ray_kwargs.ray_init.include_dashboard"]
    return settings


def worker_variables() -> dict[str, str]:
    """Environment variables that the workers of an existing cluster must be given."""
    variables = {
        # Loads the plugin where the package is importable but not installed (sent by `ray job submit`).
        "VERL_USE_EXTERNAL_MODULES": "vlnorm_verl.verl_entry",
    }
    if os.environ.get("VERL_PLATFORM") == "cpu":
        variables |= {k: v for k, v in cpu_environment().items() if not k.startswith("VLNORM_")}
    return variables


def show(request: Request, config: DictConfig, overrides: list[str], console: Console) -> None:
    """Every value that differs from verl's default, its source, and the command."""
    table = Table("value", "", "from", "why", title=config.recipe.name, title_justify="left")
    values = recipe.provenance(request.config_folder, config, overrides)
    for value in values:
        table.add_row(value.key, str(value.value), value.place, value.source)
    console.print(table)
    for key in recipe.unread_keys(config, [value.key for value in values]):
        console.print(f"note: {key} does nothing: no code of this run reads it", style="yellow", soft_wrap=True)
    if problem := recipe.missing_files(config):
        console.print(f"note: {problem}", style="yellow", markup=False, soft_wrap=True)
    console.print(
        "command:",
        shlex.join(trainer_command(request, overrides, bool(os.environ.get("RAY_ADDRESS")))),
        markup=False,
        soft_wrap=True,
        highlight=False,
    )
    console.print("(the same with --cfg job --resolve prints verl's defaults too)", markup=False)
    console.print(f"{config.recipe.name}: valid", style="green", markup=False, soft_wrap=True)


# --------------------------------------------------------------------------------------------------------- run here


def completed_steps(folder: Path) -> int:
    """The step of the last whole checkpoint in a run's folder; 0 without one."""
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def state(config: DictConfig) -> str:
    """`finished`, `step x of y` (of the last checkpoint) or `not begun`."""
    folder, steps = Path(config.recipe.folder), config.trainer.total_training_steps
    done = completed_steps(folder)
    if done >= steps:
        return "finished"
    return f"step {done} of {steps}" if done or (folder / "config.yaml").exists() else "not begun"


def run_here(request: Request, config: DictConfig, overrides: list[str], console: Console) -> int:
    folder = Path(config.recipe.folder)
    if state(config) == "finished":
        console.print(
            f"{config.recipe.name}: finished, step {completed_steps(folder)}; {folder}", markup=False, soft_wrap=True
        )
        return 0
    if config.recipe.scale == "cpu":
        make_tiny_data(config)
    if problem := recipe.missing_files(config):
        raise RecipeError(problem)
    # As Ctrl-C, also where a shell or a scheduler made this process ignore that: nothing of the run may stay behind.
    for end in STOP_SIGNALS:
        signal.signal(end, signal.default_int_handler)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(locked(folder))
        except BlockingIOError:
            raise RecipeError(f"{folder}: another run is writing there; wait for it, or set recipe.folder=…") from None
        remember(config, folder)
        if os.environ.get("RAY_ADDRESS"):
            check_nodes(config, console)
        return _run(request, config, overrides, console, lock)


def make_tiny_data(config: DictConfig) -> None:
    """The tiny task's files and model for scale=cpu, where they are missing. The same for every run.

    The model is copied beside the data because every node must find it under one path, and the package has another one
    on each node of a cluster that Ray sends it to.
    """
    from vlnorm_verl.tiny import boxed, data

    def write(path: str, table: list[dict[str, Any]]) -> None:
        if not Path(path).exists():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            data.write_parquet(table, Path(path))

    if not (model := Path(config.actor_rollout_ref.model.path)).exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        temporary = model.with_name(f".{model.name}.{os.getpid()}.tmp")
        shutil.copytree(recipe.TINY_MODEL, temporary)
        temporary.rename(model)
    if config.recipe.task == "countdown":
        write(config.data.train_files, data.rows(4096, 0, "train"))
        write(config.data.val_files, data.rows(128, 0, "test"))
        return
    write(config.data.train_files, boxed.rows("open_reasoner_zero", 4096, 0, "train"))
    for seed, file in enumerate(config.data.val_files):
        write(file, boxed.rows(Path(file).stem, 32, seed, "test"))


def remember(config: DictConfig, folder: Path) -> None:
    """Keep the configuration of the first start; refuse a later one that would be another run.

    Raises:
        RecipeError: the folder holds a run with other values; the message lists them.
    """
    file = folder / "config.yaml"
    if not file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(OmegaConf.to_yaml(config, resolve=True))
        temporary.replace(file)
        return
    before, now = recipe.flatten(OmegaConf.load(file)), recipe.flatten(config)
    changed = [
        f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise RecipeError(
            f"{folder} holds a run with other values; give the same, or another folder with recipe.folder=…\n  "
            + "\n  ".join(changed)
        )


def check_nodes(config: DictConfig, console: Console) -> None:
    """Raises RecipeError that names each node of the cluster where the run could not work."""
    from vlnorm_verl.probe import probe

    files = [config.data.train_files, config.data.val_files]
    flat = [file for entry in files for file in ([entry] if isinstance(entry, str) else entry)]
    with console.status("asking every node of the Ray cluster …"):
        try:
            reports = probe(
                config.actor_rollout_ref.actor.loss_agg_mode, Path(config.recipe.folder), flat, worker_variables()
            )
        except ConnectionError as error:
            raise RecipeError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error}") from error
    for report in reports:
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
        console.print(f"node {report.node}: {versions or 'no answer'}", markup=False, highlight=False, soft_wrap=True)
    bad = [f"node {report.node}: {problem}" for report in reports for problem in report.problems]
    if bad:
        raise RecipeError("the run cannot work on every node:\n  " + "\n  ".join(bad))


def _run(request: Request, config: DictConfig, overrides: list[str], console: Console, lock: IO[str]) -> int:
    folder, steps = Path(config.recipe.folder), config.trainer.total_training_steps
    metrics, log = next_metrics(folder), folder / "train.log"
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    command = trainer_command(request, overrides, on_cluster)
    if completed_steps(folder):
        command.append("trainer.val_before_train=false")  # it was validated when it began
    if on_cluster:
        command.append(f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH='{metrics.resolve()}'")
    console.print(f"{config.recipe.name}: {state(config)}; verl's log goes to {log}", markup=False, soft_wrap=True)
    start, status = time.monotonic(), console.status("starting Ray, the actor and the vLLM engines …")
    status.start()
    try:
        with contextlib.closing(train(command, {}, metrics, log, lock)) as records:
            for record in records:
                status.update(f"{time.monotonic() - start:.0f} s")
                if line := progress_line(record, steps):
                    console.print(line, markup=False, highlight=False)
    except KeyboardInterrupt:
        console.print(f"stopped at {state(config)}; the same command goes on from there", markup=False, soft_wrap=True)
        return 130
    except TrainingFailed as error:
        console.print(
            f"{error} {state(config)}; the same command goes on from there. The end of {log}:",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        console.print("".join(last_lines(log)), markup=False, highlight=False, soft_wrap=True)
        return 1
    finally:
        status.stop()
    if request.smoke:
        console.print(smoke_table(folder, config))
    else:
        console.print(f"{config.recipe.name}: {state(config)}; {folder}", markup=False, soft_wrap=True)
    return 0


def smoke_table(folder: Path, config: DictConfig) -> Table:
    """Memory and time of the smoke run's last step, and the whole run by it."""
    steps = [record["data"] for record in read_metrics(folder) if "timing_s/step" in record["data"]]
    last = steps[-1]
    table = Table("", "", title=f"{config.recipe.name}, {len(steps)} steps at full size")

    def row(name: str, key: str, unit: str) -> None:
        if key in last:
            table.add_row(name, f"{last[key]:.1f} {unit}")

    row("GPU memory, most allocated by the actor", "actor/perf/max_memory_allocated_gb", "GB")
    row("GPU memory, most reserved by the actor", "actor/perf/max_memory_reserved_gb", "GB")
    row("host memory", "actor/perf/cpu_memory_used_gb", "GB")
    row("response length, mean (it grows in training)", "response_length/mean", "tokens")
    for key, name in (
        ("step", "step"),
        ("gen", "generation"),
        ("old_log_prob", "old log-probabilities"),
        ("update_actor", "update"),
        ("update_weights", "weight sync"),
    ):
        row(f"seconds: {name}", f"timing_s/{key}", "s")
    hours = config.recipe.steps * statistics.fmean(d["timing_s/step"] for d in steps[1:] or steps) / 3600
    table.add_row(f"{config.recipe.steps} steps at this speed, without validation", f"{hours:.1f} h")
    return table


# --------------------------------------------------------------------------------------------------------- clusters


def same_command(request: Request, overrides: list[str]) -> list[str]:
    """This launch again, as a command of the project's folder on another machine."""
    flags = ["--smoke"] if request.smoke else []
    flags += [f"--logger={','.join(request.loggers)}"] if request.loggers else []
    return ["launch", "--recipes", request.recipes.name, *flags, *overrides]


def submit(request: Request, config: DictConfig, overrides: list[str], console: Console) -> int:
    """`ray job submit` of the same command; follows its log until it ends, and returns its exit code."""
    command = submit_command(request, config)
    console.print(shlex.join(command), markup=False, highlight=False, soft_wrap=True)
    return subprocess.call(command)


def submit_command(request: Request, config: DictConfig) -> list[str]:
    # The launcher in the job finds the cluster by the RAY_ADDRESS that Ray gives it, and completes the overrides there.
    absolute = [f"recipe.root={config.recipe.root}", f"recipe.data={config.recipe.data}"]
    given = [o for o in request.overrides if not o.startswith(("recipe.root=", "recipe.data="))]
    return [
        str(Path(sys.executable).with_name("ray")),
        "job",
        "submit",
        f"--address={os.environ['RAY_ADDRESS']}",
        f"--submission-id={config.recipe.name}-seed{config.recipe.seed}-{time.strftime('%Y%m%d-%H%M%S')}",
        f"--working-dir={request.recipes.resolve().parent}",
        f"--runtime-env-json={json.dumps({'excludes': NOT_SHIPPED})}",
        "--",
        "python",
        "-m",
        "vlnorm_verl",
        *same_command(request, [*given, *absolute]),
    ]


def sbatch_command(request: Request, config: DictConfig) -> list[str]:
    return [
        "sbatch",
        f"--nodes={config.trainer.nnodes}",
        f"--gpus-per-node={config.trainer.n_gpus_per_node}",
        f"--job-name={config.recipe.name}-seed{config.recipe.seed}",
        str(request.recipes / "cluster" / "slurm.sbatch"),
        *same_command(request, request.overrides)[3:],
    ]


def rayjob(request: Request, config: DictConfig) -> str:
    """The RayJob manifest of recipes/cluster/rayjob.yaml for this run."""
    text = (request.recipes / "cluster" / "rayjob.yaml").read_text()
    command = shlex.join(["python", "-m", "vlnorm_verl", *same_command(request, request.overrides)])
    name = re.sub(r"[^a-z0-9]+", "-", f"{config.recipe.name}-seed{config.recipe.seed}".lower())
    if len(name) > RAYJOB_NAME:
        name = f"{name[: RAYJOB_NAME - 7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    for placeholder, value in {
        "${NAME}": name,
        "${ENTRYPOINT}": json.dumps(command),
        "${WORKERS}": str(config.trainer.nnodes - 1),
        "${GPUS}": str(config.trainer.n_gpus_per_node),
    }.items():
        text = text.replace(placeholder, value)
    return text
