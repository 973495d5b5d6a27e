"""Policy losses and features of verl with the plugin on its real FSDP2 engine; what runs is in tests.engine.reach."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.releases import matrix_row, reach_row_is_good
from vlnorm_verl import support

REPOSITORY = Path(__file__).parent.parent
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
# What reach.py must refuse with verl 0.9.1, and what the refusal says. The first is seen in the config only.
REFUSED = {
    "bypass_mode with rollout_rs": "inside each micro-batch",
    "sapo": "whatever",
    "geo_mean": "never call",
    "registered by a user that ignores the mode, averages by itself": "never call",
    "registered by a user that ignores the mode, calls agg_loss with another": "whatever",
}
ULYSSES = {"Ulysses", "Ulysses, dynamic, entropy, KL", "Ulysses, tool masks"}
TRAINED = {
    *("vanilla", "gspo", "gpg", "clip_cov", "kl_cov", "cispo", "dppo_tv", "dppo_kl", "dro"),
    *("bypass_mode, ppo_clip", "bypass_mode, ppo_clip, IS weights", "bypass_mode, reinforce"),
    *("bypass_mode, reinforce, IS weights", "bypass_mode, reinforce, IS weights of sequences"),
    *("bypass_mode, rejected tokens", "dynamic batch", "KL loss", "entropy bonus"),
    *("vanilla, rollout IS weights in the data", "gspo, rollout IS weights in the data"),
    *("registered by a user, passes the batch's sizes on", "registered by a user, passes nothing on"),
    *("multi-turn tool masks", "multi-turn tool masks, dynamic, entropy, KL", "rollout_rs without bypass_mode"),
    *("upsampled padding rows", "upsampled padding rows, dynamic", "critic", "critic, dynamic, tool masks"),
    *("LoRA", "LoRA, dynamic, entropy, KL", "use_remove_padding"),
}


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
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, list[dict]]:
    ranks, dtype = request.param
    out = tmp_path_factory.mktemp("reach") / "results.json"
    command = [sys.executable, "-m", "tests.engine.reach", "--ranks", str(ranks), "--dtype", dtype, "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return ranks, dtype, json.loads(out.read_text())


def of_kind(results: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [entry for entry in results if entry["kind"] == kind]


def test_every_row_is_trained_or_refused(run: tuple[int, str, list[dict]]) -> None:
    ranks, _, results = run
    assert of_kind(results, "failed") == []
    assert of_kind(results, "absent") == []
    trained = {1: TRAINED, 2: TRAINED | ULYSSES, 4: ULYSSES}[ranks]
    assert {(e["row"], e["mode"]) for e in of_kind(results, "exact")} == {
        (row, mode) for row in trained for mode in (["vl_norm"] if ranks > 1 else []) + ["vl_norm:0.75"]
    }
    assert {e["row"] for e in of_kind(results, "refused")} == (set(REFUSED) if ranks < 4 else set())


def test_every_row_ends_as_the_matrix_says(run: tuple[int, str, list[dict]]) -> None:
    ranks, _, results = run
    said = support.matrix().by_name(metadata.version("verl"))
    assert {entry["row"]: entry["kind"] for entry in results} == {
        entry["row"]: said[matrix_row(entry)].status for entry in results
    }
    if ranks == 2:  # all rows are run
        ours = {name for name, cell in said.items() if cell.by == "tests/test_reach.py"}
        assert ours == {matrix_row(entry) for entry in results}


def test_the_script_over_releases_judges_rows_alike(run: tuple[int, str, list[dict]]) -> None:
    _, dtype, results = run
    said = {name: cell.status for name, cell in support.matrix().by_name(metadata.version("verl")).items()}
    for entry in results if dtype == "float64" else []:
        name = matrix_row(entry)
        assert reach_row_is_good(entry, said), entry
        assert reach_row_is_good(entry, {}), entry  # of a release that is not in the matrix
        assert not reach_row_is_good(entry, said | {name: "absent"}), entry
        assert not reach_row_is_good(entry | {"kind": "failed"}, {}), entry
        if entry["kind"] == "exact":
            assert not reach_row_is_good(entry | {"error": 1e-6}, said), entry
            assert not reach_row_is_good(entry | {"error": float("nan")}, said), entry


def test_every_gradient_is_the_weighted_sum(run: tuple[int, str, list[dict]]) -> None:
    _, dtype, results = run
    exact = of_kind(results, "exact")
    wrong = [(e["row"], e["mode"], e["error"]) for e in exact if not e["error"] <= TOLERANCE[dtype]]
    assert not wrong
    # Errors are relative: to something, and small against what a mistake would make of the row.
    assert all(e["norm"] > 1e-3 for e in exact)
    assert [(e["row"], e["wrong"]) for e in exact if not e["wrong"] > 0.1] == []


def test_ulysses_ranks_are_not_data_parallel_ranks(run: tuple[int, str, list[dict]]) -> None:
    ranks, _, results = run
    for entry in of_kind(results, "exact"):
        shared = entry["row"] in ULYSSES
        assert entry["data_parallel"] == (ranks // 2 if shared else ranks), entry["row"]
        assert (entry["all_to_alls"] > 0) == shared, entry["row"]  # sequences were really cut


def test_what_cannot_be_exact_is_refused(run: tuple[int, str, list[dict]]) -> None:
    """By the driver, and in the micro-batch should a config get there that was never checked."""
    for entry in of_kind(run[2], "refused"):
        says = REFUSED[entry["row"]]
        assert says in entry["at_config"], entry
        assert "Accepted:" in entry["at_config"], entry
        if entry["row"] != "bypass_mode with rollout_rs":
            assert "loss_agg_mode='vl_norm' had no effect" in entry["at_run"], entry
            assert "never called agg_loss with it" in entry["at_run"], entry
