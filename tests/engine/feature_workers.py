"""Workers of verl for features.py: a critic, LoRA, sequences packed without padding and cut over ranks."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from tests.engine import older_verl


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *_: Any,
    position_ids: torch.Tensor,
    softmax_scale: float | None = None,
    **__: Any,
) -> torch.Tensor:
    """What flash attention does with packed sequences [1, S, heads, d]: causal, each one by itself.

    A sequence starts where its position is 0, as in transformers' prepare_fa_kwargs_from_position_ids.
    """
    assert attention_mask is None
    starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
    outputs = []
    for start, end in zip(starts, [*starts[1:], position_ids.shape[-1]], strict=True):
        q, k, v = (t[:, start:end].transpose(1, 2) for t in (query, key, value))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def token_classifier(folder: str) -> str:
    """Saves the model in `folder` (one a rank) with a head of one value a token; returns where, the same for all."""
    from transformers import AutoConfig, AutoModelForTokenClassification

    saved = str(Path(folder).parent / "critic")
    # In a process group some releases of transformers save on rank 0 only.
    if torch.distributed.get_rank() == 0:
        torch.manual_seed(1)
        config = AutoConfig.from_pretrained(folder, num_labels=1)
        config.classifier_dropout = 0.0  # 0.1 by default; later releases of verl switch it off
        AutoModelForTokenClassification.from_pretrained(folder, config=config).save_pretrained(saved)
    torch.distributed.barrier()
    return saved


def make_worker(kind: str, actor: Any) -> Any:
    """A worker like `actor` (verl_side.make_worker) of another kind, with the same weights."""
    model: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    if kind == "lora":
        model = {"lora_rank": 2, "lora_alpha": 4, "target_modules": "all-linear"}
    # The critic of verl 0.7.1 has to remove padding, else its values keep a last dimension of 1, and wants a checkpoint
    # of a token classifier (workers/engine/fsdp/transformer_impl.py:1175 and 234 there).
    old_critic = kind == "critic" and not older_verl.takes_nested_data()
    packed = kind in ("packed", "ulysses") or old_critic
    if packed:
        model = {"use_remove_padding": True}
        engine = {"ulysses_sequence_parallel_size": 2 if kind == "ulysses" else 1}
    if old_critic:
        model["path"] = model["hf_config_path"] = token_classifier(actor.config.model_config.path)
    config = dataclasses.replace(
        actor.config,
        model_type="value_model" if kind == "critic" else "language_model",
        model_config=dataclasses.replace(actor.config.model_config, **model),
        engine_config=dataclasses.replace(actor.config.engine_config, **engine),
        optimizer_config=dataclasses.replace(actor.config.optimizer_config),
    )
    worker = type(actor)(config)
    worker.reset()
    worker.engine._autocast_dtype = torch.float32  # as in verl_side.start_rank
    if packed:
        from verl.models.transformers import monkey_patch

        monkey_patch._flash_attention_forward = packed_attention
        # Set after loading: transformers would look for the package flash_attn.
        worker.engine.module.config._attn_implementation = "flash_attention_2"
    if kind == "lora":
        # Of a fresh adapter (B = 0) half of the gradient is zero.
        with torch.no_grad():
            for name, parameter in worker.engine.module.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
    return worker
