"""Validation dumps of verl (STEP.jsonl): counts of correct responses of each problem, kept from one report to the next.

A dump whose accuracy is not what verl logged at its step is not used: verl's number stands, without an interval.

Not covered: dumps of several validation sets whose reward does not write a `validation_set` field.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from vlnorm_verl.files import write
from vlnorm_verl.report.run import Run, Validation, logged_accuracies, value_at
from vlnorm_verl.runs.records import VALIDATION_METRIC, has_unread, read_lines

CACHE_FILE = ".validation-counts-6.msgpack"  # another number for another format


# The V1 trainer's uid is <UUID of the prompt>_<session>_<output>. Every output of an agent's session has the session's
# score, and verl counts it once (trainer/ppo/v1/trainer_base.py:1087).
_LATER_OUTPUT = re.compile(r"[0-9a-f-]{36}_\d+_[1-9]\d*")


class _Response(msgspec.Struct):
    """The fields of a dump's line that are counted; the prompt is only hashed."""

    input: msgspec.Raw
    score: Any = None
    gts: msgspec.Raw = msgspec.Raw(b"null")
    acc: Any = None
    validation_set: Any = None
    uid: Any = None


def _number(value: Any) -> float | None:
    """A score; verl's V0 trainer writes NumPy's numbers as text: "True", "1.0"."""
    if isinstance(value, str):
        value = {"True": 1.0, "False": 0.0}.get(value, value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if np.isfinite(number) else None


def is_later_output(uid: Any) -> bool:
    """Whether a line of a dump is not the first output of its session."""
    return isinstance(uid, str) and bool(_LATER_OUTPUT.fullmatch(uid))


def scored(response: Any) -> float | None:
    """What a response of a dump is worth: `acc` where the reward gives it, else `score`."""
    return _number(response.score if response.acc is None else response.acc)


class Dump(msgspec.Struct):
    size: int
    mtime: int
    sets: dict[str, Validation]  # by validation set, "" if the dump does not say
    notes: list[str]


def read_dumps(files: Iterable[Path], cache: Path | None) -> dict[Path, Dump]:
    """The counts of dumps; those that the file `cache` has of the same size and time of change are not read again."""
    known: dict[str, Dump] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):  # msgspec's and Unicode's errors are ValueErrors
        content = cache.read_bytes() if cache else b""
        known = msgspec.msgpack.decode(content, type=dict[str, Dump], dec_hook=lambda _, numbers: np.array(numbers))
    # A name that is not UTF-8 could not be kept as it is.
    names = {file: str(file.resolve()).encode(errors="backslashreplace").decode() for file in files}
    # Before reading: a dump that grows meanwhile is read again the next time.
    stats = {file: ((stat := file.stat()).st_size, stat.st_mtime_ns) for file in names}
    new = [
        file
        for file, name in names.items()
        if name not in known or (known[name].size, known[name].mtime) != stats[file]
    ]
    for file in tqdm(new, desc="reading validation dumps", delay=1, mininterval=1, leave=False):
        notes: list[str] = []
        known[names[file]] = Dump(*stats[file], count(file, notes), notes)
    if cache and new:
        whole = {name: dump for name, dump in known.items() if not has_unread(dump.notes)}
        write(cache, msgspec.msgpack.encode(whole, enc_hook=np.ndarray.tolist))
    return {file: known[name] for file, name in names.items()}


_RESPONSE = msgspec.json.Decoder(_Response)


def count(path: Path, notes: list[str]) -> dict[str, Validation]:
    """{validation set, "" if the dump does not say: its counts}.

    Problems are in the order of their identity.
    """
    scores: dict[str, dict[str, list[float]]] = {}  # of each problem's responses, by validation set
    unscored = 0
    for response in read_lines(path, _RESPONSE, notes):
        if is_later_output(response.uid):
            continue
        score = scored(response)
        if score is None:
            unscored += 1
            continue
        name = str(response.validation_set or "")
        problem = hashlib.blake2b(bytes(response.input) + b"\0" + bytes(response.gts), digest_size=8).hexdigest()
        scores.setdefault(name, {}).setdefault(problem, []).append(score)
    if unscored:
        notes.append(f"{path.name}: {unscored} responses without a score, left out")
    found = {}
    for name, by_problem in scores.items():
        problems = sorted(by_problem)
        correct = np.array([sum(by_problem[problem]) for problem in problems])
        binary = all(score in (0, 1) for of_problem in by_problem.values() for score in of_problem)
        n = np.array([len(by_problem[problem]) for problem in problems])
        found[name] = Validation(problems, n, correct.astype(np.int64) if binary else correct, binary)
    return found


def attach_validations(run: Run, dumps: dict[int, Dump]) -> None:
    """Give a run its counts, name the sets, and note what does not agree with verl's own metrics."""
    named = logged_accuracies(run)
    of_several = len({match["set"] for key in run.metrics if (match := VALIDATION_METRIC.fullmatch(key))}) > 1
    for step, dump in sorted(dumps.items()):
        for said, validation in dump.sets.items():
            # A name that verl logged no set by is none: the reward took another than the row's data_source.
            name = said if run.metric or not named or said in named else ""
            if not name and (of_several or len(named) != 1 or len(dump.sets) > 1):
                run.unnamed = True
            elif not run.metric or not name or name in named:  # else of an accuracy that was not asked for
                run.validations.setdefault(step, {})[name or next(iter(named))] = validation
        run.notes += dump.notes
    if run.unnamed:
        run.notes.append(
            "validation dumps do not say which validation set a response is of: no intervals (a reward that returns "
            "the row's data_source as validation_set tells it)"
        )
    for step, sets in run.validations.items():
        run.notes += [note for validation in sets.values() for note in _uneven(step, validation)]
        for name in list(sets):
            if (failed := _failed_sessions(run, step, name, sets[name])) is not None:
                sets[name] = dataclasses.replace(sets[name], n=sets[name].n + failed)
                run.notes.append(
                    f"validation/{step}.jsonl: {failed.sum()} responses that are not there count as wrong, as in verl"
                )
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


def _failed_sessions(run: Run, step: int, name: str, validation: Validation) -> np.ndarray | None:
    """[P] responses of each problem that verl counted as wrong, without a line in the dump: sessions that failed.

    None if that is not what makes the dump's accuracy another than verl's (trainer/ppo/metric_utils.py:955, V1).
    """
    logged = logged_accuracies(run).get(name)
    if logged is None or logged.variable != "acc" or not _not_used(run, step, name, validation):
        return None
    failed = np.maximum(logged.n - validation.n, 0)
    filled = dataclasses.replace(validation, n=validation.n + failed)
    return None if _not_used(run, step, name, filled) else failed


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
