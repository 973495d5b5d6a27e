"""How long `vlnorm-verl report` takes for some 60 runs with dumps: the whole command, its CPU seconds and its memory.

    python benchmarks/report.py [--steps 1000] [--problems 64] [--against COMMIT]

The runs are those of tests/synthetic_runs.py. The command runs twice, the second time with nothing changed. With
--against, the same runs are given to the command of another commit, in the same call.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from origin import line
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
MEASURE = """
import resource, sys
from typer.testing import CliRunner
from vlnorm_verl.cli import app
done = CliRunner().invoke(app, sys.argv[1:])
assert done.exit_code == 0, done.output
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def report(tree: Path, runs: Path, out: Path) -> list[str]:
    """CPU seconds, seconds and peak memory in MB of the command, and the page's size in MB."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", MEASURE, "report", str(runs), "--out", str(out)]
    found = subprocess.run(command, cwd=tree, env={"PYTHONPATH": str(tree)}, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = (out / "report.html").stat().st_size / 1e6
    return [
        f"{used:.1f}",
        f"{time.perf_counter() - start:.1f}",
        f"{float(found.stdout.split()[-1]):.0f}",
        f"{size:.1f}",
    ]


def main(
    steps: Annotated[int, typer.Option(min=20, help="Training steps of each run.")] = 1000,
    problems: Annotated[int, typer.Option(min=16, help="Of each of 20 validations, 8 responses each.")] = 64,
    against: Annotated[str, typer.Option(help="Measure the command of this commit, too.", metavar="COMMIT")] = "",
) -> None:
    """Time and memory of a report on 58 runs."""
    title = f"58 runs × {steps} steps, {problems} problems; {line()}"
    table = Table("commit", "", "CPU s", "s", "peak memory, MB", "page, MB", title=title)
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
        for name, tree in trees.items():
            for what in ("first", "nothing changed"):
                table.add_row(name, what, *report(tree, folder / "runs", folder / f"out-{tree.name}"))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
