"""The folder of a run, on a disk that every node sees: what is in it, how far the run is, which later start fits.

config.yaml         the whole configuration of the first start; a later start must agree with it
checkpoints/        verl's; the same command again goes on from the last
rollouts/, validation/    every response, as verl dumps them
train.log, metrics-NNN.jsonl, .lock      see vlnorm_verl/running.py
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vlnorm_verl import recipe
from vlnorm_verl.recipe import RecipeError

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
