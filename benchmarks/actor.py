"""verl's actor on one rank, for measurements: a worker of its FSDP2 engine and a mini-batch of random responses.

Two ways of training: in float32, as the CPU stack does it, and as a GPU does it (`half`): parameters and moments in
float32, computed in bfloat16, gradient checkpointing, log-probabilities by verl's fused linear layer, so that the
logits of a long response are never in memory. Attention is PyTorch's: flash-attn is not on every machine.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vlnorm_verl.cpu import cpu_environment

PROMPT = 24  # tokens


def qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int = 2, vocabulary: int = 151936
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


SHAPES = {  # Qwen2.5's config.json
    "3b": qwen2(2048, 11008, 36, 16),
    "1.5b": qwen2(1536, 8960, 28, 12),
    "0.5b": qwen2(896, 4864, 24, 14),
    "tiny": qwen2(64, 128, 2, 2, kv_heads=1, vocabulary=128),  # to try it on a CPU
}


def set_environment(device: str, threads: int) -> None:
    """What verl and OpenMP read when they are imported, for one rank on `device`."""
    if device == "cpu":
        os.environ.update(cpu_environment(threads))
    else:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def save_random_model(shape: str, folder: Path, device: str, seed: int) -> Path:
    """A Hugging Face folder with random bfloat16 weights of that shape; the heads' size is Qwen2.5's."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        **SHAPES[shape], max_position_embeddings=32768, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1
    )
    torch.manual_seed(seed)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def make_worker(model: Path, micro: int, half: bool) -> Any:
    """verl's actor worker in this process, one rank. The learning rate is 0: every update does the same work."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    types = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=str(model),
                load_tokenizer=False,
                use_remove_padding=half,
                use_fused_kernels=half,
                fused_kernel_options={"impl_backend": "torch"},
                enable_gradient_checkpointing=half,
                override_config={"attn_implementation": "sdpa"},
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                model_dtype="fp32",
                mixed_precision=types | ({"param_dtype": "bf16"} if half else {}),
                use_torch_compile=False,
                use_dynamic_bsz=False,
                micro_batch_size_per_gpu=micro,
                use_no_sync_for_gradient_accumulation=False,  # as verl's trainer has it
            ),
            optimizer_config=FSDPOptimizerConfig(lr=0.0),
            checkpoint_config=CheckpointConfig(),
            profiler_config=None,
        )
    )
    worker.reset()
    return worker


def make_batch(responses: int, length: int, micro: int, vocabulary: int, seed: int) -> Callable[[], Any]:
    """A maker of one and the same mini-batch; train_mini_batch takes keys out of what it is given.

    Lengths are spread from 8 to `length` tokens, log-uniformly: many short responses, few long ones, as in RLVR.
    """
    import torch
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(seed)
    shortest = min(8, length)
    spread = torch.rand(responses, generator=generator)
    lengths = (shortest * (length / shortest) ** spread).round().long()
    lengths[0] = length
    nest = functools.partial(torch.nested.as_nested_tensor, layout=torch.jagged)

    def normal(n: int) -> Any:
        return torch.randn(n, generator=generator)

    sizes = lengths.tolist()
    ids = [torch.randint(2, vocabulary, (PROMPT + n,), generator=generator) for n in sizes]
    # Log-probabilities of a policy that knows little: ratios around 1, so that all branches of the loss are taken.
    old = [-float(np.log(vocabulary)) + 0.2 * normal(n) for n in sizes]
    tensors = {
        "input_ids": nest(ids),
        "position_ids": nest([torch.arange(PROMPT + n) for n in sizes]),
        "prompts": nest([row[:PROMPT] for row in ids]),
        "responses": nest([row[PROMPT:] for row in ids]),
        "response_mask": nest([torch.ones(n, dtype=torch.long) for n in sizes]),
        "loss_mask": nest([torch.cat([torch.zeros(PROMPT), torch.ones(n)]).long() for n in sizes]),
        "old_log_probs": nest(old),
        "advantages": nest([normal(1).expand(n).contiguous() for n in sizes]),
    }
    meta = {
        "temperature": 1.0,
        "global_batch_size": responses,
        "mini_batch_size": responses,
        "epochs": 1,
        "seed": seed,
        "dataloader_kwargs": {"shuffle": False},
        "calculate_entropy": False,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": micro,
        "pad_token_id": 0,
    }
    return lambda: tu.get_tensordict(tensor_dict=dict(tensors), non_tensor_dict=dict(meta))
