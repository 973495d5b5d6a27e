"""Programs that stand for others, processes that a test has started, and a wait for what they do."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil


def script(path: Path, text: str) -> Path:
    """A program in bash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def with_variable(name: str, beginning: str) -> list[psutil.Process]:
    """Those that run, zombies and this one apart, and have this variable in their environment, beginning so."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile, or is another user's
            if process.environ().get(name, "").startswith(beginning) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those of a run, Ray's included: they were started with its metrics file in their environment."""
    return with_variable("VERL_FILE_LOGGER_PATH", f"{folder.resolve()}/")


def named(processes: Iterable[psutil.Process], part: str) -> psutil.Process:
    """The first with this in its command line or title."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if part in " ".join(process.cmdline()):
                return process
    raise AssertionError(f"no {part} is running")


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_for(condition: Callable[[], Any], seconds: float, every: float = 0.2) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(every)
