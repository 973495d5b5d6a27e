"""Seconds of the CPU stack: start to ready, a training step with its parts, and vLLM alone beside the trainer's vLLM.

    python benchmarks/cpu_stack.py [--steps 8] [--ranks 1] [--against CHECKOUT --rounds 3] [HYDRA OVERRIDE …]

The work: 16 prompts × 8 responses × 128 tokens (end-of-sequence ignored, so every response has its full length), a
Qwen2 of 1.1 M random parameters in float32, one optimizer step per batch, vl_norm. Run it with nothing else on the
machine; the first two steps are left out of the medians. vLLM alone: the same responses by its offline class, with as
many threads as there are cores, the best of three. --against takes turns with the package of another checkout, so that
the ratios are of one run.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from origin import ROOT, line
from rich.console import Console
from rich.table import Table

from vlnorm_verl.cpu import cpu_environment
from vlnorm_verl.files import locked, write_json
from vlnorm_verl.runs.config import compose, with_settings
from vlnorm_verl.runs.launch import start
from vlnorm_verl.tasks.tiny import WEIGHTS
from vlnorm_verl.tasks.tiny.data import make as make_tiny_files

CONFIG = ROOT / "recipes" / "config"
QUICKSTART = ["family=quickstart", "task=countdown", "length=8192", "model=tiny"]  # as recipes/quickstart.sh

WARM_UP = 2  # steps: first generation and first update pay for lazy initialisation
PARTS = {
    "timing_s/step": "step",
    "timing_s/gen": "generation",
    "timing_s/old_log_prob": "old log-probs",
    "timing_s/update_actor": "update",
    "timing_s/update_weights": "weight sync",
}


def random_model(folder: Path) -> int:
    """A random Qwen2 with the tiny task's tokenizer; number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    layers = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    config = AutoConfig.from_pretrained(WEIGHTS, **sizes, **layers)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(WEIGHTS).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


ALONE = """
import sys, time
from vllm import LLM, SamplingParams, TokensPrompt
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=144, max_num_seqs=128,
          distributed_executor_backend="uni")
prompts = [TokensPrompt(prompt_token_ids=[3 + i % 16] * 16) for i in range(128)]
sampling = SamplingParams(max_tokens=128, ignore_eos=True, detokenize=False)
seconds = []
for _ in range(3):
    start = time.monotonic()
    llm.generate(prompts, sampling, use_tqdm=False)
    seconds.append(time.monotonic() - start)
print(min(seconds))
"""


def vllm_alone(model: Path) -> float:
    """Seconds in which vLLM alone samples what the trainer samples in a step."""
    environment = {**os.environ, **cpu_environment(), "VLLM_LOGGING_LEVEL": "ERROR"}
    run = subprocess.run([sys.executable, "-c", ALONE, model], env=environment, stdout=subprocess.PIPE, check=True)
    return float(run.stdout.split()[-1])


def in_turns(rounds: int, against: Path, out: Path, arguments: list[str]) -> dict[str, list[dict[str, float]]]:
    """The medians of each round, by checkout: this file's work with the package that is there."""
    found: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    sides = [("before", against), ("now", ROOT)]
    for turn in range(rounds):
        for name, root in sides:
            environment = {**os.environ, "PYTHONPATH": str(root.resolve())}
            folder = out / f"{name}-{turn}"
            command = [sys.executable, __file__, "--out", str(folder), *arguments]
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            found[name].append(json.loads((folder / "seconds.json").read_text()))
        sides.reverse()  # none is always first: the very first start reads from a cold disk
    return found


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides of verl's config.")] = None,
    steps: Annotated[int, typer.Option(min=WARM_UP + 1, help="Training steps.")] = 8,
    ranks: Annotated[int, typer.Option(min=1, help="Data-parallel ranks.")] = 1,
    against: Annotated[Path | None, typer.Option(help="Another checkout of this project, to take turns with.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of turns, with --against.")] = 3,
    out: Annotated[Path | None, typer.Option(help="A new folder for the run. Default: one that is removed.")] = None,
) -> None:
    """Train a random 1.1 M model for a few steps and print where the seconds go."""
    console = Console()
    temporary = tempfile.TemporaryDirectory()
    out = out or Path(temporary.name) / "out"
    if out.exists():
        raise typer.BadParameter(f"--out {out}: is there already")
    if against is not None:
        arguments = ["--steps", str(steps), "--ranks", str(ranks), *(overrides or [])]
        with console.status("training in turns …"):
            found = in_turns(rounds, against, out, arguments)
        title = f"medians of {rounds} rounds; {line()}"
        table = Table("part", "before, s", "now, s", "now / before, round by round", title=title)
        for name in found["now"][0]:
            before, now = ([seconds[name] for seconds in found[side]] for side in ("before", "now"))
            ratios = ", ".join(f"{b / a:.2f}" for a, b in zip(before, now, strict=True))
            table.add_row(name, f"{statistics.median(before):.2f}", f"{statistics.median(now):.2f}", ratios)
        console.print(table)
        return
    out.mkdir(parents=True)
    parameters = random_model(out / "model")
    changed = {
        "recipe.folder": str(out.resolve()),
        "recipe.data": str((out / "data").resolve()),
        "recipe.steps": steps,
        "trainer.n_gpus_per_node": ranks,
        "data.max_response_length": 128,
        "actor_rollout_ref.model.path": str((out / "model").resolve()),
        "actor_rollout_ref.rollout.ignore_eos": True,
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
    }
    config = with_settings(compose(CONFIG, [*QUICKSTART, *(overrides or [])]), changed)
    make_tiny_files(out / "data", "countdown")
    os.environ.update(cpu_environment())
    begin, ready, records = time.monotonic(), 0.0, []
    with console.status("training …"), locked(out) as lock, contextlib.closing(start(config, lock)) as steps_done:
        for record in steps_done:
            if "timing_s/step" in record["data"]:
                ready = ready or time.monotonic() - begin - record["data"]["timing_s/step"]
                records.append(record["data"])
    measured = records[WARM_UP:]
    title = f"{parameters / 1e6:.2f} M parameters, {ranks} rank(s); {line()}"
    table = Table("part", "median s", "min", "max", title=title)
    table.add_row("start to ready", f"{ready:.1f}", "", "")
    medians = {"start to ready": ready}
    for key, name in PARTS.items():
        values = [data[key] for data in measured if key in data]
        if values:
            medians[name] = statistics.median(values)
            table.add_row(name, f"{medians[name]:.2f}", f"{min(values):.2f}", f"{max(values):.2f}")
    with console.status("vLLM alone …"):
        medians["vLLM alone"] = vllm_alone(out / "model")
    table.add_row("vLLM alone", f"{medians['vLLM alone']:.2f}", "", "")
    console.print(table)
    share = medians["vLLM alone"] / medians["generation"]
    console.print(
        f"The trainer generates at {share:.0%} of vLLM alone; {measured[-1]['response_length/mean']:.0f} tokens each."
    )
    write_json(out / "seconds.json", medians)


if __name__ == "__main__":
    typer.run(main)
