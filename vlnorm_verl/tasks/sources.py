"""Where each set comes from, and how one row of it reads. The tables below are the one place to correct.

Covered: single files of GitHub repositories at a fixed commit, checked by their git object id; Hugging Face
repositories at a fixed commit; local ``.json``, ``.jsonl``, ``.parquet``, ``.arrow`` files and folders of
``datasets.save_to_disk``; the row formats of Open-Reasoner-Zero's JSON files (training and evaluation), of
understand-r1-zero's evaluation suite and of the usual Hugging Face sets. Not covered: gated repositories, other
formats.

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
import math
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlnorm_verl.files import UserError


@dataclass(frozen=True)
class Source:
    """One set. ``rows`` is the least and the greatest accepted row count."""

    repo: str
    rows: tuple[int, int]
    split: str = "train"
    file: str | None = None  # read this one JSON file: rows that are lists do not fit datasets' table format
    local_names: tuple[str, ...] = ()  # further file names that --from accepts, as the set's home publishes it
    data_source: str = ""  # empty: the set's name
    revision: str = "main"


@dataclass(frozen=True)
class GitFile:
    """A file on GitHub, and the git object id of its content (`git ls-tree COMMIT PATH`)."""

    repo: str
    commit: str
    path: str
    blob: str


GITHUB = "https://raw.githubusercontent.com"
_ORZ = ("Open-Reasoner-Zero/Open-Reasoner-Zero", "3fdd9a07b4fb01e06005e6e74fc56690cde8a341")
_R1_ZERO = ("sail-sg/understand-r1-zero", "dfca49dd460ee7cc8e4a5a162c876a7fd6993b87")
_SUITE = "datasets/evaluation_suite/{}/data-00000-of-00001.arrow"

# The paper's Math sets: what is read if nothing else is asked for.
PAPER = {
    "train": GitFile(*_ORZ, "data/orz_math_57k_collected.json", "08812d4a47aadf8fa80a43f11431e6d41ba55b64"),
    "math500": GitFile(*_ORZ, "data/eval_data/math500.json", "e8ba46e18ac1a0cd112c63d863a167ad5d1cf5a2"),
    "aime2024": GitFile(*_ORZ, "data/eval_data/aime2024.json", "2b78e73d1460af1ab43727675d43ef498994a1d4"),
    "amc": GitFile(*_R1_ZERO, _SUITE.format("amc"), "16f8737f361bb60f6741ac228e9de0ed7eaab16f"),
    "minerva": GitFile(*_R1_ZERO, _SUITE.format("minerva"), "0a666bb23ca63f855b415b5c49d645d10f3949c6"),
}

COUNTDOWN = Source("Jiayi-Pan/Countdown-Tasks-3to4", rows=(0, 10**9))  # checked against the rows asked for

# Each set's row count and other names, and a set of this name on the hub, worded in its own way, for --repo.
MATH: dict[str, Source] = {
    "train": Source(
        "Open-Reasoner-Zero/orz_math_57k_collection",
        # "57k" is all that the sources say; the exact number goes into the manifest.
        rows=(56_000, 58_000),
        file="orz_math_57k_collection.json",
        local_names=("orz_math_57k_collected.json", "orz_math_57k_collection.json"),
        data_source="open_reasoner_zero",
    ),
    "math500": Source("HuggingFaceH4/MATH-500", rows=(500, 500), split="test"),
    "aime2024": Source("HuggingFaceH4/aime_2024", rows=(30, 30)),
    "amc": Source("AI-MO/aimo-validation-amc", rows=(83, 83)),
    "minerva": Source("math-ai/minervamath", rows=(272, 272), split="test"),
}

_QUESTION_COLUMNS = ("problem", "question", "Problem", "Question")
_ANSWER_COLUMNS = ("answer", "final_answer", "Answer")


def data_source(name: str) -> str:
    return MATH[name].data_source or name


def math_row(raw: Any) -> tuple[str, str]:
    """Question and answer of one row of any accepted format; the answer as the authors' code reads it.

    A list of answers (Minerva) counts by its first entry. Blanks around an answer are dropped, which the authors do
    for Minerva only. A number becomes its Python text: AMC's answers are floats, so ``142.0``.

    Raises:
        ValueError: no such format.
    """
    try:
        if isinstance(raw, list):  # Open-Reasoner-Zero, training: [{"value": q}, {"ground_truth": {"value": a}}]
            question, answer = raw[0]["value"], raw[1]["ground_truth"]["value"]
        elif isinstance(raw.get("prompt"), list):  # Open-Reasoner-Zero, evaluation
            (message,) = raw["prompt"]
            question, answer = message["value"], raw["final_answer"]
        else:
            question = next(raw[column] for column in _QUESTION_COLUMNS if column in raw)
            answer = next(raw[column] for column in _ANSWER_COLUMNS if column in raw)
        if isinstance(answer, list):
            answer = answer[0]
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
        raise ValueError(f"neither question nor answer found in {_shown(raw)}") from None
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question must be a text, in {_shown(raw)}")
    number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if not number and not (isinstance(answer, str) and answer.strip()):
        raise ValueError(f"the answer must be a text or a finite number, in {_shown(raw)}")
    return question, str(answer).strip()


def countdown_row(raw: Any) -> tuple[list[int], int]:
    """Numbers and target of one row with the columns ``nums`` (or ``numbers``) and ``target``.

    A number below 0 is refused: the reward reads ``-3`` as the sign of a 3, so no answer could use it.

    Raises:
        ValueError: no such format.
    """
    try:
        numbers = raw["nums"] if "nums" in raw else raw["numbers"]
        target = raw["target"]
        whole = [*numbers, target]
        if len(whole) < 2 or any(isinstance(n, bool) or n != int(n) for n in whole) or min(numbers) < 0:
            raise ValueError
    except (KeyError, OverflowError, TypeError, ValueError):  # int() of infinity overflows
        raise ValueError(
            f"columns nums (whole numbers, none below 0) and target (a whole number) not found in {_shown(raw)}"
        ) from None
    return [int(n) for n in numbers], int(target)


def _shown(raw: Any) -> str:
    return repr(raw)[:200]


def parse_rows(raw_rows: Iterable[Any], parse: Callable[[Any], Any], where: str) -> list[Any]:
    """
    Raises:
        UserError: a row is of no accepted format; the message has its number.
    """
    parsed = []
    for number, raw in enumerate(raw_rows):
        try:
            parsed.append(parse(raw))
        except ValueError as error:
            raise UserError(f"{where}, row {number}: {error}") from None
    return parsed


def check_count(name: str, count: int, source: Source, hint: str) -> None:
    """
    Raises:
        UserError: the set does not have the paper's number of rows.
    """
    low, high = source.rows
    if not low <= count <= high:
        expected = f"{low}" if low == high else f"{low} to {high}"
        raise UserError(f"{name} has {count} rows, the paper's set has {expected}: {hint}")


def read_local(path: Path) -> list[Any]:
    """The raw rows of a local file or of a ``datasets.save_to_disk`` folder.

    Raises:
        UserError: not there, not readable, or of another format.
    """
    import datasets

    accepted = "accepted: .json (a list), .jsonl, .parquet, .arrow, or a folder written by datasets.save_to_disk"
    if not path.exists():
        raise UserError(f"{path} does not exist; {accepted}")
    try:
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
            if not isinstance(table, datasets.Dataset):
                raise UserError(f"{path} holds several splits {sorted(table)}: give the folder of one of them")
            return list(table)
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list):
                raise UserError(f"{path} holds a JSON {type(rows).__name__}, not a list of rows; {accepted}")
            return rows
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                return [json.loads(line) for line in lines if line.strip()]
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(path).to_pylist()
            return list(rows)
        if path.suffix == ".arrow":  # of a folder written by datasets.save_to_disk
            return list(datasets.Dataset.from_file(str(path)))
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise UserError(f"cannot read {path}: {_first_line(error)}; {accepted}") from error
    raise UserError(f"cannot read {path}: unknown ending {path.suffix!r}; {accepted}")


def find_in_folder(folder: Path, name: str, source: Source) -> Path:
    """The set's file in a folder given by --from.

    Raises:
        UserError: none there; the message lists the names that were looked for.
    """
    candidates = [f"{name}.json", f"{name}.jsonl", f"{name}.parquet", name, *source.local_names]
    for candidate in candidates:
        if (folder / candidate).exists():
            return folder / candidate
    raise UserError(f"--from {folder}: no file for the set {name}; looked for {', '.join(candidates)}")


def content_sha256(path: Path) -> str:
    """Of a file, or of a folder's files with their names."""
    digest = hashlib.sha256()
    if not path.is_dir():
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    for file_path in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file_path.relative_to(path).as_posix()} {content_sha256(file_path)}\n".encode())
    return digest.hexdigest()


def fetch_paper(name: str, offline_way: str) -> list[Any]:
    """The raw rows of the file that the paper's code reads for a Math set.

    Raises:
        UserError: no network, no such file, or not the content that its commit has.
    """
    file = PAPER[name]
    url = f"{GITHUB}/{file.repo}/{file.commit}/{file.path}"
    way = f"Without GitHub: --repo {name}={MATH[name].repo} (the hub's wording). Without a network: {offline_way}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        raise UserError(f"cannot reach {url} ({_first_line(error)}). {way}") from error
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if blob != file.blob:
        raise UserError(f"{url} gave other content (git object {blob}) than its commit has ({file.blob}). {way}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(file.path).name
        copy.write_bytes(content)
        return read_local(copy)


def fetch(
    source: Source, repo: str, revision: str, offline_way: str, limit: int | None = None
) -> tuple[list[Any], str]:
    """The raw rows of a Hugging Face data set (the first ``limit``), and the commit that ``revision`` stands for.

    Everything is read at that commit: a branch that moves between two requests cannot mix two states.

    Raises:
        UserError: no network, no such repository, revision, split or file.
    """
    import datasets
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    what = f"{repo} at revision {revision}"
    wrong = "check --repo and --revision"
    if Path(repo).exists():  # load_dataset would silently read it, and the manifest would name a commit
        raise UserError(f"{repo} is also a folder here: run the command in another folder, or read it by --from")
    try:
        # First, because it is one request that fails at once, where a download would retry for half a minute.
        commit = HfApi().dataset_info(repo, revision=revision, timeout=20).sha
    except (HfHubHTTPError, HFValidationError, *_network_errors()) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, HFValidationError) or (status is not None and status < 429):
            raise UserError(f"{constants.ENDPOINT} has no data set {what} ({_first_line(error)}): {wrong}") from error
        raise UserError(
            f"cannot reach {constants.ENDPOINT} for {what} ({_first_line(error)}). Without a network: {offline_way}"
        ) from error
    if commit is None:
        raise UserError(f"{constants.ENDPOINT} names no commit of {what}: {wrong}")
    try:
        if source.file is not None:
            path = hf_hub_download(repo, source.file, repo_type="dataset", revision=commit)
            return read_local(Path(path))[:limit], commit
        table = datasets.load_dataset(repo, split=source.split, revision=commit)
        return list(table if limit is None else table.select(range(min(limit, len(table))))), commit
    except (ValueError, EntryNotFoundError, datasets.exceptions.DatasetsError, *_network_errors()) as error:
        # The libraries' errors do not tell a repository of another layout from a connection that broke.
        raise UserError(
            f"cannot read {what} ({_first_line(error)}): {wrong}. Without a network: {offline_way}"
        ) from error


def _network_errors() -> tuple[type[Exception], ...]:
    """huggingface_hub uses httpx from its version 1 on, before that requests, whose errors are OSErrors."""
    try:
        import httpx
    except ImportError:
        return (OSError,)
    return (OSError, httpx.TransportError)


def _first_line(error: Exception) -> str:
    lines: Sequence[str] = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
