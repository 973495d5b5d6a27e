"""Policy losses and features of verl on its real FSDP2 engine; tests/engine/features.py says what runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import warm

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
Rows = list[dict[str, Any]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, "float64"), marks=pytest.mark.slow),
        (2, "float64"),
        (4, "float64"),
        pytest.param((2, "float32"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Rows]:
    ranks, dtype = request.param
    out: Path = tmp_path_factory.mktemp("features") / "results.json"
    options = ("--ranks", str(ranks), "--dtype", dtype, "--out", str(out))
    done = warm.python("-m", "tests.engine.features", *options, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return ranks, dtype, json.loads(out.read_text())


def of_kind(rows: Rows, kind: str) -> Rows:
    return [row for row in rows if row["kind"] == kind]


def test_every_row_is_trained_or_refused_as_expected(run: tuple[int, str, Rows]) -> None:
    ranks, _, rows = run
    assert [row for row in rows if row["kind"] != row["expected"]] == []
    # 4 ranks are for Ulysses only, which one rank cannot have.
    expected = {1: (32, 5), 2: (35, 5), 4: (3, 0)}[ranks]
    assert (len(of_kind(rows, "exact")), len(of_kind(rows, "refused"))) == expected


def test_every_gradient_is_the_weighted_sum(run: tuple[int, str, Rows]) -> None:
    _, dtype, rows = run
    exact = of_kind(rows, "exact")
    assert [(row["row"], row["error"]) for row in exact if not row["error"] <= TOLERANCE[dtype]] == []
    # Errors are relative: to something, and small against what a mistake would make of the row.
    assert all(row["norm"] > 1e-3 for row in exact)
    assert [(row["row"], row["wrong"]) for row in exact if not row["wrong"] > 0.1] == []


def test_ulysses_ranks_are_not_data_parallel_ranks(run: tuple[int, str, Rows]) -> None:
    ranks, _, rows = run
    for row in of_kind(rows, "exact"):
        shared = row["row"].startswith("Ulysses")
        assert row["data_parallel"] == (ranks // 2 if shared else ranks), row["row"]
        assert (row["all_to_alls"] > 0) == shared, row["row"]  # sequences were really cut


def test_what_cannot_be_exact_is_refused(run: tuple[int, str, Rows]) -> None:
    """By the driver, and in the micro-batch should a config get there that was never checked."""
    for row in of_kind(run[2], "refused"):
        assert row["refusal"] in row["at_config"], row
        assert "Accepted:" in row["at_config"], row
        rejected = row["row"] == "bypass_mode with rollout_rs"
        assert ("another mask than response_mask" if rejected else row["refusal"]) in row["at_run"], row
