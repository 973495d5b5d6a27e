"""A run's process and its lock, with a few lines in place of verl's trainer. test_e2e.py has the real one."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import wait_for
from vlnorm_verl.files import locked
from vlnorm_verl.runs import process
from vlnorm_verl.runs.process import train

# Prints its process and one that it starts; writes a step in two parts, a line that a full disk cut, and a second step.
TRAINER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
print(os.getpid(), child.pid, flush=True)
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as metrics:
    for part in ('{"step": 1, "data": {"a"', ': 0.5}}\\n{"step": 2, "da\\n{"step": 2, "data": {}}\\n'):
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
command, metrics = [sys.executable, "-c", sys.argv[2]], folder / "metrics-000.jsonl"
with locked(folder) as lock, locked(folder / "ray") as ray:
    for record in train(command, {}, metrics, folder / "log", lock, ray):
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


def test_a_network_disk_that_is_away_for_a_moment_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = iter([True, False, True])

    def opened(path: Path, *arguments: str) -> Any:
        if path.suffix == ".jsonl" and next(away, False):
            raise OSError(errno.ESTALE, "Stale file handle")
        return open(path, *arguments)

    monkeypatch.setattr(process, "open", opened, raising=False)
    writes = TRAINER.replace("time.sleep(120)", "time.sleep(0)")
    records = [*train([sys.executable, "-c", writes], {}, tmp_path / "metrics-000.jsonl", tmp_path / "log")]
    assert [record["step"] for record in records] == [1, 2]
    assert not [*away]


def test_loggers_write_into_the_runs_folder_and_slurms_variable_of_other_gpus_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0")  # verl would refuse it
    monkeypatch.setenv("SWANLAB_LOG_DIR", "/mine")
    for name in ("WANDB_DIR", "TENSORBOARD_DIR"):
        monkeypatch.delenv(name, raising=False)
    shows = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    assert not list(train(shows, {}, tmp_path / "metrics-000.jsonl", tmp_path / "log"))
    variables = json.loads((tmp_path / "log").read_text())
    assert "ROCR_VISIBLE_DEVICES" not in variables
    assert variables["VERL_FILE_LOGGER_PATH"] == f"{tmp_path}/metrics-000.jsonl"
    assert (variables["WANDB_DIR"], variables["TENSORBOARD_DIR"]) == (str(tmp_path), f"{tmp_path}/tensorboard")
    assert variables["SWANLAB_LOG_DIR"] == "/mine"


@pytest.mark.parametrize("given", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_run_behind_nohup_outlives_its_terminal(given: signal.Handlers) -> None:
    before = {number: signal.getsignal(number) for number in process.STOP_SIGNALS}
    try:
        for number in process.STOP_SIGNALS:
            signal.signal(number, given)
        process.raise_on_stop()
        assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == (given == signal.SIG_IGN)
        for number in process.STOP_SIGNALS[:2]:  # ignored by what a shell starts behind &
            assert signal.getsignal(number) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def test_what_is_locked_stays_so_while_the_trainer_of_a_killed_launcher_runs(tmp_path: Path) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path), TRAINER], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    launcher.stdout.readline()
    launcher.kill()
    launcher.wait()
    try:
        for folder in (tmp_path, tmp_path / "ray"):
            with pytest.raises(BlockingIOError), locked(folder):
                pass
    finally:
        for pid in processes(tmp_path):
            os.kill(pid, signal.SIGKILL)

    def free() -> bool:
        with contextlib.suppress(BlockingIOError), locked(tmp_path):
            return True
        return False

    wait_for(free, 120)
