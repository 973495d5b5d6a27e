"""verl's side of the engine programs: its FSDP2 engine in its TrainingWorker, one rank, in float64 where asked for."""

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from tests.engine import older_verl, ranks, reference
from tests.engine.reference import LENGTHS, PROMPT, ROWS, M, Rows, Scenario, make_model, make_rows


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
        pad = torch.nn.functional.pad

        def right(values: torch.Tensor) -> torch.Tensor:
            return pad(values, (0, scenario.width - len(values)))

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
        clip_ratio=reference.CLIP_LOW,
        clip_ratio_low=reference.CLIP_LOW,
        clip_ratio_high=reference.CLIP_HIGH,
        clip_ratio_c=reference.CLIP_C,
        entropy_coeff=scenario.entropy_coeff,
        use_kl_loss=bool(scenario.kl_coef),
        kl_loss_coef=scenario.kl_coef,
        kl_loss_type="low_var_kl",
        policy_loss=PolicyLossConfig(loss_mode="vanilla"),
    )


def hf_model_config(folder: str) -> Any:
    from verl.workers.config import HFModelConfig

    return HFModelConfig(
        path=folder,
        load_tokenizer=False,
        use_remove_padding=False,
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )


def make_worker(folder: str, dtype: str) -> Any:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    precision = {"float32": "fp32", "float64": "fp64", "bfloat16": "fp32"}[dtype]
    types = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), precision)
    if dtype == "bfloat16":
        types["param_dtype"] = "bf16"
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=hf_model_config(folder),
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


def start_rank(rank: int, args: argparse.Namespace) -> tuple[torch.nn.Module, Rows, Any, range]:
    """Reference model, batch, verl's worker and this rank's rows."""
    ranks.prepare(args)
    ranks.join(rank, args)
    folder = f"{args.folder}/{rank}"
    rounded = args.dtype == "bfloat16"
    if args.dtype != "float32":
        allow_float64()
    model = make_model(folder, torch.float64 if rounded else getattr(torch, args.dtype)).to(args.device)
    if rounded:  # FSDP2 rounds the parameters, not the buffers
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16))
    if older_verl.needed():
        older_verl.start_process_group()  # after the model is saved: in a group, transformers 5.24 saves on rank 0 only
    rows = make_rows(model, torch.float32 if rounded else getattr(torch, args.dtype))
    worker = make_worker(folder, args.dtype)
    if not rounded:
        # Autocast knows no float64; with the parameters in the wanted type there is nothing to cast.
        worker.engine._autocast_dtype = torch.float32
    if next(worker.engine.module.parameters()).device.type != args.device:
        raise SystemExit(f"--device {args.device}: verl did not put its engine there")

    per_rank = ROWS // args.ranks
    return model, rows, worker, range(rank * per_rank, (rank + 1) * per_rank)


def train(worker: Any, scenario: Scenario, data: TensorDict) -> dict[str, float]:
    """One call of verl's worker; the metrics that it returns, averaged over their parts."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.losses import ppo_loss

    worker.set_loss_fn(functools.partial(ppo_loss, config=actor_config(scenario)))
    # Read in each micro-batch (workers/engine/fsdp/transformer_impl.py:702); the dataclass is frozen.
    object.__setattr__(worker.engine.engine_config, "use_no_sync_for_gradient_accumulation", not scenario.reduced_each)
    with sabotaged(scenario.sabotage):
        metrics = tu.get(worker.train_mini_batch(data), "metrics")
    return {k: float(np.mean(v.values if hasattr(v, "values") else v)) for k, v in metrics.items()}


@contextlib.contextmanager
def recording(engine: Any, collective: str = "all_reduce") -> Iterator[list[tuple[torch.Tensor, list[int], int]]]:
    """Of each optimizer step the gradient of all that is trained, this rank's rows, and how often until then a function
    of torch.distributed was called."""
    steps: list[tuple[torch.Tensor, list[int], int]] = []
    rows: list[list[int]] = []
    train_batch, optimizer_step = engine.train_batch, engine.optimizer_step
    function, calls = getattr(torch.distributed, collective), 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return function(*args, **kwargs)

    def recording_train_batch(data: TensorDict, loss_function: Callable) -> Any:
        ids = data.get("row_id", None)  # features.py leaves them out
        rows.append([] if ids is None else ids.tolist())
        return train_batch(data, loss_function)

    def recording_step() -> Any:
        norm = optimizer_step()
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        gradient = torch.cat([p.grad.full_tensor().flatten() for p in trained])
        steps.append((gradient.cpu(), rows[-1], calls))
        return norm

    engine.train_batch, engine.optimizer_step = recording_train_batch, recording_step
    setattr(torch.distributed, collective, counting)
    try:
        yield steps
    finally:
        setattr(torch.distributed, collective, function)
        del engine.train_batch, engine.optimizer_step


@contextlib.contextmanager
def sabotaged(kind: str) -> Iterator[None]:
    """The two mistakes that the test must be able to see."""
    from vlnorm_verl import aggregation
    from vlnorm_verl.plugin import hooks

    def local_aggregate(mat: torch.Tensor, mask: torch.Tensor, method: Any, total: Any, scale: Any) -> torch.Tensor:
        # What averaging per micro-batch does: weights of the own rows only, then the share of the mini-batch.
        local_total = aggregation.mini_batch_sum(method, aggregation.response_lengths(mask))
        return honest_aggregate(mat, mask, method, local_total, scale) * (len(mat) / ROWS)

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


def plugin_is_active() -> bool:
    from verl.trainer.ppo import core_algos

    return hasattr(core_algos.agg_loss, "__wrapped__")
