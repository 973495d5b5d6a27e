"""The worker process of `latex.pool`: compares one answer after the other.

Started as a file: ``-m`` would import from whatever folder the run is in. One JSON object a line each way:
``{"gold", "answer"}`` in, the verdict out. What bounds it: an address-space limit, a timer of the kernel, and the end
of its input, which is how it learns that its parent has died.
"""

import sys
from pathlib import Path

# Python puts this file's folder first, where our math.py would stand before the standard library's.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[3])

import functools
import json
import os
import resource
import signal
import warnings
from collections.abc import Callable
from typing import Any


def load() -> Callable[[str, str], dict[str, Any]]:
    """The comparison, tried once: whatever is broken in the installation fails here and not on an answer."""
    from vlnorm_verl.tasks.latex.equality import equal
    from vlnorm_verl.tasks.latex.reading import read
    from vlnorm_verl.tasks.latex.tokens import canonical

    read_gold = functools.lru_cache(maxsize=1000)(read)  # the responses of a group have one

    def compare(gold: str, answer: str) -> dict[str, Any]:
        if canonical(gold) == canonical(answer):
            return {"equal": True}  # without reading them, which evaluates: 9^{9^9} takes for ever
        read_answer = read(answer)
        return {
            "equal": equal(read_gold(gold), read_answer),
            "gold_parsed": read_gold(gold).readable,
            "answer_parsed": read_answer.readable,
        }

    compare(r"\frac{1}{2}", "0.5")
    return compare


def peak_kib() -> int:
    """The largest address space so far, which is what the limit is on. getrusage's peak is that of the parent."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmPeak:"))


def main(memory_bytes: int, limit_s: float) -> None:
    # Whatever a library prints must not get between the replies.
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        compare = load()
    except Exception as error:
        reply({"broken": f"{type(error).__name__}: {error}"})
        return
    reply({"ready": True})
    os.dup2(nowhere, 2)  # only now: an interpreter that does not get here has its reason in the log

    for line in sys.stdin.buffer:
        request = json.loads(line)
        # The parent kills at the limit. This ends an orphan, whatever C code it is in: without a handler of Python's.
        signal.setitimer(signal.ITIMER_REAL, limit_s + 1)
        try:
            verdict = compare(request["gold"], request["answer"])
        except Exception as error:
            verdict = {"raised": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply({**verdict, "peak_kib": peak_kib()})


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
