"""Finds logs of runs at and below what the user named.

| what        | where it is looked for                                                                             |
|-------------|----------------------------------------------------------------------------------------------------|
| verl's file | metrics-NNN.jsonl (the launcher's) are the starts of one run; any other *.jsonl whose records      |
| logger      | are verl's is a run of its own                                                                     |
| tensorboard | a folder of event files                                                                            |
| wandb       | an offline run's *.wandb                                                                           |

Links are followed, each folder and file once. A folder with a configuration and no metrics yet is found too, and so is
an argument in which there is nothing, so that no input goes unmentioned.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from vlnorm_verl.files import UserError
from vlnorm_verl.runs.records import RECORD, decode

NOT_SEARCHED = {"smoke", "__pycache__"}  # the launcher's two-step smoke runs
OF_A_RUN = {"checkpoints", "rollouts", "validation"}  # in the folder of a run these hold no other run
STARTS = re.compile(r"metrics-(\d+)\.jsonl")
TRIED_LINES = 10  # of a file: its first ones may be empty, cut or corrupt
LONGEST_LINE = 1 << 24
WANDB = b":W&B"  # how its files begin
ABOVE = 2  # folders above an argument whose names may tell what the run is
ACCEPTED = (
    "the folder of a run, a folder that holds runs, a *.jsonl of verl's file logger, a tensorboard folder, an offline "
    "wandb folder or *.wandb file; each also as label=PATH or label@seed=PATH"
)


@dataclass(frozen=True)
class Source:
    """Files of one run. kind: "jsonl", "tensorboard", "wandb", or "empty" (no metrics).

    names: of the file, if it is the run's own, and of the folders up to ABOVE the argument, nearest first.
    below: how many of the names are below the argument. common: those that all sources have.
    label, seed: of label@seed=RUN. alone: RUN holds one run, whose method the label is, also against its configuration.
    shared: other runs' metrics are in the folder too, so its configuration and dumps may be another's.
    unread: why a folder cannot be listed, which is then "empty"; "" where it can.
    """

    kind: str
    folder: Path
    files: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    below: int = 0
    common: frozenset[str] = frozenset()
    label: str = ""
    seed: int | None = None
    alone: bool = False
    shared: bool = False
    unread: str = ""


def split_label(argument: str) -> tuple[str, int | None, Path]:
    """("label", seed, path) of `label@seed=PATH`; a path that exists as it is written has no label.

    After = the shell leaves ~ as it is.
    """
    if Path(argument).exists() or "=" not in argument:
        return "", None, Path(argument)
    label, given = argument.split("=", 1)
    path = Path(os.path.expanduser(given))
    name, at, seed = label.rpartition("@")
    if not at:
        return label, None, path
    if not seed.isdecimal():
        raise UserError(f"RUN {argument}: {seed!r} is no seed; accepted after @ is a whole number: {name}@0={given}")
    return name, int(seed), path


def find(arguments: Sequence[str]) -> list[Source]:
    """The runs at and below each RUN, label=RUN or label@seed=RUN, each once, sorted by path within an argument.

    Of several labels of one run the first counts.

    Raises:
        UserError: a path does not exist, is a file that only has the name of wandb's, a seed is none or is of several
            runs, or there is no run at all.
    """
    sources_by_file: dict[tuple[str, Path], Source] = {}
    for argument in arguments:
        label, seed, path = split_label(argument)
        if not path.exists():
            raise UserError(f"RUN {argument}: there is no {path}. Accepted: {ACCEPTED}")
        sources = list(_search(path)) or [_source("empty", path, path)]
        count = sum(not source.unread for source in sources)
        if seed is not None and count > 1:
            raise UserError(f"RUN {argument}: a seed is of one run, and there are {count} in {path}")
        for source in sources:
            key = source.kind, (source.files[0] if source.files and not _many(source) else source.folder).resolve()
            if key not in sources_by_file or (label and not sources_by_file[key].label):
                sources_by_file[key] = replace(source, label=label, seed=seed, alone=count == 1)
    if all(source.kind == "empty" and not _has_configuration(source.folder) for source in sources_by_file.values()):
        raise UserError(
            f"RUN {' '.join(arguments)}: no run there. Looked for metrics-NNN.jsonl or another *.jsonl of verl's file "
            "logger, tensorboard's events.out.tfevents.* and *.wandb, in these folders and all below"
        )
    common = frozenset.intersection(*(frozenset(source.names) for source in sources_by_file.values()))
    return [replace(source, common=common) for source in sources_by_file.values()]


def _many(source: Source) -> bool:
    """Whether all such files of a folder are of one run."""
    return source.kind == "tensorboard" or bool(STARTS.fullmatch(source.files[0].name))


def _source(kind: str, folder: Path, argument: Path, files: Sequence[Path] = (), own: str = "") -> Source:
    """own: the file's stem, where the file and not its folder is the run."""
    inside = folder.relative_to(argument).parts if folder.is_relative_to(argument) else ()
    parts = [part for part in argument.parts if part not in ("..", argument.anchor)] or [argument.resolve().name]
    if own and folder == argument.parent:  # the argument is this file
        parts[-1] = own
    elif own:
        inside = (*inside, own)
    names = (*reversed(inside), *reversed(parts[-1 - ABOVE :]))
    return Source(kind, folder, tuple(files), names, len(inside))


def _search(path: Path) -> Iterator[Source]:
    if path.is_file():
        yield from _of_file(path)
        return
    seen: set[Path] = set()
    closed: list[OSError] = []
    for top, folders, names in os.walk(path, followlinks=True, onerror=closed.append):
        folder = Path(top)
        if (real := folder.resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        sources = list(_sources(folder, sorted(names), path))
        yield from sources
        passed_over = NOT_SEARCHED | (OF_A_RUN if sources else set())
        wanted = [name for name in folders if name not in passed_over and not name.startswith(".")]
        folders[:] = sorted(wanted, key=lambda name: ((folder / name).is_symlink(), name))
        if sources and (sources[0].kind == "wandb" or (sources[0].kind == "jsonl" and _many(sources[0]))):
            folders.clear()  # what lies below is of the same run
    for error in closed:
        yield replace(_source("empty", Path(error.filename), path), unread=str(error.strerror))


def _of_file(path: Path) -> Iterator[Source]:
    folder = path.parent
    names = sorted(os.listdir(folder))
    if STARTS.fullmatch(path.name):
        yield _source("jsonl", folder, folder, _starts(folder, names))
    elif ".tfevents." in path.name:
        yield _source("tensorboard", folder, folder, _events(folder, names))
    elif path.suffix == ".wandb":
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if not WANDB.startswith(file.read(4)):
                raise UserError(f"RUN {path}: not a file of wandb")
        yield _source("wandb", folder, folder, [path])
    elif path.suffix == ".jsonl" or _is_metrics(path):
        plain = _plain_logs(folder, names)
        yield replace(_source("jsonl", folder, path, [path], path.stem), shared=path in plain and len(plain) > 1)


def _sources(folder: Path, names: list[str], argument: Path) -> Iterator[Source]:
    if starts := _starts(folder, names):
        yield _source("jsonl", folder, argument, starts)
        return
    plain = _plain_logs(folder, names)
    for file in plain:
        yield replace(_source("jsonl", folder, argument, [file], file.stem), shared=len(plain) > 1)
    if plain:
        return
    if events := _events(folder, names):
        yield _source("tensorboard", folder, argument, events)
    for n in names:
        if n.endswith(".wandb") and (folder / n).is_file():
            yield _source("wandb", folder, argument, [folder / n])
    if not events and _has_configuration(folder):
        yield _source("empty", folder, argument)


def _starts(folder: Path, names: list[str]) -> list[Path]:
    matches = [match for name in names if (match := STARTS.fullmatch(name))]
    return [folder / match[0] for match in sorted(matches, key=lambda match: int(match[1]))]


def _events(folder: Path, names: list[str]) -> list[Path]:
    return [folder / n for n in names if ".tfevents." in n]


def _plain_logs(folder: Path, names: list[str]) -> list[Path]:
    """Files of verl's file logger under another name than the launcher's: each a run."""
    return [folder / n for n in names if n.endswith(".jsonl") and not STARTS.fullmatch(n) and _is_metrics(folder / n)]


def _is_metrics(path: Path) -> bool:
    """Whether one of a file's first lines is what verl's file logger writes."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for _ in range(TRIED_LINES):
            with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
                decode(file.readline(LONGEST_LINE), RECORD)
                return True
    return False


def _has_configuration(folder: Path) -> bool:
    """Whether the launcher has begun a run here."""
    if not os.path.isfile(folder / "config.yaml"):  # False, too, where the folder may not be entered
        return False
    with open(folder / "config.yaml", errors="replace") as file:
        return any(line.startswith("recipe:") for line in file)
