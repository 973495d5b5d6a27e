"""What vl_norm costs: verl's actor update against token-mean, and the aggregation alone against verl's own modes.

    python benchmarks/update_cost.py [--part update|aggregation|both] [--rounds 40] [--out FILE]
    python benchmarks/update_cost.py --device cuda --shape 3b --responses 16 --length 8192 --micro 1 --seconds 120

Run it with nothing else on the machine. Every round runs each mode twice, in a random order and then in the reverse
order (ABBA), so that a drift of the machine's speed cancels; a round gives one ratio for each mode, and the median of
the rounds' ratios is reported with a 95% bootstrap interval over rounds.

update: verl's TrainingWorker.train_mini_batch on the FSDP2 engine, one rank, nested data as the V1 trainer makes it;
one optimizer step a call. "token-mean again" is the same mode a second time: what the measurement cannot tell apart
from 1. CPU seconds of the process are reported beside wall seconds. In float32 on --model; with --shape on random
weights of that shape of Qwen2.5, trained as on a GPU (benchmarks/actor.py).

aggregation: `agg_loss` as the policy loss calls it (a bool mask, inside the mini-batch), forward and forward with
backward. Temporaries are measured once for each mode: every tensor of batch × length that an operator returns, by its
type, and the peak of all memory allocated above what was there before, which has in it what operators allocate inside.
"""

import functools
import math
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import psutil
import typer
from actor import PROMPT, SHAPES, make_batch, make_worker, save_random_model, set_environment
from origin import ROOT, origin
from rich.console import Console
from rich.table import Table

from vlnorm_verl.files import write_json
from vlnorm_verl.tasks.tiny import WEIGHTS

WARM_UP = 2  # calls of each mode before the rounds: lazy initialisation, the optimizer's state
PACKAGES = ("verl", "torch", "transformers", "tensordict", "numpy", "vlnorm-verl")
TARGETS = {"update": 1.01, "aggregation": 2.0}
M = 256.0  # loss_scale_factor, tokens; costs the same whatever its value

Seconds = dict[str, float]


# -------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Plan:
    """How to measure: at most `rounds`, and none after the first that `seconds` have no room for."""

    device: str
    rounds: int
    seconds: float
    seed: int


def clocks(device: str) -> Seconds:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return {"wall": time.perf_counter(), "cpu": time.process_time()}


def measure(arms: dict[str, Callable[[], Callable[[], None]]], plan: Plan) -> list[dict[str, Seconds]]:
    """Seconds of each arm in each round. An arm prepares a call outside of the clock and returns it."""
    order, shuffle = list(arms), random.Random(plan.seed).shuffle
    begin = time.monotonic()
    for name in order * WARM_UP:
        arms[name]()()
    out: list[dict[str, Seconds]] = []
    longest = 0.0
    while len(out) < plan.rounds and (not out or time.monotonic() - begin + longest < plan.seconds):
        round_begin = time.monotonic()
        shuffle(order)
        total: dict[str, Seconds] = {name: {"wall": 0.0, "cpu": 0.0} for name in arms}
        for name in [*order, *reversed(order)]:
            call = arms[name]()
            start = clocks(plan.device)
            call()
            end = clocks(plan.device)
            for clock in start:
                total[name][clock] += (end[clock] - start[clock]) / 2
        out.append(total)
        longest = max(longest, time.monotonic() - round_begin)
    return out


def gpu_peak_gib(call: Callable[[], None]) -> float:
    """Most memory that tensors have on the GPU while it runs, with what they have before."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**30


def summary(rounds: list[dict[str, Seconds]], reference: str, seed: int) -> dict[str, Any]:
    """Median seconds of each arm, and the median of its ratio to `reference` in the same round, with 95% interval."""
    generator, out = np.random.default_rng(seed), {}
    for name in rounds[0]:
        row: dict[str, Any] = {}
        for clock in ("wall", "cpu"):
            row[f"{clock}_s"] = statistics.median(r[name][clock] for r in rounds)
            ratios = np.array([r[name][clock] / r[reference][clock] for r in rounds])
            draws = np.median(generator.choice(ratios, (10_000, len(ratios))), axis=1)
            low, high = (float(np.quantile(draws, q)) for q in (0.025, 0.975))
            row[f"{clock}_ratio"] = {"median": float(np.median(ratios)), "low": low, "high": high}
        out[name] = row
    return out


# ----------------------------------------------------------------------------------------------------------- update


def measure_update(model: Path, half: bool, responses: int, length: int, micro: int, plan: Plan) -> dict[str, Any]:
    from transformers import AutoConfig
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    worker = make_worker(model, micro, half)
    batch = make_batch(responses, length, micro, AutoConfig.from_pretrained(model).vocab_size, plan.seed)

    def arm(mode: str) -> Callable[[], Callable[[], None]]:
        config = FSDPActorConfig(
            strategy="fsdp2",
            rollout_n=1,
            ppo_micro_batch_size_per_gpu=micro,
            loss_agg_mode=mode,
            loss_scale_factor=M,
        )

        def prepare() -> Callable[[], None]:
            worker.set_loss_fn(functools.partial(ppo_loss, config=config))
            data = batch()
            return lambda: check(worker.train_mini_batch(data), mode)

        return prepare

    modes = {"token-mean": "token-mean", "token-mean again": "token-mean", "vl_norm": "vl_norm"}
    arms = {name: arm(mode) for name, mode in modes.items()}
    measured = measure(arms, plan)
    table = summary(measured, "token-mean", plan.seed)
    lengths = batch()["responses"].offsets().diff().tolist()
    for name, prepare in arms.items():
        table[name]["tokens_per_s"] = (sum(lengths) + responses * PROMPT) / table[name]["wall_s"]
        if plan.device == "cuda":
            table[name]["peak_gib"] = gpu_peak_gib(prepare())
    return {
        "model_parameters": sum(p.numel() for p in worker.engine.module.parameters()),
        "responses": responses,
        "micro_batch": micro,
        "response_tokens": {"sum": sum(lengths), "min": min(lengths), "max": max(lengths)},
        "modes": table,
        "rounds": measured,
    }


def check(output: Any, mode: str) -> None:
    """An update that did not do its work would be quick."""
    from verl.utils import tensordict_utils as tu

    metrics = tu.get(output, "metrics")
    if ("vl_norm/variance_ratio" in metrics) != (mode == "vl_norm") or not np.all(np.isfinite(metrics["grad_norm"])):
        raise RuntimeError(f"loss_agg_mode={mode} did not train as it should: {sorted(metrics)}")


# ------------------------------------------------------------------------------------------------------ aggregation


def measure_aggregation(batch: int, length: int, plan: Plan) -> dict[str, Any]:
    import torch
    from verl.trainer.ppo.core_algos import agg_loss

    from vlnorm_verl.aggregation import mini_batch_sum
    from vlnorm_verl.plugin.mini_batch import MiniBatch, working_on
    from vlnorm_verl.registry import parse_mode

    generator = torch.Generator().manual_seed(plan.seed)
    losses = torch.randn(batch, length, generator=generator).to(plan.device).requires_grad_()
    lengths = torch.randint(1, length + 1, (batch,), generator=generator).to(plan.device)
    # verl's ppo_loss and value_loss make the mask bool (workers/utils/losses.py:93, 184).
    mask = torch.arange(length, device=plan.device) < lengths[:, None]
    method = parse_mode("vl_norm")
    total = mini_batch_sum(method, lengths)
    # On a GPU one call is over before the next clock is read.
    calls = 20 if plan.device == "cuda" else 1

    def call(mode: str, backward: bool) -> None:
        ours = working_on(MiniBatch(mode, method, total, dp_size=1, scale=M, lengths=lengths))
        with ours if mode == "vl_norm" else nullcontext(), torch.set_grad_enabled(backward):
            loss = agg_loss(losses, mask, mode, loss_scale_factor=M)
        if backward:
            loss.backward()
            losses.grad = None

    def arm(mode: str, backward: bool) -> Callable[[], Callable[[], None]]:
        def run() -> None:
            for _ in range(calls):
                call(mode, backward)

        return lambda: run

    modes = ("seq-mean-token-sum", "token-mean", "vl_norm")
    out: dict[str, Any] = {"batch": batch, "length": length, "dtype": "float32", "mask": "bool", "calls": calls}
    for name, backward in {"forward": False, "forward and backward": True}.items():
        measured = measure({mode: arm(mode, backward) for mode in modes}, plan)
        out[name] = {"modes": summary(measured, "seq-mean-token-sum", plan.seed), "rounds": measured}
        for mode, row in out[name]["modes"].items():
            row["ms_per_call"] = row["wall_s"] * 1e3 / calls
            row |= temporaries(functools.partial(call, mode, backward), losses.numel(), plan.device)
    return out


def temporaries(call: Callable[[], None], elements: int, device: str) -> dict[str, Any]:
    """Types of the new tensors of at least `elements` entries that operators return, and the peak of memory, MiB."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    types: dict[str, int] = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            before = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            for x in result if isinstance(result, tuple | list) else (result,):
                # A view (expand, transpose) allocates nothing.
                if (
                    isinstance(x, torch.Tensor)
                    and x.untyped_storage().nbytes() >= elements
                    and x.untyped_storage().data_ptr() not in before
                ):
                    name = f"{str(x.dtype).removeprefix('torch.')} from {function.overloadpacket.__name__}"
                    types[name] = types.get(name, 0) + 1
            return result

    with Recorder():
        call()
    if device == "cuda":
        before = torch.cuda.memory_allocated() / 2**20
        return {"new_tensors": types, "peak_mib": gpu_peak_gib(call) * 2**10 - before}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return {"new_tensors": types, "peak_mib": float(held.max()) / 2**20}


# ----------------------------------------------------------------------------------------------------------- report


def environment(device: str) -> dict[str, Any]:
    import torch

    return {
        **origin(torch.cuda.get_device_name() if device == "cuda" else "CPU only"),
        "load_before": psutil.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def interval(ratio: Seconds, digits: int) -> str:
    return f"{ratio['median']:.{digits}f} [{ratio['low']:.{digits}f}, {ratio['high']:.{digits}f}]"


def print_update(console: Console, result: dict[str, Any]) -> None:
    title = (
        f"{result['responses']} responses, {result['response_tokens']['sum']} tokens, "
        f"{result['model_parameters'] / 1e6:.2f} M parameters, micro-batches of {result['micro_batch']}, "
        f"{len(result['rounds'])} rounds"
    )
    table = Table("update with", "median s", "ratio to token-mean, wall", "ratio, CPU seconds", title=title)
    for name, row in result["modes"].items():
        table.add_row(name, f"{row['wall_s']:.3f}", interval(row["wall_ratio"], 4), interval(row["cpu_ratio"], 4))
    console.print(table)


def print_aggregation(console: Console, result: dict[str, Any]) -> None:
    table = Table(
        "aggregation by",
        "median ms",
        "ratio to seq-mean-token-sum",
        "peak MiB",
        "new tensors of batch × length",
        title=f"{result['batch']} × {result['length']} {result['dtype']}",
    )
    for part in ("forward", "forward and backward"):
        for name, row in result[part]["modes"].items():
            tensors = ", ".join(f"{n} {kind}" for kind, n in row["new_tensors"].items())
            ratio = interval(row["wall_ratio"], 2)
            table.add_row(f"{name}, {part}", f"{row['ms_per_call']:.3g}", ratio, f"{row['peak_mib']:.0f}", tensors)
    console.print(table)


def verdicts(results: dict[str, Any]) -> dict[str, bool | None]:
    """Whether each target was met, by wall-clock ratios; None where the update's interval has its target in it."""
    out: dict[str, bool | None] = {}
    if "update" in results:
        ratio, target = results["update"]["modes"]["vl_norm"]["wall_ratio"], TARGETS["update"]
        met = True if ratio["high"] <= target else False if ratio["low"] > target else None
        out[f"update: {interval(ratio, 4)}, target {target}"] = met
    for part in ("forward", "forward and backward") if "aggregation" in results else ():
        row = results["aggregation"][part]["modes"]["vl_norm"]
        ratio = row["wall_ratio"]["median"]
        out[f"aggregation, {part}: {ratio:.2f} ≤ {TARGETS['aggregation']}"] = ratio <= TARGETS["aggregation"]
        kinds = [kind for kind in row["new_tensors"] if kind.startswith("float64")]
        out[f"aggregation, {part}: no batch × length tensor in float64"] = not kinds
    return out


def main(
    part: Annotated[Literal["update", "aggregation", "both"], typer.Option(help="What to measure.")] = "both",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; each runs every mode twice.")] = 40,
    responses: Annotated[int, typer.Option(min=1, help="Responses of the mini-batch of the update.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Longest response of the update, tokens.")] = 256,
    micro: Annotated[int, typer.Option(min=1, help="Responses a micro-batch of the update.")] = 16,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")] = "cpu",
    model: Annotated[Path, typer.Option(exists=True, help="Hugging Face folder of the actor.")] = WEIGHTS,
    shape: Annotated[str, typer.Option(help=f"Random weights instead of --model: {', '.join(SHAPES)}.")] = "",
    seconds: Annotated[float, typer.Option(help="Time for the rounds of each measurement.")] = math.inf,
    matrix: Annotated[tuple[int, int], typer.Option(help="Batch and length of the aggregation.")] = (1024, 8192),
    threads: Annotated[int, typer.Option(min=1, help="OpenMP threads.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the data, the orders and the bootstrap.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = ROOT / "benchmarks/results/update_cost.json",
) -> None:
    """Print two tables and write --out.

    They say whether each target was met: vl_norm's update at most 1.01 times token-mean's, its aggregation at most
    twice that of seq-mean-token-sum, no float64 tensor of batch × length.
    """
    if responses % micro:
        raise typer.BadParameter(f"--responses {responses} is not a multiple of --micro {micro}")
    if shape and shape not in SHAPES:
        raise typer.BadParameter(f"--shape {shape}: accepted are {', '.join(SHAPES)}")
    set_environment(device, threads)
    import torch
    import verl  # noqa: F401  (loads the plugin)

    torch.set_num_threads(threads)
    results: dict[str, Any] = environment(device) | {"threads": threads, "seed": seed, "shape": shape}
    plan = Plan(device, rounds, seconds, seed)
    console = Console()
    if part != "aggregation":
        with tempfile.TemporaryDirectory() as folder:
            actor = save_random_model(shape, Path(folder), device, seed) if shape else model
            results["update"] = measure_update(actor, bool(shape), responses, length, micro, plan)
        print_update(console, results["update"])
        torch.distributed.destroy_process_group()
    if part != "update":
        results["aggregation"] = measure_aggregation(*matrix, plan)
        print_aggregation(console, results["aggregation"])
    results["targets"] = verdicts(results)
    write_json(out, results)
    console.print(f"written: {out}", markup=False)
    for what, met in results["targets"].items():
        word = {True: "met", None: "open", False: "MISSED"}[met]
        console.print(f"{word}: {what}", style="red" if met is False else None, markup=False)


if __name__ == "__main__":
    typer.run(main)
