"""The batch of the engine programs, a small model, and Σ x_i g_i of it without verl and without this package.

Transformers' model on one unpadded response at a time, on the engine's device, the clipped loss written out here,
weights by numpy from paper §1.
"""

from dataclasses import dataclass

import numpy as np
import torch

M = 48.0
ROWS = 16
PROMPT = 5
# Spread over more than 10x, so that a wrong sum cannot pass for rounding.
LENGTHS = [2, 3, 30, 5, 44, 7, 2, 13, 3, 21, 4, 40, 6, 2, 9, 17]
CLIP_LOW, CLIP_HIGH, CLIP_C = 0.2, 0.3, 3.0
VOCAB = 31


@dataclass
class Scenario:
    name: str
    mode: str = "vl_norm"
    micro: int | None = 2  # responses a micro-batch on one rank; None: dynamic
    tokens: int | None = None  # tokens a micro-batch on one rank, if dynamic
    padded: bool = False
    width: int = max(LENGTHS)  # padded width of the response
    mini: int = ROWS  # responses an optimizer mini-batch, over all ranks
    epochs: int = 1
    shuffle: bool = False
    entropy_coeff: float = 0.0
    kl_coef: float = 0.0
    masked: tuple[int, ...] = ()
    rejected: tuple[int, ...] = ()  # no response_mask, but a loss_mask: what verl's rollout correction leaves
    reduced_each: bool = False  # FSDP reduces gradients in each micro-batch, not once for all
    sabotage: str = ""


def weights(mode: str, lengths: np.ndarray, scale: float = M) -> np.ndarray:
    """x_i by the table of paper §1 over the responses with a valid token."""
    x, n = np.zeros(len(lengths)), lengths[lengths > 0].astype(np.float64)
    if not len(n):
        return x
    name, _, parameter = mode.partition(":")
    if name == "vl_norm":
        z = n ** -float(parameter or 1)
        x[lengths > 0] = z / z.sum() / scale
    elif name in ("dr_grpo_norm", "seq-mean-token-sum-norm"):
        x[lengths > 0] = 1 / (len(n) * scale)
    elif name == "grpo_norm":
        x[lengths > 0] = 1 / (len(n) * n)
    elif name in ("dapo_norm", "token-mean"):
        x[lengths > 0] = 1 / n.sum()
    else:
        raise ValueError(mode)
    return x


def response_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the response's tokens [L, VOCAB], on the CPU wherever the model is."""
    return model(input_ids=ids[None].to(next(model.parameters()).device)).logits[0, PROMPT - 1 : -1].cpu()


@dataclass
class Rows:
    """The batch: token ids, old and reference log-probabilities, advantages of each response."""

    ids: list[torch.Tensor]
    old: list[torch.Tensor]
    ref: list[torch.Tensor]
    advantages: list[torch.Tensor]


def make_rows(model: torch.nn.Module, dtype: torch.dtype) -> Rows:
    g = torch.Generator().manual_seed(7)
    rows = Rows([], [], [], [])
    for length in LENGTHS:
        ids = torch.randint(1, VOCAB, (PROMPT + length,), generator=g)
        with torch.no_grad():
            log_p = torch.log_softmax(response_logits(model, ids), -1).to(dtype)
        chosen = log_p.gather(-1, ids[PROMPT:, None])[:, 0]
        rows.ids.append(ids)
        # Off by up to e^±0.8, so that every branch of the clipped loss is taken.
        rows.old.append(chosen + 0.4 * torch.randn(length, generator=g, dtype=torch.float64).to(dtype))
        rows.ref.append(chosen + 0.2 * torch.randn(length, generator=g, dtype=torch.float64).to(dtype))
        rows.advantages.append(torch.full((length,), torch.randn(1, generator=g).item(), dtype=dtype))
    return rows


def response_gradients(model: torch.nn.Module, rows: Rows, scenario: Scenario) -> torch.Tensor:
    """g_i of every response [ROWS, parameters]: gradient of its summed token losses, one response at a time."""
    gradients = []
    for i in range(ROWS):
        log_p = torch.log_softmax(response_logits(model, rows.ids[i]), -1)
        chosen = log_p.gather(-1, rows.ids[i][PROMPT:, None])[:, 0]
        ratio = (chosen - rows.old[i]).exp()
        advantage = rows.advantages[i]
        clipped = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
        dual = torch.where(advantage < 0, torch.minimum(clipped, -advantage * CLIP_C), clipped)
        loss = dual.sum()
        if scenario.entropy_coeff:
            loss = loss + scenario.entropy_coeff * (log_p.exp() * log_p).sum()
        if scenario.kl_coef:
            delta = rows.ref[i] - chosen
            loss = loss + scenario.kl_coef * (delta.exp() - delta - 1).sum()
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).cpu())
    return torch.stack(gradients)


def weighted_sum(mode: str, lengths: np.ndarray, g: torch.Tensor) -> torch.Tensor:
    """Σ x_i g_i; g_i of a response without a valid token is 0."""
    return torch.from_numpy(weights(mode, lengths)).to(g.dtype) @ g


def relative_error(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance relative to the norm of what is expected; the distance itself where that is 0."""
    distance, norm = (gradient.to(expected.dtype) - expected).norm().item(), expected.norm().item()
    return distance / norm if norm else distance


def make_model(folder: str, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return model.to(dtype)
