"""verl's real FSDP2 engine with the plugin: every gradient is Σ x_i g_i (tests/engine/scenarios.py says what runs)."""

import math
from typing import Any

import numpy as np
import pytest

from tests import warm
from tests.releases import TOLERANCE, judge_exactness

EVERY_COMMIT = [(2, "float64", ()), (4, "float64", ("vl_norm", "seq-mean-token-sum-norm"))]  # more ranks: one α
SLOW = [(1, "float64", ()), (4, "float64", ()), (1, "float32", ()), (2, "float32", ()), (4, "float32", ())]
Rows = list[dict[str, Any]]
Run = tuple[str, Rows]  # number type, what scenarios.py writes


@pytest.fixture(
    scope="module", params=[*EVERY_COMMIT, *(pytest.param(run, marks=pytest.mark.slow) for run in SLOW)], ids=str
)
def run(request: pytest.FixtureRequest) -> Run:
    ranks, dtype, modes = request.param
    options = ("--ranks", str(ranks), "--dtype", dtype, *(("--mode", *modes) if modes else ()))
    return dtype, warm.results("scenarios", *options)


def rows(results: Rows, name: str) -> Rows:
    named = [row for row in results if row["scenario"].startswith(name)]
    assert named, name
    return named


def test_every_gradient_is_the_closed_form_and_local_sums_would_be_seen(run: Run) -> None:
    dtype, results = run
    judged = judge_exactness(results, TOLERANCE[dtype])
    assert judged.bad == []
    assert judged.gradients >= 18
    assert judged.least_wrong > 0.1


def test_an_empty_mini_batch_has_loss_0_and_no_metrics(run: Run) -> None:
    """And gradient 0, which is judged above."""
    for row in rows(run[1], "no valid token"):
        assert row["metrics"]["loss"] == 0.0
        assert not any(name.startswith("vl_norm/") for name in row["metrics"])


def test_shuffled_epochs_see_every_response_once_an_epoch(run: Run) -> None:
    shuffled = rows(run[1], "shuffled")
    for mode in {row["mode"] for row in shuffled}:
        steps = [row for row in shuffled if row["mode"] == mode]
        assert [row["step"] for row in steps] == [0, 1, 2, 3]
        assert sorted(steps[0]["lengths"] + steps[1]["lengths"]) == sorted(steps[2]["lengths"] + steps[3]["lengths"])
        assert steps[0]["lengths"] != steps[2]["lengths"]


def test_one_all_reduce_a_mini_batch_and_none_a_micro_batch(run: Run) -> None:
    """Counted up to the end of the optimizer step, against verl's own mode on the same mini-batch."""
    (stock,) = rows(run[1], "stock Dr. GRPO")
    ours = [row for row in rows(run[1], "micro-batches of") if row["mode"] == "vl_norm"]
    assert len(ours) == 4
    assert {row["all_reduces"] for row in ours} == {stock["all_reduces"] + 1}


def test_a_loss_without_gradient_is_of_the_whole_mini_batch_too(run: Run) -> None:
    """verl's infer_batch with compute_loss, one response a micro-batch."""
    for row in rows(run[1], "micro-batches of 1"):
        assert row["metrics"]["loss_without_gradient"] == pytest.approx(row["metrics"]["loss"], rel=1e-5)
        assert row["metrics"]["loss"]


def test_metrics_describe_the_whole_mini_batch(run: Run) -> None:
    """And have no part of one that is padding alone: verl logs their mean over the mini-batches of a step."""
    first, last = rows(run[1], "last mini-batch empty")
    assert not any(last["lengths"])
    for row in [*rows(run[1], "3 rows masked"), first]:
        lengths = np.array([n for n in row["lengths"] if n], dtype=float)
        alpha = float(row["mode"].partition(":")[2] or 1)
        relative = lengths**-alpha / (lengths**-alpha).mean()
        expected = {
            "length_mean": lengths.mean(),
            "length_harmonic_mean": 1 / (1 / lengths).mean(),
            "variance_ratio": math.sqrt(lengths.mean() * (1 / lengths).mean()),
            "effective_responses": len(lengths) ** 2 / (relative**2).sum(),
            "divisor": row["scale"] * (lengths**-alpha).sum(),
            "weighted_tokens": (lengths ** (1 - alpha)).sum(),
            "weight_min": relative.min(),
            "weight_max": relative.max(),
        }
        for name, value in expected.items():
            assert row["metrics"][f"vl_norm/{name}"] == pytest.approx(value, rel=1e-6), name
