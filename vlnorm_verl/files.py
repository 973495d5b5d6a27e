"""Files that appear whole or not at all, folders that belong to one request, and the error of a wrong request."""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any


class UserError(ValueError):
    """What was asked for cannot be done. The command line prints the message alone and exits with 2."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block ends well, and is removed if not.

    What is written is on the disk before the name changes: a rename can get there first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole. A lone surrogate (a file name that is not UTF-8) becomes "?"."""
    with whole(path) as temporary:
        temporary.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What two settings differ in, as `key: 1 there, 2 asked for`; compared as JSON would read them again."""
    before, now = (json.loads(json.dumps(settings, default=str)) for settings in (there, asked))
    return [
        f"{key}: {_shown(before, key)} there, {_shown(now, key)} asked for"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def is_path(model: str) -> bool:
    """Whether a model is named by a path; a name on the hub is "owner/name" or "name"."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def require(what: str, chosen: str, accepted: Iterable[str]) -> None:
    """Raises UserError, with the nearest accepted name, if something else is chosen."""
    if chosen not in (accepted := list(accepted)):
        close = difflib.get_close_matches(str(chosen), accepted, 1)  # a value may be a number
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{what} is not accepted.{hint} Accepted: {', '.join(accepted)}")


def _shown(settings: Mapping[str, Any], key: str) -> str:
    text = json.dumps(settings[key], ensure_ascii=False) if key in settings else "nothing"
    return text if len(text) <= 120 else f"{text[:117]}..."


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Hold a folder. A child process that is given the file's descriptor holds it too, until the last of them ends.

    Raises:
        BlockingIOError: another process holds it.
        UserError: its disk has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Neither emptied nor a link followed: whoever may write into the folder could have any file of ours emptied.
    with open(os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            raise UserError(
                f"{folder}: its disk has no file locks ({error.strerror}), which keep two runs out of one folder. "
                "Take a folder on another disk, or have this one mounted with flock (Lustre: -o flock)"
            ) from None
        yield file
