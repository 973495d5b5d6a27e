"""The shipped tiny model and small pieces around it, for the tests of the lab's rollouts and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlnorm_verl.lab.gradients import score_gradient
from vlnorm_verl.lab.parameters import select_parameters
from vlnorm_verl.lab.rollouts import Design, sample
from vlnorm_verl.lab.tasks import load_task
from vlnorm_verl.tasks.tiny import WEIGHTS
from vlnorm_verl.tasks.tiny.model import VOCABULARY

PROMPT = "07,03,12>bp:"
RESPONSE = "7*3=21-12=9;7+3=10-12=0;A:7+3-12."
SMALL_DESIGN = Design(slope_prompts=1, slope_responses=6, pool_prompts=2, pool_responses=3)
ROUNDING = 1e-6  # Qwen2's norms are in float32 whatever its dtype, so float64 does not give more
SIZES: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def ids(text: str) -> list[int]:
    return [VOCABULARY.index(character) for character in text]


def log_probability(model: Any, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """Σ_t log π, token by token from the definition."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
    return sum(
        (logits[len(prompt) + t - 1] - torch.logsumexp(logits[len(prompt) + t - 1], dim=0))[token]
        for t, token in enumerate(response)
    )


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients.values()])


def by_autograd(value: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """The flat gradient of a scalar."""
    gradients = torch.autograd.grad(value, list(parameters.values()))
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def score(model: Any, response: list[int], temperature: float = 1.0, modules: str = "last-qkv") -> torch.Tensor:
    return flat(score_gradient(model, select_parameters(model, modules), ids(PROMPT), response, temperature))


def differences(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def sample_small(out: Path, seed: int = 3) -> Path:
    sample(str(WEIGHTS), load_task("tiny"), SMALL_DESIGN, seed, 1.0, 64, "transformers", out)
    return out
