"""What the data of every task have in common: verl's row schema, and a folder that is written once and whole.

Covered: every file appears complete or not at all; the manifest comes last and has each file's checksum; a second
call with the same request only verifies; a call with another request, or on files that changed, is refused with what
differs; two calls at once, one of which is refused. Not covered: all files appearing in the same instant. A process
killed between two renames leaves complete files and no manifest, and the next call says so.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

from vlnorm_verl.files import UserError, differences, locked, whole

MANIFEST = "manifest.json"
FORMAT = 1  # of rows and manifest; raise it when either changes, and old folders are rebuilt by --force

Row = dict[str, Any]
Split = Literal["train", "test"]
Item = TypeVar("Item")

_EXHAUSTED_AFTER = 20_000  # so many draws in a row without anything new: there is no more


def row(source: str, prompt: str, ground_truth: str, split: str, index: int, origin: str, solution: str = "") -> Row:
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


def write_parquet(rows: list[Row], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def hash_picks(text: str, one_in: int) -> bool:
    """Whether a text is one in so many, by its hash: so held-out problems depend on neither seed nor size."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % one_in == 0


def distinct(
    drawn: Iterable[Item | None],
    count: int,
    key: Callable[[Item], Hashable],
    remedy: str,
    seen: set[Hashable] | None = None,
) -> Iterator[Item]:
    """The first ``count`` items that differ in ``key`` from each other and from ``seen``; None is a failed draw.

    Raises:
        UserError: there are not so many; ``remedy`` says what to ask for instead.
    """
    seen = set() if seen is None else seen
    taken = failed = 0
    for item in drawn:
        if taken == count:
            return
        if item is None or key(item) in seen:
            failed += 1
            if failed == _EXHAUSTED_AFTER:
                raise UserError(f"there are fewer than {count} different problems ({taken} found): {remedy}")
            continue
        failed = 0
        taken += 1
        seen.add(key(item))
        yield item


def content_sha256(path: Path) -> str:
    """Of a file, or of a folder's files with their names."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file_path.relative_to(path).as_posix()} {content_sha256(file_path)}\n".encode())
    return digest.hexdigest()


def publish(
    out: Path,
    names: list[str],
    request: Mapping[str, Any],
    build: Callable[[], tuple[dict[str, list[Row]], dict[str, Any]]],
    force: bool,
) -> tuple[dict[str, Any], bool]:
    """Makes ``out`` hold the request's files; returns the manifest and whether anything was built.

    ``names`` are the file names; ``request`` is all that decides their content, as plain JSON values; ``build``
    returns the rows of each file and a record of their sources. It is called only if something has to be written.

    Raises:
        UserError: ``out`` holds something else and ``force`` is off, or cannot be written.
    """
    request = {**request, "format": FORMAT}
    try:
        with locked(out):
            manifest = None if force else _existing(out, names, request)
            if manifest is not None:
                return manifest, False
            tables, sources = build()
            return _write(out, tables, sources, request), True
    except BlockingIOError:
        raise UserError(f"another vlnorm-verl data command is writing to {out}: wait for it, or change --out") from None
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error}): change --out") from error


def _existing(out: Path, names: list[str], request: Mapping[str, Any]) -> dict[str, Any] | None:
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
    if differing := differences(recorded, request):
        raise UserError(f"{out} holds another data set: {'; '.join(differing)}. --force overwrites, or change --out")
    for name in names:
        if not (out / name).exists():
            raise UserError(f"{out / name} is gone, though {MANIFEST} lists it: --force makes the files again")
        if content_sha256(out / name) != checksums.get(name):
            raise UserError(f"{out / name} has not the checksum of {MANIFEST}: --force makes the files again")
    return manifest


def _write(
    out: Path, tables: dict[str, list[Row]], sources: dict[str, Any], request: Mapping[str, Any]
) -> dict[str, Any]:
    for name in (MANIFEST, *tables):
        for killed in out.glob(f".{name}.*.tmp"):  # of a run that was killed
            killed.unlink()
    files: dict[str, Any] = {}
    manifest = {
        "request": request,
        "sources": sources,
        "files": files,
        "made_by": {name: version(name) for name in ("vlnorm-verl", "datasets", "huggingface_hub", "pyarrow")},
        "command": ["vlnorm-verl", *sys.argv[1:]],
    }
    with ExitStack() as stack:
        # Entered first, so renamed last: a manifest stands only beside the files that it lists.
        manifest_file = stack.enter_context(whole(out / MANIFEST))
        for name, rows in tables.items():
            file = stack.enter_context(whole(out / name))
            write_parquet(rows, file)
            files[name] = {"rows": len(rows), "bytes": file.stat().st_size, "sha256": content_sha256(file)}
        manifest_file.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (out / MANIFEST).unlink(missing_ok=True)
    return manifest
