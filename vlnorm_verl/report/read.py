"""Reads runs of verl from what verl itself wrote: metrics, configuration and validation dumps.

find.py finds the logs, records.py and trackers.py read them, identity.py says what a run is, dumps.py counts validation
responses. Here they become runs.

A run that was resumed is one run: starts in one log are joined by records.py, and so are several logs of one wandb run,
or of one method and seed in one setting where the later one does not begin at the beginning.

A configuration and dumps are those of all runs whose metrics are in one folder (metrics-NNN.jsonl are starts of one
run). verl's file logger puts all experiments of a project into one folder: several *.jsonl there have neither.

Covered: a cut last line, corrupt lines, missing metrics, runs that are being written. Not covered: runs on a tracking
server.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vlnorm_verl.files import UserError
from vlnorm_verl.report.changes import Memo
from vlnorm_verl.report.configs import differing_keys
from vlnorm_verl.report.dumps import CACHE_FILE, attach_validations, read_dumps
from vlnorm_verl.report.find import ACCEPTED, Source
from vlnorm_verl.report.identity import UNKNOWN_SEED, Identity, Setting, identify, settle
from vlnorm_verl.report.measures import same_sets, validated_steps, validation_sets
from vlnorm_verl.report.names import shortest
from vlnorm_verl.report.run import Run, logged_accuracies
from vlnorm_verl.report.trackers import read_tensorboard, read_wandb
from vlnorm_verl.runs.records import NOTED, RECORD, VALIDATION_METRIC, Start, columns, join, read_lines, read_starts

# Keys that may change when a run goes on.
OF_A_START = re.compile(r"trainer\..*|.*\boptim\.total_training_steps")


@dataclass(eq=False)
class _Log:
    """A source as far as it must be read to know what it is.

    starts: of verl's file logger only its files, so that one run's records at a time are in memory.
    first: its first step. began: seconds, where the log says it. run: wandb's. later: logs that go on from it.
    """

    source: Source
    identity: Identity
    starts: list[Start | Path]
    first: int
    notes: list[str] = field(default_factory=list)
    began: float | None = None
    run: str = ""
    later: list[_Log] = field(default_factory=list)

    @property
    def key(self) -> tuple[Any, ...]:
        """What logs of one run have in common, besides wandb's name of the run and the configuration."""
        identity = self.identity
        return identity.setting, identity.method_key, identity.seed, () if self.configured else identity.rest

    @property
    def configured(self) -> bool:
        """Whether it is wandb's with a configuration, which tells runs apart whatever they are called."""
        return self.source.kind == "wandb" and bool(self.identity.config)


def read_runs(
    sources: Sequence[Source], cache_folder: Path | None = None, metric: str = "", memo: Memo | None = None
) -> list[Run]:
    """All runs of what `find` has found. One without metrics and dumps, or that is a copy, is `left_out`.

    cache_folder: counts of validation dumps are kept here and read again only where a dump has changed.
    metric: what the accuracy is, instead of verl's mean@n of the validation sets.
    memo: of an earlier call; logs that have not changed since are not read again.

    Raises:
        UserError: no run has the metric.
    """
    memo = memo or Memo()
    logs = _joined([_read(source, memo) for source in sources])
    settle([log.identity for log in logs], [bool(log.source.label) for log in logs])
    runs = [_run(log, name, metric, memo) for log, name in zip(logs, _names(logs), strict=True)]
    _leave_out_copies(runs, logs)
    if metric and not any(metric in run.metrics for run in runs):
        raise UserError(f"--metric {metric}: no run logs it; they log for instance {nearest(metric, runs)}")
    for run, log in zip(runs, logs, strict=True):
        run.dumps = _dumps(run, log)
    files = [file for run in runs for file in run.dumps.values()]
    counted = read_dumps(files, cache_folder / CACHE_FILE if cache_folder else None)
    for run, log in zip(runs, logs, strict=True):
        attach_validations(run, {step: counted[file] for step, file in run.dumps.items()})
        _note_missing(run, log)
    _tell_tasks_apart(runs)
    _number_seeds(runs)
    return runs


def nearest(metric: str, runs: Sequence[Run]) -> str:
    """Names of metrics that these runs have, for a message on one that they have not."""
    known = {key for run in runs for key in run.metrics}
    return ", ".join(difflib.get_close_matches(metric, known, n=3, cutoff=0.4) or sorted(known)[:3]) or "nothing"


def _read(source: Source, memo: Memo) -> _Log:
    notes: list[str] = []
    if source.kind == "wandb":
        wandb = memo.of(source.files, notes, lambda notes: read_wandb(source.files[0], notes))
        identity = identify(source, wandb.config, wandb.name)
        return _Log(source, identity, [*wandb.starts], _first(wandb.starts), notes, wandb.began, wandb.run)
    if source.kind == "tensorboard":
        starts = memo.of(source.files, notes, lambda notes: read_tensorboard(source.files, notes))
        return _Log(source, identify(source), [*starts], _first(starts), notes)
    first = next((record.step for file in source.files for record in read_lines(file, RECORD, [])), 0)
    return _Log(source, identify(source), [*source.files], first)


def _first(starts: Sequence[Start]) -> int:
    return next((min(start.records) for start in starts if start.records), 0)


def _joined(logs: Sequence[_Log]) -> list[_Log]:
    """One log for each run, in the order of their first ones. Logs that do not say when they began: by first step."""
    runs: list[_Log] = []
    for log in sorted(logs, key=lambda log: (log.began is not None, log.first if log.began is None else log.began)):
        earlier = next((run for run in reversed(runs) if _goes_on(log, run)), None)
        if earlier is None:
            runs.append(log)
            continue
        earlier.starts += log.starts
        earlier.later.append(log)
        earlier.notes += [f"goes on in {log.source.folder} (from step {log.first})", *log.notes]
    return sorted(runs, key=logs.index)


def _goes_on(log: _Log, run: _Log) -> bool:
    """Whether a log is of a run that an earlier log is of: by wandb's word, or since it starts in the middle of it."""
    if log.run and log.run == run.run:
        return True
    known = log.identity.seed != UNKNOWN_SEED or log.configured or bool(log.identity.rest)
    return known and log.key == run.key and log.first > max(1, run.first) and _configured_alike(log, run)


def _configured_alike(log: _Log, run: _Log) -> bool:
    """Where each has a label of its own, that decides."""
    if all(one.source.label and one.source.alone for one in (log, run)):
        return True
    return all(map(OF_A_START.fullmatch, differing_keys([log.identity, run.identity])))


def _names(logs: Sequence[_Log]) -> list[str]:
    """What each run is called: its label, or as much of its path as tells it from the others."""
    names, labels = [], [(log.source.label, log.source.seed) for log in logs]
    paths = [log.identity.names for log in logs]
    # Of Hydra's multirun only the number of the job tells them apart, which else says nothing.
    paths = [path if paths.count(path) == 1 else log.source.names for log, path in zip(logs, paths, strict=True)]
    for log, path in zip(logs, shortest(paths), strict=True):
        label, seed = log.source.label, log.source.seed
        if not label:
            names.append(path)
        elif not log.source.alone or labels.count((label, seed)) > 1:
            names.append(f"{label}/{path}")
        else:
            names.append(label if seed is None else f"{label}@{seed}")
    return names


def _run(log: _Log, name: str, metric: str, memo: Memo) -> Run:
    """A run without its validations."""
    notes = [*log.identity.notes, *log.notes]

    def read(notes: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, int]]:
        starts = ([start] if isinstance(start, Start) else read_starts([start], notes) for start in log.starts)
        return columns(join(chain.from_iterable(starts), notes))

    files = [start for start in log.starts if isinstance(start, Path)]
    # What a tracker has logged is in memory already.
    steps, metrics, ended = memo.of(files, notes, read) if len(files) == len(log.starts) > 0 else read(notes)
    # What was never a number is not worth a word, except for an accuracy.
    ended = {k: s for k, s in ended.items() if k in metrics or k == metric or VALIDATION_METRIC.fullmatch(k)}
    run = Run(
        **{**vars(log.identity), "notes": notes},
        folder=log.source.folder,
        name=name,
        steps=steps,
        metrics=metrics,
        metric=metric,
        ended=ended,
    )
    if (late := run.late_start) is not None:
        run.notes.append(f"its log begins at step {late}: what was before is not known")
    distances = np.diff(steps)
    for at in np.flatnonzero(distances > 2 * np.median(distances))[:NOTED] if len(distances) else ():
        run.notes.append(f"no records of steps {steps[at] + 1} to {steps[at + 1] - 1}")
    for step in sorted(set(run.ended.values())):
        names = [key for key, since in run.ended.items() if since == step]
        more = f" and {len(names) - NOTED} more" if len(names) > NOTED else ""
        run.notes.append(f"not a finite number from step {step} on: {', '.join(names[:NOTED])}{more}")
    return run


def _leave_out_copies(runs: Sequence[Run], logs: Sequence[_Log]) -> None:
    """verl logs to several loggers at once: of the same values by two of them, those with a configuration are kept."""
    kept: list[tuple[Run, _Log]] = []
    for run, log in sorted(zip(runs, logs, strict=True), key=lambda pair: (pair[0].named, -len(pair[0].steps))):
        copied = [other for other, its in kept if its.source.kind != log.source.kind and _same_values(run, other)]
        if copied:
            run.left_out, run.copy = f"the same values as {copied[0].name}, by another logger", True
            begins = f"at step {run.steps[0]}, before that one: to read this one, give label@seed=PATH of it alone"
            earlier = f", though it begins {begins}" if run.steps[0] < copied[0].steps[0] else ""
            run.notes.append(f"{run.left_out}: left out{earlier}")
            run.steps, run.metrics, run.ended = run.steps[:0], {}, {}
        kept.append((run, log))


def _same_values(run: Run, other: Run) -> bool:
    """Of all metrics that both have, at all steps that both have, as far as tensorboard's float32 tells them apart."""
    _, of_run, of_other = np.intersect1d(run.steps, other.steps, return_indices=True)
    pairs = [(run.metrics[key][of_run], other.metrics[key][of_other]) for key in run.metrics.keys() & other.metrics]
    same = (np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True) for a, b in pairs)
    return len(of_run) > 0 and bool(pairs) and all(same)


def _dumps(run: Run, log: _Log) -> dict[int, Path]:
    """{step: dump} up to the run's last record, beyond which a dump is of a start that was given up or not logged.

    Of two logs that have a dump of one step, the later one's.
    """
    if run.left_out or not run.method:
        return {}
    files: dict[int, Path] = {}
    for part in (part for part in (log, *log.later) if not part.source.shared):
        folder = part.source.folder / "validation"
        if not os.path.isdir(folder) and part.identity.validation_folder:
            folder = Path(part.identity.validation_folder)
        found = folder.glob("*.jsonl") if os.path.isdir(folder) else ()
        files |= {int(file.stem): file for file in found if file.stem.isdecimal() and file.is_file()}
    last = int(run.steps[-1]) if len(run.steps) else max(files, default=0)
    if beyond := sorted(step for step in files if step > last):
        run.notes.append(f"validation dumps of steps {', '.join(map(str, beyond))}, after its last record, left out")
    return {step: file for step, file in files.items() if step <= last}


def _tell_tasks_apart(runs: Sequence[Run]) -> None:
    """Runs of which no setting is known have one task only if they were validated on the same sets."""
    unknown = [run for run in runs if not any(run.setting) and validation_sets([run])]
    for run in unknown if not same_sets(unknown) else ():
        run.setting = Setting(task=", ".join(validation_sets([run])))
        run.notes.append("its setting is not known: its validation sets are taken as its task")


def _number_seeds(runs: Sequence[Run]) -> None:
    """Runs that do not say their seed are the first seeds of their method that are free, in the order given."""
    taken: dict[Any, set[int]] = {}
    for run in runs:
        taken.setdefault((run.setting, run.method_key), set()).add(run.seed)
    for run in runs:
        if run.seed == UNKNOWN_SEED and not run.left_out:
            seeds = taken[run.setting, run.method_key]
            run.seed, run.numbered = next(seed for seed in range(len(seeds) + 1) if seed not in seeds), True
            seeds.add(run.seed)
            run.notes.append(f"its seed is not known: counted as seed {run.seed}")


def _note_missing(run: Run, log: _Log) -> None:
    if run.left_out:
        return
    if not len(run.steps):
        empty = "no metrics yet" if any(run.setting) else f"no run there; accepted: {ACCEPTED}"
        empty = f"cannot be read ({log.source.unread})" if log.source.unread else empty
        run.notes.append(empty if log.source.kind == "empty" else "no step in its metrics")
        run.left_out = "" if run.validations else run.notes[-1]
        return
    run.notes += _other_counts(run)
    validated = validated_steps(run)
    if not validated:
        others = [key for key in run.metrics if key.startswith(("val", "test", "eval", "critic/score/mean"))][:NOTED]
        hint = f" ({', '.join(others)}: --metric takes any)" if others and not run.metric else ""
        run.notes.append(f"no {run.metric or 'validation'}{hint}")
    elif not run.dumps:
        run.notes.append("no validation dumps: no intervals over problems")
    elif missing := [step for step in validated if step not in run.dumps]:
        run.notes.append(f"no validation dump of steps {', '.join(map(str, missing))}")


def _other_counts(run: Run) -> list[str]:
    """verl's mean@n is another metric where the number of responses changes on the way; one of them is the accuracy."""
    accuracies, notes = logged_accuracies(run), []
    for key, values in run.metrics.items():
        match = VALIDATION_METRIC.fullmatch(key)
        used = accuracies.get(match["set"]) if match else None
        if match is None or used is None or used.variable != match["variable"]:
            continue
        if steps := run.steps[np.isfinite(values) & ~np.isfinite(used.values)].tolist():
            where = (
                f"{len(steps)} validations (steps {steps[0]} to {steps[-1]})" if len(steps) > 1 else f"step {steps[0]}"
            )
            notes.append(f"{key} at {where} is not in its accuracy, which is mean@{used.n}: --metric takes either")
    return notes
