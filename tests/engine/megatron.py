"""verl's Megatron engine on the CPU, for other_engines.py: layouts, and a model whose tokens do not see each other."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.engine import older_verl
from tests.engine.reference import VOCAB
from tests.engine.verl_side import hf_model_config

Engine = Any
Gradient = dict[str, torch.Tensor]  # parameter's name -> the whole, reduced gradient
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
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.output = nn.Linear(HIDDEN, VOCAB)

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
    """What verl's `_build_tf_config` (megatron/transformer_impl.py:283) would say of the layout."""
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
