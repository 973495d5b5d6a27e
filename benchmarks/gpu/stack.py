"""Some steps of the whole stack on one device: verl's trainer, Ray, FSDP2 and vLLM on the tiny CountDown.

    python benchmarks/gpu/stack.py --device cuda|cpu --out FILE [--steps 8] [--attention TRITON_ATTN] [--no-sleep]

It is the quickstart's run; on a GPU what its configuration sets for a CPU is set back to verl's ways. FILE is JSON:
verl's metrics of each step, whole after each.
"""

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from vlnorm_verl.cpu import cpu_environment
from vlnorm_verl.runs.process import TrainingFailed, last_lines, locked, progress_line, train, write_json
from vlnorm_verl.runs.quickstart import Settings, command, make_data

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


def gpu_overrides(attention: str, sleep: bool) -> list[str]:
    types = "{param_dtype: bf16, reduce_dtype: fp32, buffer_dtype: fp32}"
    return [
        "trainer.device=cuda",
        f"actor_rollout_ref.actor.fsdp_config.mixed_precision={types}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=true",
        "actor_rollout_ref.rollout.dtype=bfloat16",
        f"actor_rollout_ref.rollout.enable_sleep_mode={str(sleep).lower()}",
        f"actor_rollout_ref.rollout.free_cache_engine={str(sleep).lower()}",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.3",
        "actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend=mp",
        f"+actor_rollout_ref.rollout.engine_kwargs.vllm.attention_backend={attention}",
        "ray_kwargs.ray_init.runtime_env.py_executable=null",
        "ray_kwargs.ray_init.object_store_memory=2000000000",
    ]


def main(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps to train.")] = 8,
    attention: Annotated[str, typer.Option(help="vLLM's attention on a GPU.")] = "FLASH_ATTN",
    sleep: Annotated[bool, typer.Option(help="vLLM gives its memory back while the actor trains.")] = True,
) -> None:
    with tempfile.TemporaryDirectory(prefix="vlnorm-stack-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        make_data(folder / "data")
        overrides = ["trainer.save_freq=-1", "trainer.test_freq=-1", "trainer.val_before_train=false"]
        if device == "cuda":
            overrides += gpu_overrides(attention, sleep)
        settings = Settings(steps=steps, out=folder, overrides=overrides)
        variables = cpu_environment() if device == "cpu" else GPU_ENVIRONMENT
        lock = stack.enter_context(locked(folder))
        files = (folder / "metrics-000.jsonl", folder / "train.log")
        records = stack.enter_context(contextlib.closing(train(command(settings), variables, *files, lock)))
        done = []
        try:
            for record in records:
                done.append(record)
                write_json(out, {"steps": steps, "attention": attention, "sleep": sleep, "records": done})
                print(progress_line(record, steps), flush=True)
        except TrainingFailed as error:
            print("".join(last_lines(files[1], 80)), error, sep="\n")
            sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
