"""Every benchmark at its smallest size, and the example of a user's own run: that they run, not what they measure.

Those in folders of benchmarks/ have tests of their own (test_gpu_check.py for gpu/).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report_runs import table_of
from tests.warm import REPOSITORY
from vlnorm_verl.cpu import cpu_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# "{out}" is a folder of the test's.
SMALLEST = {
    "coverage.py": "--draws 10 --only monotonicity",
    "cpu_stack.py": "--steps 3 --out {out}/new",
    "math_rules.py": "tests/data_samples/math500.json",
    "quickstart_seeds.py": "--seeds 2 --steps 1 --out {out}",
    "report.py": "--steps 20 --problems 16",
    "rewards.py": "--answers 4 --rounds 1 --hostile 4",
    "rollout_agreement.py": "--prompts 2",
    "update_cost.py": "--rounds 2 --responses 8 --micro 8 --length 32 --matrix 8 64 --out {out}/cost.json",
}
PARTS_OF_OTHERS = {"actor.py", "origin.py"}


def run(command: list[str], **variables: str) -> str:
    environment = os.environ | {"COLUMNS": "200"} | variables
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", sorted({path.name for path in REPOSITORY.glob("benchmarks/*.py")} - PARTS_OF_OTHERS))
def test_every_benchmark_runs(name: str, tmp_path: Path) -> None:
    assert run([sys.executable, f"benchmarks/{name}", *SMALLEST[name].format(out=tmp_path).split()])


@pytest.mark.parametrize("how", ["script", "yaml"])
def test_the_example_trains(how: str, tmp_path: Path) -> None:
    """As docs/your-own-run.md has it; the file takes the data that the script makes, in either order of the tests."""
    script = ["bash", "recipes/examples/own_run.sh"]
    variables = {"PYTHON": sys.executable}
    if how == "yaml":
        run([*script, "--cfg", "job"], **variables)
        script = [sys.executable, "-m", "verl.trainer.main_ppo"]
        script += ["--config-path", f"{REPOSITORY}/recipes/examples", "--config-name", "own_run"]
        variables |= cpu_environment()
    # As docs/report.md has it.
    folder = tmp_path / "vl_norm_s0"
    variables["VERL_FILE_LOGGER_PATH"] = str(folder / "metrics-000.jsonl")
    logged = [
        "trainer.logger=[console,file]",
        f"hydra.run.dir={folder}",
        f"trainer.validation_data_dir={folder}/validation",
        "trainer.test_freq=2",
    ]
    said = run([*script, *logged], **variables)
    assert re.findall(r"step:(\d+) .*actor/vl_norm/variance_ratio:[12]\.", said)[-1] == "2"
    said = run([sys.executable, "-m", "vlnorm_verl", "report", str(folder), "--out", str(tmp_path / "report")])
    assert "VL Norm" in said
    (row,) = table_of(tmp_path / "report", "inputs")
    assert (row["method"], row["seed"]) == ("vl_norm:1", "0")


def test_the_variables_of_the_cpu_stack_reach_a_shell() -> None:
    said = run(["bash", "-c", f'export CUDA_VISIBLE_DEVICES=; eval "$({sys.executable} -m vlnorm_verl.cpu)" && env'])
    assert "CUDA_VISIBLE_DEVICES" not in said
    assert {f"{name}={value}" for name, value in cpu_environment().items()} <= set(said.splitlines())
