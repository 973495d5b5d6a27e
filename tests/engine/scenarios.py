"""Gradients of verl's real FSDP2 engine on gloo ranks or on GPUs, against Σ x_i g_i computed without verl.

    python -m tests.engine.scenarios --ranks 2 --dtype float64 [--device cuda] --out FILE

runs every scenario below in one process group and writes FILE as JSON: one row per optimizer step with the relative
error of the whole gradient vector. tests/test_engine.py asserts on it. With --stock it runs verl's own modes and
writes a hash of the gradient instead (tests/test_plugin_agg_loss.py compares them with and without the plugin). With
--native it runs VL Norm of a verl that knows the mode by itself, a patched one (tests/test_patches.py).

It runs on verl 0.7.1, 0.8.0, 0.9.0 and 0.9.1. Releases before 0.9.0 find no plugin by themselves: set
VERL_USE_EXTERNAL_MODULES=vlnorm_verl.verl_entry.

The reference shares nothing with the project but the model's weights: transformers' model on one unpadded response
at a time, on the engine's device, the clipped loss written out here, weights by numpy from paper §1.

bfloat16 is verl's default: parameters in float32, computed in bfloat16, reduced in float32. The reference is then in
float64 at the rounded weights. Most of the distance to it is the engine's rounding of every g_i, so rows have a second
one, `error_of_sum`: to Σ x_i g_i with g_i of the same engine for response i alone. Every scenario of vl_norm runs with
verl's token-mean as well ("stock …"), which shows what rounding is.

With fewer GPUs than ranks, all ranks share the first one.

Exercised: TrainingWorker.train_mini_batch (mini-batches, shuffling, epochs), BaseEngine.train_batch, FSDP2 sharding
and gradient reduction, static and dynamic micro-batches, nested (V1) and padded (V0) data, entropy and KL terms,
masked and rejected rows, an empty rank, an empty mini-batch. Not exercised: flash-attn, Ulysses, other engines, Ray.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from tests.engine import older_verl
from tests.engine.batch import CLIP_C, CLIP_HIGH, CLIP_LOW, LENGTHS, PROMPT, ROWS, VOCAB, M
from vlnorm_verl import cpu


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
    sabotage: str = ""
    tags: list[str] = field(default_factory=list)


def scenarios(ranks: int) -> list[Scenario]:
    out = []
    per_rank = ROWS // ranks
    for mode in ("vl_norm", "vl_norm:0.75", "vl_norm:0"):
        out += [Scenario(f"micro-batches of {m}", mode, micro=m) for m in (1, 2, 4) if m <= per_rank]
        out += [Scenario(f"dynamic, {t} tokens", mode, micro=None, tokens=t) for t in (60, 110)]
        out += [
            Scenario("shuffled, 2 epochs of 2 mini-batches", mode, mini=ROWS // 2, epochs=2, shuffle=True),
            Scenario("padded", mode, padded=True),
            Scenario("padded, wider", mode, padded=True, width=60, micro=1),
            Scenario("entropy and KL", mode, entropy_coeff=0.1, kl_coef=0.2),
            Scenario("3 rows masked", mode, masked=(1, 4, 15)),
            Scenario("3 rows masked, padded, dynamic", mode, masked=(1, 4, 15), padded=True, micro=None, tokens=60),
            Scenario("3 rows rejected", mode, rejected=(0, 6, 12)),
            Scenario("3 rows rejected, padded", mode, rejected=(0, 6, 12), padded=True),
            *([Scenario("first rank empty", mode, masked=tuple(range(per_rank)))] if ranks > 1 else []),
        ]
    out += [Scenario("other methods", mode) for mode in ("vl_norm:2", "grpo_norm", "dapo_norm", "dr_grpo_norm")]
    out += [Scenario("other methods, masked", m, masked=(1, 4, 15)) for m in ("grpo_norm", "dapo_norm", "dr_grpo_norm")]
    out += [Scenario("stock Dr. GRPO", "seq-mean-token-sum-norm")]
    out += [Scenario("no valid token", mode, masked=tuple(range(ROWS))) for mode in ("vl_norm", "grpo_norm")]
    out += [Scenario("no valid token, padded", padded=True, masked=tuple(range(ROWS)))]
    out += [
        Scenario("sabotage: micro-batch-local sum", m, micro=1, sabotage="micro") for m in ("vl_norm", "vl_norm:0.75")
    ]
    if ranks > 1:
        out += [Scenario("sabotage: rank-local sum", sabotage="rank")]
    if not older_verl.takes_nested_data():
        for scenario in out:
            scenario.padded = True
            # Without remove_padding verl 0.7.1 attends to no token beyond the padded width of the response, in any mode
            # (workers/engine/fsdp/transformer_impl.py:967): the prompt has to fit into it as well.
            scenario.width = 60
    return out


def native_scenarios(ranks: int) -> list[Scenario]:
    """Those that a verl with the mode of its own can run; few of them for each α, on which only weights depend."""
    for_every_alpha = ("micro-batches of 2", "3 rows masked")
    return [
        s
        for s in scenarios(ranks)
        if not s.sabotage and (s.mode == "vl_norm" or (s.mode.startswith("vl_norm:") and s.name in for_every_alpha))
    ]


def rounded_scenarios(ranks: int) -> list[Scenario]:
    """For bfloat16: those of vl_norm, honest ones with verl's token-mean too."""
    ours = [s for s in scenarios(ranks) if s.mode == "vl_norm" and not s.name.startswith("no valid token")]
    # verl's token-mean counts the tokens of rejected responses.
    honest = [s for s in ours if not s.sabotage and not s.rejected]
    return ours + [replace(s, name=f"stock {s.name}", mode="token-mean") for s in honest]


STOCK_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


# ------------------------------------------------------------------------------------------------------ reference


def weights(mode: str, lengths: np.ndarray) -> np.ndarray:
    """x_i by the table of paper §1 over the responses with a valid token."""
    x, n = np.zeros(len(lengths)), lengths[lengths > 0].astype(np.float64)
    if not len(n):
        return x
    name, _, parameter = mode.partition(":")
    if name == "vl_norm":
        z = n ** -float(parameter or 1)
        x[lengths > 0] = z / z.sum() / M
    elif name in ("dr_grpo_norm", "seq-mean-token-sum-norm"):
        x[lengths > 0] = 1 / (len(n) * M)
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


def response_gradients(model: torch.nn.Module, rows: "Rows", scenario: Scenario) -> torch.Tensor:
    """g_i of every response [ROWS, parameters]: gradient of its summed token losses, one response at a time."""
    gradients = []
    for i, length in enumerate(LENGTHS):
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
        assert len(chosen) == length
        model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]).cpu())
    return torch.stack(gradients)


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


# ---------------------------------------------------------------------------------------------------- verl's side


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


def make_data(rows: Rows, scenario: Scenario, mine: range) -> TensorDict:
    """This rank's responses as verl's V1 trainer (nested) or V0 trainer (padded) hands them to update_actor."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.padding import left_right_2_no_padding

    masks = [torch.full((LENGTHS[i],), int(i not in scenario.masked)) for i in mine]
    response_masks = [mask * int(i not in scenario.rejected) for i, mask in zip(mine, masks, strict=True)]
    columns = {"old_log_probs": rows.old, "ref_log_prob": rows.ref, "advantages": rows.advantages}
    meta = {
        "temperature": 1.0,
        "global_batch_size": scenario.mini,
        "mini_batch_size": scenario.mini,
        "epochs": scenario.epochs,
        "seed": 3,
        "dataloader_kwargs": {"shuffle": scenario.shuffle},
        "calculate_entropy": bool(scenario.entropy_coeff),
        "use_dynamic_bsz": scenario.micro is None,
        "max_token_len_per_gpu": scenario.tokens,
        "micro_batch_size_per_gpu": scenario.micro,
        "pad_token_id": 0,
    }
    row_id = torch.tensor(list(mine))
    if scenario.padded:
        pad = functools.partial(torch.nn.functional.pad, mode="constant", value=0)
        right = lambda t: pad(t, (0, scenario.width - len(t)))  # noqa: E731
        # Prompts are padded on the left by one token, so that there is something to strip.
        ids = torch.stack([pad(right(rows.ids[i][PROMPT:]), (PROMPT + 1, 0)) for i in mine])
        for row, i in enumerate(mine):
            ids[row, 1 : PROMPT + 1] = rows.ids[i][:PROMPT]
        attention = torch.zeros_like(ids)
        for row, i in enumerate(mine):
            attention[row, 1 : PROMPT + 1 + LENGTHS[i]] = 1
        tensors = {
            "input_ids": ids,
            "attention_mask": attention,
            "position_ids": (attention.cumsum(-1) - 1).clamp(min=0),
            "prompts": ids[:, : PROMPT + 1],
            "responses": ids[:, PROMPT + 1 :],
            "response_mask": torch.stack([right(m) for m in masks]),
            "row_id": row_id,
        } | {k: torch.stack([right(v[i]) for i in mine]) for k, v in columns.items()}
        data = TensorDict(tensors, batch_size=[len(mine)])
        tu.assign_non_tensor(data, **meta)
        data = left_right_2_no_padding(data)  # makes the loss mask
        data["response_mask"] = torch.stack([right(m) for m in response_masks])
        return data

    nest = functools.partial(torch.nested.as_nested_tensor, layout=torch.jagged)
    nested = {
        "input_ids": nest([rows.ids[i] for i in mine]),
        "position_ids": nest([torch.arange(len(rows.ids[i])) for i in mine]),
        "prompts": nest([rows.ids[i][:PROMPT] for i in mine]),
        "responses": nest([rows.ids[i][PROMPT:] for i in mine]),
        "response_mask": nest(response_masks),
        "loss_mask": nest([torch.cat([torch.zeros(PROMPT, dtype=m.dtype), m]) for m in masks]),
        "row_id": row_id,
    } | {k: nest([v[i] for i in mine]) for k, v in columns.items()}
    return tu.get_tensordict(tensor_dict=nested, non_tensor_dict=meta)


def actor_config(scenario: Scenario) -> Any:
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode=scenario.mode,
        loss_scale_factor=M,
        clip_ratio=CLIP_LOW,
        clip_ratio_low=CLIP_LOW,
        clip_ratio_high=CLIP_HIGH,
        clip_ratio_c=CLIP_C,
        entropy_coeff=scenario.entropy_coeff,
        use_kl_loss=bool(scenario.kl_coef),
        kl_loss_coef=scenario.kl_coef,
        kl_loss_type="low_var_kl",
        policy_loss=PolicyLossConfig(loss_mode="vanilla"),
    )


def make_worker(folder: str, dtype: str) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    precision = {"float32": "fp32", "float64": "fp64", "bfloat16": "fp32"}[dtype]
    types = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), precision)
    if dtype == "bfloat16":
        types["param_dtype"] = "bf16"
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=folder,
                load_tokenizer=False,
                use_remove_padding=False,
                enable_gradient_checkpointing=False,
                override_config={"attn_implementation": "sdpa"},
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                model_dtype=precision,
                mixed_precision=types,
                use_torch_compile=False,
                use_dynamic_bsz=False,
                micro_batch_size_per_gpu=1,
                wrap_policy={"min_num_params": 0, "transformer_layer_cls_to_wrap": ["Qwen2DecoderLayer"]},
            ),
            # A learning rate of 0 keeps the weights where the reference was taken, over every optimizer step.
            optimizer_config=FSDPOptimizerConfig(lr=0.0, clip_grad=1e30),
            checkpoint_config=CheckpointConfig(),
            profiler_config=None,
        )
    )
    worker.reset()
    return worker


def allow_float64() -> None:
    """verl and transformers have no float64 path; the equality to 1e-12 needs one. In this test's processes only."""
    from transformers.models.qwen2 import modeling_qwen2
    from verl.utils.torch_dtypes import PrecisionType

    stock, stock_norm = PrecisionType.to_dtype, modeling_qwen2.Qwen2RMSNorm.forward
    PrecisionType.to_dtype = staticmethod(lambda p: torch.float64 if p == "fp64" else stock(p))

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.float64:
            return stock_norm(self, hidden_states)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    modeling_qwen2.Qwen2RMSNorm.forward = forward


@contextlib.contextmanager
def sabotaged(kind: str) -> Iterator[None]:
    """The two mistakes that the test must be able to see."""
    from vlnorm_verl import aggregation
    from vlnorm_verl.plugin import hooks

    def local_aggregate(mat: torch.Tensor, mask: torch.Tensor, method: Any, total: Any, scale: Any) -> torch.Tensor:
        # What averaging per micro-batch does: weights of the own rows only, then the share of the mini-batch.
        own = aggregation.mini_batch_sum(method, aggregation.response_lengths(mask))
        return honest_aggregate(mat, mask, method, own, scale) * (len(mat) / ROWS)

    honest_aggregate, honest_sum = aggregation.aggregate, hooks.sum_over_data_parallel_ranks
    try:
        if kind == "micro":
            aggregation.aggregate = local_aggregate
        if kind == "rank":
            world = torch.distributed.get_world_size()
            hooks.sum_over_data_parallel_ranks = lambda engine, sums: sums * world
        yield
    finally:
        aggregation.aggregate, hooks.sum_over_data_parallel_ranks = honest_aggregate, honest_sum


@contextlib.contextmanager
def recording(engine: Any) -> Iterator[list[tuple[torch.Tensor, list[int], int]]]:
    """The whole gradient, this rank's rows and the number of all-reduces until then, of each optimizer step."""
    steps: list[tuple[torch.Tensor, list[int], int]] = []
    rows: list[list[int]] = []
    train_batch, optimizer_step, all_reduce = engine.train_batch, engine.optimizer_step, torch.distributed.all_reduce
    all_reduces = 0

    def counting_all_reduce(*args: Any, **kwargs: Any) -> Any:
        nonlocal all_reduces
        all_reduces += 1
        return all_reduce(*args, **kwargs)

    def recording_train_batch(data: TensorDict, loss_function: Callable) -> Any:
        rows.append(data["row_id"].tolist())
        return train_batch(data, loss_function)

    def recording_step() -> Any:
        norm = optimizer_step()
        gradient = torch.cat([p.grad.full_tensor().flatten() for p in engine.module.parameters()])
        steps.append((gradient.cpu(), rows[-1], all_reduces))
        return norm

    engine.train_batch, engine.optimizer_step = recording_train_batch, recording_step
    torch.distributed.all_reduce = counting_all_reduce
    yield steps
    torch.distributed.all_reduce = all_reduce
    del engine.train_batch, engine.optimizer_step


def join_ranks(rank: int, args: argparse.Namespace) -> None:
    """Environment, device and, where it is not verl's default, process group of this rank."""
    shared = args.device == "cuda" and torch.cuda.device_count() < args.ranks
    local = "0" if shared else str(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=local, WORLD_SIZE=str(args.ranks), LOCAL_WORLD_SIZE=str(args.ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    if args.device == "cuda":
        torch.cuda.set_device(int(local))
    if shared:
        # NCCL refuses two ranks of one host on one GPU: each is a host of its own, and they meet over loopback.
        os.environ.update(NCCL_HOSTID=f"rank-{rank}", NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1")
        os.environ.update(NCCL_NET="Socket", NCCL_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
    if args.backend == "gloo" and args.device == "cuda":
        # verl would ask for nccl; it takes a group that is there.
        torch.distributed.init_process_group("cpu:gloo,cuda:gloo", rank=rank, world_size=args.ranks)


def start_rank(rank: int, args: argparse.Namespace) -> tuple[torch.nn.Module, Rows, Any, range]:
    """Reference model, batch, verl's worker and this rank's rows."""
    prepare(args)
    join_ranks(rank, args)
    folder = f"{args.folder}/{rank}"
    rounded = args.dtype == "bfloat16"
    if args.dtype != "float32":
        allow_float64()
    reference = make_model(folder, torch.float64 if rounded else getattr(torch, args.dtype)).to(args.device)
    if rounded:  # FSDP2 rounds the parameters, not the buffers
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
    if older_verl.needed():
        older_verl.start_process_group()  # after the model is saved: in a group, transformers 5.24 saves on rank 0 only
    rows = make_rows(reference, torch.float32 if rounded else getattr(torch, args.dtype))
    worker = make_worker(folder, args.dtype)
    if not rounded:
        # Autocast knows no float64; with the parameters in the wanted type there is nothing to cast.
        worker.engine._autocast_dtype = torch.float32
    if next(worker.engine.module.parameters()).device.type != args.device:
        raise SystemExit(f"--device {args.device}: verl did not put its engine there")

    per_rank = ROWS // args.ranks
    return reference, rows, worker, range(rank * per_rank, (rank + 1) * per_rank)


def train(worker: Any, scenario: Scenario, data: TensorDict) -> dict[str, float]:
    """One call of verl's worker; the metrics that it returns, averaged over their parts."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.losses import ppo_loss

    worker.set_loss_fn(functools.partial(ppo_loss, config=actor_config(scenario)))
    with sabotaged(scenario.sabotage):
        metrics = tu.get(worker.train_mini_batch(data), "metrics")
    return {k: float(np.mean(v.values if hasattr(v, "values") else v)) for k, v in metrics.items()}


def loss_without_gradient(worker: Any, data: TensorDict) -> float:
    """Of the mini-batch, by the loss function that `worker` was trained with last."""
    from verl.utils import tensordict_utils as tu

    return float(tu.get(worker.infer_batch(data), "metrics")["loss"])


def plugin_is_active() -> bool:
    from verl.trainer.ppo import core_algos

    return hasattr(core_algos.agg_loss, "__wrapped__")


def run_stock(rank: int, args: argparse.Namespace) -> None:
    """verl's own modes: gradient hashes and metrics."""
    _, rows, worker, mine = start_rank(rank, args)
    results = []
    for mode in STOCK_MODES:
        if mode == "token-sum" and not older_verl.has_token_sum():
            continue
        scenario = Scenario("stock", mode, micro=4, masked=(1, 4, 15), entropy_coeff=0.1, kl_coef=0.2)
        scenario.padded = not older_verl.takes_nested_data()
        with recording(worker.engine) as steps:
            metrics = train(worker, scenario, make_data(rows, scenario, mine))
        results.append(
            {
                "scenario": scenario.name,
                "mode": mode,
                "plugin": plugin_is_active(),
                "gradient_sha256": hashlib.sha256(steps[0][0].numpy().tobytes()).hexdigest(),
                "metrics": {k: v for k, v in metrics.items() if not k.startswith(("perf/", "mfu"))},
            }
        )
    finish(rank, args, results)


def finish(rank: int, args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    if rank == 0:
        Path(args.out).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def engine_gradients(worker: Any, rows: Rows, scenario: Scenario, mine: range) -> torch.Tensor:
    """As `response_gradients`, but by verl's engine: token-mean of a mini-batch that has no other token."""
    gradients = []
    for i, length in enumerate(LENGTHS):
        others = tuple(j for j in range(ROWS) if j != i)
        terms = {"entropy_coeff": scenario.entropy_coeff, "kl_coef": scenario.kl_coef}
        alone = Scenario("alone", "token-mean", micro=1, masked=others, **terms)
        with recording(worker.engine) as steps:
            train(worker, alone, make_data(rows, alone, mine))
        gradients.append(steps[0][0].double() * length)
    return torch.stack(gradients)


def relative_error(gradient: torch.Tensor, x: np.ndarray, g: torch.Tensor) -> tuple[float, float]:
    """Distance from Σ x_i g_i relative to its norm, and the norm; the distance itself where that is 0."""
    expected = torch.from_numpy(x).to(g.dtype) @ g
    distance, norm = (gradient.to(g.dtype) - expected).norm().item(), expected.norm().item()
    return distance / norm if norm else distance, norm


def run_exact(rank: int, args: argparse.Namespace) -> None:
    """Our modes: relative error of the gradient."""
    reference, rows, worker, mine = start_rank(rank, args)
    gradients: dict[tuple[float, float], torch.Tensor] = {}
    by_engine: dict[tuple[float, float], torch.Tensor] = {}
    results = []
    chosen = native_scenarios if args.native else rounded_scenarios if args.dtype == "bfloat16" else scenarios
    for scenario in chosen(args.ranks):
        if not any(part in scenario.name for part in args.only) or (args.mode and scenario.mode not in args.mode):
            continue
        key = (scenario.entropy_coeff, scenario.kl_coef)
        if key not in gradients:
            gradients[key] = response_gradients(reference, rows, scenario)
            if args.dtype == "bfloat16":
                by_engine[key] = engine_gradients(worker, rows, scenario, mine)
        with recording(worker.engine) as steps:
            metrics = train(worker, scenario, make_data(rows, scenario, mine))
        if scenario.name == "micro-batches of 1" and not args.native:
            metrics["loss_without_gradient"] = loss_without_gradient(worker, make_data(rows, scenario, mine))
        for step, (gradient, own, all_reduces) in enumerate(steps):
            everyone: list[list[int]] = [[] for _ in range(args.ranks)]
            torch.distributed.all_gather_object(everyone, own)
            used = [i for part in everyone for i in part]
            lengths = np.array([0 if i in scenario.masked + scenario.rejected else LENGTHS[i] for i in used])
            x = weights(scenario.mode, lengths)
            error, norm = relative_error(gradient, x, gradients[key][used])
            results.append(
                {
                    "scenario": scenario.name,
                    "mode": scenario.mode,
                    "step": step,
                    "all_reduces": all_reduces,
                    "lengths": lengths.tolist(),
                    "scale": M,
                    "norm": norm,
                    "error": error,
                    "metrics": {k: v for k, v in metrics.items() if k.startswith(("vl_norm/", "loss"))},
                }
            )
            if key in by_engine:
                results[-1]["error_of_sum"], _ = relative_error(gradient, x, by_engine[key][used])
    finish(rank, args, results)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def set_environment(device: str) -> None:
    """What verl reads at import. On GPUs no kernel that computes in float32 whatever the type."""
    if device == "cuda":
        os.environ.update(VERL_DISABLE_FLASH_ATTN_CE="1", TORCHDYNAMO_DISABLE="1")
    else:
        os.environ.update(older_verl.environment() if older_verl.needed() else cpu.cpu_environment(threads=1))
    torch.set_num_threads(1)  # a pool of threads would not survive a fork


@functools.cache
def import_verl(device: str) -> None:
    """verl for that device, once: forked ranks have it already."""
    set_environment(device)
    importlib.import_module("verl")
    if older_verl.needed():
        older_verl.prepare()
    else:
        # With VERL_USE_EXTERNAL_PLUGINS=none the plugin is off, but the CPU still has to be a platform.
        cpu.register()
    older_verl.unpad_without_flash_attn()
    importlib.import_module("verl.workers.engine_workers")


def prepare(args: argparse.Namespace) -> None:
    """verl and what the command line asks for beside it. Before forking, and in every rank."""
    import_verl(args.device)
    if getattr(args, "load", None):
        importlib.import_module(args.load)


def start(run: Callable[[int, argparse.Namespace], None], args: argparse.Namespace) -> None:
    """run(rank, args) in a process for each rank."""
    with tempfile.TemporaryDirectory() as folder:
        args.folder, args.port = folder, free_port()
        # CUDA does not survive a fork. Elsewhere a rank would spend longer on importing verl than on its gradients.
        method = "fork" if args.device == "cpu" else "spawn"
        torch.multiprocessing.start_processes(run, (args,), nprocs=args.ranks, start_method=method)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that this program and features.py share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True, choices=[1, 2, 4])
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16"], required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", choices=["nccl", "gloo"], default="nccl", help="of the ranks on GPUs")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--out", required=True, help="JSON file to write")
    return parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--mode", nargs="+", help="only scenarios of these modes; default: all")
    parser.add_argument("--stock", action="store_true", help="verl's own modes instead")
    parser.add_argument(
        "--native", action="store_true", help="vl_norm of verl itself; fails where the plugin is active"
    )
    parser.add_argument(
        "--load", metavar="MODULE", help="a module to import after verl, such as one that registers a mode"
    )
    args = parser.parse_args()
    if args.device == "cpu":
        prepare(args)
    if args.native and plugin_is_active() and importlib.import_module("vlnorm_verl.plugin").is_ours("vl_norm"):
        parser.error("--native: this verl has no vl_norm itself, the plugin answers for it")
    start(run_stock if args.stock else run_exact, args)


if __name__ == "__main__":
    main()
