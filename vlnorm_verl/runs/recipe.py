"""A recipe's configuration: compose it, check it against verl, and say where each value comes from.

The values are in recipes/config (Hydra groups over verl's ppo_trainer). Nothing here starts Ray or needs a GPU.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import inspect
import io
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlnorm_verl.files import UserError

CONFIG_NAME = "recipe"
# In the order in which recipe.yaml composes them: a later one wins.
GROUPS = ("family", "task", "model", "length", "method", "attention", "scale")
TINY_MODEL = Path(__file__).parents[1] / "tasks" / "tiny" / "weights"
LOGGERS = ("console", "file", "wandb", "tensorboard", "trackio", "swanlab", "mlflow")


# ------------------------------------------------------------------------------------------------------ overrides


def parsed(overrides: list[str]) -> list[Override]:
    """Overrides as Hydra reads them, one for one.

    Raises:
        UserError: Hydra cannot read one, or it stands for several values.
    """
    found = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
            if override.is_sweep_override():
                raise HydraException("several values")
        except HydraException as error:
            raise UserError(
                f"{text}: Hydra cannot read this as key=value ({str(error).splitlines()[0]}). A value with special "
                """characters needs quotes of its own, inside of the shell's: "recipe.root='~/a, (b)=#1'\""""
            ) from error
        found.append(override)
    return found


def override(key: str, text: str) -> str:
    """`key=text`, or `key='text'` where Hydra would not read it back as this text."""
    with contextlib.suppress(UserError):
        if parsed([f"{key}={text}"])[0].value() == text:
            return f"{key}={text}"
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def without(overrides: list[str], *keys: str) -> list[str]:
    """The overrides but those of these keys, with or without + before them."""
    return [text for text, one in zip(overrides, parsed(overrides), strict=True) if one.key_or_group not in keys]


def hydra_overrides(overrides: list[str]) -> list[str]:
    """Overrides as Hydra takes them: a group's choice must be a string, and `length=3072` would be a number."""
    return [re.sub(r"^length=([0-9]+)$", r"length='\1'", override) for override in overrides]


# -------------------------------------------------------------------------------------------------------- compose


def compose(config_folder: Path, overrides: list[str]) -> DictConfig:
    """The configuration of one run as verl.trainer.main_ppo composes it from the same overrides.

    Raises:
        UserError: an unknown choice or key, a value that cannot be resolved, or a combination that is no recipe.
    """
    release = importlib.metadata.version("verl")
    if release.startswith(("0.7.", "0.8.")):
        raise UserError(
            f"the installed verl is {release}: recipes are written for the V1 trainer of verl 0.9.0 and later. "
            "loss_agg_mode=vl_norm itself works in runs of your own (docs/support.md)"
        )
    given = parsed(hydra_overrides(overrides))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder.resolve()), version_base=None):
            config = hydra_compose(CONFIG_NAME, overrides=[one.input_line for one in given])
            OmegaConf.resolve(config)
            # Does anything stand where the recipe has a number or a switch?
            others = [one.key_or_group for one in given if "." in one.key_or_group and not _is_number(one.value())]
            if others:
                choices = [one.input_line for one in given if "." not in one.key_or_group]
                plain = hydra_compose(CONFIG_NAME, overrides=choices)
        missing = OmegaConf.missing_keys(config.recipe)
    except (HydraException, OmegaConfBaseException) as error:
        # Hydra lists its whole search path below the accepted choices.
        raise UserError(str(error).split("\nConfig search path")[0]) from error
    if missing:
        raise UserError(f"not set: {', '.join(f'recipe.{key}' for key in sorted(missing))}")
    for key in others:
        value, usual = OmegaConf.select(config, key), OmegaConf.select(plain, key)
        if not _is_number(value) and usual is not None and _is_number(usual):
            what = "true or false" if isinstance(usual, bool) else f"a number, as in {key}={usual}"
            raise UserError(f"{key}={value!r}: accepted is {what}")
    if config.recipe.keep not in ("model", "all"):
        raise UserError(f"recipe.keep={config.recipe.keep}: accepted are model and all")
    for key, accepted in (("method", config.recipe.methods), ("length", config.recipe.lengths)):
        chosen = config.recipe[key]
        if chosen not in accepted:
            close = difflib.get_close_matches(chosen, list(accepted), 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"{key}={chosen} is none of the paper's for family={config.recipe.family}.{hint} "
                f"Accepted: {', '.join(accepted)}"
            )
    if is_cpu(config) != (config.recipe.scale == "cpu"):
        raise UserError(
            f"trainer.device={config.trainer.device} with recipe.scale={config.recipe.scale}: the two are set by "
            "scale=gpu or scale=cpu, not one by one"
        )
    if config.recipe.get("fixed") and not is_cpu(config) and not wants_flash_attention(config):
        raise UserError(
            f"method={config.recipe.method} is a loss of micro-batches, and attention=sdpa trains one response a "
            "micro-batch. Accepted: attention=flash"
        )
    return config


def is_cpu(config: DictConfig) -> bool:
    """Whether a run is on the CPU: verl's own key says so."""
    return bool(config.trainer.device == "cpu")


def wants_flash_attention(config: DictConfig) -> bool:
    """Whether the actor is loaded with the package flash-attn, verl's default (workers/config/model.py:185)."""
    attention = config.actor_rollout_ref.model.override_config.get("attn_implementation", "flash_attention_2")
    return bool(attention == "flash_attention_2")


def _is_number(value: Any) -> bool:
    """Or a switch, or null, which stands for either."""
    return value is None or isinstance(value, bool | int | float)


def flatten(config: Any) -> dict[str, Any]:
    """{dotted key: value} of all leaves; an empty mapping or a list is a leaf."""
    plain = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    found: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            found[prefix] = node

    walk(plain, "")
    return found


# ----------------------------------------------------------------------------------------------------------- check


def validate(config: DictConfig) -> None:
    """Check a composed run with verl's own classes, as far as that needs neither a GPU nor a network.

    The checks are those of verl.trainer.main_ppo before it starts Ray (with the plugin's in them), the dataclasses that
    its workers build later, and a load of every class and function that the configuration names.

    Raises:
        UserError: verl would refuse this configuration, or could not train it as it says.
    """
    from verl.experimental.reward_loop.reward_loop import migrate_legacy_reward_impl
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
    from verl.trainer.ppo.reward import get_custom_reward_fn, resolve_reward_manager_cls
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.trainer.ppo.v1 import get_trainer_cls
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.utils.import_utils import import_external_libs, load_extern_object
    from verl.utils.tracking import Tracking

    from vlnorm_verl.paper import whole_groups
    from vlnorm_verl.plugin import STOCK_MODES
    from vlnorm_verl.registry import vl_norm

    actor = config.actor_rollout_ref.actor
    sums_by_m = actor.loss_agg_mode not in STOCK_MODES or actor.loss_agg_mode == "seq-mean-token-sum-norm"
    m = actor.loss_scale_factor
    if sums_by_m and (isinstance(m, bool) or not isinstance(m, int | float) or not 0 < m < math.inf):
        raise UserError(
            f"actor_rollout_ref.actor.loss_scale_factor={m!r} with loss_agg_mode={actor.loss_agg_mode!r}: give M, a "
            "number of tokens above 0. verl's null takes each micro-batch's own width"
        )
    config = config.copy()  # verl and the plugin fill in values
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # engines that are not installed, a critic that is not wanted
            validate_config(config, need_reference_policy(config), need_critic(config))
            for part in ("actor_rollout_ref.rollout", "algorithm.filter_groups"):
                omega_conf_to_dataclass(OmegaConf.select(config, part))
            if Path(config.actor_rollout_ref.model.path).is_dir():  # else a name on the hub, which needs a network
                omega_conf_to_dataclass(config.actor_rollout_ref.model)
            get_trainer_cls(config.trainer.v1.trainer_mode)
            whole_groups.check(config)
            import_external_libs(config.actor_rollout_ref.model.external_lib)  # may register what is asked for next
            get_adv_estimator_fn(config.algorithm.adv_estimator)
            get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode)
            vl_norm(config.algorithm.get("vl_norm_as_coded_alpha", 1.0))  # as_coded's, which is not imported for others
            config = migrate_legacy_reward_impl(config)
            get_custom_reward_fn(config)
            resolve_reward_manager_cls(config)
            sampler = config.trainer.v1.sampler.custom_sampler
            if sampler.path:
                load_extern_object(sampler.path, sampler.name)
    except Exception as error:  # verl raises asserts, ValueErrors, KeyErrors, ImportErrors …: each refuses the run
        raise UserError(f"verl refuses the configuration: {type(error).__name__}: {error}") from error

    check_micro_batches(config)
    rollout, needed = config.actor_rollout_ref.rollout, config.data.max_prompt_length + config.data.max_response_length
    if rollout.max_model_len is not None and rollout.max_model_len < needed:
        raise UserError(
            f"actor_rollout_ref.rollout.max_model_len={rollout.max_model_len}: vLLM would cut responses. Accepted: at "
            f"least data.max_prompt_length + data.max_response_length = {needed}, or null"
        )
    unknown = [name for name in config.trainer.logger if name not in Tracking.supported_backend]
    if unknown:
        raise UserError(
            f"trainer.logger={list(config.trainer.logger)}: verl has no {', '.join(unknown)}. "
            f"Accepted: {', '.join(LOGGERS)}"
        )
    if "file" not in config.trainer.logger:
        raise UserError("trainer.logger must have `file`: progress, resume and the report read its metrics")


def check_micro_batches(config: DictConfig) -> None:
    """Raises UserError for batches that are no whole number of micro-batches: verl finds out in the first step only.

    The assertion is in verl's workers/engine/utils.py.
    """
    actor, rollout, trainer = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.trainer
    ranks = trainer.nnodes * trainer.n_gpus_per_node
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
        if not dynamic and micro and prompts * rollout.n % (ranks * micro):
            raise UserError(
                f"actor_rollout_ref.{key}={micro}: {what}={prompts} prompts · rollout.n={rollout.n} responses over "
                f"{ranks} GPUs (trainer.nnodes · n_gpus_per_node) is no whole number of micro-batches. Accepted: "
                f"a divisor of {prompts * rollout.n / ranks:g}"
            )


# What is handed on whole, to Ray, vLLM, transformers and TransferQueue: its keys are theirs. recipe.* is interpolated.
HANDED_ON = re.compile(r"^(recipe|ray_kwargs|transfer_queue)\.|\.(engine_kwargs|override_config)\.")


def unread_keys(config: DictConfig, keys: list[str]) -> list[str]:
    """Those of `keys` (dotted, leaves) that no code of verl's or of this package reads in such a run: they do nothing.

    By name: a key is read if its last part stands somewhere behind a dot or in quotes, in the source of this package or
    of verl without the engines that the run does not use, or as `self.<name>` in the dataclass that its `_target_`
    names. So a key that is read nowhere, but has the name of another one that is, is not found.
    """
    names = _names_read(config.actor_rollout_ref.actor.strategy.removesuffix("2"))
    unread = [key for key in keys if not HANDED_ON.search(key) and key.rpartition(".")[2] not in names]
    return [key for key in unread if not _read_by_its_class(config, *key.rpartition(".")[::2])]


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


def _read_by_its_class(config: DictConfig, parent: str, name: str) -> bool:
    target = OmegaConf.select(config, f"{parent}._target_")
    if target is None:
        return False
    module, _, cls = target.rpartition(".")
    classes = getattr(importlib.import_module(module), cls).__mro__
    functions = [inspect.unwrap(found) for one in classes for found in vars(one).values() if inspect.isfunction(found)]
    written = [one.__code__ for one in functions if one.__code__.co_filename != "<string>"]  # not dataclass's __init__
    return any(name in code.co_names for code in written)


def missing_files(config: DictConfig) -> str | None:
    """What to type to get the run's data, if a file of it is not there."""
    files = OmegaConf.to_container(OmegaConf.create([config.data.train_files, config.data.val_files]))
    flat = [file for entry in files for file in (entry if isinstance(entry, list) else [entry])]
    missing = [file for file in flat if not Path(file).expanduser().is_file()]
    if not missing:
        return None
    folder = f"{config.recipe.data}/{config.recipe.task}"
    return (
        f"no data: {', '.join(missing)}. Make it with\n"
        f"  vlnorm-verl data {config.recipe.task} --out {folder}\n"
        f"or, without a network,\n"
        f"  vlnorm-verl data {config.recipe.task} --offline --out {folder}\n"
        "or name a folder that has it with recipe.data=…"
    )


# ------------------------------------------------------------------------------------------------------ provenance


@dataclass(frozen=True)
class Value:
    """One value of a run that verl's defaults do not set: where it was set, and why it is what it is."""

    key: str
    value: Any
    place: str  # "task/math.yaml:9", "command line" or "launcher"
    source: str  # the comment behind the value


def _leaves(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, line of its key from 0) of each leaf of a YAML mapping."""
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in node.value:
            name = f"{prefix}.{key.value}" if prefix else key.value
            if isinstance(value, yaml.MappingNode) and value.value:
                yield from _leaves(value, name)
            else:
                yield name, key.start_mark.line


def commented_values(file: Path) -> Iterator[tuple[str, int, str]]:
    """(dotted key, line from 1, comment) of each value of a config file; its comment is behind it or above it."""
    text = file.read_text()
    lines = text.splitlines()
    for key, line in _leaves(yaml.compose(text)):
        if key.split(".")[0] in ("defaults", "hydra"):
            continue
        comment = ""
        if "  # " in lines[line]:
            comment = lines[line].rsplit("  # ", 1)[1]
        elif line and lines[line - 1].startswith("  ") and lines[line - 1].lstrip().startswith("# "):
            comment = lines[line - 1].lstrip()[2:]
        yield key, line + 1, comment.strip()


def config_files(config_folder: Path, config: DictConfig) -> list[Path]:
    """The files of recipes/config that made this run, in the order in which they were merged."""
    files = [config_folder / "common.yaml"]

    def add(file: Path) -> None:
        defaults = yaml.safe_load(file.read_text()).get("defaults") or []
        for name in defaults:
            if isinstance(name, str) and not name.startswith(("_", "/")):
                add(file.parent / f"{name}.yaml")
        files.append(file)

    for group in GROUPS:
        add(config_folder / group / f"{config.recipe[group]}.yaml")
    return files


def provenance(config_folder: Path, config: DictConfig, overrides: list[str], given: list[str]) -> list[Value]:
    """Every value that the recipe or the command line sets, in the order of the files.

    overrides: all of the run's; given: those of them that the user typed.
    """
    values = flatten(config)
    found: dict[str, Value] = {}
    for file in config_files(config_folder, config):
        for key, line, comment in commented_values(file):
            if key in values:
                before = found.pop(key, None)
                comment = comment or (before.source if before else "")
                found[key] = Value(key, values[key], f"{file.parent.name}/{file.name}:{line}", comment)
    for text, one in zip(overrides, parsed(overrides), strict=True):
        for key in values:
            if key == one.key_or_group or key.startswith(f"{one.key_or_group}."):
                found.pop(key, None)
                found[key] = Value(key, values[key], "command line" if text in given else "launcher", "")
    return list(found.values())
