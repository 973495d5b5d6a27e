"""What has changed since it was read last: for a report that is asked for again, and for `--watch`.

A file is taken as unchanged while its size and its time of change are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlnorm_verl.report.find import Source
from vlnorm_verl.report.identity import CONFIGS, LAST_START
from vlnorm_verl.runs.records import has_unread

T = TypeVar("T")
Stamp = tuple[tuple[str, int, int, bool], ...]


def stamp(files: Iterable[Path]) -> Stamp:
    """(path, size, time of change, whether it may be read) of each file that is there."""
    stats = [(str(file), file.stat()) for file in files if os.path.isfile(file)]
    return tuple((name, stat.st_size, stat.st_mtime_ns, os.access(name, os.R_OK)) for name, stat in stats)


class Memo:
    """What was made of files, as long as these do not change; of each set of files the last only.

    inputs: fingerprint of what the last report was made of.
    """

    def __init__(self) -> None:
        self.inputs = ""
        self._known: dict[str, tuple[Stamp, Any, list[str]]] = {}  # by the first file: a run gets more of them

    def of(self, files: Sequence[Path], notes: list[str], make: Callable[[list[str]], T]) -> T:
        """make(notes), whose notes are remembered with what it returns."""
        first, now = str(files[0]), stamp(files)  # before reading: a file that grows meanwhile is read again
        known = self._known.get(first)
        if known is None or known[0] != now:
            own: list[str] = []
            known = (now, make(own), own)
            if not has_unread(own):
                self._known[first] = known
        notes += known[2]
        return known[1]


def fingerprint(sources: Sequence[Source], options: object, dumps: Iterable[str]) -> str:
    """Of all that a report is made of: logs, configurations, dumps, what was asked for, and this package.

    dumps: folders of dumps that are not in the runs' own.
    """
    folders = dict.fromkeys([*(source.folder / "validation" for source in sources), *map(Path, dumps)])
    files = [file for source in sources for file in source.files]
    files += [source.folder / name for source in sources for name in (*CONFIGS, LAST_START)]
    files += [file for folder in folders if os.path.isdir(folder) for file in sorted(folder.glob("*.jsonl"))]
    package = Path(__file__).parents[1]
    files += sorted([*package.glob("*.py"), *package.glob("report/*.*"), *package.glob("runs/*.py")])
    said = repr((options, [source.folder for source in sources], stamp(files)))
    return hashlib.blake2b(said.encode(errors="replace"), digest_size=16).hexdigest()
