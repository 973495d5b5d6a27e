"""What a run is: its setting, method and seed. The one place that decides it.

In this order: what the user wrote (label@seed=RUN), a configuration, names of files and folders.

| configuration                  | of                                                             |
|--------------------------------|----------------------------------------------------------------|
| config.yaml beside the metrics | the launcher: the recipe's own section                         |
| settings.json                  | the quickstart                                                 |
| .hydra/config.yaml             | verl's trainer, started by Hydra                               |
| in the file                    | wandb                                                          |

In names, nearest first: a loss_agg_mode (vl_norm, vl_norm:0.75, exp-token-mean, dapo_norm_s0 …) is the method, s0 or
seed0 the seed; names that every run has (metrics, wandb, a date) say nothing. What is left of the names is the method
where no mode is named: as much of the path as tells it from the other runs'. Where a mode is named, it tells apart runs
that would else be one method and seed: they are different settings then, not seeds.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from vlnorm_verl.files import UserError
from vlnorm_verl.report.find import Source
from vlnorm_verl.runs.records import decode

STOCK_METHODS = {
    "seq-mean-token-mean": "grpo_norm",
    "token-mean": "dapo_norm",
    "seq-mean-token-sum-norm": "dr_grpo_norm",
}
_PAPERS = re.compile(r"vl_norm:(0|1)(\.0+)?|vl_norm:0\.\d+")  # α in [0, 1]; asking about them would import torch
MODES = ("vl_norm", "grpo_norm", "dapo_norm", "dr_grpo_norm", "seq-mean-token-sum", *STOCK_METHODS)


@dataclass
class Identity:
    """The fields of Run of the same names, as far as they are known.

    names: of the log and the folders above it, nearest first, from the first that says something.
    rest: what they say beside method and seed. named: whether the method is of names, or not known.
    """

    family: str = ""
    task: str = ""
    model: str = ""
    length: str = ""
    scale: str = ""
    method: str = ""
    alpha: float | None = None
    seed: int | None = None
    planned_steps: int | None = None
    scale_factor: float | None = None
    validation_folder: str = ""
    names: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()
    named: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def setting(self) -> tuple[str, ...]:
        return self.family, self.task, self.model, self.length, self.scale


def parse_method(mode: str, where: str) -> tuple[str, float | None]:
    """(method, α) of a loss_agg_mode, a method's name, or a label: vl_norm:0.75, token-mean, grpo_norm …

    Raises:
        UserError: a parameter that training refuses; `where` is the argument or file that it is of.
    """
    name, colon, number = mode.partition(":")
    if colon and name in MODES and not _PAPERS.fullmatch(mode):
        from vlnorm_verl.registry import parse_mode  # imports torch

        try:
            parse_mode(mode)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    if name == "vl_norm":
        return name, float(number) if colon else 1.0
    return STOCK_METHODS.get(mode, mode), None


def identify(source: Source, config: dict[str, Any] | None = None, title: str = "") -> Identity:
    """config, title: what the log itself says (wandb's configuration and name of the run).

    Raises:
        UserError: a mode that training refuses.
    """
    found = Identity()
    if source.shared:
        found.notes.append("several runs' *.jsonl in its folder: configuration and dumps there not used")
    elif source.kind != "wandb" or not config:
        found = _beside(source.folder)
    else:
        found = from_config(config, str(source.files[0]))
    names = tuple(filter(None, (title, *source.names)))
    method, seed, found.rest = read_names(names, source.below + bool(title), source.common)
    found.names = tuple(itertools.dropwhile(_SAYS_NOTHING.fullmatch, names)) or names
    found.seed = next((one for one in (source.seed, found.seed, seed) if one is not None), None)
    labelled = source.label if source.alone or not (found.method or method) else ""
    found.named = not (labelled or found.method) and source.kind != "empty"
    if labelled:
        found.rest = ()
    elif found.named and method:
        found.notes.append("its method is taken from its name")
    if mode := labelled or ("" if found.method else method):
        found.method, found.alpha = parse_method(mode, f"RUN {source.folder}")
    return found


# ----------------------------------------------------------------------------------------------------------- names

# A mode between separators, "-", "_" and " " alike, longest first; of VL Norm with α as in vl_norm:0.75,
# vl_norm-alpha0.75, vl_norm-0.75.
_MODE = re.compile(
    "(?<![a-z0-9])(?P<mode>"
    + "|".join(re.sub("[-_]", "[-_ ]", mode) for mode in sorted(MODES, key=len, reverse=True))
    + r")(?![a-z0-9])"
    + r"(?::(?P<parameter>[^\s_/-]*)|(?:[-_ ]?(?:alpha|α)[-_= ]*(?P<alpha>\d(\.\d+)?)|[-_ ](?P<decimal>\d\.\d+))"
    + r"(?![a-z0-9.]))?",  # 1.5b is a model
    re.IGNORECASE,
)
_SEED = re.compile(r"(?:^|[-_., ])(?:seed[-_=]?(\d{1,9})(?=$|[-_., ])|s(\d{1,9})$)", re.IGNORECASE)
# Names that tell no run from another: what loggers and their users call any log, dates, wandb's folders.
_SAYS_NOTHING = re.compile(
    r"(metrics|logs?|train(ing)?|output|outputs|events|wandb|tensorboard(_log)?|tb(_logs?)?|files|latest-run"
    r"|(offline-)?run-\d{8}_\d{6}-\w+|[\d_:T.-]*)",
    re.IGNORECASE,
)


def read_names(names: Sequence[str], below: int, common: frozenset[str]) -> tuple[str, int | None, tuple[str, ...]]:
    """(mode or "", seed, what else they say) of names, nearest first.

    Of the argument's own name and those above it, which may be anything (a home, a project), one that all runs have in
    common counts only if nothing nearer says what the run is, or if a mode or a seed is all of the name.
    """
    method, seed = "", None
    rest: list[str] = []
    for index, name in enumerate(names):
        said = bool(method or rest)
        left, own_seed = _cut_seed(name)
        left, mode = _cut_mode(left)
        if index >= below and name in common and said and left:
            mode, own_seed, left = "", None, name
        method = method or mode
        seed = own_seed if seed is None else seed
        if not _SAYS_NOTHING.fullmatch(left):
            rest.append(left)
    return method, seed, tuple(rest)


def _cut_seed(name: str) -> tuple[str, int | None]:
    match = _SEED.search(name)
    return (name[: match.start()] + name[match.end() :], int(match[1] or match[2])) if match else (name, None)


def _cut_mode(name: str) -> tuple[str, str]:
    """The name without its mode, and that; two modes in one name are a comparison's."""
    found = list(_MODE.finditer(name))
    if len(found) != 1:
        return name, ""
    (match,) = found
    plain = re.sub("[- ]", "_", match["mode"].lower())
    mode = next(mode for mode in MODES if mode.replace("-", "_") == plain)
    for parameter in (match[group] for group in ("parameter", "alpha", "decimal") if match[group] is not None):
        mode += f":{parameter}"
    return (name[: match.start()].rstrip("-_., ") + name[match.end() :]).strip("-_., "), mode


def settle(identities: Sequence[Identity], labelled: Sequence[bool]) -> None:
    """Give the runs that only their names tell apart a method, and a task where one method and seed are several runs.

    labelled: whether the user said what a run is. Such a run, if nothing is known of its setting, is of the setting
    that all runs of a known one share.
    """
    nameless = [one for one in identities if one.named and not one.method]
    for one, name in zip(nameless, shortest([one.rest for one in nameless]), strict=True):
        one.method = name or "unknown"
    by_name = [one for one in identities if one.named and one not in nameless and not any(one.setting)]
    first: dict[tuple[Any, ...], Identity] = {}
    if any(first.setdefault((one.method, one.alpha, one.seed), one).rest != one.rest for one in by_name):
        rests = [one.rest for one in by_name]
        while all(rests) and len({rest[-1] for rest in rests}) == 1:  # what all runs are in tells none apart
            rests = [rest[:-1] for rest in rests]
        for one, name in zip(by_name, shortest(rests), strict=True):
            one.task = name
    known = {one.setting for one in identities if any(one.setting)}
    if len(known) == 1:
        for one in (one for one, said in zip(identities, labelled, strict=True) if said and not any(one.setting)):
            one.family, one.task, one.model, one.length, one.scale = next(iter(known))
            one.notes.append("its setting is not known: taken as that of the other runs")


def shortest(names: Sequence[tuple[str, ...]]) -> list[str]:
    """Of each path, nearest part first, as many parts as tell it from the other paths: "exp", "project/exp"."""
    found = []
    for one in names:
        others = [other for other in set(names) if other != one]
        parts = next((k for k in range(1, len(one)) if all(other[:k] != one[:k] for other in others)), len(one))
        found.append("/".join(reversed(one[:parts])))
    return found


# --------------------------------------------------------------------------------------------------- configurations


def _beside(folder: Path) -> Identity:
    """From the files beside the metrics; an empty Identity if there is none."""
    notes: list[str] = []
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster than Python's
    if (file := folder / "config.yaml").is_file():
        try:
            content = yaml.load(file.read_bytes(), Loader=loader)
        except yaml.YAMLError as error:
            notes.append(f"{file.name} is no YAML ({str(error).splitlines()[0]})")
            content = None
        if isinstance(content, dict) and ("recipe" in content or "actor_rollout_ref" in content):
            return from_config(content, str(file))
    if (file := folder / "settings.json").is_file():
        try:
            settings = decode(file.read_bytes(), msgspec.json.Decoder())
        except msgspec.MsgspecError:
            settings = None
        if isinstance(settings, dict) and "mode" in settings:
            method, alpha = parse_method(str(settings["mode"]), str(file))
            return Identity(
                family="quickstart",
                task="countdown",
                model="tiny",
                length="256",
                scale="cpu",
                method=method,
                alpha=alpha,
                seed=_whole(settings.get("seed")),
                planned_steps=_whole(settings.get("steps")),
                notes=[f"overrides: {' '.join(settings['overrides'])}"] if settings.get("overrides") else [],
            )
        notes.append(f"{file.name} is not the quickstart's")
    if (file := folder / ".hydra" / "config.yaml").is_file():
        return from_config(_resolved(file), str(file))
    return Identity(notes=notes)


# What identifies a run in verl's configuration; nothing else of it is resolved.
CONFIG_KEYS = (
    "recipe",
    "actor_rollout_ref.actor.loss_agg_mode",
    "actor_rollout_ref.actor.loss_scale_factor",
    "actor_rollout_ref.model.path",
    "data.max_response_length",
    "data.seed",
    "data.val_files",
    "trainer.total_training_steps",
    "trainer.validation_data_dir",
)


def _resolved(file: Path) -> dict[str, Any]:
    """CONFIG_KEYS of an unresolved Hydra configuration, as far as its interpolations can be resolved here."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config, found = OmegaConf.load(file), OmegaConf.create({})
    for key in CONFIG_KEYS:
        try:
            value = OmegaConf.select(config, key)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:  # hydra: and other resolvers that only the run itself had
            continue
        if value is not None:
            OmegaConf.update(found, key, value)
    plain = OmegaConf.to_container(found)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def from_config(config: dict[str, Any], where: str) -> Identity:
    """Of a resolved configuration of verl, with the recipes' own section or without. where: its file, for messages."""

    def get(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    method, alpha = parse_method(str(get("actor_rollout_ref.actor.loss_agg_mode") or ""), where)
    identity = Identity(
        method=method,
        alpha=alpha,
        seed=_whole(get("data.seed")),
        planned_steps=_whole(get("trainer.total_training_steps")) or None,
        scale_factor=_whole(get("actor_rollout_ref.actor.loss_scale_factor")),
        validation_folder=str(get("trainer.validation_data_dir") or ""),
    )
    recipe = get("recipe")
    if isinstance(recipe, dict) and "method" in recipe:
        for name in ("family", "task", "model", "length", "scale"):
            setattr(identity, name, str(recipe.get(name, "")))
        # loss_agg_mode is what was trained; the recipe's name also tells what DAPO did with overlong responses.
        if recipe["method"] == "vl_norm" and method != "vl_norm":
            identity.notes.append(f"recipe.method=vl_norm, but loss_agg_mode={method}")
        else:
            identity.method = str(recipe["method"])
        identity.seed = _whole(recipe.get("seed", identity.seed))
        return identity
    model, files = get("actor_rollout_ref.model.path"), get("data.val_files")
    identity.model = Path(str(model)).name if model else ""
    identity.length = str(get("data.max_response_length") or "")
    flat = [files] if isinstance(files, str) else files if isinstance(files, list) else []
    identity.task = ", ".join(sorted(Path(str(file)).parent.name + "/" + Path(str(file)).stem for file in flat))
    return identity


def _whole(value: Any) -> int | None:
    """A number of a configuration, which may also have been given as text; None for what is none or below 0."""
    try:
        return int(value) if int(value) >= 0 else None
    except (TypeError, ValueError, OverflowError):
        return None
