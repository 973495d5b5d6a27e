"""The command line `vlnorm-verl`. Each command is a thin layer over the module of its name."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="VL Norm (arXiv 2509.07558, ΔL Normalization) for stock verl.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """Keeps the sub-command's name needed, however many commands there are."""


@app.command()
def doctor(
    ray: Annotated[bool, typer.Option(help="Also ask a Ray worker (of RAY_ADDRESS, else of a local Ray).")] = True,
) -> None:
    """What is installed, whether verl has loaded the plugin, and what is missing for which use.

    Exit code 0 if loss_agg_mode=vl_norm works in this process and in a Ray worker, else 1.
    """
    from vlnorm_verl.doctor import examine

    raise typer.Exit(0 if examine(ask_ray=ray) else 1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def quickstart(
    context: typer.Context,
    mode: Annotated[str, typer.Option(help="Loss aggregation: vl_norm, vl_norm:0.75, token-mean …")] = "vl_norm",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 16 prompts x 8 responses.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of data order, sampling and optimizer.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="Data-parallel FSDP ranks, each with a vLLM of its own.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the run: log, metrics, checkpoint, table and figure.")] = Path(
        "runs/quickstart"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
) -> None:
    """Train the tiny CountDown model with verl on this machine's CPU, and show that it learns.

    Runs verl's own trainer (verl.trainer.main_ppo) with Ray, an FSDP2 actor and vLLM rollouts. Anything after `--`
    is passed to verl as Hydra overrides, for instance

        vlnorm-verl quickstart --steps 20 -- actor_rollout_ref.actor.optim.lr=3e-4
    """
    from vlnorm_verl.quickstart import Settings, run

    raise typer.Exit(
        run(Settings(mode=mode, steps=steps, seed=seed, ranks=ranks, out=out, resume=resume, overrides=context.args))
    )
