"""The command `vlnorm-verl report`."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from vlnorm_verl import extras


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Runs, or folders that hold runs; label=PATH or label@seed=PATH names a run.", metavar="RUN…"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/report"),
    metric: Annotated[
        str,
        typer.Option(
            help="The metric that counts as accuracy.",
            metavar="KEY",
            show_default="verl's mean@n of the validation sets",
        ),
    ] = "",
    baseline: Annotated[
        str,
        typer.Option(help="The method that the others are compared with.", metavar="METHOD", show_default="VL Norm"),
    ] = "",
    plot: Annotated[
        list[str] | None,
        typer.Option(
            help="Draw this metric too, or all of a pattern like 'timing_s/*'. May be given several times.",
            metavar="KEY",
        ),
    ] = None,
    smooth: Annotated[
        int | None,
        typer.Option(
            min=1,
            help='Steps of the trailing mean of training curves, and of the column "smoothed" of the steps to '
            "another's final accuracy; 1 for none. Curves of accuracies are never smoothed.",
            show_default="2% of the run; of that column three validations",
        ),
    ] = None,
    figures: Annotated[bool, typer.Option("--figures", help="Also draw PNG and SVG files; takes longer.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the tables, too.")] = False,
    watch: Annotated[
        float | None,
        typer.Option(min=1, help="Look for changes this often, and report them, until Ctrl-C.", metavar="SECONDS"),
    ] = None,
) -> None:
    """What verl's runs show, finished or running: which method is best, by how much, and whether that is established.

    For example:

        vlnorm-verl report runs                                    every run below runs/

        vlnorm-verl report runs --watch 60                         while they train

        vlnorm-verl report runs/a-seed0 runs/a-seed1 --out a       seeds of one method are taken together

        vlnorm-verl report token-mean@0=old.jsonl vl_norm@0=wandb/offline-run-1      runs of others, with their seeds

        vlnorm-verl report logs --metric val/test_score/gsm8k --baseline token-mean      other keys, no VL Norm

    Read: metrics-NNN.jsonl or another JSONL of verl's file logger, tensorboard folders, offline wandb runs; beside the
    metrics config.yaml or .hydra/config.yaml (what the run is) and validation/STEP.jsonl (trainer.validation_data_dir;
    without it there are no intervals over problems). A label that is a loss_agg_mode names the run's method.
    Without label and configuration, method and seed are read from the names of file and folders (vl_norm_s0).

    Written to --out: report.html (one file, needs no network), tables/NAME.{md,csv,json,tex}, with --figures
    figures/NAME.{png,svg}. The counts of validation dumps are kept there, so that the next report reads only those that
    changed; where nothing has changed at all, the report that is there stands.

    Exit code 0; 2 for a wrong request, also where no run is found.
    """
    extras.require("report")
    from rich.console import Console

    from vlnorm_verl.report import build

    request = build.Request(tuple(runs), out, smooth, metric, baseline, tuple(plot or ()), figures, verbose)
    console = Console()
    if watch is None:
        build.say(build.build(request, console), console)
        return
    with contextlib.suppress(KeyboardInterrupt):
        build.watch(request, watch, console)
