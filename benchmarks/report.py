"""How long `vlnorm-verl report` takes for some 60 runs with dumps: the whole command, its CPU seconds and its memory.

    python benchmarks/report.py [--steps 1000] [--problems 64] [--against COMMIT]

The runs are those of tests/synthetic_runs.py. The command runs twice, the second time with nothing changed. With
--against, the same runs are given to the command of another commit, in the same call.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from origin import ROOT, line
from rich.console import Console
from rich.table import Table


def report(tree: Path, runs: Path, out: Path) -> list[str]:
    """CPU seconds, seconds and peak memory in MB of the command, and the page's size in MB."""
    command = [sys.executable, "-m", "vlnorm_verl", "report", str(runs), "--out", str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=tree, env={"PYTHONPATH": str(tree)}, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    seconds, size = time.perf_counter() - start, (out / "report.html").stat().st_size / 1e6
    peak = used.ru_maxrss * 1024 / 1e6
    return [f"{used.ru_utime + used.ru_stime:.1f}", f"{seconds:.1f}", f"{peak:.0f}", f"{size:.1f}"]


def main(
    steps: Annotated[int, typer.Option(min=20, help="Training steps of each run.")] = 1000,
    problems: Annotated[int, typer.Option(min=16, help="Of each of 20 validations, 8 responses each.")] = 64,
    against: Annotated[str, typer.Option(help="Measure the command of this commit, too.", metavar="COMMIT")] = "",
) -> None:
    """Time and memory of a report on runs of known truth."""
    table = Table("commit", "", "CPU s", "s", "peak memory, MB", "page, MB")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sizes = ["--steps", str(steps), "--problems", str(problems)]
        subprocess.run(
            [sys.executable, "-m", "tests.synthetic_runs", str(folder / "runs"), *sizes], cwd=ROOT, check=True
        )
        trees = {"this one": ROOT}
        if against:
            trees = {against: folder / "tree", **trees}
            (folder / "tree").mkdir()
            archive = subprocess.run(["git", "archive", against], cwd=ROOT, capture_output=True, check=True).stdout
            subprocess.run(["tar", "-x", "-C", str(folder / "tree")], input=archive, check=True)
        count = len(list((folder / "runs").iterdir()))
        table.title = f"{count} runs × {steps} steps, {problems} problems; {line()}"
        for name, tree in trees.items():
            # A checkout that was imported before has its bytecode; one that was just unpacked would pay for it.
            subprocess.run([sys.executable, "-m", "compileall", "-q", "vlnorm_verl"], cwd=tree, check=True)
            for what in ("first", "nothing changed"):
                table.add_row(name, what, *report(tree, folder / "runs", folder / f"out-{tree.name}"))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
