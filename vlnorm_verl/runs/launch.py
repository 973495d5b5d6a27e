"""`vlnorm-verl launch`: the one launcher behind the scripts in recipes/. verl and Ray do the training.

Where a run happens:

    RAY_ADDRESS not set               here, with a Ray of its own
    RAY_ADDRESS=host:port or auto     here, on that Ray cluster (SLURM and Kubernetes end up in this case)
    RAY_ADDRESS=http://host:8265      there: `ray job submit` of this same command, with this project's folder
    --on slurm                        `sbatch recipes/cluster/slurm.sbatch` of this same command
    --on kubernetes                   nowhere: prints a KubeRay RayJob of this same command

What is in the folder of a run: folder.py. Ray clusters, SLURM, Kubernetes: clusters.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlnorm_verl import cpu, machine
from vlnorm_verl.files import UserError
from vlnorm_verl.runs import clusters, recipe, resources, smoke
from vlnorm_verl.runs.folder import begin, completed_steps, finish, prune, remember, state, validation_due
from vlnorm_verl.runs.process import (
    STOP_SIGNALS,
    TrainingFailed,
    last_lines,
    locked,
    next_metrics,
    progress_line,
    train,
)
from vlnorm_verl.runs.recipe import CONFIG_NAME, hydra_overrides
from vlnorm_verl.tasks.tiny.data import make as make_tiny_files


@dataclass(frozen=True)
class Request:
    """What the user asked for. `overrides` are Hydra's, group choices included."""

    recipes: Path  # the folder recipes/
    overrides: list[str] = field(default_factory=list)
    dry_run: bool = False
    smoke: bool = False
    loggers: list[str] = field(default_factory=list)
    on: str = ""  # "", "slurm" or "kubernetes"
    python: bool = False  # only print the Python that the run takes

    @property
    def config_folder(self) -> Path:
        return self.recipes / "config"

    @property
    def on_cluster(self) -> bool:
        """Whether the trainer finds a Ray cluster where it starts."""
        return bool(self.on or os.environ.get("RAY_ADDRESS"))


def launch(request: Request, console: Console | None = None) -> int:
    """Run, submit or only check one recipe. Returns the exit code: 2 for what is wrong with the request."""
    console = console or Console()
    try:
        return _launch(request, console)
    except UserError as error:
        _say(console, str(error), style="red")
        return 2


def check_place(on: str) -> None:
    if on not in ("", "slurm", "kubernetes"):
        raise UserError(f"--on {on}: accepted are slurm and kubernetes; without it RAY_ADDRESS decides")


def _launch(request: Request, console: Console) -> int:
    check_place(request.on)
    asked = recipe.compose(request.config_folder, request.overrides)
    unfit = prepare_environment(request.recipes, asked)
    if request.python:
        if unfit:
            raise UserError(unfit)
        print(sys.executable)
        return 0
    folder = folder_of(request, asked)
    overrides = trainer_overrides(request, asked, folder)
    config = recipe.compose(request.config_folder, overrides)
    recipe.validate(config)
    if request.dry_run:
        show(request, config, overrides, console, unfit)
        return 0
    arguments = again(request, config)
    if request.on == "kubernetes":
        print(clusters.rayjob(request.recipes, arguments, config))
        return 0
    if request.on == "slurm":
        return subprocess.call(clusters.sbatch_command(request.recipes, arguments, config))
    if os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        return clusters.submit(request.recipes, arguments, config, console)
    if unfit := unfit or cannot_run(config):
        missing = None if recipe.is_cpu(config) else recipe.missing_files(config)
        raise UserError("\n".join(filter(None, [unfit, missing])))
    _say(console, f"environment: {machine.this_environment()}")
    if not recipe.is_cpu(config):
        for problem in machine.tight(Path(config.recipe.folder), (config.recipe.model,)):
            _say(console, f"note: {problem}", style="yellow")
    return run_here(request, asked, config, console)


# ------------------------------------------------------------------------------------------------------ the command


def folder_of(request: Request, asked: DictConfig) -> Path:
    """The folder of the run. Each smoke run has a new one: it is measured, not resumed.

    asked: what the user's overrides alone compose to.
    """
    if not request.smoke:
        return absolute(asked.recipe.folder)
    folders = (absolute(asked.recipe.root) / "smoke" / f"{asked.recipe.name}-{n:03d}" for n in itertools.count())
    return next(folder for folder in folders if not folder.exists())


def absolute(path: str) -> Path:
    """verl's processes have working directories of their own, and bash leaves the ~ of key=~/x to us."""
    return Path(path).expanduser().resolve()


def trainer_overrides(request: Request, asked: DictConfig, folder: Path) -> list[str]:
    """All overrides of the trainer's command line: the launcher's, the user's over them, what this start needs last.

    asked: what the user's overrides alone compose to.
    folder: the run's; what is in it decides, too.
    """
    paths = {f"recipe.{name}": absolute(asked.recipe[name]) for name in ("root", "data")} | {"recipe.folder": folder}
    own = ["hydra.run.dir=${recipe.folder}", *(recipe.override(key, str(path)) for key, path in paths.items())]
    if request.loggers:
        unknown = [name for name in request.loggers if name not in recipe.LOGGERS]
        if unknown:
            raise UserError(f"--logger {','.join(request.loggers)}: accepted are {', '.join(recipe.LOGGERS)}")
        own.append(f"trainer.logger=[{','.join(dict.fromkeys(['console', 'file', *request.loggers]))}]")
    overrides = own + recipe.without(request.overrides, *paths)
    done = completed_steps(folder)
    if request.smoke:
        overrides += smoke.overrides(done)
    elif done:
        # It was validated when it began. What a crash has kept from being validated is, now.
        overrides.append(f"trainer.val_before_train={str(validation_due(asked, folder)).lower()}")
        overrides.append(f"trainer.val_only={str(done >= asked.trainer.total_training_steps).lower()}")
    if request.on_cluster:
        overrides = clusters.with_cluster(overrides, asked, next_metrics(folder))
    return overrides


def prepare_environment(recipes: Path, config: DictConfig) -> str:
    """CPU or GPUs: decided by the composed configuration, here for all that follows; verl's platform goes by it too.

    Returns why no environment of this project can do the run; "" if this one can.

    Raises:
        machine.Elsewhere: another one can.
        UserError: VERL_PLATFORM says something else.
    """
    on_cpu, unfit = recipe.is_cpu(config), ""
    try:
        machine.require_environment(on_cpu, recipes.resolve().parent)
    except machine.Unfit as error:
        unfit = str(error)
    if on_cpu:
        os.environ.update(cpu.cpu_environment())
        cpu.register()  # composing has imported verl already
    elif cpu.is_active():
        raise UserError("VERL_PLATFORM=cpu is set, and this run is on GPUs: unset it, or give scale=cpu")
    return unfit


def cannot_run(config: DictConfig) -> str:
    """What this machine lacks for a run on GPUs, "" if nothing."""
    if recipe.is_cpu(config):
        return ""
    problems = machine.environment_problems(False, recipe.wants_flash_attention(config))
    cuda = machine.this_environment().cuda or machine.WHEELS_CUDA
    driver = machine.driver_problem(cuda, config.trainer.n_gpus_per_node)
    if driver and not os.environ.get("RAY_ADDRESS"):
        problems.append(str(driver))
    return "\n".join(problems)


def trainer_command(request: Request, overrides: list[str]) -> list[str]:
    """The command line of verl's trainer with the overrides of `trainer_overrides`."""
    return [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        f"--config-path={request.config_folder.resolve()}",
        f"--config-name={CONFIG_NAME}",
        *hydra_overrides(overrides),
    ]


def again(request: Request, config: DictConfig) -> list[str]:
    """The arguments of this launch for another machine: the same, with the same paths."""
    flags = ["--smoke"] if request.smoke else []
    flags += [f"--logger={','.join(request.loggers)}"] if request.loggers else []
    # A job has a working directory of its own. --on starts in the project's folder, which may lie elsewhere there.
    keys = [] if request.on else ["recipe.root", "recipe.data", *([] if request.smoke else ["recipe.folder"])]
    paths = [recipe.override(key, OmegaConf.select(config, key)) for key in keys]
    return [*flags, *recipe.without(request.overrides, *keys), *paths]


def show(request: Request, config: DictConfig, overrides: list[str], console: Console, unfit: str) -> None:
    """Every value that differs from verl's default, its source, and the command. In a pipe one value a line."""
    values = recipe.provenance(request.config_folder, config, overrides, request.overrides)
    texts = [v.value if isinstance(v.value, str) else json.dumps(v.value, ensure_ascii=False) for v in values]
    if console.is_terminal:
        table = Table(title=config.recipe.name, title_justify="left")
        for column in ("value", "", "from", "why"):
            table.add_column(column, overflow="fold")
        for value, text in zip(values, texts, strict=True):
            table.add_row(*map(escape, (value.key, text, value.place, value.source)))
        console.print(table)
    else:
        for value, text in zip(values, texts, strict=True):
            _say(console, f"{value.key}={text}  # {value.place}{': ' if value.source else ''}{value.source}")
    for key in recipe.unread_keys(config, [value.key for value in values]):
        _say(console, f"note: {key} does nothing: no code of this run reads it", style="yellow")
    for problem in filter(None, (recipe.missing_files(config), unfit)):
        _say(console, f"note: {problem}", style="yellow")
    if cost := resources.cost([config]):
        _say(console, cost)
    disk = next(path for path in (Path(config.recipe.folder), *Path(config.recipe.folder).parents) if path.exists())
    _say(console, f"free disk at {disk}: {shutil.disk_usage(disk).free / resources.GB:.0f} GB")
    if request.on_cluster:
        _say(console, f"forwarded to the workers: {', '.join(sorted(clusters.forwarded())) or 'no variable'}")
    _say(console, f"command: {shlex.join(trainer_command(request, overrides))}")
    _say(console, "(the same with --cfg job --resolve prints verl's defaults too)")
    _say(console, f"{config.recipe.name}: valid", style="green")


def _say(console: Console, text: str, style: str | None = None) -> None:
    """A line as it is: not wrapped, no markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


# --------------------------------------------------------------------------------------------------------- run here


def run_here(request: Request, asked: DictConfig, config: DictConfig, console: Console) -> int:
    folder = Path(config.recipe.folder)
    if state(config) == "finished":
        _say(console, f"{config.recipe.name}: finished, step {completed_steps(folder)}; {folder}")
        return 0
    if recipe.is_cpu(config):
        make_tiny_files(Path(config.recipe.data), config.recipe.task)
    if problem := recipe.missing_files(config):
        raise UserError(problem)
    if not request.on_cluster and (problems := clusters.missing_logins(config.trainer.logger)):
        raise UserError("; ".join(problems))
    # As Ctrl-C, also where a shell or a scheduler made this process ignore that: nothing of the run may stay behind.
    for end in STOP_SIGNALS:
        signal.signal(end, signal.default_int_handler)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(locked(folder))
        except BlockingIOError:
            raise UserError(f"{folder}: another run is writing there; wait for it, or set recipe.folder=…") from None
        remember(config, folder)
        begin(config, folder)
        if os.environ.get("RAY_ADDRESS"):
            clusters.check_nodes(config, console)

        def start() -> int:
            # The overrides once more, now that nobody else writes there.
            return _run(config, trainer_command(request, trainer_overrides(request, asked, folder)), console, lock)

        if request.smoke:
            for _ in range(smoke.STARTS):
                began = time.monotonic()
                if code := start():
                    return code
            console.print(smoke.table(folder, asked, time.monotonic() - began))
            shutil.rmtree(folder / "checkpoints")
            return 0
        trained = completed_steps(folder) >= config.trainer.total_training_steps
        if (not trained or validation_due(config, folder)) and (code := start()):
            return code
        finish(config, folder)
        _say(console, f"{config.recipe.name}: {state(config)}; {folder}")
        return 0


def _run(config: DictConfig, command: list[str], console: Console, lock: IO[str]) -> int:
    """One start of the trainer. Returns the exit code."""
    folder, steps = Path(config.recipe.folder), config.trainer.total_training_steps
    began = completed_steps(folder)
    metrics, log = next_metrics(folder), folder / "train.log"
    variables = clusters.job_environment() if os.environ.get("RAY_ADDRESS") else {}
    _say(console, f"{config.recipe.name}: {state(config)}; verl's log goes to {log}")
    start, status = time.monotonic(), console.status("starting Ray, the actor and the vLLM engines …")
    status.start()
    try:
        with contextlib.closing(train(command, variables, metrics, log, lock)) as records:
            for record in records:
                status.update(f"{time.monotonic() - start:.0f} s")
                prune(folder, config.trainer.max_actor_ckpt_to_keep, began)
                if line := progress_line(record, max(steps, record["step"])):
                    _say(console, line)
    except KeyboardInterrupt:
        _say(console, f"stopped at {state(config)}; the same command goes on from there")
        return 130
    except TrainingFailed as error:
        end = "".join(last_lines(log))
        _say(console, f"{error} {state(config)}; the same command goes on from there. The end of {log}:", style="red")
        _say(console, end)
        if "out of memory" in end or "OutOfMemoryError" in end:
            _say(console, 'Out of memory: recipes/README.md, "Memory and time", has what the same run may change.')
        return 1
    finally:
        status.stop()
    return 0
