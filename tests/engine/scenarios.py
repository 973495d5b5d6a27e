"""Gradients of verl's real FSDP2 engine on gloo ranks or on GPUs, against Σ x_i g_i computed without verl.

    python -m tests.engine.scenarios --ranks 2 --dtype float64 [--device cuda] --out FILE

runs every scenario below in one process group and writes FILE as JSON: one row per optimizer step with the relative
error of the whole gradient vector. tests/test_engine.py asserts on it. With --stock it runs verl's own modes and
writes a hash of the gradient instead (tests/test_plugin_agg_loss.py compares them with and without the plugin). With
--native it runs VL Norm of a verl that knows the mode by itself, a patched one (tests/test_patches.py).

It runs on verl 0.7.1, 0.8.0, 0.9.0 and 0.9.1. Releases before 0.9.0 find no plugin by themselves: set
VERL_USE_EXTERNAL_MODULES=vlnorm_verl.verl_entry.

The reference (tests/engine/reference.py) shares nothing with the project but the model's weights.

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
import hashlib
import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from tests.engine import older_verl
from tests.engine.ranks import finish, make_parser, prepare, start
from tests.engine.reference import LENGTHS, ROWS, M, Rows, Scenario, relative_error, response_gradients, weighted_sum
from tests.engine.verl_side import make_data, plugin_is_active, recording, start_rank, train

STOCK_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


def scenarios(ranks: int) -> list[Scenario]:
    out = []
    per_rank = ROWS // ranks
    for mode in ("vl_norm", "vl_norm:0.75", "vl_norm:0"):
        out += [Scenario(f"micro-batches of {m}", mode, micro=m) for m in (1, 2, 4) if m <= per_rank]
        # As verl's trainer is configured (trainer/config/engine/fsdp.yaml:61); the class's own default is once for all.
        out += [Scenario("micro-batches of 2, reduced in each", mode, reduced_each=True)]
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
    second_half = tuple(i for i in range(ROWS) if i % per_rank >= per_rank // 2)
    out += [Scenario("last mini-batch empty", mini=ROWS // 2, masked=second_half)]
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
    empty = ("no valid token", "last mini-batch empty")
    ours = [s for s in scenarios(ranks) if s.mode == "vl_norm" and not s.name.startswith(empty)]
    # verl's token-mean counts the tokens of rejected responses.
    honest = [s for s in ours if not s.sabotage and not s.rejected]
    return ours + [replace(s, name=f"stock {s.name}", mode="token-mean") for s in honest]


def run_exact(rank: int, args: argparse.Namespace) -> None:
    """Our modes: relative error of the gradient."""
    reference, rows, worker, mine = start_rank(rank, args)
    gradients: dict[tuple[float, float], torch.Tensor] = {}
    by_engine: dict[tuple[float, float], torch.Tensor] = {}
    results = []
    every = native_scenarios if args.native else rounded_scenarios if args.dtype == "bfloat16" else scenarios
    chosen = [s for s in every(args.ranks) if not args.mode or s.mode in args.mode]
    chosen = [s for s in chosen if any(part in s.name for part in args.only)]
    if not chosen:
        raise SystemExit(f"no scenario is called {args.only} and of {args.mode or 'any mode'}: see scenarios()")
    for scenario in chosen:
        key = (scenario.entropy_coeff, scenario.kl_coef)
        if key not in gradients:
            gradients[key] = response_gradients(reference, rows, scenario)
            if args.dtype == "bfloat16":
                by_engine[key] = engine_gradients(worker, rows, scenario, mine)
        with recording(worker.engine) as steps:
            metrics = train(worker, scenario, make_data(rows, scenario, mine))
        if scenario.name == "micro-batches of 1":
            metrics["loss_without_gradient"] = loss_without_gradient(worker, make_data(rows, scenario, mine))
        for step, (gradient, rows_here, all_reduces) in enumerate(steps):
            of_all_ranks: list[list[int]] = [[] for _ in range(args.ranks)]
            torch.distributed.all_gather_object(of_all_ranks, rows_here)
            used = [i for rank_rows in of_all_ranks for i in rank_rows]
            lengths = np.array([0 if i in scenario.masked + scenario.rejected else LENGTHS[i] for i in used])
            expected = weighted_sum(scenario.mode, lengths, gradients[key][used])
            results.append(
                {
                    "scenario": scenario.name,
                    "mode": scenario.mode,
                    "step": step,
                    "all_reduces": all_reduces,
                    "lengths": lengths.tolist(),
                    "scale": M,
                    "norm": expected.norm().item(),
                    "error": relative_error(gradient, expected),
                    "metrics": {k: v for k, v in metrics.items() if k.startswith(("vl_norm/", "loss"))},
                }
            )
            if key in by_engine:
                expected = weighted_sum(scenario.mode, lengths, by_engine[key][used])
                results[-1]["error_of_sum"] = relative_error(gradient, expected)
    finish(rank, args, results)


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


def loss_without_gradient(worker: Any, data: TensorDict) -> float:
    """Of the mini-batch, by the loss function that `worker` was trained with last."""
    from verl.utils import tensordict_utils as tu

    return float(tu.get(worker.infer_batch(data), "metrics")["loss"])


def run_stock(rank: int, args: argparse.Namespace) -> None:
    """verl's own modes: gradient hashes and metrics."""
    _, rows, worker, mine = start_rank(rank, args)
    results = []
    for mode in STOCK_MODES:
        if mode == "token-sum" and older_verl.needed():
            continue  # it came with 0.9.0
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
    if args.native and plugin_is_active() and importlib.import_module("vlnorm_verl.plugin.modes").is_ours("vl_norm"):
        parser.error("--native: this verl has no vl_norm itself, the plugin answers for it")
    start(run_stock if args.stock else run_exact, args)


if __name__ == "__main__":
    main()
