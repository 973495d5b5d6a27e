"""`vlnorm-verl data`: the prompts, the options, and the folder that is written once and whole.

Covered: both prompts to the character; checksums, idempotence, refusals, the lock, processes killed in the middle; the
files through verl's RLHFDataset. Not covered: where rows come from (test_data_local.py, test_data_network.py,
test_data_generated.py).
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.data_command import (
    COUNTDOWN_PROMPT,
    MATH_FILES,
    MATH_PROMPT,
    SAMPLES,
    SMALL_COUNTDOWN,
    SMALL_MATH,
    data,
    manifest_of,
    must_run,
    rows_of,
    visible,
)
from vlnorm_verl.cli import app
from vlnorm_verl.files import locked
from vlnorm_verl.tasks import base
from vlnorm_verl.tasks import countdown as countdown_task
from vlnorm_verl.tasks import math as math_task
from vlnorm_verl.tasks.countdown import Problem


def test_prompts_are_the_papers_to_the_character() -> None:
    assert countdown_task.prompt(Problem((44, 19, 35), 98)) == COUNTDOWN_PROMPT
    assert math_task.prompt("What is $1+1$?") == MATH_PROMPT


def test_a_question_with_braces_and_blanks_stays_as_it_is() -> None:
    question = " Let $S=\\{1\\}$, {question} and {0}.\n"
    assert math_task.prompt(question).split("tag.\n")[1] == question + "\nAssistant: <think>"


# --- written once, and whole ---------------------------------------------------------------------------------


def test_a_second_call_only_verifies(tmp_path: Path) -> None:
    out = tmp_path / "a"
    assert must_run(*SMALL_COUNTDOWN, "--out", out).endswith("written ")
    before = {name: (out / name).stat().st_mtime_ns for name in visible(out)}
    assert must_run(*SMALL_COUNTDOWN, "--out", out).endswith("up to date ")
    assert {name: (out / name).stat().st_mtime_ns for name in visible(out)} == before
    assert sorted(before) == ["manifest.json", "test.parquet", "train.parquet"]
    manifest = manifest_of(out)
    assert manifest["files"]["train.parquet"]["rows"] == 40
    for name, record in manifest["files"].items():
        content = (out / name).read_bytes()
        assert record["sha256"] == hashlib.sha256(content).hexdigest()
        assert record["bytes"] == len(content)


def test_other_arguments_are_refused_with_what_differs(tmp_path: Path) -> None:
    must_run(*SMALL_COUNTDOWN, "--out", tmp_path)
    before = (tmp_path / "train.parquet").read_bytes()
    code, output = data(*SMALL_COUNTDOWN, "--seed", 1, "--test-rows", 9, "--out", tmp_path)
    assert code == 2
    assert 'source: {"kind": "generated", "seed": 0} there, {"kind": "generated", "seed": 1} asked for' in output
    assert "test_rows: 10 there, 9 asked for" in output
    assert "train_rows" not in output
    assert "--force" in output
    code, output = data(*SMALL_MATH, "--out", tmp_path)
    assert code == 2
    assert 'task: "countdown" there, "math" asked for' in output
    assert (tmp_path / "train.parquet").read_bytes() == before
    must_run(*SMALL_COUNTDOWN, "--seed", 1, "--out", tmp_path, "--force")
    assert (tmp_path / "train.parquet").read_bytes() != before


def test_another_prompt_template_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    must_run(*SMALL_MATH, "--out", tmp_path)
    monkeypatch.setattr(math_task, "TEMPLATE", math_task.TEMPLATE + "\n")
    code, output = data(*SMALL_MATH, "--out", tmp_path)
    assert (code, "prompt_template_sha256" in output) == (2, True)


def test_a_changed_local_file_is_noticed_and_a_moved_one_is_the_same(tmp_path: Path) -> None:
    raw = pq.read_table(SAMPLES / "countdown.parquet").to_pylist()
    first, moved = tmp_path / "first.json", tmp_path / "moved.json"
    sizes = ["--train-rows", 3, "--test-rows", 2, "--out", tmp_path / "o"]
    first.write_text(json.dumps(raw))
    must_run("countdown", "--from", first, *sizes)
    first.rename(moved)
    assert must_run("countdown", "--from", moved, *sizes).endswith("up to date ")
    moved.write_text(json.dumps(raw[::-1]))
    code, output = data("countdown", "--from", moved, *sizes)
    assert (code, "sha256" in output) == (2, True)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("test.parquet", lambda f: f.write_bytes(f.read_bytes()[:-1] + b"x"), "test.parquet has not the checksum"),
        ("test.parquet", Path.unlink, "test.parquet is gone"),
        ("manifest.json", lambda f: f.write_text('{"request": 3}'), "is not a manifest"),
        ("manifest.json", Path.unlink, "has train.parquet, test.parquet but no manifest.json"),
    ],
)
def test_what_was_changed_by_others_is_refused_and_force_repairs(
    tmp_path: Path, name: str, damage: Callable[[Path], Any], message: str
) -> None:
    must_run(*SMALL_COUNTDOWN, "--out", tmp_path)
    good = (tmp_path / "test.parquet").read_bytes()
    damage(tmp_path / name)
    before = (tmp_path / "train.parquet").stat().st_mtime_ns
    code, output = data(*SMALL_COUNTDOWN, "--out", tmp_path)
    assert code == 2
    assert message in output
    assert "--force" in output
    assert (tmp_path / "train.parquet").stat().st_mtime_ns == before
    must_run(*SMALL_COUNTDOWN, "--out", tmp_path, "--force")
    assert (tmp_path / "test.parquet").read_bytes() == good
    assert must_run(*SMALL_COUNTDOWN, "--out", tmp_path).endswith("up to date ")


# Kills the process by SIGKILL while the second file is half written, or after so many renames.
KILLED = """
import os, signal, sys
import pyarrow.parquet as pq
from vlnorm_verl.cli import app
where, sys.argv = sys.argv[1], ["vlnorm-verl", *sys.argv[2:]]
write_table, replace, calls = pq.write_table, os.replace, []
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def half(table, path):
    calls.append(1)
    if len(calls) == 2:
        path.write_bytes(b"PAR1 half a file"); die()
    write_table(table, path)
def one_rename(source, target):
    if str(target).endswith(".parquet") or str(target).endswith(".json"):
        calls.append(1)
        if len(calls) == 2:
            die()
    replace(source, target)
if where == "writing":
    pq.write_table = half
else:
    os.replace = one_rename
app()
"""


def test_a_killed_run_leaves_no_half_file(tmp_path: Path) -> None:
    must_run(*SMALL_COUNTDOWN, "--seed", 5, "--out", tmp_path)
    old = {name: (tmp_path / name).read_bytes() for name in visible(tmp_path)}
    arguments = ["data", *SMALL_COUNTDOWN, "--out", str(tmp_path), "--force"]
    killed = subprocess.run([sys.executable, "-c", KILLED, "writing", *arguments], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    whole = [name for name in visible(tmp_path) if not name.startswith(".")]
    assert {name: (tmp_path / name).read_bytes() for name in whole} == old
    assert len(list(tmp_path.glob(".test.parquet.*.tmp"))) == 1  # it was in the middle
    must_run(*SMALL_COUNTDOWN, "--out", tmp_path, "--force")
    assert visible(tmp_path) == ["manifest.json", "test.parquet", "train.parquet"]


def test_a_run_killed_between_its_renames_is_noticed(tmp_path: Path) -> None:
    must_run(*SMALL_COUNTDOWN, "--seed", 5, "--out", tmp_path)
    arguments = ["data", *SMALL_COUNTDOWN, "--out", str(tmp_path), "--force"]
    killed = subprocess.run([sys.executable, "-c", KILLED, "renaming", *arguments], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len(rows_of(tmp_path / "train.parquet")) == 40  # each file is whole, though of two runs
    assert len(rows_of(tmp_path / "test.parquet")) == 10
    for seed in (0, 5):
        code, output = data(*SMALL_COUNTDOWN, "--seed", seed, "--out", tmp_path)
        assert (code, "no manifest.json" in output) == (2, True)


def test_an_error_or_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):

        def fail(rows: Any, path: Path, error: BaseException = error) -> None:
            path.write_bytes(b"half")
            raise error

        monkeypatch.setattr(base, "write_parquet", fail)
        result = CliRunner().invoke(app, ["data", *SMALL_COUNTDOWN, "--out", str(tmp_path)])
        assert result.exit_code != 0
        assert visible(tmp_path) == []
    assert "cannot write to" in result.output
    assert "No space left on device" in result.output


def test_two_runs_at_once(tmp_path: Path) -> None:
    with locked(tmp_path):
        code, output = data(*SMALL_COUNTDOWN, "--out", tmp_path)
    assert code == 2
    assert "another vlnorm-verl data command is writing" in output
    must_run(*SMALL_COUNTDOWN, "--out", tmp_path)


# --- options, import -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["countdown", "--offline", "--from", "x"], "choose one source"),
        (["countdown", "--offline", "--revision", "x"], "choose one source"),
        (["countdown", "--from", "x", "--repo", "a/b"], "choose one source"),
        (["countdown", "--seed", "1"], "only together with --offline"),
        (["countdown", "--offline", "--train-rows", "0"], "--train-rows"),
        (["math", "--offline", "--file", "amc=x"], "choose one source"),
        (["math", "--offline", "--from", "x"], "choose one source"),
        (["math", "--from", "x", "--repo", "amc=a/b"], "choose one source"),
        (["math", "--train-rows", "5"], "only together with --offline"),
        (["math", "--file", "amc"], "NAME one of train, math500, aime2024, amc, minerva"),
        (["math", "--file", "amd=x"], "NAME one of train, math500, aime2024, amc, minerva"),
        (["math", "--repo", "amc=a/b", "--repo", "amc=c/d"], "at most once"),
        (["math", "--file", "amc=x", "--revision", "amc=y"], "amc is given by --file already"),
        (["math", "--revision", "amc=y"], "give --repo amc=… too: the paper's file has its commit"),
    ],
)
def test_contradictory_options(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, output = data(*arguments, "--out", tmp_path)
    assert code == 2
    assert message in output
    assert visible(tmp_path) == []


def test_the_command_line_imports_nothing_heavy() -> None:
    program = (
        "import sys, vlnorm_verl\nbefore = set(sys.modules)\nimport vlnorm_verl.cli\n"
        "print(*sorted(m for m in set(sys.modules) - before if '.' not in m))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    heavy = {"datasets", "huggingface_hub", "pandas", "pyarrow", "torch", "transformers", "verl"}
    assert not heavy & set(loaded.stdout.split())


# --- read by verl --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["countdown", "math"])
def test_verls_dataset_reads_the_files(tmp_path: Path, task: str) -> None:
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from tests.test_prompts import byte_level_tokenizer

    must_run(*(SMALL_COUNTDOWN if task == "countdown" else SMALL_MATH), "--out", tmp_path / "generated")
    files = {"countdown": ["test.parquet"], "math": MATH_FILES[1:]}[task]
    if task == "countdown":
        origin = ["countdown", "--from", SAMPLES / "countdown.parquet", "--train-rows", 3, "--test-rows", 3]
    else:
        origin = ["math", "--from", SAMPLES, "--allow-any-rows"]
    must_run(*origin, "--out", tmp_path / "file")
    # All test sets together, generated and real: they must have one schema.
    paths = [str(tmp_path / kind / name) for kind in ("generated", "file") for name in files]
    expected = [row for path in paths for row in rows_of(Path(path))]
    tokenizer = byte_level_tokenizer("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    config = {"max_prompt_length": 4096, "filter_overlong_prompts": True, "cache_dir": str(tmp_path / "cache")}
    dataset = RLHFDataset(paths, tokenizer, OmegaConf.create(config | {"filter_overlong_prompts_workers": 1}))
    assert len(dataset) == len(expected) >= 12
    for i in (0, len(expected) - 1):
        item = dataset[i]
        assert item["data_source"] == expected[i]["data_source"]
        assert item["reward_model"] == expected[i]["reward_model"]
        assert item["index"] == expected[i]["extra_info"]["index"]
        tokens = tokenizer.apply_chat_template(item["raw_prompt"], add_generation_prompt=True, return_dict=False)
        assert tokenizer.decode(tokens) == expected[i]["prompt"][0]["content"]
