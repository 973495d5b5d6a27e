"""`vlnorm-verl data` from Hugging Face and GitHub.

Covered: real `datasets` and `huggingface_hub` against a hub on this machine, GitHub's files from a server here, and
both without a network. Not covered: huggingface.co and GitHub themselves, which the tests never reach.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_command import (
    MATH_FILES,
    MATH_PROMPT,
    data,
    manifest_of,
    must_run,
    rows_of,
    visible,
)
from vlnorm_verl.tasks import generate, sources

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "76543210fedcba9876543210fedcba9876543210"
HUB_MATH = [part for name, source in sources.MATH.items() for part in ("--repo", f"{name}={source.repo}")]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as `datasets` and `huggingface_hub` use, over a folder of repositories.

    The branch `main` and the tag `v1` stand for its one commit; nothing else is a revision.
    """

    protocol_version = "HTTP/1.1"
    root: Path
    requests: list[str]
    commit = COMMIT
    forbidden = False  # whether files are

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
            if revision not in ("main", "v1", self.commit):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if kind == "revision":
                names = [p.relative_to(repo).as_posix() for p in repo.rglob("*") if p.is_file()]
                return self.json(
                    {"id": "/".join(parts[2:4]), "sha": self.commit, "siblings": [{"rfilename": n} for n in names]}
                )
            folder = repo.joinpath(*inside)
            if kind == "tree" and folder.is_dir():
                paths = folder.rglob("*") if "recursive=true" in url.query else folder.iterdir()
                return self.json([self.entry(path, repo) for path in paths])
            if kind == "paths-info":
                asked = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
                return self.json([self.entry(repo / name, repo) for name in asked if (repo / name).is_file()])
        if parts[0] == "datasets" and parts[3] == "resolve":
            if self.forbidden:
                return self.answer(403)
            path = self.root.joinpath(*parts[1:3], *parts[5:])
            if path.is_file() and parts[4] == self.commit:
                content, commit = path.read_bytes(), self.commit
                return self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)

    do_HEAD = do_POST = do_GET


def put(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))


@contextlib.contextmanager
def served(handler: Any) -> Iterator[str]:
    """The address of a server with this handler."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


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
    with served(handler) as url:
        yield clean_environment(tmp_path, HF_ENDPOINT=url), handler, root


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


def test_rows_of_another_commit_are_not_taken_where_the_hub_fails(
    hub: tuple[dict[str, str], type[Hub], Path], tmp_path: Path
) -> None:
    environment, handler, _ = hub
    arguments = ["countdown", "--train-rows", 50, "--test-rows", 10, "--out"]
    ((code, _, errors),) = data_process(environment, [*arguments, tmp_path / "o"])
    assert code == 0, errors
    handler.commit, handler.forbidden = LATER, True
    ((code, _, errors),) = data_process(environment, [*arguments, tmp_path / "later"])
    assert code == 2, "published the rows of the first commit"
    assert "cannot read Jiayi-Pan/Countdown-Tasks-3to4 at revision main" in errors
    assert f"commit {LATER} cannot be downloaded, and {COMMIT} is the one cached" in errors
    assert visible(tmp_path / "later") == []


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
        message = next(line for line in errors.splitlines() if line.startswith("cannot read "))
        assert f"Without a network: vlnorm-verl data {task} --offline (generated problems), or --from" in message
    assert visible(tmp_path / "o") == []


# --- the files that the paper's code reads -------------------------------------------------------------------


@pytest.fixture
def github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server of the folder it returns, with files of the paper's names, formats and row counts (of training: 57).

    Their content is made up, so their object ids are those that git gives these here.
    """
    monkeypatch.setitem(sources.MATH, "train", dataclasses.replace(sources.MATH["train"], rows=(57, 57)))
    root = tmp_path / "github"
    made = {
        "train": [[{"value": f"Q{i}"}, {"ground_truth": {"value": str(i)}}] for i in range(57)],
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
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # which goes before NO_PROXY
    with served(handler) as url:
        monkeypatch.setattr(sources, "GITHUB", url)
        yield root


def test_math_is_the_papers_own_files(github: Path, tmp_path: Path) -> None:
    output = must_run("math", "--out", tmp_path / "o")
    assert f"amc: sail-sg/understand-r1-zero at commit {sources.PAPER['amc'].commit}" in output
    manifest = manifest_of(tmp_path / "o")
    assert [record["rows"] for record in manifest["files"].values()] == [57, 500, 30, 83, 272]
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
