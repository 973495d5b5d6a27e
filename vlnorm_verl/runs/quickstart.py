"""`vlnorm-verl quickstart`: train the tiny CountDown model with verl on a CPU, and show what came out.

verl.trainer.main_ppo does the training, as a process of its own with `quickstart.yaml` and the environment of the CPU
stack. This module makes the data, follows the JSON lines that verl's file logger writes, and ends with a table, a
figure and `summary.json`. Files in the folder of a run:

    data/               train.parquet, test.parquet
    train.log           everything that verl, Ray and vLLM print
    metrics-NNN.jsonl   verl's metrics, one file per start (a resumed run begins a new one)
    checkpoints/        verl's checkpoints
    settings.json       what --resume must not change
    summary.json, learning_curve.png

Covered: one machine, local Ray. Not covered: clusters, other tasks.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from vlnorm_verl.cpu import cpu_environment
from vlnorm_verl.plugin import STOCK_MODES
from vlnorm_verl.registry import parse_mode
from vlnorm_verl.runs.process import (
    STOP_SIGNALS,
    Record,
    TrainingFailed,
    average_at_8,
    last_lines,
    locked,
    next_metrics,
    progress_line,
    read_metrics,
    train,
    write_json,
)
from vlnorm_verl.runs.recipe import override

CONFIG_FOLDER = Path(__file__).parents[1] / "cpu" / "config"
MODEL_FOLDER = Path(__file__).parents[1] / "tasks" / "tiny" / "weights"
REWARD_FILE = Path(__file__).parents[1] / "tasks" / "tiny" / "countdown.py"
CHECKPOINT_EVERY = 20  # steps
SETTINGS_FILE = "settings.json"
TRAIN_PROMPTS, TEST_PROMPTS = 4096, 128


@dataclass(frozen=True)
class Settings:
    """One run. `mode` is the value of loss_agg_mode, `overrides` are Hydra overrides of verl's config."""

    mode: str = "vl_norm"
    steps: int = 60
    seed: int = 0
    ranks: int = 1
    out: Path = Path("runs/quickstart")
    resume: bool = False
    overrides: list[str] = field(default_factory=list)


def run(settings: Settings, console: Console | None = None) -> int:
    """Train, then print the table and write the figure. Returns the exit code."""
    console = console or Console()
    problem = check(settings)
    if problem:
        console.print(problem, style="red", markup=False)
        return 2
    # As Ctrl-C, also where a shell or a scheduler made this process ignore that: nothing of the run may stay behind.
    for end in STOP_SIGNALS:
        signal.signal(end, signal.default_int_handler)
    settings.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(locked(settings.out))
        except BlockingIOError:
            console.print(f"--out {settings.out}: another run is writing there; choose another folder", style="red")
            return 2
        return _run(settings, console, lock)


def check(settings: Settings) -> str | None:
    """What is wrong with the settings, in one message; None if nothing is."""
    if settings.mode not in STOCK_MODES:
        try:
            parse_mode(settings.mode, "--mode", also_accepted=STOCK_MODES)
        except ValueError as error:
            return str(error)
    begun = any(settings.out.glob("metrics-*.jsonl"))
    if begun and not settings.resume:
        return f"--out {settings.out} holds a run; add --resume to go on with it, or choose another folder"
    if settings.resume and not begun:
        return f"--resume: there is no run in --out {settings.out}"
    if settings.resume:
        first = json.loads((settings.out / SETTINGS_FILE).read_text())
        for name, value in kept(settings).items():
            if value != first[name]:
                return f"--resume: the run in {settings.out} was begun with {name} {first[name]!r}, not {value!r}"
    return None


def resume_command(settings: Settings) -> str:
    """What to type to go on with a run."""
    options = [f"--{name}={getattr(settings, name)}" for name in ("mode", "steps", "seed", "ranks", "out")]
    return shlex.join(["bash", "recipes/quickstart.sh", *options, "--resume", *settings.overrides])


def kept(settings: Settings) -> dict[str, Any]:
    """What a resumed run must have in common with its beginning."""
    return {
        "mode": settings.mode,
        "seed": settings.seed,
        "ranks": settings.ranks,
        "overrides": list(settings.overrides),
    }


def command(settings: Settings) -> list[str]:
    """The command line of verl's trainer."""
    folder = settings.out.resolve()
    # Texts that may have any characters.
    texts = {
        "hydra.run.dir": folder,
        "actor_rollout_ref.actor.loss_agg_mode": settings.mode,
        "actor_rollout_ref.model.path": MODEL_FOLDER,
        "data.train_files": folder / "data" / "train.parquet",
        "data.val_files": folder / "data" / "test.parquet",
        "reward.custom_reward_function.path": REWARD_FILE,
        "trainer.default_local_dir": folder / "checkpoints",
    }
    return [
        sys.executable,
        "-m",
        "verl.trainer.main_ppo",
        f"--config-path={CONFIG_FOLDER}",
        "--config-name=quickstart",
        "hydra.searchpath=[pkg://verl.trainer.config]",
        *(override(key, str(text)) for key, text in texts.items()),
        f"data.seed={settings.seed}",
        f"actor_rollout_ref.rollout.seed={settings.seed}",
        f"actor_rollout_ref.actor.data_loader_seed={settings.seed}",
        f"actor_rollout_ref.actor.fsdp_config.seed={settings.seed}",
        f"trainer.n_gpus_per_node={settings.ranks}",
        f"trainer.total_training_steps={settings.steps}",
        f"trainer.test_freq={settings.steps}",
        f"trainer.save_freq={min(CHECKPOINT_EVERY, settings.steps)}",
        f"trainer.resume_mode={'auto' if settings.resume else 'disable'}",
        f"trainer.val_before_train={not settings.resume}",
        *settings.overrides,
    ]


def make_data(folder: Path) -> None:
    """The task's files. The same for every seed of a run: seeds are compared on the same held-out prompts."""
    from vlnorm_verl.tasks.base import write_parquet
    from vlnorm_verl.tasks.tiny.data import rows

    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(rows(TRAIN_PROMPTS, 0, "train"), folder / "train.parquet")
    write_parquet(rows(TEST_PROMPTS, 0, "test"), folder / "test.parquet")


def _run(settings: Settings, console: Console, lock: IO[str]) -> int:
    if not settings.resume:
        make_data(settings.out / "data")
        write_json(settings.out / SETTINGS_FILE, {**kept(settings), "steps": settings.steps})
    metrics = next_metrics(settings.out)
    log = settings.out / "train.log"
    console.print(f"{settings.mode}, seed {settings.seed}: verl's log goes to {log}", markup=False)

    start = time.monotonic()
    status = console.status("starting Ray, the FSDP2 actor and the vLLM engine …")
    status.start()
    try:
        with contextlib.closing(train(command(settings), cpu_environment(), metrics, log, lock)) as records:
            for record in records:
                status.update(f"{time.monotonic() - start:.0f} s")
                if line := progress_line(record, settings.steps):
                    console.print(line, markup=False, highlight=False)
    except KeyboardInterrupt:
        begun = any((settings.out / "checkpoints").glob("global_step_*"))
        hint = "go on from the last checkpoint" if begun else "no checkpoint yet; begin again"
        console.print(f"stopped; {hint} with:\n  {resume_command(settings)}", markup=False, soft_wrap=True)
        return 130
    except TrainingFailed as error:
        console.print(f"{error}\nThe end of {log}:", style="red", markup=False)
        console.print("".join(last_lines(log)), markup=False, highlight=False)
        return 1
    finally:
        status.stop()
    history = read_metrics(settings.out)
    summary = summarize(history, settings, seconds=time.monotonic() - start)
    write_json(settings.out / "summary.json", summary)
    console.print(summary_table(summary))
    draw(history, settings.mode, settings.out / "learning_curve.png")
    console.print(f"learning curve: {settings.out / 'learning_curve.png'}", markup=False)
    return 0


# ---------------------------------------------------------------------------------------------------------- results


def summarize(records: list[Record], settings: Settings, seconds: float) -> dict[str, Any]:
    """The numbers of the table. Accuracies are Avg@8 on held-out prompts; `seconds` of this start only."""
    validated = [(r["step"], a) for r in records if (a := average_at_8(r["data"])) is not None]
    steps = [r["data"] for r in records if "critic/score/mean" in r["data"]]

    def over(name: str, part: list[dict[str, float]]) -> float:
        return statistics.fmean(d[name] for d in part) if part else float("nan")

    first, last = steps[:10], steps[-10:]
    return {
        "mode": settings.mode,
        "seed": settings.seed,
        "ranks": settings.ranks,
        "steps": len(steps),
        "avg_at_8_before": validated[0][1] if validated else None,
        "avg_at_8_after": validated[-1][1] if len(validated) > 1 else None,
        "train_reward_first_10": over("critic/score/mean", first),
        "train_reward_last_10": over("critic/score/mean", last),
        "length_mean_first_10": over("response_length/mean", first),
        "length_mean_last_10": over("response_length/mean", last),
        "seconds_total": seconds,
        "seconds_per_step": statistics.median(d["timing_s/step"] for d in steps) if steps else None,
    }


def summary_table(summary: dict[str, Any]) -> Table:
    def number(value: float | None, digits: int = 3) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    table = Table("", "before", "after", title=f"{summary['mode']}, seed {summary['seed']}, {summary['steps']} steps")
    table.add_row("Avg@8, held-out prompts", number(summary["avg_at_8_before"]), number(summary["avg_at_8_after"]))
    table.add_row(
        "training reward (first, last 10 steps)",
        number(summary["train_reward_first_10"]),
        number(summary["train_reward_last_10"]),
    )
    table.add_row(
        "response length (first, last 10 steps)",
        number(summary["length_mean_first_10"], 1),
        number(summary["length_mean_last_10"], 1),
    )
    table.add_row("seconds: total, a step", number(summary["seconds_total"], 0), number(summary["seconds_per_step"], 1))
    return table


def draw(records: list[Record], mode: str, path: Path) -> None:
    """The learning curve: reward and validation accuracy above, response lengths below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [r for r in records if "critic/score/mean" in r["data"]]
    validated = [(r["step"], a) for r in records if (a := average_at_8(r["data"])) is not None]
    x = [r["step"] for r in steps]
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    above.plot(x, [r["data"]["critic/score/mean"] for r in steps], color="#0072B2", label="training reward")
    if validated:
        above.plot(*zip(*validated, strict=True), "D", color="#D55E00", label="validation Avg@8, held-out prompts")
    above.set(ylabel="accuracy", ylim=(0, 1), title=f"tiny CountDown, loss_agg_mode={mode}")
    above.legend(loc="lower right", frameon=False)
    below.plot(x, [r["data"]["response_length/mean"] for r in steps], color="#0072B2", label="arithmetic mean A")
    harmonic = [(r["step"], h) for r in steps if (h := r["data"].get("actor/vl_norm/length_harmonic_mean"))]
    if harmonic:
        below.plot(*zip(*harmonic, strict=True), color="#009E73", label="harmonic mean H (mean of the mini-batches)")
    below.set(xlabel="step", ylabel="response length, tokens", ylim=(0, None))
    below.legend(loc="upper right", frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
