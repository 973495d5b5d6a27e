"""Whether verl would take a run's configuration, and train it as it says: without Ray, a GPU or a network."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import re
import warnings
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from vlnorm_verl.files import UserError
from vlnorm_verl.runs.config import LOGGERS, is_cpu
from vlnorm_verl.tokenizer import refuse_lost_spaces

# Whole numbers, and the least that each may be. verl notices a wrong one late (a seed), by an error that does not name
# it (division by 0 GPUs), or not at all (a run of 0 steps ends at once).
LEAST = {
    "recipe.seed": 0,
    "recipe.steps": 1,
    "trainer.total_training_steps": 1,
    "trainer.total_epochs": 1,
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 1,
    "data.train_batch_size": 1,
    "data.max_prompt_length": 1,
    "data.max_response_length": 1,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 1,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.val_kwargs.n": 1,
    "algorithm.filter_groups.max_inflight_gen_batches": 1,
}
# The same, where null is a value, too. verl keeps all checkpoints for -1, and folder.py would keep one.
LEAST_OR_NULL = {"trainer.max_actor_ckpt_to_keep": 0, "ray_kwargs.ray_init.num_cpus": 1}
# Keys of transformers' configurations: what a model does to its logits behind lm_head. None and 1 do nothing.
AFTER_LM_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def validate(config: DictConfig) -> None:
    """Check a composed run with verl's own classes, as far as that needs neither a GPU nor a network.

    The checks are those of verl.trainer.main_ppo before it starts Ray (with the plugin's in them), the dataclasses that
    its workers build later, and a load of every class and function that the configuration names.

    Raises:
        UserError: verl would refuse this configuration, or could not train it as it says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # engines that are not installed
        from verl.experimental.reward_loop.reward_loop import migrate_legacy_reward_impl
        from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
        from verl.trainer.ppo.reward import get_custom_reward_fn, resolve_reward_manager_cls
        from verl.trainer.ppo.utils import need_critic, need_reference_policy
        from verl.trainer.ppo.v1 import get_trainer_cls
        from verl.utils.config import omega_conf_to_dataclass, validate_config
        from verl.utils.import_utils import import_external_libs, load_extern_object
        from verl.utils.tracking import Tracking

    from vlnorm_verl.paper import whole_groups
    from vlnorm_verl.plugin.checks import check_scale

    check_numbers(config)
    model = str(config.actor_rollout_ref.model.path)
    if model.startswith("~"):
        raise UserError(
            f"actor_rollout_ref.model.path={model}: verl does not know ~. Accepted: the whole path, "
            f"{os.path.expanduser(model)}"
        )
    rollout = config.actor_rollout_ref.rollout
    if rollout.name != "vllm":
        raise UserError(
            f"actor_rollout_ref.rollout.name={rollout.name}: accepted is vllm. Others: in a run of your own"
        )
    if rollout.full_determinism:
        raise UserError(
            "actor_rollout_ref.rollout.full_determinism=true: every response to a prompt would get the same seed "
            "(workers/rollout/vllm_rollout/vllm_async_server.py:625), so all of a group would be one. Accepted: false"
        )
    if not rollout.val_kwargs.do_sample and rollout.val_kwargs.temperature:
        raise UserError(
            "actor_rollout_ref.rollout.val_kwargs.do_sample=false: verl 0.9 does not go by it with vLLM, but by "
            "val_kwargs.temperature. Accepted: true; for greedy validation val_kwargs.temperature=0"
        )
    actor = config.actor_rollout_ref.actor
    needs_m = actor.loss_agg_mode == "seq-mean-token-sum-norm"  # of verl's own modes; the plugin checks ours
    if needs_m and actor.loss_scale_factor is None:
        raise UserError(
            f"actor_rollout_ref.actor.loss_scale_factor=None with loss_agg_mode={actor.loss_agg_mode!r}: give M, a "
            "number of tokens above 0. verl's null takes each micro-batch's own width"
        )
    config = config.copy()  # verl and the plugin fill in values
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # engines that are not installed, a critic that is not wanted
            if needs_m:
                check_scale(actor.loss_scale_factor)
            validate_config(config, need_reference_policy(config), need_critic(config))
            for part in ("actor_rollout_ref.rollout", "algorithm.filter_groups"):
                omega_conf_to_dataclass(OmegaConf.select(config, part))
            in_folder = Path(model).is_dir()  # else a name on the hub, which needs a network
            loaded = omega_conf_to_dataclass(config.actor_rollout_ref.model) if in_folder else None
            get_trainer_cls(config.trainer.v1.trainer_mode)
            whole_groups.check(config)
            import_external_libs(config.actor_rollout_ref.model.external_lib)  # may register what is asked for next
            get_adv_estimator_fn(config.algorithm.adv_estimator)
            get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode)
            config = migrate_legacy_reward_impl(config)
            get_custom_reward_fn(config)
            resolve_reward_manager_cls(config)
            sampler = config.trainer.v1.sampler.custom_sampler
            if sampler.path:
                load_extern_object(sampler.path, sampler.name)
    except Exception as error:  # verl raises asserts, ValueErrors, KeyErrors, ImportErrors …: each refuses the run
        cause = f" ({type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
        raise UserError(f"verl refuses the configuration: {type(error).__name__}: {error}{cause}") from error

    if loaded is not None and not is_cpu(config):
        check_model(loaded, config.actor_rollout_ref.actor.strategy)
    check_micro_batches(config)
    for key in ("save_freq", "test_freq"):
        if config.trainer[key] is None:  # verl compares it with 0 at the end of the first step
            raise UserError(f"trainer.{key}=null: accepted is a number of steps; -1 is never")
    checkpoints = f"{config.recipe.folder}/checkpoints"
    if config.trainer.default_local_dir != checkpoints:  # where the launcher looks for them
        raise UserError(
            f"trainer.default_local_dir={config.trainer.default_local_dir}: accepted is {checkpoints}. For another "
            "disk make this a symbolic link, or set recipe.folder=…"
        )
    checkpoint = config.actor_rollout_ref.actor.checkpoint
    if checkpoint.async_save:
        raise UserError(
            "actor_rollout_ref.actor.checkpoint.async_save=true: with FSDP verl then names no checkpoint as the last "
            "(trainer/ppo/v1/trainer_base.py:1012), so every start would train from step 0. Accepted: false"
        )
    if not {"model", "optimizer", "extra"} <= {*checkpoint.save_contents}:
        raise UserError(
            f"actor_rollout_ref.actor.checkpoint.save_contents={checkpoint.save_contents}: a later start would go on "
            "with a new optimizer. Accepted: a list with model, optimizer and extra; recipe.keep=model removes the "
            "optimizer at the end"
        )
    needed = config.data.max_prompt_length + config.data.max_response_length
    if rollout.max_model_len is not None and rollout.max_model_len < needed:
        raise UserError(
            f"actor_rollout_ref.rollout.max_model_len={rollout.max_model_len}: vLLM would cut responses. Accepted: at "
            f"least data.max_prompt_length + data.max_response_length = {needed}, or null"
        )
    if not OmegaConf.is_list(config.trainer.logger) or "file" not in config.trainer.logger:
        raise UserError(
            f"trainer.logger={config.trainer.logger}: it must have `file` in a list, as in "
            "'trainer.logger=[console,file]': progress, resume and the report read its metrics. --logger NAME adds one"
        )
    unknown = [name for name in config.trainer.logger if name not in Tracking.supported_backend]
    if unknown:
        raise UserError(
            f"trainer.logger={list(config.trainer.logger)}: verl has no {', '.join(unknown)}. "
            f"Accepted: {', '.join(LOGGERS)}"
        )


def check_numbers(config: DictConfig) -> None:
    """Raises UserError for numbers out of their range that verl would find out after the start, or not at all."""
    from vlnorm_verl.registry import vl_norm

    for key, least in (LEAST | LEAST_OR_NULL).items():
        value, or_null = OmegaConf.select(config, key), "null, or " if key in LEAST_OR_NULL else ""
        if (type(value) is not int or value < least) and not (or_null and value is None):  # True is an int, too
            raise UserError(f"{key}={value}: accepted is {or_null}a whole number of at least {least}")
    alpha = config.algorithm.get("vl_norm_as_coded_alpha", 1.0)  # of paper/as_coded.py
    try:
        vl_norm(alpha)
    except (TypeError, ValueError) as error:
        raise UserError(f"algorithm.vl_norm_as_coded_alpha={alpha} (recipe.alpha): {error}") from error
    clip = config.actor_rollout_ref.actor.optim.clip_grad
    if isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0:
        raise UserError(
            f"actor_rollout_ref.actor.optim.clip_grad={clip}: gradients are scaled down to that norm. Accepted: a "
            "number above 0; inf does not clip"
        )
    punishment = OmegaConf.select(config, "reward.reward_kwargs.overlong_buffer_cfg")
    if punishment and punishment.enable:
        tokens, limit = punishment.len, config.reward.reward_kwargs.max_resp_len
        if type(tokens) is not int or not 1 <= tokens <= limit:
            raise UserError(
                f"reward.reward_kwargs.overlong_buffer_cfg.len={tokens} (recipe.overlong_buffer): accepted is a whole "
                f"number of tokens from 1 to reward.reward_kwargs.max_resp_len={limit}"
            )
    groups, reward_file = config.algorithm.filter_groups, config.reward.custom_reward_function.path or ""
    here = reward_file.startswith("pkg://vlnorm_verl.")  # what another one returns is not known
    if groups.enable and (not groups.metric or (here and groups.metric not in ("acc", "score", "reward"))):
        raise UserError(
            f"algorithm.filter_groups.metric={groups.metric}: no group could be dropped by it. Accepted: acc, reward, "
            "or another number that the reward function returns"
        )


def check_model(model: Any, strategy: str) -> None:
    """Raises UserError for a model that verl would feed or train wrongly, or could not train.

    model: verl's HFModelConfig, of a model in a folder. strategy: the actor's.
    """
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    where, of_text = f"actor_rollout_ref.model.path={model.path}", model.hf_config.get_text_config()
    try:
        if "hf_model_type" in inspect.signature(create_continuous_token_builder).parameters:  # not before 0.9.1
            # The rollout does this when Ray, FSDP and vLLM have started.
            create_continuous_token_builder(
                model.tokenizer, hf_model_type=model.hf_config.model_type, processor=model.processor
            )
    except ValueError as error:
        raise UserError(
            f"{where}: verl's rollout cannot take this tokenizer: {error}. A token that is missing can be added in a "
            "local copy: tokenizer.add_tokens"
        ) from error
    refuse_lost_spaces(model.tokenizer, where, ["Two words, a number (23) and\na second line."])
    if model.use_fused_kernels:
        if strategy == "fsdp2" and not model.share_embeddings_and_output_weights:
            raise UserError(
                f"{where} with use_fused_kernels=true (attention=sdpa): verl's fused log-probs read the weight of "
                "lm_head (models/transformers/dense_common.py:125), which FSDP2 has sharded where it is not the "
                "embedding's. Accepted: use_fused_kernels=false, as attention=flash has it"
            )
        if own := {key: value for key in AFTER_LM_HEAD if (value := getattr(of_text, key, None)) not in (None, 1)}:
            raise UserError(
                f"{where} with use_fused_kernels=true (attention=sdpa): verl's fused log-probs leave out what the "
                f"model does to its logits, {own}, so it would train another policy than is sampled. Accepted: "
                "use_fused_kernels=false, as attention=flash has it"
            )


def check_micro_batches(config: DictConfig) -> None:
    """Raises UserError for batches that are no whole number of micro-batches: verl finds out in the first step only.

    The assertion is in verl's workers/engine/utils.py.
    """
    actor, rollout, trainer = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.trainer
    ranks = trainer.nnodes * trainer.n_gpus_per_node
    if actor.ppo_mini_batch_size * rollout.n % ranks:  # with micro-batches by tokens, too
        raise UserError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={actor.ppo_mini_batch_size} prompts · rollout.n={rollout.n} "
            f"responses cannot be dealt out evenly to {ranks} GPUs (trainer.nnodes · n_gpus_per_node)"
        )
    batches = {
        "actor.ppo_micro_batch_size_per_gpu": (
            actor.use_dynamic_bsz,
            "a mini-batch of ppo_mini_batch_size",
            actor.ppo_mini_batch_size,
            actor.ppo_micro_batch_size_per_gpu,
        ),
        "rollout.log_prob_micro_batch_size_per_gpu": (
            rollout.log_prob_use_dynamic_bsz,
            "a batch of data.train_batch_size",
            config.data.train_batch_size,
            rollout.log_prob_micro_batch_size_per_gpu,
        ),
    }
    for key, (dynamic, what, prompts, micro) in batches.items():
        if not dynamic and micro is not None and (micro < 1 or prompts * rollout.n % (ranks * micro)):
            raise UserError(
                f"actor_rollout_ref.{key}={micro}: {what}={prompts} prompts · rollout.n={rollout.n} responses over "
                f"{ranks} GPUs (trainer.nnodes · n_gpus_per_node) is no whole number of micro-batches. Accepted: "
                f"a divisor of {prompts * rollout.n / ranks:g}"
            )


# What is handed on whole, to Ray, vLLM, transformers, TransferQueue, a user's reward: its keys are theirs. recipe.* is
# interpolated.
HANDED_ON = re.compile(
    r"^(recipe|ray_kwargs|transfer_queue)\.|\.(engine_kwargs|override_config|reward_kwargs|\w+_template_kwargs)\."
)


def unread_keys(config: DictConfig, keys: list[str]) -> list[str]:
    """Those of `keys` (dotted, leaves) that no code of verl's or of this package reads in such a run: they do nothing.

    By name: a key is read if its last part stands somewhere behind a dot or in quotes, in the source of this package or
    of verl without the engines that the run does not use, or as `self.<name>` in the dataclass that its `_target_`
    names. So a key that is read nowhere, but has the name of another one that is, is not found.
    """
    names = _names_read(config.actor_rollout_ref.actor.strategy.removesuffix("2"))
    unread = [key for key in keys if not HANDED_ON.search(key) and key.rpartition(".")[2] not in names]
    return [key for key in unread if not _read_by_its_class(config, key)]


@functools.cache
def _names_read(engine: str) -> frozenset[str]:
    import verl

    package, names = Path(verl.__file__).parent, set[str]()
    engines = package / "workers" / "engine"
    others = {folder for folder in engines.iterdir() if folder.is_dir() and folder.name != engine}
    for file in [*package.rglob("*.py"), *Path(__file__).parents[1].rglob("*.py")]:
        if not others & set(file.parents):
            text = file.read_text(encoding="utf-8")
            if package / "workers" / "config" in file.parents:
                text = text.replace("self.", "")  # what a dataclass only checks is not read by that
            names.update(re.findall(r"[.\"'](\w+)", text))
    return frozenset(names)


def _read_by_its_class(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    target = OmegaConf.select(config, f"{parent}._target_")
    if target is None:
        return False
    members = [member for base in get_class(target).__mro__ for member in vars(base).values()]
    codes = [inspect.unwrap(member).__code__ for member in members if inspect.isfunction(member)]
    return any(name in code.co_names for code in codes if code.co_filename != "<string>")  # a dataclass's own __init__
