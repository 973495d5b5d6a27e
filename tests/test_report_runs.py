"""Runs as users have them: resumed, with bad values, named in their own ways, with gaps.

Covered: what real writers write (JSON lines, tensorboard, offline wandb). Not covered here: the tables of complete runs
(tests/test_report.py).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.test_report import accuracy, dump_line, foot, made, quiet, random_dump, table_of, write_run
from vlnorm_verl.files import UserError
from vlnorm_verl.report import first_hit, groups, measures
from vlnorm_verl.report.build import build
from vlnorm_verl.report.read import read_runs
from vlnorm_verl.report.run import Run, value_at

KEY = "val-core/set/acc/mean@8"


def line(step: int, offset: float = 0.0, **more: Any) -> str:
    """A training step of verl, validated every tenth step: accuracy 0.3 + step / 200 + offset."""
    data = {"training/global_step": step, "actor/grad_norm": 0.5}
    if step % 10 == 0:
        data |= accuracy(round(0.3 + step / 200 + offset, 4))
    return json.dumps({"step": step, "data": {**data, **more}}) + "\n"


def text(*spans: tuple[int, int, float]) -> str:
    """The lines of starts from a first to a last step."""
    return "".join(line(step, offset) for first, last, offset in spans for step in range(first, last + 1))


def put(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def read(*arguments: Any, **options: Any) -> list[Run]:
    return read_runs([str(argument) for argument in arguments], **options)


def said(runs: list[Run]) -> list[tuple[str, int]]:
    return [(run.method_key, run.seed) for run in runs]


# --------------------------------------------------------------------------------------------------------- resumed

TRACK = """
import json, os, sys, wandb
from verl.utils.tracking import Tracking
for start in json.load(sys.stdin):
    os.environ |= start["variables"]
    config = {"actor_rollout_ref": {"actor": {"loss_agg_mode": "vl_norm", "limit": float("inf")}},
              "data": {"seed": start["seed"]},
              "trainer": {"total_training_steps": 60, "resume_from_path": start["variables"]["TENSORBOARD_DIR"]}}
    tracking = Tracking("project", "experiment", default_backend=["file", "wandb", "tensorboard"], config=config)
    for text in start["lines"].splitlines():
        tracking.log(**json.loads(text))
    tracking.finish()
    wandb.teardown()  # it would go on writing into the first start's folder
"""
CRASHED, RESUMED = text((0, 50, 0.0)), text((41, 60, 0.1))
STARTS = {  # folder: starts, their seeds
    "resumed": ((CRASHED, 7), (text((0, 60, 0.0)), 8), (RESUMED, 7)),
    "by-wandb": ((CRASHED, 7), (text((0, 20, 0.1)), 7)),
}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What verl's own Tracking writes of runs that were started more than once: STARTS, each with three loggers."""
    root = tmp_path_factory.mktemp("tracked")
    starts = []
    for name, of_folder in STARTS.items():
        for lines, seed in of_folder:
            here = {"WANDB_DIR": str(root / name), "TENSORBOARD_DIR": str(root / name / f"tensorboard-{seed}")}
            here |= {"VERL_FILE_LOGGER_PATH": str(root / name / f"seed{seed}.jsonl")}
            here |= {"WANDB_RUN_ID": "abc", "WANDB_RESUME": "allow"} if name == "by-wandb" else {}
            starts.append({"variables": here, "lines": lines, "seed": seed})
            (root / name).mkdir(exist_ok=True)
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(root)}
    command, variables = [sys.executable, "-c", TRACK], {**os.environ, **offline}
    subprocess.run(command, input=json.dumps(starts), env=variables, check=True, capture_output=True, text=True)
    return root


def test_a_jsonl_in_which_the_step_goes_back(tmp_path: Path) -> None:
    (run,) = read(put(tmp_path / "run.jsonl", text((0, 50, 0.0), (41, 45, 0.1), (21, 30, 0.2))))
    assert run.steps.tolist() == list(range(31))
    assert [value_at(run, run.metrics[KEY], step) for step in (20, 30)] == [0.4, 0.65]
    assert "run.jsonl: starts again at step 41; 9 later steps of the earlier start left out" in run.notes
    assert "run.jsonl: starts again at step 21; 24 later steps of the earlier start left out" in run.notes


def test_tensorboard_and_wandb_folders_of_a_resumed_run(tracked: Path) -> None:
    """Two starts, and another seed of the same configuration."""
    (one,) = read(tracked / "resumed" / "tensorboard-7")
    runs = read(tracked / "resumed" / "wandb")
    assert said(runs) == [("vl_norm:1", 7), ("vl_norm:1", 8)]
    assert len({run.name for run in runs}) == 2
    for run in (one, runs[0]):
        assert run.steps.tolist() == list(range(61))
        assert [value_at(run, run.metrics[KEY], s) for s in (40, 50, 60)] == pytest.approx([0.5, 0.65, 0.7])
        assert any("starts again at step 41; 9 later steps of the earlier start left out" in note for note in run.notes)


def test_wandbs_own_resumption_is_one_run_whatever_its_steps(tracked: Path) -> None:
    (run,) = read(tracked / "by-wandb" / "wandb")
    assert run.steps[-1] == 20
    assert value_at(run, run.metrics[KEY], 20) == 0.5


def test_one_run_by_three_loggers_is_one_run(tracked: Path) -> None:
    """verl's file logger kept only the last start."""
    runs = read(tracked / "resumed")
    assert [(run.method_key, run.seed) for run in runs if len(run.steps)] == [("vl_norm:1", 7), ("vl_norm:1", 8)]
    assert sum("by another logger: left out" in " ".join(run.notes) for run in runs) == len(runs) - 2 == 4


def test_files_of_one_seed_are_joined_where_the_later_does_not_begin_at_the_beginning(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", CRASHED)
    put(tmp_path / "b.jsonl", RESUMED)
    (run,) = read(f"vl_norm@3={tmp_path}/b.jsonl", f"vl_norm@3={tmp_path}/a.jsonl")
    assert (run.seed, run.steps[-1], value_at(run, run.metrics[KEY], 50)) == (3, 60, 0.65)
    assert [run.seed for run in read(f"vl_norm={tmp_path}/a.jsonl", f"vl_norm={tmp_path}/b.jsonl")] == [0, 1]
    put(tmp_path / "b.jsonl", text((0, 20, 0.1)))
    twice = read(f"vl_norm@3={tmp_path}/a.jsonl", f"vl_norm@3={tmp_path}/b.jsonl")
    assert [run.steps[-1] for run in twice] == [50, 20]
    assert [run.steps[-1] for run in groups.grouped(twice).popitem()[1]] == [50]


# ------------------------------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "null"])
def test_a_value_that_is_not_finite_is_its_metrics_only(number: str, tmp_path: Path) -> None:
    content = text((0, 40, 0.0)).replace('"actor/grad_norm": 0.5', f'"actor/grad_norm": {number}')
    (run,) = read(put(tmp_path / "run.jsonl", content))
    assert run.steps[-1] == 40
    assert value_at(run, run.metrics[KEY], 40) == 0.5
    assert not any("corrupt" in note for note in run.notes)


@pytest.mark.parametrize("start", ["\n", "\ufeff", "\ufeff\n\n", 'p": 3}}\n', "nothing\n" * 9])
def test_a_file_is_found_whatever_its_first_lines_are(start: str, tmp_path: Path) -> None:
    put(tmp_path / "run.jsonl", start + text((0, 40, 0.0)))
    for argument in (tmp_path, tmp_path / "run.jsonl"):
        (run,) = read(argument)
        assert run.steps[-1] == 40


def test_texts_are_not_touched_where_a_line_has_nan(tmp_path: Path) -> None:
    """A problem is one problem, whether its line has a NaN in another field or not."""
    folder = write_run(tmp_path, dumps={40: {'is 1 NaN? \\" -Infinity': [1, 0] * 4, "q": [1] * 8}})
    file = folder / "validation" / "40.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("".join(one[:-1] + (', "penalty": NaN}\n' if i % 2 else "}\n") for i, one in enumerate(lines)))
    (run,) = read(folder)
    assert sorted(run.validations[40]["set"].n.tolist()) == [8, 8]
    assert sorted(run.validations[40]["set"].correct.tolist()) == [4, 8]


def test_a_cut_line_full_of_quotes_takes_no_time(tmp_path: Path) -> None:
    (run,) = read(put(tmp_path / "run.jsonl", line(1) + '{"step": 2, "data": {"NaN": "' + '\\"' * 300_000))
    assert run.notes[0] == "run.jsonl: last line is cut, left out"


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ({"acc": "True", "score": 0.0}, 1),
        ({"acc": "False", "score": 1.0}, 0),
        ({"acc": "1.0"}, 1),
        ({"acc": [1], "score": 1.0}, None),
        ({"score": math.nan, "acc": None}, None),
        ({"acc": 1.0, "output": ["a"], "validation_set": None}, 1),
    ],
)
def test_scores_as_verls_trainers_write_them(scores: dict[str, Any], right: int | None, tmp_path: Path) -> None:
    others = "".join(dump_line("other", r) for r in (1, 0))
    put(tmp_path / "validation" / "40.jsonl", others + dump_line("p", 0.5, **scores))
    total = 1.5 / 3 if right is None else (1 + right) / 3
    put(tmp_path / "metrics-000.jsonl", json.dumps({"step": 40, "data": accuracy(0.5 if right is None else total)}))
    (run,) = read(tmp_path)
    counts = run.validations[40]["set"]
    assert counts.n.sum() == (2 if right is None else 3)
    assert counts.correct.sum() == 1 + (right or 0)
    assert ("40.jsonl: 1 responses without a score, left out" in run.notes) == (right is None)


def test_scores_that_are_no_rates_have_no_interval_over_problems(tmp_path: Path) -> None:
    (run,) = read(write_run(tmp_path, curve={10: -0.5}, dumps={10: {"p": [-1] * 4, "q": [-1, 1] * 2}}))
    assert "validation/10.jsonl: has scores below 0 or above 1: not used" in run.notes
    assert measures.final_accuracy([run]).value == -0.5


# ------------------------------------------------------------------------------------------------------------ names

NAMED = {
    ("exp-vl_norm/metrics.jsonl", "exp-dapo_norm/metrics.jsonl"): [("dapo_norm", 0), ("vl_norm:1", 0)],
    ("vl_norm.jsonl", "token-mean.jsonl"): [("dapo_norm", 0), ("vl_norm:1", 0)],
    ("vl_norm/a.jsonl", "seq-mean-token-mean/a.jsonl"): [("grpo_norm", 0), ("vl_norm:1", 0)],
    ("proj/vl_norm_s0.jsonl", "proj/vl_norm-seed1.jsonl"): [("vl_norm:1", 1), ("vl_norm:1", 0)],
    ("vl_norm/seed3/log.jsonl", "vl_norm/seed4/log.jsonl"): [("vl_norm:1", 3), ("vl_norm:1", 4)],
    ("vl_norm:0.75/metrics.jsonl", "Dr_GRPO_Norm/metrics.jsonl"): [("dr_grpo_norm", 0), ("vl_norm:0.75", 0)],
    ("vl-norm-0.5_s2/x.jsonl", "q_vl_norm-alpha0.25-s3/x.jsonl"): [("vl_norm:0.25", 3), ("vl_norm:0.5", 2)],
    ("q-vl_norm-1.5b_s0/x.jsonl",): [("vl_norm:1", 0)],
    ("project/experiment.jsonl",): [("experiment", 0)],
    ("a/experiment.jsonl", "b/experiment.jsonl"): [("a/experiment", 0), ("b/experiment", 0)],
    ("mine_s0.jsonl", "mine_s1.jsonl"): [("mine", 0), ("mine", 1)],
    ("vl_norm-vs-token-mean/a.jsonl",): [("a", 0)],
}


@pytest.mark.parametrize("files", NAMED, ids=lambda files: files[0])
def test_names_of_files_and_folders_are_methods_and_seeds(files: tuple[str, ...], tmp_path: Path) -> None:
    for file in files:
        put(tmp_path / "logs" / file, text((0, 40, 0.0)))
    runs = read(tmp_path / "logs")
    assert said(runs) == NAMED[files]
    assert len({run.setting for run in runs}) == 1


def test_what_names_tell_apart_is_never_averaged(tmp_path: Path) -> None:
    for file in ("math-vl_norm", "countdown-vl_norm", "math-token-mean", "countdown-token-mean"):
        put(tmp_path / f"{file}.jsonl", text((0, 40, 0.1 * ("vl" in file))))
    rows = made(read(tmp_path), "runs")
    assert [(row["task"], row["method"], row["seeds"]) for row in rows] == [
        (task, method, 1) for task in ("countdown", "math") for method in ("DAPO Norm", "VL Norm (α = 1)")
    ]
    assert [row["VL Norm minus this"].value for row in rows[::2]] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("prefix", ["", "exp-"])
@pytest.mark.parametrize("given", ["folders", "files", "one folder"])
def test_folders_named_as_modes_have_differences_and_speed_up(
    given: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [
        put(Path(prefix + mode) / "experiment.jsonl", text((0, 40, gain)))
        for mode, gain in (("vl_norm", 0.1), ("token-mean", 0))
    ]
    arguments = {"folders": [file.parent for file in files], "files": files, "one folder": ["."]}[given]
    assert build([str(argument) for argument in arguments], tmp_path / "out", console=quiet()) == 0
    rows = {row["method"]: row for row in table_of(tmp_path / "out", "runs")}
    assert float(rows["DAPO Norm"]["VL Norm minus this"]) == pytest.approx(0.1)
    speed = table_of(tmp_path / "out", "speedup")[0]
    assert (speed["first hit"], float(speed["last step / first hit"])) == ("20", 2.0)


def test_the_name_of_what_all_runs_are_in_says_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / "vl_norm_study_seed3" / f"{name}.jsonl", text((0, 40, 0.0)))
    folder = tmp_path / "vl_norm_study_seed3"
    for arguments in ([folder], [folder / "a.jsonl", folder / "b.jsonl"]):
        assert said(read(*arguments)) == [("a", 0), ("b", 0)]


def test_a_label_with_a_seed(tmp_path: Path) -> None:
    files = [put(tmp_path / name / "log.jsonl", text((0, 40, 0.0))) for name in ("a", "b", "c")]
    runs = read(f"vl_norm:0.75@4={files[0]}", f"mine@0={files[1]}", f"mine={files[2]}")
    assert said(runs) == [("vl_norm:0.75", 4), ("mine", 0), ("mine", 1)]
    for wrong, says in ((f"mine@x={files[0]}", "'x' is no seed"), (f"mine@1={tmp_path}", "a seed is of one run")):
        with pytest.raises(UserError, match=says):
            read(wrong)


def test_a_labelled_run_of_no_known_setting_is_compared_with_those_of_the_one_that_is_known(tmp_path: Path) -> None:
    known, old = write_run(tmp_path, curve={0: 0.1, 10: 0.6}), put(tmp_path / "old.jsonl", text((0, 10, 0.0)))
    runs = read(known, f"token-mean={old}")
    assert runs[0].setting == runs[1].setting
    assert "its setting is not known: taken as that of the other runs" in runs[1].notes
    assert len({run.setting for run in read(known, old)}) == 2


@pytest.mark.parametrize(
    ("mode", "says"),
    [("vl_norm:9", "α = 9 is out of range; accepted: 0 ≤ α ≤ 2"), ("vl_norm:", "'' is not a number"),
     ("grpo_norm:2", "takes no parameter"), ("vl_norm:nan", "out of range")],
)  # fmt: skip
def test_a_mode_that_training_refuses_is_refused(mode: str, says: str, tmp_path: Path) -> None:
    file = put(tmp_path / "log.jsonl", text((0, 10, 0.0)))
    named = put(tmp_path / "x" / f"{mode}.jsonl", text((0, 10, 0.0)))
    config = write_run(tmp_path / "y", curve={1: 0.5})
    (config / "config.yaml").write_text(f"actor_rollout_ref: {{actor: {{loss_agg_mode: '{mode}'}}}}\n")
    for argument in (f"{mode}={file}", named, config):
        with pytest.raises(UserError, match=says):
            read(argument)
    assert read(f"vl_norm:1.5={file}")[0].method_key == "vl_norm:1.5"


def test_links_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "disk" / "x7" / "metrics-000.jsonl", text((0, 40, 0.0)))
    put(tmp_path / "disk" / "y.jsonl", text((0, 40, 0.0)))
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "vl_norm-seed2").symlink_to(tmp_path / "disk" / "x7")
    (runs / "again").symlink_to(tmp_path / "disk" / "x7")
    (runs / "token-mean_s1.jsonl").symlink_to(tmp_path / "disk" / "y.jsonl")
    (runs / "loop").symlink_to(runs)
    (runs / "nowhere.jsonl").symlink_to(tmp_path / "gone")
    found = read(runs)
    assert sorted(said(found)) == [("again", 0), ("dapo_norm", 1)]


# ------------------------------------------------------------------------------------------------------------- gaps


def test_a_log_whose_beginning_is_lost_has_no_ratio(tmp_path: Path) -> None:
    put(tmp_path / "vl_norm.jsonl", text((31, 60, 0.2)))
    put(tmp_path / "token-mean.jsonl", text((0, 60, 0.0)))
    runs = read(tmp_path)
    assert "its log begins at step 31: what was before is not known" in runs[1].notes
    ours, theirs = (row for row in made(runs, "speedup", smooth=1))
    assert (ours["first hit"], ours["its own first hit"]) == ("at or before 40", "60")
    assert (ours["last step / first hit"], ours["first hit / first hit"]) == (None, None)
    assert ours["target"].note == "the beginning of a log is lost in 1 of 1 seeds"
    assert (theirs["first hit"], theirs["its own first hit"]) == ("not reached", "at or before 60")


def test_a_gap_is_said(tmp_path: Path) -> None:
    (run,) = read(put(tmp_path / "run.jsonl", text((0, 50, 0.0), (80, 90, 0.0))))
    assert "no records of steps 51 to 79" in run.notes


def test_a_seed_with_a_lost_beginning_leaves_the_others_their_ratio(tmp_path: Path) -> None:
    for seed, first in ((0, 0), (1, 31)):
        put(tmp_path / f"vl_norm_s{seed}.jsonl", text((first, 60, 0.2)))
        put(tmp_path / f"token-mean_s{seed}.jsonl", text((0, 60, 0.0)))
    row = made(read(tmp_path), "speedup", smooth=1)[0]
    assert row["first hit"] == "at or before 30"
    ratio = row["last step / first hit"]
    assert (ratio.value, ratio.note) == (pytest.approx(3), "of the seed that reached, with a whole log")


def test_an_input_that_gave_nothing_is_a_row(tmp_path: Path) -> None:
    put(tmp_path / "vl_norm.jsonl", text((0, 10, 0.0)))
    (tmp_path / "empty").mkdir()
    nothing = [tmp_path / "empty", put(tmp_path / "README.md", "text"), put(tmp_path / "data.jsonl", '{"prompt": 1}\n')]
    assert build([str(p) for p in (tmp_path / "vl_norm.jsonl", *nothing)], tmp_path / "out", console=quiet()) == 0
    notes = {row["folder"]: row["notes"] for row in table_of(tmp_path / "out", "inputs")}
    assert "no run there" in notes[str(nothing[0])]
    assert "no run there" in notes[str(nothing[1])]
    assert any("no step in its metrics" in note for note in notes.values())
    assert len(table_of(tmp_path / "out", "inputs")) == 4


@pytest.mark.parametrize("number", ["NaN", "null"])
def test_an_accuracy_that_is_nan_from_a_step_on_is_said_and_the_others_go_on(number: str, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        content = text((0, 60, 0.0))
        if seed == 2:
            content = "".join(
                one.replace('mean@8": 0.', f'mean@8": {number}, "x": 0.') if json.loads(one)["step"] >= 30 else one
                for one in content.splitlines(keepends=True)
            )
        put(tmp_path / f"vl_norm_s{seed}.jsonl", content)
    runs = read(tmp_path)
    assert f"not a finite number from step 30 on: {KEY}" in runs[2].notes
    (row,) = made(runs, "runs")
    assert (row["seeds"], row["step"], row["Avg@8"].value) == ("2 of 3", "60", pytest.approx(0.6))
    assert "Accuracy is not a number any more: vl_norm_s2 (from step 30 on)." in foot(runs, "runs")
    assert "not in the row's values: vl_norm_s2 (step 20)" in foot(runs, "runs")


def test_a_difference_on_one_common_seed_of_two_has_no_interval(tmp_path: Path) -> None:
    def runs(method: str, *seeds: int) -> list[Run]:
        root = tmp_path / f"{method}{len(list(tmp_path.iterdir()))}"
        return read(*(write_run(root, method, s, dumps={10: random_dump(s + len(method), 0.5)}) for s in seeds))

    ours, one, other = runs("vl_norm:1.0", 0, 1), runs("dapo_norm", 1), runs("dapo_norm", 1, 2)
    found = measures.difference(ours, one)
    assert (np.isnan(found.low), found.note) == (True, "one seed; 1 of 2 seeds: no interval")
    assert found.value == pytest.approx(measures.difference(ours[1:], one).value)
    # Two seeds on each side are two samples, whatever their numbers.
    apart = measures.difference(ours, other)
    assert apart.value == pytest.approx(measures.final_accuracy(ours).value - measures.final_accuracy(other).value)
    paired = measures.difference(ours[1:], one)
    assert (apart.high - apart.low > paired.high - paired.low, apart.note) == (True, "")


def test_smoothing_is_over_the_same_steps_for_runs_validated_at_other_distances(tmp_path: Path) -> None:
    often = {step: 0.5 + 0.4 * (step % 20 == 10) for step in range(0, 101, 10)}
    put(
        tmp_path / "vl_norm.jsonl",
        "".join(json.dumps({"step": s, "data": accuracy(v)}) + "\n" for s, v in often.items()),
    )
    rarely = {0: 0.4, 50: 0.5, 100: 0.6}
    put(
        tmp_path / "token-mean.jsonl",
        "".join(json.dumps({"step": s, "data": accuracy(v)}) + "\n" for s, v in rarely.items()),
    )
    runs = read(tmp_path)
    assert first_hit.smoothing(runs, None) == 150
    assert {row["curve"] for row in made(runs, "speedup")} == {"raw", "mean of 150 steps"}
    assert {row["curve"] for row in made(runs, "speedup", smooth=20)} == {"raw", "mean of 20 steps"}
    back = next(
        row for row in made(runs, "speedup", smooth=20) if row["method"] == "DAPO Norm" and row["curve"] != "raw"
    )
    assert back["target"].value == pytest.approx(0.7)  # of steps 90 and 100


# ----------------------------------------------------------------------------------------------- other keys, no VL Norm


def invoke(*arguments: Any) -> Any:
    import typer

    from vlnorm_verl.report.cli import report

    app = typer.Typer()
    app.command()(report)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "250"})


def test_other_keys_and_no_vl_norm(tmp_path: Path) -> None:
    for name, gain in (("token-mean", 0.0), ("mine", 2.0)):
        for seed in (0, 1):
            rows = (line(s, **{"val/test_score/gsm8k": gain + s / 10 + seed}) for s in range(41))
            put(tmp_path / "logs" / f"{name}_s{seed}.jsonl", "".join(rows).replace("val-core", "other"))
    plain = read(tmp_path / "logs")
    assert "no validation (val/test_score/gsm8k: --metric takes any)" in plain[0].notes
    done = invoke(
        tmp_path / "logs", "--metric", "val/test_score/gsm8k", "--baseline", "token-mean", "--out", tmp_path / "o"
    )
    assert done.exit_code == 0, done.output
    (theirs, ours) = table_of(tmp_path / "o", "runs")
    assert float(ours["val/test_score/gsm8k"]) == pytest.approx(6.5)
    assert float(ours["this minus DAPO Norm"]) == pytest.approx(2)
    assert theirs["this minus DAPO Norm"] == ""
    assert not {"VL Norm minus this", "Pass@8", "verl's best@8", "model", "length", "task"} & set(ours)
    speed = table_of(tmp_path / "o", "speedup")[0]
    assert (speed["method"], speed["reaches the final accuracy of"], speed["first hit"]) == ("mine", "DAPO Norm", "20")
    assert [file.name for file in (tmp_path / "o" / "figures").glob("fig2*.svg")] == ["fig2.svg"]


def test_without_vl_norm_and_baseline_the_table_says_how_to_compare(tmp_path: Path) -> None:
    for name in ("token-mean", "seq-mean-token-mean"):
        put(tmp_path / f"{name}.jsonl", text((0, 40, 0.0)))
    runs = read(tmp_path)
    assert "VL Norm minus this" not in made(runs, "runs")[0]
    assert "--baseline METHOD" in foot(runs, "runs")
    assert made(runs, "speedup") == []


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--metric", "val-core/set/acc/mean@4"], "they log for instance val-core/set/acc/mean@8"),
     (["--baseline", "grpo_norm"], "there are dapo_norm"), (["--baseline", "vl_norm:9"], "out of range")],
)  # fmt: skip
def test_wrong_keys_and_baselines_are_refused(options: list[str], says: str, tmp_path: Path) -> None:
    put(tmp_path / "logs" / "token-mean.jsonl", text((0, 40, 0.0)))
    done = invoke(tmp_path / "logs", *options, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert says in done.output
    assert not (tmp_path / "out").exists()
