"""Logs of tensorboard and of offline wandb runs, as starts of a run (records.py)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from vlnorm_verl.report.find import WANDB
from vlnorm_verl.runs.records import Start, decode, starts_of, unread


def read_tensorboard(files: Iterable[Path], notes: list[str]) -> list[Start]:
    """The starts in tensorboard's event files, in the order of their first event."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    by_time: list[tuple[float, list[Start]]] = []
    for file in files:
        rows: list[tuple[int, dict[str, Any]]] = []
        began = None
        try:
            for event in EventFileLoader(str(file)).Load():
                began = event.wall_time if began is None else began
                for value in event.summary.value:
                    number = make_ndarray(value.tensor) if value.HasField("tensor") else None
                    if number is not None and number.ndim == 0 and number.dtype.kind in "fiu":
                        rows.append((event.step, {value.tag: number.item()}))
        except Exception as error:  # tensorboard has no class of its own for a file that is damaged
            cut = f"{file.name}: cannot be read to its end ({type(error).__name__})"
            notes.append(unread(file, error) if isinstance(error, OSError) else cut)
        if began is None:
            notes.append(f"{file.name}: no event in it")
        by_time.append((began or 0.0, starts_of(file.name, rows)))
    return [start for _, starts in sorted(by_time, key=lambda entry: entry[0]) for start in starts]


class Wandb(NamedTuple):
    """One wandb file. began: seconds; run: identity of the run, the same in all files of one that was resumed."""

    starts: list[Start]
    config: dict[str, Any]
    name: str
    run: str
    began: float


def read_wandb(file: Path, notes: list[str]) -> Wandb:
    """An offline wandb run.

    wandb has no public reader of its .wandb files, and since 0.20 no private one in Python either. The frame is
    LevelDB's log format after a header of 7 bytes (blocks of 32 KiB; records of checksum, length, type); in it are
    protobuf messages, which wandb's own generated classes (`wandb.proto`, private) decode.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    content = b""
    try:
        content = file.read_bytes()
    except OSError as error:
        notes.append(unread(file, error))
    if not WANDB.startswith(content[:4]):
        notes.append(f"{file.name}: not a file of wandb")
        content = b""
    rows: list[tuple[int, dict[str, Any]]] = []
    config: dict[str, Any] = {}
    name = run = ""
    began = 0.0
    message = wandb_internal_pb2.Record()
    for payload in _leveldb_log(content, notes, file.name):
        try:
            message.ParseFromString(payload)
        except DecodeError:
            notes.append(f"{file.name}: a record is corrupt, left out")
            continue
        kind = message.WhichOneof("record_type")
        if kind == "run":
            name, began = message.run.display_name, message.run.start_time.ToNanoseconds() / 1e9
            run = "/".join((message.run.entity, message.run.project, message.run.run_id))
        if kind in ("run", "config"):
            update = message.run.config.update if kind == "run" else message.config.update
            for item in update:
                config[item.key or ".".join(item.nested_key)] = _json(item.value_json.encode())
        elif kind == "history":
            row = {item.key or "/".join(item.nested_key): _wandb_value(item) for item in message.history.item}
            step = row.pop("_step", None)
            step = message.history.step.num if step is None else step
            rows.append((int(step), {k: v for k, v in row.items() if not k.startswith("_")}))
    return Wandb(starts_of(file.name, rows), config, name, run, began)


def _wandb_value(item: Any) -> Any:
    """wandb ≥ 0.29 has a typed value; before that, and for everything else, there is JSON."""
    kind = item.WhichOneof("value") if "value" in item.DESCRIPTOR.oneofs_by_name else None
    return getattr(item, kind) if kind in ("number", "integer") else _json(item.value_json.encode())


_ANY = msgspec.json.Decoder()


def _json(text: bytes) -> Any:
    try:
        return decode(text, _ANY)
    except msgspec.MsgspecError:
        return None


def _leveldb_log(content: bytes, notes: list[str], name: str) -> Iterator[bytes]:
    block, position = 32768, 7
    parts: list[bytes] = []
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
        if kind in (1, 2):  # full, first, middle, last
            parts.clear()
        parts.append(data)
        if kind in (1, 4):
            yield b"".join(parts)
