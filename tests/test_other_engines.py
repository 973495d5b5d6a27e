"""verl's engines other than FSDP2 (tests/engine/stand_ins.py says what runs, docs/engines.md what follows from it)."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.engine.batch import LENGTHS, PROMPT, ROWS

REPOSITORY = Path(__file__).parent.parent
TOLERANCE = 1e-12
# These releases gather the outputs of context-parallel ranks in float32.
CONTEXT_TOLERANCE = 1e-6 if metadata.version("verl") in ("0.7.1", "0.8.0", "0.9.0") else TOLERANCE
ENGINES = ("fsdp", "megatron", "veomni", "torchtitan", "automodel")
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The engines of the selected tests in one call, so that verl is imported once. Packages stay in pytest's cache."""
    packages = request.config.cache.mkdir("engines")
    out = tmp_path_factory.mktemp("engines") / "results.json"
    selected = {item.name for item in request.session.items if item.path == request.path}
    engines = [engine for engine in ENGINES if any(name.startswith(f"test_{engine}") for name in selected)]
    command = [sys.executable, "-m", "tests.engine.stand_ins", "--packages", str(packages), "--out", str(out)]
    command += ["--engine", *engines]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


def of(results: Rows, engine: str, case: str) -> Rows:
    failed = [
        row["failed"] for row in results if row["engine"] == engine and row["case"] in ("", case) and "failed" in row
    ]
    assert not failed, failed[0][-4000:]
    rows = [row for row in results if row["engine"] == engine and row["case"] == case]
    assert len([row for row in rows if not row["scenario"].startswith("sabotage")]) == 5
    assert all(row["norm"] > 1e-3 for row in rows)  # an error relative to nothing would be no error
    return rows


def check_exact(rows: Rows, tolerance: float = TOLERANCE) -> None:
    for row in honest(rows):
        assert row["error"] <= tolerance, row


def honest(rows: Rows) -> Rows:
    """Without the local sums, which have to be seen."""
    sabotaged = [row for row in rows if row["scenario"].startswith("sabotage")]
    assert sabotaged
    for row in sabotaged:
        assert row["error"] > 0.1, row
    return [row for row in rows if row not in sabotaged]


def check_metrics(rows: Rows, logging_ranks: list[int]) -> None:
    """The plugin's eight metrics are there, on the ranks that log and on no other."""
    for row in rows:
        if row["mode"].startswith("vl_norm"):
            assert [rank for rank, metrics in enumerate(row["metrics"]) if metrics] == logging_ranks, row
            assert all(len(row["metrics"][rank]) == 8 for rank in logging_ranks), row


def test_fsdp1(results: Rows) -> None:
    rows = of(results, "fsdp", "fsdp1")
    check_exact(rows)
    check_metrics(rows, [0, 1])


def test_veomni(results: Rows) -> None:
    rows = of(results, "veomni", "veomni")
    check_exact(rows)
    check_metrics(rows, [0, 1])


def test_automodel(results: Rows) -> None:
    rows = of(results, "automodel", "fsdp2")
    check_exact(rows)
    check_metrics(rows, [0, 1])


def test_torchtitan(results: Rows) -> None:
    rows = of(results, "torchtitan", "sharded")
    check_exact(rows)
    check_metrics(rows, [0, 1])


def test_torchtitan_with_replicas_only_is_refused_for_a_reason(results: Rows) -> None:
    """torchtitan sums gradients, verl makes a mean of them for shards only: twice the gradient, in stock modes too."""
    for row in honest(of(results, "torchtitan", "replicated")):
        assert row["scale"] == pytest.approx(2.0, rel=1e-12), row
        assert row["direction_error"] <= TOLERANCE, row


@pytest.mark.parametrize("case", ["data parallel", "data parallel, distributed optimizer"])
def test_megatron(results: Rows, case: str) -> None:
    rows = of(results, "megatron", case)
    check_exact(rows)
    check_metrics(rows, [0, 1])


@pytest.mark.parametrize(("case", "logging_rank"), [("pipeline", 1), ("virtual pipeline", 1), ("context parallel", 0)])
def test_megatron_model_parallel(results: Rows, case: str, logging_rank: int) -> None:
    """The first pipeline stage never calls the loss; with context parallelism every rank does, on whole responses."""
    rows = of(results, "megatron", case)
    check_exact(rows, CONTEXT_TOLERANCE if case == "context parallel" else TOLERANCE)
    check_metrics(rows, [logging_rank])


def test_megatron_dynamic_context_parallel(results: Rows) -> None:
    """Every rank holds the mini-batch, a group of one rank sums it, the ranks share the work unevenly."""
    rows = of(results, "megatron", "dynamic context parallel")
    check_metrics(rows, [0])
    for row in honest(rows):
        assert row["direction_error"] <= CONTEXT_TOLERANCE, row
        # Megatron divides by the number of tokens, as 1/n in float32 (finalize_model_grads.py).
        assert row["scale"] == pytest.approx(1.0, abs=1e-7), row


def test_megatron_context_parallel_with_per_token_loss_is_off_by_a_known_factor(results: Rows) -> None:
    """verl reports ⌊n/cp⌋ tokens a micro-batch (megatron/transformer_impl.py:1489); the sum of these divides."""
    rows = of(results, "megatron", "context parallel, per-token loss")
    check_metrics(rows, [0])
    tokens = sorted(PROMPT + n for n in LENGTHS)
    lost = sum((a + b) % 2 for a, b in zip(tokens[::2], tokens[1::2], strict=True))
    assert lost > 0
    for row in honest(rows):
        assert row["direction_error"] <= CONTEXT_TOLERANCE, row
        assert 1 - 1e-7 < row["scale"] <= sum(tokens) / (sum(tokens) - ROWS // 2) + 1e-7, row
        if row["scenario"] in ("micro-batches of 2", "stock Dr. GRPO"):
            assert row["scale"] == pytest.approx(sum(tokens) / (sum(tokens) - lost), rel=1e-7), row
