"""Which model the lab examines: a Hugging Face folder, a name on the hub, or a checkpoint of a verl run.

A checkpoint (`global_step_N`, or `global_step_N/actor`) is merged by verl's own `verl.model_merger` into the lab's
folder. verl's merger rounds the weights to bfloat16, as verl's GPU rollouts do. Responses are sampled from the rounded
weights and differentiated at them, so they are on policy.

Covered: FSDP2 checkpoints of any number of ranks; weights that change between sampling and gradients are noticed.
Not covered: Megatron checkpoints, LoRA adapters (refused), quantised weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlnorm_verl.files import UserError, is_path, write_json
from vlnorm_verl.tasks.base import content_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MERGED = "model"
MERGED_FROM = "merged_from.json"
_WEIGHTS = (".safetensors", ".bin")
NOT_CAUSAL = "is not a causal language model of transformers"


def resolve(model: str, out: Path) -> str:
    """What transformers and vLLM load for MODEL; merges a verl checkpoint into `out`/model.

    Args:
        model: a Hugging Face folder, `…/global_step_N` or `…/global_step_N/actor` of a verl run, or a name on the hub.
        out: the lab's folder.

    Raises:
        UserError: there is no such model, or verl cannot merge the checkpoint.
    """
    path = Path(model).expanduser()
    record = out / MERGED / MERGED_FROM
    if not path.exists() and record.is_file():
        # verl keeps few checkpoints: this one may be gone since it was merged.
        checkpoint = Path(json.loads(record.read_text(encoding="utf-8"))["checkpoint"])
        if checkpoint in (path.resolve(), path.resolve() / "actor"):
            return str(out / MERGED)
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        actor = path / "actor" if (path / "actor").is_dir() else path
        if (actor / "fsdp_config.json").is_file():
            return str(_merged(actor, out / MERGED))
        raise UserError(
            f"MODEL {model} holds neither config.json (a Hugging Face folder) nor fsdp_config.json, here or in "
            "actor/ (an FSDP checkpoint of verl 0.7.1 or later, …/checkpoints/global_step_N; merge an older one by its "
            "own verl's scripts/model_merger.py)"
        )
    if path.exists():
        raise UserError(f"MODEL {model} is a file; give the model's folder")
    if is_path(model):
        raise UserError(f"MODEL {model}: there is no such folder")
    return model


def _merged(actor: Path, target: Path) -> Path:
    """The checkpoint as a Hugging Face folder, merged unless it is there already."""
    shards = sorted(actor.glob("model_world_size_*_rank_*.pt"))
    source = {
        "checkpoint": str(actor.resolve()),
        "shards": {shard.name: [shard.stat().st_size, shard.stat().st_mtime_ns] for shard in shards},
    }
    record = target / MERGED_FROM
    if record.is_file():
        merged = json.loads(record.read_text(encoding="utf-8"))
        if merged == source:
            return target
        raise UserError(
            f"{target} was merged from {merged['checkpoint']} as it was then, not from {actor}: take another --out"
        )
    for killed in target.parent.glob(f".{target.name}.*.tmp"):  # of a call that was killed: gigabytes
        shutil.rmtree(killed, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    command = ["merge", "--backend", "fsdp", "--local_dir", str(actor), "--target_dir", str(temporary)]
    try:
        # A process of its own: verl's imports change other libraries and its merger prints.
        done = subprocess.run(
            [sys.executable, "-m", "verl.model_merger", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise UserError(f"MODEL {actor}: verl cannot merge this checkpoint:\n{done.stdout[-2000:]}")
        if (temporary / "lora_adapter").exists():
            raise UserError(
                f"MODEL {actor} has LoRA adapters: verl's merger leaves them out of the weights, which are those "
                "before training. Accepted: a Hugging Face folder with the adapters merged into the weights"
            )
        write_json(temporary / MERGED_FROM, source)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def fingerprint(resolved: str) -> str:
    """Tells weights apart: of a folder, by the bytes of its weights files; of a hub name, by its commit.

    Raises:
        UserError: a folder without weights, or a name that the hub does not have.
    """
    folder = Path(resolved)
    if not folder.is_dir():
        return str(load_config(resolved)._commit_hash)
    files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS)
    if not files:
        raise UserError(f"MODEL {resolved} has no weights ({' or '.join(f'*{suffix}' for suffix in _WEIGHTS)})")
    return hashlib.sha256("".join(f"{file.name} {content_sha256(file)}\n" for file in files).encode()).hexdigest()


def load_config(resolved: str) -> Any:
    """transformers' configuration of the model; raises as `_loaded`."""
    return _loaded("AutoConfig", resolved, "is not a model of transformers")


def load_tokenizer(resolved: str) -> PreTrainedTokenizerBase:
    """Raises as `_loaded`."""
    return _loaded("AutoTokenizer", resolved, "has no tokenizer that transformers reads")


def load_model(resolved: str) -> PreTrainedModel:
    """The model in float32, in evaluation mode, on torch's accelerator if there is one; raises as `_loaded`."""
    import torch

    options: dict[str, Any] = {"dtype": torch.float32}
    if getattr(load_config(resolved).get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # Gemma 2 by torch's attention would lack its cap, which vLLM has
    model: PreTrainedModel = _loaded("AutoModelForCausalLM", resolved, NOT_CAUSAL, **options)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(accelerator or "cpu").eval()


def skeleton(config: Any) -> PreTrainedModel:
    """A model of this configuration without numbers, on torch's meta device.

    Raises:
        UserError: transformers has no such causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UserError(f"MODEL {config.name_or_path} {NOT_CAUSAL}: {error}") from error
    return model


def _loaded(kind: str, resolved: str, wrong: str, **options: Any) -> Any:
    """
    Raises:
        UserError: transformers cannot load it.
    """
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(resolved, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"MODEL {resolved} {wrong}: {error}") from error
