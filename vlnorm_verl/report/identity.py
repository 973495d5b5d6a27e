"""What a run is: its setting, method and seed. The one place that decides it.

In this order: what the user wrote (label@seed=RUN), a configuration, names of files and folders (names.py).

| configuration                  | of                                                             |
|--------------------------------|----------------------------------------------------------------|
| config.yaml beside the metrics | the launcher: the recipe's own section                         |
| .hydra/config.yaml             | verl's trainer, started by Hydra                               |
| in the file                    | wandb                                                          |

Where no name has a mode in it, the method is as much of the path as tells the run from the others. Where one has, what
is left of the names tells apart runs that would else be one method and seed: they are different settings then, not
seeds.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vlnorm_verl import methods
from vlnorm_verl.files import UserError
from vlnorm_verl.report.find import Source
from vlnorm_verl.report.names import SAYS_NOTHING, read_names, shortest

UNKNOWN_SEED = -1


class Setting(NamedTuple):
    """What runs must share to be compared, as the recipes name it: "aggregation", "countdown", "3b", "8192"."""

    family: str = ""
    task: str = ""
    model: str = ""
    length: str = ""


@dataclass(kw_only=True, eq=False)
class Identity:
    """What a run is, as far as it is known.

    method: the recipe's, else verl's loss_agg_mode. alpha: VL Norm's. mode: loss_agg_mode, by the methods' names.
    scale_factor: M, verl's loss_scale_factor, tokens.
    limit: of a response, tokens.
    notes: what was odd while reading.
    config: what its configuration says, as far as it has one.
    names: of the log and the folders above it, nearest first, from the first that says something.
    rest: what they say beside method and seed. named: whether the method is of names, or not known.
    """

    setting: Setting = field(default_factory=Setting)
    method: str = ""
    alpha: float | None = None
    mode: str = ""
    seed: int = UNKNOWN_SEED
    planned_steps: int | None = None
    scale_factor: float | None = None
    limit: int | None = None
    validation_folder: str = ""
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()
    named: bool = False

    @property
    def method_key(self) -> str:
        return methods.join(self.method, self.alpha)


def parse_method(mode: str, where: str) -> tuple[str, float | None]:
    """(method, α) of a loss_agg_mode, a method's name, or a label: vl_norm:0.75, token-mean, grpo_norm …

    Raises:
        UserError: a parameter that training refuses; `where` is the argument or file that it is of.
    """
    method, alpha = methods.split(mode)
    name, colon, _ = mode.partition(":")
    if colon and name in methods.MODES and (alpha is None or not 0 <= alpha <= 1):
        from vlnorm_verl import parse_mode  # imports torch, which the paper's α in [0, 1] need not wait for

        try:
            parse_mode(mode)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    return method, 1.0 if method == "vl_norm" and alpha is None else alpha


def identify(source: Source, config: dict[str, Any] | None = None, title: str = "") -> Identity:
    """config, title: what the log itself says (wandb's configuration and name of the run).

    Raises:
        UserError: a mode that training refuses.
    """
    if source.shared:
        identity = Identity(notes=["several runs' *.jsonl in its folder: configuration and dumps there not used"])
    elif source.kind == "wandb" and config:
        identity = from_config(config, str(source.files[0]))
    else:
        identity = _beside(source.folder)
    names = tuple(filter(None, (title, *source.names)))
    mode, seed, identity.rest = read_names(names, source.below + bool(title), source.common)
    identity.names = tuple(itertools.dropwhile(SAYS_NOTHING.fullmatch, names)) or names
    if source.seed is not None:
        identity.seed = source.seed
    elif identity.seed == UNKNOWN_SEED and seed is not None:
        identity.seed = seed
    label = source.label if source.alone or not (identity.method or mode) else ""
    identity.named = not (label or identity.method) and source.kind != "empty"
    if label:
        identity.rest = ()
    elif identity.named and mode:
        identity.notes.append("its method is taken from its name")
    if label or (mode and not identity.method):
        identity.method, identity.alpha = parse_method(label or mode, f"RUN {source.folder}")
    return identity


def settle(identities: Sequence[Identity], labelled: Sequence[bool]) -> None:
    """Give the runs that only their names tell apart a method, and a task where one method and seed are several runs.

    labelled: whether the user said what a run is. Such a run, if nothing is known of its setting, is of the setting
    that all runs of a known one share.
    """
    unnamed = [identity for identity in identities if identity.named and not identity.method]
    by_mode = [identity for identity in identities if identity.named and identity.method and not any(identity.setting)]
    for identity, name in zip(unnamed, shortest([identity.rest for identity in unnamed]), strict=True):
        identity.method = name or "unknown"
    rests_of: dict[tuple[str, int], set[tuple[str, ...]]] = {}
    for identity in by_mode:
        rests_of.setdefault((identity.method_key, identity.seed), set()).add(identity.rest)
    if any(len(rests) > 1 for rests in rests_of.values()):
        rests = [identity.rest for identity in by_mode]
        while all(rests) and len({rest[-1] for rest in rests}) == 1:  # what all runs are in tells none apart
            rests = [rest[:-1] for rest in rests]
        for identity, name in zip(by_mode, shortest(rests), strict=True):
            identity.setting = identity.setting._replace(task=name)
    known = {identity.setting for identity in identities if any(identity.setting)}
    if len(known) == 1:
        for identity, said in zip(identities, labelled, strict=True):
            if said and not any(identity.setting):
                (identity.setting,) = known
                identity.notes.append("its setting is not known: taken as that of the other runs")


# --------------------------------------------------------------------------------------------------- configurations


# Of the launcher, whose first start writes the one and each start the other; of verl's trainer, started by Hydra.
CONFIGS, LAST_START = ("config.yaml", ".hydra/config.yaml"), "trainer.yaml"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster than Python's


def _beside(folder: Path) -> Identity:
    """From the files beside the metrics; an empty Identity if there is none."""
    notes: list[str] = []
    for name in CONFIGS:
        if config := _of_verl(folder, name, notes):
            identity = from_config(config, str(folder / name))
            if last := _of_verl(folder, LAST_START, notes):  # recipe.steps may change between starts
                identity.planned_steps = from_config(last, str(folder / LAST_START)).planned_steps
            identity.notes += notes
            return identity
    return Identity(notes=notes)


def _of_verl(folder: Path, name: str, notes: list[str]) -> dict[str, Any]:
    """A configuration of verl; empty if the file is none."""
    file = folder / name
    try:
        content = yaml.load(file.read_bytes(), Loader=LOADER) if os.path.isfile(file) else None
    except yaml.YAMLError as error:
        notes.append(f"{name} is no YAML ({str(error).splitlines()[0]})")
        return {}
    if isinstance(content, dict) and ("recipe" in content or "actor_rollout_ref" in content):
        return content
    return {}


def from_config(config: dict[str, Any], where: str) -> Identity:
    """Of a configuration of verl, with the recipes' own section or without. where: its file, for messages."""

    def raw(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            if isinstance(node, str) and "${" in node:
                break
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def get(key: str) -> Any:
        return _resolved(config, key) if "${" in str(raw(key)) else raw(key)

    key = "actor_rollout_ref.actor.loss_agg_mode"
    mode, alpha = parse_method(str(get(key) or ""), where)
    if not mode and raw(key):
        mode = str(raw(key))  # of an environment that is gone, so not the default, nor what a folder is called
    fork = _of_the_fork(mode, get)
    method, alpha = methods.split(fork) if fork else (mode, alpha)
    recipe = get("recipe")
    recipe = recipe if isinstance(recipe, dict) and "method" in recipe else {}
    identity = Identity(
        method=method,
        alpha=alpha,
        mode=mode,
        config=config,
        seed=_whole(recipe.get("seed", get("data.seed")), UNKNOWN_SEED),
        planned_steps=_whole(get("trainer.total_training_steps"), 0) or _steps_of_optimizer(get) or None,
        scale_factor=_whole(get("actor_rollout_ref.actor.loss_scale_factor"), 0) or None,
        limit=_whole(get("data.max_response_length"), 0) or None,
        validation_folder=str(get("trainer.validation_data_dir") or ""),
    )
    if recipe:
        identity.setting = Setting(*(str(recipe.get(name, "")) for name in Setting._fields))
        # loss_agg_mode is what was trained. A recipe's name that is no mode tells more: what DAPO did with overlong
        # responses, how advantages are divided, what the authors' code sums over.
        name = str(recipe["method"])
        if name != method and methods.method_of(name).is_mode:
            identity.notes.append(f"recipe.method={name}, but loss_agg_mode={methods.join(method, alpha)}")
        elif name != method:
            identity.method = name
            alpha = get("algorithm.vl_norm_as_coded_alpha")  # of that method alone
            identity.alpha = alpha if isinstance(alpha, int | float) else None
        return identity
    model, files = (get(key) or raw(key) for key in ("actor_rollout_ref.model.path", "data.val_files"))
    identity.setting = Setting(
        task=file_names(files),
        model=Path(str(model)).name if model else "",
        length=str(get("data.max_response_length") or ""),
    )
    return identity


def _of_the_fork(mode: str, get: Callable[[str], Any]) -> str:
    """The method's key by what only the authors' fork of verl has in its configuration; "" where that decides nothing.

    Its first two keys replace loss_agg_mode (verl/trainer/ppo/core_algos.py:617 there), which they leave at token-mean.
    """
    use_vl_norm, alpha = (get(f"actor_rollout_ref.actor.{key}") for key in ("use_grpopp", "grpopp_config.alpha"))
    if get("actor_rollout_ref.actor.use_dr_grpo"):
        return "dr_grpo"
    if use_vl_norm:
        return "dr_grpo_norm" if alpha == 0 else f"vl_norm_as_coded:{alpha}"
    if use_vl_norm is None or mode != "dapo_norm":
        return ""
    if get("algorithm.filter_overlong_response.enable"):
        return "overlong_filtering_as_coded"
    return "soft_punishment_as_coded" if get("reward_model.overlong_buffer.enable") else "dapo_norm_as_coded"


def file_names(files: Any) -> str:
    """ "math/train, gsm8k/train": the files of a key like data.train_files, wherever they lie. "" for what is none."""
    every = [files] if isinstance(files, str) else files if isinstance(files, list) else []
    paths = [Path(str(file)) for file in every]
    return ", ".join(sorted(f"{path.parent.name}/{path.stem}" for path in paths))


def _steps_of_optimizer(get: Callable[[str], Any]) -> int:
    """verl's trainers fill in the optimizer's steps before they log; of V1 that are several to each of its own."""
    steps = _whole(get("actor_rollout_ref.actor.optim.total_training_steps"), 0)
    mode = get("trainer.v1.trainer_mode") if get("trainer.use_v1") else None
    return steps // (_whole(get(f"trainer.v1.{mode}.parameter_sync_step"), 0) or 1)


# "${" of what is neither another key nor oc.select: a resolver, of which oc.env has the reader's environment.
_CALL = re.compile(r"\$\{(?!\s*(?:oc\.select\s*:|[\w.\[\]-]+\s*\}))")


def _resolved(config: dict[str, Any], key: str) -> Any:
    """A key with Hydra's interpolations; None where they cannot be resolved here (resolvers are not called)."""
    from omegaconf import MISSING, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    def without_calls(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: without_calls(value) for name, value in node.items()}
        if isinstance(node, list):
            return [without_calls(value) for value in node]
        return MISSING if isinstance(node, str) and _CALL.search(node) else node

    try:
        value = OmegaConf.select(OmegaConf.create(without_calls(config)), key)
        is_config = OmegaConf.is_config(value)
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if is_config else value
    except OmegaConfBaseException:
        return None


def _whole(value: Any, otherwise: int) -> int:
    """A number of a configuration, which may also be text; `otherwise` for what is none or below 0."""
    try:
        return int(value) if int(value) >= 0 else otherwise
    except (TypeError, ValueError, OverflowError):
        return otherwise
