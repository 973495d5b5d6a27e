"""`launch --smoke`: what a run takes on this node, measured by two starts of one step each, at full size.

In the first start every response is of full length (vLLM ignores the end-of-sequence token): the most memory that
update and log-probs can take. Then a checkpoint is saved. The second start loads it, trains on ordinary responses
and validates. Not covered: prompts of full length, and responses that grow in training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from vlnorm_verl.runs.process import read_metrics
from vlnorm_verl.runs.resources import GB

STARTS = 2


def settings(done: int) -> dict[str, Any]:
    """What is set for the start that goes on from step `done`."""
    trainer: dict[str, Any] = {"total_training_steps": done + 1, "val_before_train": False, "val_only": False}
    trainer |= {"save_freq": -1, "test_freq": 1} if done else {"save_freq": 1, "test_freq": -1}
    changed = {f"trainer.{key}": value for key, value in trainer.items()}
    if not done:
        # With groups of equal outcome filtered, answers without an end might never fill a batch.
        changed |= {"actor_rollout_ref.rollout.ignore_eos": True, "algorithm.filter_groups.enable": False}
    return changed


def table(folder: Path, config: DictConfig, second_start: float) -> Table:
    """Memory, seconds and disk of both starts, and what the whole run takes by them.

    config: the run's own, not the smoke's.
    second_start: seconds of all of it.
    """
    worst, usual = (record["data"] for record in read_metrics(folder))
    sheet = Table("", "all of full length", "ordinary", title=f"{config.recipe.name}, two steps at full size")

    def row(name: str, key: str, unit: str, digits: int = 1) -> None:
        if key in worst or key in usual:
            sheet.add_row(name, *(f"{data[key]:.{digits}f} {unit}" if key in data else "" for data in (worst, usual)))

    row("response length, mean (it grows in training)", "response_length/mean", "tokens")
    # 1 up to rounding, or vLLM samples from another model than is trained.
    row("correlation of token probabilities, vLLM and actor", "training/rollout_actor_probs_pearson_corr", "", 4)
    row("GPU memory, most allocated by the actor", "actor/perf/max_memory_allocated_gb", "GB")
    row("GPU memory, most reserved by the actor", "actor/perf/max_memory_reserved_gb", "GB")
    row("host memory", "actor/perf/cpu_memory_used_gb", "GB")
    for key, name in (
        ("step", "step"),
        ("gen", "generation"),
        ("old_log_prob", "old log-probabilities"),
        ("update_actor", "update"),
        ("update_weights", "weight sync"),
        ("save_checkpoint", "checkpoint, saved"),
        ("testing", "validation"),
    ):
        row(f"seconds: {name}", f"timing_s/{key}", "s")
    save, test = worst["timing_s/save_checkpoint"], usual["timing_s/testing"]
    start = second_start - usual["timing_s/step"] - test
    sheet.add_row("seconds: start, with a checkpoint loaded, and end", "", f"{start:.1f} s")

    steps, trainer = config.trainer.total_training_steps, config.trainer
    extra = sum(
        seconds * (steps // every)
        for seconds, every in ((save, trainer.save_freq), (test, trainer.test_freq))
        if every > 0
    )
    hours = [(steps * seconds + extra) / 3600 for seconds in (worst["timing_s/step"] - save, usual["timing_s/step"])]
    sheet.add_row(f"{steps} steps like this one, validated and saved", *(f"{value:.1f} h" for value in hours))

    files = [file for file in (folder / "checkpoints").rglob("*") if file.is_file()]
    sizes = [
        sum(file.stat().st_size for file in part) / GB
        for part in (files, [f for f in files if not f.name.startswith("optim_")])
    ]
    sheet.add_row("disk: a checkpoint; when finished, without the optimizer", *(f"{size:.3g} GB" for size in sizes))
    return sheet
