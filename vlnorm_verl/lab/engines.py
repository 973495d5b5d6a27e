"""The engines that sample: which one, what it is asked for, transformers' `generate`; vLLM is in vllm_engine.py."""

from __future__ import annotations

import importlib.util
import zlib
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlnorm_verl.files import UserError
from vlnorm_verl.lab import models

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENGINES = ("auto", "vllm", "transformers")
SMALL = 10_000_000  # parameters; below it vLLM's start takes longer than all of transformers' sampling


@dataclass(frozen=True)
class Request:
    """What an engine is asked for.

    Args:
        prompts: tokens of each prompt.
        counts: responses wanted to each.
        seed, temperature, max_response_length: see `sample`.
        ends: tokens that end a response.
    """

    prompts: list[list[int]]
    counts: list[int]
    seed: int
    temperature: float
    max_response_length: int
    ends: Set[int]


# One response at a time, as it is finished: its place among the responses to all prompts, which are in order, and its
# tokens, the end token included.
Sampled = Generator[tuple[int, list[int]], None, None]


def prompt_of_each(counts: Sequence[int]) -> list[int]:
    """The number of the prompt of each response, all responses to a prompt beside each other."""
    return [number for number, count in enumerate(counts) for _ in range(count)]


def seed_of(seed: int, place: int) -> int:
    """Of the response at a place, or of the batch that begins there: 32 bits, all that torch takes on a CPU."""
    return zlib.crc32(f"{seed} {place}".encode())


def by_prompt(sampled: Iterable[tuple[int, list[int]]], counts: Sequence[int]) -> Iterator[tuple[int, list[list[int]]]]:
    """The number and the responses of each prompt, once it has all of them.

    They are in the order in which they were asked for. In the order in which they end the short ones would come first,
    and two halves of a prompt's responses would not be alike.
    """
    prompts = prompt_of_each(counts)
    waiting: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for place, response in sampled:
        number = prompts[place]
        waiting[number][place] = response
        if len(waiting[number]) == counts[number]:
            yield number, [response for _, response in sorted(waiting.pop(number).items())]


def end_tokens(resolved: str, eos_token_id: int | None) -> set[int]:
    """Tokens that end a response: the tokenizer's and those of the model's generation settings, as in vLLM.

    Raises:
        UserError: there is none, so that no response would ever end.
    """
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(resolved).eos_token_id
    except OSError:  # a model need not have the file; vLLM then takes those of config.json
        configured = getattr(models.load_config(resolved), "eos_token_id", None)
    candidates = [eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    ends = {token for token in candidates if token is not None}
    if not ends:
        raise UserError(
            f"MODEL {resolved} has no end-of-sequence token in its tokenizer, generation_config.json or config.json"
        )
    return ends


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def choose_engine(config: Any) -> str:
    size = models.skeleton(config).num_parameters()
    if not has_vllm():
        engine, reason = "transformers", "vLLM is not installed"
    elif size < SMALL:
        engine, reason = "transformers", f"{size:,} parameters: vLLM's start would take longer"
    else:
        engine, reason = "vllm", f"{size:,} parameters"
    print(f"engine: {engine} ({reason})")
    return engine


def with_transformers(
    model: PreTrainedModel, request: Request, batch_size: int, finished: Set[int] = frozenset()
) -> Sampled:
    """Responses to the prompts, one prompt after the other, sampled in batches that may span prompts.

    Each batch has a seed of its own, so that one that is sampled in a later call has the same responses.

    Args:
        model: in evaluation mode.
        batch_size: responses at a time.
        finished: numbers of prompts that need no responses any more.
    """
    import torch
    from transformers import GenerationConfig

    pad = min(request.ends)
    # The model's own settings (top_k, a repetition penalty …) would fill in whatever is not given to generate.
    model.generation_config = GenerationConfig(eos_token_id=sorted(request.ends), pad_token_id=pad)
    numbers = prompt_of_each(request.counts)
    for start in range(0, len(numbers), batch_size):
        batch = numbers[start : start + batch_size]
        if set(batch) <= finished:
            continue
        rows = [request.prompts[number] for number in batch]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        torch.manual_seed(seed_of(request.seed, start))
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=request.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=request.max_response_length,
        )
        for place, tokens in enumerate(generated[:, width:].tolist(), start):
            if numbers[place] not in finished:
                yield place, _until_end(tokens, request.ends)


def _until_end(tokens: list[int], ends: Set[int]) -> list[int]:
    """The response with its end token, without the padding after it."""
    for position, token in enumerate(tokens):
        if token in ends:
            return tokens[: position + 1]
    return tokens
