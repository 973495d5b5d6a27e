"""Reading runs, measuring them, and the tables of `vlnorm-verl report`.

Covered: what real runs of verl wrote (tests/report_samples), expected numbers counted here by other means; hostile and
missing files; runs of other loggers, written by verl's own Tracking. Not covered here: how tables and figures look
(tests/test_report_output.py, tests/test_report_figures.py), coverage of intervals (tests/test_estimates.py).
"""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from vlnorm_verl.files import UserError
from vlnorm_verl.report import dumps, first_hit, groups, measures, paper, tables
from vlnorm_verl.report.build import build
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.identity import Setting
from vlnorm_verl.report.read import read_runs
from vlnorm_verl.report.run import Run

SAMPLES = Path(__file__).parent / "report_samples"
NAME = "aggregation-countdown-tiny-256"
SET = "vlnorm_tiny_countdown"


# ----------------------------------------------------------------------------------------------- runs made for a test


def record(step: int, **metrics: Any) -> str:
    return json.dumps({"step": step, "data": {key.replace("__", "/"): value for key, value in metrics.items()}}) + "\n"


def accuracy(value: float, name: str = "set", n: int = 8) -> dict[str, float]:
    return {f"val-core/{name}/acc/mean@{n}": value}


def dump_line(problem: str, right: float, **fields: Any) -> str:
    entry = {"input": problem, "output": "text", "gts": "1", "score": right, "step": 0, "acc": right, **fields}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def write_run(
    root: Path,
    method: str = "vl_norm:1.0",
    seed: int = 0,
    curve: dict[int, float] | None = None,
    dumps: dict[int, dict[str, list[int]]] | None = None,
    planned: int = 1000,
    recipe: dict[str, Any] | None = None,
    name: str = "set",
) -> Path:
    """A run as the launcher leaves it. curve: step -> accuracy. dumps: step -> problem -> its responses' scores."""
    folder = root / f"{method.replace(':', '-')}-{seed}"
    folder.mkdir(parents=True)
    curve = curve or {step: float(np.mean([r for p in found.values() for r in p])) for step, found in dumps.items()}
    choices = {"family": "aggregation", "task": "countdown", "model": "3b", "length": "3072"}
    mode = {"grpo_norm": "seq-mean-token-mean", "dapo_norm": "token-mean", "dapo": "token-mean"}.get(method, method)
    config = {
        "recipe": {**choices, "method": method.partition(":")[0], "alpha": 1.0, "seed": seed, **(recipe or {})},
        "actor_rollout_ref": {"actor": {"loss_agg_mode": mode}},
        "trainer": {"total_training_steps": planned},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [json.dumps({"step": step, "data": accuracy(value, name)}) + "\n" for step, value in curve.items()]
    (folder / "metrics-000.jsonl").write_text("".join(lines))
    for step, problems in (dumps or {}).items():
        (folder / "validation").mkdir(exist_ok=True)
        text = "".join(dump_line(problem, right) for problem, found in problems.items() for right in found)
        (folder / "validation" / f"{step}.jsonl").write_text(text)
    return folder


def read_one(folder: Path | str, **arguments: Any) -> Run:
    (run,) = read_runs([str(folder)], **arguments)
    return run


def table_of(out: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a written table by its columns."""
    import csv

    with open(out / "tables" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def made(runs: list[Run], name: str, **options: Any) -> list[dict[str, Any]]:
    found = {table.name: table for table in tables.tables(runs, **options)}
    return [dict(zip(found[name].columns, row, strict=True)) for row in found[name].rows] if name in found else []


def foot(runs: list[Run], name: str) -> str:
    return " ".join(next(table.foot for table in tables.tables(runs) if table.name == name))


def quiet() -> Console:
    return Console(file=io.StringIO())


# ------------------------------------------------------------------------------------------------- real runs of verl


def counted(method: str, seed: int, step: int = 4) -> dict[tuple[str, str], list[float]]:
    """Scores of each problem of a sample's dump, by plain JSON."""
    found = defaultdict(list)
    for line in (SAMPLES / f"{NAME}-{method}-seed{seed}" / "validation" / f"{step}.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found[entry["input"], entry["gts"]].append(entry["acc"])
    return found


def logged(method: str, seed: int, step: int = 4) -> dict[str, float]:
    for line in (SAMPLES / f"{NAME}-{method}-seed{seed}" / "metrics-000.jsonl").read_text().splitlines():
        if (entry := json.loads(line))["step"] == step:
            return entry["data"]
    raise AssertionError


def test_a_real_run_is_what_its_recipe_says() -> None:
    run = read_one(SAMPLES / f"{NAME}-vl_norm-seed0")
    assert run.setting == Setting("aggregation", "countdown", "tiny", "256")
    assert (run.method_key, run.seed, run.planned_steps) == ("vl_norm:1", 0, 4)
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    assert sorted(run.validations) == [0, 2, 4]
    assert run.notes == []
    assert np.isnan(run.metrics["actor/entropy"][0])
    assert run.metrics["actor/entropy"][4] == logged("vl_norm", 0)["actor/entropy"]
    assert run.metrics["actor/vl_norm/length_harmonic_mean"].shape == (5,)


@pytest.mark.parametrize("step", [0, 2, 4])
def test_counts_of_a_real_dump(step: int) -> None:
    problems = counted("vl_norm", 0, step)
    found = read_one(SAMPLES / f"{NAME}-vl_norm-seed0").validations[step][SET]
    assert len(found.problems) == len(problems) == 16
    assert sorted(zip(found.n, found.correct, strict=True)) == sorted((len(r), sum(r)) for r in problems.values())
    assert found.correct.sum() / found.n.sum() == pytest.approx(
        logged("vl_norm", 0, step)[f"val-core/{SET}/acc/mean@8"]
    )
    assert found.binary
    assert found.characters is not None
    assert found.characters.shape == (128,)
    assert found.characters.min() == min(
        len(json.loads(line)["output"])
        for line in (SAMPLES / f"{NAME}-vl_norm-seed0/validation/{step}.jsonl").read_text().splitlines()
    )


def test_the_table_of_real_runs(tmp_path: Path) -> None:
    assert build([str(SAMPLES)], tmp_path, console=quiet()) == 0
    rows = {row["method"]: row for row in table_of(tmp_path, "countdown")}
    for method, label in (("dapo_norm", "DAPO Norm"), ("vl_norm", "VL Norm (α = 1)")):
        seeds = [counted(method, seed) for seed in (0, 1)]
        averages = [np.mean([np.mean(r) for r in problems.values()]) for problems in seeds]
        subsets = [
            np.mean([any(s) for r in problems.values() for s in itertools.combinations(r, 8)]) for problems in seeds
        ]
        row = rows[label]
        assert float(row["Avg@8"]) == pytest.approx(np.mean(averages))
        assert float(row["Avg@8 low"]) < np.mean(averages) < float(row["Avg@8 high"])
        assert float(row["Pass@8"]) == pytest.approx(np.mean(subsets))
        own = np.mean([logged(method, seed)[f"val-core/{SET}/acc/best@8/mean"] for seed in (0, 1)])
        assert float(row["verl's best@8"]) == pytest.approx(own)
        assert (row["seeds"], row["step"]) == ("2", "4")
    means = {m: [np.mean(list(counted(m, seed).values())) for seed in (0, 1)] for m in ("vl_norm", "dapo_norm")}
    gap = np.subtract(means["vl_norm"], means["dapo_norm"])
    row = rows["DAPO Norm"]
    assert float(row["VL Norm minus this"]) == pytest.approx(gap.mean())
    # verl drew 16 other problems of 128 for each seed: t over seeds, at least what the problems give.
    assert float(row["VL Norm minus this low"]) < gap.mean() - 12.7 * gap.std(ddof=1) / 2**0.5 + 1e-4
    assert row["VL Norm minus this note"] == "other problems in each seed"
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_papers_values_stand_beside_its_own_models_only(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / model, curve={1: 0.5}, recipe={"model": model}) for model in ("3b", "tiny")]
    runs = read_runs(list(map(str, runs)))
    rows = {row["model"]: row for row in made(runs, "countdown")}
    assert rows["3b"]["paper's Avg@8"] == "0.847 [second-hand, of v1]"
    assert rows["3b"]["paper's Pass@8"] == "0.938 [second-hand, of v1]"
    assert rows["tiny"]["paper's Avg@8"] is None
    assert "The paper has no model tiny: such rows are not comparable with its values." in foot(runs, "countdown")
    assert "paper's Avg@8" not in made(runs[1:], "countdown")[0]


# ---------------------------------------------------------------------------------------------------------- metrics


def test_a_cut_last_line_and_a_corrupt_line_are_named_and_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={0: 0.1, 1: 0.2, 2: 0.3})
    text = (folder / "metrics-000.jsonl").read_text().splitlines(keepends=True)
    text[1] = text[1].replace(":", "", 1)
    (folder / "metrics-000.jsonl").write_text("".join(text) + '{"step": 3, "da')
    run = read_one(folder)
    assert run.steps.tolist() == [0, 2]
    assert "metrics-000.jsonl: last line is cut, left out" in run.notes
    assert "metrics-000.jsonl: line 2 corrupt, left out" in run.notes


def test_bytes_that_are_no_text_are_a_corrupt_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={0: 0.1})
    with open(folder / "metrics-000.jsonl", "ab") as file:
        file.write(b"\0\0\xff\xfe\n" + record(1, loss=1.0).encode())
    run = read_one(folder)
    assert run.steps.tolist() == [0, 1]
    assert "metrics-000.jsonl: line 2 corrupt, left out" in run.notes


def test_a_whole_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={0: 0.1})
    with open(folder / "metrics-000.jsonl", "a") as file:
        file.write(record(1, loss=1.0).rstrip())
    run = read_one(folder)
    assert run.steps.tolist() == [0, 1]
    assert not any("cut" in note for note in run.notes)


def test_null_is_nan_and_what_is_no_number_is_ignored(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={0: 0.1})
    (folder / "metrics-000.jsonl").write_text(
        record(1, a=None, b=2, c="text", d=[1], e=1.5) + record(2, a=3.0, e="x") + record(3, never=None)
    )
    metrics = read_one(folder).metrics
    assert set(metrics) == {"a", "b", "e"}
    np.testing.assert_array_equal(metrics["a"], [np.nan, 3.0, np.nan])
    np.testing.assert_array_equal(metrics["e"], [1.5, np.nan, np.nan])


def test_what_a_run_logged_after_the_step_it_is_resumed_from_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={0: 0.1})
    trained = {"training__global_step": 1}
    (folder / "metrics-000.jsonl").write_text("".join(record(s, loss=1.0, old=1.0, **trained) for s in range(1, 31)))
    (folder / "metrics-001.jsonl").write_text(
        record(20, **{"val-core__set__acc__mean@8": 0.5}) + "".join(record(s, loss=2.0, **trained) for s in (21, 22))
    )
    (folder / "metrics-002.jsonl").write_text("")
    (folder / "metrics-003.jsonl").write_text(record(22, loss=3.0, **trained) + record(23, loss=3.0, **trained))
    run = read_one(folder)
    at = {int(step): i for i, step in enumerate(run.steps)}
    assert run.steps.tolist() == list(range(1, 24))
    assert [run.metrics["loss"][at[s]] for s in (19, 20, 21, 22, 23)] == [1, 1, 2, 3, 3]
    assert run.metrics["val-core/set/acc/mean@8"][at[20]] == 0.5  # a validation before going on adds to its step
    assert np.isnan(run.metrics["old"][at[22]])  # a trained step is replaced whole
    assert run.metrics["old"][at[20]] == 1.0
    assert run.notes[:1] == ["metrics-001.jsonl: starts again at step 20; 10 later steps of the earlier start left out"]
    assert not any("metrics-003" in note for note in run.notes)


def test_a_run_that_starts_over_has_nothing_of_its_first_start(tmp_path: Path) -> None:
    dumps = {step: {"p": [step > 5] * 8, "q": [1] * 8} for step in (0, 5, 10)}
    folder = write_run(tmp_path, dumps=dumps, planned=10)
    (folder / "metrics-001.jsonl").write_text(
        "".join(json.dumps({"step": step, "data": accuracy(0.5)}) + "\n" for step in (0, 5))
    )
    run = read_one(folder)
    assert run.steps.tolist() == [0, 5]
    assert sorted(run.validations) == [0, 5]
    assert measures.final_accuracy([run]).value == 0.5
    assert "metrics-001.jsonl: starts again at step 0; 2 later steps of the earlier start left out" in run.notes
    assert "validation dumps of steps 10, after its last record, left out" in run.notes


def test_two_records_of_one_step_in_one_start_are_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={0: 0.1})
    (folder / "metrics-000.jsonl").write_text(record(1, a=1.0) + record(1, training__global_step=1, b=2.0))
    metrics = read_one(folder).metrics
    assert (metrics["a"][0], metrics["b"][0]) == (1.0, 2.0)


def test_a_run_without_metrics_is_named_and_breaks_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", curve={1: 0.5, 2: 0.6})
    empty = write_run(tmp_path / "runs", "dapo_norm", curve={1: 0.1})
    (empty / "metrics-000.jsonl").unlink()
    begun = write_run(tmp_path / "runs", "grpo_norm", curve={1: 0.1})
    (begun / "metrics-000.jsonl").write_text("")
    assert build([str(tmp_path / "runs")], tmp_path / "out", console=quiet()) == 0
    notes = {row["run"]: row["notes"] for row in table_of(tmp_path / "out", "inputs")}
    assert "no metrics yet" in notes["dapo_norm-0"]
    assert "no step in its metrics" in notes["grpo_norm-0"]
    assert [row["method"] for row in table_of(tmp_path / "out", "countdown")] == ["VL Norm (α = 1)"]
    assert build([str(empty)], tmp_path / "alone", console=quiet()) == 0


def test_a_run_without_any_validation_is_left_out_of_the_tables(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={1: 0.5})
    (folder / "metrics-000.jsonl").write_text(record(1, **{"actor__grad_norm": 1.0}))
    run = read_one(folder)
    assert "no validation" in run.notes
    assert [table.name for table in tables.tables([run])] == ["inputs"]


# ---------------------------------------------------------------------------------------------------------- finding


def test_runs_are_found_below_a_folder_but_not_in_their_own_dumps(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "b", curve={1: 0.5}, dumps={1: {"p": [1]}})
    other = write_run(tmp_path / "a", "dapo_norm", curve={1: 0.5})
    (other / "rollouts").mkdir()
    (other / "rollouts" / "1.jsonl").write_text(record(1, a=1.0))
    plain = tmp_path / "a" / "project"
    plain.mkdir()
    (plain / "experiment.jsonl").write_text(record(1, a=1.0))
    (plain / "notes.jsonl").write_text('{"step": "no", "data": 3}\n')
    assert sorted(run.name for run in read_runs([str(tmp_path)])) == ["dapo_norm-0", "experiment", "vl_norm-1.0-0"]


def test_a_run_that_is_given_twice_is_read_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={1: 0.5})
    assert len(read_runs([str(folder), str(tmp_path), f"{folder}/"])) == 1


def test_a_label_is_the_method_and_several_seeds_are_counted(tmp_path: Path) -> None:
    for name, value in (("x", 0.5), ("y", 0.7)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"step": 5, "data": accuracy(value)}) + "\n")
    runs = read_runs(
        [f"token-mean={tmp_path}/x.jsonl", f"token-mean={tmp_path}/y.jsonl", f"vl_norm:0.5={tmp_path}/x.jsonl"]
    )
    assert [run.method_key for run in runs] == ["dapo_norm", "dapo_norm"]  # the third is the first again
    assert [run.seed for run in runs] == [0, 1]
    assert "its seed is not known: counted as seed 1" in runs[1].notes
    (row,) = made(runs, "runs")
    assert row["Avg@8"].value == pytest.approx(0.6)
    assert row["seeds"] == 2
    assert read_runs([f"vl_norm:0.5={tmp_path}/x.jsonl"])[0].method_key == "vl_norm:0.5"


def test_a_label_of_several_runs_only_names_those_that_say_their_method(tmp_path: Path) -> None:
    for method in ("vl_norm:1.0", "dapo_norm"):
        write_run(tmp_path / "runs", method, curve={10: 0.5})
    runs = read_runs([f"mine={tmp_path}/runs"])
    assert [(run.name, run.method_key) for run in runs] == [
        ("mine/dapo_norm-0", "dapo_norm"),
        ("mine/vl_norm-1.0-0", "vl_norm:1"),
    ]
    assert not any("left out" in row["notes"] for row in made(runs, "inputs"))
    alone = read_one(f"grpo_norm={tmp_path}/runs/dapo_norm-0")
    assert (alone.name, alone.method_key) == ("grpo_norm", "grpo_norm")
    for name in ("x", "y"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"step": 5, "data": accuracy(0.5)}) + "\n")
    (tmp_path / "runs").rename(tmp_path / ".hidden")
    assert [run.method_key for run in read_runs([f"dr_grpo={tmp_path}"])] == ["dr_grpo", "dr_grpo"]


def test_several_experiments_in_one_folder_share_no_configuration_and_no_dumps(tmp_path: Path) -> None:
    """verl's file logger writes PROJECT/EXPERIMENT.jsonl; PROJECT's dumps are the last experiment's."""
    folder = write_run(tmp_path, dumps={10: {"p": [1] * 8, "q": [0] * 8}})
    (folder / "metrics-000.jsonl").rename(folder / "a.jsonl")
    assert read_one(folder).method_key == "vl_norm:1"
    (folder / "b.jsonl").write_text((folder / "a.jsonl").read_text())
    for argument in (folder, folder / "a.jsonl"):
        for run in read_runs([str(argument)]):
            assert (run.method_key, run.validations, run.planned_steps) == (run.name, {}, None)
            assert "several runs' *.jsonl in its folder: configuration and dumps there not used" in run.notes


def test_a_path_with_an_equals_sign_needs_no_label(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "lr=1", curve={1: 0.5})
    assert read_one(folder).method_key == "vl_norm:1"


@pytest.mark.parametrize(
    ("argument", "says"),
    [("nowhere", "there is no nowhere"), ("a=nowhere", "there is no nowhere"), (".", "no run there")],
)
def test_what_is_no_run_is_refused_in_one_message(
    argument: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    console = Console(record=True, file=io.StringIO(), width=400)
    assert build([argument], tmp_path / "out", console=console) == 2
    assert says in (text := console.export_text())
    assert "metrics-NNN.jsonl" in text or "Accepted:" in text
    assert not (tmp_path / "out").exists()


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert build([str(SAMPLES)], tmp_path / "out", smooth=0, console=quiet()) == 2
    assert build([str(SAMPLES)], tmp_path / "file", console=quiet()) == 2


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nothing can be made")
def test_a_folder_that_cannot_be_made_is_refused_before_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlnorm_verl.report.build.read_runs", lambda *_: pytest.fail("read"))
    console = Console(record=True, file=io.StringIO(), width=400)
    assert build([str(SAMPLES)], Path("/proc/nope"), console=console) == 2
    assert "--out /proc/nope: cannot be made" in console.export_text()


@pytest.mark.parametrize("content", ["", "[1]", '{"files": 3}', "\xff"])
def test_a_broken_record_of_what_was_written_is_none(content: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", curve={1: 0.5, 2: 0.6})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".written.json").write_text(content, encoding="latin-1")
    assert build([str(folder)], tmp_path / "out", console=quiet()) == 0
    assert "tables/countdown.csv" in json.loads((tmp_path / "out" / ".written.json").read_text())["files"]


def test_the_command(tmp_path: Path) -> None:
    import typer

    from vlnorm_verl.report.cli import report

    app = typer.Typer()
    app.command()(report)
    result = CliRunner().invoke(app, [str(SAMPLES), "--out", str(tmp_path), "--smooth", "2"], env={"COLUMNS": "250"})
    assert result.exit_code == 0, result.output
    assert "DAPO Norm" in result.output
    assert f"page: {tmp_path}/report.html" in result.output
    assert "No runs for the table 'Full DAPO'" in result.output
    assert CliRunner().invoke(app, ["nowhere"]).exit_code == 2


def test_a_second_report_removes_what_it_has_no_runs_for(tmp_path: Path) -> None:
    write_run(tmp_path / "a", curve={1: 0.5, 2: 0.6})
    write_run(tmp_path / "b", curve={1: 0.5, 2: 0.6}, recipe={"task": "other"})
    (tmp_path / "out" / "tables").mkdir(parents=True)
    (tmp_path / "out" / "tables" / "mine.csv").write_text("kept")
    assert build([str(tmp_path / "a")], tmp_path / "out", console=quiet()) == 0
    assert (tmp_path / "out" / "tables" / "countdown.csv").exists()
    assert build([str(tmp_path / "b")], tmp_path / "out", console=quiet()) == 0
    names = {file.name for file in (tmp_path / "out" / "tables").glob("*.csv")}
    assert names == {"runs.csv", "inputs.csv", "mine.csv"}


# ------------------------------------------------------------------------------------------------ other configurations


def test_a_plain_run_of_verl_with_hydras_configuration(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 7, "data": accuracy(0.5)}) + "\n")
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(
        "base: ${oc.env:NOT_SET_ANYWHERE}/x\n"
        "actor_rollout_ref: {actor: {loss_agg_mode: seq-mean-token-mean}, model: {path: /models/Qwen2.5-3B}}\n"
        "data: {seed: 4, max_response_length: 512, val_files: ['${base}']}\n"
        "steps: 50\n"
        "trainer: {total_training_steps: '${steps}', validation_data_dir: null}\n"
    )
    run = read_one(tmp_path)
    assert (run.method_key, run.seed, run.planned_steps) == ("grpo_norm", 4, 50)
    assert run.setting == Setting(model="Qwen2.5-3B", length="512")
    assert [row["step"] for row in made([run], "runs")] == ["7 of 50"]


def test_the_mode_that_was_trained_decides_over_the_recipes_alpha(tmp_path: Path) -> None:
    run = read_one(write_run(tmp_path, "vl_norm:0.5", curve={1: 0.5}))
    assert run.method_key == "vl_norm:0.5"
    assert read_one(write_run(tmp_path, "dapo_norm", curve={1: 0.5})).method_key == "dapo_norm"


TRACKED = """
import sys
from verl.utils.tracking import Tracking
config = {"trainer": {"total_training_steps": 9}, "data": {"seed": 5},
          "actor_rollout_ref": {"actor": {"loss_agg_mode": "vl_norm:0.5"}}}
tracking = Tracking("project", "experiment", default_backend=["wandb", "tensorboard"], config=config)
for step in range(0, 60, 2):
    data = {f"filler/{i}": float(i * step) for i in range(150)}
    data |= {"actor/entropy": float("nan") if step == 4 else step / 8, "val-core/x/acc/mean@8": step / 128}
    tracking.log(data, step=step)
tracking.finish()
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tensorboard folder and an offline wandb run as verl's own Tracking writes them."""
    folder = tmp_path_factory.mktemp("tracked")
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "TENSORBOARD_DIR": str(folder / "tensorboard")}
    variables |= {"WANDB_SILENT": "true", "WANDB_CONFIG_DIR": str(folder), "WANDB_CACHE_DIR": str(folder)}
    subprocess.run(
        [sys.executable, "-c", TRACKED], env={**os.environ, **variables}, cwd=folder, check=True, capture_output=True
    )
    return folder


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_runs_of_other_loggers(tracked: Path, kind: str) -> None:
    run = read_one(tracked / kind)
    assert run.steps.tolist() == list(range(0, 60, 2))
    assert run.metrics["actor/entropy"][:4].tolist() == pytest.approx([0, 0.25, np.nan, 0.75], nan_ok=True)
    assert run.metrics["val-core/x/acc/mean@8"].tolist() == pytest.approx([step / 128 for step in range(0, 60, 2)])
    assert run.metrics["filler/149"][-1] == 149 * 58
    if kind == "wandb":
        assert (run.method_key, run.seed, run.planned_steps) == ("vl_norm:0.5", 5, 9)


def test_an_offline_wandb_file_that_is_cut(tracked: Path, tmp_path: Path) -> None:
    (file,) = tracked.rglob("*.wandb")
    content = file.read_bytes()
    (tmp_path / "run-x.wandb").write_bytes(content[: len(content) * 2 // 3])
    run = read_one(tmp_path / "run-x.wandb")
    assert 5 < len(run.steps) < 30
    assert run.metrics["filler/149"].tolist() == [149.0 * step for step in run.steps]
    assert "run-x.wandb: the end is cut, left out" in run.notes
    (tmp_path / "bad.wandb").write_bytes(b"something else")
    with pytest.raises(UserError, match="not a file of wandb"):
        read_runs([str(tmp_path / "bad.wandb")])


@pytest.mark.parametrize(("kind", "library"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_library_is_named(tracked: Path, kind: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == library] + [library]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {library}"):
        read_runs([str(tracked / kind)])


# ------------------------------------------------------------------------------------------------------------- dumps


def test_acc_counts_before_score_and_booleans_count(tmp_path: Path) -> None:
    file = tmp_path / "0.jsonl"
    lines = [dump_line("p", 1, acc=0.0), dump_line("p", 0, acc=True), dump_line("q", 1, acc=None), dump_line("q", 0)]
    file.write_text("".join(lines))
    found = dumps.count(file, [])[""]
    assert (found.n, found.correct) == ([2, 2], [1.0, 1.0])


def test_equal_prompts_with_other_answers_are_other_problems(tmp_path: Path) -> None:
    file = tmp_path / "0.jsonl"
    file.write_text(dump_line("p", 1, gts={"a": 1}) + dump_line("p", 1, gts={"a": 2}) + dump_line("p", 0, gts={"a": 1}))
    assert sorted(dumps.count(file, [])[""].n) == [1, 2]


def test_a_dump_that_is_being_written(tmp_path: Path) -> None:
    dumps = {1: {f"p{i}": [1, 0] * 4 for i in range(5)}}
    folder = write_run(tmp_path, curve={1: 20 / 39}, dumps=dumps)
    file = folder / "validation" / "1.jsonl"
    text = file.read_text()
    file.write_text(text[: text.rindex('"output"')])
    run = read_one(folder)
    assert run.validations[1]["set"].n.tolist().count(7) == 1
    assert "1.jsonl: last line is cut, left out" in run.notes
    assert "validation/1.jsonl: 1 of 5 problems have fewer than 8 responses" in run.notes
    assert measures.final_pass([run]).value == 1.0
    assert measures.final_pass([run]).note == "one seed; 4 of 5 problems"


def test_a_dump_that_does_not_agree_with_verls_metrics_is_not_used(tmp_path: Path) -> None:
    dumps = {step: {"p": [1, 0] * 4, "q": [1, 0] * 4} for step in (1, 2)}
    run = read_one(write_run(tmp_path, curve={1: 0.5, 2: 0.6}, dumps=dumps))
    assert "validation/2.jsonl: its accuracy is 0.5000, verl logged 0.6000 at that step: not used" in run.notes
    assert not any("no validation dump" in note for note in run.notes)
    assert sorted(run.validations) == [1]
    found = measures.final_accuracy([run])
    assert (found.value, np.isnan(found.low), found.note) == (0.6, True, "no dumps")
    assert measures.final_pass([run]) is None


def test_graded_scores_have_an_average_but_no_pass(tmp_path: Path) -> None:
    run = read_one(write_run(tmp_path, dumps={1: {f"p{i}": [0.5, 1.0] * 4 for i in range(4)}}))
    assert not run.validations[1]["set"].binary
    assert measures.final_accuracy([run]).value == 0.75
    assert measures.final_pass([run]) is None


def test_counts_are_kept_until_a_dump_changes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", curve={1: 0.5}, dumps={1: {"p": [1, 0], "q": [1, 0]}})
    file = folder / "validation" / "1.jsonl"
    before = read_one(folder, cache_folder=tmp_path / "out")
    stat = file.stat()
    file.write_text(file.read_text().replace('"acc": 0', '"acc": 1'))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    kept = read_one(folder, cache_folder=tmp_path / "out")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    (folder / "metrics-000.jsonl").write_text(json.dumps({"step": 1, "data": accuracy(1.0)}) + "\n")
    changed = read_one(folder, cache_folder=tmp_path / "out")
    found = [run.validations[1]["set"].correct.sum() for run in (before, kept, changed)]
    assert found == [2, 2, 4]
    assert before.validations[1]["set"].problems == changed.validations[1]["set"].problems
    np.testing.assert_array_equal(before.validations[1]["set"].characters, kept.validations[1]["set"].characters)


def test_a_cache_of_something_else_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / dumps.CACHE_FILE).write_bytes(b"\xc1 something else")
    folder = write_run(tmp_path / "run", curve={1: 0.5}, dumps={1: {"p": [1, 0]}})
    assert read_one(folder, cache_folder=tmp_path).validations[1]["set"].correct.tolist() == [1]


# --------------------------------------------------------------------------------------------- several validation sets

SETS = {"aime2024": 4, "amc": 6, "math500": 20, "minerva": 10}


def write_math(root: Path, method: str, right: dict[str, int], seed: int = 0, field: bool = True) -> Path:
    """right: how many of eight responses are right in each problem of a set."""
    recipe = {"task": "math", "alpha": 0.75}
    folder = write_run(root, method, seed, curve={0: 0.0}, recipe=recipe)
    data = {key: v for name, count in right.items() for key, v in accuracy(count / 8, name).items()}
    (folder / "metrics-000.jsonl").write_text(json.dumps({"step": 1000, "data": data}) + "\n")
    (folder / "validation").mkdir()
    lines = [
        dump_line(f"{name} {i}", float(r < right[name]), **({"validation_set": name} if field else {}))
        for name, size in SETS.items()
        for i in range(size)
        for r in range(8)
    ]
    (folder / "validation" / "1000.jsonl").write_text("".join(lines))
    return folder


def test_a_real_run_with_four_sets(tmp_path: Path) -> None:
    """verl drew eight problems of the four sets; two sets have a single one, which has no interval."""
    run = read_one(SAMPLES / "aggregation-math-tiny-128-vl_norm-seed0")
    sizes = {name: len(found.problems) for name, found in run.validations[2].items()}
    assert sizes == {"aime2024": 3, "amc": 1, "math500": 3, "minerva": 1}
    (row,) = made([run], "math")
    own = {name: run.metrics[f"val-core/{name}/acc/mean@8"][-1] for name in sizes}
    for name, column in tables.MATH_SETS.items():
        assert row[column].value == pytest.approx(own[name])
        assert np.isnan(row[column].low) == (sizes[name] == 1)
    expected = sum(own[name] * size for name, size in sizes.items()) / 8
    assert row["weighted Avg@8"].value == pytest.approx(expected)
    assert "paper's weighted Avg@8" not in row
    assert run.notes == ["no validation dump of steps 0"]


def test_sets_are_weighted_by_their_size(tmp_path: Path) -> None:
    right = {"aime2024": 0, "amc": 4, "math500": 6, "minerva": 2}
    folders = [write_math(tmp_path, "vl_norm:0.75", right), write_math(tmp_path, "grpo_norm", dict.fromkeys(SETS, 2))]
    grpo, vl = made(read_runs(list(map(str, folders))), "math")
    assert (grpo["method"], vl["method"]) == ("GRPO Norm", "VL Norm (α = 0.75)")
    assert [vl[name].value for name in ("AIME2024", "AMC", "MATH500", "Minerva")] == [0, 0.5, 0.75, 0.25]
    expected = (0 * 4 + 0.5 * 6 + 0.75 * 20 + 0.25 * 10) / 40
    assert vl["weighted Avg@8"].value == pytest.approx(expected)
    assert vl["weighted Pass@8"].value == pytest.approx(36 / 40)
    assert grpo["VL Norm minus this"].value == pytest.approx(expected - 0.25)
    assert vl["VL Norm minus this"] is None
    assert vl["paper's weighted Avg@8"] == "not found"
    steps, values = measures.accuracy_curve(read_one(folders[0]))
    assert (steps.tolist(), values.tolist()) == ([1000], [pytest.approx(expected)])


def test_dumps_that_do_not_say_the_set_leave_verls_numbers_without_intervals(tmp_path: Path) -> None:
    run = read_one(write_math(tmp_path, "vl_norm:0.75", dict.fromkeys(SETS, 2), field=False))
    (row,) = made([run], "math")
    assert (row["AMC"].value, row["AMC"].note) == (0.25, "no dumps")
    assert np.isnan(row["AMC"].low)
    assert not [column for column in row if column.startswith("weighted")]
    assert any("do not say which validation set" in note for note in run.notes)
    assert "there is no weighted average" in foot([run], "math")


# ---------------------------------------------------------------------------------------- seeds, differences, settings


def random_dump(seed: int, rate: float, problems: int = 40) -> dict[str, list[int]]:
    generator = np.random.default_rng(seed)
    return {f"p{i}": generator.binomial(1, rate, 8).tolist() for i in range(problems)}


def test_one_seed_says_so_and_more_seeds_do_not(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, seed=s, dumps={10: random_dump(s, 0.5)}) for s in range(3)]
    runs = read_runs(list(map(str, folders)))
    assert measures.final_accuracy(runs[:1]).note == "one seed"
    assert measures.final_accuracy(runs).note == ""
    assert [row["seeds"] for row in made(runs, "countdown")] == [3]


def test_without_dumps_the_interval_is_over_seeds(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, seed=s, curve={10: 0.5 + s / 10}) for s in range(3)]
    found = measures.final_accuracy(read_runs(list(map(str, folders))))
    assert found.value == pytest.approx(0.6)
    assert found.high - found.value == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert found.note == "no dumps, over seeds only"


def test_two_runs_of_one_seed_are_not_two_seeds(tmp_path: Path) -> None:
    short = write_run(tmp_path / "a", curve={10: 0.1})
    full = write_run(tmp_path / "b", curve={10: 0.5, 20: 0.9})
    for order in ([short, full], [full, short]):
        runs = read_runs(list(map(str, order)))
        (row,) = made(runs, "countdown")
        assert (row["seeds"], row["Avg@8"].value) == (1, 0.9)
        assert [("left out" in entry["notes"], entry["last step"][:2]) for entry in made(runs, "inputs")] == [
            (run.folder == short, "10" if run.folder == short else "20") for run in runs
        ]


def test_the_difference_is_paired_within_a_setting_only(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "3b", dumps={10: random_dump(1, 0.6)}),
        write_run(tmp_path / "3b", "grpo_norm", dumps={10: random_dump(2, 0.4)}),
        write_run(tmp_path / "7b", "grpo_norm", dumps={10: random_dump(3, 0.4)}, recipe={"model": "7b"}),
    ]
    runs = read_runs(list(map(str, folders)))
    rows = {(row["model"], row["method"]): row["VL Norm minus this"] for row in made(runs, "countdown")}
    a, b = random_dump(1, 0.6), random_dump(2, 0.4)
    expected = np.mean([np.mean(a[p]) - np.mean(b[p]) for p in a])
    assert rows["3b", "GRPO Norm"].value == pytest.approx(expected)
    assert rows["3b", "GRPO Norm"].low < expected < rows["3b", "GRPO Norm"].high
    assert rows["7b", "GRPO Norm"] is None


def test_a_difference_that_cannot_be_paired_has_no_interval(tmp_path: Path) -> None:
    """Two seeds of other problems against one run of another seed, and runs without dumps."""
    dumps = [{f"{seed}-{p}": found for p, found in random_dump(seed, 0.5).items()} for seed in (0, 1)]
    vl = read_runs([str(write_run(tmp_path, seed=seed, dumps={10: dumps[seed]})) for seed in (0, 1)])
    one = read_one(write_run(tmp_path, "grpo_norm", seed=2, dumps={10: random_dump(2, 0.5)}))
    bare = read_one(write_run(tmp_path, "dapo_norm", curve={10: 0.25}))
    for other, ours, note in ((one, vl, "not paired"), (bare, vl[:1], "not paired; 1 of 2 seeds: no interval")):
        found = measures.difference(vl, [other])
        expected = measures.final_accuracy(ours).value - measures.final_accuracy([other]).value
        assert found.value == pytest.approx(expected)
        assert (np.isnan(found.low), found.note) == (True, note)
    assert measures.final_accuracy(vl).note == "other problems in each seed"
    assert measures.final_pass(vl).note == "other problems in each seed"


def test_a_difference_is_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    vl = read_runs([str(write_run(tmp_path, seed=s, dumps={10: random_dump(s, 0.6)})) for s in (0, 1, 2)])
    other = read_runs(
        [str(write_run(tmp_path, "dapo_norm", seed=s, dumps={10: random_dump(9 + s, 0.4)})) for s in (1, 2)]
    )
    found, same = measures.difference(vl, other), measures.difference(vl[1:], other)
    assert (found.value, found.low, found.high) == (same.value, same.low, same.high)
    assert (found.note, same.note) == ("2 of 3 seeds", "")
    apart = measures.difference(vl[:1], other)
    assert (apart.note, np.isfinite(apart.low)) == ("one seed", True)


def test_a_seed_that_is_not_as_far_is_not_in_the_final_values(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path, dumps={400: random_dump(0, 0.4), 450: random_dump(1, 0.5)}),
        write_run(tmp_path, seed=1, dumps={400: random_dump(2, 0.1)}),
        write_run(tmp_path, "grpo_norm", dumps={400: random_dump(3, 0.3), 1000: random_dump(4, 0.6)}),
    ]
    runs = read_runs(list(map(str, folders)))
    grpo, vl = made(runs, "countdown")
    alone = made([runs[0]], "countdown")[0]
    for column in ("Avg@8", "Pass@8", "monotonicity"):
        assert vl[column] == alone[column]
    assert (grpo["step"], vl["step"]) == ("1000", "450 of 1000")
    assert (grpo["seeds"], vl["seeds"]) == (1, "1 of 2")
    text = foot(runs, "countdown")
    assert "Not finished: vl_norm-1.0-0 (450 of 1000), vl_norm-1.0-1 (400 of 1000)." in text
    assert "Not as far as another seed of its row, so not in the row's values: vl_norm-1.0-1 (step 400)." in text
    assert "rows stand at different steps (450, 1000)" in text
    # Both were validated at step 400, where seed 0 is in both.
    gap = np.mean(list(random_dump(0, 0.4).values())) - np.mean(list(random_dump(3, 0.3).values()))
    assert grpo["VL Norm minus this"].value == pytest.approx(gap)
    assert grpo["VL Norm minus this"].note == "one seed; at step 400; 1 of 2 seeds: no interval"
    assert np.isnan(grpo["VL Norm minus this"].low)


def test_without_a_step_in_common_there_is_no_difference(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, curve={10: 0.5}), write_run(tmp_path, "grpo_norm", curve={15: 0.5})]
    grpo, _ = made(read_runs(list(map(str, folders))), "countdown")
    assert np.isnan(grpo["VL Norm minus this"].value)
    assert grpo["VL Norm minus this"].note == "no validated step in common"


def test_accuracies_that_are_not_avg_at_8_are_not_called_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={10: 0.5})
    data = {"val-core/set/reward/mean@1": 0.25, "val-core/set/reward/best@8/mean": 0.75}
    (folder / "metrics-000.jsonl").write_text(json.dumps({"step": 10, "data": data}) + "\n")
    (row,) = made([run := read_one(folder)], "countdown")
    assert row["Avg@1"].value == 0.25
    assert row["verl's best@8"] == 0.75
    assert "Not Avg@8 of verl's acc: vl_norm-1.0-0: mean@1 of reward." in foot([run], "countdown")
    eight = read_one(write_run(tmp_path / "8", "dapo_norm", curve={10: 0.5}))
    assert "Avg@k" in made([run, eight], "countdown")[0]
    assert "Not Avg@8" not in foot([eight], "countdown")


def test_the_vl_norm_that_others_are_compared_with() -> None:
    of_paper, other = Setting("aggregation", "math", "3b", "3072"), Setting(task="x")
    keys = ["dapo_norm", "vl_norm:0.5", "vl_norm:0.75", "vl_norm:1", "vl_norm"]
    assert groups.main_vl_norm(of_paper, keys) == "vl_norm:0.75"
    assert groups.main_vl_norm(of_paper, ["vl_norm:0.5", "vl_norm:1"]) is None
    assert groups.main_vl_norm(other, keys) == "vl_norm:1"
    assert groups.main_vl_norm(other, keys[:3]) == "vl_norm:0.75"
    assert groups.main_vl_norm(other, ["dapo_norm", "vl_norm"]) is None


def test_which_table_a_run_belongs_to_is_what_its_recipe_says(tmp_path: Path) -> None:
    dapo = {"family": "dapo"}
    folders = [
        write_run(tmp_path / "a", curve={1: 0.5}),
        write_run(tmp_path / "a", "vl_norm:0.5", curve={1: 0.5}),
        write_run(tmp_path / "b", "dapo", curve={1000: 0.5}, recipe=dapo),
        write_run(tmp_path / "b", curve={1000: 0.6}, recipe=dapo),
        write_run(tmp_path / "c", curve={1: 0.5}, recipe={"task": "sudoku"}),
    ]
    runs = read_runs(list(map(str, folders)))
    assert [row["method"] for row in made(runs, "countdown")] == ["VL Norm (α = 1)"]
    assert [row["α"] for row in made(runs, "alpha")] == ["0.5", "1"]
    assert [row["method"] for row in made(runs, "dapo")] == ["DAPO", "DAPO + VL Norm (α = 1)"]
    assert [row["task"] for row in made(runs, "runs")] == ["sudoku"]
    assert [row["paper's accuracy"] for row in made(runs, "dapo")] == ["0.866 [paper, Fig. 2]", "not found"]
    assert made(runs, "dapo")[0]["paper's VL Norm minus this"] == "0.046 [paper, Fig. 2]"
    assert [sentence.split(":")[0] for sentence in tables.missing(tables.tables(runs))] == [
        "No runs for the table 'Math, aggregations'"
    ]


# --------------------------------------------------------------------------------------------- monotonicity, speed-up


def test_monotonicity_is_kendalls_tau_over_the_validations(tmp_path: Path) -> None:
    curve = {0: 0.1, 50: 0.3, 100: 0.2, 150: 0.4, 200: 0.4}
    pairs = list(itertools.combinations(curve.values(), 2))
    concordant, tied = sum(b > a for a, b in pairs), sum(a == b for a, b in pairs)
    tau = (concordant - (10 - concordant - tied)) / np.sqrt(10 * (10 - tied))
    run = read_one(write_run(tmp_path, curve=curve))
    assert measures.monotonicity([run]).value == pytest.approx(tau)
    assert measures.monotonicity([run]).note == "one seed; no dumps"
    falling = read_one(write_run(tmp_path, seed=1, curve={0: 0.9, 100: 0.7, 200: 0.5}))
    found = measures.monotonicity([run, falling])
    assert found.value == pytest.approx((tau - 1) / 2)
    assert (found.low, found.high) == (-1, 1)


def test_monotonicity_of_one_seed_has_an_interval_over_problems(tmp_path: Path) -> None:
    dumps = {step: random_dump(step, 0.3 + step / 100) for step in (0, 10, 20, 30)}
    found = measures.monotonicity([read_one(write_run(tmp_path, dumps=dumps))])
    assert found.note == "one seed"
    assert found.low < found.value <= found.high


@pytest.mark.parametrize(
    ("dumps", "note"),
    [
        ({0: [0, 0, 1], 1: [0, 1, 1]}, "one seed; two validations"),
        ({0: [0], 1: [1], 2: [1]}, "one seed; a set of one problem"),
        ({0: [0, 0], 1: [1, 1], 2: [1, 1]}, "one seed; the same in every resample"),
    ],
)
def test_a_monotonicity_without_an_interval_says_why(dumps: dict[int, list[int]], note: str, tmp_path: Path) -> None:
    named = {step: {f"p{i}": [right] * 8 for i, right in enumerate(found)} for step, found in dumps.items()}
    found = measures.monotonicity([read_one(write_run(tmp_path, dumps=named))])
    assert found.value > 0
    assert (np.isnan(found.low), found.note) == (True, note)


def test_the_papers_count_and_first_hit_against_first_hit(tmp_path: Path) -> None:
    """The paper's 375 against 1000; the reference had been at its final accuracy at step 750."""
    recipe = {"family": "dapo"}
    dapo = write_run(tmp_path, "dapo", curve={250: 0.5, 500: 0.7, 750: 0.87, 1000: 0.866}, recipe=recipe)
    vl = write_run(tmp_path, curve={125: 0.5, 250: 0.7, 375: 0.866, 1000: 0.912}, recipe=recipe)
    rows = made(read_runs([str(dapo), str(vl)]), "speedup")
    raw = next(row for row in rows if row["curve"] == "raw" and row["method"].startswith("DAPO + VL"))
    assert raw["target"].value == pytest.approx(0.866)
    assert [raw[key] for key in ("its last step", "its own first hit", "first hit")] == ["1000", "750", "375"]
    assert raw["last step / first hit"].value == pytest.approx(1000 / 375)
    assert raw["first hit / first hit"].value == pytest.approx(2.0)
    assert raw["last step / first hit"].note == "one seed"
    assert np.isnan(raw["last step / first hit"].low)
    assert raw["paper's first hit"] == "375 (2.67×) [paper, Fig. 2]"
    assert rows[0] == raw, "what VL Norm reaches comes first"
    back = next(row for row in rows if row["curve"] == "raw" and row["method"] == "DAPO")
    assert (back["first hit"], back["first hit / first hit"], back["seeds reached"]) == ("not reached",) * 2 + (
        "0 of 1",
    )


def test_smoothing_treats_both_curves_and_the_target_alike(tmp_path: Path) -> None:
    reference = read_one(write_run(tmp_path, "dapo_norm", curve={10: 0.2, 20: 0.9, 30: 0.4, 40: 0.6}))
    run = read_one(write_run(tmp_path, curve={10: 0.5, 20: 0.5, 30: 0.8, 40: 0.9}))
    raw, smooth = (first_hit.first_hits(run, reference, window) for window in (1, 20))
    assert (raw.reference_first, raw.first) == (20, 30)
    assert (smooth.reference_first, smooth.first) == (20, 10)
    assert (raw.target, smooth.target) == pytest.approx((0.6, 0.5))


def test_a_speed_up_over_seeds_is_a_t_interval_of_logarithms(tmp_path: Path) -> None:
    folders = []
    for seed, hit in enumerate((20, 40, 40)):
        final = 0.6 if seed == 2 else 0.5
        rising = {step: 0.9 if step >= hit else 0.1 for step in (20, 40, 80)}
        folders.append(write_run(tmp_path, seed=seed, curve=rising, planned=80))
        folders.append(write_run(tmp_path, "dapo_norm", seed=seed, curve={20: 0.1, 40: 0.2, 80: final}, planned=80))
    runs = read_runs(list(map(str, folders)))
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
    # Steps and ratios are of the same two seeds.
    assert (partly.target, partly.first, partly.reference_last) == (0.5, 30, 80)
    assert partly.by_last.value == pytest.approx(np.exp(logs[:2].mean()))
    assert first_hit.speed_up([vl[0], never], dapo[::2], 1).by_last.note == "of the seed that reached"


def test_an_unfinished_run_is_neither_a_target_nor_out_of_reach(tmp_path: Path) -> None:
    done = read_one(write_run(tmp_path, "dapo_norm", curve={0: 0.1, 50: 0.5, 100: 0.6}, planned=100))
    begun = read_one(write_run(tmp_path, curve={0: 0.1, 50: 0.2}, planned=100))
    rows = [row for row in made([done, begun], "speedup") if row["curve"] == "raw"]
    assert [row["method"] for row in rows] == ["VL Norm (α = 1)", "DAPO Norm"]
    assert [rows[0][key] for key in ("first hit", *tables.RATIOS)] == ["not yet (step 50)"] * 3
    assert rows[0]["its own first hit"] == "100"
    assert rows[1]["target"].note == "the reference is not finished (step 50 of 100)"
    assert np.isnan(rows[1]["target"].value)
    assert [rows[1][key] for key in ("its last step", "its own first hit", "first hit", *tables.RATIOS)] == [None] * 5
    other = read_one(write_run(tmp_path, "dapo_norm", seed=1, curve={0: 0.1, 50: 0.5}, planned=100))
    ours = [read_one(write_run(tmp_path / "x", seed=s, curve={0: 0.1, 50: 0.7, 100: 0.8}, planned=100)) for s in (0, 1)]
    found = first_hit.speed_up(ours, [done, other], 1)
    assert (found.pairs, found.reached, found.first) == (1, 1, 50)
    assert found.note == "the reference is not finished (step 50 of 100) in 1 of 2 seeds, which are left out"


def test_a_target_that_was_met_before_training_gives_no_ratio(tmp_path: Path) -> None:
    run = read_one(write_run(tmp_path, curve={0: 0.5, 10: 0.6}))
    reference = read_one(write_run(tmp_path, "dapo_norm", curve={0: 0.5, 10: 0.4}, planned=10))
    found = first_hit.speed_up([run], [reference], 1)
    assert found.by_last is None
    assert found.note == "the target was met before training"


@given(st.dictionaries(st.integers(0, 100), st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 40))
def test_trailing_mean(curve: dict[int, float], window: int) -> None:
    steps = sorted(curve)
    expected = [np.mean([curve[other] for other in steps if step - window < other <= step]) for step in steps]
    found = measures.trailing_mean(np.array(steps), np.array([curve[step] for step in steps]), window)
    assert found.tolist() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------- the paper


def test_every_value_of_the_paper_has_its_label_and_source() -> None:
    assert len(paper.values()) == 10
    for known in paper.values():
        assert known.label.startswith(("paper", "second-hand"))
        assert known.source
        assert known.metric in ("accuracy", "first_hit", "speed_up", "vl_norm_minus_this", "avg@8", "pass@8", "remark")


def test_the_papers_values_are_given_to_their_setting_only() -> None:
    at = Setting("aggregation", "countdown", "3b", "3072")
    assert paper.cell(at, "grpo_norm", "avg@8") == "0.811 [second-hand, of v1]"
    assert paper.cell(at, "vl_norm:1", "avg@8") == "0.847 [second-hand, of v1]"
    assert paper.cell(at, "vl_norm:0.5", "avg@8") == "not found"
    assert paper.cell(at._replace(length="8192"), "vl_norm:1", "avg@8") == "not found"
    assert paper.cell(at._replace(model="tiny"), "vl_norm:1", "avg@8") is None


def test_the_foot_says_where_the_papers_values_were_read_and_what_concerns_its_rows(tmp_path: Path) -> None:
    three = read_one(write_run(tmp_path / "3b", "grpo_norm", curve={10: 0.5}))
    seven = read_one(write_run(tmp_path / "7b", curve={10: 0.5}, recipe={"model": "7b"}))
    tiny = read_one(write_run(tmp_path / "tiny", curve={10: 0.5}, recipe={"model": "tiny"}))
    texts = [foot([run], "countdown") for run in (three, seven, tiny)]
    assert ["CountDown 7B: in the paper's table GRPO Norm" in text for text in texts] == [False, True, False]
    assert ["entropy under VL Norm: between 0.1 and 0.2" in text for text in texts] == [False, True, False]
    assert ["a digest of the paper's first version" in text for text in texts] == [True, False, False]
    dapo = read_one(write_run(tmp_path / "d", "dapo", curve={1000: 0.5}, recipe={"family": "dapo"}))
    assert "the length is that of the authors' scripts [code]" in foot([dapo], "dapo")


def test_an_estimate_is_what_the_tables_hold(tmp_path: Path) -> None:
    (row,) = made([read_one(write_run(tmp_path, dumps={5: random_dump(0, 0.5)}))], "countdown")
    assert isinstance(row["Avg@8"], Estimate)
    assert isinstance(row["Pass@8"], Estimate)
