"""What a command says where the modules of its extra are not installed."""

import subprocess
import sys

import pytest

HIDE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))  # None: cannot be imported
from vlnorm_verl.cli import app
app(prog_name="vlnorm-verl")
"""


def run(hidden: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDE, hidden, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)


@pytest.mark.parametrize(
    ("hidden", "arguments", "extra"),
    [
        ("msgspec,psutil", ["launch", "--dry-run"], "recipes"),
        ("msgspec", ["report", "."], "report"),
        ("scipy", ["report", "."], "report"),
    ],
)
def test_a_command_names_the_extra_that_it_lacks(hidden: str, arguments: list[str], extra: str) -> None:
    done = run(hidden, *arguments)
    assert done.returncode == 2
    assert f"pip install '.[{extra}]'" in done.stdout
    assert hidden.split(",")[0] in done.stdout
    assert "Traceback" not in done.stdout


def test_help_and_other_missing_modules_are_left_alone() -> None:
    assert run("msgspec", "report", "--help").returncode == 0
    done = run("vlnorm_verl.runs.launch", "launch", "--dry-run")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stdout
