"""The command `vlnorm-verl report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[str], typer.Argument(help="Runs, or folders that hold runs; label=PATH names a run.", metavar="RUN…")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/report"),
    smooth: Annotated[
        int, typer.Option(min=1, help="Validations in the trailing mean of curves and of the speed-up; 1 for none.")
    ] = 3,
) -> None:
    """The paper's tables and figures from verl's runs, finished or running, with 95% intervals.

        vlnorm-verl report runs                                    every run below runs/

        vlnorm-verl report runs/a-seed0 runs/a-seed1 --out a       seeds of one method are taken together

        vlnorm-verl report token-mean=old.jsonl mine=wandb/offline-run-1      runs that this project did not start

    Read: metrics-NNN.jsonl or another JSONL of verl's file logger, tensorboard folders, offline wandb runs; beside the
    metrics config.yaml or .hydra/config.yaml (what the run is) and validation/STEP.jsonl (trainer.validation_data_dir;
    without it there are no intervals over problems). A label that is a loss_agg_mode is taken as the run's method.

    Written to --out: report.html (one file, needs no network), tables/NAME.{md,csv,json,tex}, figures/NAME.{png,svg}.
    The counts of validation dumps are kept there, so that the next report reads only those that changed.

    Exit code 0, or 2 for a wrong request, which no run found is.
    """
    from vlnorm_verl.report.report import build

    raise typer.Exit(build(runs, out, smooth))
