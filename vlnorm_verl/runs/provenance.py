"""Where each value of a run comes from, and why: the lines of recipes/config, with what stands behind `#` on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from vlnorm_verl.runs.config import choices, flatten, parsed


@dataclass(frozen=True)
class Value:
    """One value of a run that verl's defaults do not set: where it was set, and why it is what it is."""

    key: str
    value: Any
    place: str  # "task/math.yaml:9", "command line" or "launcher"
    why: str  # the comment behind the value


def commented_values(file: Path) -> Iterator[tuple[str, int, str]]:
    """(dotted key, line from 1, comment behind it) of each value of a config file."""
    text = file.read_text()
    lines = text.splitlines()

    def walk(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode) and value.value:
                yield from walk(value, f"{name}.")
            else:
                yield name, key.start_mark.line

    for key, line in walk(yaml.compose(text), ""):
        if key.split(".")[0] not in ("defaults", "hydra"):
            yield key, line + 1, lines[line].partition("  # ")[2].strip()


def config_files(config_folder: Path, chosen: dict[str, str]) -> list[Path]:
    """The files of recipes/config that make a run of these choices, in the order in which Hydra merges them."""
    files = [config_folder / "common.yaml"]

    def add(file: Path) -> None:
        for name in yaml.safe_load(file.read_text()).get("defaults") or []:
            if not name.startswith(("_", "/")):
                add(file.with_name(f"{name}.yaml"))
        files.append(file)

    for group, choice in chosen.items():
        add(config_folder / group / f"{choice}.yaml")
    return files


def provenance(config_folder: Path, config: DictConfig, given: list[str], set_here: Iterable[str]) -> list[Value]:
    """Every value that the recipe, the command line or the launcher sets, in this order.

    given: the user's overrides; set_here: keys that the launcher has set over them.
    """
    values = flatten(config)
    sources: dict[str, Value] = {}

    def add(key: str, place: str, why: str = "") -> None:
        sources.pop(key, None)  # so that the order is that of the last places
        sources[key] = Value(key, values[key], place, why)

    for file in config_files(config_folder, choices(config_folder, given)):
        for key, line, comment in commented_values(file):
            if key in values:
                before = sources[key].why if key in sources else ""
                add(key, f"{file.parent.name}/{file.name}:{line}", comment or before)
    from_user = [override.key_or_group for override in parsed(given)]
    for place, keys in (("command line", from_user), ("launcher", set_here)):
        for changed in keys:
            for key in values:
                if key == changed or key.startswith(f"{changed}."):
                    add(key, place)
    return list(sources.values())
