"""The command line `vlnorm-verl`. Each command is a thin layer over the module of its name.

What a command raises as UserError is printed here, without a traceback, and the exit code is 2.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from vlnorm_verl import __version__, extras
from vlnorm_verl.files import UserError
from vlnorm_verl.lab.cli import lab_app
from vlnorm_verl.report.cli import report
from vlnorm_verl.tasks.cli import data_app


class Commands(typer.core.TyperGroup):
    """All commands, those of sub-groups too."""

    def invoke(self, context: Any) -> Any:
        try:
            with extras.named_if_missing():
                return super().invoke(context)
        except UserError as error:
            typer.secho(str(error), fg="red", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    help="VL Norm (arXiv 2509.07558, ΔL Normalization) for stock verl.\n\n"
    "A run of yours needs none of these commands: set actor_rollout_ref.actor.loss_agg_mode=vl_norm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.add_typer(data_app, name="data")
app.add_typer(lab_app, name="lab")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vlnorm-verl {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version; stop.")
    ] = False,
) -> None:
    """The options that need no command."""


def _in_its_environment(command: Callable[[], int]) -> None:
    """Exits with the command's code, or becomes the same command line in the environment that the run belongs into."""
    from vlnorm_verl.machine import Elsewhere

    try:
        raise typer.Exit(command())
    except Elsewhere as there:
        typer.echo(str(there), err=True)
        os.execv(there.python, [there.python, "-m", "vlnorm_verl", *sys.argv[1:]])


def _recipes(folder: Path) -> Path:
    if not (folder / "config" / "recipe.yaml").is_file():
        raise typer.BadParameter(
            f"{folder.absolute()} has no config/recipe.yaml, as the folder recipes/ of a checkout has"
        )
    return folder


def _default_recipes() -> Path:
    """Those of the checkout that the command is called in, else the copy that is installed with the package."""
    here = Path("recipes")
    return here if (here / "config" / "recipe.yaml").is_file() else Path(__file__).parent / "recipes"


Recipes = Annotated[
    Path,
    typer.Option(
        callback=_recipes,
        default_factory=_default_recipes,
        show_default="./recipes, else the package's",
        help="The folder recipes/ of a checkout of this project.",
    ),
]


@app.command()
def doctor(
    ray: Annotated[bool, typer.Option(help="Also ask a Ray worker (of RAY_ADDRESS, else of a local Ray).")] = True,
) -> None:
    """What is installed, whether verl has loaded the plugin, and what is missing for which use.

    Exit code 0 if loss_agg_mode=vl_norm works in this process and in a Ray worker, else 1.
    """
    from vlnorm_verl.doctor import examine

    raise typer.Exit(0 if examine(ask_ray=ray) else 1)


On = Annotated[str, typer.Option(help="slurm: submit with sbatch. kubernetes: print a RayJob manifest.")]


@app.command()
def launch(
    recipes: Recipes,
    overrides: Annotated[list[str] | None, typer.Argument(help="Choices and Hydra overrides, key=value.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every value, its source, the command; check; stop.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Two steps, the first the worst case: print memory, time, disk; stop.")
    ] = False,
    logger: Annotated[
        str, typer.Option(help="Log to these too, beside console and file: wandb,tensorboard,trackio,swanlab,mlflow.")
    ] = "",
    on: On = "",
    report: Annotated[
        bool, typer.Option("--report", help="Write the run's report into its folder when the run is finished.")
    ] = False,
    python: Annotated[bool, typer.Option("--python", help="Print the Python that this run takes; stop.")] = False,
) -> None:
    """Run one experiment of the paper on verl (what recipes/*.sh call).

    Choices:

        family=aggregation|dapo|quickstart   task=countdown|math   length=3072|8192
        model=3b|7b|tiny                              (tiny: on this machine's CPU, responses of 128|256 tokens)
        attention=flash|sdpa                                              (sdpa: without the package flash-attn; slower)
        method=grpo_norm|dapo_norm|dr_grpo_norm|dr_grpo|vl_norm           (family=aggregation, quickstart)
        method=dapo|overlong_filtering|soft_punishment|vl_norm            (family=dapo, length=3072)
        method=dapo_norm_as_coded|vl_norm_as_coded                        (as the authors' code has them)

    Any other key=value is a Hydra override of verl's configuration, for instance

        trainer.n_gpus_per_node=4   trainer.nnodes=2   recipe.seed=1   recipe.steps=500   recipe.alpha=0.5

    The run is on this machine; with RAY_ADDRESS=host:port on that Ray cluster; with RAY_ADDRESS=http://host:8265 it is
    submitted there as a Ray job. The same command again continues after a crash, and does nothing when the run is done.
    """
    from vlnorm_verl.runs.launch import launch as run
    from vlnorm_verl.runs.request import Request

    loggers = [name for name in logger.split(",") if name]
    request = Request(recipes, list(overrides or []), dry_run, smoke, loggers, on, python, report)
    _in_its_environment(lambda: run(request))


@app.command()
def reproduce(
    recipes: Recipes,
    what: Annotated[
        list[str] | None, typer.Argument(help="Sets of runs; then choices and Hydra overrides, key=value.")
    ] = None,
    list_sets: Annotated[bool, typer.Option("--list", help="Print the sets and how far they are; stop.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Print how far each run is; stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check each run against verl; stop.")] = False,
    seeds: Annotated[str, typer.Option(help="Seeds of each run, as in 0,1,2.")] = "",
    on: On = "",
) -> None:
    """Run the paper's experiments by table and figure (recipes/manifest.yaml): one after the other, or --on as jobs.

    Sets: countdown (table2), math (table3), alpha (table4), dapo (table5), as_coded, fig2, fig3, each, all.

    A run that is finished is skipped, one that was begun continues, one that fails does not end the rest. key=value
    goes to every run, over the manifest's own: trainer.n_gpus_per_node=4, model=tiny, or model=3b for its runs only.

    Exit code 0 if no run failed (--dry-run: if all are valid), 1 if one did, 2 for a wrong request, 130 after Ctrl-C.
    """
    from vlnorm_verl.runs import reproduce as module

    names = [word for word in what or [] if "=" not in word]
    overrides = [word for word in what or [] if "=" in word]
    numbers = module.parse_seeds(seeds)
    _in_its_environment(lambda: module.reproduce(recipes, names, overrides, numbers, list_sets, status, dry_run, on))


app.command()(report)
