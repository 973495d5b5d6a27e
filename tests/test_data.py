"""`vlnorm-verl data`: prompts, sources, the offline sets, and the folder that is written once and whole.

Covered: both prompts to the character; each source's format from small files (tests/data_samples/README.md); row
counts; real `datasets` and `huggingface_hub` against a hub on this machine, and without a network; checksums,
idempotence, refusals, the lock, processes killed in the middle; the generated problems, recomputed another way; the
files through verl's RLHFDataset. Not covered: huggingface.co and GitHub themselves, which the tests never reach.

    pytest tests/test_data.py
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import http.server
import json
import operator
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from vlnorm_verl.cli import app
from vlnorm_verl.files import UserError, locked
from vlnorm_verl.tasks import base, generate, sources
from vlnorm_verl.tasks import countdown as countdown_task
from vlnorm_verl.tasks import math as math_task
from vlnorm_verl.tasks.countdown import Problem

SAMPLES = Path(__file__).parent / "data_samples"
MATH_FILES = ["train.parquet", "math500.parquet", "aime2024.parquet", "amc.parquet", "minerva.parquet"]
SMALL_COUNTDOWN = ["countdown", "--offline", "--train-rows", "40", "--test-rows", "10"]
SMALL_MATH = ["math", "--offline", "--train-rows", "60", "--test-rows", "20"]

COUNTDOWN_PROMPT = """\
A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first \
thinks about the reasoning process in the mind and then provides the user with the answer.
User: Using the numbers [44, 19, 35], create an equation that equals 98. You can use basic arithmetic operations \
(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the final \
answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.
Assistant: Let me solve this step by step.
<think>"""

MATH_PROMPT = (
    """\
A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first \
thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning process and \
answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process \
here </think> <answer> answer here </answer>."""
    + " "  # the authors' template has this blank at the line's end
    + """

User: You must put your answer inside <answer> </answer> tags, i.e.,
<answer> answer here </answer>. And your final answer will be extracted automatically by the \\boxed{} tag.
What is $1+1$?
Assistant: <think>"""
)


def data(*arguments: Any) -> tuple[int, str]:
    """Exit code and all output (lines joined, for the command line wraps its own errors at the terminal's width)."""
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(r"\s*│?\n│?\s*", " ", result.output)


def must_run(*arguments: Any) -> str:
    code, output = data(*arguments)
    assert code == 0, output
    return output


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock") if folder.exists() else []


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


# ---------------------------------------------------------------------------------------------------- prompts


def test_prompts_are_the_papers_to_the_character() -> None:
    assert countdown_task.prompt(Problem((44, 19, 35), 98)) == COUNTDOWN_PROMPT
    assert math_task.prompt("What is $1+1$?") == MATH_PROMPT
    assert MATH_PROMPT.count("</answer>. \n\nUser:") == 1


def test_a_question_with_braces_and_blanks_stays_as_it_is() -> None:
    question = " Let $S=\\{1\\}$, {question} and {0}.\n"
    assert math_task.prompt(question).split("tag.\n")[1] == question + "\nAssistant: <think>"


# -------------------------------------------------------------------------------------- local files, every format


def math_arguments(out: Path) -> list[Any]:
    return ["math", "--from", SAMPLES, "--allow-any-rows", "--out", out]


def test_every_math_source_is_read_in_its_own_format(tmp_path: Path) -> None:
    must_run(*math_arguments(tmp_path))
    assert visible(tmp_path) == sorted([*MATH_FILES, "manifest.json"])
    answers = {name: [row["reward_model"]["ground_truth"] for row in rows_of(tmp_path / name)] for name in MATH_FILES}
    assert answers == {
        "train.parquet": ["1000", "\\frac{3}{4}", "8"],
        "math500.parquet": ["\\left( 3, \\frac{\\pi}{2} \\right)", "p - q", "\\frac{14}{3}", "42"],
        "aime2024.parquet": ["73", "236", "45"],
        "amc.parquet": ["7.0", "142.0"],  # the source's floats, as the authors' str() writes them
        "minerva.parquet": ["620", "0.01", "7 \\times 10^{8}"],  # the first of several, without its line end
    }
    assert rows_of(tmp_path / "train.parquet")[2] == {
        "data_source": "open_reasoner_zero",
        "prompt": [
            {
                "role": "user",
                "content": MATH_PROMPT.replace(
                    "What is $1+1$?", "Let $S=\\{1,2,3\\}$. How many subsets has $S$? {question}"
                ),
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "8"},
        "extra_info": {"split": "train", "index": 2, "origin": "file", "solution": ""},
    }
    for name in MATH_FILES[1:]:
        for index, row in enumerate(rows_of(tmp_path / name)):
            assert row["data_source"] == name.removesuffix(".parquet")
            assert row["extra_info"] == {"split": "test", "index": index, "origin": "file", "solution": ""}
    assert manifest_of(tmp_path)["sources"]["amc"]["path"] == str(SAMPLES / "amc")


@pytest.mark.parametrize(
    ("row", "expected"),
    [  # columns of the Hugging Face sets of the table
        ({"problem": "Q", "solution": "long", "answer": "5", "subject": "A", "level": 2, "unique_id": "u"}, ("Q", "5")),
        ({"id": 60, "problem": "Q", "solution": "long", "answer": "204", "url": "", "year": "2024"}, ("Q", "204")),
        ({"id": 0, "problem": "Q", "answer": 142.0, "url": ""}, ("Q", "142.0")),
        ({"question": "Q", "answer": "9.6\n"}, ("Q", "9.6")),
        ({"question": "Q", "answer": 0}, ("Q", "0")),
    ],
)
def test_hub_columns(row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert math_task.read_row(row) == expected


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"problem": "Q"},
        {"answer": "5"},
        {"problem": "Q", "answer": None},
        {"problem": "Q", "answer": []},
        {"problem": "Q", "answer": " \n"},
        {"problem": "Q", "answer": True},
        {"problem": "Q", "answer": float("nan")},
        {"problem": "Q", "answer": float("-inf")},
        {"problem": "", "answer": "5"},
        {"problem": 3, "answer": "5"},
        {"prompt": [{"value": "a"}, {"value": "b"}], "final_answer": "5"},
        [{"value": "Q"}],
        [{"value": "Q"}, {"ground_truth": "5"}],
        "text",
        None,
    ],
)
def test_a_row_of_no_known_format_is_refused(row: Any) -> None:
    with pytest.raises(ValueError, match=r"question|answer"):
        math_task.read_row(row)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"nums": [1, 2]},
        {"target": 3},
        {"nums": [1, 2.5], "target": 3},
        {"nums": [], "target": 3},
        {"nums": 1, "target": 3},
        {"nums": [1, 2], "target": float("inf")},
        {"nums": [1, float("nan")], "target": 3},
        {"nums": [-1, 2], "target": 1},  # no answer could use -1
        [],
    ],
)
def test_a_countdown_row_of_no_known_format_is_refused(row: Any) -> None:
    with pytest.raises(ValueError, match="nums"):
        countdown_task.read_row(row)


def test_countdown_takes_the_first_rows_to_train_and_the_next_to_test(tmp_path: Path) -> None:
    must_run(
        "countdown", "--from", SAMPLES / "countdown.parquet", "--train-rows", 3, "--test-rows", 2, "--out", tmp_path
    )
    train, test = rows_of(tmp_path / "train.parquet"), rows_of(tmp_path / "test.parquet")
    assert train[0] == {
        "data_source": "countdown",
        "prompt": [{"role": "user", "content": COUNTDOWN_PROMPT}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": '{"numbers": [44, 19, 35], "target": 98}'},
        "extra_info": {"split": "train", "index": 0, "origin": "file", "solution": ""},
    }
    truths = [json.loads(row["reward_model"]["ground_truth"])["target"] for row in train + test]
    assert truths == [98, 64, 28, 48, 15]
    assert [row["extra_info"]["index"] for row in test] == [0, 1]


@pytest.mark.parametrize("ending", [".jsonl", ".json", "folder"])
def test_countdown_from_other_kinds_of_files(tmp_path: Path, ending: str) -> None:
    import datasets

    raw = pq.read_table(SAMPLES / "countdown.parquet").to_pylist()
    path = tmp_path / f"copy{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in raw))
    elif ending == ".json":
        path.write_text(json.dumps(raw))
    else:
        datasets.Dataset.from_list(raw).save_to_disk(str(path))
    sizes = ["--train-rows", 3, "--test-rows", 2]
    must_run("countdown", "--from", path, *sizes, "--out", tmp_path / "a")
    must_run("countdown", "--from", SAMPLES / "countdown.parquet", *sizes, "--out", tmp_path / "b")
    assert rows_of(tmp_path / "a/test.parquet") == rows_of(tmp_path / "b/test.parquet")
    hashes = [manifest_of(tmp_path / f)["files"]["train.parquet"]["content_sha256"] for f in "ab"]
    assert hashes[0] == hashes[1]


def test_too_few_countdown_rows_name_the_options(tmp_path: Path) -> None:
    code, output = data("countdown", "--from", SAMPLES / "countdown.parquet", "--out", tmp_path)
    assert code == 2
    assert "6 rows" in output
    assert "--train-rows 32768" in output
    assert "--test-rows 1024" in output
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "a.json holds a dict, not a list of rows"),
        ("a.json", "[1,", "cannot read"),
        ("a.jsonl", '{"target": 3}\n\n{"target": 3}', "row 0: columns nums"),
        ("a.parquet", "no parquet", "cannot read"),
        ("a.csv", "target,nums", "unknown ending '.csv'; accepted: .json"),
        ("a.json", '[{"nums": [1, 2], "target": 3}, []]', "row 1: columns nums"),
    ],
)
def test_an_unreadable_local_file_is_one_message(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    code, output = data(
        "countdown", "--from", tmp_path / name, "--train-rows", 1, "--test-rows", 1, "--out", tmp_path / "o"
    )
    assert code == 2
    assert output.startswith("Error: ")
    assert message in output
    assert visible(tmp_path / "o") == []


def test_a_missing_local_file_is_one_message(tmp_path: Path) -> None:
    code, output = data("countdown", "--from", tmp_path / "gone.parquet", "--out", tmp_path / "o")
    assert (code, output.startswith("Error: cannot read")) == (2, True)
    (tmp_path / "empty").mkdir()
    code, output = data("math", "--from", tmp_path / "empty", "--out", tmp_path / "o")
    assert code == 2
    assert "looked for train.json, train.jsonl, train.parquet, train, orz_math_57k_collected.json" in output


# ------------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("train", [56_000, 56_878, 58_000], [55_999, 58_001]),
        ("math500", [500], [499, 501]),
        ("aime2024", [30], [29, 31]),
        ("amc", [83], [82, 84]),
        ("minerva", [272], [271, 273]),
    ],
)
def test_row_counts_are_the_papers(name: str, good: list[int], bad: list[int]) -> None:
    for count in good:
        sources.check_count(name, "here", count, "hint")
    for count in bad:
        with pytest.raises(UserError, match=rf"{name} \(here\) has {count} rows"):
            sources.check_count(name, "here", count, "hint")


def test_other_row_counts_need_leave(tmp_path: Path) -> None:
    code, output = data("math", "--from", SAMPLES, "--out", tmp_path)
    assert code == 2
    assert "has 3 rows, the paper's set has 56000 to 58000: --allow-any-rows accepts it" in output
    assert visible(tmp_path) == []
    code, output = data("math", "--allow-any-rows", "--out", tmp_path)
    assert code == 2
    assert "only together with --from or --file" in output


# -------------------------------------------------------------------------------------- written once, and whole


def test_a_second_call_only_verifies(tmp_path: Path) -> None:
    out = tmp_path / "a"
    assert must_run(*SMALL_COUNTDOWN, "--out", out).endswith("written ")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    assert must_run(*SMALL_COUNTDOWN, "--out", out).endswith("up to date ")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"} == before
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


@pytest.mark.parametrize("damage", ["changed", "gone", "manifest", "alien"])
def test_what_was_changed_by_others_is_refused_and_force_repairs(tmp_path: Path, damage: str) -> None:
    must_run(*SMALL_COUNTDOWN, "--out", tmp_path)
    good = (tmp_path / "test.parquet").read_bytes()
    message = {
        "changed": "test.parquet has not the checksum",
        "gone": "test.parquet is gone",
        "manifest": "is not a manifest",
        "alien": "has train.parquet, test.parquet but no manifest.json",
    }[damage]
    if damage == "changed":
        (tmp_path / "test.parquet").write_bytes(good[:-1] + b"x")
    elif damage == "gone":
        (tmp_path / "test.parquet").unlink()
    elif damage == "manifest":
        (tmp_path / "manifest.json").write_text('{"request": 3}')
    else:
        (tmp_path / "manifest.json").unlink()
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
    assert "Error: cannot write to" in result.output
    assert "No space left on device" in result.output


def test_two_runs_at_once(tmp_path: Path) -> None:
    with locked(tmp_path):
        code, output = data(*SMALL_COUNTDOWN, "--out", tmp_path)
    assert code == 2
    assert "another vlnorm-verl data command is writing" in output
    must_run(*SMALL_COUNTDOWN, "--out", tmp_path)


# --------------------------------------------------------------------------------------------- options, import


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


# ------------------------------------------------------------------------------------------ a hub, and no hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_MATH = [part for name, source in sources.MATH.items() for part in ("--repo", f"{name}={source.repo}")]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as `datasets` and `huggingface_hub` use, over a folder of repositories.

    The branch `main` and the tag `v1` stand for COMMIT; nothing else is a revision.
    """

    protocol_version = "HTTP/1.1"
    root: Path
    requests: list[str]

    def log_message(self, *_: Any) -> None: ...

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def entry(self, path: Path, repo: Path) -> dict[str, Any]:
        kind = {"type": "file", "size": path.stat().st_size} if path.is_file() else {"type": "directory", "size": 0}
        return kind | {"path": path.relative_to(repo).as_posix(), "oid": "0" * 40}

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        self.requests.append(f"{self.command} {url.path}")
        parts = urllib.parse.unquote(url.path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) >= 6:
            repo, (kind, revision, *inside) = self.root.joinpath(*parts[2:4]), parts[4:]
            if not repo.is_dir():
                return self.answer(404, X_Error_Code="RepoNotFound")
            if revision not in ("main", "v1", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if kind == "revision":
                names = [p.relative_to(repo).as_posix() for p in repo.rglob("*") if p.is_file()]
                return self.json(
                    {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
                )
            folder = repo.joinpath(*inside)
            if kind == "tree" and folder.is_dir():
                paths = folder.rglob("*") if "recursive=true" in url.query else folder.iterdir()
                return self.json([self.entry(path, repo) for path in paths])
            if kind == "paths-info":
                asked = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
                return self.json([self.entry(repo / name, repo) for name in asked if (repo / name).is_file()])
        if parts[0] == "datasets" and parts[3] == "resolve":
            path = self.root.joinpath(*parts[1:3], *parts[5:])
            if path.is_file() and parts[4] == COMMIT:
                content = path.read_bytes()
                return self.answer(200, content, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    do_HEAD = do_POST = do_GET


def put(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[dict[str, str], type[Hub], Path]]:
    """A hub with the six repositories of the table, in their layouts and with the paper's row counts.

    Gives the environment that leads to it, its handler and its folder.
    """
    root = tmp_path / "hub"
    problems = list(generate.countdown("train", 60, 0))
    put(
        root / "Jiayi-Pan/Countdown-Tasks-3to4/data/train-00000-of-00001.parquet",
        [{"target": p.target, "nums": p.numbers} for p, _ in problems],
    )
    pairs = [[{"from": "human", "value": f"Q{i}"}, {"ground_truth": {"value": str(i)}}] for i in range(56_878)]
    put(root / "Open-Reasoner-Zero/orz_math_57k_collection/orz_math_57k_collection.json", pairs)
    put(
        root / "HuggingFaceH4/MATH-500/test.jsonl",
        [{"problem": f"Q{i}", "solution": "long", "answer": str(i), "unique_id": f"u{i}"} for i in range(500)],
    )
    put(
        root / "HuggingFaceH4/aime_2024/data/train-00000-of-00001.parquet",
        [{"id": i, "problem": f"Q{i}", "solution": "long", "answer": str(i), "year": "2024"} for i in range(30)],
    )
    put(
        root / "AI-MO/aimo-validation-amc/data/train-00000-of-00001.parquet",
        [{"id": i, "problem": f"Q{i}", "answer": float(i), "url": ""} for i in range(83)],
    )
    put(root / "math-ai/minervamath/test.jsonl", [{"question": f"Q{i}", "answer": f"{i}\n"} for i in range(272)])
    handler = type("OneHub", (Hub,), {"root": root, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield clean_environment(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}"), handler, root
    server.shutdown()
    server.server_close()


def clean_environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """Without this machine's cache, token or offline switch: they are read when the libraries are imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return kept | {"HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | more


COMMANDS = """
import json, sys
from typer.testing import CliRunner
from vlnorm_verl.cli import app
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, ["data", *arguments])
    print(json.dumps([result.exit_code, result.stdout, result.stderr]))
"""


def data_process(environment: dict[str, str], *commands: list[Any]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each command, in a process whose libraries read this environment."""
    arguments = json.dumps([[str(argument) for argument in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]


def test_countdown_from_a_hub(hub: tuple[dict[str, str], type[Hub], Path], tmp_path: Path) -> None:
    environment, handler, _ = hub
    arguments = ["countdown", "--train-rows", 50, "--test-rows", 10, "--revision", "v1", "--out", tmp_path / "o"]
    ((code, output, errors),) = data_process(environment, arguments)
    assert code == 0, errors
    assert f"Jiayi-Pan/Countdown-Tasks-3to4 at commit {COMMIT}" in output
    assert manifest_of(tmp_path / "o")["sources"]["countdown"] == {
        "kind": "hub",
        "repo": "Jiayi-Pan/Countdown-Tasks-3to4",
        "revision": "v1",
        "commit": COMMIT,
    }
    expected = [{"numbers": list(p.numbers), "target": p.target} for p, _ in generate.countdown("train", 60, 0)]
    for name, part in {"train": expected[:50], "test": expected[50:]}.items():
        rows = rows_of(tmp_path / f"o/{name}.parquet")
        assert [json.loads(row["reward_model"]["ground_truth"]) for row in rows] == part
        assert {row["extra_info"]["origin"] for row in rows} == {"hub"}
    # Files are read at the commit, never at the name, which can move in between.
    assert [r for r in handler.requests if "/v1" in r] == [
        "GET /api/datasets/Jiayi-Pan/Countdown-Tasks-3to4/revision/v1"
    ]

    handler.requests.clear()
    ((code, output, _),) = data_process(environment | {"HF_HUB_OFFLINE": "1"}, arguments)
    assert (code, output.splitlines()[-1], handler.requests) == (0, "up to date", [])


def test_math_from_a_hub(hub: tuple[dict[str, str], type[Hub], Path], tmp_path: Path) -> None:
    ((code, _, errors),) = data_process(hub[0], ["math", *HUB_MATH, "--out", tmp_path / "o"])
    assert code == 0, errors
    manifest = manifest_of(tmp_path / "o")
    assert {name: record["rows"] for name, record in manifest["files"].items()} == {
        "train.parquet": 56_878,
        "math500.parquet": 500,
        "aime2024.parquet": 30,
        "amc.parquet": 83,
        "minerva.parquet": 272,
    }
    assert {source["commit"] for source in manifest["sources"].values()} == {COMMIT}
    assert rows_of(tmp_path / "o/amc.parquet")[82]["reward_model"]["ground_truth"] == "82.0"
    assert rows_of(tmp_path / "o/minerva.parquet")[5]["reward_model"]["ground_truth"] == "5"
    assert rows_of(tmp_path / "o/train.parquet")[7]["prompt"][0]["content"] == MATH_PROMPT.replace(
        "What is $1+1$?", "Q7"
    )


def test_wrong_names_on_a_hub(hub: tuple[dict[str, str], type[Hub], Path], tmp_path: Path) -> None:
    environment, _, root = hub
    (root / "empty/repo").mkdir(parents=True)
    put(root / "short/train/orz_math_57k_collection.json", [[{"value": "Q"}, {"ground_truth": {"value": "1"}}]])
    short = ["train=short/train" if part.startswith("train=") else part for part in HUB_MATH]
    wrong = {
        "cannot read Jiayi-Pan/Countdown-Tasks-3to4 at revision nope": ["countdown", "--revision", "nope"],
        "cannot read no/pe at revision main": ["countdown", "--repo", "no/pe"],
        "cannot read empty/repo": ["countdown", "--repo", "empty/repo"],
        "train (short/train) has 1 rows, the paper's set has 56000 to 58000: check --repo": ["math", *short],
    }
    results = data_process(environment, *([*arguments, "--out", tmp_path / "o"] for arguments in wrong.values()))
    for message, (code, _, errors) in zip(wrong, results, strict=True):
        assert code == 2
        assert message in errors
        assert "--repo and --revision" in errors
    assert visible(tmp_path / "o") == []


def test_a_folder_here_is_not_taken_for_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / sources.COUNTDOWN.repo).mkdir(parents=True)
    code, output = data("countdown", "--out", "o")
    assert code == 2
    assert "is also a folder here" in output


@pytest.mark.parametrize("how", ["refused", "switched off"])
def test_without_a_network_one_message_names_the_offline_way(tmp_path: Path, how: str) -> None:
    with socket.socket() as closed:  # bound, never listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        more = {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}"}
        if how == "switched off":
            more = {"HF_HUB_OFFLINE": "1"}
        commands = [[*task, "--out", tmp_path / "o"] for task in (["countdown"], ["math", *HUB_MATH])]
        results = data_process(clean_environment(tmp_path, **more), *commands)
    for task, (code, output, errors) in zip(("countdown", "math"), results, strict=True):
        assert (code, output) == (2, "")
        message = next(line for line in errors.splitlines() if line.startswith("Error: "))
        assert message.startswith("Error: cannot read ")
        assert f"Without a network: vlnorm-verl data {task} --offline (generated problems), or --from" in message
    assert visible(tmp_path / "o") == []


# ------------------------------------------------------------------------------ the files that the paper's code reads


@pytest.fixture
def github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server of the folder it returns, with files of the paper's names, formats and row counts.

    Their content is made up, so their object ids are those that git gives these here.
    """
    root = tmp_path / "github"
    made = {
        "train": [[{"value": f"Q{i}"}, {"ground_truth": {"value": str(i)}}] for i in range(56_878)],
        "math500": [{"prompt": [{"value": f"Q{i}"}], "final_answer": str(i)} for i in range(500)],
        "aime2024": [{"prompt": [{"value": f"Q{i}"}], "final_answer": str(i)} for i in range(30)],
        "amc": [{"problem": f"Q{i}", "answer": float(i)} for i in range(83)],
        "minerva": [{"problem": f"Q{i}", "answer": [f"{i}\n", "other"]} for i in range(272)],
    }
    for name, file in sources.PAPER.items():
        path = root / file.repo / file.commit / file.path
        if path.suffix == ".arrow":
            datasets.Dataset.from_list(made[name]).save_to_disk(str(path.parent))
        else:
            put(path, made[name])
        blob = subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True).stdout.strip()
        monkeypatch.setitem(sources.PAPER, name, dataclasses.replace(file, blob=blob))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(sources, "GITHUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield root
    server.shutdown()
    server.server_close()


def test_math_is_the_papers_own_files(github: Path, tmp_path: Path) -> None:
    output = must_run("math", "--out", tmp_path / "o")
    assert f"amc: sail-sg/understand-r1-zero at commit {sources.PAPER['amc'].commit}" in output
    manifest = manifest_of(tmp_path / "o")
    assert [record["rows"] for record in manifest["files"].values()] == [56_878, 500, 30, 83, 272]
    assert manifest["sources"]["math500"] == sources.PAPER["math500"].request()
    answers = [rows_of(tmp_path / f"o/{name}")[7]["reward_model"]["ground_truth"] for name in MATH_FILES]
    assert answers == ["7", "7", "7", "7.0", "7"]
    assert must_run("math", "--out", tmp_path / "o").rstrip().endswith("up to date")


def test_another_content_is_refused_and_other_ways_are_named(github: Path, tmp_path: Path) -> None:
    amc = sources.PAPER["amc"]
    (github / amc.repo / amc.commit / amc.path).write_bytes(b"a captive portal's page")
    code, output = data("math", "--out", tmp_path / "o")
    assert code == 2
    assert "gave other content" in output
    shutil.rmtree(github / amc.repo)
    code, output = data("math", "--out", tmp_path / "o")
    assert code == 2
    assert "HTTP Error 404" in output
    assert "Without GitHub: --repo amc=AI-MO/aimo-validation-amc" in output
    assert "Without a network: vlnorm-verl data math --offline" in output
    assert visible(tmp_path / "o") == []


# --------------------------------------------------------------------------------------------- the offline sets

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """Value and numbers of an expression, by Python's own grammar and exact fractions."""
    used: list[int] = []

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        assert isinstance(node, ast.Constant)
        assert type(node.value) is int
        used.append(node.value)
        return Fraction(node.value)

    return walk(ast.parse(text, mode="eval").body), used


def test_every_generated_countdown_is_solved_by_its_solution(tmp_path: Path) -> None:
    must_run("countdown", "--offline", "--train-rows", 1500, "--test-rows", 300, "--out", tmp_path)
    keys: dict[str, set[Any]] = {}
    for split, count in (("train", 1500), ("test", 300)):
        rows = rows_of(tmp_path / f"{split}.parquet")
        keys[split] = set()
        for row in rows:
            truth = json.loads(row["reward_model"]["ground_truth"])
            value, used = evaluate(row["extra_info"]["solution"])
            assert value == truth["target"]
            assert sorted(used) == sorted(truth["numbers"])
            assert len(used) in (3, 4)
            assert set(used) <= set(range(1, 100))
            assert 10 <= truth["target"] <= 100
            assert row["prompt"][0]["content"] == countdown_task.prompt(
                Problem(tuple(truth["numbers"]), truth["target"])
            )
            assert row["extra_info"]["origin"] == "generated"
            keys[split].add((tuple(sorted(used)), truth["target"]))
        assert len(keys[split]) == len(rows) == count
    assert not keys["train"] & keys["test"]
    solutions = "".join(row["extra_info"]["solution"] for row in rows)
    assert all(op in solutions for op in "+-*/(")


def test_no_seed_or_size_trains_on_a_held_out_problem() -> None:
    def keys(split: str, seed: int) -> set[Any]:
        return {(tuple(sorted(p.numbers)), p.target) for p, _ in generate.countdown(split, 250, seed)}

    trained = keys("train", 0) | keys("train", 1)
    assert not trained & (keys("test", 0) | keys("test", 7))


def test_generated_sets_are_the_same_everywhere(tmp_path: Path) -> None:
    must_run(*SMALL_COUNTDOWN, "--out", tmp_path / "a")
    must_run(*SMALL_COUNTDOWN, "--seed", 0, "--out", tmp_path / "b")
    must_run(*SMALL_COUNTDOWN, "--seed", 1, "--out", tmp_path / "c")
    a, b, c = (manifest_of(tmp_path / name)["files"]["train.parquet"] for name in "abc")
    assert a == b
    assert a["content_sha256"] != c["content_sha256"]
    # Recorded once: another value means that users' data would change under the same command.
    assert a["content_sha256"] == "3ad051ad7037c49f82756e17ea37a007f5cb5fcdb5c5811dea3fc13851f49146"
    must_run(*SMALL_MATH, "--out", tmp_path / "m")
    assert (
        manifest_of(tmp_path / "m")["files"]["train.parquet"]["content_sha256"]
        == "27a5969f4e89fdf435ad4fce4111813ba011a859ebd207679d01659280a6624f"
    )


def test_more_problems_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "MAX_NUMBER", 3)
    code, output = data(*SMALL_COUNTDOWN, "--train-rows", 5000, "--out", tmp_path)
    assert code == 2
    assert "there are fewer than 5000 different problems" in output
    assert "lower --train-rows" in output
    assert visible(tmp_path) == []


def solve(question: str) -> Fraction:
    """The answer of a generated Math question, worked out another way than the generator does."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if m := re.fullmatch(r"Compute \$(.*)\$\.", question):
        return evaluate(m[1].replace("\\cdot", "*"))[0]
    if m := re.fullmatch(r"Solve \$(\d+)x ([+-] \d+) = (-?\d+)\$ for \$x\$\.", question):
        x = Fraction(int(m[3]) - int(m[2].replace(" ", "")), int(m[1]))
        assert int(m[1]) * x + int(m[2].replace(" ", "")) == int(m[3])
        return x
    if question.startswith("Write"):
        a, b, c, d = numbers
        return Fraction(a * d + c * b, b * d)
    if question.startswith("Find the remainder"):
        base, exponent, modulus = numbers
        return Fraction(base**exponent % modulus)
    if question.startswith("An arithmetic sequence"):
        first, step, terms = numbers
        return Fraction(sum(first + step * i for i in range(terms)))
    m = re.search(r"x\^2 - (\d+)x ([+-] \d+) = 0", question)
    assert m
    p, q = int(m[1]), int(m[2].replace(" ", ""))
    root = complex(p * p - 4 * q) ** 0.5
    squares = ((p + root) / 2) ** 2 + ((p - root) / 2) ** 2
    assert abs(squares - round(squares.real)) < 1e-6
    return Fraction(round(squares.real))


def test_every_generated_math_answer_is_right(tmp_path: Path) -> None:
    must_run("math", "--offline", "--train-rows", 400, "--test-rows", 60, "--out", tmp_path)
    questions: list[str] = []
    kinds: set[str] = set()
    for name in MATH_FILES:
        rows = rows_of(tmp_path / name)
        assert len(rows) == (400 if name == "train.parquet" else 60)
        for row in rows:
            question = row["prompt"][0]["content"].split("tag.\n")[1].removesuffix("\nAssistant: <think>")
            answer = row["reward_model"]["ground_truth"]
            fraction = re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", answer)
            value = Fraction(int(fraction[1] + fraction[2]), int(fraction[3])) if fraction else Fraction(answer)
            assert value == solve(question), question
            assert fraction is None or (value.numerator, value.denominator) == (
                int(fraction[1] + fraction[2]),
                int(fraction[3]),
            )
            if name == "aime2024.parquet":
                assert re.fullmatch(r"\d{1,3}", answer)
            if name == "amc.parquet":
                assert answer.endswith(".0")
            questions.append(question)
            kinds.add(question.split()[0])
            assert row["extra_info"]["origin"] == "generated"
            assert row["data_source"] == sources.data_source(name.removesuffix(".parquet"))
    assert kinds == {"Compute", "Solve", "Write", "Find", "An", "Let"}
    assert len(set(questions)) == len(questions)


# ----------------------------------------------------------------------------------------------- read by verl


def byte_level_tokenizer() -> Any:
    """One token a byte: encodes any text. The chat template passes the prompt through, as the base models need it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "<end>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("task", ["countdown", "math"])
def test_verls_dataset_reads_the_files(tmp_path: Path, task: str) -> None:
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset

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
    tokenizer = byte_level_tokenizer()
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
