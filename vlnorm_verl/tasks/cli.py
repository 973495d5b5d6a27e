"""``vlnorm-verl data countdown`` and ``vlnorm-verl data math``. Light to import: ``vlnorm-verl --help`` reads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vlnorm_verl.files import UserError

data_app = typer.Typer(
    help="Write the paper's data sets as parquet files for verl: from Hugging Face, local files, or generated.",
    no_args_is_help=True,
)

Force = Annotated[bool, typer.Option("--force", help="Overwrite what --out holds; asks the source again.")]
Offline = Annotated[bool, typer.Option("--offline", help="Generate problems of the same schema; needs no network.")]
Seed = Annotated[int | None, typer.Option(help="Seed of --offline.", show_default="0")]

OFFLINE_COUNTDOWN = "vlnorm-verl data countdown --offline (generated problems), or --from FILE (a copy of the set)"
OFFLINE_MATH = "vlnorm-verl data math --offline (generated problems), or --from DIR / --file NAME=PATH (copies)"


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
    from vlnorm_verl.tasks import generate, prompts, sources, write

    _one_source({"--offline": offline, "--from": from_file, "--repo, --revision": repo or revision})
    _only_offline({"--seed": seed}, offline)
    request: dict[str, Any] = {
        "task": "countdown",
        "train_rows": train_rows,
        "test_rows": test_rows,
        "prompt_template_sha256": prompts.template_sha256(prompts.COUNTDOWN_TEMPLATE),
    }
    if offline:
        request["source"] = {"kind": "generated", "seed": seed or 0}
    elif from_file is not None:
        request["source"] = _local(from_file)
    else:
        request["source"] = _hub(repo or sources.COUNTDOWN.repo, revision or sources.COUNTDOWN.revision)

    def rows(split: str, problems: Iterable[tuple[list[int], int, str]], count: int) -> write.Rows:
        return [
            write.row(
                "countdown",
                prompts.countdown_prompt(numbers, target),
                write.countdown_ground_truth(numbers, target),
                split,
                index,
                request["source"]["kind"],
                solution,
            )
            for index, (numbers, target, solution) in enumerate(_tracked(problems, count, f"{split}.parquet"))
        ]

    def build() -> tuple[dict[str, write.Rows], dict[str, Any]]:
        source = dict(request["source"])
        sizes = {"train": train_rows, "test": test_rows}
        if offline:
            tables = {split: rows(split, generate.countdown(split, n, seed or 0), n) for split, n in sizes.items()}
            return {f"{split}.parquet": table for split, table in tables.items()}, {"countdown": source}
        wanted = train_rows + test_rows
        if from_file is not None:
            raw, where = sources.read_local(from_file), str(from_file)
            source["path"] = where
        else:
            raw, source["commit"] = sources.fetch(
                sources.COUNTDOWN, source["repo"], source["revision"], OFFLINE_COUNTDOWN, limit=wanted
            )
            where = source["repo"]
        if len(raw) < wanted:
            raise sources.UserError(
                f"{where} has {len(raw)} rows, fewer than --train-rows {train_rows} and --test-rows {test_rows} need"
            )
        problems = [(*p, "") for p in sources.parse_rows(raw[:wanted], sources.countdown_row, where)]
        return {
            "train.parquet": rows("train", problems[:train_rows], train_rows),
            "test.parquet": rows("test", problems[train_rows:], test_rows),
        }, {"countdown": source}

    _publish(out, ["train.parquet", "test.parquet"], request, build, force)


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
        list[str] | None, typer.Option(help="NAME=REPO, a Hugging Face data set instead.", metavar="NAME=REPO")
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
    from vlnorm_verl.tasks import generate, prompts, sources, write

    files = {name: Path(path) for name, path in _named("--file", file).items()}
    repos, revisions = _named("--repo", repo), _named("--revision", revision)
    _one_source({"--offline": offline, "--from": from_dir, "--repo, --revision": repos or revisions})
    _one_source({"--offline": offline, "--file": files})
    _only_offline({"--seed": seed, "--train-rows": train_rows, "--test-rows": test_rows}, offline)
    for name in files.keys() & (repos.keys() | revisions.keys()):
        raise typer.BadParameter(f"{name} is given by --file already", param_hint="--repo / --revision")
    for name in revisions.keys() - repos.keys():
        raise typer.BadParameter(f"give --repo {name}=… too: the paper's file has its commit", param_hint="--revision")

    request: dict[str, Any] = {
        "task": "math",
        "prompt_template_sha256": prompts.template_sha256(prompts.MATH_TEMPLATE),
    }
    try:
        for name, source in sources.MATH.items():
            if offline:
                continue
            if from_dir is not None and name not in files:
                files[name] = sources.find_in_folder(from_dir, name, source)
            if name in files:
                request[name] = _local(files[name])
            elif name in repos:
                request[name] = _hub(repos[name], revisions.get(name, source.revision))
            else:
                request[name] = {"kind": "github", **asdict(sources.PAPER[name])}
    except sources.UserError as error:
        _fail(error)
    if offline:
        request["generated"] = {"seed": seed or 0, "train_rows": train_rows or 256, "test_rows": test_rows or 32}
    if files:
        request["allow_any_rows"] = allow_any_rows
    elif allow_any_rows:
        raise typer.BadParameter("only together with --from or --file", param_hint="--allow-any-rows")

    def build() -> tuple[dict[str, write.Rows], dict[str, Any]]:
        problems: dict[str, list[tuple[str, str]]] = {}
        record: dict[str, Any] = {}
        if offline:
            problems = generate.math_problems(**request["generated"])
            record = {name: {"kind": "generated", "seed": seed or 0} for name in problems}
        else:
            for name, source in _tracked(sources.MATH.items(), len(sources.MATH), "reading"):
                record[name] = dict(request[name])
                if name in files:
                    raw, where = sources.read_local(files[name]), str(files[name])
                    record[name]["path"] = where
                elif name in repos:
                    where = repos[name]
                    raw, record[name]["commit"] = sources.fetch(source, where, record[name]["revision"], OFFLINE_MATH)
                else:
                    where, raw = record[name]["repo"], sources.fetch_paper(name, OFFLINE_MATH)
                if not (name in files and allow_any_rows):
                    way = "--allow-any-rows accepts it" if name in files else "check --repo and --revision"
                    sources.check_count(f"{name} ({where})", len(raw), source, way)
                problems[name] = sources.parse_rows(raw, sources.math_row, where)
        return {
            f"{name}.parquet": [
                write.row(
                    sources.data_source(name),
                    prompts.math_prompt(question),
                    answer,
                    "train" if name == "train" else "test",
                    index,
                    record[name]["kind"],
                )
                for index, (question, answer) in enumerate(_tracked(pairs, len(pairs), f"{name}.parquet"))
            ]
            for name, pairs in problems.items()
        }, record

    _publish(out, [f"{name}.parquet" for name in sources.MATH], request, build, force)


def _hub(repo: str, revision: str) -> dict[str, str]:
    return {"kind": "hub", "repo": repo, "revision": revision}


def _local(path: Path) -> dict[str, str]:
    """By content, not by path: a moved copy is the same data, a changed one is not."""
    from vlnorm_verl.tasks.sources import content_sha256

    try:
        return {"kind": "file", "sha256": content_sha256(path)}
    except OSError as error:
        _fail(UserError(f"cannot read {path}: {error.strerror or error}"))


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
    from rich.console import Console
    from rich.progress import track

    return track(items, description=label, total=total, console=Console(stderr=True))


def _publish(out: Path, names: list[str], request: dict[str, Any], build: Any, force: bool) -> None:

    from vlnorm_verl.tasks.write import publish

    try:
        manifest, built = publish(out, names, request, build, force)
    except UserError as error:
        _fail(error)
    for name in names:
        file = manifest["files"][name]
        typer.echo(f"{out / name}: {file['rows']} rows, sha256 {file['sha256'][:16]}")
    for name, source in manifest["sources"].items():
        if "commit" in source:
            typer.echo(f"{name}: {source['repo']} at commit {source['commit']}")
    typer.echo("written" if built else "up to date")


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"Error: {error}", err=True)
    raise typer.Exit(1) from error
