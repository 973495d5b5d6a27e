"""Metrics as {step: {metric: value}}: JSON lines read leniently, and one run's starts joined.

A start goes on from the step of its first record. What earlier starts logged after that step is of weights that were
given up: it is left out, also where the later start has not come as far again. The step itself has the later start's
record, except that a record which holds a validation only (verl validates before it goes on) is merged into the
earlier one. Starts are files in their order, or parts of one file: where the step goes back, a start begins.

NaN and Infinity, which Python writes into JSON and JSON does not have, are null: values of their metric only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

VALIDATION_METRIC = re.compile(r"val-core/(?P<set>.+)/(?P<variable>[^/]+)/mean@(?P<n>\d+)")  # verl's Avg@n
NOTED = 3  # corrupt lines of a file, and metrics that are not a number any more, that are named one by one
# A string, closed or cut, is stepped over whole: what a model wrote is never changed, and no letter is read twice.
_NOT_FINITE = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|-?\b(?:NaN|Infinity)\b', re.DOTALL)

Records = dict[int, dict[str, Any]]


class LoggedStep(msgspec.Struct):
    """A line of verl's file logger."""

    step: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
    data: dict[str, Any]


RECORD = msgspec.json.Decoder(LoggedStep, strict=False)


def decode(line: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    """A line of JSON, or of what Python takes for it.

    Raises:
        msgspec.MsgspecError, UnicodeDecodeError: it is neither, or not what the decoder wants.
    """
    line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        return decoder.decode(line)
    except msgspec.MsgspecError:
        if b"NaN" not in line and b"Infinity" not in line:
            raise
        return decoder.decode(_NOT_FINITE.sub(lambda m: m[0] if m[0].startswith(b'"') else b"null", line))


class Unread(str):
    """A note that a file could not be read: what was made without it is not to be kept.

    forbidden: as long as its permissions are what they are; else it may be read the next time.
    """

    forbidden: bool


def unread(path: Path, error: OSError) -> Unread:
    note = Unread(f"{path.name}: cannot be read ({error.strerror})")
    note.forbidden = isinstance(error, PermissionError)
    return note


def has_unread(notes: Iterable[str]) -> bool:
    return any(isinstance(note, Unread) for note in notes)


def read_lines(path: Path, decoder: msgspec.json.Decoder[Any], notes: list[str]) -> Iterator[Any]:
    """The lines of a JSONL file that decode; what does not is told in `notes`."""
    corrupt = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield decode(line, decoder)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    if not line.endswith(b"\n"):
                        notes.append(f"{path.name}: last line is cut, left out")
                    elif line.strip(b"\xef\xbb\xbf \t\r\n"):
                        corrupt.append(number)
    except OSError as error:
        notes.append(unread(path, error))
    if corrupt:
        named = ", ".join(map(str, corrupt[:NOTED])) + (" …" if len(corrupt) > NOTED else "")
        word = "line" if len(corrupt) == 1 else f"{len(corrupt)} lines"
        notes.append(f"{path.name}: {word} {named} corrupt, left out")


@dataclass
class Start:
    """What a run logged from one start to its end or to the next start. name: the file's, for notes."""

    name: str
    records: Records = field(default_factory=dict)


def _trained(data: dict[str, Any]) -> bool:
    """Whether a record is of a training step, and not of a validation alone."""
    return any(key.startswith(("training/", "actor/", "critic/")) for key in data)


def starts_of(name: str, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[Start]:
    """The starts in one file. rows: (step, metrics) as they were written; rows of one step are one record."""
    starts = [Start(name)]
    last: int | None = None
    for step, data in rows:
        known = starts[-1].records.get(step, {})
        if last is not None and (step < last or (_trained(known) and _trained(data) and known.keys() & data.keys())):
            starts.append(Start(name))
        starts[-1].records.setdefault(step, {}).update(data)
        last = step
    return starts


def read_starts(files: Iterable[Path], notes: list[str]) -> list[Start]:
    """The starts in files of verl's file logger, in their order."""
    rows = {file: ((record.step, record.data) for record in read_lines(file, RECORD, notes)) for file in files}
    return [start for file, of_file in rows.items() for start in starts_of(file.name, of_file)]


def join(starts: Iterable[Start], notes: list[str]) -> Records:
    """One run's records; see the module. Values are what JSON gave: numbers, None, others."""
    records: Records = {}
    for start in starts:
        first = next(iter(start.records), None)
        given_up = [] if first is None else [step for step in records if step > first]
        for step in given_up:
            del records[step]
        if given_up:
            steps = "1 later step" if len(given_up) == 1 else f"{len(given_up)} later steps"
            notes.append(f"{start.name}: starts again at step {first}; {steps} of the earlier start left out")
        for step, data in start.records.items():
            merged = step in records and not _trained(data)
            records[step] = {**records[step], **data} if merged else data
    return records


def columns(records: Records) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, int]]:
    """Steps [T], {metric: float64 [T]}, {metric: the step from which on it was logged but never finite}.

    NaN where a step lacks it or it is no finite number. Metrics without any number are not in the second.
    """
    steps = sorted(records)
    rows = [records[step] for step in steps]
    metrics, ended = {}, {}
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        if not set(map(type, values)) <= {float, type(None)}:
            values = [v if type(v) is float or (type(v) is int and abs(v) < 1e300) else None for v in values]
        column = np.array(values, dtype=np.float64)
        column[~np.isfinite(column)] = nan
        finite = np.flatnonzero(np.isfinite(column))
        if len(finite):
            metrics[name] = column
        after = finite[-1] + 1 if len(finite) else 0
        logged = (step for step, row in zip(steps[after:], rows[after:], strict=True) if _is_number(row, name))
        if (first := next(logged, None)) is not None:
            ended[name] = first
    return np.array(steps, dtype=np.int64), metrics, ended


def _is_number(row: dict[str, Any], name: str) -> bool:
    """Whether a metric was logged as a number, of which JSON's null is one that is not finite."""
    return name in row and (row[name] is None or type(row[name]) is float)
