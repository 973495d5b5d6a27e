"""The CPU study's program (benchmarks/study): what its runs are, and its analysis on made-up runs of known truth.

Covered: the design and what verl is given; effects, tests in order, ties, time scales; the page as a whole; a record of
a run's folder. Slow: error rates and coverage; real runs of three steps, killed and resumed. Not covered: the coverage
of the intervals that vlnorm_verl/report/estimates.py gives (test_estimates.py).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.study import analyse, design, effects, record
from benchmarks.study import run as study
from benchmarks.study.design import METHODS, Run
from tests import warm
from vlnorm_verl.files import UserError, write_json
from vlnorm_verl.runs.check import validate
from vlnorm_verl.runs.config import compose
from vlnorm_verl.tasks.tiny import WEIGHTS

ROOT = Path(__file__).parent.parent
WEIGHT = {"grpo_norm": 1, "dapo_norm": 0, "dr_grpo_norm": 0, "vl_norm:1": 1, "vl_norm:0.75": 1}
SCALE = {"grpo_norm": 0, "dapo_norm": 0, "dr_grpo_norm": 1, "vl_norm:1": 1, "vl_norm:0.75": 1}


def blocks(generator: np.random.Generator, weighting: float, scale: float, sd: float = 0.01) -> dict[str, np.ndarray]:
    """[12] accuracy of each method: three warm starts, blocks, the two effects, a run's own noise."""
    common = 0.5 + np.tile(generator.normal(0, 0.05, 3), 4) + generator.normal(0, 0.01, 12)
    return {m: common + weighting * WEIGHT[m] + scale * SCALE[m] + generator.normal(0, sd, 12) for m in METHODS}


# ------------------------------------------------------------------------------------------------------------- design


def test_the_runs_are_those_of_the_design() -> None:
    runs = design.runs()
    assert Counter(run.part for run in runs) == {"pilots": 4, "main": 60, "rates": 16, "eps": 4, "long": 5, "floor": 4}
    assert len({run.name for run in runs}) == len(runs)
    main = [run for run in runs if run.part == "main"]
    assert set(Counter((run.method, run.warm_start) for run in main).values()) == {4}
    orders = [tuple(run.method for run in main[start : start + 5]) for start in range(0, 60, 5)]
    assert all(set(order) == set(METHODS) for order in orders)
    assert len(set(orders)) > 6
    assert [run.name for run in design.runs()] == [run.name for run in runs]
    assert not {run.block for run in runs if run.part == "pilots"} & {run.block for run in main}


def test_verl_is_given_what_the_design_says() -> None:
    """Also the keys: an override of one that nobody reads would be refused by `compose`."""
    modes, runs = {}, [run for run in design.runs() if run.block == 0]
    # Each method once, and each part.
    for run in {
        run.method: run for part in ("floor", "main", "long", "rates", "eps") for run in runs if run.part == part
    }.values():
        config = compose(ROOT / "recipes" / "config", run.overrides(Path("/f"), Path("/d"), WEIGHTS, Path("/h")))
        optimizer, actor = config.actor_rollout_ref.actor.optim, config.actor_rollout_ref.actor
        assert (optimizer.lr, optimizer.override_optimizer_config.eps) == (run.rate, run.eps)
        assert (config.data.max_response_length, config.data.val_files, config.data.seed) == (384, "/h", 0)
        assert (config.trainer.total_training_steps, config.trainer.test_freq) == (run.steps, run.steps)
        assert (config.trainer.val_before_train, config.trainer.save_freq) == (False, -1)
        assert (actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n, config.recipe.folder) == (64, "/f")
        assert config.actor_rollout_ref.model.path == str(WEIGHTS)
        modes[run.method] = (actor.loss_agg_mode, actor.loss_scale_factor)
    validate(config)
    assert modes == {
        "grpo_norm": ("seq-mean-token-mean", None),
        "dapo_norm": ("token-mean", None),
        "dr_grpo_norm": ("seq-mean-token-sum-norm", 384),
        "vl_norm:1": ("vl_norm:1.0", 384),
        "vl_norm:0.75": ("vl_norm:0.75", 384),
        "floor_norm:32": ("floor_norm:32", 384),
    }


def test_a_run_of_the_floor_is_valid_where_the_study_starts_it(tmp_path: Path) -> None:
    """In a process that knows the mode by the study's variables alone."""
    floor = next(replace(run, length=256) for run in design.runs() if run.method == design.FLOOR)
    given = floor.overrides(tmp_path / "run", tmp_path, WEIGHTS, tmp_path / "held-out")
    warm.python("-m", "vlnorm_verl", "launch", *given, "--dry-run", check=True, **study.VARIABLES)


# ------------------------------------------------------------------------------------------------------------ effects


def test_effects_of_a_table_without_noise() -> None:
    y = blocks(np.random.default_rng(0), 0.02, -0.006, sd=0.0)
    assert effects.weighting_effect(y) == pytest.approx(np.full(12, 0.02))
    assert effects.scale_effect(y) == pytest.approx(np.full(12, -0.006))
    assert effects.residual_spread(y).value == pytest.approx(0, abs=1e-12)


def test_a_scale_effect_that_cancels_is_an_interaction() -> None:
    """The scale effect of two opposite ones is 0, and test 3 cannot see it."""
    y = dict.fromkeys(METHODS, np.zeros(12))
    y |= {"vl_norm:1": np.full(12, 0.06), "grpo_norm": np.full(12, 0.03), "dapo_norm": np.full(12, 0.03)}
    assert effects.scale_effect(y) == pytest.approx(np.zeros(12))
    assert effects.interaction(y) == pytest.approx(np.full(12, 0.06))
    assert effects.interaction(blocks(np.random.default_rng(0), 0.02, -0.006, sd=0.0)) == pytest.approx(np.zeros(12))


def test_runs_are_compared_without_the_levels_of_their_starts() -> None:
    """A method that is better in each block is better with probability 1, though starts differ by more."""
    starts = np.tile([1, 4, 3], 4)
    y = {"vl_norm:1": 0.1 * starts + 0.02, "dapo_norm": 0.1 * starts}
    rest = effects.without_levels(y, starts)
    assert effects.probability_of_improvement(rest["vl_norm:1"], rest["dapo_norm"]) == 1
    assert effects.probability_of_improvement(y["vl_norm:1"], y["dapo_norm"]) < 0.7
    assert rest["vl_norm:1"].std() == pytest.approx(0)
    assert {m: of.mean() for m, of in rest.items()} == pytest.approx({m: of.mean() for m, of in y.items()})


def test_a_method_that_spreads_more_is_seen_beside_the_levels_of_their_starts() -> None:
    generator, starts = np.random.default_rng(0), np.tile([1, 4, 3], 4)
    y = {str(k): 0.1 * starts + generator.normal(0, 0.05 if k == 4 else 0.01, 12) for k in range(5)}
    assert effects.p_equal_spread(y, starts) < 0.01
    same = {str(k): 0.1 * starts + generator.normal(0, 0.01, 12) for k in range(5)}
    assert effects.p_equal_spread(same, starts) > 0.05


@pytest.mark.slow
def test_error_rates_of_the_tests() -> None:
    """Over 600 studies: 5% where there is no effect or one at the margin, and nearly always where there is one."""
    generator, shares = np.random.default_rng(1), Counter[str]()
    for _ in range(600):
        none, margin, both = (blocks(generator, w, s) for w, s in ((0.0, 0.0), (0.0, effects.MARGIN), (0.03, 0.0)))
        shares["none"] += effects.p_difference(effects.weighting_effect(none)) < 0.05
        shares["margin"] += effects.p_equivalence(effects.scale_effect(margin)) < 0.05
        shares["found"] += [test.verdict for test in effects.tests_in_order(both)] == ["established"] * 3
        interval = effects.bootstrap(effects.weighting_effect(none))
        shares["bootstrap"] += not interval.low < 0 < interval.high
    for kind in ("none", "margin", "bootstrap"):
        assert 600 * 0.05 - 16 <= shares[kind] <= 600 * 0.05 + 16, kind  # three standard errors
    assert shares["found"] > 590


@pytest.mark.parametrize(
    ("weighting", "scale", "verdicts"),
    [
        (0.03, 0.0, ["established", "established", "established"]),
        (0.0, 0.0, ["open", "not tested", "not tested"]),  # though the scale effect is within the margin
        (0.02, -0.02, ["established", "open", "not tested"]),  # VL − DAPO is the sum of the two
        (0.03, 0.03, ["established", "established", "open"]),
    ],
)
def test_a_test_is_made_only_after_the_one_before(weighting: float, scale: float, verdicts: list[str]) -> None:
    found = effects.tests_in_order(blocks(np.random.default_rng(3), weighting, scale, sd=0.003))
    assert [test.verdict for test in found] == verdicts
    assert [test.p is None for test in found] == [verdict == "not tested" for verdict in verdicts]


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_ties() -> None:
    y = dict.fromkeys(METHODS, np.full(12, 0.5))
    assert [test.verdict for test in effects.tests_in_order(y)] == ["open", "not tested", "not tested"]
    assert effects.probability_of_improvement(y["vl_norm:1"], y["dapo_norm"]) == 0.5
    assert effects.probability_of_improvement(np.array([1.0, 2.0]), np.array([1.0, 0.0])) == 0.875
    assert np.isnan(effects.bootstrap(effects.weighting_effect(y)).low)
    better = effects.bootstrap(np.arange(2.0, 4), np.arange(2.0), statistic=effects.probability_of_improvement)
    assert (better.value, np.isnan(better.low)) == (1, True)  # every comparison agrees
    assert effects.p_equivalence(effects.scale_effect(y)) < 0.05


def test_bootstrap_agrees_with_students_t() -> None:
    effect = np.random.default_rng(4).normal(0.02, 0.01, 200)
    t, percentiles = analyse.over_blocks(effect), effects.bootstrap(effect)
    assert (percentiles.value, percentiles.low, percentiles.high) == pytest.approx((t.value, t.low, t.high), abs=3e-4)


def curves(generator: np.random.Generator, tau: float) -> np.ndarray:
    """[12, 60] share of 128 right responses, 0.37 + 0.3 (1 − exp(−step/τ))."""
    return generator.binomial(128, 0.37 + 0.3 * (1 - np.exp(-np.arange(1, 61) / tau)), (12, 60)) / 128


def test_time_scales() -> None:
    """The fit finds a factor of 2; the steps to a target show less of it; equal methods are equal."""
    generator = np.random.default_rng(5)
    fitted, hits = [], []
    for factor in (1, 2):
        pairs = [(curves(generator, 60), curves(generator, 60 / factor)) for _ in range(30)]
        scales = [effects.time_scales({"slow": slow, "fast": fast}) for slow, fast in pairs]
        fitted.append(np.mean([scale["slow"] / scale["fast"] for scale in scales]))
        hits.append(np.mean([effects.steps_to(slow) / effects.steps_to(fast) for slow, fast in pairs]))
    assert fitted == pytest.approx([1, 2], abs=0.05)
    assert hits[0] == pytest.approx(1, abs=0.1)
    assert 1.4 < hits[1] < 1.8
    assert np.isnan(effects.steps_to(np.full((12, 60), 0.4)))


def test_a_higher_plateau_reads_as_speed_unless_each_has_its_own() -> None:
    rise = 1 - np.exp(-np.arange(1, 61) / 20)
    pair = {"low": np.tile(0.37 + 0.26 * rise, (12, 1)), "high": np.tile(0.37 + 0.30 * rise, (12, 1))}
    shared, own = effects.time_scales(pair), effects.time_scales(pair, own_plateaus=True)
    assert shared["low"] / shared["high"] > 1.3
    assert own == pytest.approx({"low": 20, "high": 20}, rel=1e-3)


@pytest.mark.slow
def test_speed_ups_have_intervals_and_say_never() -> None:
    """Of 12 intervals of 95% three may miss: four or more would be seen in 1 of 450 such tests."""
    generator = np.random.default_rng(6)
    pairs = [{"dapo_norm": curves(generator, 60), "vl_norm:1": curves(generator, 30)} for _ in range(12)]
    found = [effects.speed_ups(pair)["vl_norm:1"] for pair in pairs]
    assert sum(fitted.low < 2 < fitted.high for _, fitted, _ in found) >= 9
    assert all(fitted.low > 1 for _, fitted, _ in found)
    hits, *_ = effects.speed_ups({"dapo_norm": curves(generator, 60), "x": np.full((12, 60), 0.4)})["x"]
    assert np.isnan(hits.value)
    assert (hits.low, hits.high) == (0, np.inf)


# --------------------------------------------------------------------------------------------------- records and page


def write_study(folder: Path, weighting: float, without: str = "", of: tuple[int, ...] = design.WARM_STARTS) -> None:
    """Made-up records of all runs but one, with the effect in blocks of these warm starts alone."""
    generator = np.random.default_rng(7)
    for run in design.runs():
        if run.name == without:
            continue
        effect = weighting * WEIGHT.get(run.method, WEIGHT["vl_norm:1"]) if run.warm_start in of else 0.0
        level = 0.5 + 0.01 * (run.block % 3) + effect
        columns = {name: np.full(run.steps, 0.1) for name in [*record.COLUMNS, "length_harmonic"]}
        columns["accuracy"] = level + generator.normal(0, 0.02, run.steps)
        columns["length_mean"] = np.full(run.steps, 100.0)
        content = {"name": run.name, **asdict(run), "warm_start": run.warm_start, "began": "2026-01-01T00:00Z"}
        content |= {"seconds": 400.0, "others_cores": 0.05, "commit": "abc", "machine": "m", "versions": "v"}
        content["columns"] = {name: " ".join(f"{x:.6g}" for x in column) for name, column in columns.items()}
        content["held_out"] = "".join(map(str, generator.binomial(8, level, design.HELD_OUT)))
        write_json(folder / f"{run.name}.json", content)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few resamples, for tests that look at no end of a bootstrap's interval."""
    monkeypatch.setattr(effects, "RESAMPLES", 200)
    monkeypatch.setattr(effects, "FITS", 10)


def test_the_page_has_the_results_and_keeps_the_rest(tmp_path: Path, few: None) -> None:
    records, page = tmp_path / "study", tmp_path / "study.md"
    page.write_text(f"# Ours\n\n{analyse.BEGIN}old{analyse.END}\nbehind\n")
    write_study(records, weighting=0.03)
    analyse.main(records, page)
    text = page.read_text()
    assert text.startswith("# Ours\n\n")
    assert text.endswith("\nbehind\n")
    assert "old" not in text
    first = next(line for line in text.splitlines() if "weighting effect is not 0" in line)
    assert "0.03" in first
    assert "| established |" in first
    for heading in ("The methods", "All pairs", "By warm start", "The other runs", "Conditions"):
        assert f"### {heading}" in text
    assert "nan" not in text
    assert (tmp_path / "study.png").exists()
    analyse.main(records, page)
    assert page.read_text() == text


def test_levels_of_the_warm_starts_widen_no_interval_of_a_method(tmp_path: Path, few: None) -> None:
    write_study(tmp_path, weighting=0.0)
    main = analyse.main_part(record.read_records(tmp_path))
    y, levels = analyse.accuracies(main), 0.1 * analyse.starts(main)
    plain, apart = (analyse.methods(main, some).rows for some in (y, {m: of + levels for m, of in y.items()}))
    for one, other in zip(plain, apart, strict=True):
        assert other[1].high - other[1].low == pytest.approx(one[1].high - one[1].low)


def test_an_effect_of_the_replacement_alone_is_open_without_it(tmp_path: Path, few: None) -> None:
    write_study(tmp_path, weighting=0.3, of=(analyse.REPLACEMENT,))
    main = analyse.main_part(record.read_records(tmp_path))
    y = analyse.accuracies(main)
    assert analyse.tests(y).rows[0][-1] == "established"
    without = analyse.warm_starts(main, y).foot[0]
    assert "without number 4: 1. the weighting effect is not 0: open (p: 0." in without
    assert "2. VL Norm (α = 1) − DAPO Norm is not 0: not tested (p: –)" in without


@pytest.mark.parametrize("wrong", ["--records", "--page"])
def test_a_mistyped_path_is_refused_and_changes_no_page(wrong: str, tmp_path: Path) -> None:
    page = tmp_path / "study.md"
    page.write_text(f"{analyse.BEGIN}results{analyse.END}")
    given = {"--records": tmp_path, "--page": page} | {wrong: tmp_path / "typo"}
    app = typer.Typer()
    app.command()(analyse.main)
    assert CliRunner().invoke(app, [str(word) for pair in given.items() for word in pair]).exit_code == 2
    assert "results" in page.read_text()


@pytest.mark.parametrize("stale", [False, True])
def test_no_test_before_the_last_run(tmp_path: Path, stale: bool) -> None:
    """A run from a warm start that was replaced is not the run of the design."""
    records, page, missing = tmp_path / "study", tmp_path / "study.md", design.runs()[40]
    page.write_text(f"{analyse.BEGIN}{analyse.END}")
    write_study(records, weighting=0.03, without="" if stale else missing.name)
    if stale:
        file = records / f"{missing.name}.json"
        write_json(file, json.loads(file.read_text()) | {"warm_start": 2})
    analyse.main(records, page)
    assert "main 59 of 60" in page.read_text()
    assert "effect" not in page.read_text()


@pytest.mark.parametrize("whole", [True, False])
def test_a_repeated_run_is_listed_with_both_results(tmp_path: Path, whole: bool, few: None) -> None:
    """Those of the main part not before its last run. A record of a trial, with fewer steps, is not that run."""
    records, page = tmp_path / "study", tmp_path / "study.md"
    page.write_text(f"{analyse.BEGIN}{analyse.END}")
    write_study(records, weighting=0.03)
    (records / "replaced").mkdir()
    for name in ("main-01-dapo_norm", "eps-00-vl_norm-1-6e-06"):
        old = (records / f"{name}.json").read_text().replace('"warm_start": 4', '"warm_start": 2')
        (records / "replaced" / f"{name}-1.json").write_text(old)
    last = records / "main-02-vl_norm-1.json"
    if not whole:
        last.write_text(last.read_text().replace('"steps": 60', '"steps": 3'))
    analyse.main(records, page)
    assert ("main 60 of 60" in page.read_text()) == whole
    repeated = next(line for line in page.read_text().splitlines() if "repeated" in line)
    assert "before" in repeated
    assert ("main-01-dapo_norm" in repeated.replace("\\", "")) == whole
    assert ("before from warm start 2" in repeated) == whole
    assert "eps-00" in repeated


def test_a_load_that_was_never_measured(tmp_path: Path) -> None:
    write_study(tmp_path, weighting=0.03)
    found = [of_run | {"others_cores": None} for of_run in record.read_records(tmp_path)]
    assert "| measured in 0 of 93 runs |" in analyse.to_markdown(analyse.conditions(found, []))


def fake_run(folder: Path, run: Run) -> None:
    """What verl and the launcher leave of a run: 2 responses a step, of 9 and 19 letters and the end mark."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "validation").mkdir()
    with open(folder / "metrics-000.jsonl", "w") as metrics:
        for step in range(1, run.steps + 1):
            data: dict[str, Any] = dict.fromkeys(record.COLUMNS.values(), 0.25)
            data |= {"critic/score/mean": step / 100, "actor/ppo_kl": None if step == 2 else 0.0}
            metrics.write(json.dumps({"step": step, "data": data}) + "\n")
            dump = "".join(json.dumps({"output": "x" * length}) + "\n" for length in (9, 19))
            (folder / "rollouts" / f"{step}.jsonl").write_text(dump)
    responses = [
        {"input": f"p{i}", "gts": "1", "acc": float(k < i % 9)} for i in range(design.HELD_OUT) for k in range(8)
    ]
    (folder / "validation" / f"{run.steps}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in responses))


def test_a_record_holds_what_the_run_wrote(tmp_path: Path) -> None:
    run = Run("main", "vl_norm:1", 3, steps=4, length=256)
    fake_run(tmp_path / "run", run)
    load = record.Load()
    begun = load.now()
    record.write_record(tmp_path / "records", run, tmp_path / "run", WEIGHTS, begun, load.now())
    (found,) = record.read_records(tmp_path / "records")
    assert found["columns"]["accuracy"] == [0.01, 0.02, 0.03, 0.04]
    assert np.isnan(found["columns"]["ppo_kl"]).tolist() == [False, True, False, False]
    assert found["commit"] == begun.commit
    assert found["columns"]["length_harmonic"] == pytest.approx([2 / (1 / 10 + 1 / 20)] * 4, rel=1e-5)
    scores = analyse.held_out([found])
    assert scores.values.mean() == pytest.approx(np.mean([i % 9 / 8 for i in range(design.HELD_OUT)]))
    assert (found["warm_start"], found["block"], found["rate"]) == (1, 3, 2e-4)
    shutil.copy(tmp_path / "run/validation/4.jsonl", tmp_path / "run/validation/5.jsonl")
    with pytest.raises(UserError, match="not 5 steps"):
        record.write_record(tmp_path, replace(run, steps=5), tmp_path / "run", WEIGHTS, begun, load.now())


def test_other_programs_are_told_from_what_the_study_starts() -> None:
    """Also when it has ended, and nobody has waited for it yet: its environment is gone then."""
    load, busy = record.Load(), [sys.executable, "-c", "while True: pass"]
    load.sample()
    child = subprocess.Popen(busy, start_new_session=True)
    other = subprocess.Popen(busy, start_new_session=True, env={})
    try:
        for _ in range(3):
            time.sleep(0.4)
            load.sample()
    finally:
        child.kill()
        other.kill()
    time.sleep(0.1)
    load.sample()
    assert child.pid not in load.known
    assert other.pid in load.known
    assert load.others > 0.1
    for process in (child, other):
        process.wait()


def test_a_warm_start_of_other_weights_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(WEIGHTS, model)
    record.write_warm_start(tmp_path, 1, model, 0.25)
    record.write_warm_start(tmp_path, 1, model, 0.25)
    with open(model / "model.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="other weights"):
        record.write_warm_start(tmp_path, 1, model, 0.25)


def test_a_warm_start_that_has_not_learned_the_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"warm start 1: 0.375 of its responses are right, and 0.4 must be"):
        record.write_warm_start(tmp_path, 1, WEIGHTS, 0.4)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    """kill -9 in the second run: nothing stays behind, the first is not made again, the second is."""
    command = [sys.executable, "-m", "benchmarks.study.run", "--try", str(tmp_path), "--part", "pilots"]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
    records, second = tmp_path / "records", tmp_path / "work" / design.runs()[1].name
    first = subprocess.Popen(command, cwd=ROOT, env=environment)
    while not list(second.glob("metrics-*.jsonl")):
        assert first.poll() is None
        time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (made,) = records.glob("*.json")
    when = made.stat().st_mtime
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == 0
    assert made.stat().st_mtime == when
    assert {file.stem for file in records.glob("*.json")} == {r.name for r in design.runs() if r.part == "pilots"}
