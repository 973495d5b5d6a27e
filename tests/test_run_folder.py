"""The folder of a run: which later start fits, which checkpoints are kept, what counts as finished.

Covered: all of folder.py on folders as verl leaves them, whole or cut by a crash. Not covered: verl itself, which
writes, loads and validates (tests/test_e2e.py).
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from vlnorm_verl import files
from vlnorm_verl.files import UserError
from vlnorm_verl.runs.config import compose, with_settings
from vlnorm_verl.runs.folder import (
    MAY_CHANGE,
    begin,
    completed_steps,
    finish,
    prune,
    refuse_other,
    remember,
    state,
    tidy,
    validation_due,
)
from vlnorm_verl.runs.process import next_metrics
from vlnorm_verl.runs.request import Request, settings

RECIPES = Path(__file__).parent.parent / "recipes"


def configured(folder: Path, *overrides: str) -> DictConfig:
    return with_settings(compose(RECIPES / "config", list(overrides)), {"recipe.folder": str(folder)})


def saved(folder: Path, *steps: int, tracker: str | None = None) -> None:
    """Checkpoints as verl writes them, the last one named by the tracker."""
    for step in steps:
        actor = folder / "checkpoints" / f"global_step_{step}" / "actor"
        actor.mkdir(parents=True)
        for name in ("model", "optim", "extra_state"):
            (actor / f"{name}_world_size_1_rank_0.pt").touch()
        (actor.parent / "data.pt").touch()
    text = str(max(steps)) if tracker is None else tracker
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(text)


def logged(folder: Path, *steps: int, validated: Iterable[int] = ()) -> None:
    lines = []
    for step in steps:
        validation = {"val-core/set/acc/mean@8": 0.5} if step in validated else {}
        lines.append(json.dumps({"step": step, "data": {"training/global_step": step, **validation}}) + "\n")
    (folder / "metrics-000.jsonl").write_text("".join(lines))


def there(folder: Path) -> list[int]:
    return sorted(int(path.name[12:]) for path in (folder / "checkpoints").glob("global_step_*"))


# ------------------------------------------------------------------------------------------------- which start fits

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"


def test_what_is_no_part_of_the_experiment_may_change(tmp_path: Path) -> None:
    """The remedies for memory in docs/costs.md, all at once, and how long the run is."""
    remember(configured(tmp_path), tmp_path)
    logged(tmp_path, 1)
    changes = [
        *("recipe.steps=2000", "trainer.save_freq=5", "trainer.logger=[console,file,wandb]", "recipe.root=/elsewhere"),
        *(f"{ACTOR}.ppo_micro_batch_size_per_gpu=1", f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu=1"),
        *(f"{ACTOR}.entropy_from_logits_with_chunking=true", f"{ACTOR}.use_dynamic_bsz=true"),
        *(f"{ACTOR}.fsdp_config.param_offload=false", f"{ACTOR}.fsdp_config.offload_policy=true"),
        *(f"{ROLLOUT}.max_num_seqs=64", f"{ROLLOUT}.gpu_memory_utilization=0.5", f"{ROLLOUT}.enforce_eager=true"),
        *(f"{ROLLOUT}.tensor_model_parallel_size=2", "actor_rollout_ref.model.use_fused_kernels=true"),
    ]
    remember(configured(tmp_path, *changes), tmp_path)


def test_the_limit_that_ended_a_run_may_be_raised(tmp_path: Path) -> None:
    """As the error of paper/replay_buffer.py says."""
    given, groups = ["family=dapo", "length=3072"], "algorithm.filter_groups"
    remember(configured(tmp_path, *given), tmp_path)
    logged(tmp_path, 1)
    refuse_other(configured(tmp_path, *given, f"{groups}.max_num_gen_batches=0"), tmp_path)
    with pytest.raises(UserError, match=r"filter_groups\.max_inflight_gen_batches: 3 there"):
        refuse_other(configured(tmp_path, *given, f"{groups}.max_inflight_gen_batches=2"), tmp_path)


def test_the_experiment_may_not(tmp_path: Path) -> None:
    remember(configured(tmp_path), tmp_path)
    logged(tmp_path, 1)
    changes = {
        "recipe.alpha=0.5": f'{ACTOR}.loss_agg_mode: "vl_norm:1.0" there, "vl_norm:0.5" asked for',
        "trainer.nnodes=2": "trainer.nnodes: 1 there, 2 asked for",
        "recipe.seed=1": "recipe.seed: 0 there, 1 asked for",
        f"{ACTOR}.ppo_mini_batch_size=16": f"{ACTOR}.ppo_mini_batch_size: 32 there, 16 asked for",
        f"{ACTOR}.loss_scale_factor=9": f"{ACTOR}.loss_scale_factor: 8192 there, 9 asked for",
        "data.max_response_length=7": "data.max_response_length: 8192 there, 7 asked for",
        f"{ROLLOUT}.temperature=0.6": f"{ROLLOUT}.temperature: 1.0 there, 0.6 asked for",
        "data.val_max_samples=4": "data.val_max_samples: -1 there, 4 asked for",
    }
    with pytest.raises(UserError) as error:
        remember(configured(tmp_path, *changes), tmp_path)
    assert set(changes.values()) <= set(str(error.value).split("\n  "))
    assert "another release" not in str(error.value)
    (tmp_path / "config.yaml").write_text((tmp_path / "config.yaml").read_text() + "of_0_9_0: 1\n")
    with pytest.raises(UserError, match=r"of_0_9_0: 1 there, nothing asked for\n.*another release of verl"):
        remember(configured(tmp_path), tmp_path)


def test_a_start_that_trained_nothing_is_no_run(tmp_path: Path) -> None:
    """As one with a mistyped path of the model, or with too many GPUs."""
    remember(configured(tmp_path, "trainer.n_gpus_per_node=4"), tmp_path)
    remember(configured(tmp_path), tmp_path)
    logged(tmp_path, 1)
    remember(configured(tmp_path), tmp_path)
    with pytest.raises(UserError, match=r"trainer\.n_gpus_per_node: 8 there, 4 asked for"):
        remember(configured(tmp_path, "trainer.n_gpus_per_node=4"), tmp_path)


def test_forgotten_steps_do_not_end_a_run(tmp_path: Path) -> None:
    """Its optimizer would be removed at once."""
    remember(configured(tmp_path, "recipe.steps=3840"), tmp_path)
    saved(tmp_path, 1500)
    message = r"for 3840 steps; to end it at 1000 removes .* Accepted: recipe\.steps=3840 or more, or recipe\.keep=all"
    with pytest.raises(UserError, match=message):
        refuse_other(configured(tmp_path), tmp_path)
    refuse_other(configured(tmp_path, "recipe.keep=all"), tmp_path)
    # The last start counts, as where a run was made longer.
    last = configured(tmp_path, "recipe.steps=5000")
    (tmp_path / "trainer.yaml").write_text(OmegaConf.to_yaml(last, resolve=True))
    with pytest.raises(UserError, match="for 5000 steps"):
        refuse_other(configured(tmp_path, "recipe.steps=3840"), tmp_path)
    finish(configured(tmp_path, "recipe.steps=1500"), tmp_path)
    refuse_other(configured(tmp_path), tmp_path)  # it is finished: nothing is done


@pytest.mark.parametrize(
    ("before", "now", "accepted"),
    [("null", "2", "null"), ("0", "2", "null"), ("3", "2", "3 or more, or null"), ("2", "0", ""), ("1", "2", "")],
)
def test_forgotten_retention_removes_no_checkpoint(tmp_path: Path, before: str, now: str, accepted: str) -> None:
    remember(configured(tmp_path, f"trainer.max_actor_ckpt_to_keep={before}"), tmp_path)
    logged(tmp_path, 1)
    later = configured(tmp_path, f"trainer.max_actor_ckpt_to_keep={now}")
    if accepted:
        with pytest.raises(UserError, match=f"; {now} removes checkpoints for good. Accepted: {accepted}$"):
            refuse_other(later, tmp_path)
    else:
        refuse_other(later, tmp_path)


def test_the_data_folder_may_move_with_the_tiny_model_in_it(tmp_path: Path) -> None:
    remember(configured(tmp_path, "model=tiny", "recipe.data=/here/data"), tmp_path)
    logged(tmp_path, 1)
    remember(configured(tmp_path, "model=tiny", "recipe.data=/there/data"), tmp_path)
    for other in ("/there/data/other", "/there/data2/model", "/model", "/here/data/model"):
        config = configured(tmp_path, "model=tiny", "recipe.data=/there/data", f"actor_rollout_ref.model.path={other}")
        with pytest.raises(UserError, match=r'model\.path: "\${recipe.data}/model" there, .* asked for'):
            remember(config, tmp_path)


def test_what_helps_a_run_that_fails_may_change_in_it() -> None:
    page = (RECIPES.parent / "docs/gpu.md").read_text().partition("## A run that fails")[2].partition("\n## ")[0]
    remedies = [line.split("|")[3] for line in page.splitlines() if line.startswith("| ")]
    keys = re.findall(r"`((?:actor_rollout_ref|data|recipe|trainer)\.[\w.]+)", " ".join(remedies))
    assert len(keys) > 3
    assert not [key for key in keys if not any(fnmatch(key, may) for may in MAY_CHANGE)]


def test_a_loss_of_micro_batches_keeps_them(tmp_path: Path) -> None:
    """With whatever method it is asked for (docs/recipes.md gives it to others by this override)."""
    loss = f"{ACTOR}.policy_loss.loss_mode=dapo_norm_as_coded"
    keys = [f"{ACTOR}.{key}" for key in ("ppo_micro_batch_size_per_gpu", "ppo_max_token_len_per_gpu")]
    changes = [*(f"{key}=2" for key in keys), f"{ACTOR}.use_dynamic_bsz=true"]
    remember(configured(tmp_path / "other"), tmp_path / "other")
    logged(tmp_path / "other", 1)
    remember(configured(tmp_path / "other", *changes), tmp_path / "other")
    remember(configured(tmp_path, loss), tmp_path)
    logged(tmp_path, 1)
    with pytest.raises(UserError) as error:
        remember(configured(tmp_path, loss, *changes), tmp_path)
    for key in (*keys, f"{ACTOR}.use_dynamic_bsz"):
        assert f"\n  {key}: " in str(error.value)


def test_the_data_sets_may_move_and_not_be_others(tmp_path: Path) -> None:
    remember(configured(tmp_path, "task=math", "recipe.data=/here"), tmp_path)
    logged(tmp_path, 1)
    remember(configured(tmp_path, "task=math", "recipe.data=/there"), tmp_path)
    for other in ("data.train_files=/there/other.parquet", "data.val_files=[/there/math/math500.parquet]"):
        with pytest.raises(UserError, match=r"data\.(train|val)_files: .* there, .* asked for"):
            remember(configured(tmp_path, "task=math", "recipe.data=/there", other), tmp_path)


# ------------------------------------------------------------------------------------------------- how far a run is


def test_a_copy_of_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    saved(tmp_path, 20, 40)
    (copy := tmp_path / "checkpoints" / "global_step_20_copy").mkdir()
    prune(tmp_path, 1, 0)
    begin(configured(tmp_path), tmp_path)
    assert copy.exists()


def test_state_is_that_of_the_last_whole_checkpoint(tmp_path: Path) -> None:
    config = configured(tmp_path, "recipe.steps=40")
    assert state(config) == "not begun"
    saved(tmp_path, 20, 40, tracker="20")  # verl names it once it is whole
    assert state(config) == "step 20 of 40"
    saved(tmp_path, 41, tracker="40")
    assert state(config) == "step 40 of 40"  # trained, and perhaps not validated
    finish(config, tmp_path)
    assert state(config) == "finished"
    longer = configured(tmp_path, "recipe.steps=60", "recipe.keep=all")
    finish(longer, tmp_path)  # trainer.total_epochs has ended it
    assert state(longer) == "step 40 of 60"


def test_a_run_without_checkpoints_can_finish(tmp_path: Path) -> None:
    config = configured(tmp_path, "recipe.steps=3", "trainer.save_freq=-1")
    logged(tmp_path, 0, 1, 2)
    finish(config, tmp_path)
    assert state(config) == "not begun"
    logged(tmp_path, 0, 1, 2, 3)
    finish(config, tmp_path)
    assert state(config) == "finished"


def test_a_full_disk_leaves_no_empty_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(tmp_path, "recipe.steps=40")
    saved(tmp_path, 40)

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        finish(config, tmp_path)
    assert state(config) == "step 40 of 40"
    begin(config, tmp_path)  # can go on: its optimizer goes after the marker is there


def test_each_start_has_metrics_of_its_own(tmp_path: Path) -> None:
    """Also where a file was removed, or copied: verl empties the one that it is given."""
    assert next_metrics(tmp_path).name == "metrics-000.jsonl"
    for number in ("001", "002", "002-old"):
        (tmp_path / f"metrics-{number}.jsonl").touch()
    assert next_metrics(tmp_path).name == "metrics-003.jsonl"


@pytest.mark.parametrize(
    ("checkpoint", "last", "due"),
    [
        (40, 39, False),  # no validation at 40
        (100, 99, True),  # saved, and lost before or within its validation
        (100, 100, False),
        (100, 107, False),
        (180, 179, True),  # the last step is always validated
    ],
)
def test_a_validation_that_a_crash_took_is_repeated(tmp_path: Path, checkpoint: int, last: int, due: bool) -> None:
    given = [f"recipe.folder={tmp_path}", "recipe.steps=180", "trainer.test_freq=50"]
    saved(tmp_path, checkpoint)
    logged(tmp_path, *range(last + 1), validated=range(0, last + 1, 50))
    asked = configured(tmp_path, *given)
    assert validation_due(asked, tmp_path) == due
    config = with_settings(asked, settings(Request(RECIPES, given), asked, tmp_path))
    assert config.trainer.val_before_train == due
    assert config.trainer.val_only == (checkpoint == 180)
    only = configured(tmp_path, "trainer.val_only=true")
    config = with_settings(only, settings(Request(RECIPES, []), only, tmp_path))
    assert config.trainer.val_only
    assert config.trainer.val_before_train
    assert not validation_due(configured(tmp_path, "trainer.test_freq=-1"), tmp_path)


def test_a_run_that_is_cut_short_is_validated_where_it_now_ends(tmp_path: Path) -> None:
    """Step 40 was trained and recorded when 60 was the last to be validated."""
    saved(tmp_path, 40)
    logged(tmp_path, *range(43), validated=[0])
    assert not validation_due(configured(tmp_path, "recipe.steps=60", "trainer.test_freq=60"), tmp_path)
    shorter = configured(tmp_path, "recipe.steps=40", "trainer.test_freq=40")
    assert validation_due(shorter, tmp_path)
    logged(tmp_path, *range(43), validated=[0, 40])
    assert not validation_due(shorter, tmp_path)


def test_a_lock_empties_no_file(tmp_path: Path) -> None:
    """Whoever may write into a folder in /tmp could make its lock a link."""
    (precious := tmp_path / "precious").write_text("mine")
    (folder := tmp_path / "folder").mkdir()
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), files.locked(folder):
        pass
    assert precious.read_text() == "mine"


def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"no file locks .*not implemented"), files.locked(tmp_path):
        pass


# ------------------------------------------------------------------------------------------------- checkpoints


def test_a_tracker_that_a_crash_left_empty(tmp_path: Path) -> None:
    """verl's int('') would fail at every later start."""
    saved(tmp_path, 20, 40, tracker="")
    (tmp_path / "checkpoints" / "global_step_60" / "actor").mkdir(parents=True)  # cut, without data.pt
    assert completed_steps(tmp_path) == 40
    begin(configured(tmp_path), tmp_path)
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "40"
    assert there(tmp_path) == [20, 40]  # what the crash left unfinished is gone


def test_the_step_before_a_checkpoint_that_cannot_be_read_is_there(tmp_path: Path) -> None:
    """However often a start failed by it. docs/gpu.md says how to go on from the step before."""
    saved(tmp_path, 20, 40)
    for tracker, left in (("40", [20, 40]), ("40", [20, 40]), ("20", [20])):
        (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(tracker)
        begin(configured(tmp_path), tmp_path)
        assert there(tmp_path) == left
    saved(tmp_path, 40)
    begin(configured(tmp_path, "trainer.save_freq=41"), tmp_path)  # saves before it can be seen that 40 was read
    assert there(tmp_path) == [40]


@pytest.mark.parametrize(("finished", "message"), [(20, "step 40 is not whole"), (40, "was finished at step 40")])
def test_without_an_optimizer_a_run_is_finished_or_was_killed(tmp_path: Path, finished: int, message: str) -> None:
    """verl's retention of one checkpoint removes actor/ before it names the next one."""
    saved(tmp_path, 40)
    shutil.rmtree(tmp_path / "checkpoints" / "global_step_40" / "actor")
    (tmp_path / "finished").write_text(f"{finished}\n")  # the first, before the run was made longer
    with pytest.raises(UserError, match=message):
        begin(configured(tmp_path), tmp_path)
    saved(tmp_path, 20, tracker="40")
    with pytest.raises(UserError, match=f"{message}.*, or write 20 into" if finished < 40 else message):
        begin(configured(tmp_path), tmp_path)


def test_a_run_that_began_from_another_ones_checkpoint_goes_on_from_its_own(tmp_path: Path) -> None:
    given = [
        f"recipe.folder={tmp_path}",
        "trainer.resume_mode=resume_path",
        "trainer.resume_from_path=/a/global_step_9",
    ]
    without_adam = f"{ACTOR}.checkpoint.load_contents=[model,extra]"  # as docs/scale.md has it

    def started(*given: str) -> tuple[str, list[str]]:
        asked = configured(tmp_path, *given)
        config = with_settings(asked, settings(Request(RECIPES, [*given]), asked, tmp_path))
        remember(config, tmp_path)
        return config.trainer.resume_mode, [*config.actor_rollout_ref.actor.checkpoint.load_contents]

    assert started(*given, without_adam) == ("resume_path", ["model", "extra"])
    logged(tmp_path, 10)
    for other in (["trainer.resume_mode=disable"], [*given[1:2], "trainer.resume_from_path=/b/global_step_9"]):
        with pytest.raises(UserError, match=r"trainer\.resume_"):
            started(given[0], *other)
    with pytest.raises(UserError, match=r"load_contents: "):
        started(*given)
    saved(tmp_path, 40)
    for again in ([*given, without_adam], given, given[:1], [given[0], without_adam]):
        assert started(*again) == ("auto", ["model", "optimizer", "extra"])
    with pytest.raises(UserError, match=r"trainer\.resume_mode"):
        started(given[0], "trainer.resume_mode=disable")


def test_a_checkpoint_that_cannot_be_removed_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 20, 40, 60)
    folder = tmp_path / "checkpoints"
    (folder / "global_step_20").rename(moved := tmp_path / "another disk")
    (folder / "global_step_20").symlink_to(moved)

    def busy(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", busy)
        prune(tmp_path, 2, 60)
    assert there(tmp_path) == [40, 60]
    assert (moved / "data.pt").exists()
    prune(tmp_path, 2, 60)
    assert there(tmp_path) == [60]


@pytest.mark.parametrize(
    ("keep", "done", "left"),
    [
        (2, 40, [40]),  # with the next one there are two
        (2, 60, [60]),
        (2, 80, [60, 80]),  # 60 and 80 are the present start's, which removes its own
        (1, 40, [40]),
        (1, 60, [60]),
        (3, 40, [20, 40]),
        (3, 60, [40, 60]),
        (None, 80, [20, 40, 60, 80]),
        (0, 80, [20, 40, 60, 80]),
    ],
)
def test_an_earlier_starts_checkpoints_make_room_for_the_next(
    tmp_path: Path, keep: int | None, done: int, left: list[int]
) -> None:
    saved(tmp_path, *range(20, done + 1, 20))
    (tmp_path / "checkpoints" / "global_step_100" / "actor").mkdir(parents=True)  # which verl is writing
    prune(tmp_path, keep, began=40)
    assert there(tmp_path) == [*left, 100]


@pytest.mark.parametrize(
    ("change", "steps", "optimizers"),
    [
        ("recipe.keep=model", [40], 0),
        ("recipe.keep=all", [20, 40], 2),
        ("trainer.max_actor_ckpt_to_keep=null", [20, 40], 0),
    ],
)
def test_what_a_finished_run_keeps(tmp_path: Path, change: str, steps: list[int], optimizers: int) -> None:
    saved(tmp_path, 20, 40)
    finish(configured(tmp_path, change, "recipe.steps=40"), tmp_path)
    assert there(tmp_path) == steps
    assert len(list(tmp_path.rglob("optim_*"))) == optimizers
    assert len(list(tmp_path.rglob("model_*"))) == len(steps)
    longer = configured(tmp_path, "recipe.steps=60")
    if optimizers:
        begin(longer, tmp_path)
    else:
        with pytest.raises(UserError, match=r"without the optimizer, so it cannot go on.*recipe\.keep=all"):
            begin(longer, tmp_path)


@pytest.mark.parametrize(("change", "left"), [("recipe.steps=40", 0), ("recipe.keep=all", 2), ("recipe.steps=60", 2)])
def test_what_a_kill_kept_is_removed_later(tmp_path: Path, change: str, left: int) -> None:
    """Of the run that was finished: not what another start has kept, or goes on from."""
    remember(configured(tmp_path / "where it was before", "recipe.steps=40", change), tmp_path)
    saved(tmp_path, 20, 40)
    (tmp_path / "finished").write_text("40\n")
    tidy(tmp_path)
    assert len(list(tmp_path.rglob("optim_*"))) == left
