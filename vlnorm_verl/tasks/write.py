"""The row schema, and a folder of parquet files that is written once and whole, with a manifest.

Covered: every file appears complete or not at all; the manifest comes last and has each file's checksum; a second
call with the same request only verifies; a call with another request, or on files that changed, is refused with what
differs; two calls at once, one of which is refused. Not covered: all files appearing in the same instant. A process
killed between two renames leaves complete files and no manifest, and the next call says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlnorm_verl.files import UserError
from vlnorm_verl.tasks.sources import content_sha256

MANIFEST = "manifest.json"
FORMAT = 1  # of rows and manifest; raise it when either changes, and old folders are rebuilt by --force

Rows = list[dict[str, Any]]


def row(
    source: str, prompt: str, ground_truth: str, split: str, index: int, origin: str, solution: str = ""
) -> dict[str, Any]:
    """One row as verl's RLHFDataset reads it.

    ``origin`` is github, hub, file or generated; ``solution`` is empty where the source has none.
    """
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, "origin": origin, "solution": solution},
    }


def countdown_ground_truth(numbers: list[int], target: int) -> str:
    """A JSON string: lists inside parquet structs come back as arrays, which rewards then have to guess about."""
    return json.dumps({"numbers": numbers, "target": target})


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another vlnorm-verl data command is writing to {out}: wait for it, or change --out") from None
    try:
        yield
    finally:
        lock.release()


def publish(
    out: Path,
    names: list[str],
    request: Mapping[str, Any],
    build: Callable[[], tuple[dict[str, Rows], dict[str, Any]]],
    force: bool,
) -> tuple[dict[str, Any], bool]:
    """Makes ``out`` hold the request's files; returns the manifest and whether anything was built.

    ``names`` are the file names; ``request`` is all that decides their content, as plain JSON values; ``build``
    returns the rows of each file and a record of their sources. It is called only if something has to be written.

    Raises:
        UserError: ``out`` holds something else and ``force`` is off, or cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            # What the manifest's JSON gives back is what the next call compares with: tuples would differ from lists.
            asked: dict[str, Any] = json.loads(json.dumps(dict(request) | {"format": FORMAT}))
            if not force:
                manifest = _existing(out, names, asked)
                if manifest is not None:
                    return manifest, False
            tables, sources = build()
            return _write(out, tables, sources, asked), True
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error}): change --out") from error


def _existing(out: Path, names: list[str], request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest if ``out`` holds the request's files unchanged; None if it holds none of them."""
    path = out / MANIFEST
    if not path.exists():
        present = [name for name in names if (out / name).exists()]
        if present:
            raise UserError(
                f"{out} has {', '.join(present)} but no {MANIFEST}: not made by this command, or by a run that was "
                "killed at its very end. --force overwrites, or change --out"
            )
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        recorded, files = dict(manifest["request"]), dict(manifest["files"])
        checksums = {name: files[name]["sha256"] for name in names if name in files}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a manifest of this command: --force overwrites, or change --out") from None
    differing = [
        f"{key} ({_shown(recorded, key)} there, {_shown(request, key)} asked for)"
        for key in sorted(recorded.keys() | request.keys())
        if recorded.get(key) != request.get(key)
    ]
    if differing:
        raise UserError(f"{out} holds another data set: {'; '.join(differing)}. --force overwrites, or change --out")
    for name in names:
        if not (out / name).exists():
            raise UserError(f"{out / name} is gone, though {MANIFEST} lists it: --force makes the files again")
        if content_sha256(out / name) != checksums.get(name):
            raise UserError(f"{out / name} has not the checksum of {MANIFEST}: --force makes the files again")
    return manifest


def _shown(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key])[:200] if key in values else "nothing"


def _write(out: Path, tables: dict[str, Rows], sources: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    staged: list[tuple[Path, Path]] = []
    try:
        for name, rows in tables.items():
            temporary = out / f".{name}.tmp"  # a fixed name: what a killed run left is overwritten, never collected
            staged.append((temporary, out / name))
            _write_parquet(rows, temporary)
            files[name] = {
                "rows": len(rows),
                "bytes": temporary.stat().st_size,
                "sha256": content_sha256(temporary),
                "content_sha256": _rows_sha256(rows),
            }
        manifest = {
            "request": request,
            "sources": sources,
            "files": files,
            "made_by": {name: version(name) for name in ("vlnorm-verl", "datasets", "huggingface_hub", "pyarrow")},
            "command": ["vlnorm-verl", *sys.argv[1:]],
        }
        temporary = out / f".{MANIFEST}.tmp"
        staged.append((temporary, out / MANIFEST))
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        # The old manifest goes first: it must never stand beside new files.
        (out / MANIFEST).unlink(missing_ok=True)
        for temporary, path in staged:
            os.replace(temporary, path)
        _fsync_directory(out)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
    return manifest


def _write_parquet(rows: Rows, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.string()
    schema = pa.schema(
        {
            "data_source": text,
            "prompt": pa.list_(pa.struct({"role": text, "content": text})),
            "ability": text,
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct({"split": text, "index": pa.int64(), "origin": text, "solution": text}),
        }
    )
    with path.open("wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
        file.flush()
        os.fsync(file.fileno())  # a rename can reach the disk before the data does


def _rows_sha256(rows: Rows) -> str:
    """Of the rows themselves: equal for equal data, whatever pyarrow's version makes of the file."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
