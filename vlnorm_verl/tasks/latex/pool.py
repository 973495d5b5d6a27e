"""Worker processes that compare Math answers, each within limits of time and memory.

sympy can take for ever or all memory on what a model writes. So it runs in processes of its own: each answer has a
wall-clock limit, after which its worker is killed; each worker has a memory limit and is replaced after RECYCLE_AFTER
answers. The process that calls ``compute_score`` starts a worker at the first answer that needs one: there is no
server. Workers die with that process.

What is the answer's fault is an outcome; what is the machine's is not:

| what happens                                                     | then                                              |
|------------------------------------------------------------------|---------------------------------------------------|
| over the wall-clock limit                                        | ``timeout``                                       |
| over it, but hardly any time on a CPU (the machine was stalled)  | failure: again, in a new worker                   |
| two workers in a row crashed (SIGSEGV, …)                        | ``crash``                                         |
| out of memory                                                    | ``crash``; a new worker                           |
| a worker vanished (killed from outside, for one)                 | failure: again, in a new worker                   |
| ATTEMPTS failures on one answer, or a failure rate above the set | `InfrastructureError`: never a score              |
| sympy is missing or broken                                       | `InfrastructureError`, at the first answer        |
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger(__name__)

LIMIT_S = 5.0  # wall-clock seconds for one answer
WORKERS = 4  # processes for each process that computes rewards (verl starts reward.num_workers = 8 of those)
MEMORY_MIB = 512  # address space of a worker; 62 after easy answers
RECYCLE_AFTER = 1000  # answers
MAX_FAILURE_RATE = 0.01  # failures / attempts, over the last WINDOW attempts

ATTEMPTS = 3  # on one answer
WINDOW = 1000  # attempts
_START_LIMIT_S = 120.0
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
# A worker that computes gets a CPU for far more than this part of the time, even on a crowded machine.
_LEAST_CPU_SHARE = 0.1

_WORKER_FILE = Path(__file__).with_name("worker.py")


class InfrastructureError(RuntimeError):
    """Answers could not be compared, through no fault of theirs."""


class _WorkerFailure(Exception):
    """One attempt failed; ``crashed`` if the worker died of a signal that code raises on itself."""

    def __init__(self, message: str, crashed: bool = False) -> None:
        super().__init__(message)
        self.crashed = crashed


class _Worker:
    """One worker process. Used by one thread at a time."""

    def __init__(self, limit_s: float, memory_mib: int) -> None:
        """
        Raises:
            InfrastructureError: sympy is missing or broken: trying again would not help.
            _WorkerFailure: the process did not start.
        """
        self.limit_s = limit_s
        self.memory_kib = memory_mib * 1024
        self.answers = 0
        self.peak_kib = 0
        try:
            # A plain pipe, not multiprocessing: its workers would import the caller's main module, Ray's here.
            # Without a locale: glibc maps the file of all of them, 200 MiB on some systems, into the limited space.
            self.process = subprocess.Popen(
                [sys.executable, str(_WORKER_FILE), str(memory_mib * 2**20), str(limit_s)],
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
        except OSError as error:
            raise _WorkerFailure(f"cannot start a worker: {error}") from error
        try:
            hello = self._read(_START_LIMIT_S)
            if "broken" in hello:
                remedy = (
                    f"memory_mib={memory_mib} is too little"
                    if hello["broken"].startswith("MemoryError")
                    else "it needs sympy: pip install sympy"
                )
                raise InfrastructureError(
                    f"the Math reward does not work in {sys.executable}: {hello['broken']}; {remedy}"
                )
        except TimeoutError as error:
            self.close()
            raise _WorkerFailure(f"a worker did not start within {_START_LIMIT_S:g} s") from error
        except BaseException:
            self.close()
            raise

    def compare(self, gold: str, answer: str) -> dict[str, Any]:
        """The worker's verdict.

        Raises:
            TimeoutError: the answer's limit is over; the worker has to be closed.
            _WorkerFailure: no verdict; the worker has to be closed.
        """
        cpu_before = self._cpu_seconds()
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"gold": gold, "answer": answer}).encode("ascii") + b"\n")
            verdict = self._read(self.limit_s)
        except TimeoutError:
            used = self._cpu_seconds() - cpu_before
            if used < _LEAST_CPU_SHARE * self.limit_s:
                message = f"a worker was stalled: {used:.2f} s on a CPU in {self.limit_s:g} s"
                raise _WorkerFailure(message) from None
            raise
        except OSError as error:
            raise _WorkerFailure(f"cannot write to a worker: {error}") from error
        self.answers += 1
        self.peak_kib = verdict["peak_kib"]
        return verdict

    @property
    def used_up(self) -> bool:
        """Whether to replace it: many answers, or so much memory used once that the next answer has too little."""
        return self.answers >= RECYCLE_AFTER or self.peak_kib > self.memory_kib / 2

    def close(self) -> None:
        with self.process:  # closes its pipes and waits for its end
            self.process.kill()

    def _read(self, limit_s: float) -> dict[str, Any]:
        """The next message."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + limit_s
        poll = select.poll()  # select() cannot watch file numbers above 1023, which Ray's processes reach
        poll.register(self.process.stdout, select.POLLIN)
        received = b""
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError
            part = self.process.stdout.read(65536)
            if not part:
                code = self.process.wait()
                crashed = -code in _CRASHES
                raise _WorkerFailure(f"a worker died with exit code {code}", crashed)
            received += part
        return json.loads(received)

    def _cpu_seconds(self) -> float:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error as error:
            raise _WorkerFailure(f"a worker vanished: {error}") from error
        return times.user + times.system


class Pool:
    """Worker processes for any number of threads, started when they are needed.

    Args:
        limit_s: wall-clock seconds for one answer.
        workers: processes.
        memory_mib: address space of each.
        max_failure_rate: failed attempts / attempts, over the last WINDOW attempts, above which `compare` raises.
    """

    def __init__(
        self,
        limit_s: float = LIMIT_S,
        workers: int = WORKERS,
        memory_mib: int = MEMORY_MIB,
        max_failure_rate: float = MAX_FAILURE_RATE,
    ) -> None:
        for name, value in (("limit_s", limit_s), ("workers", workers), ("memory_mib", memory_mib)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0, not {value!r}")
        self.limit_s = limit_s
        self.memory_mib = memory_mib
        self.max_failure_rate = max_failure_rate
        # Last in, first out: as long as one worker is enough, the others are not started.
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue(workers)
        for _ in range(workers):
            self._slots.put(None)
        self._lock = threading.Lock()
        self._failed: collections.deque[bool] = collections.deque(maxlen=WINDOW)  # of the last attempts

    def compare(self, gold: str, answer: str) -> str:
        """The outcome, one of `tasks.math.OUTCOMES`.

        Raises:
            InfrastructureError: the answer could not be compared, or too many attempts failed lately.
        """
        failures: list[_WorkerFailure] = []
        while len(failures) < ATTEMPTS:
            try:
                with self._worker() as worker:
                    outcome = _outcome(worker.compare(gold, answer))
            except TimeoutError:
                outcome = "timeout"
            except _WorkerFailure as failure:
                failures.append(failure)
                crashed_twice = len(failures) > 1 and failures[-1].crashed and failures[-2].crashed
                if not crashed_twice:
                    continue
                del failures[-2:]  # the answer's
                outcome = "crash"
            self._count(failures, successes=1)
            return outcome
        self._count(failures, successes=0)
        raise InfrastructureError(f"an answer could not be compared in {ATTEMPTS} attempts: {_reasons(failures)}")

    def close(self) -> None:
        """End the workers, once no thread uses them."""
        taken = [self._slots.get() for _ in range(self._slots.maxsize)]
        for worker in taken:
            if worker is not None:
                worker.close()
            self._slots.put(None)

    @contextlib.contextmanager
    def _worker(self) -> Iterator[_Worker]:
        """A worker of one's own. One that raised is not used again: its reply could come during the next answer."""
        worker = self._slots.get()
        try:
            if worker is None:
                worker = _Worker(self.limit_s, self.memory_mib)
            yield worker
            if worker.used_up:
                worker.close()
                worker = None
        except BaseException:
            if worker is not None:
                worker.close()
                worker = None
            raise
        finally:
            self._slots.put(worker)

    def _count(self, failures: list[_WorkerFailure], successes: int) -> None:
        with self._lock:
            self._failed.extend([True] * len(failures) + [False] * successes)
            if not failures:
                return
            failed, attempts = sum(self._failed), len(self._failed)
        message = "Math reward: %s. %d of the last %d attempts to compare an answer failed"
        logger.warning(message, _reasons(failures), failed, attempts)
        # A handful of attempts is no rate: a single failure would be above any.
        if attempts >= WINDOW / 10 and failed > self.max_failure_rate * attempts:
            raise InfrastructureError(
                f"{failed} of the last {attempts} attempts to compare an answer failed, more than "
                f"max_failure_rate={self.max_failure_rate:g} of them; the latest: {_reasons(failures)}"
            )


def _reasons(failures: list[_WorkerFailure]) -> str:
    return "; ".join(map(str, failures))


def _outcome(verdict: dict[str, Any]) -> str:
    if "raised" in verdict:
        return "crash"
    if verdict["equal"]:
        return "correct"
    if not verdict["gold_parsed"]:
        return "gold_unparsed"
    return "wrong" if verdict["answer_parsed"] else "unparsable"
