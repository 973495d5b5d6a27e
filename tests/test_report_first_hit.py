"""When a run first reached another's final accuracy: the paper's count, smoothing, seeds, runs with a part missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report_runs import KEY, looked_at, made, put, read, read_one, record, text, write_run
from vlnorm_verl.report import first_hit, measures


def test_the_papers_count_and_first_hit_against_first_hit(tmp_path: Path) -> None:
    """The paper's 375 against 1000; the reference had been at its final accuracy at step 750."""
    recipe = {"family": "dapo"}
    dapo = write_run(tmp_path, "dapo", curve={250: 0.5, 500: 0.7, 750: 0.87, 1000: 0.866}, recipe=recipe)
    vl = write_run(tmp_path, curve={125: 0.5, 250: 0.7, 375: 0.866, 1000: 0.912}, recipe=recipe)
    (row,) = made(read(dapo, vl), "speedup")
    assert row["method"] == "DAPO + VL Norm (α = 1)", "the higher one reaches the lower one"
    assert row["target"].value == pytest.approx(0.866)
    assert (row["raw: that one's last step"], row["raw: validation before"], row["raw: first hit"]) == (1000, 250, 375)
    assert (row["that one's first hit"], row["at step"]) == ("500–750", "250–375")
    assert row["last step / first hit"] == "2.67–4.00×"
    assert row["raw: last step / first hit"].value == pytest.approx(1000 / 375)
    assert row["first hit / first hit"].value == pytest.approx(2.0)
    assert row["raw: last step / first hit"].note == "one seed"
    assert np.isnan(row["raw: last step / first hit"].low)
    assert row["paper's first hit"] == "375 (2.67×) [paper, Fig. 2]"
    assert row["seeds reached"] == "1 of 1"
    assert row["smoothed: steps"] == 750, "three validations of the one that is validated the least often"


def test_smoothing_treats_both_curves_and_the_target_alike(tmp_path: Path) -> None:
    reference = read_one(write_run(tmp_path, "dapo_norm", curve={10: 0.2, 20: 0.9, 30: 0.4, 40: 0.6}))
    run = read_one(write_run(tmp_path, curve={10: 0.5, 20: 0.5, 30: 0.8, 40: 0.9}))
    raw, smooth = (first_hit.first_hits(run, reference, window) for window in (1, 20))
    assert (raw.reference.first, raw.own.first) == (20, 30)
    assert (smooth.reference.first, smooth.own.first) == (20, 10)
    assert (raw.target, smooth.target) == pytest.approx((0.6, 0.5))


def test_smoothing_is_over_the_same_steps_for_runs_validated_at_other_distances(tmp_path: Path) -> None:
    often = {step: 0.5 + 0.4 * (step % 20 == 10) for step in range(0, 101, 10)}
    rarely = {0: 0.4, 50: 0.5, 100: 0.6}
    for name, curve in (("vl_norm", often), ("token-mean", rarely)):
        put(tmp_path / f"{name}.jsonl", "".join(record(step, **{KEY: value}) for step, value in curve.items()))
    runs = read(tmp_path)
    assert first_hit.smoothing(runs, None) == 150
    assert first_hit.smoothing(runs, 20) == 20
    hits = first_hit.speed_up(runs[:1], runs[1:], 20)
    assert hits.target == pytest.approx(0.7)  # VL Norm's, of steps 90 and 100


def test_a_speed_up_over_seeds_is_a_t_interval_of_logarithms(tmp_path: Path) -> None:
    folders = []
    for seed, hit in enumerate((20, 40, 40)):
        final = 0.6 if seed == 2 else 0.5
        rising = {step: 0.9 if step >= hit else 0.1 for step in (20, 40, 80)}
        folders.append(write_run(tmp_path, seed=seed, curve=rising, planned=80))
        folders.append(write_run(tmp_path, "dapo_norm", seed=seed, curve={20: 0.1, 40: 0.2, 80: final}, planned=80))
    runs = read(*folders)
    vl, dapo = [[run for run in runs if run.method == method] for method in ("vl_norm", "dapo_norm")]
    found = first_hit.speed_up(vl, dapo, 1)
    logs = np.log([4.0, 2.0, 2.0])
    half = 4.302653 * logs.std(ddof=1) / np.sqrt(3)
    assert found.by_last.value == pytest.approx(np.exp(logs.mean()))
    assert found.by_last.low == pytest.approx(np.exp(logs.mean() - half), rel=1e-5)
    assert found.by_last.high == pytest.approx(np.exp(logs.mean() + half), rel=1e-5)
    never = read_one(write_run(tmp_path / "x", seed=2, curve={20: 0.1, 80: 0.2}, planned=80))
    partly = first_hit.speed_up([*vl[:2], never], dapo, 1)
    assert (partly.reached, partly.pairs) == (2, 3)
    assert np.isnan(partly.by_last.low)
    assert partly.by_last.note == "of the 2 seeds that reached"
    # Steps and ratios are of the same two seeds, the target of all three.
    assert (partly.target, partly.own.first, partly.reference.last) == (pytest.approx((0.5 + 0.5 + 0.6) / 3), 30, 80)
    assert partly.by_last.value == pytest.approx(np.exp(logs[:2].mean()))
    assert first_hit.speed_up([vl[0], never], dapo[::2], 1).by_last.note == "of the seed that reached"


def test_an_unfinished_run_is_neither_a_target_nor_out_of_reach(tmp_path: Path) -> None:
    done = read_one(write_run(tmp_path, "dapo_norm", curve={0: 0.1, 50: 0.5, 100: 0.6}, planned=100))
    begun = read_one(write_run(tmp_path, curve={0: 0.1, 50: 0.2}, planned=100))
    (row,) = made([done, begun], "speedup")
    assert (row["method"], row["target"].note) == ("DAPO Norm", "the reference is not finished (step 50 of 100)")
    assert np.isnan(row["target"].value)
    assert "at step" not in row
    hits = first_hit.speed_up([begun], [done], 1)
    assert (hits.waiting, hits.own.first, hits.reference.before, hits.reference.first) == (50, None, 50, 100)
    other = read_one(write_run(tmp_path, "dapo_norm", seed=1, curve={0: 0.1, 50: 0.5}, planned=100))
    ours = [read_one(write_run(tmp_path / "x", seed=s, curve={0: 0.1, 50: 0.7, 100: 0.8}, planned=100)) for s in (0, 1)]
    found = first_hit.speed_up(ours, [done, other], 1)
    assert (found.pairs, found.reached, found.own.first) == (1, 1, 50)
    assert found.note == "the reference is not finished (step 50 of 100) in 1 of 2 seeds, which are left out"


def test_a_target_that_was_met_before_training_gives_no_ratio(tmp_path: Path) -> None:
    run = read_one(write_run(tmp_path, curve={0: 0.5, 10: 0.6}))
    reference = read_one(write_run(tmp_path, "dapo_norm", curve={0: 0.5, 10: 0.4}, planned=10))
    # Differences of cumulated sums give its last value as 0.30000000000000004.
    back = read_one(write_run(tmp_path / "back", "dapo_norm", curve={0: 0.3, 10: 0.7, 20: 0.3}, planned=20))
    low = read_one(write_run(tmp_path / "low", curve={0: 0.2, 10: 0.6}))
    for found in (first_hit.speed_up([run], [reference], 1), first_hit.speed_up([low], [back], 1)):
        assert found.by_last is None
        assert found.note == "the target was met before training"


def test_a_log_whose_beginning_is_lost_has_no_ratio(tmp_path: Path) -> None:
    put(tmp_path / "vl_norm.jsonl", text((31, 60, 0.2)))
    put(tmp_path / "token-mean.jsonl", text((0, 60, 0.0)))
    runs = read(tmp_path)
    assert "its log begins at step 31: what was before is not known" in runs[1].notes
    assert looked_at(runs)["Its log begins late, so how it was trained before is not known"] == ["vl_norm (step 31)"]
    (row,) = made(runs, "speedup", smooth=1)
    assert (row["at step"], row["that one's first hit"]) == ("at or before 40", "50–60")
    assert (row.get("last step / first hit"), row.get("first hit / first hit")) == (None, None)
    assert row["target"].note == "the beginning of a log is lost in 1 of 1 seeds"


def test_a_seed_with_a_lost_beginning_leaves_the_others_their_ratio(tmp_path: Path) -> None:
    for seed, first in ((0, 0), (1, 31)):
        put(tmp_path / f"vl_norm_s{seed}.jsonl", text((first, 60, 0.2)))
        put(tmp_path / f"token-mean_s{seed}.jsonl", text((0, 60, 0.0)))
    row = made(read(tmp_path), "speedup", smooth=1)[0]
    assert row["at step"] == "at or before 30"
    ratio = row["raw: last step / first hit"]
    assert (ratio.value, ratio.note) == (pytest.approx(3), "of the seed that reached, with a whole log")


@given(st.dictionaries(st.integers(0, 100), st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 40))
def test_trailing_mean(curve: dict[int, float], window: int) -> None:
    steps = sorted(curve)
    expected = [np.mean([curve[other] for other in steps if step - window < other <= step]) for step in steps]
    found = measures.trailing_mean(np.array(steps), np.array([curve[step] for step in steps]), window)
    assert found.tolist() == pytest.approx(expected)
