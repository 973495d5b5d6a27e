"""Runs the CPU study, piece by piece: what is finished is not run again.

    python benchmarks/study/run.py --status         what is done, what is left, and for how long
    python benchmarks/study/run.py --part pilots    first; then set LENGTH and JOBS in design.py and commit that
    python benchmarks/study/run.py --hours 2.4      all that is left, as far as it can end within 2.4 hours
    python benchmarks/study/run.py --again NAME     a run that another job disturbed, anew; the first stays in replaced/
    python benchmarks/study/run.py --try DIR        three steps of four prompts a run, all in DIR: does it work here?

Each run is one `vlnorm-verl launch`. A finished one is a file of docs/results/study (record.py), which is all that
analyse.py needs; what else runs wrote, and the warm starts, are in --work. Ctrl-C and SIGTERM end the runs in order,
kill -9 of this program ends them too; a run that was not finished begins anew, so that none has a seam.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from design import HELD_OUT, PARTS, Run, runs
from record import ROOT, Load, read_records, write_record, write_warm_start
from rich.console import Console
from rich.table import Table

from vlnorm_verl.files import UserError, locked
from vlnorm_verl.runs.process import raise_on_stop, read_metrics
from vlnorm_verl.tasks.base import write_parquet
from vlnorm_verl.tasks.tiny import WEIGHTS
from vlnorm_verl.tasks.tiny.data import rows

RECORDS = ROOT / "docs" / "results" / "study"
DISTURBED = 0.2  # cores that other programs took, on average
FIRST_GUESS = 8.0  # seconds a step, before any run is measured
TRIAL = ["data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=4"]
TRIAL_STEPS = 3
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Study:
    """work: folder of the runs and warm starts. records: of the finished runs. trial: whether it is only tried out."""

    work: Path
    records: Path
    trial: bool
    left: list[Run]

    def model(self, warm_start: int) -> Path:
        return WEIGHTS if warm_start == 1 else self.work / f"warm-start-{warm_start}"

    @property
    def held_out(self) -> Path:
        return self.work / "data" / f"held-out-{HELD_OUT}.parquet"

    def command(self, run: Run) -> list[str]:
        given = run.overrides(self.work / run.name, self.work / "data", self.model(run.warm_start), self.held_out)
        return ["-m", "vlnorm_verl", "launch", *given, *(TRIAL if self.trial else [])]


def seconds_of(run: Run, known: list[dict[str, Any]]) -> float:
    """What a run is expected to take: by the finished ones, with as many at a time if there are such."""
    alike = [r for r in known if r["jobs"] == run.jobs] or known
    return run.steps * statistics.median([r["seconds"] / r["steps"] for r in alike] or [FIRST_GUESS])


# ----------------------------------------------------------------------------------------------------------- processes


def start(command: list[str], log: Path, cores: list[int]) -> subprocess.Popen[bytes]:
    """This Python with these arguments on these cores, by which the CPU stack chooses its threads.

    A session of its own: Ctrl-C reaches this program only, which hands it on once. SIGTERM comes to it if this program
    is killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    limits = ["setpriv", "--pdeathsig", "TERM", "taskset", "-c", ",".join(map(str, cores))]
    with open(log, "ab") as output:
        return subprocess.Popen(
            [*limits, sys.executable, *command], stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )


def slots(jobs: int) -> list[list[int]]:
    """The cores of each of so many runs at a time."""
    cores = sorted(os.sched_getaffinity(0))
    return [cores[index::jobs] for index in range(jobs)]


def empty(folder: Path) -> None:
    """Remove what an earlier start left, once it has ended."""
    told = False
    while folder.exists():
        try:
            with locked(folder):
                shutil.rmtree(folder)
        except BlockingIOError:
            if not told:
                console.print(f"{folder.name}: an earlier start still runs; waiting for its end")
            told = True
            time.sleep(2)


def every(seconds: float, text: Any, load: Load) -> Iterator[None]:
    """Yields now and then, with the load measured and what is being done on the terminal."""
    with console.status("") as status:
        while True:
            load.sample()
            yield
            status.update(text())
            time.sleep(seconds)


def make_warm_starts(study: Study, load: Load) -> None:
    """Those that are needed and not there, at the same time, one thread each; then all are recorded or compared."""
    needed = sorted({run.warm_start for run in study.left})
    missing = [number for number in needed if not study.model(number).exists()]
    making = {}
    for number, cores in zip(missing, slots(len(missing)) if missing else [], strict=True):
        temporary = study.work / f".warm-start-{number}"
        steps = ["--steps", "20", "--eval-prompts", "16"] if study.trial else []
        command = ["-m", "vlnorm_verl.tasks.tiny.warmstart", "--out", str(temporary), "--seed", str(number), *steps]
        making[number] = start(command, study.work / f"warm-start-{number}.log", cores)
    began = time.monotonic()
    try:
        for _ in every(2, lambda: f"warm starts {missing}: {time.monotonic() - began:.0f} s of about 600", load):
            if all(process.poll() is not None for process in making.values()):
                break
    finally:
        for process in making.values():
            process.terminate()
    for number, process in making.items():
        if process.wait():
            raise UserError(f"warm start {number} failed, see {study.work}/warm-start-{number}.log")
        (study.work / f".warm-start-{number}").rename(study.model(number))
    for number in needed:
        write_warm_start(study.records, number, study.model(number))


def run_all(study: Study, deadline: float) -> int:
    """Exit code: 0 if all were run or the time is over, 1 if one failed, 130 after Ctrl-C."""
    raise_on_stop()
    load, failed = Load(), 0
    running: dict[subprocess.Popen[bytes], tuple[Run, Any, list[int]]] = {}

    def text() -> str:
        parts = []
        for run, begun, _ in running.values():
            done = max((record["step"] for record in read_metrics(study.work / run.name)), default=0)
            parts.append(f"{run.name}: step {done} of {run.steps}, {time.time() - begun.time:.0f} s")
        return "; ".join(parts)

    try:
        make_warm_starts(study, load)
        if not study.held_out.exists():
            write_parquet(rows(HELD_OUT, 0, "test"), study.held_out)
        for jobs, group in groupby(study.left, key=lambda run: run.jobs):
            waiting, free = list(group), slots(jobs)
            for _ in every(1, text, load):
                for process in [process for process in running if process.poll() is not None]:
                    run, begun, cores = running.pop(process)
                    free.append(cores)
                    if process.returncode:
                        failed += 1
                        console.print(f"{run.name}: failed, see {study.work}/{run.name}.log")
                    else:
                        write_record(
                            study.records, run, study.work / run.name, study.model(run.warm_start), begun, load.now()
                        )
                        console.print(f"{run.name}: finished in {time.time() - begun.time:.0f} s")
                while free and waiting and failed < 2:
                    if time.time() + seconds_of(waiting[0], read_records(study.records)) > deadline:
                        break
                    run = waiting.pop(0)
                    empty(study.work / run.name)
                    process = start(study.command(run), study.work / f"{run.name}.log", cores := free.pop(0))
                    running[process] = run, load.now(), cores
                if not running:
                    break
            if waiting:
                break
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        console.print("stopping …")
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        return 130
    return 1 if failed else 0


# ----------------------------------------------------------------------------------------------------------- terminal


def show(every_run: list[Run], records: Path) -> None:
    known = {record["name"]: record for record in read_records(records)}
    table = Table("part", "what", "runs", "finished", "hours left")
    hours = dict.fromkeys(PARTS, 0.0)
    for run in every_run:
        hours[run.part] += 0 if run.name in known else seconds_of(run, [*known.values()]) / run.jobs / 3600
    for part, what in PARTS.items():
        names = [run.name for run in every_run if run.part == part]
        table.add_row(part, what, str(len(names)), str(len(known.keys() & names)), f"{hours[part]:.1f}")
    console.print(table)
    for name, record in known.items():
        if record["others_cores"] > DISTURBED:
            console.print(f"{name}: other programs took {record['others_cores']} cores; --again {name} makes it anew")
    pilots = [known[run.name] for run in every_run if run.part == "pilots" and run.name in known]
    if pilots:
        table = Table(
            "pilot", "runs at a time", "cut, last 10 steps", "accuracy", "seconds, all", "of the first 20 steps"
        )
        for r in pilots:
            cut, accuracy = statistics.fmean(r["columns"]["cut"][-10:]), statistics.fmean(r["columns"]["accuracy"])
            numbers = (
                f"{cut:.3f}",
                f"{accuracy:.3f}",
                f"{r['seconds']:.0f}",
                f"{sum(r['columns']['seconds'][:20]):.0f}",
            )
            table.add_row(r["name"], str(r["jobs"]), *numbers)
        console.print(table)
    if every_run[-1].length is None:
        console.print("the pilots first: --part pilots; then set LENGTH and JOBS in benchmarks/study/design.py")
    psutil.cpu_percent()
    busy = psutil.cpu_percent(2) * len(os.sched_getaffinity(0)) / 100
    console.print(f"the machine is busy with {busy:.1f} of {len(os.sched_getaffinity(0))} cores now")


def main(
    part: Annotated[
        list[str] | None, typer.Option(help=f"Only this part; one or several of {', '.join(PARTS)}.")
    ] = None,
    hours: Annotated[
        float, typer.Option(min=0.0, help="Begin no run that would end later.", show_default="no limit")
    ] = 1e6,
    status: Annotated[bool, typer.Option("--status", help="Run nothing, say how far it is.")] = False,
    again: Annotated[list[str] | None, typer.Option(help="A finished run to be made anew, by its name.")] = None,
    attempt: Annotated[Path | None, typer.Option("--try", help="Try all of it out, tiny, in this folder.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of the runs and the warm starts.")] = ROOT / "runs" / "study",
) -> None:
    """Run what is left of the study."""
    deadline = time.time() + hours * 3600
    records, every_run = RECORDS, runs()
    if attempt:
        work, records = attempt.resolve() / "work", attempt.resolve() / "records"
        every_run = [replace(run, steps=TRIAL_STEPS, length=run.length or 256) for run in every_run]
    try:
        for chosen in part or []:
            if chosen not in PARTS:
                raise UserError(f"--part {chosen}: accepted are {', '.join(PARTS)}")
        for name in again or []:
            if not (file := records / f"{name}.json").exists() or name not in {run.name for run in every_run}:
                raise UserError(f"--again {name}: no finished run has this name; {records} has a file for each")
            (records / "replaced").mkdir(exist_ok=True)
            file.rename(records / "replaced" / f"{name}-{int(time.time())}.json")
        if status:
            return show(every_run, records)
        done = {record["name"] for record in read_records(records)}
        asked = [run for run in every_run if not part or run.part in part]
        left = [run for run in asked if run.name not in done]
        if left and left[-1].length is None:
            left = [run for run in left if run.length]
            if not left:
                raise UserError("set LENGTH in benchmarks/study/design.py by what the pilots said (--status)")
        code = run_all(Study(work.resolve(), records, attempt is not None, left), deadline) if left else 0
        show(every_run, records)
    except UserError as error:
        console.print(str(error), style="red")
        code = 2
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
