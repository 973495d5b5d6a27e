"""Policy losses and features of verl on its real FSDP2 engine; tests/engine/features.py says what runs."""

from typing import Any

import pytest

from tests import warm
from tests.releases import TOLERANCE, feature_is_good

# One of each way through the engine; the other policy losses differ in what they hand to agg_loss.
EVERY_COMMIT = (
    *("vanilla", "gspo", "sapo", "geo_mean", "clip_cov", "bypass_mode, rejected tokens", "bypass_mode with rollout_rs"),
    *("registered by a user", "KL loss", "multi-turn tool masks, dynamic", "rollout_rs without", "upsampled padding"),
    *("critic, dynamic", "LoRA, dynamic", "use_remove_padding", "distillation, k3", "Ulysses, dynamic"),
)
Rows = list[dict[str, Any]]
Run = tuple[int, str, Rows]  # ranks, number type, what features.py writes


@pytest.fixture(
    scope="module",
    params=[
        (2, "float64", EVERY_COMMIT, (19, 5)),
        (4, "float64", (), (3, 0)),  # Ulysses only
        pytest.param((1, "float64", (), (38, 5)), marks=pytest.mark.slow),  # without Ulysses
        pytest.param((2, "float64", (), (40, 5)), marks=pytest.mark.slow),
        pytest.param((2, "float32", (), (40, 5)), marks=pytest.mark.slow),
    ],
    ids=lambda run: f"{run[0]} ranks, {run[1]}, {'some' if run[2] else 'all'} rows",
)
def run(request: pytest.FixtureRequest) -> Run:
    """The rows; as many are exact, and as many refused, as the last numbers of the parameters say."""
    ranks, dtype, only, counts = request.param
    rows = warm.results("features", "--ranks", str(ranks), "--dtype", dtype, *(("--only", *only) if only else ()))
    assert (len(of_kind(rows, "exact")), len(of_kind(rows, "refused"))) == counts
    return ranks, dtype, rows


def of_kind(rows: Rows, kind: str) -> Rows:
    return [row for row in rows if row["kind"] == kind]


def test_every_gradient_is_the_weighted_sum_or_the_row_is_refused_as_expected(run: Run) -> None:
    _, dtype, rows = run
    assert [row for row in rows if not feature_is_good(row, TOLERANCE[dtype])] == []


def test_ulysses_ranks_are_not_data_parallel_ranks(run: Run) -> None:
    ranks, _, rows = run
    for row in of_kind(rows, "exact"):
        shared = row["row"].startswith("Ulysses")
        assert row["data_parallel"] == (ranks // 2 if shared else ranks), row["row"]
        assert (row["all_to_alls"] > 0) == shared, row["row"]  # sequences were really cut


def test_what_cannot_be_exact_is_refused(run: Run) -> None:
    """By the driver, and in the micro-batch should a config get there that was never checked."""
    for row in of_kind(run[2], "refused"):
        assert row["refusal"] in row["at_config"], row
        assert "Accepted:" in row["at_config"], row
        rejected = row["row"] == "bypass_mode with rollout_rs"
        assert ("another mask than response_mask" if rejected else row["refusal"]) in row["at_run"], row
