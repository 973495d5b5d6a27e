"""How fast `vlnorm-verl report` reads runs: time and peak memory, for 20 runs of 1,000 steps.

    python benchmarks/report.py [--runs 20] [--steps 1000]

Writes runs whose records are real ones of verl (tests/report_samples) with other step numbers, 100 metrics each and
a validation every 50 steps, without dumps; then reads them in a process of its own. With --problems, each validation
also has a dump of so many problems of 8 responses of 2,000 characters, read once and then once more from the cache.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from origin import line
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "tests" / "report_samples" / "aggregation-countdown-tiny-256-vl_norm-seed0"
EVERY = 50  # steps between validations
READ = """
import resource, sys, time
start = time.perf_counter()
from pathlib import Path
from vlnorm_verl.report.read import read_runs
imported = time.perf_counter()
runs = read_runs([sys.argv[1]], Path(sys.argv[2]))
read = time.perf_counter()
from vlnorm_verl.report.tables import tables
tables(runs)
done = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(len(runs), sum(len(run.steps) for run in runs), imported - start, read - imported, done - read, peak)
"""


def write(folder: Path, runs: int, steps: int, problems: int) -> None:
    trained, validated = [json.loads(line)["data"] for line in (SAMPLE / "metrics-000.jsonl").read_text().splitlines()][
        3:5
    ]
    for number in range(runs):
        method, seed = ("vl_norm", "grpo_norm", "dapo_norm", "dr_grpo")[number % 4], number // 4
        run = folder / f"{method}-seed{seed}"
        run.mkdir()
        config = (SAMPLE / "config.yaml").read_text().replace("vl_norm:1.0", method).replace("vl_norm", method)
        config = config.replace("seed: 0", f"seed: {seed}")
        (run / "config.yaml").write_text(config)
        with open(run / "metrics-000.jsonl", "w") as file:
            for step in range(1, steps + 1):
                record = {"step": step, "data": trained if step % EVERY else validated}
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
        for step in range(EVERY, steps + 1, EVERY) if problems else ():
            (run / "validation").mkdir(exist_ok=True)
            with open(run / "validation" / f"{step}.jsonl", "w") as file:
                for response in range(problems * 8):
                    entry = {"input": f"problem {response // 8}", "output": "word " * 400, "gts": "1", "score": 1.0}
                    file.write(json.dumps(entry | {"acc": float((response + step) % 3 == 0), "step": step}) + "\n")


def main(
    runs: Annotated[int, typer.Option(min=1, help="Runs to write and read.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each.")] = 1000,
    problems: Annotated[int, typer.Option(help="Of each validation's dump; 0 for no dumps.")] = 0,
) -> None:
    """Time and memory of reading runs and making the report's tables."""
    title = f"{runs} runs × {steps} steps, {problems} problems; {line()}"
    table = Table("", "runs", "steps", "import, s", "read, s", "tables, s", "peak memory, MB", title=title)
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "runs").mkdir()
        write(folder / "runs", runs, steps, problems)
        for name in ("first", "again, from the cache") if problems else ("first",):
            command = [sys.executable, "-c", READ, str(folder / "runs"), str(folder / "out")]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            table.add_row(
                name, *found[:2], *(f"{float(number):.2f}" for number in found[2:5]), f"{float(found[5]):.0f}"
            )
    finally:
        shutil.rmtree(folder)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
