"""What the user asked a launch for, and what the launcher itself sets for a start of it.

What is in the run's folder decides, too: a run that has begun goes on.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlnorm_verl.runs import clusters, smoke
from vlnorm_verl.runs import config as configs
from vlnorm_verl.runs.config import LOGGERS, override
from vlnorm_verl.runs.folder import completed_steps, validation_due
from vlnorm_verl.runs.process import next_metrics


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
    report: bool = False  # draw the report of the finished run

    @property
    def on_cluster(self) -> bool:
        """Whether the trainer finds a Ray cluster where it starts."""
        return bool(self.on or os.environ.get("RAY_ADDRESS"))


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


def settings(request: Request, asked: DictConfig, folder: Path) -> dict[str, Any]:
    """What the launcher sets for this start, {dotted key: value}: paths, loggers, what to validate, the cluster.

    asked: what the user's overrides alone compose to.
    folder: the run's; what is in it decides, too.
    """
    changed: dict[str, Any] = {f"recipe.{name}": str(absolute(asked.recipe[name])) for name in ("root", "data")}
    changed["recipe.folder"] = str(folder)
    if request.loggers:
        for name in request.loggers:
            configs.require(f"--logger {name}", name, LOGGERS)
        changed["trainer.logger"] = list(dict.fromkeys(["console", "file", *request.loggers]))
    done = completed_steps(folder)
    if request.smoke:
        changed |= smoke.settings(done)
    elif done:
        # It was validated when it began. What a crash has kept from being validated is, now.
        changed["trainer.val_before_train"] = validation_due(asked, folder)
        changed["trainer.val_only"] = done >= asked.trainer.total_training_steps
        # What it began from, another run's checkpoint say, it would go back to at each start.
        if (folder / "config.yaml").exists():
            first = OmegaConf.load(folder / "config.yaml").trainer
            if all(asked.trainer[key] == first[key] for key in ("resume_mode", "resume_from_path")):
                changed["trainer.resume_mode"] = "auto"
        # Of its own checkpoint it needs all, also where it left out the other run's optimizer (docs/scale.md).
        if "auto" in (asked.trainer.resume_mode, changed.get("trainer.resume_mode")):
            checkpoint = "actor_rollout_ref.actor.checkpoint"
            changed[f"{checkpoint}.load_contents"] = [*OmegaConf.select(asked, f"{checkpoint}.save_contents")]
    if asked.trainer.val_only and not request.smoke:
        changed |= {"trainer.val_only": True, "trainer.val_before_train": True}  # verl reads the first with the second
    if request.on_cluster:
        changed |= clusters.settings(asked, next_metrics(folder))
    return changed


def again(request: Request, config: DictConfig) -> list[str]:
    """The arguments of this launch for another machine: the same, with the same paths."""
    flags = ["--smoke"] if request.smoke else []
    flags += ["--report"] if request.report else []
    flags += [f"--logger={','.join(request.loggers)}"] if request.loggers else []
    # A job has a working directory of its own. --on starts in the project's folder, which may lie elsewhere there.
    keys = [] if request.on else ["recipe.root", "recipe.data", *([] if request.smoke else ["recipe.folder"])]
    paths = [override(key, OmegaConf.select(config, key)) for key in keys]
    return [*flags, *configs.without(request.overrides, *keys), *paths]
