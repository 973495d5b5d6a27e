"""Samples responses to a task's prompts from a model, scores them, and stores them.

The responses are what verl would train on: prompts go through the tokenizer's chat template as in verl's data set, or,
without it, are the texts of their messages, as in the recipes for base models. Temperature T and nothing else changes
the distribution (top_p 1, no top_k, no repetition penalty, whatever the model's own generation settings say), and the
end-of-sequence token is part of the response and counted in its length.

Covered: transformers' `generate` in batches (the same seed and batch size give the same responses on the same machine,
also in a call that goes on from a stopped one) and vLLM (vllm_engine.py; the same but for its rounding, which depends
on what is sampled at the same time). Each prompt is on the disk as soon as it is finished. Not covered: several GPUs.
On a GPU vLLM samples in the model's own dtype, usually bfloat16, and in bfloat16 where that is float32, while the
gradients are in float32: a difference that training has as well.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vlnorm_verl.files import UserError, require
from vlnorm_verl.lab import engines, models, store, vllm_engine
from vlnorm_verl.lab.store import Rollouts
from vlnorm_verl.lab.tasks import Messages, Question, Task
from vlnorm_verl.tokenizer import refuse_lost_spaces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Design:
    """What is sampled; no prompt is in both kinds.

    Args:
        slope_prompts: prompts with many responses each, for what is estimated within a prompt (the paper's Figure 4).
        slope_responses: responses to each of them.
        pool_prompts: prompts with few responses each, as in training.
        pool_responses: responses to each of them.
    """

    slope_prompts: int
    slope_responses: int
    pool_prompts: int
    pool_responses: int


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
    chat_template: bool = True,
) -> None:
    """Write `out`/rollouts.jsonl; does nothing if the same rollouts are there, and goes on where a call was stopped.

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
        chat_template: whether prompts go through the tokenizer's chat template.

    Raises:
        UserError: a request that cannot be met, a tokenizer that loses the prompts' spaces, or rollouts of other
            settings in `out`.
    """
    require(f"--engine {engine}", engine, engines.ENGINES)
    if engine == "vllm" and not engines.has_vllm():
        raise UserError("--engine vllm: vLLM is not installed; take --engine transformers")
    if not temperature > 0:
        raise UserError(f"--temperature {temperature:g}: must be above 0")
    kinds = ["slope"] * design.slope_prompts + ["pool"] * design.pool_prompts
    counts = [design.slope_responses if kind == "slope" else design.pool_responses for kind in kinds]
    questions = task.questions(len(kinds), seed)
    resolved = models.resolve(model, out)
    tokenizer = models.load_tokenizer(resolved)
    texts = [message["content"] for question in questions for message in question.messages]
    refuse_lost_spaces(tokenizer, f"MODEL {resolved}", texts)
    prompts = [prompt_ids(tokenizer, question.messages, chat_template) for question in questions]
    config = models.load_config(resolved)
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if positions and longest + max_response_length > positions:
        raise UserError(
            f"--max-response-length {max_response_length}: with a prompt of {longest} tokens this is beyond the "
            f"model's {positions} positions; accepted: up to {positions - longest}"
        )
    sampled_before = store.read_settings(out) if (out / store.ROLLOUTS).exists() else None
    if engine == "auto":
        engine = sampled_before["engine"] if sampled_before else engines.choose_engine(config)
    settings = {
        "format": store.FORMAT,
        "model": model,
        "weights": models.fingerprint(resolved),
        "task": task.name,
        "data": str(task.data.resolve()) if task.data else None,
        "prompts": _fingerprint(prompts, questions),
        "reward": task.reward,
        "chat_template": chat_template,
        "design": asdict(design),
        "seed": seed,
        "temperature": temperature,
        "max_response_length": max_response_length,
        "engine": engine,
        "batch_size": batch_size if engine == "transformers" else None,
    }
    if sampled_before is not None:
        store.refuse_other(out / store.ROLLOUTS, sampled_before, settings)
        print(f"{out / store.ROLLOUTS} is there already")
        return
    finished = store.finished_prompts(out, settings)
    ends = engines.end_tokens(resolved, tokenizer.eos_token_id)
    request = engines.Request(prompts, counts, seed, temperature, max_response_length, ends)
    if engine == "vllm":
        sampled = vllm_engine.responses(resolved, request, out, finished.keys())
    else:
        sampled = engines.with_transformers(models.load_model(resolved), request, batch_size, finished.keys())
    done = sum(counts[number] for number in finished)
    with closing(sampled), tqdm(sampled, f"responses, {engine}", sum(counts), initial=done, mininterval=5) as bar:
        for number, responses in engines.by_prompt(bar, counts):
            decoded = tokenizer.batch_decode(responses, skip_special_tokens=True)
            finished[number] = Rollouts(
                kind=kinds[number],
                prompt=tokenizer.decode(prompts[number]),
                prompt_ids=prompts[number],
                responses=responses,
                rewards=[task.score(questions[number], text) for text in decoded],
                truncated=[response[-1] not in ends for response in responses],
            )
            store.keep_prompt(out, number, finished[number])
    store.write_rollouts(out, settings, (finished[number] for number in range(len(prompts))))
    (out / store.PARTIAL).unlink()


def _fingerprint(prompts: Sequence[list[int]], questions: Sequence[Question]) -> str:
    """Changes with the data's rows, the tokenizer and its chat template, none of which need have another name."""
    asked = [prompts, [question.ground_truth for question in questions]]
    return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, chat_template: bool) -> list[int]:
    """Tokens that the model continues: as verl's data set and agent loop make them, or of the messages' text alone.

    A template that asks for today's date always gets the same, so that a call goes on from another day's.

    Raises:
        UserError: the tokenizer has no chat template, or one that refuses the messages.
    """
    if not chat_template:
        return tokenizer.encode("".join(message["content"] for message in messages), add_special_tokens=False)
    options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
    if "strftime_now" in str(getattr(tokenizer, "chat_template", "")):
        options["strftime_now"] = datetime.date(2024, 7, 26).strftime  # Llama 3.2's own date where it knows none
    try:
        # Not by way of the text: mistral_common's tokenizer reads no control tokens from it.
        return list(tokenizer.apply_chat_template(messages, **options))
    except Exception as error:  # of the template's own, too
        raise UserError(
            f"the tokenizer's chat template cannot be applied: {error}. --no-chat-template takes the prompts as they "
            "are, for base models"
        ) from error
