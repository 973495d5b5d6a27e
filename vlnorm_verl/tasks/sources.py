"""Where each set comes from, and how it is read. The tables below are the one place to correct.

Covered: single files of GitHub repositories at a fixed commit, checked by their git object id; Hugging Face
repositories at a fixed commit; local ``.json``, ``.jsonl``, ``.parquet``, ``.arrow`` files and folders of
``datasets.save_to_disk``. Not covered: gated repositories, other formats. What a row holds is read by `tasks.countdown`
and `tasks.math`.

``PAPER`` has the files that the authors' ``open_reasoner_zero_nochat.py`` reads: Open-Reasoner-Zero's for training,
MATH500 and AIME2024, understand-r1-zero's for AMC and Minerva. The texts matter: AIME2024 is worded differently from
collection to collection (6 of 30 agree between these two). The authors name no commits; these are the last ones, of
June and August 2025. All but the training file were read here: 500, 30, 83 and 272 rows.

The Hugging Face repositories of the other tables were never reached from the machine that this was written on: names,
splits, columns and counts are taken from public code and pages that use them. ``--repo``, ``--revision``, ``--file``
and ``--from`` override everything.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import tempfile
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlnorm_verl.files import UserError
from vlnorm_verl.tasks.base import content_sha256

# The way out of every message about the network.
OFFLINE = {
    task: f"Without a network: vlnorm-verl data {task} --offline (generated problems), or --from {copies}"
    for task, copies in {"countdown": "FILE (a copy)", "math": "DIR / --file NAME=PATH (copies)"}.items()
}


@dataclass(frozen=True)
class DataSet:
    """One set, and a Hugging Face repository of it. ``rows`` is the least and the greatest accepted row count."""

    repo: str
    rows: tuple[int, int]
    split: str = "train"
    file: str | None = None  # read this one JSON file: rows that are lists do not fit datasets' table format
    local_names: tuple[str, ...] = ()  # further file names that --from accepts, as the set's home publishes it


COUNTDOWN = DataSet("Jiayi-Pan/Countdown-Tasks-3to4", rows=(0, 10**9))  # checked against the rows asked for

# Each set's row count and other names, and a set of this name on the hub, worded in its own way, for --repo.
MATH: dict[str, DataSet] = {
    "train": DataSet(
        "Open-Reasoner-Zero/orz_math_57k_collection",
        # "57k" is all that the sources say; the exact number goes into the manifest.
        rows=(56_000, 58_000),
        file="orz_math_57k_collection.json",
        local_names=("orz_math_57k_collected.json", "orz_math_57k_collection.json"),
    ),
    "math500": DataSet("HuggingFaceH4/MATH-500", rows=(500, 500), split="test"),
    "aime2024": DataSet("HuggingFaceH4/aime_2024", rows=(30, 30)),
    "amc": DataSet("AI-MO/aimo-validation-amc", rows=(83, 83)),
    "minerva": DataSet("math-ai/minervamath", rows=(272, 272), split="test"),
}


def data_source(name: str) -> str:
    return "open_reasoner_zero" if name == "train" else name


@dataclass(frozen=True)
class LocalFile:
    """A file, or a ``datasets.save_to_disk`` folder."""

    path: Path

    @property
    def where(self) -> str:
        return str(self.path)

    def request(self) -> dict[str, Any]:
        """By content, not by path: a moved copy is the same data, a changed one is not."""
        try:
            return {"kind": "file", "sha256": content_sha256(self.path)}
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error

    def read(self) -> tuple[list[Any], dict[str, Any]]:
        return read_local(self.path), {"path": str(self.path)}


@dataclass(frozen=True)
class GitFile:
    """A Math set's file on GitHub, and the git object id of its content (`git ls-tree COMMIT PATH`)."""

    name: str
    repo: str
    commit: str
    path: str
    blob: str

    @property
    def where(self) -> str:
        return self.repo

    def request(self) -> dict[str, Any]:
        return {"kind": "github", "repo": self.repo, "commit": self.commit, "path": self.path, "blob": self.blob}

    def read(self) -> tuple[list[Any], dict[str, Any]]:
        url = f"{GITHUB}/{self.repo}/{self.commit}/{self.path}"
        other_ways = f"Without GitHub: --repo {self.name}={MATH[self.name].repo} (the hub's wording). {OFFLINE['math']}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
            raise UserError(f"cannot reach {url} ({_first_line(error)}). {other_ways}") from error
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if blob != self.blob:
            raise UserError(
                f"{url} gave other content (git object {blob}) than its commit has ({self.blob}). {other_ways}"
            )
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / Path(self.path).name
            copy.write_bytes(content)
            return read_local(copy), {}


GITHUB = "https://raw.githubusercontent.com"
_ORZ = ("Open-Reasoner-Zero/Open-Reasoner-Zero", "3fdd9a07b4fb01e06005e6e74fc56690cde8a341")
_R1_ZERO = ("sail-sg/understand-r1-zero", "dfca49dd460ee7cc8e4a5a162c876a7fd6993b87")
_SUITE = "datasets/evaluation_suite/{}/data-00000-of-00001.arrow"

# The paper's Math sets: what is read if nothing else is asked for.
PAPER = {
    file.name: file
    for file in (
        GitFile("train", *_ORZ, "data/orz_math_57k_collected.json", "08812d4a47aadf8fa80a43f11431e6d41ba55b64"),
        GitFile("math500", *_ORZ, "data/eval_data/math500.json", "e8ba46e18ac1a0cd112c63d863a167ad5d1cf5a2"),
        GitFile("aime2024", *_ORZ, "data/eval_data/aime2024.json", "2b78e73d1460af1ab43727675d43ef498994a1d4"),
        GitFile("amc", *_R1_ZERO, _SUITE.format("amc"), "16f8737f361bb60f6741ac228e9de0ed7eaab16f"),
        GitFile("minerva", *_R1_ZERO, _SUITE.format("minerva"), "0a666bb23ca63f855b415b5c49d645d10f3949c6"),
    )
}


@dataclass(frozen=True)
class Hub:
    """A Hugging Face repository in the layout of a set of the tables, at a branch, tag or commit."""

    task: str
    data_set: DataSet
    repo: str
    revision: str

    @property
    def where(self) -> str:
        return self.repo

    def request(self) -> dict[str, Any]:
        return {"kind": "hub", "repo": self.repo, "revision": self.revision}

    def read(self) -> tuple[Any, dict[str, Any]]:
        """Everything is read at one commit: a branch that moves between two requests cannot mix two states."""
        import datasets
        from huggingface_hub import HfApi, constants, hf_hub_download

        if Path(self.repo).exists():  # load_dataset would silently read it, and the manifest would name a commit
            raise UserError(
                f"{self.repo} is also a folder here: run the command in another folder, or read it by --from"
            )
        try:
            # First, because it is one request that fails at once, where a download would retry for half a minute.
            commit = HfApi().dataset_info(self.repo, revision=self.revision, timeout=20).sha
            if self.data_set.file is None:
                builder = datasets.load_dataset_builder(self.repo, revision=commit)
                # Where the hub fails, datasets takes its newest copy, of whatever commit.
                if builder.name == "cache" and builder.hash != commit:
                    raise ConnectionError(f"commit {commit} cannot be downloaded, and {builder.hash} is the one cached")
                builder.download_and_prepare()
                return builder.as_dataset(split=self.data_set.split), {"commit": commit}
            path = hf_hub_download(self.repo, self.data_set.file, repo_type="dataset", revision=commit)
        except Exception as error:  # of many types, which do not tell another layout from a connection that broke
            raise UserError(
                f"cannot read {self.repo} at revision {self.revision} from {constants.ENDPOINT} "
                f"({_first_line(error)}): check --repo and --revision. {OFFLINE[self.task]}"
            ) from error
        return read_local(Path(path)), {"commit": commit}


# A place that rows are read from. ``where`` is for messages. ``request`` gives what decides the content, for the
# manifest: its ``kind`` (github, hub or file), and which. ``read`` gives the raw rows, a list or a table, and what the
# manifest records besides; it raises UserError with what to do.
Origin = LocalFile | GitFile | Hub


def parse_rows(raw_rows: Iterable[Any], read_row: Callable[[Any], Any], where: str) -> list[Any]:
    """
    Raises:
        UserError: a row is of no accepted format; the message has its number.
    """
    parsed = []
    for number, raw in enumerate(raw_rows):
        try:
            parsed.append(read_row(raw))
        except ValueError as error:
            raise UserError(f"{where}, row {number}: {error}") from None
    return parsed


def check_count(name: str, where: str, count: int, hint: str) -> None:
    """
    Raises:
        UserError: the Math set does not have the paper's number of rows.
    """
    low, high = MATH[name].rows
    if not low <= count <= high:
        expected = f"{low}" if low == high else f"{low} to {high}"
        raise UserError(f"{name} ({where}) has {count} rows, the paper's set has {expected}: {hint}")


def read_local(path: Path) -> list[Any]:
    """The raw rows of a local file or of a ``datasets.save_to_disk`` folder.

    Raises:
        UserError: not readable, or of another format.
    """
    accepted = "accepted: .json (a list), .jsonl, .parquet, .arrow, or a folder of one split by datasets.save_to_disk"
    try:
        rows = _read(path)
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise UserError(f"cannot read {path}: {_first_line(error)}; {accepted}") from error
    if isinstance(rows, list):
        return rows
    raise UserError(f"{path} holds a {type(rows).__name__}, not a list of rows; {accepted}")


def _read(path: Path) -> Any:
    import datasets
    import pyarrow.parquet as pq

    if path.is_dir():
        rows = datasets.load_from_disk(str(path))
        return list(rows) if isinstance(rows, datasets.Dataset) else rows
    match path.suffix:
        case ".json":  # not by datasets: rows that are lists do not fit its table format
            return json.loads(path.read_text(encoding="utf-8"))
        case ".jsonl":
            with path.open(encoding="utf-8") as lines:
                return [json.loads(line) for line in lines if line.strip()]
        case ".parquet":
            return pq.read_table(path).to_pylist()
        case ".arrow":  # of a folder that datasets.save_to_disk has written
            return list(datasets.Dataset.from_file(str(path)))
        case ending:
            raise ValueError(f"unknown ending {ending!r}")


def find_in_folder(folder: Path, name: str) -> LocalFile:
    """A Math set's file in a folder given by --from.

    Raises:
        UserError: none there; the message lists the names that were looked for.
    """
    candidates = [f"{name}.json", f"{name}.jsonl", f"{name}.parquet", name, *MATH[name].local_names]
    for candidate in candidates:
        if (folder / candidate).exists():
            return LocalFile(folder / candidate)
    raise UserError(f"--from {folder}: no file for the set {name}; looked for {', '.join(candidates)}")


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
