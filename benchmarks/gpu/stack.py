"""Some steps of the whole stack on one device: verl's trainer, Ray, FSDP2 and vLLM on the tiny CountDown.

    python benchmarks/gpu/stack.py --device cuda|cpu --out FILE [--steps 8] [--attention TRITON_ATTN] [--no-sleep]

It is the quickstart's run. On a GPU device, precision, activation checkpointing, sleep mode and attention are those of
GPUs; the rest stays as on the CPU: padding, no CUDA graphs, no compilation, no offloading. FILE is JSON: verl's metrics
of each step, and after how many seconds it was done; whole after each.
"""

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlnorm_verl.cpu import cpu_environment
from vlnorm_verl.files import locked, write_json
from vlnorm_verl.runs.config import compose, with_settings
from vlnorm_verl.runs.launch import start
from vlnorm_verl.runs.process import TrainingFailed, last_lines
from vlnorm_verl.runs.progress import progress_line
from vlnorm_verl.tasks.tiny.data import make as make_tiny_files

CONFIG = Path(__file__).parents[2] / "recipes" / "config"
QUICKSTART = ["family=quickstart", "task=countdown", "length=8192", "model=tiny"]  # as recipes/quickstart.sh
GPU_ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles at the first use
    # One machine, and perhaps one without network.
    "VLLM_HOST_IP": "127.0.0.1",
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def gpu_settings(attention: str, sleep: bool) -> dict[str, Any]:
    actor, rollout, ray = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "ray_kwargs.ray_init"
    return {
        "trainer.device": "cuda",
        f"{actor}.fsdp_config.mixed_precision": {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        "actor_rollout_ref.model.enable_gradient_checkpointing": True,
        f"{rollout}.dtype": "bfloat16",
        f"{rollout}.enable_sleep_mode": sleep,
        f"{rollout}.free_cache_engine": sleep,
        f"{rollout}.gpu_memory_utilization": 0.3,
        f"{rollout}.engine_kwargs.vllm.distributed_executor_backend": "mp",
        f"{rollout}.engine_kwargs.vllm.attention_backend": attention,
        f"{ray}.runtime_env.py_executable": None,
        f"{ray}.object_store_memory": 2_000_000_000,
    }


def main(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps to train.")] = 8,
    attention: Annotated[str, typer.Option(help="vLLM's attention on a GPU.")] = "FLASH_ATTN",
    sleep: Annotated[bool, typer.Option(help="vLLM gives its memory back while the actor trains.")] = True,
) -> None:
    with tempfile.TemporaryDirectory(prefix="vlnorm-stack-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        changed = {"recipe.folder": str(folder), "recipe.data": str(folder / "data"), "recipe.steps": steps}
        changed |= {"trainer.save_freq": -1, "trainer.test_freq": -1, "trainer.val_before_train": False}
        if device == "cuda":
            changed |= gpu_settings(attention, sleep)
        config = with_settings(compose(CONFIG, QUICKSTART), changed)
        make_tiny_files(folder / "data", "countdown")
        os.environ.update(cpu_environment() if device == "cpu" else GPU_ENVIRONMENT)
        lock = stack.enter_context(locked(folder))
        records = stack.enter_context(contextlib.closing(start(config, lock)))
        done, begin = [], time.monotonic()
        try:
            for record in records:
                done.append({**record, "after": time.monotonic() - begin})
                write_json(out, {"steps": steps, "attention": attention, "sleep": sleep, "records": done})
                print(progress_line(record, steps), flush=True)
        except TrainingFailed as error:
            print("".join(last_lines(folder / "train.log", 80)), error, sep="\n")
            sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
