"""The GPU check (benchmarks/gpu) where there is no GPU: how parts end, what is written, and all of it at tiny sizes."""

import importlib
import importlib.metadata
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu import check, metadata, strip_gpu_code
from tests import processes

ROOT = Path(__file__).parent.parent
# A program of a part, which gets --out FILE.
WRITES = "import sys; open(sys.argv[-1], 'w').write('{}')"
FAILS = "raise SystemExit('out of memory')"
SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def run(
    folder: Path,
    *codes: str,
    seconds: float = 60,
    judge: Callable[[Any], tuple[bool | None, str]] = lambda raw: (True, "all well"),
    needs: str = "verl",
) -> dict[str, Any]:
    """What becomes of a part that can be run in these ways."""
    runner = check.Check("engine", "cuda", "no card", seconds, folder)
    runner.run(check.Part("a part", 50, [["-c", code] for code in codes], judge, needs))
    (written,) = json.loads((folder / "engine.json").read_text())["parts"]
    return written


def test_a_way_that_fails_gives_way_to_the_next(tmp_path: Path) -> None:
    row = run(tmp_path, FAILS, WRITES)
    assert row["status"] == "met"
    assert row["words"] == f"-c {WRITES}: all well; -c {FAILS}: exit code 1: out of memory"
    assert "$ python -c 'raise" in (tmp_path / "engine.log").read_text()


@pytest.mark.parametrize(("good", "status"), [(True, "failed"), (None, "failed"), (False, "missed")])
def test_a_result_of_a_program_that_failed_is_not_met(tmp_path: Path, good: bool | None, status: str) -> None:
    row = run(tmp_path, f"{WRITES}; {FAILS}", judge=lambda raw: (good, "3 of 8 steps"))
    assert (row["status"], row["words"]) == (status, "3 of 8 steps; exit code 1: out of memory")


def test_an_open_result_is_neither_met_nor_missed(tmp_path: Path) -> None:
    assert run(tmp_path, WRITES, judge=lambda raw: (None, "in between"))["status"] == "open"


@pytest.mark.parametrize(
    ("codes", "settings", "status", "words"),
    [
        ([FAILS], {}, "failed", "exit code 1: out of memory"),
        (["0"], {}, "failed", "it wrote no result"),
        ([WRITES], {"judge": lambda raw: raw["steps"]}, "failed", "a result that is not understood: KeyError('steps')"),
        ([WRITES], {"seconds": 10}, "skipped", "10 s of --seconds 10 were left"),
        ([WRITES], {"needs": "no_such_package"}, "skipped", "no_such_package is not installed"),
    ],
)
def test_says_why_there_is_no_result(
    tmp_path: Path, codes: list[str], settings: dict[str, Any], status: str, words: str
) -> None:
    row = run(tmp_path, *codes, **settings)
    assert (row["status"], row["words"]) == (status, words)


def test_the_limit_ends_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LEAST", 0)
    begin = time.monotonic()
    row = run(tmp_path, SLEEPS, seconds=3)
    assert time.monotonic() - begin < 30
    assert row["status"] == "failed"
    assert row["words"].startswith("reached its time limit: ")
    assert not psutil.pid_exists(int(row["words"].rpartition(" ")[2]))


@pytest.mark.parametrize(("ours", "good"), [(0.019, True), (0.021, False), (float("nan"), False)])
def test_bfloat16_may_round_as_token_mean_does(ours: float, good: bool) -> None:
    def row(scenario: str, error: float) -> dict[str, Any]:
        errors = {"error": error, "error_of_sum": error}
        return {"scenario": scenario, "mode": "vl_norm", "lengths": [2], "norm": 1.0, **errors}

    rows = [row("padded", ours), row("stock padded", 0.01), row("sabotage: micro-batch-local sum", 0.9)]
    assert check.rounded(rows)[0] == good


@pytest.mark.parametrize(("apart", "good"), [(0.01, True), (0.3, False), (None, False)])
def test_rollout_and_actor_must_agree(apart: float | None, good: bool) -> None:
    """A sync that loses the weights trains all the same."""
    names = ("actor/grad_norm", "critic/score/mean", "timing_s/step", "timing_s/gen", "timing_s/update_actor")
    step = dict.fromkeys((*names, "actor/vl_norm/variance_ratio"), 1.0)
    step |= {} if apart is None else {"training/rollout_probs_diff_mean": apart}
    assert check.stack({"steps": 1, "records": [{"data": step, "after": 90.0}]})[0] == good


@pytest.mark.parametrize(("rounds", "met", "good"), [(1, True, None), (5, True, True), (5, None, None)])
def test_one_round_does_not_judge_an_update(rounds: int, met: bool | None, good: bool | None) -> None:
    """On the first GPU token-mean again took 0.88 of token-mean's time in the one round that there was time for."""
    mode = {"wall_ratio": {"median": 1.0, "low": 0.9, "high": 1.1}, "wall_s": 1.0, "tokens_per_s": 1.0}
    result = {"model_parameters": 1, "responses": 1, "response_tokens": {"max": 1}, "rounds": [{}] * rounds}
    result["modes"] = dict.fromkeys(("vl_norm", "token-mean again"), mode)
    assert check.update({"update": result, "targets": {"update": met}}, tiny=False)[0] is good


@pytest.mark.parametrize(
    ("median", "low", "high", "met"),
    [(1.0, 0.98, 1.01, True), (1.0, 0.95, 1.03, None), (1.02, 0.95, 1.03, None), (1.02, 1.0101, 1.03, False)],
)
def test_an_update_meets_its_bound_by_its_whole_interval(
    median: float, low: float, high: float, met: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second GPU run had 1.020 [0.949, 1.026], which says neither."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    ratio = {"median": median, "low": low, "high": high}
    found = importlib.import_module("update_cost").verdicts({"update": {"modes": {"vl_norm": {"wall_ratio": ratio}}}})
    assert [*found.values()] == [met]


# ------------------------------------------------------------------------------------------------------ without network


def test_a_checkout_on_the_path_has_its_entry_points(tmp_path: Path) -> None:
    metadata.main(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert found.metadata["Name"] == "vlnorm-verl"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entries: dict[str, dict[str, str]] = {}
    for entry in found.entry_points:
        entries.setdefault(entry.group, {})[entry.name] = entry.value
    assert entries == project["entry-points"]


def fat_binary(*contents: tuple[int, int]) -> bytes:
    """A container of 16 bytes of code for each (kind, architecture)."""
    entries = [struct.pack("<HHIQ12xI", kind, 0, 32, 16, sm) + b"x" * 16 for kind, sm in contents]
    return struct.pack("<IHHQ", strip_gpu_code.MAGIC, 1, 16, len(b"".join(entries))) + b"".join(entries)


def library(section: bytes) -> bytes:
    """A 64-bit ELF file with this section .nv_fatbin."""
    names = b"\0.nv_fatbin\0.shstrtab\0"
    at = 64 + len(section) + len(names)
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 0x28, at)
    struct.pack_into("<HHH", header, 0x3A, 64, 2, 1)
    rows = [(1, 64, len(section)), (12, 64 + len(section), len(names))]
    table = [struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0) for name, offset, size in rows]
    return bytes(header) + section + names + b"".join(table)


@pytest.mark.parametrize(
    ("contents", "kept"),
    [
        ([(2, 80), (2, 90), (1, 90)], [False, True, False]),
        ([(2, 80), (1, 80), (1, 100)], [False, True, False]),  # no machine code of its own: PTX is compiled there
    ],
)
def test_only_other_architectures_are_zeroed(contents: list[tuple[int, int]], kept: list[bool]) -> None:
    # Some padding, and a second container that is kept whole.
    whole = library(fat_binary(*contents) + bytes(8) + fat_binary((2, 90)))
    out = strip_gpu_code.strip(whole)
    assert len(out) == len(whole)
    bodies = [64 + 16 + 48 * i + 32 for i in range(len(contents))]
    assert [out[at : at + 16] == b"x" * 16 for at in bodies] == kept
    zeroed = {at + i for at, keep in zip(bodies, kept, strict=True) if not keep for i in range(16)}
    assert all(out[i] == (0 if i in zeroed else byte) for i, byte in enumerate(whole))


# ---------------------------------------------------------------------------------------------------------- the script


def script(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "benchmarks/gpu/check.sh", *arguments]
    environment = os.environ | {"PYTHON": sys.executable, "COLUMNS": "200"} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["engine"], "torch sees no GPU"),
        (["everything"], "'engine', 'stack', 'all'"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = script(*arguments, "--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert says in " ".join(done.stderr.replace("│", " ").split())


def test_a_check_of_which_nothing_ran_fails(tmp_path: Path) -> None:
    (tmp_path / "engine.md").write_text("of an earlier check")
    done = script("--device", "cpu", "--only", "nothing", "--out", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize(
    ("bare", "archive", "says"),
    [(False, True, "ran\n"), (True, True, ".gpu/engine.tar.xz"), (True, False, "see docs/gpu.md\n")],
)
def test_archives_are_for_a_python_without_verl(tmp_path: Path, bare: bool, archive: bool, says: str) -> None:
    python = processes.script(tmp_path / "python", f'exec {sys.executable} {"-S" if bare else ""} "$@"')
    folder = tmp_path / "benchmarks/gpu"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/gpu/check.sh", folder)
    (folder / "check.py").write_text("print('ran')\n")
    (tmp_path / ".gpu").mkdir()
    if archive:
        (tmp_path / ".gpu/engine.tar.xz").write_bytes(b"of another Python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHON": str(python)}
    command = ["bash", str(folder / "check.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert says in done.stdout + done.stderr
    assert (done.returncode == 0) == (not bare)


@pytest.mark.slow
def test_one_part_from_the_shell(tmp_path: Path) -> None:
    done = script("engine", "--device", "cpu", "--only", "bfloat16", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (part,) = json.loads((tmp_path / "engine.json").read_text())["parts"]
    assert part["status"] == "met"
    assert {row["scenario"] for row in part["result"]} > {"micro-batches of 2", "stock micro-batches of 2"}
    assert "| gradient, bfloat16 | met |" in (tmp_path / "engine.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_everything_at_tiny_sizes(tmp_path: Path) -> None:
    done = script("all", "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for group in check.GROUPS:
        rows = json.loads((tmp_path / f"{group}.json").read_text())["parts"]
        assert [row["part"] for row in rows] == [part.name for part in check.parts(group, "cuda")]
        assert {row["status"] for row in rows} == {"met"}
