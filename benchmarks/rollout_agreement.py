"""How far vLLM's and transformers' float32 probabilities are from float64, on the warm-started tiny model.

    python benchmarks/rollout_agreement.py [--prompts 128]

Samples one response a held-out prompt with vLLM on the CPU, and recomputes the probability of every sampled token with
transformers in float32 (what the actor computes) and in float64. If the rollout were wrong, its distance from float64
would exceed the actor's own.
"""

import os
from typing import Annotated

import torch
import typer
from origin import line
from rich.console import Console
from rich.table import Table

from vlnorm_verl.cpu import cpu_environment
from vlnorm_verl.tasks.tiny import WEIGHTS
from vlnorm_verl.tasks.tiny.countdown import distinct_problems, render_prompt


def main(prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 128) -> None:
    """Print the largest and mean differences of token probabilities."""
    os.environ.update(cpu_environment(threads=1))
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    engine = LLM(str(WEIGHTS), dtype="float32", enforce_eager=True, max_model_len=300, max_num_seqs=128)
    texts = [render_prompt(problem) for problem in distinct_problems(prompts, 0, "test")]
    outputs = engine.generate(texts, SamplingParams(temperature=1.0, max_tokens=256, logprobs=0, seed=1))
    models = {
        f"transformers {dtype}": AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=dtype, attn_implementation="sdpa")
        for dtype in ("float32", "float64")
    }

    columns: dict[str, list[torch.Tensor]] = {name: [] for name in ("vLLM float32", *models)}
    for output in outputs:
        response = output.outputs[0]
        start = len(output.prompt_token_ids)
        ids = torch.tensor([[*output.prompt_token_ids, *response.token_ids]])
        sampled = [entry[token].logprob for entry, token in zip(response.logprobs, response.token_ids, strict=True)]
        columns["vLLM float32"].append(torch.tensor(sampled, dtype=torch.float64).exp())
        for name, model in models.items():
            with torch.no_grad():
                log_p = torch.log_softmax(model(ids).logits[0, start - 1 : -1], -1)
            columns[name].append(log_p.gather(-1, ids[0, start:, None])[:, 0].double().exp())

    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    rollout, actor, exact = joined
    title = f"{len(joined[rollout])} sampled tokens; {line()}"
    table = Table("difference of token probabilities", "largest", "mean", title=title)
    for one, other in ((rollout, exact), (actor, exact), (rollout, actor)):
        difference = (joined[one] - joined[other]).abs()
        table.add_row(f"{one} − {other}", f"{difference.max():.1e}", f"{difference.mean():.1e}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
