"""`launch --smoke`: what a run takes on this node, measured by two starts of one step each, at full size.

In the first start every response is of full length (vLLM ignores the end-of-sequence token): the most memory that
update and log-probs can take. Then a checkpoint is saved. The second start loads it, trains on ordinary responses
and validates. Not covered: prompts of full length, and responses that grow in training.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from vlnorm_verl.runs.process import read_metrics
from vlnorm_verl.runs.resources import GB

STARTS = 2


def overrides(done: int) -> list[str]:
    """Of the start that goes on from step `done`."""
    common = [f"trainer.total_training_steps={done + 1}", "trainer.val_before_train=false", "trainer.val_only=false"]
    if done:
        return [*common, "trainer.save_freq=-1", "trainer.test_freq=1"]
    # With groups of equal outcome filtered, answers without an end might never fill a batch.
    worst = ["actor_rollout_ref.rollout.ignore_eos=true", "algorithm.filter_groups.enable=false"]
    return [*common, *worst, "trainer.save_freq=1", "trainer.test_freq=-1"]


def table(folder: Path, config: DictConfig, second_start: float) -> Table:
    """Memory, seconds and disk of both starts, and what the whole run takes by them.

    config: the run's own, not the smoke's.
    second_start: seconds of all of it.
    """
    worst, usual = (record["data"] for record in read_metrics(folder))
    found = Table("", "all of full length", "ordinary", title=f"{config.recipe.name}, two steps at full size")

    def row(name: str, key: str, unit: str) -> None:
        if key in worst or key in usual:
            found.add_row(name, *(f"{data[key]:.1f} {unit}" if key in data else "" for data in (worst, usual)))

    row("response length, mean (it grows in training)", "response_length/mean", "tokens")
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
    found.add_row("seconds: start, with a checkpoint loaded, and end", "", f"{start:.1f} s")

    steps, trainer = config.trainer.total_training_steps, config.trainer
    extra = sum(
        seconds * (steps // every)
        for seconds, every in ((save, trainer.save_freq), (test, trainer.test_freq))
        if every > 0
    )
    hours = [(steps * seconds + extra) / 3600 for seconds in (worst["timing_s/step"] - save, usual["timing_s/step"])]
    found.add_row(f"{steps} steps like this one, validated and saved", *(f"{value:.1f} h" for value in hours))

    files = [file for file in (folder / "checkpoints").rglob("*") if file.is_file()]
    sizes = [
        sum(file.stat().st_size for file in part) / GB
        for part in (files, [f for f in files if not f.name.startswith("optim_")])
    ]
    found.add_row("disk: a checkpoint; when finished, without the optimizer", *(f"{size:.3g} GB" for size in sizes))
    return found
