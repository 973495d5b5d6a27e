"""What the quickstart learns, over seeds: the table and the figure of docs/results/quickstart.md.

    python benchmarks/quickstart_seeds.py [--seeds 3] [--steps 60] [--out runs/seeds]

Trains one quickstart for each seed (a seed that has finished in --out is not repeated), prints the table and writes it
and the figure into --out, from where quickstart_seeds.json is copied to benchmarks/results and quickstart.png to docs.
The spread is the sample standard deviation over seeds; every seed has its own order of prompts, its own samples and its
own validation samples, on the same 128 held-out prompts and from the same warm-started weights.
"""

import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from origin import ROOT, origin
from rich.console import Console
from rich.table import Table

from vlnorm_verl.files import write, write_json
from vlnorm_verl.methods import BLUE, GREEN, VERMILION
from vlnorm_verl.report.measures import trailing_mean
from vlnorm_verl.report.style import Figure, render, use_style
from vlnorm_verl.runs.process import read_metrics
from vlnorm_verl.runs.progress import LENGTH, REWARD, summarize

WINDOW = 5  # steps
ROWS = {
    "avg_at_8_before": "Avg@8 before",
    "avg_at_8_after": "Avg@8 after",
    "gain": "gain",
    "length_mean_first_10": "response length, first 10 steps",
    "length_mean_last_10": "response length, last 10 steps",
    "seconds_per_step": "seconds a step (median)",
    "seconds_total": "seconds, whole quickstart",
}


def summary_of(folder: Path, seed: int, seconds: float) -> dict[str, Any]:
    """The numbers of one run; seconds: of its whole command."""
    found = summarize(read_metrics(folder))
    ((before, after),) = found["accuracy"].values()
    return {
        "seed": seed,
        "steps": found["steps"],
        "avg_at_8_before": before,
        "avg_at_8_after": after,
        "train_reward_first_10": found["reward"][0],
        "train_reward_last_10": found["reward"][1],
        "length_mean_first_10": found["length"][0],
        "length_mean_last_10": found["length"][1],
        "seconds_total": seconds,
        "seconds_per_step": found["seconds_per_step"],
    }


def figure(runs: list[Path], summaries: list[dict[str, Any]]) -> Figure:
    with use_style():
        import matplotlib.pyplot as plt

        canvas, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
        for folder, summary in zip(runs, summaries, strict=True):
            records = [record for record in read_metrics(folder) if REWARD in record["data"]]
            steps = np.array([record["step"] for record in records])
            reward, mean, harmonic = (
                np.array([record["data"][key] for record in records])
                for key in (REWARD, LENGTH, "actor/vl_norm/length_harmonic_mean")
            )
            accuracies = [summary["avg_at_8_before"], summary["avg_at_8_after"]]
            left.plot(steps, trailing_mean(steps, reward, WINDOW), color=BLUE, alpha=0.8)
            left.plot([0, summary["steps"]], accuracies, "D", color=VERMILION)
            right.plot(steps, mean, color=BLUE, alpha=0.8)
            right.plot(steps, harmonic, color=GREEN, alpha=0.8)
        left.set(xlabel="step", ylabel="accuracy", ylim=(0, 1))
        right.set(xlabel="step", ylabel="response length, tokens", ylim=(0, None))
        # The lines of the first seed stand for all.
        left.legend(left.lines[:2], [f"training reward, mean of {WINDOW} steps", "validation Avg@8"])
        right.legend(right.lines[:2], ["arithmetic mean A", "harmonic mean H of a mini-batch"])
        title = f"quickstart: tiny CountDown, vl_norm, {len(runs)} seeds"
        canvas.suptitle(title)
    return render(canvas, "quickstart", title, "")


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Seeds 0, 1, … to run.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each.")] = 60,
    out: Annotated[Path, typer.Option(help="Folder of the runs, one sub-folder a seed.")] = Path("runs/seeds"),
) -> None:
    """Run the quickstart for several seeds and report mean and spread."""
    runs = [out / f"seed{seed}" for seed in range(seeds)]
    for seed, folder in enumerate(runs):
        if not (folder / "summary.json").exists():
            if folder.exists():
                raise typer.BadParameter(f"{folder} has a run that was stopped, so its time is not known: remove it")
            given = [f"recipe.seed={seed}", f"recipe.steps={steps}", f"recipe.folder={folder.resolve()}"]
            begin = time.monotonic()
            if code := subprocess.call(["bash", str(ROOT / "recipes" / "quickstart.sh"), *given]):
                raise typer.Exit(code)
            write_json(folder / "summary.json", summary_of(folder, seed, time.monotonic() - begin))
    summaries: list[dict[str, Any]] = [json.loads((folder / "summary.json").read_text()) for folder in runs]
    for summary in summaries:
        summary["gain"] = summary["avg_at_8_after"] - summary["avg_at_8_before"]

    table = Table("", *(f"seed {s['seed']}" for s in summaries), "mean", "sd", title=f"{steps} steps of vl_norm")
    for key, name in ROWS.items():
        values = [summary[key] for summary in summaries]
        digits = 0 if key == "seconds_total" else 1 if key.startswith(("length", "seconds")) else 3
        numbers = [*values, statistics.fmean(values), statistics.stdev(values)]
        table.add_row(name, *(f"{value:.{digits}f}" for value in numbers))
    Console().print(table)

    write_json(out / "quickstart_seeds.json", {**origin(), "runs": summaries})
    write(out / "quickstart.png", figure(runs, summaries).png)


if __name__ == "__main__":
    typer.run(main)
