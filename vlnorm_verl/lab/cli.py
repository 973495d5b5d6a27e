"""``vlnorm-verl lab run`` and ``vlnorm-verl lab report``. Light to import: ``vlnorm-verl --help`` reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlnorm_verl import extras
from vlnorm_verl.files import UserError, locked

lab_app = typer.Typer(
    help="The gradient lab: does variance grow with length, is VL Norm unbiased, and which α for your model and task?",
    no_args_is_help=True,
)
MiniBatch = Annotated[int, typer.Option(min=1, help="Responses in your mini-batch; the best α depends on it.")]


@lab_app.command()
def run(
    model: Annotated[str, typer.Argument(help="Hub name or folder of a causal LM, or a verl checkpoint's folder.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of this model's rollouts and gradients.")],
    task: Annotated[str, typer.Option(help="tiny, countdown, math, or custom with --reward.")] = "tiny",
    data: Annotated[
        Path | None, typer.Option(help="Parquet file of `vlnorm-verl data`; for custom, any in verl's format.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(help="pkg://module or file of a reward, as verl's custom_reward_function.")
    ] = None,
    reward_name: Annotated[str, typer.Option(help="The function in it.")] = "compute_score",
    no_chat_template: Annotated[
        bool,
        typer.Option(
            "--no-chat-template",
            help="Prompts as they are, as in the recipes, not in the tokenizer's chat template, as in verl.",
        ),
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            help="Parameters: last-qkv, all, or a regular expression on their names. May be given several times.",
            show_default="last-qkv",
        ),
    ] = None,
    slope_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts with many responses each: exponent β of the variance.")
    ] = 16,
    slope_responses: Annotated[int, typer.Option(min=3, help="Responses to each of them.")] = 32,
    pool_prompts: Annotated[int, typer.Option(min=4, help="Prompts with few responses each: mini-batches.")] = 64,
    pool_responses: Annotated[int, typer.Option(min=2, help="Responses to each of them, as rollout.n.")] = 8,
    max_response_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens after which a response is cut, as in training.", show_default="256 for tiny, else 3072"
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the sampling, as in training.")] = 1.0,
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Responses sampled at a time by transformers.")] = 64,
    projection: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Numbers that each gradient is projected to; 0: never.",
            show_default="only gradients above 1,000,000 entries",
        ),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Gradient checkpointing: less memory for --modules all, and more time."),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts and the sampling.")] = 0,
    mini_batch: MiniBatch = 320,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not write OUT/report.")] = False,
) -> None:
    """Sample responses, compute each one's gradient, and say what they tell.

    The same command again continues where it was stopped. For a run of verl, give …/global_step_N: its checkpoint is
    merged with verl's own tool. Several models at once: `vlnorm-verl lab report`.

      vlnorm-verl lab run Qwen/Qwen2.5-3B --task countdown --data data/countdown/train.parquet --no-chat-template
        --out runs/lab/3b
      vlnorm-verl lab run runs/mine/checkpoints/global_step_60 --task countdown --data data/countdown/train.parquet
        --no-chat-template --out runs/lab/step60
      vlnorm-verl lab run MODEL --task custom --data train.parquet --reward my_reward.py --out runs/lab/mine
    """
    extras.require("lab")
    import torch

    from vlnorm_verl.lab import gradients, models, rollouts, tasks
    from vlnorm_verl.lab.build import build

    design = rollouts.Design(slope_prompts, slope_responses, pool_prompts, pool_responses)
    longest = max_response_length or (256 if task == "tiny" else 3072)
    chosen = tasks.load_task(task, data, reward, reward_name)
    choices = modules or [gradients.LAST_QKV]
    try:
        with locked(out):
            skeleton = models.skeleton(models.load_config(models.resolve(model, out)))
            for choice in choices:
                gradients.choose(skeleton, choice, projection)  # what it refuses is refused before hours of sampling
            template = not no_chat_template
            rollouts.sample(model, chosen, design, seed, temperature, longest, engine, out, batch_size, template)
            for choice in choices:
                gradients.compute(out, choice, projection, checkpointing)
            if not no_report:
                build({out.resolve().name: out}, out / "report", mini_batch, seed)
    except BlockingIOError:
        raise UserError(f"--out {out}: another `vlnorm-verl lab run` writes into it; take another") from None
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The GPU's memory is full. Gradients of fewer parameters (--modules) need less of it, those of --modules "
            f"all less with --checkpointing; sampling by transformers needs less with a smaller --batch-size. {error}"
        ) from None


@lab_app.command()
def report(
    folders: Annotated[list[str], typer.Argument(help="Folders of `vlnorm-verl lab run`, or NAME=FOLDER.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Where to write the page, tables and figures.")],
    mini_batch: MiniBatch = 320,
    seed: Annotated[int, typer.Option(min=0, help="Of the mini-batches that are drawn and of the bootstrap.")] = 0,
) -> None:
    """Compare models, such as checkpoints of one run, by their stored gradients.

    vlnorm-verl lab report start=runs/lab/start end=runs/lab/step60 --out runs/lab/report
    """
    extras.require("lab")
    from vlnorm_verl.lab.build import build, named

    build(named(folders), out, mini_batch, seed)
