"""Gradients of verl's engines other than FSDP2 on two gloo ranks, against Σ x_i g_i computed without verl.

    python -m tests.engine.other_engines --packages FOLDER --out FILE

installs the packages of the engines below FOLDER if they are not there, without what they depend on, and writes FILE as
JSON: one row a mini-batch with the relative error of the whole gradient vector, as tests/engine/scenarios.py does for
FSDP2. tests/test_other_engines.py asserts on it, docs/engines.md says what it shows.

Of each engine its own class, `train_batch`, `forward_backward_batch`, `forward_step` and data-parallel group run, and
the reduction of gradients that it configures. What a CPU cannot run is replaced, here and nowhere else:

| engine     | real package         | replaced                                                                        |
|------------|----------------------|---------------------------------------------------------------------------------|
| fsdp       | torch's FSDP1        | the argument sync_module_states, which torch refuses for a module on the CPU;   |
|            |                      | the clipping, which torch refuses in float64                                    |
| megatron   | megatron-core 0.16.1 | "cuda" means the CPU; the clipping, which asks for CUDA; a small model whose    |
|            |                      | tokens do not see each other for GPTModel, which needs Megatron-Bridge; for     |
|            |                      | dynamic context parallelism also the scheduler and one-rank groups, both newer  |
|            |                      | than the newest release; for the distributed optimizer its step                 |
| veomni     | veomni 0.1.12        | its model builder and optimizer: transformers' Qwen2, torch's SGD               |
| torchtitan | torchtitan 0.3.0     | its Trainer: transformers' Qwen2, sharded as torchtitan does; one moved module  |
| automodel  | nemo-automodel 0.4.0 | its model builder and optimizer: transformers' Qwen2, torch's SGD               |

All is in float64: where verl and Megatron cast to float32 whatever they get, they do not here.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.engine import older_verl
from tests.engine import scenarios as fsdp2
from vlnorm_verl import cpu

Engine = Any
Gradient = dict[str, torch.Tensor]  # parameter's name -> the whole, reduced gradient


@dataclass
class Case:
    """One way to lay an engine out over the ranks."""

    name: str
    build: Callable[[str], Engine]  # folder of the Qwen2 checkpoint -> engine
    gradient: Callable[[Engine], Gradient]
    reference: Callable[[str], nn.Module]  # the same model without any engine
    replicated: bool = False  # every rank holds the whole mini-batch
    padded: bool = True  # whether V0's padded batches are understood: see `SCENARIOS`


# torchtitan and automodel, unpadding off, make the attention mask of V0's padded batches from the response's mask
# (torchtitan/transformer_impl.py:763, automodel/transformer_impl.py:561): their log-probabilities are then not the
# model's, in verl's own modes too. They get nested batches, as the V1 trainer makes them.
SCENARIOS = [
    fsdp2.Scenario("micro-batches of 2"),
    fsdp2.Scenario("padded, alpha 0.75", "vl_norm:0.75", micro=4, padded=True),
    fsdp2.Scenario("dynamic, 3 rows masked", micro=None, tokens=60, masked=(1, 4, 15)),
    fsdp2.Scenario("entropy and KL", entropy_coeff=0.1, kl_coef=0.2),
    fsdp2.Scenario("stock Dr. GRPO", "seq-mean-token-sum-norm"),
    fsdp2.Scenario("sabotage: micro-batch-local sum", sabotage="micro"),
    fsdp2.Scenario("sabotage: rank-local sum", sabotage="rank"),
]


# ------------------------------------------------------------------------------------------------ what all engines do


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


# -------------------------------------------------------------------------------------------------------------- FSDP1


def build_fsdp1(folder: str) -> Engine:
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp import transformer_impl

    class FSDP(transformer_impl.FSDP):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Every rank has loaded the same weights; torch broadcasts them only between accelerators.
            super().__init__(*args, **kwargs | {"sync_module_states": False})

        def clip_grad_norm_(self, *_: Any) -> torch.Tensor:
            return torch.tensor(0.0)  # torch's takes no float64; it would clip nothing here

    transformer_impl.FSDP = FSDP
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp",
        model_config=hf_model_config(folder),
        engine_config=FSDPEngineConfig(
            strategy="fsdp",
            model_dtype="fp64",
            mixed_precision=dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp64"),
            use_torch_compile=False,
            use_orig_params=True,
            wrap_policy={"min_num_params": 0},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=0.0, clip_grad=1e30),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    engine._autocast_dtype = torch.float32  # autocast knows no float64
    return engine


def fsdp1_gradient(engine: Engine) -> Gradient:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(engine.module, with_grads=True, writeback=False):
        return {
            name.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for name, p in engine.module.named_parameters()
        }


# ------------------------------------------------------------------------------------------------------------- veomni


def build_veomni(folder: str) -> Engine:
    from veomni.arguments import MixedPrecisionConfig
    from veomni.distributed import torch_parallelize
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import VeOmniEngineConfig, VeOmniOptimizerConfig
    from verl.workers.engine.veomni.transformer_impl import VeOmniEngineWithLMHead

    engine = VeOmniEngineWithLMHead(
        model_config=hf_model_config(folder),
        engine_config=VeOmniEngineConfig(use_torch_compile=False),
        optimizer_config=VeOmniOptimizerConfig(lr=0.0, clip_grad=1e30),
        checkpoint_config=CheckpointConfig(),
    )
    module = qwen2(folder)
    torch_parallelize._materialize_and_load_weights = lambda *_, **__: None  # it has its weights
    engine.module = torch_parallelize.build_parallelize_model(
        module,
        init_device="meta",
        mixed_precision=MixedPrecisionConfig(enable=False),
        enable_gradient_checkpointing=False,
        basic_modules=list(module._no_split_modules),
    )
    # verl up to 0.9.0: its initialize() makes them, for activations that are offloaded to the CPU.
    engine.model_fwd_context = engine.model_bwd_context = contextlib.nullcontext()
    engine.optimizer = still(engine.module)
    engine._autocast_dtype = torch.float32
    return engine


# ---------------------------------------------------------------------------------------------------------- automodel


def build_automodel(folder: str) -> Engine:
    from nemo_automodel.components.distributed import mesh_utils
    from nemo_automodel.components.distributed.fsdp2 import FSDP2Manager
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import AutomodelEngineConfig, AutomodelOptimizerConfig
    from verl.workers.engine.automodel.transformer_impl import AutomodelEngineWithLMHead

    init_device_mesh = mesh_utils.init_device_mesh
    mesh_utils.init_device_mesh = lambda device_type, **kwargs: init_device_mesh("cpu", **kwargs)
    engine = AutomodelEngineWithLMHead(
        model_config=hf_model_config(folder),
        engine_config=AutomodelEngineConfig(
            use_torch_compile=False, mp_param_dtype="fp64", mp_reduce_dtype="fp64", mp_output_dtype="fp64"
        ),
        optimizer_config=AutomodelOptimizerConfig(lr=0.0, clip_grad=1e30),
        checkpoint_config=CheckpointConfig(),
    )
    manager = FSDP2Manager(engine.distributed_config, engine.device_mesh, engine.moe_mesh)
    engine.module = manager.parallelize(qwen2(folder))
    engine.optimizer = still(engine.module)
    return engine


# --------------------------------------------------------------------------------------------------------- torchtitan


class TitanModel(nn.Module):
    """transformers' Qwen2 with the call of a torchtitan model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attention_masks: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=tokens, attention_mask=attention_masks, position_ids=positions).logits


def build_torchtitan(folder: str, shard: int | None = None) -> Engine:
    """shard: ranks that share the parameters, default all; the others are replicas."""
    from torch.distributed.fsdp import fully_shard
    from torchtitan.distributed import fsdp, parallel_dims
    from verl.workers.config import TorchtitanEngineConfig
    from verl.workers.engine.torchtitan.transformer_impl import TorchTitanEngineWithLMHead
    from verl.workers.engine.torchtitan.utils import enable_fsdp_gradient_division

    ranks = torch.distributed.get_world_size()
    shard = shard or ranks
    parallel_dims.device_type = "cpu"
    engine = object.__new__(TorchTitanEngineWithLMHead)
    engine.engine_config = TorchtitanEngineConfig(
        data_parallel_shard_size=shard, data_parallel_replicate_size=ranks // shard, use_torch_compile=False
    )
    engine._init_device_mesh()
    dims = engine.parallel_dims
    mesh = dims.get_mesh("dp_shard") if shard == ranks else dims.get_mesh(["dp_replicate", "dp_shard"])
    model = TitanModel(qwen2(folder))
    fully_shard(model, mesh=mesh)
    # torchtitan ends so (distributed/fsdp.py:316), and verl's engine goes on so (transformer_impl.py:221).
    fsdp.disable_fsdp_gradient_division(model)
    if engine.engine_config.data_parallel_shard_size > 1:
        enable_fsdp_gradient_division(model, engine.get_data_parallel_size())
    engine.module = [model]
    engine.trainer = SimpleNamespace(train_context=contextlib.nullcontext)
    engine.config = SimpleNamespace(training=SimpleNamespace(max_norm=1e30))
    engine.optimizer = still(model)
    return engine


# ----------------------------------------------------------------------------------------------------------- Megatron

HIDDEN = 16


class CudaMeansCpu(TorchFunctionMode):
    """Megatron asks for tensors on "cuda"; and it computes cross entropy in float32 whatever it is given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


LAYERS = ("embedding", "hidden", "second", "output")


class TokenModel(nn.Module):
    """A language model whose tokens do not see each other: any cut of a sequence over ranks is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(fsdp2.VOCAB, HIDDEN)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.output = nn.Linear(HIDDEN, fsdp2.VOCAB)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        hidden = torch.tanh(self.hidden(self.embedding(input_ids)))
        return SimpleNamespace(logits=self.output(torch.tanh(self.second(hidden))))


def token_model(folder: str) -> nn.Module:
    torch.manual_seed(0)
    return TokenModel().to(torch.float64)


def stage_class() -> type:
    """A pipeline stage of TokenModel; it talks to Megatron's schedules as GPTModel does."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.module import MegatronModule

    class Stage(MegatronModule):
        share_embeddings_and_output_weights = False
        model_type = ModelType.encoder_or_decoder

        def __init__(self, config: Any, names: tuple[str, ...], vp_stage: int | None) -> None:
            super().__init__(config)
            self.names, self.vp_stage, self.received = names, vp_stage, None
            self.pre_process, self.post_process = LAYERS[0] in names, LAYERS[-1] in names
            whole = token_model("")
            for name in names:
                setattr(self, name, getattr(whole, name))
            self.to(torch.float64)

        def set_input_tensor(self, tensors: list[torch.Tensor]) -> None:
            self.received = tensors[0]

        def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            hidden = self.received  # [T, 1, HIDDEN]; tokens and logits are [1, T, ...]
            for name in self.names:
                layer = getattr(self, name)
                if name == "embedding":
                    hidden = layer(input_ids).transpose(0, 1).contiguous()
                elif name == "output":
                    hidden = layer(hidden).transpose(0, 1).contiguous()
                else:
                    hidden = torch.tanh(layer(hidden))
            return hidden

    return Stage


def transformer_config(layout: dict[str, Any], per_token: bool) -> Any:
    """What verl's `_build_tf_config` (megatron/transformer_impl.py:308) would say of the layout."""
    from megatron.core.transformer import TransformerConfig

    virtual = layout.get("virtual_pipeline_model_parallel_size")
    return TransformerConfig(
        num_layers=len(LAYERS),
        hidden_size=HIDDEN,
        num_attention_heads=2,
        params_dtype=torch.float64,
        pipeline_dtype=torch.float64,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        pipeline_model_parallel_size=layout.get("pipeline_model_parallel_size", 1),
        virtual_pipeline_model_parallel_size=virtual,
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=False,
        context_parallel_size=layout.get("context_parallel_size", 1),
        calculate_per_token_loss=per_token or layout.get("dynamic_context_parallel", False),
    )


def build_megatron(folder: str, *, per_token: bool = False, sharded: bool = False, **layout: Any) -> Engine:
    """per_token: calculate_per_token_loss; sharded: gradients as the distributed optimizer has them."""
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from verl.trainer.config import CheckpointConfig
    from verl.utils.megatron_utils import register_megatron_training_hooks
    from verl.workers.config import McoreEngineConfig, McoreOptimizerConfig
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    if layout.get("dynamic_context_parallel"):
        add_dynamic_context_parallel()
    model_config = hf_model_config(folder)
    object.__setattr__(model_config, "tokenizer", SimpleNamespace(pad_token_id=0))
    engine = MegatronEngineWithLMHead(
        model_config=model_config,
        engine_config=McoreEngineConfig(use_distributed_optimizer=False, **layout),
        optimizer_config=McoreOptimizerConfig(lr=0.0, clip_grad=0.0, lr_decay_steps=1, total_training_steps=1),
        checkpoint_config=CheckpointConfig(),
    )
    engine.param_dtype = torch.float32  # says only that neither fp16 nor bf16 optimizers are meant
    engine.tf_config = transformer_config(layout, per_token)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=sharded)
    engine.module = [
        DistributedDataParallel(engine.tf_config, ddp_config, stage_class()(engine.tf_config, names, vp_stage))
        for vp_stage, names in stages(layout)
    ]
    if sharded or older_verl.needed():  # verl 0.7.1 and 0.8.0 always ask for a bfloat16 optimizer
        engine.optimizer = SimpleNamespace(  # the real one asks for float32 on a GPU; it sees gradients only after this
            zero_grad=lambda: None, step=lambda: (True, 0.0, None), scale_loss=lambda loss: loss, config=None
        )
        register_megatron_training_hooks(engine.module, engine.optimizer)
    else:
        engine.optimizer = engine._build_optimizer()
    return engine


def stages(layout: dict[str, Any]) -> list[tuple[int | None, tuple[str, ...]]]:
    """This rank's chunks of the model: number of the virtual stage, if there are any, and layers."""
    from megatron.core import parallel_state as mpu

    pipeline = layout.get("pipeline_model_parallel_size", 1)
    virtual = layout.get("virtual_pipeline_model_parallel_size")
    size = len(LAYERS) // (pipeline * (virtual or 1))
    starts = [(v * pipeline + mpu.get_pipeline_model_parallel_rank()) * size for v in range(virtual or 1)]
    return [(v if virtual else None, LAYERS[start : start + size]) for v, start in enumerate(starts)]


def megatron_gradient(engine: Engine) -> Gradient:
    """Of all pipeline stages, and of all shards of the distributed optimizer."""
    own: Gradient = {}
    for ddp in engine.module:
        if ddp.ddp_config.use_distributed_optimizer:
            for bucket in [bucket for group in ddp.bucket_groups for bucket in group.buckets]:
                shards = bucket.grad_data.chunk(torch.distributed.get_world_size())
                own_shard = shards[torch.distributed.get_rank()].clone()
                torch.distributed.all_gather(list(shards), own_shard)
        own |= {n.removeprefix("module."): p.main_grad.clone() for n, p in ddp.named_parameters()}
    ranks: list[Gradient] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(ranks, own)
    return {name: g for rank in ranks for name, g in rank.items()}


def add_dynamic_context_parallel() -> None:
    """What verl's dynamic context parallelism takes from a Megatron-Core newer than the newest release."""
    from megatron.core import parallel_state as mpu
    from megatron.core.datasets import data_schedule

    initialize = mpu.initialize_model_parallel
    alone = [torch.distributed.new_group([rank]) for rank in range(torch.distributed.get_world_size())]

    def initialize_model_parallel(*args: Any, dynamic_context_parallel: bool = False, **kwargs: Any) -> None:
        initialize(*args, **kwargs)

    def get_dynamic_data_context_parallel_groups(check_initialized: bool = True, group_size: int = 1) -> Any:
        if group_size == 1:
            return alone[torch.distributed.get_rank()]
        return mpu.get_data_parallel_group(with_context_parallel=True)

    class Scheduler:
        """Long responses over both ranks, short ones on one: two micro-batches, a different load on each rank."""

        def __init__(self, **_: Any) -> None:
            pass

        def get_groups_and_subsamples(self, samples: list[tuple[int, int]]) -> list[list[list[int]]]:
            by_length = [i for i, _ in sorted(samples, key=lambda sample: -sample[1])]
            long, short = by_length[:5], by_length[5:]
            return [[long, long], [short[:3], short[3:]]]

    mpu.initialize_model_parallel = initialize_model_parallel
    mpu.get_dynamic_data_context_parallel_groups = get_dynamic_data_context_parallel_groups
    data_schedule.DefaultDynamicCPScheduler = Scheduler


def cuda_on_cpu() -> None:
    from megatron.core import tensor_parallel

    tensor_parallel.model_parallel_cuda_manual_seed = lambda *_: None  # dropout's; there is none
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    CudaMeansCpu().__enter__()


# -------------------------------------------------------------------------------------------------------------- cases


@dataclass
class Backend:
    cases: list[Case]
    packages: tuple[str, ...] = ()  # installed without their dependencies
    prepare: Callable[[], None] = field(default=lambda: None)  # before verl's engine is imported


def add_moved_module() -> None:
    """torchtitan 0.3.0 moved this module; verl 0.9.1 asks it for a class that is not used here."""
    name = "torchtitan.components.lr_scheduler"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].LRSchedulersContainer = object  # type: ignore[attr-defined]


def megatron_case(name: str, **layout: Any) -> Case:
    build = functools.partial(build_megatron, **layout)
    return Case(name, build, megatron_gradient, token_model, replicated=set(layout) - {"sharded"} != set())


BACKENDS = {
    "fsdp": Backend([Case("fsdp1", build_fsdp1, fsdp1_gradient, qwen2)]),
    "megatron": Backend(
        [
            megatron_case("data parallel"),
            megatron_case("data parallel, distributed optimizer", sharded=True),
            megatron_case("pipeline", pipeline_model_parallel_size=2),
            megatron_case("virtual pipeline", pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            megatron_case("context parallel", context_parallel_size=2),
            megatron_case("context parallel, per-token loss", context_parallel_size=2, per_token=True),
            megatron_case("dynamic context parallel", dynamic_context_parallel=True, max_seqlen_per_dp_cp_rank=64),
        ],
        ("megatron-core==0.16.1",),
        cuda_on_cpu,
    ),
    "veomni": Backend([Case("veomni", build_veomni, whole_dtensors, qwen2)], ("veomni==0.1.12",)),
    "torchtitan": Backend(
        [
            Case("sharded", build_torchtitan, whole_dtensors, qwen2, padded=False),
            Case("replicated", functools.partial(build_torchtitan, shard=1), whole_dtensors, qwen2, padded=False),
        ],
        # The others are what torchtitan's configuration imports.
        (
            "torchtitan==0.3.0",
            "spmd_types==0.2.3",
            "torch_checkpointing==0.1.1",
            "tyro==1.0.17",
            "typeguard==4.6.1",
            "docstring_parser==0.18.0",
        ),
        add_moved_module,
    ),
    "automodel": Backend(
        [Case("fsdp2", build_automodel, whole_dtensors, qwen2, padded=False)], ("nemo-automodel==0.4.0",)
    ),
}


def install(name: str, folder: Path) -> Path:
    """The folder with the engine's packages. One an engine: verl imports every engine whose package it finds."""
    packages = BACKENDS[name].packages
    target = folder / "-".join([name, *packages]).replace("==", "-")
    if packages and not target.exists():
        partial = tempfile.mkdtemp(dir=folder)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        subprocess.run([*command, "--no-deps", "--target", partial, *packages], check=True, timeout=300)
        Path(partial).rename(target)
    return target


def run(rank: int, ranks: int, port: int, name: str, packages: str, folder: str, out: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    sys.path.insert(0, packages)
    fsdp2.allow_float64()
    backend = BACKENDS[name]
    backend.prepare()
    if older_verl.needed():
        older_verl.prepare()
    results = []
    for case in backend.cases:
        try:
            results += [{"engine": name} | row for row in run_case(case, rank, ranks, folder)]
        except Exception:  # every rank raises it alike; the other cases have their say
            results.append({"engine": name, "case": case.name, "failed": traceback.format_exc()})
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def run_case(case: Case, rank: int, ranks: int, folder: str) -> list[dict[str, Any]]:
    reference = case.reference(folder)
    rows = fsdp2.make_rows(reference, torch.float64)
    engine = case.build(folder)
    # The short responses on the first rank, the long ones on the last: there a rank-local sum is far off.
    by_length = sorted(range(fsdp2.ROWS), key=lambda i: fsdp2.LENGTHS[i])
    share = fsdp2.ROWS // ranks
    mine = by_length if case.replicated else by_length[rank * share : (rank + 1) * share]
    results = []
    for scenario in SCENARIOS:
        if scenario.sabotage == "rank" and case.replicated:
            continue  # a rank has all of the sum
        if scenario.padded and not case.padded:
            scenario = dataclasses.replace(scenario, name="alpha 0.75", padded=False)
        if not older_verl.takes_nested_data():
            scenario = dataclasses.replace(scenario, padded=True, width=60)
        gradient, metrics = train(engine, case, scenario, fsdp2.make_data(rows, scenario, mine))
        lengths = np.array([0 if i in scenario.masked else n for i, n in enumerate(fsdp2.LENGTHS)])
        x = torch.from_numpy(fsdp2.weights(scenario.mode, lengths))
        names = [n for n, _ in reference.named_parameters()]
        expected = x @ fsdp2.response_gradients(reference, rows, scenario)
        whole = torch.cat([gradient[n].flatten() for n in names])
        scale = whole @ expected / (expected @ expected)
        results.append(
            {
                "case": case.name,
                "scenario": scenario.name,
                "mode": scenario.mode,
                "norm": expected.norm().item(),
                "error": ((whole - expected).norm() / expected.norm()).item(),
                # The best common factor, and what is left as an error after division by it.
                "scale": scale.item(),
                "direction_error": ((whole / scale - expected).norm() / expected.norm()).item(),
                "metrics": metrics,
            }
        )
    return results


def train(engine: Engine, case: Case, scenario: fsdp2.Scenario, data: Any) -> tuple[Gradient, list[dict[str, float]]]:
    """One call of the engine's own `train_batch`; the gradient and, of each rank, the plugin's metrics."""
    from verl.utils import tensordict_utils as tu
    from verl.workers.utils.losses import ppo_loss

    # As TrainingWorker.train_batch sets them (workers/engine_workers.py:352).
    tu.assign_non_tensor(data, use_remove_padding=False, use_fused_kernels=False)
    steps: list[Gradient] = []
    optimizer_step = engine.optimizer_step

    def recording_step() -> Any:
        norm = optimizer_step()
        steps.append(case.gradient(engine))
        return norm

    engine.optimizer_step = recording_step
    loss_function = functools.partial(ppo_loss, config=fsdp2.actor_config(scenario))
    try:
        with fsdp2.sabotaged(scenario.sabotage):
            outputs = engine.train_batch(data, loss_function)
    finally:
        del engine.optimizer_step
    (gradient,) = steps
    found = outputs.get("metrics", {})
    own = {k: float(np.mean(getattr(v, "values", v))) for k, v in found.items() if k.startswith("vl_norm/")}
    everyone: list[dict[str, float]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, own)
    return gradient, everyone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=list(BACKENDS), nargs="+", default=list(BACKENDS))
    parser.add_argument("--ranks", type=int, default=2, choices=[2])
    parser.add_argument("--packages", type=Path, required=True, help="folder for the engines' packages")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    args.packages.mkdir(parents=True, exist_ok=True)
    fsdp2.set_environment("cpu")
    importlib.import_module("verl")
    if not older_verl.needed():
        cpu.register()
    older_verl.unpad_without_flash_attn()
    # Imported once, before forking. verl.workers.engine is not: it imports every engine that it finds.
    for module in ("verl.workers.config", "verl.utils.tensordict_utils", "transformers.models.qwen2.modeling_qwen2"):
        importlib.import_module(module)

    results = []
    with tempfile.TemporaryDirectory() as folder:
        fsdp2.make_model(folder, torch.float64)
        for name in args.engine:
            out = Path(folder) / f"{name}.json"
            arguments = (args.ranks, fsdp2.free_port(), name, str(install(name, args.packages)), folder, str(out))
            try:
                torch.multiprocessing.start_processes(run, arguments, nprocs=args.ranks, start_method="fork")
                results += json.loads(out.read_text())
            except Exception as error:  # the other engines have their say; the test fails for this one
                results.append({"engine": name, "case": "", "failed": str(error)})
    args.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
