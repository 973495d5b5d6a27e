"""Samples responses to a task's prompts from a model, scores them, and stores them.

The responses are what verl would train on: temperature T and nothing else changes the distribution (top_p 1, no top_k,
no repetition penalty, whatever the model's own generation settings say), and the end-of-sequence token is part of the
response and counted in its length.

Covered: transformers' `generate` in batches (the same seed and batch size give the same responses on the same machine)
and vLLM in a process of its own, so that its memory is free again for the gradients. Not covered: several GPUs, and the
same responses from vLLM for the same seed. On a GPU vLLM samples in the model's own dtype, usually bfloat16, while the
gradients are in float32: a difference that training has as well. On a CPU both are in float32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlnorm_verl.files import UserError
from vlnorm_verl.lab import models, store
from vlnorm_verl.lab.store import Rollouts
from vlnorm_verl.lab.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENGINES = ("auto", "vllm", "transformers")
SMALL = 10_000_000  # parameters; below it vLLM's start takes longer than all of transformers' sampling
VLLM_LOG = "vllm.log"


@dataclass(frozen=True)
class Design:
    """What is sampled; no prompt is in both parts.

    Args:
        deep_prompts: prompts with many responses each, for what is estimated within a prompt (the paper's Figure 4).
        deep_responses: responses to each of them.
        pool_prompts: prompts with few responses each, as in training.
        pool_responses: responses to each of them.
    """

    deep_prompts: int = 4
    deep_responses: int = 128
    pool_prompts: int = 64
    pool_responses: int = 8

    def __post_init__(self) -> None:
        for kind in ("deep", "pool"):
            prompts, responses = getattr(self, f"{kind}_prompts"), getattr(self, f"{kind}_responses")
            if prompts < 0:
                raise UserError(f"--{kind}-prompts {prompts}: must be 0 or more")
            if prompts and responses < 2:
                raise UserError(f"--{kind}-responses {responses}: must be 2 or more, a GRPO group")
        if not self.prompts:
            raise UserError("--deep-prompts 0 and --pool-prompts 0: at least one prompt is needed")

    @property
    def prompts(self) -> int:
        return self.deep_prompts + self.pool_prompts

    def part(self, index: int) -> tuple[str, int]:
        """Kind and number of responses of a prompt; the deep ones come first."""
        if index < self.deep_prompts:
            return "deep", self.deep_responses
        return "pool", self.pool_responses


def sample(
    model: str,
    task: Task,
    design: Design,
    seed: int,
    temperature: float,
    max_response_length: int,
    engine: str,
    out: Path,
    batch_size: int = 64,
    console: Console | None = None,
) -> None:
    """Write `out`/rollouts.jsonl, whole or not at all; does nothing if the same rollouts are there.

    Args:
        model: see `models.resolve`.
        task: prompts and reward.
        design: how many prompts and responses.
        seed: of the choice of prompts and of the sampling.
        temperature: T > 0 of the sampling.
        max_response_length: tokens after which a response is cut.
        engine: "vllm", "transformers", or "auto": vLLM if it is installed and the model has SMALL parameters or more.
        out: the lab's folder.
        batch_size: responses at a time, with transformers.
        console: where progress and the choice of the engine are shown.

    Raises:
        UserError: a request that cannot be met, or rollouts of other settings in `out`.
    """
    console = console or Console()
    if engine not in ENGINES:
        raise UserError(f"--engine {engine} is not known. Accepted: {', '.join(ENGINES)}")
    if engine == "vllm" and not _has_vllm():
        raise UserError("--engine vllm: vLLM is not installed; take --engine transformers")
    if not temperature > 0:
        raise UserError(f"--temperature {temperature:g}: must be above 0")
    if max_response_length < 1:
        raise UserError(f"--max-response-length {max_response_length}: must be 1 or more")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be 1 or more")
    questions = task.questions(design.prompts, seed)
    resolved = models.resolve(model, out)
    tokenizer = models.load_tokenizer(resolved)
    prompts = [tokenizer.encode(question.prompt, add_special_tokens=False) for question in questions]
    config = models.load_config(resolved)
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if positions and longest + max_response_length > positions:
        raise UserError(
            f"--max-response-length {max_response_length}: with a prompt of {longest} tokens this is beyond the "
            f"model's {positions} positions; accepted: up to {positions - longest}"
        )
    there = store.read_settings(out) if (out / store.ROLLOUTS).exists() else None
    if engine == "auto":
        engine = there["engine"] if there else _choose_engine(config, console)
    settings = {
        "format": store.FORMAT,
        "model": model,
        "weights": models.fingerprint(resolved),
        "task": task.name,
        "data": str(task.data) if task.data else None,
        "design": asdict(design),
        "seed": seed,
        "temperature": temperature,
        "max_response_length": max_response_length,
        "engine": engine,
        "batch_size": batch_size if engine == "transformers" else None,
    }
    if there is not None:
        store.refuse_other(out / store.ROLLOUTS, there, settings)
        console.print(f"{out / store.ROLLOUTS} is there already", markup=False, highlight=False)
        return
    out.mkdir(parents=True, exist_ok=True)
    counts = [design.part(index)[1] for index in range(design.prompts)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"responses, {engine}", total=sum(counts))
        if engine == "vllm":
            ends = end_tokens(resolved, tokenizer.eos_token_id)
            sampled = _with_vllm(resolved, prompts, counts, seed, temperature, max_response_length, ends, out)
        else:
            loaded = models.load_model(resolved)
            ends = end_tokens(resolved, tokenizer.eos_token_id)
            sampled = with_transformers(
                loaded, prompts, counts, seed, temperature, max_response_length, ends, batch_size
            )

        def scored() -> Iterator[Rollouts]:
            for index, responses in enumerate(sampled):
                texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
                yield Rollouts(
                    kind=design.part(index)[0],
                    prompt=questions[index].prompt,
                    prompt_ids=prompts[index],
                    responses=responses,
                    rewards=[task.score(questions[index], text) for text in texts],
                    truncated=[response[-1] not in ends for response in responses],
                )
                progress.update(bar, advance=len(responses))

        store.write_rollouts(out, settings, scored())


def end_tokens(resolved: str, eos_token_id: int | None) -> set[int]:
    """Tokens that end a response: the tokenizer's and those of the model's generation settings, as in vLLM.

    Raises:
        UserError: there is none, so that no response would ever end.
    """
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(resolved).eos_token_id
    except OSError:  # a model need not have the file
        configured = None
    candidates = [eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    ends = {token for token in candidates if token is not None}
    if not ends:
        raise UserError(f"MODEL {resolved} has no end-of-sequence token in its tokenizer or generation_config.json")
    return ends


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def _choose_engine(config: Any, console: Console) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if not _has_vllm():
        engine, reason = "transformers", "vLLM is not installed"
    elif size < SMALL:
        engine, reason = "transformers", f"{size:,} parameters: vLLM's start would take longer"
    else:
        engine, reason = "vllm", f"{size:,} parameters"
    console.print(f"engine: {engine} ({reason})", markup=False, highlight=False)
    return engine


# ----------------------------------------------------------------------------------------------------- transformers


def with_transformers(
    model: PreTrainedModel,
    prompts: list[list[int]],
    counts: list[int],
    seed: int,
    temperature: float,
    max_response_length: int,
    ends: set[int],
    batch_size: int,
) -> Iterator[list[list[int]]]:
    """Responses to one prompt after the other, sampled in batches that may span prompts.

    Args:
        model: in evaluation mode.
        prompts: tokens of each prompt.
        counts: responses wanted to each.
        seed, temperature, max_response_length, batch_size: see `sample`.
        ends: tokens that end a response.

    Yields:
        Tokens of the responses to a prompt, the end token included.
    """
    import torch
    from transformers import GenerationConfig

    pad = min(ends)
    # The model's own settings (top_k, a repetition penalty …) would fill in whatever is not given to generate.
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=pad)
    torch.manual_seed(seed)
    rows = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    responses: list[list[int]] = []
    owner = 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device)
        with torch.no_grad():
            generated = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_response_length,
            )
        responses.extend(_until_end(row, ends) for row in generated[:, width:].tolist())
        while owner < len(counts) and len(responses) >= counts[owner]:
            yield responses[: counts[owner]]
            del responses[: counts[owner]]
            owner += 1


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The response with its end token, without the padding after it."""
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens


# ------------------------------------------------------------------------------------------------------------- vLLM


def _with_vllm(
    resolved: str,
    prompts: list[list[int]],
    counts: list[int],
    seed: int,
    temperature: float,
    max_response_length: int,
    ends: set[int],
    out: Path,
) -> Iterator[list[list[int]]]:
    """As `with_transformers`; all responses come at once."""
    import torch

    from vlnorm_verl.cpu import cpu_environment

    on_gpu = torch.cuda.is_available()
    request = {
        "engine": {
            "model": resolved,
            "dtype": "auto" if on_gpu else "float32",
            "max_model_len": max(map(len, prompts)) + max_response_length,
            "seed": seed,
            "enforce_eager": not on_gpu,  # without compiling, as the recipes for the CPU
        },
        "sampling": {
            "temperature": temperature,
            "top_p": 1.0,
            "max_tokens": max_response_length,
            "stop_token_ids": sorted(ends),
            "detokenize": False,
        },
        "prompts": prompts,
        "counts": counts,
    }
    with tempfile.TemporaryDirectory(dir=out, prefix=".vllm-") as scratch:
        question, answer = Path(scratch) / "request.json", Path(scratch) / "responses.jsonl"
        question.write_text(json.dumps(request), encoding="utf-8")
        log = out / VLLM_LOG
        with log.open("wb") as output:
            done = subprocess.run(
                [sys.executable, "-m", "vlnorm_verl.lab.vllm_engine", str(question), str(answer)],
                env={**os.environ, **({} if on_gpu else cpu_environment())},
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode != 0:
            raise UserError(
                f"--engine vllm: vLLM ended with exit code {done.returncode}, see {log}; or take transformers"
            )
        with answer.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
