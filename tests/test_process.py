"""A run's process and its lock, with a few lines in place of verl's trainer. test_e2e.py has the real one."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.processes import wait_for
from vlnorm_verl.files import locked
from vlnorm_verl.runs import process
from vlnorm_verl.runs.process import train

# Prints its process and one that it starts; writes a step in two parts, and a second one.
TRAINER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
print(os.getpid(), child.pid, flush=True)
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as metrics:
    for part in ('{"step": 1, "data": {"a"', ': 0.5}}\\n{"step": 2, "data": {}}\\n'):
        metrics.write(part)
        metrics.flush()
        time.sleep(0.5)
time.sleep(120)
"""
LAUNCHER = """
import sys
from pathlib import Path
from vlnorm_verl.files import locked
from vlnorm_verl.runs.process import train
folder = Path(sys.argv[1])
with locked(folder) as lock:
    for record in train([sys.executable, "-c", sys.argv[2]], {}, folder / "metrics-000.jsonl", folder / "log", lock):
        print(record, flush=True)
"""


def processes(folder: Path) -> list[int]:
    return [int(word) for word in (folder / "log").read_text().splitlines()[0].split()]


def running(pid: int) -> bool:
    """What nobody has waited for is a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_steps_are_whole_and_nothing_is_left_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", 2.0)  # where SIGINT is ignored, as behind nohup
    with locked(tmp_path) as lock:
        records = train([sys.executable, "-c", TRAINER], {}, tmp_path / "metrics-000.jsonl", tmp_path / "log", lock)
        with contextlib.closing(records):
            assert [next(records), next(records)] == [{"step": 1, "data": {"a": 0.5}}, {"step": 2, "data": {}}]
            assert all(map(running, processes(tmp_path)))
        wait_for(lambda: not any(map(running, processes(tmp_path))), 120)


def test_whoever_has_the_id_of_an_ended_trainer_is_left_alone() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    ended.pid = os.getpid()
    with subprocess.Popen(["sleep", "60"]) as another:
        try:
            process.stop(ended)
            with pytest.raises(subprocess.TimeoutExpired):  # a killed one may still be there for a moment
                another.wait(1)
        finally:
            another.kill()


def test_a_folder_stays_locked_while_the_trainer_of_a_killed_launcher_runs(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path), TRAINER], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    launcher.stdout.readline()
    launcher.kill()
    launcher.wait()
    try:
        with pytest.raises(BlockingIOError), locked(tmp_path):
            pass
    finally:
        for pid in processes(tmp_path):
            os.kill(pid, signal.SIGKILL)

    def free() -> bool:
        with contextlib.suppress(BlockingIOError), locked(tmp_path):
            return True
        return False

    wait_for(free, 120)
