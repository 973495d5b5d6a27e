"""The command `vlnorm-verl report`."""

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
    smooth: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps of the trailing mean of curves and of the speed-up; 1 for none.",
            show_default="three validations",
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(help="What the accuracy is.", metavar="KEY", show_default="verl's mean@n of the validation sets"),
    ] = "",
    baseline: Annotated[
        str, typer.Option(help="What the others are compared with.", metavar="METHOD", show_default="VL Norm")
    ] = "",
) -> None:
    """The paper's tables and figures from verl's runs, finished or running, with 95% intervals.

        vlnorm-verl report runs                                    every run below runs/

        vlnorm-verl report runs/a-seed0 runs/a-seed1 --out a       seeds of one method are taken together

        vlnorm-verl report token-mean@0=old.jsonl vl_norm@0=wandb/offline-run-1      runs of others, with their seeds

        vlnorm-verl report logs --metric val/test_score/gsm8k --baseline token-mean      other keys, no VL Norm

    Read: metrics-NNN.jsonl or another JSONL of verl's file logger, tensorboard folders, offline wandb runs; beside the
    metrics config.yaml or .hydra/config.yaml (what the run is) and validation/STEP.jsonl (trainer.validation_data_dir;
    without it there are no intervals over problems). A label that is a loss_agg_mode is taken as the run's method;
    without a label and a configuration, a loss_agg_mode and a seed in the names of file and folders are (vl_norm_s0).

    Written to --out: report.html (one file, needs no network), tables/NAME.{md,csv,json,tex}, figures/NAME.{png,svg}.
    The counts of validation dumps are kept there, so that the next report reads only those that changed.

    Exit code 0, or 2 for a wrong request, which no run found is.
    """
    extras.require("report")
    from vlnorm_verl.report.build import build

    build(runs, out, smooth, metric=metric, baseline=baseline)
