"""Which runs the report finds, and what it takes them for: labels, configurations, names of files and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.report_runs import (
    accuracy,
    configure,
    looked_at,
    made,
    put,
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
from vlnorm_verl.report import measures
from vlnorm_verl.report.identity import Setting, from_config

# ---------------------------------------------------------------------------------------------------------------- found


def test_runs_are_found_below_a_folder_but_not_in_their_own_dumps(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "b", curve={1: 0.5}, dumps={1: {"p": [1]}})
    other = write_run(tmp_path / "a", "dapo_norm", curve={1: 0.5})
    put(other / "rollouts" / "1.jsonl", record(1, a=1.0))
    put(tmp_path / "a" / "project" / "experiment.jsonl", record(1, a=1.0))
    put(tmp_path / "a" / "project" / "notes.jsonl", '{"step": "no", "data": 3}\n')
    assert sorted(run.name for run in read(tmp_path)) == ["dapo_norm-0", "experiment", "vl_norm-1.0-0"]


def test_names_of_a_runs_own_folders_say_nothing_elsewhere(tmp_path: Path) -> None:
    """verl's trainer.default_local_dir is checkpoints/PROJECT/EXPERIMENT."""
    for name in ("checkpoints", "rollouts", "validation", "smoke"):
        put(tmp_path / name / "project" / f"{name}.jsonl", text((0, 10, 0.0)))
        put(tmp_path / "run" / name / "not.jsonl", text((0, 10, 0.0)))
    put(tmp_path / "run" / "mine.jsonl", text((0, 10, 0.0)))
    assert sorted(run.name for run in read(tmp_path)) == ["checkpoints", "mine", "rollouts", "validation"]


def test_a_run_that_is_given_twice_is_read_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={1: 0.5})
    assert len(read(folder, tmp_path, f"{folder}/")) == 1


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


def test_a_link_to_nothing_is_no_log_and_no_dump(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", curve={10: 0.5}, dumps={10: {"p": [1, 0], "q": [1, 0]}})
    (folder / "validation" / "5.jsonl").symlink_to(tmp_path / "gone")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.wandb").symlink_to(tmp_path / "gone")
    assert [*read_one(tmp_path).validations] == [10]


@pytest.mark.parametrize("start", ["\n", "\ufeff", "\ufeff\n\n", 'p": 3}}\n', "nothing\n" * 9])
def test_a_file_is_found_whatever_its_first_lines_are(start: str, tmp_path: Path) -> None:
    put(tmp_path / "run.jsonl", start + text((0, 40, 0.0)))
    for argument in (tmp_path, tmp_path / "run.jsonl"):
        (run,) = read(argument)
        assert run.steps[-1] == 40


def test_an_input_that_gave_nothing_is_a_row(tmp_path: Path) -> None:
    run = put(tmp_path / "vl_norm.jsonl", text((0, 10, 0.0)))
    (tmp_path / "empty").mkdir()
    nothing = [tmp_path / "empty", put(tmp_path / "README.md", "text"), put(tmp_path / "data.jsonl", '{"prompt": 1}\n')]
    rows = made(read(run, *nothing), "inputs")
    assert len(rows) == 4
    notes = {row["folder"]: row["notes"] for row in rows}
    assert "no run there" in notes[str(nothing[0])]
    assert "no run there" in notes[str(nothing[1])]
    assert any("no step in its metrics" in note for note in notes.values())


def test_a_run_without_metrics_is_named_and_breaks_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", curve={1: 0.5, 2: 0.6})
    empty = write_run(tmp_path / "runs", "dapo_norm", curve={1: 0.1})
    (empty / "metrics-000.jsonl").unlink()
    begun = write_run(tmp_path / "runs", "grpo_norm", curve={1: 0.1})
    (begun / "metrics-000.jsonl").write_text("")
    report(tmp_path / "runs", out=tmp_path / "out")
    notes = {row["run"]: row["notes"] for row in table_of(tmp_path / "out", "inputs")}
    assert "no metrics yet" in notes["dapo_norm-0"]
    assert "no step in its metrics" in notes["grpo_norm-0"]
    assert [row["method"] for row in table_of(tmp_path / "out", "results")] == ["VL Norm (α = 1)"]


# --------------------------------------------------------------------------------------------------------------- labels


def test_a_label_is_the_method_and_several_seeds_are_counted(tmp_path: Path) -> None:
    for name, value in (("x", 0.5), ("y", 0.7)):
        (tmp_path / f"{name}.jsonl").write_text(record(5, **accuracy(value)))
    runs = read(f"token-mean={tmp_path}/x.jsonl", f"token-mean={tmp_path}/y.jsonl", f"vl_norm:0.5={tmp_path}/x.jsonl")
    assert [run.method_key for run in runs] == ["dapo_norm", "dapo_norm"]  # the third is the first again
    assert [run.seed for run in runs] == [0, 1]
    assert "its seed is not known: counted as seed 1" in runs[1].notes
    (row,) = made(runs, "results")
    assert row["Avg@8"].value == pytest.approx(0.6)
    assert row["seeds"] == 2
    assert read(f"vl_norm:0.5={tmp_path}/x.jsonl")[0].method_key == "vl_norm:0.5"
    assert sorted(said(read(tmp_path, f"vl_norm:0.5@3={tmp_path}/x.jsonl"))) == [("vl_norm:0.5", 3), ("y", 0)]


def test_a_label_with_a_seed(tmp_path: Path) -> None:
    files = [put(tmp_path / name / "log.jsonl", text((0, 40, 0.0))) for name in ("a", "b", "c")]
    runs = read(f"vl_norm:0.75@4={files[0]}", f"mine@0={files[1]}", f"mine={files[2]}")
    assert said(runs) == [("vl_norm:0.75", 4), ("mine", 0), ("mine", 1)]
    for wrong, says in ((f"mine@x={files[0]}", "'x' is no seed"), (f"mine@1={tmp_path}", "a seed is of one run")):
        with pytest.raises(UserError, match=says):
            read(wrong)


def test_the_home_folder_after_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "log.jsonl", text((0, 10, 0.0)))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert said(read("mine=~/log.jsonl")) == [("mine", 0)]
    assert said(read("mine@3=~/log.jsonl")) == [("mine", 3)]


def test_a_label_of_several_runs_only_names_those_that_say_their_method(tmp_path: Path) -> None:
    for method in ("vl_norm:1.0", "dapo_norm"):
        write_run(tmp_path / "runs", method, curve={10: 0.5})
    runs = read(f"mine={tmp_path}/runs")
    assert [(run.name, run.method_key) for run in runs] == [
        ("mine/dapo_norm-0", "dapo_norm"),
        ("mine/vl_norm-1.0-0", "vl_norm:1"),
    ]
    assert not any("left out" in row["notes"] for row in made(runs, "inputs"))
    alone = read_one(f"grpo_norm={tmp_path}/runs/dapo_norm-0")
    assert (alone.name, alone.method_key) == ("grpo_norm", "grpo_norm")
    for name in ("x", "y"):
        (tmp_path / f"{name}.jsonl").write_text(record(5, **accuracy(0.5)))
    (tmp_path / "runs").rename(tmp_path / ".hidden")
    assert [run.method_key for run in read(f"dr_grpo={tmp_path}")] == ["dr_grpo", "dr_grpo"]


def test_a_run_of_no_known_setting_is_compared_with_those_of_the_one_that_is_known_if_labelled(tmp_path: Path) -> None:
    known, old = write_run(tmp_path, curve={0: 0.1, 10: 0.6}), put(tmp_path / "old.jsonl", text((0, 10, 0.0)))
    what = "Setting not known, so not compared with those of a known one (label=PATH takes it as theirs)"
    runs = read(known, f"token-mean={old}")
    assert runs[0].setting == runs[1].setting
    assert "its setting is not known: taken as that of the other runs" in runs[1].notes
    assert what not in looked_at(runs)
    runs = read(known, old)
    assert looked_at(runs)[what] == ["old"]
    assert {row["setting"] for row in made(runs, "results")} == {"CountDown, 3B, 3072 tokens", "setting not known"}
    assert [row["setting"] for row in made(read(old), "results")] == ["all runs"]


def test_a_path_with_an_equals_sign_needs_no_label(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "lr=1", curve={1: 0.5})
    assert read_one(folder).method_key == "vl_norm:1"


# ------------------------------------------------------------------------------------------------------- configurations


def test_several_experiments_in_one_folder_share_no_configuration_and_no_dumps(tmp_path: Path) -> None:
    """verl's file logger writes PROJECT/EXPERIMENT.jsonl; PROJECT's dumps are the last experiment's."""
    folder = write_run(tmp_path, dumps={10: {"p": [1] * 8, "q": [0] * 8}})
    (folder / "metrics-000.jsonl").rename(folder / "a.jsonl")
    assert read_one(folder).method_key == "vl_norm:1"
    (folder / "b.jsonl").write_text((folder / "a.jsonl").read_text())
    for argument in (folder, folder / "a.jsonl"):
        for run in read(argument):
            assert (run.method_key, run.validations, run.planned_steps) == (run.name, {}, None)
            assert "several runs' *.jsonl in its folder: configuration and dumps there not used" in run.notes


def test_a_plain_run_of_verl_with_hydras_configuration(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(record(7, **accuracy(0.5)))
    put(
        tmp_path / ".hydra" / "config.yaml",
        "base: ${oc.env:NOT_SET_ANYWHERE}/x\n"
        "actor_rollout_ref: {actor: {loss_agg_mode: seq-mean-token-mean}, model: {path: /models/Qwen2.5-3B}}\n"
        "data: {seed: 4, max_response_length: 512, val_files: ['${base}']}\n"
        "steps: 50\n"
        "trainer: {total_training_steps: '${steps}', validation_data_dir: null}\n",
    )
    run = read_one(tmp_path)
    assert (run.method_key, run.seed, run.planned_steps) == ("grpo_norm", 4, 50)
    assert run.setting == Setting(task="/${base}", model="Qwen2.5-3B", length="512")
    assert [row["step"] for row in made([run], "results")] == ["7 of 50"]


def test_what_an_environment_says_tells_runs_apart_by_its_text(tmp_path: Path) -> None:
    """The reader's environment is not asked. Hydra's multirun numbers its jobs."""
    for job, (model, mode) in enumerate((("A", "token-mean"), ("B", "token-mean"), ("B", "vl_norm:${oc.env:ALPHA}"))):
        folder = tmp_path / "multirun" / "2026-11-28" / "12-00-00" / str(job)
        put(folder / "metrics-000.jsonl", record(7, **accuracy(0.5)))
        actor = f"{{actor: {{loss_agg_mode: '{mode}'}}, model: {{path: '${{oc.env:MODELS}}/{model}'}}}}"
        put(folder / ".hydra" / "config.yaml", f"actor_rollout_ref: {actor}\ndata: {{max_response_length: 512}}\n")
    runs = read(tmp_path)
    assert sorted(run.setting.model for run in runs) == ["A", "B", "B"]
    assert {run.method_key for run in runs} == {"dapo_norm", "vl_norm:${oc.env:ALPHA}"}
    assert len({run.name for run in runs}) == 3


@pytest.mark.parametrize(
    ("task", "read_as"),
    [
        ("${oc.env:SOME_TOKEN}", None), ("${ oc.env:SOME_TOKEN}", None), ("${${resolver}:SOME_TOKEN}", None),
        ("${oc.select:none,${oc.env:SOME_TOKEN}}", None), ("${other}", None), ("x${oc.decode:1}", None),
        ("${a.b}", "fine"), ("${oc.select:a.b,null}", "fine"), ("${oc.select:other,default}", "default"),
    ],
)  # fmt: skip
def test_a_configuration_calls_no_resolver(
    task: str, read_as: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be somebody else's, and the environment is the reader's."""
    monkeypatch.setenv("SOME_TOKEN", "hunter2")
    more = {"resolver": "oc.env", "other": "${oc.env:SOME_TOKEN}", "a": {"b": "fine"}}
    run = read_one(configure(write_run(tmp_path, curve={10: 0.5}), recipe__task=task, **more))
    assert (run.setting.task or None) == read_as
    assert "hunter2" not in str(vars(run))


SYNC_STEP = {"separate_async": {"parameter_sync_step": 4}}


@pytest.mark.parametrize(
    ("trainer", "of_optimizer", "planned"),
    [
        ({"total_training_steps": None}, 465, 465), ({"total_training_steps": None}, -1, None),
        ({"total_training_steps": 50, "use_v1": True}, 465, 50),
        ({"use_v1": True, "v1": {"trainer_mode": "sync", **SYNC_STEP}}, 8, 8),
        ({"use_v1": True, "v1": {"trainer_mode": "separate_async", **SYNC_STEP}}, 8, 2),
        ({"use_v1": False, "v1": {"trainer_mode": "separate_async", **SYNC_STEP}}, 8, 8),
    ],
)  # fmt: skip
def test_planned_steps_are_the_optimizers_where_the_trainer_has_none(
    trainer: dict[str, Any], of_optimizer: int, planned: int | None
) -> None:
    """verl fills these in before it logs: trainer/ppo/ray_trainer.py:447, trainer/ppo/v1/trainer_base.py:782."""
    config = {"trainer": trainer, "actor_rollout_ref": {"actor": {"optim": {"total_training_steps": of_optimizer}}}}
    assert from_config(config, "").planned_steps == planned


def test_steps_that_a_later_start_was_given_are_those_that_are_planned(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={500: 0.5}, planned=1000)
    assert "Not finished" in looked_at([read_one(folder)])
    last = (folder / "config.yaml").read_text().replace("1000", "500")
    put(folder / "trainer.yaml", f"{last}hydra: {{}}\n")
    assert "Not finished" not in looked_at([read_one(folder)])


@pytest.mark.parametrize(("whole", "method"), [(True, "grpo_norm"), (False, "vl_norm:1")])
def test_a_configuration_that_is_cut_is_said(whole: bool, method: str, tmp_path: Path) -> None:
    put(tmp_path / "vl_norm.jsonl", text((0, 10, 0.0)))
    content = "actor_rollout_ref: {actor: {loss_agg_mode: seq-mean-token-mean}}"
    put(tmp_path / "config.yaml", content[:-1])
    put(tmp_path / ".hydra" / "config.yaml", content if whole else content[:-1])
    run = read_one(tmp_path)
    assert run.method_key == method
    assert [" is no YAML (" in note for note in run.notes].count(True) == 2 - whole


def test_alphas_of_the_authors_code_are_methods_of_their_own(tmp_path: Path) -> None:
    recipe, folders = {"method": "vl_norm_as_coded"}, []
    for seed, alpha in enumerate((1.0, 0.75)):
        folder = write_run(tmp_path, "seq-mean-token-sum-norm", seed, curve={10: 0.5}, recipe=recipe)
        folders.append(configure(folder, algorithm__vl_norm_as_coded_alpha=alpha))
    assert said(read(*folders)) == [("vl_norm_as_coded:1", 0), ("vl_norm_as_coded:0.75", 1)]
    assert [row["method"] for row in made(read(*folders), "results")] == [
        "VL Norm, as coded (α = 0.75)",
        "VL Norm, as coded (α = 1)",
    ]


ACTOR = "actor_rollout_ref.actor"


@pytest.mark.parametrize(
    ("script", "method"),
    [([], "dapo_norm_as_coded"), ([f"{ACTOR}.loss_agg_mode=seq-mean-token-mean"], "grpo_norm"),
     ([f"{ACTOR}.use_dr_grpo=True"], "dr_grpo"),
     ([f"{ACTOR}.use_grpopp=True", f"{ACTOR}.grpopp_config.alpha=0.0"], "dr_grpo_norm"),
     ([f"{ACTOR}.use_grpopp=True", f"{ACTOR}.grpopp_config.alpha=1"], "vl_norm_as_coded:1"),
     (["algorithm.filter_overlong_response.enable=True"], "overlong_filtering_as_coded"),
     (["reward_model.overlong_buffer.enable=True"], "soft_punishment_as_coded")],
)  # fmt: skip
def test_the_authors_fork_has_its_methods_in_keys_of_its_own(script: list[str], method: str, tmp_path: Path) -> None:
    """As its scripts set them. Its entropy is logged by loss_agg_mode (ray_trainer.py:1004), whatever it trains."""
    off = [f"{ACTOR}.use_dr_grpo=False", f"{ACTOR}.use_grpopp=False", f"{ACTOR}.grpopp_config.alpha=0.75"]
    config = OmegaConf.from_dotlist([f"{ACTOR}.loss_agg_mode=token-mean", *off, *script])
    put(tmp_path / ".hydra" / "config.yaml", OmegaConf.to_yaml(config))
    run = read_one(put(tmp_path / "log.jsonl", record(1, actor__entropy=0.25)).parent)
    assert run.method_key == method
    assert measures.entropy_per_token(run) == pytest.approx([0.25])


@pytest.mark.parametrize(
    ("mode", "recipe", "method"),
    [("vl_norm:0.5", "dapo_norm", "vl_norm:0.5"), ("token-mean", "grpo_norm", "dapo_norm"),
     ("grpo_norm", "dr_grpo_norm", "grpo_norm"), ("floor_norm:32", "vl_norm", "floor_norm:32")],
)  # fmt: skip
def test_the_mode_that_was_trained_decides_over_the_recipes_method(
    mode: str, recipe: str, method: str, tmp_path: Path
) -> None:
    run = read_one(write_run(tmp_path, mode, curve={1: 0.5}, recipe={"method": recipe}))
    assert run.method_key == method
    assert f"recipe.method={recipe}, but loss_agg_mode={method}" in run.notes


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


# ---------------------------------------------------------------------------------------------------------------- names


NAMED = {
    ("exp-vl_norm/metrics.jsonl", "exp-dapo_norm/metrics.jsonl"): [("dapo_norm", 0), ("vl_norm:1", 0)],
    ("vl_norm.jsonl", "token-mean.jsonl"): [("dapo_norm", 0), ("vl_norm:1", 0)],
    ("vl_norm/a.jsonl", "seq-mean-token-mean/a.jsonl"): [("grpo_norm", 0), ("vl_norm:1", 0)],
    ("proj/vl_norm_s0.jsonl", "proj/vl_norm-seed1.jsonl"): [("vl_norm:1", 1), ("vl_norm:1", 0)],
    ("vl_norm/seed3/log.jsonl", "vl_norm/seed4/log.jsonl"): [("vl_norm:1", 3), ("vl_norm:1", 4)],
    ("vl_norm:0.75/metrics.jsonl", "Dr_GRPO_Norm/metrics.jsonl"): [("dr_grpo_norm", 0), ("vl_norm:0.75", 0)],
    ("vl-norm-0.5_s2/x.jsonl", "q_vl_norm-alpha0.25-s3/x.jsonl"): [("vl_norm:0.25", 3), ("vl_norm:0.5", 2)],
    ("q-vl_norm-1.5b_s0/x.jsonl",): [("vl_norm:1", 0)],
    ("dapo-tiny-vl_norm_as_coded-seed0/metrics-000.jsonl", "dapo-tiny-dapo_norm_as_coded-seed1/metrics-000.jsonl"): [
        ("dapo_norm_as_coded", 1),
        ("vl_norm_as_coded", 0),
    ],
    ("project/vl_norm:0.75,lr=1e-06,seed=3.jsonl",): [("vl_norm:0.75", 3)],
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
    rows = made(read(tmp_path), "results")
    assert [(row["setting"], row["method"], row["seeds"]) for row in rows] == [
        (task, method, 1) for task in ("CountDown", "Math") for method in ("DAPO Norm", "VL Norm (α = 1)")
    ]
    assert [row["VL Norm minus this"].value for row in rows[::2]] == pytest.approx([0.1, 0.1])


def test_validation_sets_tell_tasks_apart_where_nothing_else_does(tmp_path: Path) -> None:
    for name, task in (("vl_norm", "gsm8k"), ("token-mean", "amc"), ("dr_grpo", "amc")):
        put(tmp_path / f"{name}.jsonl", text((0, 40, 0.0)).replace("val-core/set", f"val-core/{task}"))
    rows = made(runs := read(tmp_path), "results")
    assert [row["setting"] for row in rows] == ["amc", "amc", "gsm8k"]
    assert all("its setting is not known: its validation sets are taken as its task" in run.notes for run in runs)
    assert len({run.setting for run in read(tmp_path / "token-mean.jsonl", tmp_path / "dr_grpo.jsonl")}) == 1


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
    runs = read(*{"folders": [file.parent for file in files], "files": files, "one folder": ["."]}[given])
    rows = {row["method"]: row for row in made(runs, "results")}
    assert rows["DAPO Norm"]["VL Norm minus this"].value == pytest.approx(0.1)
    speed = made(runs, "speedup")[0]
    assert (speed["at step"], speed["raw: last step / first hit"].value) == ("10–20", pytest.approx(2.0))


def test_the_name_of_what_all_runs_are_in_says_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / "vl_norm_study_seed3" / f"{name}.jsonl", text((0, 40, 0.0)))
    folder = tmp_path / "vl_norm_study_seed3"
    for arguments in ([folder], [folder / "a.jsonl", folder / "b.jsonl"]):
        assert said(read(*arguments)) == [("a", 0), ("b", 0)]
