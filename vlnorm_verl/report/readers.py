"""Reads runs of verl from what verl itself wrote: metrics, configuration and validation dumps.

| what                 | where it is looked for                                                                    |
|----------------------|-------------------------------------------------------------------------------------------|
| metrics              | metrics-NNN.jsonl (launcher, quickstart), else any *.jsonl of verl's file logger, else a   |
|                      | tensorboard event folder, else an offline wandb run                                        |
| what the run is      | config.yaml (launcher), settings.json (quickstart), .hydra/config.yaml, wandb's own config |
| validation responses | validation/STEP.jsonl, else the configuration's trainer.validation_data_dir                |

A later start goes on from the step of its first record. What earlier starts logged after that step is of weights that
were given up: it is left out, also where the later start has not come as far again, and so are the dumps after the last
step that is left. The step itself has the later start's record, except that a record which holds a validation only
(verl validates before it goes on) is merged into the earlier one.

A configuration and dumps are those of all runs whose metrics are in one folder (metrics-NNN.jsonl are starts of one
run). verl's file logger puts all experiments of a project into one folder: several *.jsonl there have neither.

A dump whose accuracy is not what verl logged at its step is not used: verl's number stands, without an interval.

Covered: a cut last line, corrupt lines, missing metrics, runs that are being written. Not covered: runs on a tracking
server, and dumps of several validation sets whose reward does not write a `validation_set` field.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from vlnorm_verl.report.runs import Run, Validation

# Folders of a run that hold no metrics of a run of its own, and the launcher's two-step smoke runs.
NOT_SEARCHED = {"checkpoints", "rollouts", "validation", "smoke", "__pycache__"}
STOCK_METHODS = {
    "seq-mean-token-mean": "grpo_norm",
    "token-mean": "dapo_norm",
    "seq-mean-token-sum-norm": "dr_grpo_norm",
}
STARTS = re.compile(r"metrics-\d+\.jsonl")
VALIDATION_METRIC = re.compile(r"val-core/(?P<set>.+)/(?P<variable>[^/]+)/mean@(?P<n>\d+)")
NOTED_LINES = 3  # corrupt lines of a file that are named one by one
CACHE_FILE = ".validation-counts.msgpack"
CACHE_FORMAT = 1


class ReportError(ValueError):
    """A request that cannot be met; the message names the argument and what is accepted."""


# -------------------------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class Source:
    """Files of one run. kind: "jsonl", "tensorboard", "wandb", or "empty" (a configuration without metrics).

    label: of label=RUN; `alone`: RUN is this run only, so the label is its method whatever its configuration says.
    shared: other runs' metrics are in the folder too, so its configuration and dumps may be another's.
    """

    kind: str
    folder: Path
    files: list[Path]
    name: str
    label: str = ""
    alone: bool = False
    shared: bool = False


def split_label(argument: str) -> tuple[str, Path]:
    """("label", path) of `label=PATH`; a path that exists as it is written has no label."""
    if Path(argument).exists() or "=" not in argument:
        return "", Path(argument)
    label, path = argument.split("=", 1)
    return label, Path(path)


def find(arguments: list[str]) -> list[Source]:
    """The runs at and below each RUN or label=RUN, each once, sorted by path within an argument.

    Raises:
        ReportError: a path does not exist.
    """
    found: dict[tuple[str, Path, str], Source] = {}
    for argument in arguments:
        label, path = split_label(argument)
        if not path.exists():
            raise ReportError(
                f"RUN {argument}: there is no {path}. Accepted: the folder of a run, a folder that holds runs, a "
                "*.jsonl of verl's file logger, a tensorboard folder, an offline wandb folder or *.wandb file; each "
                "also as label=PATH"
            )
        sources = list(_search(path))
        alone = len(sources) == 1
        for source in sources:
            name = source.name
            if label:
                name = label if alone else f"{label}/{source.name}"
            found.setdefault(
                (source.kind, source.folder.resolve(), source.files[0].name if source.files else ""),
                replace(source, name=name, label=label, alone=alone),
            )
    return list(found.values())


def _search(path: Path) -> Iterator[Source]:
    if path.is_file():
        if path.suffix == ".wandb":
            yield Source("wandb", path.parent, [path], path.parent.name)
        elif path.suffix == ".jsonl" and _is_metrics(path):
            plain = _plain_logs(path.parent, sorted(file.name for file in path.parent.glob("*.jsonl")))
            yield Source("jsonl", path.parent, [path], path.stem, shared=path in plain and len(plain) > 1)
        elif ".tfevents." in path.name:
            yield Source("tensorboard", path.parent, [path], path.parent.name)
        return
    for top, folders, names in os.walk(path, followlinks=False):
        folder = Path(top)
        folders[:] = sorted(name for name in folders if name not in NOT_SEARCHED and not name.startswith("."))
        sources = list(_sources(folder, sorted(names)))
        yield from sources
        if any(source.files and source.files[0].name.startswith("metrics-") for source in sources):
            folders.clear()  # what lies below are other logs of the same run


def _sources(folder: Path, names: list[str]) -> Iterator[Source]:
    name = folder.resolve().name
    if starts := [folder / n for n in names if STARTS.fullmatch(n)]:
        yield Source("jsonl", folder, starts, name)
        return
    plain = _plain_logs(folder, names)
    for file in plain:
        yield Source("jsonl", folder, [file], file.stem, shared=len(plain) > 1)
    if plain:
        return
    events = [folder / n for n in names if ".tfevents." in n]
    if events:
        yield Source("tensorboard", folder, events, name)
    for n in names:
        if n.endswith(".wandb"):
            yield Source("wandb", folder, [folder / n], name)
    if not events and ("settings.json" in names or _is_recipe(folder, names)):
        yield Source("empty", folder, [], name)


def _plain_logs(folder: Path, names: list[str]) -> list[Path]:
    """Files of verl's file logger under another name than the launcher's: each a run."""
    return [folder / n for n in names if n.endswith(".jsonl") and not STARTS.fullmatch(n) and _is_metrics(folder / n)]


def _is_metrics(path: Path) -> bool:
    """Whether a file begins as verl's file logger writes."""
    with open(path, "rb") as file:
        line = file.readline(1 << 24)
    try:
        _RECORD.decode(line)
    except msgspec.MsgspecError:
        return False
    return True


def _is_recipe(folder: Path, names: list[str]) -> bool:
    if "config.yaml" not in names:
        return False
    with open(folder / "config.yaml", errors="replace") as file:
        return any(line.startswith("recipe:") for line in file)


# -------------------------------------------------------------------------------------------------------- metrics


class _Record(msgspec.Struct):
    step: int
    data: dict[str, Any]


_RECORD = msgspec.json.Decoder(_Record)
Records = dict[int, dict[str, Any]]


class Lines:
    """The lines of a JSONL file that decode; what does not is told in `notes`."""

    def __init__(self, path: Path, decoder: msgspec.json.Decoder[Any], notes: list[str]):
        self.path, self.decoder, self.notes = path, decoder, notes

    def __iter__(self) -> Iterator[Any]:
        corrupt = []
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield self.decoder.decode(line)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    if not line.endswith(b"\n"):
                        self.notes.append(f"{self.path.name}: last line is cut, left out")
                    elif line.strip():
                        corrupt.append(number)
        if corrupt:
            named = ", ".join(map(str, corrupt[:NOTED_LINES])) + (" …" if len(corrupt) > NOTED_LINES else "")
            word = "line" if len(corrupt) == 1 else f"{len(corrupt)} lines"
            self.notes.append(f"{self.path.name}: {word} {named} corrupt, left out")


def read_records(files: Iterable[Path], notes: list[str]) -> Records:
    """{step: metrics} of the starts of one run, in their order. Values are what JSON gave: numbers, None, others.

    Of what an earlier start logged, the steps up to a later one's first are kept; see the module.
    """
    records: Records = {}
    for path in files:
        start: Records = {}
        for record in Lines(path, _RECORD, notes):
            start.setdefault(record.step, {}).update(record.data)
        first = next(iter(start), None)
        given_up = [] if first is None else [step for step in records if step > first]
        for step in given_up:
            del records[step]
        if given_up:
            steps = "1 later step" if len(given_up) == 1 else f"{len(given_up)} later steps"
            notes.append(f"{path.name}: starts again at step {first}; {steps} of the earlier start left out")
        for step, data in start.items():
            trained = "training/global_step" in data
            records[step] = data if trained or step not in records else {**records[step], **data}
    return records


def columns(records: Records) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps [T] and {metric: float64 [T]}; NaN where a step lacks it or it is no number.

    Metrics without any number are left out.
    """
    steps = sorted(records)
    rows = [records[step] for step in steps]
    metrics = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        if not set(map(type, values)) <= {float, int, type(None)}:
            values = [v if type(v) in (float, int) else None for v in values]
        column = np.array(values, dtype=np.float64)
        if not np.isnan(column).all():
            metrics[name] = column
    return np.array(steps, dtype=np.int64), metrics


def read_tensorboard(folder: Path) -> Records:
    """Scalars of a tensorboard event folder; where event files overlap, tensorboard's own rule: the later file wins.

    Raises:
        ReportError: tensorboard is not installed.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise ReportError(f"{folder}: reading it needs tensorboard: pip install tensorboard") from None
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    accumulator.Reload()
    records: Records = {}
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            records.setdefault(event.step, {})[tag] = event.value
    return records


def read_wandb(file: Path, notes: list[str]) -> tuple[Records, dict[str, Any]]:
    """Metrics and configuration of an offline wandb run.

    wandb has no public reader of its .wandb files, and since 0.20 no private one in Python either. The frame is
    LevelDB's log format after a header of 7 bytes (blocks of 32 KiB; records of checksum, length, type); in it are
    protobuf messages, which wandb's own generated classes (`wandb.proto`, private) decode.

    Raises:
        ReportError: wandb is not installed, or the file is not one of wandb's.
    """
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError:
        raise ReportError(f"{file}: reading it needs wandb: pip install wandb") from None
    content = file.read_bytes()
    if content[:4] != b":W&B":
        raise ReportError(f"{file}: not a file of wandb")
    records: Records = {}
    config: dict[str, Any] = {}
    message = wandb_internal_pb2.Record()
    for payload in _leveldb_log(content, notes, file.name):
        message.ParseFromString(payload)
        kind = message.WhichOneof("record_type")
        if kind in ("run", "config"):
            update = message.run.config.update if kind == "run" else message.config.update
            for item in update:
                config[item.key or ".".join(item.nested_key)] = _json(item.value_json.encode())
        elif kind == "history":
            row = {item.key or "/".join(item.nested_key): _wandb_value(item) for item in message.history.item}
            step = row.pop("_step", None)
            step = message.history.step.num if step is None else step
            records.setdefault(int(step), {}).update({k: v for k, v in row.items() if not k.startswith("_")})
    return records, config


def _wandb_value(item: Any) -> Any:
    """wandb ≥ 0.29 has a typed value; before that, and for everything else, there is JSON."""
    kind = item.WhichOneof("value") if "value" in item.DESCRIPTOR.oneofs_by_name else None
    return getattr(item, kind) if kind in ("number", "integer") else _json(item.value_json.encode())


def _json(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError:  # Python's JSON writes NaN
        return None


def _leveldb_log(content: bytes, notes: list[str], name: str) -> Iterator[bytes]:
    block, position, parts = 32768, 7, b""
    while position + 7 <= len(content):
        left = block - position % block
        if left < 7:  # too short for a record's header: filled with zeros
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        if kind == 0 and length == 0:
            position += left
            continue
        data = content[position + 7 : position + 7 + length]
        position += 7 + length
        if len(data) < length or kind not in (1, 2, 3, 4):
            notes.append(f"{name}: the end is cut, left out")
            return
        parts = data if kind in (1, 2) else parts + data  # full, first, middle, last
        if kind in (1, 4):
            yield parts


# -------------------------------------------------------------------------------------------------- what a run is


@dataclass
class Identity:
    """What a configuration says of a run; the fields are those of Run."""

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
    notes: list[str] = field(default_factory=list)


def parse_method(mode: str) -> tuple[str, float | None]:
    """(method, α) of a loss_agg_mode, a method's name, or a label: vl_norm:0.75, token-mean, grpo_norm …"""
    name, _, number = mode.partition(":")
    if name == "vl_norm":
        try:
            return name, float(number) if number else 1.0
        except ValueError:
            return mode, None
    return STOCK_METHODS.get(mode, mode), None


def identify(folder: Path) -> Identity:
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
            return from_config(content)
    if (file := folder / "settings.json").is_file():
        settings = _json(file.read_bytes())
        if isinstance(settings, dict) and "mode" in settings:
            method, alpha = parse_method(str(settings["mode"]))
            return Identity(
                family="quickstart",
                task="countdown",
                model="tiny",
                length="256",
                scale="cpu",
                method=method,
                alpha=alpha,
                seed=settings.get("seed"),
                planned_steps=settings.get("steps"),
                notes=[f"overrides: {' '.join(settings['overrides'])}"] if settings.get("overrides") else [],
            )
        notes.append(f"{file.name} is not the quickstart's")
    if (file := folder / ".hydra" / "config.yaml").is_file():
        return from_config(_resolved(file))
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


def from_config(config: dict[str, Any]) -> Identity:
    """Of a resolved configuration of verl, with the recipes' own section or without."""

    def get(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    method, alpha = parse_method(str(get("actor_rollout_ref.actor.loss_agg_mode") or ""))
    identity = Identity(
        method=method,
        alpha=alpha,
        seed=get("data.seed"),
        planned_steps=get("trainer.total_training_steps"),
        scale_factor=get("actor_rollout_ref.actor.loss_scale_factor"),
        validation_folder=get("trainer.validation_data_dir") or "",
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
        identity.seed = recipe.get("seed", identity.seed)
        return identity
    model, files = get("actor_rollout_ref.model.path"), get("data.val_files")
    identity.model = Path(str(model)).name if model else ""
    identity.length = str(get("data.max_response_length") or "")
    flat = [files] if isinstance(files, str) else files or []
    identity.task = ", ".join(sorted(Path(str(file)).parent.name + "/" + Path(str(file)).stem for file in flat))
    return identity


# --------------------------------------------------------------------------------------------- validation dumps


class _Response(msgspec.Struct):
    """The fields of a dump's line that are counted; the prompt is only hashed, of the response only the length kept."""

    input: msgspec.Raw
    output: str | None = None
    score: float | bool | None = None
    gts: msgspec.Raw = msgspec.Raw(b"null")
    acc: float | bool | None = None
    validation_set: str | None = None


class _Counts(msgspec.Struct):
    """One validation set of one dump; `problems` is an index into the cache's lists."""

    problems: int
    n: list[int]
    correct: list[float]
    binary: bool
    characters: bytes  # int32


class _Dump(msgspec.Struct):
    size: int
    mtime: int
    sets: dict[str, _Counts]
    notes: list[str]


class _Content(msgspec.Struct):
    format: int
    problems: list[list[str]]
    dumps: dict[str, _Dump]


class DumpCache:
    """Counts of validation dumps, kept by path, size and time of change. A file of another format is made anew."""

    def __init__(self, path: Path | None):
        self.path = path
        self.content = _Content(CACHE_FORMAT, [], {})
        if path and path.exists():
            try:
                content = msgspec.msgpack.decode(path.read_bytes(), type=_Content)
            except msgspec.MsgspecError:
                content = self.content
            if content.format == CACHE_FORMAT:
                self.content = content
        self.lists = {tuple(names): index for index, names in enumerate(self.content.problems)}
        self.changed = False

    def get(self, path: Path) -> _Dump | None:
        known, stat = self.content.dumps.get(str(path.resolve())), path.stat()
        return known if known and (known.size, known.mtime) == (stat.st_size, stat.st_mtime_ns) else None

    def read(self, path: Path) -> _Dump:
        if known := self.get(path):
            return known
        stat = path.stat()  # before reading: a dump that grows meanwhile is read again the next time
        dump = _Dump(stat.st_size, stat.st_mtime_ns, {}, [])
        for name, found in count(path, dump.notes).items():
            dump.sets[name] = _Counts(
                problems=self._index(found.problems),
                n=found.n.tolist(),
                correct=found.correct.tolist(),
                binary=found.binary,
                characters=b"" if found.characters is None else found.characters.tobytes(),
            )
        self.content.dumps[str(path.resolve())] = dump
        self.changed = True
        return dump

    def _index(self, problems: list[str]) -> int:
        key = tuple(problems)
        if key not in self.lists:
            self.lists[key] = len(self.content.problems)
            self.content.problems.append(problems)
        return self.lists[key]

    def save(self) -> None:
        if self.path and self.changed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(msgspec.msgpack.encode(self.content))
            temporary.replace(self.path)


_RESPONSE = msgspec.json.Decoder(_Response)


def count(path: Path, notes: list[str]) -> dict[str, Validation]:
    """{validation set, "" if the dump does not say: its counts}.

    Correct is `acc` where the reward gives it, else `score`. Problems are in the order of their identity.
    """
    totals: dict[str, dict[bytes, list[float]]] = {}
    lengths: dict[str, list[int]] = {}
    graded: set[str] = set()
    unscored = 0
    for response in Lines(path, _RESPONSE, notes):
        score = response.score if response.acc is None else response.acc
        if score is None:
            unscored += 1
            continue
        name = response.validation_set or ""
        digest = hashlib.blake2b(response.input, digest_size=8)
        digest.update(b"\0")
        digest.update(response.gts)
        total = totals.setdefault(name, {}).setdefault(digest.digest(), [0, 0.0])
        total[0] += 1
        total[1] += score
        if score not in (0, 1):
            graded.add(name)
        if response.output is not None:
            lengths.setdefault(name, []).append(len(response.output))
    if unscored:
        notes.append(f"{path.name}: {unscored} responses without a score, left out")
    result = {}
    for name, problems in totals.items():
        order = sorted(problems)
        result[name] = Validation(
            problems=[problem.hex() for problem in order],
            n=np.array([problems[problem][0] for problem in order], dtype=np.int64),
            correct=np.array([problems[problem][1] for problem in order]),
            binary=name not in graded,
            characters=np.sort(np.array(lengths[name], dtype=np.int32)) if name in lengths else None,
        )
    return result


def attach_validations(run: Run, dumps: dict[int, _Dump], cache: DumpCache) -> None:
    """Give a run its counts, name the sets, and note what does not agree with verl's own metrics."""
    named = {m["set"] for key in run.metrics if (m := VALIDATION_METRIC.fullmatch(key))}
    unnamed = False
    for step in sorted(dumps):
        for name, counts in dumps[step].sets.items():
            if not name and len(named) != 1:
                unnamed = True
                continue
            numbers = np.array(counts.correct)
            validation = Validation(
                problems=cache.content.problems[counts.problems],
                n=np.array(counts.n, dtype=np.int64),
                correct=numbers.astype(np.int64) if counts.binary else numbers,
                binary=counts.binary,
                characters=np.frombuffer(counts.characters, dtype=np.int32) if counts.characters else None,
            )
            run.validations.setdefault(step, {})[name or next(iter(named))] = validation
        run.notes += dumps[step].notes
    if unnamed:
        run.notes.append(
            "validation dumps do not say which validation set a response is of: no intervals (a reward that returns "
            "validation_set tells it)"
        )
    for step, sets in run.validations.items():
        run.notes += [note for validation in sets.values() for note in _uneven(step, validation)]
        for name in list(sets):
            if note := _disagreement(run, step, name, sets[name]):
                run.notes.append(note)
                del sets[name]
    run.validations = {step: sets for step, sets in run.validations.items() if sets}


def _uneven(step: int, validation: Validation) -> list[str]:
    notes, where = [], f"validation/{step}.jsonl"
    usual = int(np.median(validation.n))
    if (fewer := int((validation.n < usual).sum())) > 0:
        notes.append(f"{where}: {fewer} of {len(validation.n)} problems have fewer than {usual} responses")
    if (more := int((validation.n > usual).sum())) > 0:
        notes.append(f"{where}: {more} problems have more than {usual} responses (the same prompt more than once?)")
    return notes


def _disagreement(run: Run, step: int, name: str, validation: Validation) -> str:
    """Why this dump is not that of verl's logged accuracy; "" if it is, or if verl logged none."""
    logged = logged_accuracies(run.metrics).get(name)
    own = None if logged is None else value_at(run, logged.values, step)
    if own is None:
        return ""
    # Over responses, a prompt that is in the set twice counts twice, as verl does; over problems, a problem whose
    # responses are not all there still counts once.
    measured = float(validation.correct.sum() / validation.n.sum())
    if min(abs(measured - own), abs(float((validation.correct / validation.n).mean()) - own)) <= 1e-5:
        return ""
    return f"validation/{step}.jsonl: its accuracy is {measured:.4f}, verl logged {own:.4f} at that step: not used"


def value_at(run: Run, column: np.ndarray, step: int) -> float | None:
    """A metric's value at a step; None where there is none."""
    at = int(np.searchsorted(run.steps, step))
    there = at < len(run.steps) and run.steps[at] == step and np.isfinite(column[at])
    return float(column[at]) if there else None


class Logged(NamedTuple):
    """verl's mean@n of one validation set: of which variable of the reward, of how many responses, values [T]."""

    variable: str
    n: int
    values: np.ndarray


def logged_accuracies(metrics: dict[str, np.ndarray]) -> dict[str, Logged]:
    """{validation set: verl's mean@n over steps}; of `acc` where there is one, else of what verl calls core."""
    found: dict[str, Logged] = {}
    for key, column in metrics.items():
        if match := VALIDATION_METRIC.fullmatch(key):
            one = Logged(match["variable"], int(match["n"]), column)
            other = found.get(match["set"])
            if other is None or (one.variable == "acc", one.n) > (other.variable == "acc", other.n):
                found[match["set"]] = one
    return found


# ------------------------------------------------------------------------------------------------------------- all


def read_runs(arguments: list[str], cache_folder: Path | None = None, console: Console | None = None) -> list[Run]:
    """All runs at and below the arguments. A run without metrics has no steps and a note.

    cache_folder: counts of validation dumps are kept here and read again only where a dump has changed.

    Raises:
        ReportError: a path does not exist, nothing there is a run, or a library to read one is missing.
    """
    sources = find(arguments)
    if not sources:
        raise ReportError(
            f"RUN {' '.join(arguments)}: no run there. Looked for metrics-NNN.jsonl or another *.jsonl of verl's file "
            "logger, tensorboard's events.out.tfevents.* and *.wandb, in these folders and all below"
        )
    console = console or Console(stderr=True)
    cache = DumpCache(cache_folder / CACHE_FILE if cache_folder else None)
    runs, dumps = [], []
    for source in sources:
        run, folder = _read(source)
        runs.append(run)
        dumps.append(_dumps(run, folder) if folder else {})
    read: dict[Path, _Dump] = {}
    files = [file for found in dumps for file in found.values()]
    waiting = sum(file.stat().st_size for file in files if cache.get(file) is None)
    progress = Progress(
        TextColumn("reading validation dumps"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with progress:
        bar = progress.add_task("", total=waiting)
        for file in files:
            known = cache.get(file) is not None
            read[file] = cache.read(file)
            if not known:
                progress.update(bar, advance=read[file].size)
    cache.save()
    for run, found in zip(runs, dumps, strict=True):
        attach_validations(run, {step: read[file] for step, file in found.items()}, cache)
        _note_missing(run, set(found))
    _number_seeds(runs)
    return runs


def _dumps(run: Run, folder: Path) -> dict[int, Path]:
    """{step: dump} up to the run's last record, beyond which a dump is of a start that was given up or not logged."""
    found = {int(f.stem): f for f in folder.glob("*.jsonl") if f.stem.isdigit()}
    last = int(run.steps[-1]) if len(run.steps) else max(found, default=0)
    if beyond := sorted(step for step in found if step > last):
        run.notes.append(f"validation dumps of steps {', '.join(map(str, beyond))}, after its last record, left out")
    return {step: file for step, file in found.items() if step <= last}


def _read(source: Source) -> tuple[Run, Path | None]:
    """A run without its validations, and the folder of its dumps if there is one."""
    notes: list[str] = []
    identity = Identity() if source.shared else identify(source.folder)
    if source.shared:
        notes.append("several runs' *.jsonl in its folder: configuration and dumps there not used")
    records: Records = {}
    if source.kind == "jsonl":
        records = read_records(source.files, notes)
    elif source.kind == "tensorboard":
        records = read_tensorboard(source.folder)
    elif source.kind == "wandb":
        records, config = read_wandb(source.files[0], notes)
        identity = from_config(config) if config else identity
    if not records:
        notes.append("no metrics yet" if source.kind == "empty" else "no step in its metrics")
    steps, metrics = columns(records)
    method, alpha = identity.method, identity.alpha
    if source.label and (source.alone or not method):
        method, alpha = parse_method(source.label)
    elif not method:
        method = source.name
    folder = source.folder / "validation"
    if not folder.is_dir():
        folder = Path(identity.validation_folder) if identity.validation_folder else folder
    run = Run(
        folder=source.folder,
        name=source.name,
        family=identity.family,
        task=identity.task,
        model=identity.model,
        length=identity.length,
        scale=identity.scale,
        method=method,
        alpha=alpha if method == "vl_norm" else None,
        seed=UNKNOWN_SEED if identity.seed is None else int(identity.seed),
        planned_steps=identity.planned_steps,
        steps=steps,
        metrics=metrics,
        notes=identity.notes + notes,
        scale_factor=identity.scale_factor,
    )
    return run, folder if folder.is_dir() and not source.shared else None


UNKNOWN_SEED = -1


def _number_seeds(runs: list[Run]) -> None:
    """Runs that do not say their seed are taken as seeds 0, 1, … of their method, in the order given."""
    taken: dict[Any, int] = {}
    for run in runs:
        if run.seed == UNKNOWN_SEED:
            key = (run.setting, run.method_key)
            run.seed = taken.get(key, 0)
            taken[key] = run.seed + 1
            run.notes.append(f"its seed is not known: counted as seed {run.seed}")


def _note_missing(run: Run, dumped: set[int]) -> None:
    if not len(run.steps):
        return
    accuracies = logged_accuracies(run.metrics)
    if not accuracies and not run.validations:
        run.notes.append("no validation")
    elif not dumped:
        run.notes.append("no validation dumps: no intervals over problems")
    else:
        validated = {int(step) for one in accuracies.values() for step in run.steps[np.isfinite(one.values)]}
        if missing := sorted(validated - dumped):
            run.notes.append(f"no validation dump of steps {', '.join(map(str, missing))}")
