"""``vlnorm-verl data countdown`` and ``vlnorm-verl data math``. Light to import: ``vlnorm-verl --help`` reads it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import typer

from vlnorm_verl.files import UserError

data_app = typer.Typer(
    help="Write the paper's data sets as parquet files for verl: from GitHub, Hugging Face, local files, or generated.",
    no_args_is_help=True,
)

Force = Annotated[bool, typer.Option("--force", help="Overwrite what --out holds; asks the source again.")]
Offline = Annotated[bool, typer.Option("--offline", help="Generate problems of the same schema; needs no network.")]
Seed = Annotated[int | None, typer.Option(help="Seed of --offline.", show_default="0")]


@data_app.command()
def countdown(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of train.parquet and test.parquet.")] = Path(
        "data/countdown"
    ),
    train_rows: Annotated[int, typer.Option(min=1, help="Rows to train on: the first ones of the set.")] = 32_768,
    test_rows: Annotated[int, typer.Option(min=1, help="Held-out rows: those that follow.")] = 1024,
    offline: Offline = False,
    seed: Seed = None,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", help="Local copy: .parquet, .jsonl, .json or a save_to_disk folder with nums, target."),
    ] = None,
    repo: Annotated[str | None, typer.Option(help="Hugging Face data set instead of the paper's.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")] = None,
    force: Force = False,
) -> None:
    """CountDown: 32,768 problems to train on and 1,024 to test, as in the paper (Countdown-Tasks-3to4).

    A second call with the same arguments only verifies the files' checksums.
    """
    from vlnorm_verl.tasks import countdown as task
    from vlnorm_verl.tasks import generate, sources
    from vlnorm_verl.tasks.base import Row, Split, row

    _one_source({"--offline": offline, "--from": from_file, "--repo, --revision": repo or revision})
    _only_offline({"--seed": seed}, offline)
    origin: sources.Origin | None = None
    if from_file is not None:
        origin = sources.LocalFile(from_file)
    elif not offline:
        origin = sources.Hub("countdown", sources.COUNTDOWN, repo or sources.COUNTDOWN.repo, revision or "main")
    sizes: dict[Split, int] = {"train": train_rows, "test": test_rows}
    made_from: dict[str, Any] = origin.request() if origin else {"kind": "generated", "seed": seed or 0}

    def problems() -> tuple[list[generate.Solved], dict[str, Any]]:
        if origin is None:
            drawn = (generate.countdown(split, size, seed or 0) for split, size in sizes.items())
            return list(_tracked(chain.from_iterable(drawn), train_rows + test_rows, "generating")), {}
        rows, details = origin.read()
        raw = list(islice(rows, train_rows + test_rows))
        if len(raw) < train_rows + test_rows:
            asked = f"--train-rows {train_rows} and --test-rows {test_rows}"
            raise UserError(f"{origin.where} has {len(raw)} rows, fewer than {asked} need")
        return [generate.Solved(p, "") for p in sources.parse_rows(raw, task.read_row, origin.where)], details

    def build() -> tuple[dict[str, list[Row]], dict[str, Any]]:
        solved, details = problems()
        parts = {"train": solved[:train_rows], "test": solved[train_rows:]}
        tables = {
            f"{split}.parquet": [
                row("countdown", task.prompt(p), task.ground_truth(p), split, index, made_from["kind"], solution)
                for index, (p, solution) in enumerate(part)
            ]
            for split, part in parts.items()
        }
        return tables, {"countdown": made_from | details}

    request = {"train_rows": train_rows, "test_rows": test_rows, "source": made_from}
    _publish(out, "countdown", ["train", "test"], task.TEMPLATE, request, build, force)


@data_app.command()
def math(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of one parquet file per set.")] = Path("data/math"),
    offline: Offline = False,
    seed: Seed = None,
    train_rows: Annotated[
        int | None, typer.Option(min=1, help="Generated problems to train on.", show_default="256")
    ] = None,
    test_rows: Annotated[
        int | None, typer.Option(min=1, help="Generated problems of each test set.", show_default="32")
    ] = None,
    from_dir: Annotated[
        Path | None, typer.Option("--from", file_okay=False, help="Folder with a local copy of every set.")
    ] = None,
    file: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH, local copy of one set; may be repeated.", metavar="NAME=PATH")
    ] = None,
    repo: Annotated[
        list[str] | None,
        typer.Option(help="NAME=REPO, a Hugging Face data set instead of the paper's file.", metavar="NAME=REPO"),
    ] = None,
    revision: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=REVISION, branch, tag or commit of that --repo; main if not given.", metavar="NAME=REVISION"
        ),
    ] = None,
    allow_any_rows: Annotated[
        bool, typer.Option("--allow-any-rows", help="Accept local copies with other row counts than the paper's sets.")
    ] = False,
    force: Force = False,
) -> None:
    """Math: Open-Reasoner-Zero's 57k to train on; MATH500, AIME2024, AMC (83) and Minerva (272) to test.

    Without options these are the files that the paper's code reads, from GitHub at a fixed commit.
    NAME is train, math500, aime2024, amc or minerva. Local copies may be .json, .jsonl, .parquet or a folder of
    datasets.save_to_disk. A second call with the same arguments only verifies the files' checksums.
    """
    from vlnorm_verl.tasks import generate, sources
    from vlnorm_verl.tasks import math as task
    from vlnorm_verl.tasks.base import Row, row

    files, repos, revisions = _named("--file", file), _named("--repo", repo), _named("--revision", revision)
    _one_source({"--offline": offline, "--from": from_dir, "--repo, --revision": repos or revisions})
    _one_source({"--offline": offline, "--file": files})
    _only_offline({"--seed": seed, "--train-rows": train_rows, "--test-rows": test_rows}, offline)
    for name in files.keys() & (repos.keys() | revisions.keys()):
        raise typer.BadParameter(f"{name} is given by --file already", param_hint="--repo / --revision")
    for name in revisions.keys() - repos.keys():
        raise typer.BadParameter(f"give --repo {name}=… too: the paper's file has its commit", param_hint="--revision")
    if allow_any_rows and not (files or from_dir):
        raise typer.BadParameter("only together with --from or --file", param_hint="--allow-any-rows")

    def origin_of(name: str) -> sources.Origin:
        if name in files:
            return sources.LocalFile(Path(files[name]))
        if from_dir is not None:
            return sources.find_in_folder(from_dir, name)
        if name in repos:
            return sources.Hub("math", sources.MATH[name], repos[name], revisions.get(name, "main"))
        return sources.PAPER[name]

    origins = {} if offline else {name: origin_of(name) for name in sources.MATH}
    request: dict[str, Any] = {name: origin.request() for name, origin in origins.items()}
    if files or from_dir:
        request["allow_any_rows"] = allow_any_rows
    sizes = {"seed": seed or 0, "train_rows": train_rows or 256, "test_rows": test_rows or 32}
    if offline:
        request["generated"] = sizes

    def build() -> tuple[dict[str, list[Row]], dict[str, Any]]:
        record: dict[str, Any] = {name: {"kind": "generated", "seed": seed or 0} for name in sources.MATH}
        problems = generate.math_problems(**sizes) if offline else {}
        for name, origin in _tracked(origins.items(), len(origins), "reading"):
            raw, details = origin.read()
            record[name] = request[name] | details
            local = record[name]["kind"] == "file"
            if not (local and allow_any_rows):
                hint = "--allow-any-rows accepts it" if local else "check --repo and --revision"
                sources.check_count(name, origin.where, len(raw), hint)
            problems[name] = sources.parse_rows(raw, task.read_row, origin.where)
        tables = {}
        for name, pairs in problems.items():
            split, data_source = ("train" if name == "train" else "test"), sources.data_source(name)
            tables[f"{name}.parquet"] = [
                row(data_source, task.prompt(question), answer, split, index, record[name]["kind"])
                for index, (question, answer) in enumerate(pairs)
            ]
        return tables, record

    _publish(out, "math", list(sources.MATH), task.TEMPLATE, request, build, force)


def _named(option: str, values: list[str] | None) -> dict[str, str]:
    from vlnorm_verl.tasks.sources import MATH

    named: dict[str, str] = {}
    for value in values or []:
        name, equals, rest = value.partition("=")
        if name not in MATH or not equals or not rest or name in named:
            raise typer.BadParameter(
                f"{value!r} is not NAME=VALUE with NAME one of {', '.join(MATH)}, each at most once", param_hint=option
            )
        named[name] = rest
    return named


def _one_source(options: dict[str, Any]) -> None:
    given = [option for option, value in options.items() if value]
    if len(given) > 1:
        raise typer.BadParameter("choose one source", param_hint=" / ".join(given))


def _only_offline(options: dict[str, Any], offline: bool) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given and not offline:
        raise typer.BadParameter("only together with --offline", param_hint=" / ".join(given))


def _tracked(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, desc=label, total=total, delay=1, mininterval=1)


def _publish(
    out: Path, task: str, sets: list[str], template: str, request: dict[str, Any], build: Any, force: bool
) -> None:
    from vlnorm_verl.tasks.base import publish

    template_sha256 = hashlib.sha256(template.encode()).hexdigest()  # data made with another prompt are noticed
    request = {"task": task, "prompt_template_sha256": template_sha256} | request
    names = [f"{name}.parquet" for name in sets]
    manifest, built = publish(out, names, request, build, force)
    for name in names:
        file = manifest["files"][name]
        typer.echo(f"{out / name}: {file['rows']} rows, sha256 {file['sha256'][:16]}")
    for name, source in manifest["sources"].items():
        if "commit" in source:
            typer.echo(f"{name}: {source['repo']} at commit {source['commit']}")
    typer.echo("written" if built else "up to date")
