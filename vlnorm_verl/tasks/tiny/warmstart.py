"""Makes the warm-started weights: supervised training on written search traces, then a measurement.

    python -m vlnorm_verl.tasks.tiny.warmstart --out weights            # 6 to 10 minutes on one CPU thread
    python -m vlnorm_verl.tasks.tiny.warmstart --out /tmp/w --steps 20  # a smoke run; learns nothing

This is data preparation, not the project's trainer: RL starts from its result with verl's own trainer. It is a
plain loop and not verl's SFT trainer because that one has no per-token loss weights, and the two tokens that
decide the search (``!`` and ``;``) must weigh more than the digits that surround them: otherwise the comparison
of a result with the target, learned late and suddenly, comes later still.

Covered: float32 on the CPU, one process; seeded, so the same machine and versions give the same weights (another
CPU rounds differently and gives other weights of about the same quality). Not covered: resuming, GPUs.
``warmstart.json`` beside the weights holds seed, cost, versions, accuracy and response lengths.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2ForCausalLM

from vlnorm_verl.files import write_json
from vlnorm_verl.tasks.countdown import Problem
from vlnorm_verl.tasks.tiny.countdown import (
    PROMPT_LENGTH,
    distinct_problems,
    judge,
    problems,
    render_prompt,
    search_trace,
)
from vlnorm_verl.tasks.tiny.model import VOCABULARY, build_config, build_tokenizer

RESPONSE_LIMIT = 256
BATCH_TOKENS = 4096
POOL_SIZE = 1024  # traces that are sorted by length together
DECISION_WEIGHT = 5.0  # loss weight of `!` and `;`
WARMUP_STEPS = 100
DECAY_FRACTION = 0.4  # constant rate before: the comparison appears late, and not at a decayed rate
CLIP_NORM = 1.0

console = Console()


def batches(seed: int) -> Iterator[list[str]]:
    """An endless stream of batches of prompt + trace; a batch holds texts of about one length.

    No batch exceeds BATCH_TOKENS tokens, padding included.
    """
    rng = random.Random(f"traces-{seed}")
    stream = problems(seed, "train")
    while True:
        pool = [render_prompt(p) + search_trace(p, rng) for p in itertools.islice(stream, POOL_SIZE)]
        pool.sort(key=len)
        pool_batches: list[list[str]] = []
        batch: list[str] = []
        for text in pool:
            if batch and (len(batch) + 1) * len(text) > BATCH_TOKENS:
                pool_batches.append(batch)
                batch = []
            batch.append(text)
        pool_batches.append(batch)
        rng.shuffle(pool_batches)
        yield from pool_batches


def encode(batch: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [texts x width], padded on the right, and the loss weights of the same shape (0: prompt and padding)."""
    index = {token: i for i, token in enumerate(VOCABULARY)}
    width = max(map(len, batch))
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # 0 is the padding token
    for row, text in enumerate(batch):
        ids[row, : len(text)] = torch.tensor([index[c] for c in text])
    weights = (ids != 0).float()
    weights[(ids == index["!"]) | (ids == index[";"])] = DECISION_WEIGHT
    weights[:, :PROMPT_LENGTH] = 0.0
    return ids, weights


def weighted_loss(model: PreTrainedModel, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    # Padding on the right is behind every real token, so the causal mask alone is right.
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    w = weights[:, 1:].flatten()
    return (losses * w).sum() / w.sum()


def rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, constant, then a cosine to 0 over the last DECAY_FRACTION of the steps."""
    decay_steps = DECAY_FRACTION * steps
    left = min(1.0, (steps - step) / decay_steps)
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 - math.cos(math.pi * left))


def train(seed: int, steps: int, peak_rate: float) -> tuple[Qwen2ForCausalLM, int]:
    """The trained model and the number of response tokens it saw."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(build_config())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    stream = batches(seed)
    tokens = 0
    average: float | None = None
    for step in track(range(steps), "warm start", console=console):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak_rate)
        ids, weights = encode(next(stream))
        loss = weighted_loss(model, ids, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        tokens += int((weights > 0).sum())
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            console.print(f"step {step + 1} of {steps}: loss {average:.4f}")
    return model.eval(), tokens


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int
) -> list[str]:
    """One response per prompt at temperature 1, end mark included where there is one."""
    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer.encode(p) for p in prompts])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=RESPONSE_LIMIT,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :])
    return [text.replace(str(tokenizer.pad_token), "") for text in texts]


def summarize(responses: list[str], asked: list[Problem]) -> dict[str, Any]:
    """Accuracy, outcomes and the lengths in tokens (characters, end mark included)."""
    outcomes = [judge(r, p) for r, p in zip(responses, asked, strict=True)]
    lengths = sorted(map(len, responses))
    return {
        "responses": len(responses),
        "accuracy": round(outcomes.count("correct") / len(outcomes), 4),
        "outcomes": {o: outcomes.count(o) for o in ("correct", "wrong_value", "wrong_numbers", "no_answer")},
        "length_limit": RESPONSE_LIMIT,
        "length_mean": round(statistics.fmean(lengths), 1),
        "length_harmonic_mean": round(statistics.harmonic_mean(lengths), 1),
        "length_min": lengths[0],
        "length_median": statistics.median(lengths),
        "length_95_percent": lengths[int(0.95 * (len(lengths) - 1))],
        "length_max": lengths[-1],
        "cut_at_limit": round(sum(not r.endswith(".") for r in responses) / len(responses), 4),
    }


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> dict[str, Any]:
    """One response to each of ``count`` different held-out problems.

    Raises:
        UserError: there are not so many.
    """
    asked = distinct_problems(count, seed, "test")
    responses = sample_responses(model, tokenizer, [render_prompt(p) for p in asked], seed)
    return summarize(responses, asked)


def main(
    out: Annotated[
        Path,
        typer.Option(file_okay=False, help="Directory for the weights, the tokenizer and warmstart.json."),
    ],
    seed: Annotated[int, typer.Option(help="Seed of the data, the initial weights and the sampling.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of about 4,096 tokens.")] = 2400,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    eval_prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts for the final measurement.")] = 1024,
) -> None:
    """Train the tiny CountDown model on search traces and write it as a Hugging Face directory."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be written fails at once
    started = time.perf_counter()
    model, tokens = train(seed, steps, lr)
    seconds = time.perf_counter() - started
    tokenizer = build_tokenizer()
    measured = evaluate(model, tokenizer, eval_prompts, seed)
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    report = {
        "made_by": "python -m vlnorm_verl.tasks.tiny.warmstart",
        "date": date.today().isoformat(),
        "seed": seed,
        "steps": steps,
        "peak_learning_rate": lr,
        "response_tokens": tokens,
        "seconds": round(seconds, 1),
        "threads": threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": model.num_parameters(),
        "held_out_sampled_at_temperature_1": measured,
    }
    write_json(out / "warmstart.json", report)
    console.print_json(data=report)


if __name__ == "__main__":
    typer.run(main)
