"""A run's configuration: Hydra composes it over verl's ppo_trainer from one file of each group in recipes/config.

Nothing here starts Ray or needs a GPU. What verl makes of it: check.py. Where a value comes from: provenance.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
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

from vlnorm_verl import machine
from vlnorm_verl.files import UserError, is_path, require
from vlnorm_verl.tasks.sources import MATH

CONFIG_NAME = "recipe"
LOGGERS = ("console", "file", "wandb", "tensorboard", "trackio", "swanlab", "mlflow")
CPUS_PER_GPU = 3  # that verl reserves of Ray (single_controller/ray/base.py:146), all those of a node at once


# ------------------------------------------------------------------------------------------------------ overrides


def parsed(overrides: list[str]) -> list[Override]:
    """Overrides as Hydra reads them, one for one.

    Raises:
        UserError: Hydra cannot read one, or it stands for several values.
    """
    read = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
            if override.is_sweep_override():
                raise HydraException("several values: a launch is one run, reproduce.sh SET --seeds 0,1,2 several")
        except HydraException as error:
            raise UserError(
                f"{text}: Hydra cannot read this as key=value ({str(error).splitlines()[0]}). A value with special "
                """characters needs quotes of its own, inside of the shell's: "recipe.root='~/a, (b)=#1'\""""
            ) from error
        read.append(override)
    return read


def override(key: str, text: str) -> str:
    """`key=text`, or `key='text'` where Hydra would not read it back as this text."""
    with contextlib.suppress(UserError):
        if parsed([f"{key}={text}"])[0].value() == text:
            return f"{key}={text}"
    return f"{key}={QuotedString(text, Quote.single).with_quotes()}"


def without(overrides: list[str], *keys: str) -> list[str]:
    """The overrides but those of these keys, with or without + before them."""
    return [text for text, given in zip(overrides, parsed(overrides), strict=True) if given.key_or_group not in keys]


def hydra_overrides(overrides: list[str], settings: Mapping[str, Any] | None = None) -> list[str]:
    """Overrides as Hydra takes them: a group's choice must be a string, and `length=3072` would be a number.

    settings: {dotted key: value} that are set whatever the overrides say; each key is there once.
    """
    settings = settings or {}
    given = [re.sub(r"^length=([0-9]+)$", r"length='\1'", text) for text in without(overrides, *settings)]
    return given + [
        override(f"++{key}", value) if isinstance(value, str) else f"++{key}={json.dumps(value)}"
        for key, value in settings.items()
    ]


def choices(config_folder: Path, overrides: list[str]) -> dict[str, str]:
    """{group: choice} of a run: those of recipe.yaml's defaults, in its order, and over them those that are given.

    Raises:
        UserError: a group has no such choice, or recipe.GROUP, which is only in the run's name, says another one.
    """
    given = {o.key_or_group: str(o.value()) for o in parsed(overrides)}
    chosen = {group: given.get(group, default) for group, default in _default_choices(config_folder).items()}
    for group, choice in chosen.items():
        accepted = sorted(file.stem for file in (config_folder / group).glob("*.yaml"))
        require(f"{group}={choice}", choice, accepted)
        if (named := given.get(f"recipe.{group}", choice)) != choice and named in accepted:
            raise UserError(
                f"recipe.{group}={named} changes the run's name alone: its {group} is {choice}. "
                f"Accepted: {group}={named}"
            )
    return chosen


@functools.cache
def _default_choices(config_folder: Path) -> dict[str, str]:
    defaults = yaml.safe_load((config_folder / f"{CONFIG_NAME}.yaml").read_text())["defaults"]
    return {group: choice for entry in defaults if isinstance(entry, dict) for group, choice in entry.items()}


# -------------------------------------------------------------------------------------------------------- compose


def compose(config_folder: Path, overrides: list[str]) -> DictConfig:
    """The configuration of one run. Interpolations stay, so that `with_settings` changes what depends on a value, too.

    Raises:
        UserError: an unknown choice or key, a value that cannot be resolved, or a combination that is no recipe.
    """
    if problem := machine.verl_problem():  # Hydra, which imports verl for its configuration, would hide it
        raise UserError(problem)
    from vlnorm_verl.plugin.names import verl_version
    from vlnorm_verl.plugin.releases import before_0_9  # imports torch, which not every command needs

    if before_0_9():
        raise UserError(
            f"the installed verl is {verl_version()}: recipes are written for the V1 trainer of verl 0.9.0 and later. "
            "loss_agg_mode=vl_norm itself works in runs of your own (docs/support.md)"
        )
    chosen = choices(config_folder, overrides)
    given = parsed(hydra_overrides(overrides))
    if removed := next((o for o in given if o.is_delete()), None):
        raise UserError(f"{removed.input_line}: no key can be taken away. Accepted: {removed.key_or_group}=…, or null")
    if of_hydra := next((o for o in given if o.key_or_group.startswith(("hydra.", "hydra/"))), None):
        raise UserError(f"{of_hydra.input_line}: the launcher starts Hydra. The run's folder is recipe.folder=…")
    try:
        config = _composed(config_folder.resolve(), tuple(o.input_line for o in given)).copy()
        values = flatten(config)
        # Does anything stand where the recipe has a number or a switch?
        suspects = [o.key_or_group for o in given if "." in o.key_or_group and not _is_number(o.value())]
        groups = tuple(o.input_line for o in given if "." not in o.key_or_group)
        usual = flatten(_composed(config_folder.resolve(), groups)) if suspects else {}
    except (HydraException, OmegaConfBaseException) as error:
        # Hydra lists its whole search path below the accepted choices.
        raise UserError(str(error).split("\nConfig search path")[0]) from error
    for key in suspects:
        value, number = OmegaConf.select(config, key), usual.get(key)
        if not _is_number(value) and number is not None and _is_number(number):
            what = "true or false" if isinstance(number, bool) else f"a number, as in {key}={number}"
            raise UserError(f"{key}={value!r}: accepted is {what}")
    require(f"recipe.keep={values['recipe.keep']}", values["recipe.keep"], ("model", "all"))
    check_folders(config.recipe)
    data_files(config)  # refuses what names none
    for group in ("method", "length"):
        require(f"family={chosen['family']} {group}={chosen[group]}", chosen[group], config.recipe[f"{group}s"])
    if is_cpu(config) != (chosen["model"] == "tiny"):
        raise UserError(
            f"trainer.device={config.trainer.device} with model={chosen['model']}: model=tiny is on the CPU and the "
            "others on GPUs. trainer.device cannot be given by itself"
        )
    if not is_cpu(config) and chosen["attention"] == "sdpa":
        if depends_on_micro_batches(config):
            raise UserError(
                f"actor_rollout_ref.actor.policy_loss.loss_mode={config.actor_rollout_ref.actor.policy_loss.loss_mode} "
                "is a loss of micro-batches, and attention=sdpa trains one response a micro-batch. Accepted: "
                "attention=flash"
            )
        if chosen["model"] == "7b":
            raise UserError(
                "model=7b with attention=sdpa: verl's fused log-probs read the weight of lm_head "
                "(models/transformers/dense_common.py:125), which FSDP2 has sharded where it is not the embedding's, "
                "as in 7B. Accepted: attention=flash, or model=3b"
            )
    return config


@functools.lru_cache(maxsize=256)  # a set of runs is checked, and then each of it submitted
def _composed(config_folder: Path, overrides: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder), version_base=None):
        return hydra_compose(CONFIG_NAME, overrides=list(overrides))


def with_settings(config: DictConfig, settings: Mapping[str, Any]) -> DictConfig:
    """A copy with these values, {dotted key: value}, and every interpolation resolved."""
    changed = config.copy()
    OmegaConf.set_struct(changed, False)
    for key, value in settings.items():
        OmegaConf.update(changed, key, value)
    OmegaConf.resolve(changed)
    return changed


def check_folders(recipe: DictConfig) -> None:
    """Raises UserError for a folder that is no text, or that an unset variable of the shell has left empty."""
    for key in ("root", "data", "folder"):
        if not recipe[key] or not isinstance(recipe[key], str):
            raise UserError(f"recipe.{key}={recipe[key]}: accepted is a folder, as in recipe.{key}=/scratch/{key}")


def is_cpu(config: DictConfig) -> bool:
    """Whether a run is on the CPU: verl's own key says so."""
    return bool(config.trainer.device == "cpu")


def wants_flash_attention(config: DictConfig) -> bool:
    """Whether the actor is loaded with the package flash-attn, verl's default (workers/config/model.py:185)."""
    attention = config.actor_rollout_ref.model.override_config.get("attn_implementation", "flash_attention_2")
    return bool(attention == "flash_attention_2")


def reserved_cpus(config: DictConfig) -> int:
    """CPUs that verl reserves of Ray, on all nodes: it waits for ever for more than there are."""
    # Those of the GPUs, TransferQueue's, and two for what starts later.
    units = config.transfer_queue.backend.SimpleStorage.num_data_storage_units
    return int(CPUS_PER_GPU * config.trainer.nnodes * config.trainer.n_gpus_per_node + units + 2)


def depends_on_micro_batches(config: DictConfig) -> bool:
    """Whether the loss is another one with other micro-batches (vlnorm_verl/paper/as_coded.py)."""
    return bool(config.actor_rollout_ref.actor.policy_loss.loss_mode == "dapo_norm_as_coded")


def _is_number(value: Any) -> bool:
    """Or a switch, or null, which stands for either."""
    return value is None or isinstance(value, bool | int | float)


def flatten(config: Any) -> dict[str, Any]:
    """{dotted key: value} of all leaves; an empty mapping or a list is a leaf."""
    plain = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config

    def leaves(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(leaves(plain, ""))


def data_files(config: DictConfig, keys: tuple[str, ...] = ("train_files", "val_files")) -> list[Path]:
    """The run's parquet files, those of training first. Not addresses: verl copies what is there.

    Raises:
        UserError: something else stands there.
    """
    files: list[Path] = []
    for key in keys:
        given = config.data[key]
        entries = list(given) if OmegaConf.is_list(given) else [given]
        if not entries or not all(isinstance(entry, str) and entry for entry in entries):
            raise UserError(f"data.{key}={given}: accepted is a parquet file, or a list of some")
        files += [Path(entry).expanduser() for entry in entries if "://" not in entry]
    return files


def model_folder(config: DictConfig) -> Path | None:
    """Where the run's model lies; None if it is a name on the hub, or an address as of hdfs."""
    path = str(config.actor_rollout_ref.model.path)
    return Path(path) if is_path(path) and "://" not in path else None


def made_files(config: DictConfig) -> set[Path]:
    """What the launcher makes of a run's model and data: all that tasks/tiny/data.py has, for the CPU."""
    data, task = Path(config.recipe.data), config.recipe.task
    names = MATH if task == "math" else ("train", "test")
    files = {data / "model", *(data / task / f"{name}.parquet" for name in names)}
    return files if is_cpu(config) else set()


def missing_files(config: DictConfig) -> str:
    """What of the run's model and data is not there, and how to get it; "" if all is, or the launcher makes it."""
    made, model, problems = made_files(config), model_folder(config), []
    if model and model not in made and not model.is_dir():
        problems.append(
            f"no model: actor_rollout_ref.model.path={config.actor_rollout_ref.model.path} is no folder here. "
            "Accepted: a folder that every node sees, or a name on the hub, as in Qwen/Qwen2.5-3B"
        )
    if missing := [file.absolute() for file in data_files(config) if file not in made and not file.is_file()]:
        ours = (Path(config.recipe.data) / config.recipe.task).absolute()
        how = _how_to_make_data(config) if ours in (file.parent for file in missing) and not is_cpu(config) else ""
        problems.append(f"no data: {', '.join(map(str, missing))}{how}")
    elif not problems:
        problems += _too_few_rows(config)
    return "\n".join(problems)


def _too_few_rows(config: DictConfig) -> list[str]:
    """Why the training files cannot make one rollout batch: after its first validation verl would divide by 0."""
    given, entries = config.data.train_files, data_files(config, ("train_files",))
    if "://" in str(given) or not all(entry.suffix == ".parquet" and entry.is_file() for entry in entries):
        return []  # verl copies it, or the launcher makes it
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = sum(pq.read_metadata(entry).num_rows for entry in entries)
    except (OSError, pa.ArrowException) as error:
        return [f"data.train_files={given}: {error}"]
    batch = config.data.train_batch_size
    few = (
        f"data.train_files have {rows} rows, and data.train_batch_size={batch} needs as many: more, or a smaller batch"
    )
    return [few] if rows < batch else []


def _how_to_make_data(config: DictConfig) -> str:
    folder = shlex.quote(f"{config.recipe.data}/{config.recipe.task}")
    return (
        ". Make it with\n"
        f"  vlnorm-verl data {config.recipe.task} --out {folder}\n"
        f"or, without a network,\n"
        f"  vlnorm-verl data {config.recipe.task} --offline --out {folder}\n"
        "or name a folder that has it with recipe.data=…"
    )
