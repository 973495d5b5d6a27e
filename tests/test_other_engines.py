"""verl's engines other than FSDP2 (tests/engine/other_engines.py says what runs, docs/engines.md what follows)."""

import functools
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests import warm
from tests.engine.reference import LENGTHS, PROMPT, ROWS

RELEASE = Version(metadata.version("verl"))
TOLERANCE = 1e-12
# These releases gather the outputs of context-parallel ranks in float32.
CONTEXT_TOLERANCE = 1e-6 if Version("0.9.1") > RELEASE else TOLERANCE
Rows = list[dict[str, Any]]
Of = Callable[[str, str], Rows]


def since(release: str, why: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(Version(release) > RELEASE, reason=f"verl {RELEASE}: {why}")


SLOW = pytest.mark.slow
VEOMNI = since("0.9.0", "veomni cannot be imported beside its transformers")
AUTOMODEL = since("0.8.0", "it has no such engine")
TORCHTITAN = since("0.9.1", "it asks for a mesh that torchtitan 0.3.0 no longer has")
MEGATRON = since("0.8.0", "other_engines.py does not get through with its engine")
REFUSED_BEFORE = since("0.9.0", "the layout is refused")


@functools.cache
def results_of(engine: str, packages: Path) -> Rows:
    return warm.results("other_engines", "--engine", engine, "--packages", str(packages))


@pytest.fixture
def of(request: pytest.FixtureRequest) -> Of:
    """The rows of an engine and a layout. The engines' packages stay in pytest's cache."""
    packages = request.config.cache.mkdir("engines")

    def rows_of(engine: str, case: str) -> Rows:
        results = results_of(engine, packages)
        failed = [row["failed"] for row in results if row["case"] in ("", case) and "failed" in row]
        assert not failed, failed[0][-4000:]
        rows = [row for row in results if row["case"] == case]
        assert len([row for row in rows if not row["scenario"].startswith("sabotage")]) == 5
        assert all(row["norm"] > 1e-3 for row in rows)  # an error relative to nothing would be no error
        return rows

    return rows_of


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


# The first pipeline stage never calls the loss; with context parallelism every rank does, on whole responses.
@pytest.mark.parametrize(
    ("engine", "case", "logging_ranks"),
    [
        ("fsdp", "fsdp1", [0, 1]),
        pytest.param("veomni", "veomni", [0, 1], marks=[SLOW, VEOMNI]),
        pytest.param("automodel", "fsdp2", [0, 1], marks=[SLOW, AUTOMODEL]),
        pytest.param("torchtitan", "sharded", [0, 1], marks=[SLOW, TORCHTITAN]),
        pytest.param("megatron", "data parallel", [0, 1], marks=[SLOW, MEGATRON]),
        pytest.param("megatron", "data parallel, distributed optimizer", [0, 1], marks=[SLOW, MEGATRON]),
        pytest.param("megatron", "pipeline", [1], marks=[SLOW, MEGATRON]),
        pytest.param("megatron", "virtual pipeline", [1], marks=[SLOW, MEGATRON]),
        pytest.param("megatron", "context parallel", [0], marks=[SLOW, MEGATRON]),
    ],
    ids=str,
)
def test_every_gradient_is_the_closed_form(of: Of, engine: str, case: str, logging_ranks: list[int]) -> None:
    rows = of(engine, case)
    for row in honest(rows):
        assert row["error"] <= (CONTEXT_TOLERANCE if case == "context parallel" else TOLERANCE), row
    check_metrics(rows, logging_ranks)


@SLOW
@TORCHTITAN
def test_torchtitan_with_replicas_only_is_refused_for_a_reason(of: Of) -> None:
    """torchtitan sums gradients, verl makes a mean of them for shards only: twice the gradient, in stock modes too."""
    for row in honest(of("torchtitan", "replicated")):
        assert row["scale"] == pytest.approx(2.0, rel=1e-12), row
        assert row["direction_error"] <= TOLERANCE, row


@SLOW
@REFUSED_BEFORE
def test_megatron_dynamic_context_parallel(of: Of) -> None:
    """Every rank holds the mini-batch, a group of one rank sums it, the ranks share the work unevenly."""
    rows = of("megatron", "dynamic context parallel")
    check_metrics(rows, [0])
    for row in honest(rows):
        assert row["direction_error"] <= CONTEXT_TOLERANCE, row
        # Megatron divides by the number of tokens, as 1/n in float32 (finalize_model_grads.py).
        assert row["scale"] == pytest.approx(1.0, abs=1e-7), row


@SLOW
@REFUSED_BEFORE
def test_megatron_context_parallel_with_per_token_loss_is_off_by_a_known_factor(of: Of) -> None:
    """verl reports ⌊n/cp⌋ tokens a micro-batch (megatron/transformer_impl.py:1489); the sum of these divides."""
    rows = of("megatron", "context parallel, per-token loss")
    check_metrics(rows, [0])
    tokens = sorted(PROMPT + n for n in LENGTHS)
    lost = sum((a + b) % 2 for a, b in zip(tokens[::2], tokens[1::2], strict=True))
    assert lost > 0
    for row in honest(rows):
        assert row["direction_error"] <= CONTEXT_TOLERANCE, row
        assert 1 - 1e-7 < row["scale"] <= sum(tokens) / (sum(tokens) - ROWS // 2) + 1e-7, row
        if row["scenario"] in ("micro-batches of 2", "stock Dr. GRPO"):
            assert row["scale"] == pytest.approx(sum(tokens) / (sum(tokens) - lost), rel=1e-7), row
