"""`vlnorm-verl reproduce`: the paper's runs by table and figure, from recipes/manifest.yaml.

Each run is a `vlnorm-verl launch`: here one after the other in processes of their own, so that one that fails does not
end the rest, or with --on each as a job of its own. Resuming, clusters and the folder of a run are the launcher's.
Covered here: which runs there are, that all are valid before the first one starts, their cost, what became of each.
"""

from __future__ import annotations

import difflib
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
from rich.progress import track
from rich.table import Table

from vlnorm_verl.files import UserError
from vlnorm_verl.runs import launch, recipe, resources
from vlnorm_verl.runs.folder import completed_steps, state
from vlnorm_verl.runs.process import STOP_SIGNALS

NODES = ("trainer.nnodes", "trainer.n_gpus_per_node")
SOURCES = ("ours", "verl", "paper", "code")  # of a value; see recipes/config/recipe.yaml


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
        if name == "all":
            return list(self.sets.values())
        for one in self.sets.values():
            if name in (one.name, one.alias):
                return [one]
        accepted = [*self.sets, *(one.alias for one in self.sets.values() if one.alias), "all"]
        close = difflib.get_close_matches(name, accepted, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{name!r} is no set of runs.{hint} Accepted: {', '.join(accepted)}")


@dataclass(frozen=True)
class Run:
    overrides: list[str]
    name: str
    folder: Path
    progress: DictConfig  # what run_folder.state looks at

    @property
    def state(self) -> str:
        return state(self.progress)

    @property
    def left(self) -> DictConfig:
        """`progress` with the number of steps that are still to be trained."""
        left = self.progress.copy()
        left.trainer.total_training_steps -= min(completed_steps(self.folder), left.trainer.total_training_steps)
        return left


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


def plan(recipes: Path, sets: Iterable[RunSet], seeds: list[int], overrides: list[str]) -> list[Run]:
    """The runs of the sets, each once: two rows with one folder are one run.

    seeds: empty leaves the recipes' own.
    overrides: come after those of the manifest, so they win.
    """
    seeded = [[f"recipe.seed={seed}"] for seed in seeds] or [[]]
    runs: dict[Path, Run] = {}
    for one in sets:
        for row in one.rows:
            for seed in seeded:
                full = [*row, *seed, *overrides]
                progress = outline(recipes / "config", full)
                folder = Path(progress.recipe.folder)
                runs.setdefault(
                    folder, Run(full, f"{progress.recipe.name}-seed{progress.recipe.seed}", folder, progress)
                )
    return list(runs.values())


def outline(config_folder: Path, overrides: list[str]) -> DictConfig:
    """`recipe`, the steps and the GPUs of a run, without the rest: to compose a thousand values takes half a second.

    Raises:
        UserError: a choice that there is not.
    """
    given = {one.key_or_group: one.value() for one in recipe.parsed(recipe.hydra_overrides(overrides))}
    defaults = {"attention": "flash", "scale": "gpu"}
    choices = {group: given.get(group, defaults.get(group, "")) for group in recipe.GROUPS}
    for group, choice in choices.items():
        accepted = sorted(file.stem for file in (config_folder / group).glob("*.yaml"))
        if choice not in accepted:
            raise UserError(f"{group}={choice}: accepted are {', '.join(accepted)}")
    outlined = _outline_of_choices(config_folder, tuple(choices.items())).copy()
    for key, value in given.items():
        if key.startswith("recipe.") or key in ("trainer.total_training_steps", *NODES):
            OmegaConf.update(outlined, key, value)
    return outlined


@functools.cache  # --list asks for the same choices again and again
def _outline_of_choices(config_folder: Path, choices: tuple[tuple[str, str], ...]) -> DictConfig:
    files = recipe.config_files(config_folder, OmegaConf.create({"recipe": dict(choices)}))
    content = [yaml.safe_load(file.read_text()) for file in files]
    parts = [{"recipe": part.get("recipe") or {}} for part in content]
    parts += [
        {"trainer": {k: v for k, v in part.get("trainer", {}).items() if f"trainer.{k}" in NODES}} for part in content
    ]
    return OmegaConf.create(OmegaConf.merge({"trainer": {"total_training_steps": "${recipe.steps}"}}, *parts))


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
    console: Console | None = None,
) -> int:
    """Run, check or only list sets of runs. Exit code: 1 if a run is not valid or failed, 2 for a wrong request."""
    console = console or Console(stderr=on == "kubernetes")  # whose manifests are the output
    try:
        launch.check_place(on)
        manifest = read_manifest(recipes)
        sets = list({one.name: one for name in names for one in manifest.find(name)}.values())
        if list_sets:
            show_sets(recipes, manifest, sets or list(manifest.sets.values()), seeds, overrides, console)
            return 0
        if not sets:
            raise UserError(f"name what to reproduce: {', '.join([*manifest.sets, 'all'])}; --list says what they are")
        runs = plan(recipes, sets, seeds, overrides)
        if status:
            show_states(runs, {}, console)
            return 0
        if not check(recipes, runs, console, elsewhere=on, dry_run=dry_run):
            return 1
        if cost := resources.cost([run.left for run in runs if run.state != "finished"]):
            console.print(cost, highlight=False, soft_wrap=True)
        if dry_run:
            return 0
        return submit_all(recipes, runs, on, console) if on else run_all(recipes, runs, console)
    except UserError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 2


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
    for one in sets:
        runs = plan(recipes, [one], seeds, overrides)
        states = [run.state for run in runs]
        folders |= {run.folder for run in runs}
        finished, waiting = states.count("finished"), states.count("not begun")
        name = f"{one.name}\n({one.alias})" if one.alias else one.name
        begun = len(states) - finished - waiting
        table.add_row(name, str(len(states)), str(finished), str(begun), f"{one.title}: {one.paper}", one.known)
    console.print(table)
    console.print(f"{manifest.numbering}\n{len(folders)} different runs", highlight=False)


def show_states(runs: list[Run], codes: dict[Path, int], console: Console) -> None:
    """codes: exit codes of the runs that were started just now."""
    table = Table("run", "state")
    for run in runs:
        code = codes.get(run.folder, 0)
        failed = f"; failed with exit code {code}, see {run.folder}/train.log" if code else ""
        table.add_row(run.name, run.state + failed)
    console.print(table)
    states = [run.state for run in runs]
    console.print(f"{states.count('finished')} of {len(runs)} runs are finished", highlight=False)


def check(recipes: Path, runs: list[Run], console: Console, elsewhere: str, dry_run: bool) -> bool:
    """Whether verl accepts every run, and data and an environment are here if it starts here.

    Prints each thing that is wrong once. elsewhere: "slurm", where the data is needed too, or "kubernetes".
    """
    problems: dict[str, list[str]] = {}
    missing: dict[str, None] = {}  # as an ordered set
    for run in track(runs, "checking every run against verl", console=console, transient=True):
        try:
            config = recipe.compose(recipes / "config", run.overrides)
            unfit = launch.prepare_environment(recipes, config)
            recipe.validate(config)
        except UserError as error:
            problems.setdefault(str(error), []).append(run.name)
            continue
        data = None if recipe.is_cpu(config) else recipe.missing_files(config)  # the launcher makes the tiny data
        missing |= dict.fromkeys(filter(None, (data, None if elsewhere else unfit)))
    for message, names in problems.items():
        console.print(f"{', '.join(names)}:\n  {message}", style="red", markup=False, soft_wrap=True)
    on_cluster = os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")) or elsewhere == "kubernetes"
    needed = not dry_run and not on_cluster
    for message in missing:
        console.print(message, style="red" if needed else "yellow", markup=False, soft_wrap=True)
    valid = len(runs) - sum(map(len, problems.values()))
    console.print(f"{valid} of {len(runs)} runs are valid", highlight=False)
    return valid == len(runs) and not (needed and missing)


def run_all(recipes: Path, runs: list[Run], console: Console) -> int:
    """Run those that are not finished, in order. 1 if any failed, 130 after Ctrl-C."""
    for end in STOP_SIGNALS:  # `kill` ends the run in order, too
        signal.signal(end, signal.default_int_handler)
    codes: dict[Path, int] = {}
    stopped = False
    for number, run in enumerate(runs, 1):
        console.print(f"[{number}/{len(runs)}] {run.name}: {run.state}", markup=False, highlight=False)
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
        console.print("stopped; the same command goes on from there", highlight=False)
        return 130
    return 1 if any(codes.values()) else 0


def submit_all(recipes: Path, runs: list[Run], on: str, console: Console) -> int:
    """Submit each run that is not finished as a job of its own; kubernetes: print their manifests. 1 if any failed."""
    codes = []
    for run in runs:
        if run.state != "finished":
            if on == "kubernetes":
                print("---")
            codes.append(launch.launch(launch.Request(recipes, run.overrides, on=on), console))
    console.print(f"{codes.count(0)} of {len(codes)} jobs are made", highlight=False)
    return 1 if any(codes) else 0


# ------------------------------------------------------------------------------------------- every value, as Markdown


def values_table(config_folder: Path) -> str:
    """Every value of the recipes at scale=gpu with its source, ours first, as Markdown."""
    rows = []
    for group in ("", *recipe.GROUPS[:-1], "scale"):
        for file in sorted((config_folder / group).glob("*.yaml")):
            if file.name == "cpu.yaml":
                continue
            values = recipe.flatten(yaml.safe_load(file.read_text()))
            for key, _, comment in recipe.commented_values(file):
                source, _, why = comment.partition(":")
                if source in SOURCES:
                    cells = (source, f"`{key}`", f"`{values[key]}`", str(file.relative_to(config_folder)), why.strip())
                    rows.append((SOURCES.index(source), " | ".join(cell.replace("|", r"\|") for cell in cells)))
    lines = ["| source | key | value | file | why |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {cells} |" for _, cells in sorted(rows, key=lambda row: row[0]))])
