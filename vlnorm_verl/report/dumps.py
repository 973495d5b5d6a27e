"""Validation dumps of verl (STEP.jsonl): counts of correct responses of each problem, kept from one report to the next.

A dump whose accuracy is not what verl logged at its step is not used: verl's number stands, without an interval.

Not covered: dumps of several validation sets whose reward does not write a `validation_set` field.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vlnorm_verl.files import write
from vlnorm_verl.report.run import Run, Validation, logged_accuracies, value_at
from vlnorm_verl.runs.records import read_lines

CACHE_FILE = ".validation-counts.msgpack"
CACHE_FORMAT = 4


class _Response(msgspec.Struct):
    """The fields of a dump's line that are counted; the prompt is only hashed."""

    input: msgspec.Raw
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


def scored(response: Any) -> float | None:
    """What a response of a dump is worth: `acc` where the reward gives it, else `score`."""
    return _number(response.score if response.acc is None else response.acc)


class Counts(msgspec.Struct):
    """One validation set of one dump, as `Validation` has it, in types that msgpack has."""

    problems: list[str]
    n: list[int]
    correct: list[float]
    binary: bool

    def validation(self) -> Validation:
        correct = np.array(self.correct)
        return Validation(
            problems=self.problems,
            n=np.array(self.n, dtype=np.int64),
            correct=correct.astype(np.int64) if self.binary else correct,
            binary=self.binary,
        )


class Dump(msgspec.Struct):
    size: int
    mtime: int
    sets: dict[str, Counts]  # by validation set, "" if the dump does not say
    notes: list[str]


class _Content(msgspec.Struct):
    format: int
    dumps: dict[str, Dump]


class DumpCache:
    """Counts of validation dumps, kept by path, size and time of change. A file of another format is made anew."""

    def __init__(self, path: Path | None):
        self.path = path
        self.dumps: dict[str, Dump] = {}
        self.changed = False
        with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
            content = msgspec.msgpack.decode(path.read_bytes() if path else b"", type=_Content)
            self.dumps = content.dumps if content.format == CACHE_FORMAT else {}

    def get(self, path: Path) -> Dump | None:
        known, stat = self.dumps.get(str(path.resolve())), path.stat()
        return known if known and (known.size, known.mtime) == (stat.st_size, stat.st_mtime_ns) else None

    def read(self, path: Path) -> Dump:
        """Count it again, whatever is known."""
        stat = path.stat()  # before reading: a dump that grows meanwhile is read again the next time
        notes: list[str] = []
        dump = self.dumps[str(path.resolve())] = Dump(stat.st_size, stat.st_mtime_ns, count(path, notes), notes)
        self.changed = True
        return dump

    def save(self) -> None:
        if self.path and self.changed:
            write(self.path, msgspec.msgpack.encode(_Content(CACHE_FORMAT, self.dumps)))


_RESPONSE = msgspec.json.Decoder(_Response)


def count(path: Path, notes: list[str]) -> dict[str, Counts]:
    """{validation set, "" if the dump does not say: its counts}.

    Problems are in the order of their identity.
    """
    scores: dict[str, dict[str, list[float]]] = {}  # of each problem's responses, by validation set
    unscored = 0
    for response in read_lines(path, _RESPONSE, notes):
        score = scored(response)
        if score is None:
            unscored += 1
            continue
        name = str(response.validation_set or "")
        problem = hashlib.blake2b(bytes(response.input) + b"\0" + bytes(response.gts), digest_size=8).hexdigest()
        scores.setdefault(name, {}).setdefault(problem, []).append(score)
    if unscored:
        notes.append(f"{path.name}: {unscored} responses without a score, left out")
    return {
        name: Counts(
            problems=sorted(problems),
            n=[len(problems[problem]) for problem in sorted(problems)],
            correct=[sum(problems[problem]) for problem in sorted(problems)],
            binary=all(score in (0, 1) for of_problem in problems.values() for score in of_problem),
        )
        for name, problems in scores.items()
    }


def attach_validations(run: Run, dumps: dict[int, Dump]) -> None:
    """Give a run its counts, name the sets, and note what does not agree with verl's own metrics."""
    named = logged_accuracies(run)
    unnamed = False
    for step, dump in sorted(dumps.items()):
        for name, counts in dump.sets.items():
            if not name and len(named) != 1:
                unnamed = True
            elif not run.metric or not name or name in named:  # else of an accuracy that was not asked for
                run.validations.setdefault(step, {})[name or next(iter(named))] = counts.validation()
        run.notes += dump.notes
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
    accuracy = None if logged is None else value_at(run, logged.values, step)
    if accuracy is None:
        return ""
    # Over responses, a prompt that is in the set twice counts twice, as verl does; over problems, a problem whose
    # responses are not all there still counts once.
    measured = float(validation.correct.sum() / validation.n.sum())
    if min(abs(measured - accuracy), abs(float((validation.correct / validation.n).mean()) - accuracy)) <= 1e-5:
        return ""
    return f"validation/{step}.jsonl: its accuracy is {measured:.4f}, verl logged {accuracy:.4f} at that step: not used"
