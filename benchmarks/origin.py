"""Where a number comes from: what stands beside every one that is published. Standard library only."""

import datetime
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def commit() -> str:
    """This checkout's short commit, and whether there are changes that it does not have, results apart.

    A copy without its history says COMMIT, an environment variable, or "unknown".
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    if given := os.environ.get("COMMIT"):
        return given
    if not shutil.which("git") or not (head := git("rev-parse", "--short", "HEAD")):
        return "unknown"
    return head + (" with changes" if git("status", "--porcelain", ".", ":!*results/*") else "")


def machine(accelerator: str = "CPU only") -> str:
    """Kind and name of the processor, number of cores, memory, accelerator."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = names[0].partition(": ")[2] if names else platform.processor()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{platform.machine()}, {processor}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, {accelerator}"


def origin(accelerator: str = "CPU only") -> dict[str, str]:
    """Command, date, commit and machine of the running benchmark."""
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return {
        "command": " ".join(["python", str(script), *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(accelerator),
    }


def line() -> str:
    """The same in one line, without the command."""
    return ", ".join(value for name, value in origin().items() if name != "command")
