"""One run of verl's trainer as a process: start it, follow its metrics, end all of it, read what it wrote.

Files in the folder of a run that live here:

    train.log           everything that verl, Ray and vLLM print
    metrics-NNN.jsonl   verl's metrics (its file logger's JSON lines), one file per start
    .lock               held by the launcher and the trainer (files.locked), so that no second run writes here
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil

from vlnorm_verl.runs.records import RECORD, decode, join, read_starts

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOP_SECONDS = 20.0  # for verl and Ray to end by themselves before they are killed

Record = dict[str, Any]  # {"step": int, "data": {metric: number, or None where it is not finite}} as verl writes it


def raise_on_stop() -> None:
    """STOP_SIGNALS raise KeyboardInterrupt, also where a shell or a scheduler made this process ignore Ctrl-C.

    Not SIGHUP where it is ignored: that is what nohup is for.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


class TrainingFailed(RuntimeError):
    """verl's process ended with an error."""


def train(
    arguments: list[str], variables: dict[str, str], metrics: Path, log: Path, *locks: IO[str]
) -> Generator[Record, None, None]:
    """Run verl's trainer and yield its metrics as it writes them.

    Whatever ends this generator (the trainer's end, an exception, Ctrl-C) also ends every process of the run.

    Args:
        arguments: the trainer's command line.
        variables: environment variables, over those of this process.
        metrics: where verl's file logger is to write.
        log: what the trainer prints is appended here.
        locks: from `files.locked`; the trainer holds them too, and keeps them if this process is killed.

    Raises:
        TrainingFailed: the trainer's exit code is not 0.
    """
    environment = {**os.environ, **variables, **log_variables(metrics)}
    # SLURM's, for NVIDIA's GPUs too; verl refuses it beside Ray's CUDA_VISIBLE_DEVICES (see slurm.sbatch).
    environment.pop("ROCR_VISIBLE_DEVICES", None)
    with open(log, "ab") as output:
        # A session of its own: Ctrl-C reaches this process only, which then ends the run in order.
        process = subprocess.Popen(
            arguments,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.fileno() for lock in locks],
        )
    try:
        yield from _follow(metrics, process)
    finally:
        stop(process)
    if process.returncode != 0:
        raise TrainingFailed(f"verl's trainer ended with exit code {process.returncode}.")


def log_variables(metrics: Path) -> dict[str, str]:
    """Environment by which verl's loggers write into the run's folder, that of `metrics`, and not where they start."""
    folder = metrics.resolve().parent
    folders = {"TENSORBOARD_DIR": folder / "tensorboard", "SWANLAB_LOG_DIR": folder / "swanlog"}
    folders["WANDB_DIR"] = folder  # where it makes a folder wandb
    own = {name: os.environ.get(name, str(path)) for name, path in folders.items()}
    return {"VERL_FILE_LOGGER_PATH": str(folder / metrics.name), **own}


def _follow(path: Path, process: subprocess.Popen[bytes]) -> Generator[Record, None, None]:
    """Whole records of a file that a process appends to, until that process is gone.

    A corrupt line is left out, as in `read_metrics`: a full disk may have cut it, and the training goes on.
    """
    position, rest = 0, b""
    while True:
        last = process.poll() is not None  # asked before reading: what a finished process wrote is read once more
        chunk = b""
        with contextlib.suppress(OSError), open(path, "rb") as file:  # not there yet, or a network disk is away
            file.seek(position)
            chunk = file.read()
        position += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            try:
                record = decode(line, RECORD)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
            yield {"step": record.step, "data": record.data}
        if last:
            return
        time.sleep(0.2)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a trainer and all that it started: asked by SIGINT first, so that Ray shuts down; then killed."""
    # An impatient second Ctrl-C must not leave the rest running.
    handlers = [(end, signal.signal(end, signal.SIG_IGN)) for end in STOP_SIGNALS]
    family: list[psutil.Process] = []
    if process.poll() is None:  # else its id may be another's by now
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        if process.poll() is None:
            process.kill()
            process.wait()
    _, left = psutil.wait_procs(family, timeout=5)
    for member in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    for end, handler in handlers:
        signal.signal(end, handler)


def last_lines(path: Path, count: int = 40) -> list[str]:
    with open(path, errors="replace") as file:
        return list(deque(file, count))


def next_metrics(folder: Path) -> Path:
    """The file for the metrics of the next start: verl's file logger empties the file that it is given."""
    names = [path.stem.removeprefix("metrics-") for path in folder.glob("metrics-*.jsonl")]
    last = max((int(name) for name in names if name.isdecimal()), default=-1)  # not a user's metrics-000-old
    return folder / f"metrics-{last + 1:03d}.jsonl"


def read_metrics(folder: Path) -> list[Record]:
    """All steps of a run in order, its starts joined as in `records`. A cut last line is left out."""
    records = join(read_starts(sorted(folder.glob("metrics-*.jsonl")), []), [])
    return [{"step": step, "data": records[step]} for step in sorted(records)]
