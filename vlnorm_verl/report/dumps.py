"""Validation dumps of verl (STEP.jsonl): counts of correct responses of each problem, kept from one report to the next.

A dump whose accuracy is not what verl logged at its step is not used: verl's number stands, without an interval.

Not covered: dumps of several validation sets whose reward does not write a `validation_set` field.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vlnorm_verl.report.runs import Run, Validation, logged_accuracies, value_at
from vlnorm_verl.runs.records import Lines

CACHE_FILE = ".validation-counts.msgpack"
CACHE_FORMAT = 2


class _Response(msgspec.Struct):
    """The fields of a dump's line that are counted; the prompt is only hashed, of the response only the length kept."""

    input: msgspec.Raw
    output: Any = None
    score: Any = None
    gts: msgspec.Raw = msgspec.Raw(b"null")
    acc: Any = None
    validation_set: Any = None


def _number(value: Any) -> float | None:
    """A score; verl's V0 trainer writes NumPy's numbers as text: "True", "1.0"."""
    if isinstance(value, str):
        value = {"True": 1.0, "False": 0.0}.get(value, value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if np.isfinite(number) else None


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
        score = _number(response.score if response.acc is None else response.acc)
        if score is None:
            unscored += 1
            continue
        name = str(response.validation_set or "")
        digest = hashlib.blake2b(response.input, digest_size=8)
        digest.update(b"\0")
        digest.update(response.gts)
        total = totals.setdefault(name, {}).setdefault(digest.digest(), [0, 0.0])
        total[0] += 1
        total[1] += score
        if score not in (0, 1):
            graded.add(name)
        if isinstance(response.output, str):
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
    named = logged_accuracies(run)
    unnamed = False
    for step in sorted(dumps):
        for name, counts in dumps[step].sets.items():
            if not name and len(named) != 1:
                unnamed = True
                continue
            if run.metric and name and name not in named:  # of an accuracy that was not asked for
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
            if note := _not_used(run, step, name, sets[name]):
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


def _not_used(run: Run, step: int, name: str, validation: Validation) -> str:
    """Why no interval can be had of this dump: not rates, or not those of verl's logged accuracy. "" if it is used."""
    if (validation.correct < 0).any() or (validation.correct > validation.n).any():
        return f"validation/{step}.jsonl: has scores below 0 or above 1: not used"
    logged = logged_accuracies(run).get(name)
    own = None if logged is None else value_at(run, logged.values, step)
    if own is None:
        return ""
    # Over responses, a prompt that is in the set twice counts twice, as verl does; over problems, a problem whose
    # responses are not all there still counts once.
    measured = float(validation.correct.sum() / validation.n.sum())
    if min(abs(measured - own), abs(float((validation.correct / validation.n).mean()) - own)) <= 1e-5:
        return ""
    return f"validation/{step}.jsonl: its accuracy is {measured:.4f}, verl logged {own:.4f} at that step: not used"
