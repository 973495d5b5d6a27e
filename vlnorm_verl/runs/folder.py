"""The folder of a run, on a disk that every node sees: how far the run is, which later start fits, what is kept.

    config.yaml         the whole configuration of the first start that trained; a later start must agree with it
    trainer.yaml        that of the last start, which verl's trainer was given
    checkpoints/        verl's; the same command again goes on from the last
    rollouts/, validation/    every response, as verl dumps them
    finished            the last step, once it is trained and validated
    train.log, metrics-NNN.jsonl, .lock      see vlnorm_verl/runs/process.py

verl's own retention (`trainer.max_actor_ckpt_to_keep`) knows only what the present start has saved: its list begins
empty (verl/utils/checkpoint/checkpoint_manager.py:58), and it leaves each folder's data.pt. The rest is done here.
"""

from __future__ import annotations

import math
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlnorm_verl import files
from vlnorm_verl.files import UserError
from vlnorm_verl.runs.config import depends_on_micro_batches, flatten
from vlnorm_verl.runs.process import read_metrics

# What may change between two starts of one run: all else is refused, since it might be the experiment. Not the number
# of GPUs: verl's FSDP checkpoints are read by as many ranks as wrote them.
MAY_CHANGE = (
    # how long it is, where it lies, what it prints and keeps
    *("recipe.steps", "recipe.root", "recipe.data", "recipe.folder", "recipe.keep"),
    *("trainer.total_*", "trainer.*_freq", "trainer.val_*", "trainer.*_dir", "trainer.max_*_ckpt_to_keep"),
    *("trainer.logger", "trainer.log_*", "trainer.*_name", "trainer.v1.sampler.sampler_kwargs.poll_interval"),
    *("ray_kwargs.*", "global_profiler.*", "*.profiler.*"),
    "*filter_groups.max_num_gen_batches",  # ends a step with an error, or does nothing
    "*val_kwargs.do_sample",  # does nothing (check.py)
    # memory and speed: where and in how many pieces the same numbers are computed
    *("*micro_batch_size*", "*use_dynamic_bsz", "*max_token_len_per_gpu", "*offload*"),
    *("*entropy_from_logits_with_chunking", "*entropy_checkpointing", "*enable_gradient_checkpointing"),
    *("*use_torch_compile", "*use_fused_kernels", "*reshard_after_forward", "*forward_prefetch", "transfer_queue.*"),
    *("reward.num_workers", "actor_rollout_ref.rollout.agent.num_workers", "data.filter_overlong_prompts_workers"),
    *("actor_rollout_ref.rollout.max_num_*", "actor_rollout_ref.rollout.max_model_len"),
    *("actor_rollout_ref.rollout.gpu_memory_utilization", "actor_rollout_ref.rollout.tensor_model_parallel_size"),
    *("actor_rollout_ref.rollout.enforce_eager", "actor_rollout_ref.rollout.cudagraph_capture_sizes"),
    *("actor_rollout_ref.rollout.enable_chunked_prefill", "actor_rollout_ref.rollout.enable_prefix_caching"),
    "actor_rollout_ref.rollout.free_cache_engine",
    *("actor_rollout_ref.rollout.checkpoint_engine.*", "actor_rollout_ref.rollout.layered_summon"),
)
# Not these, where the loss is one of micro-batches.
MICRO_BATCHES = tuple(
    f"actor_rollout_ref.actor.{key}"
    for key in ("ppo_micro_batch_size_per_gpu", "use_dynamic_bsz", "ppo_max_token_len_per_gpu")
)


# ------------------------------------------------------------------------------------------------------ how far it is


def completed_steps(folder: Path) -> int:
    """The step of the last whole checkpoint in a run's folder; 0 without one.

    Raises:
        UserError: it is no folder, or may not be read.
    """
    try:
        return int(_tracker(folder).read_text())
    except FileNotFoundError:
        return 0
    except (NotADirectoryError, PermissionError) as error:
        raise UserError(f"{error}: give another folder with recipe.folder=… or recipe.root=…") from error
    except ValueError:
        # A crash between its opening and its writing (verl's trainer/ppo/v1/trainer_base.py:1024) leaves it empty.
        # The checkpoint itself is whole by then.
        return max((step for step, path in _checkpoints(folder).items() if _whole(path)), default=0)


def state(config: DictConfig) -> str:
    """`finished` (trained and validated), `step x of y` (of the last checkpoint) or `not begun`."""
    folder, steps = Path(config.recipe.folder), config.trainer.total_training_steps
    if _finished(folder) >= steps:
        return "finished"
    done = completed_steps(folder)
    return f"step {done} of {steps}" if done or (folder / "config.yaml").exists() else "not begun"


def left(config: DictConfig) -> DictConfig:
    """A copy with the number of steps that are still to be trained."""
    rest, done = config.copy(), completed_steps(Path(config.recipe.folder))
    rest.trainer.total_training_steps = max(0, config.trainer.total_training_steps - done)
    return rest


def validation_due(config: DictConfig, folder: Path) -> bool:
    """Whether the step of the last checkpoint was to be validated, and was not.

    verl saves before it validates, and logs a step after both (trainer/ppo/v1/trainer_base.py:480-514). A resumed start
    validates the loaded model as that step if it is told to validate before training (439).
    """
    done, every = completed_steps(folder), config.trainer.test_freq
    due = done > 0 and every > 0 and (done % every == 0 or done >= config.trainer.total_training_steps)
    return due and not any(
        record["step"] == done and any(key.startswith("val-") for key in record["data"])
        for record in read_metrics(folder)
    )


# ------------------------------------------------------------------------------------------------------ a later start


def remember(config: DictConfig, folder: Path) -> None:
    """Keep the configuration of the first start, or of this one if no earlier one has trained.

    Raises:
        UserError: see `refuse_other`.
    """
    refuse_other(config, folder)
    if not (file := folder / "config.yaml").exists() or not _has_run(folder):
        files.write(file, OmegaConf.to_yaml(config, resolve=True))


def refuse_other(config: DictConfig, folder: Path) -> None:
    """
    Raises:
        UserError: the folder holds a run with other values, begun or finished; the message lists them. Or this start
            would remove what the last one was to keep.
    """
    file = folder / "config.yaml"
    if not file.exists() or not _has_run(folder):
        return
    fixed = MICRO_BATCHES if depends_on_micro_batches(config) else ()
    # From its own checkpoint it goes on whatever it began from.
    own = completed_steps(folder) > 0 and config.trainer.resume_mode == "auto"
    began_from = ("trainer.resume_*", "actor_rollout_ref.actor.checkpoint.load_contents")
    may_change = (*MAY_CHANGE, *began_from) if own else MAY_CHANGE

    def experiment(values: dict[str, Any]) -> dict[str, Any]:
        data = f"{values['recipe.data']}/"  # may move, with the tiny model in it

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [*map(moved, value)]
            return value.replace(data, "${recipe.data}/") if isinstance(value, str) else value

        return {
            key: moved(value)
            for key, value in values.items()
            if key in fixed or not any(fnmatch(key, may) for may in may_change)
        }

    before, now = experiment(flatten(OmegaConf.load(file))), experiment(flatten(config))
    if changed := files.differences(before, now):
        releases = "\nKeys that one side has not: the run may have begun with another release of verl, which it needs."
        raise UserError(
            f"{folder} holds a run with other values; give the same, or another folder with recipe.folder=… or "
            "recipe.root=…\n  " + "\n  ".join(changed) + (releases if before.keys() != now.keys() else "")
        )
    if state(config) == "finished":
        return
    # Both may change, but not by an override that was forgotten: what is removed cannot be had back.
    last = _last_start(folder)
    begun, steps = last.trainer.total_training_steps, config.trainer.total_training_steps
    if steps < begun and config.recipe.keep != "all":
        raise UserError(
            f"{folder}: the run was last started for {begun} steps; to end it at {steps} removes its optimizer for "
            f"good. Accepted: recipe.steps={begun} or more, or recipe.keep=all"
        )
    kept, keep = (run.trainer.max_actor_ckpt_to_keep or math.inf for run in (last, config))
    if keep < kept:
        most, more = ("null", "") if kept == math.inf else (kept, " or more, or null")
        raise UserError(
            f"{folder}: the run was last started with trainer.max_actor_ckpt_to_keep={most}; {keep} removes "
            f"checkpoints for good. Accepted: {most}{more}"
        )


def _has_run(folder: Path) -> bool:
    """Whether a start has come so far that a later one continues it: else it was refused, or ended in its beginning."""
    return completed_steps(folder) > 0 or _finished(folder) > 0 or bool(read_metrics(folder))


def _last_start(folder: Path) -> DictConfig:
    """The configuration of the last start, with the folder where it is now."""
    file = folder / "trainer.yaml" if (folder / "trainer.yaml").exists() else folder / "config.yaml"
    return OmegaConf.merge(OmegaConf.load(file), {"recipe": {"folder": str(folder)}})


def begin(config: DictConfig, folder: Path) -> None:
    """Make sure that verl finds the last checkpoint, and remove what a crash left unfinished.

    Earlier checkpoints stay until verl has read this one, which may be damaged: `prune` comes with the first metrics.
    Only where the first step is saved, the disk may have no room for that.

    Raises:
        UserError: verl would begin anew, or fail.
    """
    if not (done := completed_steps(folder)):
        return
    saved = _checkpoints(folder)
    path = saved.get(done)
    earlier = max((at for at, other in saved.items() if at < done and _whole(other) and _optimizer(other)), default=0)
    or_earlier = f", or write {earlier} into {_tracker(folder)} to go on from that step" if earlier else ""
    if path is None:
        raise UserError(
            f"{_tracker(folder)} names step {done}, which is not there: verl would begin anew. Delete this file if "
            f"that is what you want{or_earlier}"
        )
    loads = OmegaConf.select(config, "actor_rollout_ref.actor.checkpoint.load_contents") or []
    if "optimizer" in loads and not _optimizer(path):
        if _finished(folder) >= done:
            raise UserError(
                f"{folder}: the run was finished at step {done} and kept its model without the optimizer, so it cannot "
                "go on. Begin anew with recipe.folder=…; recipe.keep=all keeps everything"
            )
        raise UserError(
            f"{folder}: the checkpoint of step {done} is not whole, so the run cannot go on. With "
            "trainer.max_actor_ckpt_to_keep=1 verl removes it a moment before the next one is whole; 2 keeps one. "
            f"Begin anew with recipe.folder=…{or_earlier}"
        )
    for step, other in saved.items():
        if step > done:
            _remove(other)
    if _tracker(folder).read_text() != str(done):  # see completed_steps
        files.write(_tracker(folder), str(done))
    every, steps = config.trainer.save_freq, config.trainer.total_training_steps
    if done + 1 == steps or (every > 0 and (done + 1) % every == 0):  # verl saves before the first metrics
        prune(folder, config.trainer.max_actor_ckpt_to_keep, done)


def prune(folder: Path, keep: int | None, began: int) -> None:
    """Of the checkpoints of earlier starts, keep those that leave room for the next one among the `keep` newest.

    Before verl writes one it makes room too, but only by removing those that the present start has written.

    keep: None and 0 keep all, as in verl.
    began: the step from which the present start goes on. It writes, and removes, later ones only.
    """
    if not keep:
        return
    done, saved = completed_steps(folder), _checkpoints(folder)
    whole = sorted(step for step, path in saved.items() if step <= done and _whole(path))
    for step, path in saved.items():
        if step <= began and step not in whole[-max(1, keep - 1) :]:
            _remove(path)


def finish(config: DictConfig, folder: Path) -> None:
    """Mark a run whose last step is trained and validated, and keep what `recipe.keep` says: `model` or `all`.

    verl also ends without an error where trainer.total_epochs are over before the last step; that run is not finished.
    """
    reached = max([completed_steps(folder), *(record["step"] for record in read_metrics(folder))])
    if reached < config.trainer.total_training_steps:
        return
    # The marker first: a run that is killed without it, its optimizer gone, could not go on.
    files.write(folder / "finished", f"{config.trainer.total_training_steps}\n")
    _keep(config, folder)


def tidy(folder: Path) -> None:
    """What `finish` removes, once more: the last start may have been killed between its marker and that."""
    if (folder / "config.yaml").exists() and state(last := _last_start(folder)) == "finished":
        _keep(last, folder)


def _keep(config: DictConfig, folder: Path) -> None:
    if config.recipe.keep == "model":
        prune(folder, config.trainer.max_actor_ckpt_to_keep and 1, completed_steps(folder))
        for file in (folder / "checkpoints").glob("global_step_*/actor/optim_*"):
            file.unlink()


def _remove(checkpoint: Path) -> None:
    """As verl's own retention does: what cannot be removed does not end a training. A link: a user moved it."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
    else:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _finished(folder: Path) -> int:
    """The step at which the run was finished; 0 if it was not."""
    marker = folder / "finished"
    return int(marker.read_text()) if marker.exists() else 0


def _tracker(folder: Path) -> Path:
    return folder / "checkpoints" / "latest_checkpointed_iteration.txt"


def _checkpoints(folder: Path) -> dict[int, Path]:
    """{step: folder} of all that are there, whole or not."""
    paths = {path.name.removeprefix("global_step_"): path for path in (folder / "checkpoints").glob("global_step_*")}
    return {int(step): path for step, path in paths.items() if step.isdecimal()}  # not a user's global_step_20_copy


def _optimizer(path: Path) -> list[Path]:
    return list(path.glob("actor/optim_*"))


def _whole(path: Path) -> bool:
    """Of a checkpoint that the tracker does not name: verl writes data.pt last, and its retention removes actor/."""
    return (path / "actor").is_dir() and (path / "data.pt").exists()
