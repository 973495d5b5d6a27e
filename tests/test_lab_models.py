"""Which parameters the lab takes of a model, whether weights are the same, and checkpoints of verl.

Checkpoints are written by verl's own checkpoint manager, and are `slow`.
"""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.lab_tiny import SIZES, differences, flat
from vlnorm_verl.files import UserError
from vlnorm_verl.lab import models, store
from vlnorm_verl.lab.gradients import compute, score_gradient
from vlnorm_verl.lab.parameters import LAST_QKV, parts_of, select_parameters
from vlnorm_verl.lab.rollouts import Design, sample
from vlnorm_verl.lab.store import load
from vlnorm_verl.lab.tasks import load_task
from vlnorm_verl.tasks.tiny import WEIGHTS


@pytest.fixture(scope="module")
def tiny() -> Any:
    return models.load_model(str(WEIGHTS))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            transformers.Qwen2Config(**SIZES, num_key_value_heads=1, intermediate_size=16),
            [f"model.layers.2.self_attn.{p}_proj.{k}" for p in "qkv" for k in ("weight", "bias")],
        ),
        (
            transformers.Qwen3Config(**SIZES, num_key_value_heads=1, intermediate_size=16, head_dim=8),
            [f"model.layers.2.self_attn.{p}_proj.weight" for p in "qkv"],
        ),
        (
            transformers.GPTNeoXConfig(**SIZES, intermediate_size=16),
            [f"gpt_neox.layers.2.attention.query_key_value.{k}" for k in ("weight", "bias")],
        ),
        (
            transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=12, n_head=2),
            [f"transformer.h.11.attn.c_attn.{k}" for k in ("weight", "bias")],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_last_qkv(config: Any, expected: list[str]) -> None:
    assert sorted(select_parameters(models.skeleton(config), "last-qkv")) == sorted(expected)


def test_gemma_2_keeps_the_cap_of_its_attention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        **SIZES,
        num_key_value_heads=1,
        intermediate_size=16,
        head_dim=8,
        initializer_range=1.0,
        attn_logit_softcapping=0.1,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    capped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(models.load_model(str(tmp_path))(tokens).logits, capped(tokens).logits)


def test_the_accelerator_that_torch_knows_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made it; torch's meta device stands for one."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("meta"))
    assert models.load_model(str(WEIGHTS)).device.type == "meta"


def test_tied_embeddings_count_once(tiny: Any) -> None:
    everything = select_parameters(tiny, "all")
    assert sum(parameter.numel() for parameter in everything.values()) == 337_152
    assert list(select_parameters(tiny, "lm_head")) == ["model.embed_tokens.weight"]
    assert list(select_parameters(tiny, r"lm_head|embed")) == ["model.embed_tokens.weight"]


def test_choice_by_regular_expression(tiny: Any) -> None:
    assert list(select_parameters(tiny, r"layers\.[01]\..*v_proj\.bias")) == [
        f"model.layers.{layer}.self_attn.v_proj.bias" for layer in (0, 1)
    ]
    with pytest.raises(UserError, match=r"matches no parameter\. Near: model\.layers\.N\.self_attn\.q_proj"):
        select_parameters(tiny, r"layers\.2\.q_projj")


def test_model_without_projections_lists_candidates() -> None:
    layer = torch.nn.ModuleDict({"attention": torch.nn.Linear(2, 2), "mlp": torch.nn.Linear(2, 2)})
    with pytest.raises(
        UserError, match=r"Give a regular expression; its parameters: 0\.attention\.weight, 0\.attention"
    ):
        select_parameters(torch.nn.ModuleList([layer]), "last-qkv")
    halves = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)})])
    with pytest.raises(UserError, match="this model has no q_proj, k_proj, v_proj"):
        select_parameters(halves, "last-qkv")


def test_parts_are_layers_or_the_modules_of_one() -> None:
    layer = [
        "model.layers.7.self_attn.q_proj.weight",
        "model.layers.7.self_attn.q_proj.bias",
        "model.layers.7.mlp.up.weight",
    ]
    assert parts_of(layer) == {"q_proj": layer[:2], "up": layer[2:]}
    more = ["wte.weight", *layer, "h.3.attn.c_attn.weight", "model.norm.weight"]
    assert parts_of(more) == {"other": [more[0], more[-1]], "layer 7": layer, "layer 3": [more[-2]]}


@pytest.mark.parametrize("changed", ["model.embed_tokens.weight", "model.layers.2.self_attn.q_proj.weight"])
def test_fingerprint_notices_a_change_of_any_parameter(tmp_path: Path, changed: str) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(WEIGHTS, tmp_path / "model")
    assert models.fingerprint(str(tmp_path / "model")) == models.fingerprint(str(WEIGHTS))
    file = tmp_path / "model" / "model.safetensors"
    size = file.stat().st_size
    parameters = load_file(file)
    save_file({**parameters, changed: parameters[changed] * 1.0001}, file, metadata={"format": "pt"})
    assert file.stat().st_size == size
    assert models.fingerprint(str(tmp_path / "model")) != models.fingerprint(str(WEIGHTS))


def save_checkpoint(rank: int, ranks: int, port: int, actor: str, lora: bool) -> None:
    """One rank of a verl worker that saves its shard: FSDP2 over gloo, verl's own checkpoint manager."""
    import peft
    import verl.utils.device
    from omegaconf import OmegaConf
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    assert verl.utils.device.get_device_name() == "cpu"
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    model = transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    layers = model.model.layers
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    contents = OmegaConf.create({"save_contents": ["model"], "load_contents": ["model"]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(WEIGHTS)
    manager = FSDPCheckpointManager(model, processing_class=tokenizer, checkpoint_config=contents)
    manager.save_checkpoint(actor, global_step=7)
    torch.distributed.destroy_process_group()


def checkpoint(step: Path, ranks: int, lora: bool = False) -> Path:
    from vlnorm_verl.cpu import cpu_environment

    with pytest.MonkeyPatch.context() as patched, socket.socket() as free:
        for name, value in cpu_environment(threads=1).items():
            patched.setenv(name, value)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(save_checkpoint, (ranks, port, str(step / "actor"), lora), nprocs=ranks)
    return step


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_verl_checkpoint_is_merged(tmp_path: Path, ranks: int) -> None:
    step = checkpoint(tmp_path / "checkpoints" / "global_step_7", ranks)
    out = tmp_path / "lab"
    task, design = load_task("tiny"), Design(0, 2, 1, 2)
    sample(str(step), task, design, 0, 1.0, 32, "transformers", out)
    merged = models.load_model(str(out / "model")).state_dict()
    expected = transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).state_dict()
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(merged[name], value.bfloat16().float()), name
    assert models.resolve(str(step / "actor"), out) == str(out / "model")

    # The checkpoint changed: what was merged from it is refused, not used.
    shard = next((step / "actor").glob("model_*_rank_0.pt"))
    shard.touch()
    with pytest.raises(UserError, match="as it was then"):
        compute(out)
    # The checkpoint is gone, as verl removes old ones: what was merged from it is used.
    shutil.rmtree(step)
    compute(out)
    group, raw = load(out, LAST_QKV).groups[0], next(store.read_rollouts(out))
    model = models.load_model(str(out / "model"))
    wanted = score_gradient(model, select_parameters(model, "last-qkv"), raw.prompt_ids, raw.responses[0], 1.0)
    assert differences(torch.tensor(group.score_gradients[0]), flat(wanted)) < 1e-5


@pytest.mark.slow
def test_lora_adapters_are_refused(tmp_path: Path) -> None:
    """verl's merger writes them into a folder of their own, beside the weights without them. Nothing stays on the disk,
    nor what a call that was killed had merged."""
    (tmp_path / "lab" / ".model.1.tmp" / "lora_adapter").mkdir(parents=True)
    step = checkpoint(tmp_path / "global_step_1", ranks=1, lora=True)
    with pytest.raises(UserError, match=r"has LoRA adapters: .* with the adapters merged into the weights"):
        models.resolve(str(step), tmp_path / "lab")
    assert list((tmp_path / "lab").iterdir()) == []


@pytest.mark.slow
def test_broken_checkpoint_is_said(tmp_path: Path) -> None:
    actor = tmp_path / "global_step_1" / "actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 1}')
    with pytest.raises(UserError, match=r"verl cannot merge this checkpoint:\n[\s\S]*huggingface"):
        models.resolve(str(actor), tmp_path / "lab")
    assert list((tmp_path / "lab").iterdir()) == []
