"""Runs the CPU study, piece by piece: what is finished is not run again.

    python -m benchmarks.study.run --status         what is done, what is left, and for how long
    python -m benchmarks.study.run --hours 2.4      all that is left, as far as it can end within 2.4 hours
    python -m benchmarks.study.run --again NAME     a run that another job disturbed, anew; the first stays in replaced/
    python -m benchmarks.study.run --try DIR        three steps of four prompts a run, 16 held-out ones, all in DIR

Each run is one `vlnorm-verl launch`. A finished one is a file of docs/results/study (record.py), which is all that
analyse.py needs; what else runs wrote, and the warm starts, are in --work. Ctrl-C and SIGTERM end what runs in order,
kill -9 of this program ends it too; a run that was not finished begins anew, so that none has a seam.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.study.design import LEAST, PARTS, Run, runs
from benchmarks.study.record import RECORDS, ROOT, Load, read_records, write_record, write_warm_start
from vlnorm_verl.files import UserError, locked, whole
from vlnorm_verl.runs.process import raise_on_stop, read_metrics
from vlnorm_verl.tasks.base import write_parquet
from vlnorm_verl.tasks.tiny import WEIGHTS
from vlnorm_verl.tasks.tiny.data import rows

DISTURBED = 0.2  # cores that other programs took, on average
FIRST_GUESS = 8.0  # seconds a step, before any run is measured
TRIAL = ["data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=4"]
TRIAL += ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8"]
TRIAL += ["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16"]
# Every process of a run imports floor.py, which only adds a mode.
VARIABLES = {"PYTHONPATH": str(ROOT), "VERL_USE_EXTERNAL_MODULES": "benchmarks.study.floor"}
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Study:
    """work: folder of the runs and warm starts. records: of the finished runs. trial: whether it is only tried out."""

    work: Path
    records: Path
    trial: bool
    load: Load

    def model(self, warm_start: int) -> Path:
        return WEIGHTS if warm_start == 1 else self.work / f"warm-start-{warm_start}"

    def run(self, left: list[Run], deadline: float) -> bool:
        """Whether none failed. The second that fails ends it; no run begins that would end after the deadline."""
        self.make_warm_starts(sorted({run.warm_start for run in left}))
        problems, failed = left[0].problems, False
        held_out = self.work / "data" / f"held-out-{problems}.parquet"
        if not held_out.exists():
            with whole(held_out) as temporary:
                write_parquet(rows(problems, 0, "test"), temporary)
        for run in left:
            if time.time() + seconds_of(run, read_records(self.records)) > deadline:
                break
            empty(folder := self.work / run.name)
            given = run.overrides(folder, self.work / "data", self.model(run.warm_start), held_out)
            command = ["-m", "vlnorm_verl", "launch", *given, *(TRIAL if self.trial else [])]
            begun = self.load.now()
            codes = self.together({run.name: command}, lambda name: f"{name}: step {last_step(self.work / name)}")
            ended = self.load.now()
            if not codes[run.name]:
                write_record(self.records, run, folder, self.model(run.warm_start), begun, ended)
            elif failed:
                break
            else:
                failed = True
        return not failed

    def make_warm_starts(self, needed: list[int]) -> None:
        """Those that are not there, at the same time and with one thread each; then all are recorded or compared."""
        small = ["--steps", "20", "--eval-prompts", "16"] if self.trial else []
        missing = {f".warm-start-{number}": number for number in needed if not self.model(number).exists()}
        command = ["-m", "vlnorm_verl.tasks.tiny.warmstart", *small]
        commands = {
            name: [*command, "--seed", str(number), "--out", str(self.work / name)] for name, number in missing.items()
        }
        if any(self.together(commands, lambda name: f"{name[1:]} (ten minutes)").values()):
            raise UserError("without its warm start no run begins")
        for name, number in missing.items():
            (self.work / name).rename(self.model(number))
        for number in needed:
            write_warm_start(self.records, number, self.model(number), 0.0 if self.trial else LEAST)

    def together(self, commands: dict[str, list[str]], progress: Callable[[str], str]) -> dict[str, int]:
        """Exit codes of this Python with these arguments, at the same time, each on its share of the cores.

        The CPU stack has as many threads as cores are left to it. Each is a session of its own: Ctrl-C reaches this
        program only, which hands it on; SIGTERM comes to it if this program is killed.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        cores, processes = sorted(os.sched_getaffinity(0)), {}
        for index, (name, command) in enumerate(commands.items()):
            share = ",".join(map(str, cores[index % len(cores) :: len(commands)]))
            limits = ["setpriv", "--pdeathsig", "TERM", "taskset", "-c", share, sys.executable]
            with open(self.work / f"{name}.log", "ab") as log:
                processes[name] = subprocess.Popen(
                    [*limits, *command],
                    stdout=log,
                    stderr=log,
                    cwd=ROOT,
                    env=os.environ | VARIABLES,
                    start_new_session=True,
                )
        begun = time.monotonic()
        try:
            with console.status("") as status:
                while any(process.poll() is None for process in processes.values()):
                    self.load.sample()
                    doing = "; ".join(map(progress, processes))
                    status.update(f"{doing}, {time.monotonic() - begun:.0f} s")
                    time.sleep(2)
        finally:
            for process in processes.values():
                process.send_signal(signal.SIGINT)
            codes = {name: process.wait() for name, process in processes.items()}
        for name, code in codes.items():
            ended = f"failed, see {self.work}/{name}.log," if code else "finished"
            console.print(f"{name}: {ended} after {time.monotonic() - begun:.0f} s")
        return codes


def last_step(folder: Path) -> int:
    return max((record["step"] for record in read_metrics(folder)), default=0)


def seconds_of(run: Run, known: list[dict[str, Any]]) -> float:
    """What a run is expected to take: by the finished ones that ran alone."""
    alone = [record["seconds"] / record["steps"] for record in known if record["jobs"] == 1]
    return run.steps * statistics.median(alone or [FIRST_GUESS])


def empty(folder: Path) -> None:
    """Remove what an earlier start left, once it has ended."""
    while folder.exists():
        try:
            with locked(folder):
                shutil.rmtree(folder)
        except BlockingIOError:
            console.print(f"{folder.name}: an earlier start still runs; waiting for its end")
            time.sleep(5)


def show(every_run: list[Run], records: Path) -> None:
    known = {record["name"]: record for record in read_records(records)}
    table = Table("part", "what", "runs", "finished", "hours left")
    for part, what in PARTS.items():
        of_part = [run for run in every_run if run.part == part]
        left = [run for run in of_part if run.name not in known]
        hours = sum(seconds_of(run, [*known.values()]) for run in left) / 3600
        table.add_row(part, what, str(len(of_part)), str(len(of_part) - len(left)), f"{hours:.1f}")
    console.print(table)
    for name, record in known.items():
        if (record["others_cores"] or 0) > DISTURBED:
            console.print(f"{name}: other programs took {record['others_cores']} cores; --again {name} makes it anew")


def main(
    part: Annotated[list[str] | None, typer.Option(help=f"Only this part; one or more of {', '.join(PARTS)}.")] = None,
    hours: Annotated[float, typer.Option(min=0.0, help="Begin no run that ends later.", show_default="no limit")] = 1e6,
    status: Annotated[bool, typer.Option("--status", help="Run nothing, say how far it is.")] = False,
    again: Annotated[list[str] | None, typer.Option(help="A finished run to be made anew, by its name.")] = None,
    attempt: Annotated[Path | None, typer.Option("--try", help="Try all of it out, tiny, in this folder.")] = None,
    work: Annotated[Path, typer.Option(help="Folder of the runs and the warm starts.")] = ROOT / "runs" / "study",
) -> None:
    """Run what is left of the study."""
    deadline, records = time.time() + hours * 3600, RECORDS
    every_run = [replace(run, jobs=1) for run in runs()]  # launch refuses two at a time, which two pilots were
    if attempt:
        work, records = attempt / "work", attempt / "records"
        every_run = [replace(run, steps=3, problems=16) for run in every_run]
    study, well = Study(work.resolve(), records, attempt is not None, Load()), True
    try:
        if unknown := {*(part or [])} - {*PARTS}:
            raise UserError(f"--part {', '.join(unknown)}: accepted are {', '.join(PARTS)}")
        if again and status:
            raise UserError("--again makes a run anew and --status runs nothing: give one of them")
        if missing := [name for name in again or [] if not (records / f"{name}.json").exists()]:
            raise UserError(f"--again {', '.join(missing)}: {records} has no finished run of this name")
        for name in again or []:
            (records / "replaced").mkdir(exist_ok=True)
            (records / f"{name}.json").rename(records / "replaced" / f"{name}-{int(time.time())}.json")
        done = {record["name"] for record in read_records(records)}
        left = [run for run in every_run if run.name not in done and (not part or run.part in part)]
        if left and not status:
            raise_on_stop()
            well = study.run(left, deadline)
        show(every_run, records)
    except UserError as error:
        console.print(str(error), style="red")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
        raise typer.Exit(130) from None
    raise typer.Exit(0 if well else 1)


if __name__ == "__main__":
    typer.run(main)
