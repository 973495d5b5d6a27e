"""Reading what verl and its loggers write: records, runs that were resumed, bad values, validation dumps.

Covered: JSON lines, tensorboard and offline wandb, written by verl's own Tracking; cut, corrupt and missing files.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.report_runs import (
    KEY,
    accuracy,
    dump_line,
    line,
    looked_at,
    put,
    random_dump,
    read,
    read_one,
    record,
    report,
    said,
    table_of,
    text,
    write_run,
)
from vlnorm_verl.files import UserError
from vlnorm_verl.report import build, dumps, groups, measures
from vlnorm_verl.report.changes import Memo
from vlnorm_verl.report.find import find
from vlnorm_verl.report.read import read_runs
from vlnorm_verl.report.run import value_at
from vlnorm_verl.runs import records

# -------------------------------------------------------------------------------------------------------------- records


def test_a_cut_last_line_and_a_corrupt_line_are_named_and_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={0: 0.1, 1: 0.2, 2: 0.3})
    text = (folder / "metrics-000.jsonl").read_text().splitlines(keepends=True)
    text[1] = text[1].replace(":", "", 1)
    (folder / "metrics-000.jsonl").write_text("".join(text) + '{"step": 3, "da')
    run = read_one(folder)
    assert run.steps.tolist() == [0, 2]
    assert "metrics-000.jsonl: last line is cut, left out" in run.notes
    assert "metrics-000.jsonl: line 2 corrupt, left out" in run.notes


def test_what_could_not_be_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk that was away for a moment. Neither counts, logs nor the report are kept as they then were."""
    for method, rate in (("vl_norm:1.0", 0.7), ("dapo_norm", 0.3)):
        write_run(tmp_path / "runs", method, dumps={10: random_dump(0, rate), 20: random_dump(1, rate)})
    away = {tmp_path / "runs" / "dapo_norm-0" / name for name in ("metrics-000.jsonl", "validation/20.jsonl")}

    def opened(path: Path, *arguments: str) -> Any:
        if path in away:
            raise OSError(errno.ESTALE, "Stale file handle")
        return open(path, *arguments)

    monkeypatch.setattr(records, "open", opened, raising=False)
    memo, out = Memo(), tmp_path / "out"
    request = build.Request((str(tmp_path / "runs"),), out)
    first = build.build(request, Console(quiet=True), memo)
    assert any("Files of it cannot be read: dapo_norm-0" in line for line in first)
    away.clear()
    again = build.build(request, Console(quiet=True), memo)
    assert again == report(tmp_path / "runs", out=out) != first
    assert build.build(replace(request, out=tmp_path / "new"), Console(quiet=True))[0] == again[0]


def test_of_a_run_that_starts_again_nothing_is_kept_twice(tmp_path: Path) -> None:
    folder, memo = write_run(tmp_path, curve={10: 0.5}), Memo()
    for number in (1, 2):
        read_runs(find([str(folder)]), memo=memo)
        put(folder / f"metrics-{number:03d}.jsonl", record(10 + number, **accuracy(0.6)))
    assert len(memo._known) == 1


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1):
        write_run(tmp_path, seed=seed, curve={10: 0.5})
    scandir = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("-1"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    stat = os.stat

    def unseen(path: Any, **given: Any) -> Any:
        if "-1/" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **given)

    monkeypatch.setattr(os, "scandir", closed)
    monkeypatch.setattr(os, "stat", unseen)
    said = report(tmp_path, out=tmp_path / "out")
    assert any("Not in the report: vl_norm-1.0-1 (cannot be read (Permission denied))" in line for line in said)


def test_bytes_that_are_no_text_and_a_step_that_is_none_are_corrupt_lines(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={0: 0.1})
    with open(folder / "metrics-000.jsonl", "ab") as file:
        file.write(b"\0\0\xff\xfe\n" + record(1, loss=1.0).encode() + record(2**63, loss=1.0).encode())
    run = read_one(folder)
    assert run.steps.tolist() == [0, 1]
    assert "metrics-000.jsonl: 2 lines 2, 4 corrupt, left out" in run.notes


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


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "null"])
def test_a_value_that_is_not_finite_is_its_metrics_only(number: str, tmp_path: Path) -> None:
    content = text((0, 40, 0.0)).replace('"actor/grad_norm": 0.5', f'"actor/grad_norm": {number}')
    (run,) = read(put(tmp_path / "run.jsonl", content))
    assert run.steps[-1] == 40
    assert value_at(run, run.metrics[KEY], 40) == 0.5
    assert not any("corrupt" in note for note in run.notes)


def test_a_cut_line_full_of_quotes_takes_no_time(tmp_path: Path) -> None:
    (run,) = read(put(tmp_path / "run.jsonl", line(1) + '{"step": 2, "data": {"NaN": "' + '\\"' * 300_000))
    assert run.notes[0] == "run.jsonl: last line is cut, left out"


def test_two_records_of_one_step_in_one_start_are_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={0: 0.1})
    (folder / "metrics-000.jsonl").write_text(record(1, a=1.0) + record(1, training__global_step=1, b=2.0))
    metrics = read_one(folder).metrics
    assert (metrics["a"][0], metrics["b"][0]) == (1.0, 2.0)


def test_a_gap_is_said(tmp_path: Path) -> None:
    (run,) = read(put(tmp_path / "run.jsonl", text((0, 50, 0.0), (80, 90, 0.0))))
    assert "no records of steps 51 to 79" in run.notes


# -------------------------------------------------------------------------------------------------------------- resumed


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
    (folder / "metrics-001.jsonl").write_text("".join(record(step, **accuracy(0.5)) for step in (0, 5)))
    run = read_one(folder)
    assert run.steps.tolist() == [0, 5]
    assert sorted(run.validations) == [0, 5]
    assert measures.final_accuracy([run]).value == 0.5
    assert "metrics-001.jsonl: starts again at step 0; 2 later steps of the earlier start left out" in run.notes
    assert "validation dumps of steps 10, after its last record, left out" in run.notes


def test_a_jsonl_in_which_the_step_goes_back(tmp_path: Path) -> None:
    (run,) = read(put(tmp_path / "run.jsonl", text((0, 50, 0.0), (41, 45, 0.1), (21, 30, 0.2))))
    assert run.steps.tolist() == list(range(31))
    assert [value_at(run, run.metrics[KEY], step) for step in (20, 30)] == [0.4, 0.65]
    assert "run.jsonl: starts again at step 41; 9 later steps of the earlier start left out" in run.notes
    assert "run.jsonl: starts again at step 21; 24 later steps of the earlier start left out" in run.notes


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


def test_a_run_that_goes_on_in_another_folder_has_the_dumps_of_both(tmp_path: Path) -> None:
    dumps = [{step: random_dump(step + start, 0.5) for step in (0, 5, 10, 15)} for start in (0, 100)]
    first, later = (write_run(tmp_path / str(start), dumps=found) for start, found in enumerate(dumps))
    for folder, steps in ((first, (0, 5, 10)), (later, (10, 15))):
        log = folder / "metrics-000.jsonl"
        log.write_text("".join(one for one in log.open() if json.loads(one)["step"] in steps))
        for file in (folder / "validation").iterdir():
            if int(file.stem) not in steps:
                file.unlink()
    (run,) = read(*(folder.rename(tmp_path / f"2026-02-0{day}") for day, folder in enumerate((first, later), 1)))
    assert sorted(run.validations) == [0, 5, 10, 15]
    assert [run.dumps[step].parts[-3][-1] for step in (0, 5, 10, 15)] == ["1", "1", "2", "2"]
    assert not any("dump" in note for note in run.notes)


def test_a_run_of_a_sweep_goes_on_from_the_one_that_is_configured_as_it(tmp_path: Path) -> None:
    """All in folders named by dates, as Hydra has them: A ends early, B runs, A goes on."""
    for day, (rate, steps, lines) in enumerate(
        [(1e-6, 60, CRASHED), (5e-6, 60, text((0, 60, 0.2))), (1e-6, 90, text((41, 90, 0.1)))]
    ):
        config = {
            "actor_rollout_ref": {"actor": {"loss_agg_mode": "vl_norm", "optim": {"lr": rate}}},
            "data": {"seed": 7},
            "trainer": {"total_training_steps": steps, "default_local_dir": f"checkpoints/{day}"},
        }
        put(tmp_path / f"2026-02-0{day}" / "metrics.jsonl", lines)
        put(tmp_path / f"2026-02-0{day}" / ".hydra" / "config.yaml", json.dumps(config))
    runs = read(tmp_path)
    assert [run.steps[-1] for run in runs] == [90, 60]
    assert [value_at(run, run.metrics[KEY], 60) for run in runs] == [0.7, 0.8]
    days = [tmp_path / f"2026-02-0{day}" for day in range(3)]
    assert len(read(*days[1:])) == 2
    of_several = read(f"vl_norm={tmp_path}")
    assert [run.steps[-1] for run in of_several] == [90, 60], "a label of several runs does not say which goes on"
    (one,) = read(*(f"vl_norm@7={day}" for day in days[1:]))
    assert one.steps[-1] == 90, "a label of each does"


def test_another_number_of_responses_on_the_way_is_said(tmp_path: Path) -> None:
    lines = text((0, 20, 0.0)) + text((21, 40, 0.0)).replace("mean@8", "mean@4")
    (run,) = read(put(tmp_path / "run.jsonl", lines))
    other = KEY.replace("mean@8", "mean@4")
    said = f"{other} at 2 validations (steps 30 to 40) is not in its accuracy, which is mean@8: --metric takes either"
    assert said in run.notes
    assert not any("--metric takes either" in note for note in read_one(write_run(tmp_path, curve={1: 0.5})).notes)


# -------------------------------------------------------------------------------------------------------- other loggers


TRACK = """
import json, os, sys, wandb
from verl.utils.tracking import Tracking
for start in json.load(sys.stdin):
    os.environ |= start["variables"]
    tracking = Tracking(
        "project", "experiment", default_backend=["file", "wandb", "tensorboard"], config=start["config"]
    )
    for text in start["lines"].splitlines():
        tracking.log(**json.loads(text))
    tracking.finish()
    wandb.teardown()  # it would go on writing into the first start's folder
"""
CRASHED, RESUMED = text((0, 50, 0.0)), text((41, 60, 0.1))
WIDE = "".join(
    line(
        step,
        **{f"filler/{i}": float(i * step) for i in range(150)},
        **{"actor/entropy": math.nan if step == 4 else step / 8},
    )
    for step in range(0, 60, 2)
)
STARTS = {  # folder: starts, their seeds
    "resumed": ((CRASHED, 7), (text((0, 60, 0.0)), 8), (RESUMED, 7)),
    "by-wandb": ((CRASHED, 7), (text((0, 20, 0.1)), 7)),
    "wide": ((WIDE, 5),),
}


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What verl's own Tracking writes of runs, some started more than once: STARTS, each with three loggers."""
    root = tmp_path_factory.mktemp("tracked")
    starts = []
    for name, of_folder in STARTS.items():
        for lines, seed in of_folder:
            folders = {"WANDB_DIR": str(root / name), "TENSORBOARD_DIR": str(root / name / f"tensorboard-{seed}")}
            folders |= {"VERL_FILE_LOGGER_PATH": str(root / name / f"seed{seed}.jsonl")}
            folders |= {"WANDB_RUN_ID": "abc", "WANDB_RESUME": "allow"} if name == "by-wandb" else {}
            config = {
                "actor_rollout_ref": {"actor": {"loss_agg_mode": "vl_norm", "limit": math.inf}},
                "data": {"seed": seed},
                "trainer": {"total_training_steps": 60, "resume_from_path": folders["TENSORBOARD_DIR"]},
                "ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": {"START": str(len(starts))}}}},
            }
            starts.append({"variables": folders, "lines": lines, "config": config})
            (root / name).mkdir(exist_ok=True)
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CACHE_DIR": str(root)}
    command, variables = [sys.executable, "-c", TRACK], {**os.environ, **offline}
    subprocess.run(command, input=json.dumps(starts), env=variables, check=True, capture_output=True, text=True)
    return root


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


def test_one_run_by_three_loggers_is_one_run(tracked: Path, tmp_path: Path) -> None:
    """verl's file logger kept only the last start."""
    runs = read(tracked / "resumed")
    assert [(run.method_key, run.seed) for run in runs if len(run.steps)] == [("vl_norm:1", 7), ("vl_norm:1", 8)]
    assert sum(run.left_out.endswith(", by another logger") for run in runs) == 4
    assert "Not in the report" not in looked_at(runs), "that is for runs that are missing"
    report(tracked / "resumed", out=tmp_path)
    assert ">2 runs, read on" in (tmp_path / "report.html").read_text()
    assert sum("by another logger: left out" in row["notes"] for row in table_of(tmp_path, "inputs")) == 4


def test_a_copy_that_begins_earlier_says_how_it_is_read(tracked: Path, tmp_path: Path) -> None:
    """verl's file logger kept only the last start, and has a configuration, which tensorboard lacks."""
    folder = write_run(tmp_path, seed=7, curve={0: 0.0})
    shutil.copy(tracked / "resumed/seed7.jsonl", folder / "metrics-000.jsonl")
    shutil.copytree(tracked / "resumed/tensorboard-7", tmp_path / "tensorboard-7")
    copy, kept = sorted(read(tmp_path), key=lambda run: len(run.steps))
    assert (copy.copy, kept.steps[0]) == (True, 41)
    way = "begins at step 0, before that one: to read this one, give label@seed=PATH of it alone"
    assert any(note.endswith(way) for note in copy.notes)
    assert read_one(f"vl_norm@7={tmp_path}/tensorboard-7").steps[0] == 0


@pytest.mark.parametrize("kind", ["tensorboard-5", "wandb"])
def test_runs_of_other_loggers(tracked: Path, kind: str) -> None:
    run = read_one(tracked / "wide" / kind)
    assert run.steps.tolist() == list(range(0, 60, 2))
    assert run.metrics["actor/entropy"][:4].tolist() == pytest.approx([0, 0.25, np.nan, 0.75], nan_ok=True)
    assert [value_at(run, run.metrics[KEY], step) for step in (0, 10, 50)] == pytest.approx([0.3, 0.35, 0.55])
    assert run.metrics["filler/149"][-1] == 149 * 58
    if kind == "wandb":
        assert (run.method_key, run.seed, run.planned_steps) == ("vl_norm:1", 5, 60)


def test_an_offline_wandb_file_that_is_cut(tracked: Path, tmp_path: Path) -> None:
    (file,) = (tracked / "wide").rglob("*.wandb")
    content = file.read_bytes()
    (tmp_path / "run-x.wandb").write_bytes(content[: len(content) * 2 // 3])
    run = read_one(tmp_path / "run-x.wandb")
    assert 5 < len(run.steps) < 30
    assert run.metrics["filler/149"].tolist() == [149.0 * step for step in run.steps]
    assert "run-x.wandb: the end is cut, left out" in run.notes


def test_a_file_that_only_has_the_name_of_wandbs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a file of wandb"):
        read(put(tmp_path / "bad.wandb", "something else"))


@pytest.mark.parametrize("how", ["damaged", "away"])
def test_one_wandb_file_that_cannot_be_read_does_not_stop_the_report(
    how: str, tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = (tracked / "wide").rglob("*.wandb")
    shutil.copy(file, tmp_path / "run-good.wandb")
    (tmp_path / "run-x.wandb").write_bytes(bytes(100))
    read_bytes = Path.read_bytes

    def away(path: Path) -> bytes:
        if path.name == "run-x.wandb":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read_bytes(path)

    if how == "away":
        monkeypatch.setattr(Path, "read_bytes", away)
    good, bad = read(tmp_path)
    assert (good.method_key, good.left_out, len(good.steps)) == ("vl_norm:1", "", 30)
    assert bad.left_out
    note = {"damaged": "not a file of wandb", "away": "cannot be read (Stale file handle)"}[how]
    assert f"run-x.wandb: {note}" in bad.notes
    assert ("Files of it cannot be read" in looked_at([good, bad])) == (how == "away"), "it is read again"


# ---------------------------------------------------------------------------------------------------------------- dumps


def test_acc_counts_before_score_and_booleans_count(tmp_path: Path) -> None:
    file = tmp_path / "0.jsonl"
    lines = [dump_line("p", 1, acc=0.0), dump_line("p", 1, acc=True), dump_line("q", 1, acc=None), dump_line("q", 0)]
    file.write_text("".join(lines))
    found = dumps.count(file, [])[""]
    assert (found.n.tolist(), found.correct.tolist()) == ([2, 2], [1, 1])


def test_equal_prompts_with_other_answers_are_other_problems(tmp_path: Path) -> None:
    file = tmp_path / "0.jsonl"
    file.write_text(dump_line("p", 1, gts={"a": 1}) + dump_line("p", 1, gts={"a": 2}) + dump_line("p", 0, gts={"a": 1}))
    assert sorted(dumps.count(file, [])[""].n.tolist()) == [1, 2]


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
    put(tmp_path / "metrics-000.jsonl", record(40, **accuracy(0.5 if right is None else total)))
    (run,) = read(tmp_path)
    counts = run.validations[40]["set"]
    assert counts.n.sum() == (2 if right is None else 3)
    assert counts.correct.sum() == 1 + (right or 0)
    assert ("40.jsonl: 1 responses without a score, left out" in run.notes) == (right is None)


def test_a_validation_set_that_verl_does_not_log_is_that_of_the_only_one(tmp_path: Path) -> None:
    """A reward that writes another name than the row's data_source."""
    put(tmp_path / "validation" / "40.jsonl", "".join(dump_line("p", r, validation_set="other") for r in (1, 0)))
    put(tmp_path / "metrics-000.jsonl", record(40, **accuracy(0.5)))
    assert read_one(tmp_path).validations[40]["set"].correct.tolist() == [1]
    lines = (dump_line("p", r, validation_set=name) for r, name in ((1, "other"), (0, "third")))
    put(tmp_path / "validation" / "40.jsonl", "".join(lines))
    assert read_one(tmp_path).unnamed


def test_texts_are_not_touched_where_a_line_has_nan(tmp_path: Path) -> None:
    """A problem is one problem, whether its line has a NaN in another field or not."""
    folder = write_run(tmp_path, dumps={40: {'is 1 NaN? \\" -Infinity': [1, 0] * 4, "q": [1] * 8}})
    file = folder / "validation" / "40.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("".join(one[:-1] + (', "penalty": NaN}\n' if i % 2 else "}\n") for i, one in enumerate(lines)))
    (run,) = read(folder)
    assert sorted(run.validations[40]["set"].n.tolist()) == [8, 8]
    assert sorted(run.validations[40]["set"].correct.tolist()) == [4, 8]


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
    run = read_one(write_run(tmp_path, curve={1: 0.5, 2: 0.501}, dumps=dumps))
    assert "validation/2.jsonl: its accuracy is 0.5000, verl logged 0.5010 at that step: not used" in run.notes
    assert not any("no validation dump" in note for note in run.notes)
    assert sorted(run.validations) == [1]
    found = measures.final_accuracy([run])
    assert (found.value, np.isnan(found.low), found.note) == (0.501, True, "no dumps")
    assert measures.final_pass([run]) is None


def test_the_outputs_of_a_session_are_one_response(tmp_path: Path) -> None:
    """As verl's V1 trainer writes them: every output with its session's score and an input of its own."""
    dumps, scores = {1: {f"p{i}": [1, 0] * 4 for i in range(4)}}, (1, 0, 1, 0, 1, 0, 1, 0)
    one = read_one(write_run(tmp_path / "one", dumps=dumps)).validations[1]["set"]
    folder = write_run(tmp_path / "several", dumps=dumps)
    lines = [
        {"input": f"p{i}" if output == 0 else f"p{i} tool {output}", "gts": None, "score": score, "acc": score}
        | {"uid": f"{uuid.UUID(int=i)}_{session}_{output}"}
        for i in range(4)
        for session, score in enumerate(scores)
        for output in range(1 + session % 3)
    ]
    (folder / "validation" / "1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_one(folder)
    several = run.validations[1]["set"]
    assert several.n.tolist() == one.n.tolist() == [8] * 4
    assert several.correct.tolist() == one.correct.tolist()
    assert not [note for note in run.notes if "validation/" in note]


def test_sessions_that_failed_count_as_wrong_as_in_verl(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path, curve={1: 12 / 32}, dumps={1: {f"p{i}": [1, 0, 1] * 2 for i in range(3)} | {"q": [0] * 8}}
    )
    run = read_one(folder)
    assert run.validations[1]["set"].n.tolist() == [8] * 4
    assert "validation/1.jsonl: 6 responses that are not there count as wrong, as in verl" in run.notes
    assert measures.final_accuracy([run]).value == pytest.approx(12 / 32)


def test_scores_that_are_no_rates_have_no_interval_over_problems(tmp_path: Path) -> None:
    (run,) = read(write_run(tmp_path, curve={10: -0.5}, dumps={10: {"p": [-1] * 4, "q": [-1, 1] * 2}}))
    assert "validation/10.jsonl: has scores below 0 or above 1: not used" in run.notes
    assert measures.final_accuracy([run]).value == -0.5


def test_graded_scores_have_an_average_but_no_pass(tmp_path: Path) -> None:
    run = read_one(write_run(tmp_path, dumps={1: {f"p{i}": [0.5, 1.0] * 4 for i in range(4)}}))
    assert not run.validations[1]["set"].binary
    assert measures.final_accuracy([run]).value == 0.75
    assert measures.final_pass([run]) is None


def test_counts_are_kept_until_a_dump_changes(tmp_path: Path) -> None:
    name = "not Unicode: \udcff"
    folder = write_run(tmp_path / name, curve={1: 0.5}, dumps={1: {"p": [1, 0], "q": [1, 0]}})
    file = folder / "validation" / "1.jsonl"
    before = read_one(folder, cache_folder=tmp_path / "out")
    stat = file.stat()
    file.write_text(file.read_text().replace('"acc": 0', '"acc": 1'))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    kept = read_one(folder, cache_folder=tmp_path / "out")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    (folder / "metrics-000.jsonl").write_text(record(1, **accuracy(1.0)))
    changed = read_one(folder, cache_folder=tmp_path / "out")
    found = [run.validations[1]["set"].correct.sum() for run in (before, kept, changed)]
    assert found == [2, 2, 4]
    assert before.validations[1]["set"].problems == changed.validations[1]["set"].problems


@pytest.mark.parametrize("content", [b"\xc1 something else", b"\x81\xa1\xff\xc0"])
def test_a_cache_of_something_else_is_made_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / dumps.CACHE_FILE).write_bytes(content)
    folder = write_run(tmp_path / "run", curve={1: 0.5}, dumps={1: {"p": [1, 0]}})
    assert read_one(folder, cache_folder=tmp_path).validations[1]["set"].correct.tolist() == [1]
