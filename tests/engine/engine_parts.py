"""What the programs of verl's other engines share."""

from typing import Any

import torch
from torch import nn

Engine = Any
Gradient = dict[str, torch.Tensor]  # parameter's name -> the whole, reduced gradient


def qwen2(folder: str) -> nn.Module:
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(folder, attn_implementation="sdpa").to(torch.float64)


def hf_model_config(folder: str) -> Any:
    from verl.workers.config import HFModelConfig

    return HFModelConfig(
        path=folder,
        load_tokenizer=False,
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )


def still(module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that leaves the weights where the reference was taken."""
    return torch.optim.SGD(module.parameters(), lr=0.0)


def whole_dtensors(engine: Engine) -> Gradient:
    modules = engine.module if isinstance(engine.module, list) else [engine.module]
    return {
        name.replace("_orig_mod.", "").replace("inner.", ""): p.grad.full_tensor()
        for module in modules
        for name, p in module.named_parameters()
    }
