"""`vlnorm-verl reproduce`: the paper's runs by table and figure, from recipes/manifest.yaml.

Each run is a `vlnorm-verl launch`: here one after the other in processes of their own, so that one that fails does not
end the rest, or with --on each as a job of its own. Resuming, clusters and the folder of a run are the launcher's.
Covered here: which runs there are, that all are valid before the first one starts, their cost, what became of each.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vlnorm_verl.files import UserError, require
from vlnorm_verl.runs import launch, resources
from vlnorm_verl.runs.config import check_folders, choices, compose, missing_files, parsed
from vlnorm_verl.runs.folder import left, state
from vlnorm_verl.runs.process import raise_on_stop
from vlnorm_verl.runs.progress import terminal
from vlnorm_verl.runs.provenance import config_files
from vlnorm_verl.runs.request import Request, absolute

# What `state` and `resources.cost` want to know of a run beside the section `recipe`.
SIZE = ("nnodes", "n_gpus_per_node", "total_training_steps")
MODEL_PATH = "actor_rollout_ref.model.path"


@dataclass(frozen=True)
class RunSet:
    """The runs of one table or figure; each is what one would give to `vlnorm-verl launch`."""

    name: str
    alias: str
    title: str
    paper: str
    known: str
    rows: list[list[str]]


@dataclass(frozen=True)
class Manifest:
    numbering: str
    sets: dict[str, RunSet]

    def find(self, name: str) -> list[RunSet]:
        """The set of that name or alias; all of them for `all`.

        Raises:
            UserError: there is none.
        """
        aliases = {run_set.alias: run_set.name for run_set in self.sets.values() if run_set.alias}
        require(f"the set of runs {name!r}", name, [*self.sets, *aliases, "all"])
        return list(self.sets.values()) if name == "all" else [self.sets[aliases.get(name, name)]]


@dataclass(frozen=True)
class PlannedRun:
    overrides: list[str]
    outline: DictConfig

    @property
    def name(self) -> str:
        return f"{self.outline.recipe.name}-seed{self.outline.recipe.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.outline.recipe.folder)

    @property
    def state(self) -> str:
        return state(self.outline)


# ------------------------------------------------------------------------------------------------------ which runs


def read_manifest(recipes: Path) -> Manifest:
    content = yaml.safe_load((recipes / "manifest.yaml").read_text())
    sets: dict[str, RunSet] = {}
    for name, entry in content["sets"].items():
        rows = [overrides for included in entry.get("include", []) for overrides in sets[included].rows]
        rows += [overrides for row in entry.get("rows", []) for overrides in expand(row)]
        sets[name] = RunSet(name, entry.get("alias", ""), entry["title"], entry["paper"], entry["known"], rows)
    return Manifest(content["numbering"], sets)


def expand(row: dict[str, Any]) -> list[list[str]]:
    """The override lists that a row of the manifest stands for: all combinations of its lists."""
    choices = [[f"{key}={v}" for v in (value if isinstance(value, list) else [value])] for key, value in row.items()]
    return [list(combination) for combination in itertools.product(*choices)]


def plan(recipes: Path, sets: Iterable[RunSet], seeds: list[int], overrides: list[str]) -> list[PlannedRun]:
    """The runs of the sets, each once.

    seeds: empty leaves the recipes' own.
    overrides: come after those of the manifest, so they win.

    Raises:
        UserError: two different runs would have one folder, or 3B and 7B one model.
    """
    if seeds and any(given.key_or_group == "recipe.seed" for given in parsed(overrides)):
        raise UserError("--seeds and recipe.seed=…: give one of them")
    seeded = [[f"recipe.seed={seed}"] for seed in seeds] or [[]]
    runs: dict[Path, PlannedRun] = {}
    for row in (row for run_set in sets for row in run_set.rows):
        for seed in seeded:
            given = [*row, *seed, *overrides]
            run = PlannedRun(given, outline(recipes / "config", given))
            other = runs.setdefault(run.folder, run)
            if other.outline != run.outline:
                raise UserError(
                    f"{run.folder} would be the folder of several runs: “{' '.join(other.overrides)}” and “"
                    f"{' '.join(given)}”. Give recipe.root=… instead of recipe.folder=… or recipe.name=…"
                )
    models = {run.outline.recipe.model for run in runs.values()}
    if len(models) > 1 and (path := next((o for o in parsed(overrides) if o.key_or_group == MODEL_PATH), None)):
        raise UserError(
            f"{path.input_line} would be the model of all these runs: give one of "
            f"{', '.join(f'model={model}' for model in sorted(models))} with it"
        )
    return list(runs.values())


def outline(config_folder: Path, overrides: list[str]) -> DictConfig:
    """A run's section `recipe` and its SIZE: to compose all of its thousand values takes half a second.

    Raises:
        UserError: a choice that there is not, or a folder that is none.
    """
    outlined = _sections(config_folder, tuple(choices(config_folder, overrides).items())).copy()
    for given in parsed(overrides):
        section, _, key = given.key_or_group.partition(".")
        if section == "recipe" or (section == "trainer" and key in SIZE):
            OmegaConf.update(outlined, given.key_or_group, given.value())
    check_folders(outlined.recipe)
    outlined.recipe.folder = str(absolute(outlined.recipe.folder))
    return outlined


@functools.cache  # --list asks for the same choices again and again
def _sections(config_folder: Path, chosen: tuple[tuple[str, str], ...]) -> DictConfig:
    sections = []
    for file in config_files(config_folder, dict(chosen)):
        content = yaml.safe_load(file.read_text())
        size = {key: value for key, value in content.get("trainer", {}).items() if key in SIZE}
        sections.append({"recipe": content.get("recipe", {}), "trainer": size})
    return OmegaConf.merge(*sections)


# ------------------------------------------------------------------------------------------------------- what is done


def reproduce(
    recipes: Path,
    names: list[str],
    overrides: list[str],
    seeds: list[int],
    list_sets: bool = False,
    status: bool = False,
    dry_run: bool = False,
    on: str = "",
) -> int:
    """Run, check or only list sets of runs. Returns the exit code: 1 if a run is not valid or failed.

    Raises:
        UserError: the request is wrong.
    """
    console = terminal(stderr=on == "kubernetes")  # whose manifests are the output
    launch.check_place(on)
    manifest = read_manifest(recipes)
    sets = list({run_set.name: run_set for name in names for run_set in manifest.find(name)}.values())
    if list_sets:
        show_sets(recipes, manifest, sets or list(manifest.sets.values()), seeds, overrides, console)
        return 0
    if not sets:
        raise UserError(f"name what to reproduce: {', '.join([*manifest.sets, 'all'])}; --list says what they are")
    runs = plan(recipes, sets, seeds, overrides)
    if status:
        show_states(runs, {}, console)
        return 0
    valid = check(recipes, runs, console, elsewhere=on, dry_run=dry_run)
    if dry_run or not valid:
        return 0 if valid else 1
    return submit_all(recipes, runs, on, console) if on else run_all(recipes, runs, console)


def parse_seeds(text: str) -> list[int]:
    """Raises UserError if it is not whole numbers with commas; nothing for an empty text."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--seeds {text}: give whole numbers with commas, as in 0,1,2") from None


def show_sets(
    recipes: Path, manifest: Manifest, sets: list[RunSet], seeds: list[int], overrides: list[str], console: Console
) -> None:
    table = Table("set", "runs", "finished", "begun", "what", "where the runs are known from")
    folders = set()
    for run_set in sets:
        runs = plan(recipes, [run_set], seeds, overrides)
        states = [run.state for run in runs]
        folders |= {run.folder for run in runs}
        finished, waiting = states.count("finished"), states.count("not begun")
        name = f"{run_set.name}\n({run_set.alias})" if run_set.alias else run_set.name
        begun, what = len(states) - finished - waiting, f"{run_set.title}: {run_set.paper}"
        table.add_row(name, str(len(states)), str(finished), str(begun), what, run_set.known)
    console.print(table, soft_wrap=False)
    console.print(f"{manifest.numbering}\n{len(folders)} different runs")


def show_states(runs: list[PlannedRun], codes: dict[Path, int], console: Console) -> None:
    """codes: exit codes of the runs that were started just now."""
    table = Table("run", "state")
    for run in runs:
        code, log = codes.get(run.folder, 0), run.folder / "train.log"
        failed = f"; failed with exit code {code}{f', see {log}' if log.exists() else ''}" if code else ""
        table.add_row(run.name, run.state + failed)
    console.print(table, soft_wrap=False)
    states = [run.state for run in runs]
    console.print(f"{states.count('finished')} of {len(runs)} runs are finished")


def check(recipes: Path, runs: list[PlannedRun], console: Console, elsewhere: str, dry_run: bool) -> bool:
    """Whether verl accepts every run, and data and an environment are here if it starts here.

    Prints each thing that is wrong once, what the runs cost, and a count as the last line. elsewhere: "slurm", where
    the data is needed too, or "kubernetes".
    """
    problems: dict[str, list[str]] = {}
    missing: dict[str, None] = {}  # as an ordered set
    for run in tqdm(runs, desc="checking every run against verl", delay=1, mininterval=1, leave=False):
        try:
            asked = compose(recipes / "config", run.overrides)
            unfit = launch.prepare_environment(recipes, asked)
            config, _ = launch.checked(Request(recipes, on=elsewhere), asked, run.folder)
        except UserError as error:
            problems.setdefault(str(error), []).append(run.name)
            continue
        missing |= dict.fromkeys(filter(None, (missing_files(config), "" if elsewhere else unfit)))
    for message, names in problems.items():
        console.print(f"{', '.join(names)}:\n  {message}", style="red")
    on_cluster = os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")) or elsewhere == "kubernetes"
    needed = not dry_run and not on_cluster
    for message in missing:
        console.print(message, style="red" if needed else "yellow")
    unfinished = [(left(run.outline), run.overrides) for run in runs if run.state != "finished"]
    if not problems and (cost := resources.cost(unfinished)):
        console.print(cost)
    console.print(f"{len(runs) - sum(map(len, problems.values()))} of {len(runs)} runs are valid")
    return not problems and not (needed and missing)


def run_all(recipes: Path, runs: list[PlannedRun], console: Console) -> int:
    """Run those that are not finished, in order. 1 if any failed, 130 after Ctrl-C."""
    raise_on_stop()  # `kill` ends the run in order, too
    codes: dict[Path, int] = {}
    stopped = False
    for number, run in enumerate(runs, 1):
        console.print(f"[{number}/{len(runs)}] {run.name}: {run.state}")
        if run.state == "finished":
            continue
        command = [sys.executable, "-m", "vlnorm_verl", "launch", "--recipes", str(recipes), *run.overrides]
        # A session of its own: Ctrl-C reaches only this process, which hands it on once. Twice would cut its end short.
        process = subprocess.Popen(command, start_new_session=True)
        try:
            codes[run.folder] = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            codes[run.folder] = process.wait()
            stopped = True
            break
    show_states(runs, codes, console)
    if stopped:
        console.print("stopped; the same command goes on from there")
        return 130
    return 1 if any(codes.values()) else 0


def submit_all(recipes: Path, runs: list[PlannedRun], on: str, console: Console) -> int:
    """Submit each run that is not finished as a job of its own; kubernetes: print their manifests. 1 if any failed."""
    codes = []
    for run in runs:
        if run.state != "finished":
            if on == "kubernetes":
                print("---")
            codes.append(launch.launch(Request(recipes, run.overrides, on=on), console))
    console.print(f"{codes.count(0)} of {len(codes)} jobs are made")
    return 1 if any(codes) else 0
