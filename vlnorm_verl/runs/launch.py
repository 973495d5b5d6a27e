"""`vlnorm-verl launch`: the one launcher behind the scripts in recipes/. verl and Ray do the training.

Where a run happens:

    RAY_ADDRESS not set               here, with a Ray of its own
    RAY_ADDRESS=host:port or auto     here, on that Ray cluster (SLURM and Kubernetes end up in this case)
    RAY_ADDRESS=http://host:8265      there: `ray job submit` of this same command, with this project's folder
    --on slurm                        `sbatch recipes/cluster/slurm.sbatch` of this same command
    --on kubernetes                   nowhere: prints a KubeRay RayJob of this same command

The configuration is composed once. verl's trainer is given the result, as trainer.yaml in the folder of the run.
What else is in that folder: folder.py. What a start is given: request.py. Ray clusters, SLURM, Kubernetes: clusters.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vlnorm_verl import cpu, extras, files, machine
from vlnorm_verl.cpu import install
from vlnorm_verl.files import UserError, locked
from vlnorm_verl.runs import clusters, limits, resources, smoke
from vlnorm_verl.runs import config as configs
from vlnorm_verl.runs.check import unread_keys, validate
from vlnorm_verl.runs.config import (
    is_cpu,
    missing_files,
    override,
    reserved_cpus,
    wants_flash_attention,
    with_settings,
)
from vlnorm_verl.runs.folder import (
    begin,
    completed_steps,
    finish,
    left,
    prune,
    refuse_other,
    remember,
    state,
    tidy,
    validation_due,
)
from vlnorm_verl.runs.locks import hold_folder, hold_own_ray
from vlnorm_verl.runs.logins import missing_logins
from vlnorm_verl.runs.process import (
    Record,
    TrainingFailed,
    last_lines,
    next_metrics,
    raise_on_stop,
    read_metrics,
    train,
)
from vlnorm_verl.runs.progress import progress_line, summarize, summary_table, terminal
from vlnorm_verl.runs.provenance import provenance
from vlnorm_verl.runs.request import Request, again, folder_of, settings
from vlnorm_verl.tasks.tiny.data import make as make_tiny_files


def launch(request: Request, console: Console | None = None) -> int:
    """Run, submit or only check one recipe. Returns the exit code.

    Raises:
        UserError: the request is wrong, or the run cannot work here.
        machine.Elsewhere: another environment of the project can do it.
    """
    console = console or terminal()
    check_place(request.on)
    if request.report:
        extras.require("report")
    asked = configs.compose(request.recipes / "config", request.overrides)
    unfit = prepare_environment(request.recipes, asked)
    if request.python:
        if unfit:
            raise UserError(unfit)
        print(sys.executable)
        return 0
    folder = folder_of(request, asked)
    config, changed = checked(request, asked, folder)
    if request.dry_run:
        show(request, config, changed, console, unfit)
        return 0
    arguments = again(request, config)
    if request.on == "kubernetes":
        print(clusters.rayjob(request.recipes, arguments, config))
        return 0
    if request.on == "slurm":
        if not shutil.which("sbatch"):
            raise UserError("--on slurm: no sbatch here; start it on a login node of the cluster")
        if not (request.recipes / "python.sh").is_file():  # as in an installed package
            raise UserError(
                f"--on slurm: {request.recipes} has no python.sh; a job starts in a checkout of this project"
            )
        if unfit := missing_files(config):
            raise UserError(unfit)
        return subprocess.call(
            clusters.sbatch_command(request.recipes, arguments, config), cwd=request.recipes.resolve().parent
        )
    if os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        return clusters.submit(request.recipes, arguments, config, console)
    if unfit := unfit or cannot_run(config):
        raise UserError("\n".join(filter(None, [unfit, missing_files(config)])))
    console.print(f"environment: {machine.this_environment()}")
    tight = (
        [limits.memory_problem(config.trainer.n_gpus_per_node)]
        if is_cpu(config)
        else limits.tight(folder, (config.recipe.model,))
    )
    for problem in filter(None, tight):
        console.print(f"note: {problem}", style="yellow")
    code = run_here(request, asked, config, console)
    if request.report and state(config) == "finished":
        draw_report(folder, console)
    return code


def checked(request: Request, asked: DictConfig, folder: Path) -> tuple[DictConfig, dict[str, Any]]:
    """What verl's trainer is given, and what of it is `settings`.

    Raises:
        UserError: verl refuses it, or the folder has a run with other values.
    """
    changed = settings(request, asked, folder)
    config = with_settings(asked, changed)
    validate(config)
    refuse_other(config, folder)
    return config, changed


def check_place(on: str) -> None:
    if on not in ("", "slurm", "kubernetes"):
        raise UserError(f"--on {on}: accepted are slurm and kubernetes; without it RAY_ADDRESS decides")
    if not on:
        clusters.check_address(os.environ.get("RAY_ADDRESS", ""))


# ------------------------------------------------------------------------------------------------- what it takes here


def prepare_environment(recipes: Path, config: DictConfig) -> str:
    """CPU or GPUs: decided by the composed configuration, here for all that follows; verl's platform goes by it too.

    Returns why no environment of this project can do the run; "" if this one can.

    Raises:
        machine.Elsewhere: another one can.
        UserError: VERL_PLATFORM says something else.
    """
    unfit = machine.require_environment(is_cpu(config), recipes.resolve().parent)
    if is_cpu(config):
        os.environ.update(cpu.cpu_environment())
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # an empty one hides Ray's GPUs, too, which are only logical here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # verl's engines that are not installed
            install.register()  # composing has imported verl already
    elif cpu.is_active():
        raise UserError("VERL_PLATFORM=cpu is set, and this run is on GPUs: unset it, or give model=tiny")
    return unfit


def cannot_run(config: DictConfig) -> str:
    """What this machine lacks for a run beside an environment, "" if nothing."""
    own = not os.environ.get("RAY_ADDRESS")
    if config.trainer.nnodes > 1 and own:
        return (
            f"trainer.nnodes={config.trainer.nnodes}, and this run would start a Ray of its own on this machine alone: "
            "set RAY_ADDRESS, or give --on slurm or --on kubernetes"
        )
    told = config.ray_kwargs.ray_init.num_cpus
    problems = [machine.home_problem(own_ray=True), limits.cpus_problem(reserved_cpus(config), told)] if own else []
    if own and "_temp_dir" not in config.ray_kwargs.ray_init:
        problems.append(limits.sockets_problem())
    if not is_cpu(config) and wants_flash_attention(config):
        problems.append(machine.flash_attention_problem())
    if not is_cpu(config) and own:
        cuda, gpus = machine.this_environment().cuda or machine.WHEELS_CUDA, config.trainer.n_gpus_per_node
        problems += [machine.driver_problem(cuda, gpus), machine.compiler_problem(), machine.vllm_port_problem()]
    return "\n".join(str(problem) for problem in problems if problem)


def trainer_command(config_folder: Path, name: str, overrides: list[str]) -> list[str]:
    """The command line of verl's trainer."""
    command = [sys.executable, "-m", "verl.trainer.main_ppo", f"--config-path={config_folder.resolve()}"]
    return [*command, f"--config-name={name}", *overrides]


def show(request: Request, config: DictConfig, changed: dict[str, Any], console: Console, unfit: str) -> None:
    """Every value that differs from verl's default, its source, and the command."""
    folder, config_folder = Path(config.recipe.folder), request.recipes / "config"
    values = provenance(config_folder, config, request.overrides, changed)
    for value in values:
        text = value.value if isinstance(value.value, str) else json.dumps(value.value, ensure_ascii=False)
        console.print(f"{value.key}={text}  # {value.place}{': ' if value.why else ''}{value.why}")
    for key in unread_keys(config, [value.key for value in values]):
        console.print(f"note: {key} does nothing: no code of this run reads it", style="yellow")
    for problem in filter(None, (missing_files(config), unfit)):
        console.print(f"note: {problem}", style="yellow")
    if not request.smoke and (cost := resources.cost([(left(config), request.overrides)])):
        console.print(cost)
    disk = machine.nearest(folder)
    console.print(f"free disk at {disk}: {shutil.disk_usage(disk).free / resources.GB:.0f} GB")
    if request.on_cluster:
        console.print(f"forwarded to the workers: {', '.join(sorted(clusters.forwarded())) or 'no variable'}")
    overrides = [override("hydra.run.dir", str(folder)), *configs.hydra_overrides(request.overrides, changed)]
    by_hand = trainer_command(config_folder, configs.CONFIG_NAME, overrides)
    console.print(f"command: {shlex.join(by_hand)}")
    console.print("(the same with --cfg job --resolve prints verl's defaults too)")
    console.print(f"{config.recipe.name}: valid", style="green")


# --------------------------------------------------------------------------------------------------------- run here


def run_here(request: Request, asked: DictConfig, config: DictConfig, console: Console) -> int:
    folder = Path(config.recipe.folder)
    if finished(config, console):
        with contextlib.suppress(OSError, UserError), locked(folder):  # in use, or not ours to write
            tidy(folder)
        return 0
    if is_cpu(config):
        try:
            make_tiny_files(Path(config.recipe.data), config.recipe.task)
        except OSError as error:
            raise UserError(f"{error}: give another folder with recipe.data=…") from error
    if problem := missing_files(config):
        raise UserError(problem)
    if not request.on_cluster and (problems := missing_logins(config.trainer.logger)):
        raise UserError("; ".join(problems))
    raise_on_stop()  # nothing of the run may stay behind
    with contextlib.ExitStack() as stack:
        locks = [hold_folder(folder, stack, console)]
        if finished(config, console):  # by the run that had the folder until now
            return 0
        if os.environ.get("RAY_ADDRESS"):
            clusters.check_nodes(config, console)
        else:
            locks.append(hold_own_ray(stack))
        remember(config, folder)  # below the refusals: a run that was refused has not begun
        begin(config, folder)
        began = time.monotonic()

        def start_once() -> int:
            # The settings once more, now that nobody else writes there.
            return train_once(with_settings(asked, settings(request, asked, folder)), console, *locks)

        if request.smoke:
            # However it ends: the next try has a new folder.
            stack.callback(shutil.rmtree, folder / "checkpoints", ignore_errors=True)
            for _ in range(smoke.STARTS):
                last_start = time.monotonic()
                if code := start_once():
                    return code
            console.print(smoke.table(folder, asked, time.monotonic() - last_start), soft_wrap=False)
            return 0
        trained = completed_steps(folder) >= config.trainer.total_training_steps
        if (not trained or validation_due(config, folder)) and (code := start_once()):
            console.print(f"{state(config)}; the same command goes on from there")
            return code
        finish(config, folder)
    title = f"{config.recipe.name}, seed {config.recipe.seed}"
    console.print(summary_table(summarize(read_metrics(folder)), title, time.monotonic() - began), soft_wrap=False)
    console.print(f"{config.recipe.name}: {state(config)}; {folder}")
    return 0


def finished(config: DictConfig, console: Console) -> bool:
    """Whether there is nothing left to do; says so."""
    if state(config) != "finished":
        return False
    folder = Path(config.recipe.folder)
    console.print(f"{config.recipe.name}: finished; {folder}")
    return True


def start(config: DictConfig, *locks: IO[str]) -> Generator[Record, None, None]:
    """One start of verl's trainer with a whole configuration in the run's folder; its metrics, see `process.train`."""
    folder = Path(config.recipe.folder)
    hydra = {"hydra": {"run": {"dir": str(folder)}}}
    files.write(folder / "trainer.yaml", OmegaConf.to_yaml(config) + OmegaConf.to_yaml(hydra))
    variables = clusters.job_environment() if os.environ.get("RAY_ADDRESS") else {}
    return train(trainer_command(folder, "trainer", []), variables, next_metrics(folder), folder / "train.log", *locks)


def train_once(config: DictConfig, console: Console, *locks: IO[str]) -> int:
    """One start of the trainer, with its progress on the console. Returns the exit code."""
    folder, steps = Path(config.recipe.folder), config.trainer.total_training_steps
    began, log = completed_steps(folder), folder / "train.log"
    console.print(f"{config.recipe.name}: {state(config)}; verl's log goes to {log}")
    clock, status = time.monotonic(), console.status("starting Ray, the actor and the vLLM engines …")
    status.start()
    try:
        with contextlib.closing(start(config, *locks)) as records:
            for record in records:
                line = progress_line(record, max(steps, record["step"]))
                with contextlib.suppress(OSError):  # a disk that is away or full must not end a training that goes on
                    status.update(f"{time.monotonic() - clock:.0f} s")
                    prune(folder, config.trainer.max_actor_ckpt_to_keep, began)
                    if line:
                        console.print(line)
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    except TrainingFailed as error:
        end = "".join(last_lines(log))
        console.print(f"{error} The end of {log}:", style="red")
        console.print(end)
        if "out of memory" in end or "OutOfMemoryError" in end:
            page = "cpu.md says what a run takes" if is_cpu(config) else "costs.md has what the same run may change"
            console.print(f"Out of memory: docs/{page}.")
        return 1
    finally:
        status.stop()
    return 0


def draw_report(folder: Path, console: Console) -> None:
    """The report of one finished run, in its folder."""
    from vlnorm_verl.report import build

    out = folder / "report"
    build.build(build.Request((str(folder),), out, figures=True), console)
    console.print(f"report: {out / 'report.html'}")
    for picture in sorted((out / "figures").glob("training-*.png")):
        console.print(f"learning curve: {picture}")
