"""`vlnorm-verl report`: reads runs, makes tables and figures, writes them.

The parts are the modules beside this one. What is written to DIR:

    report.html                   everything in one file that needs no network
    tables/                       NAME.md, NAME.csv, NAME.json, NAME.tex
    figures/                      NAME.png, NAME.svg
    .validation-counts.msgpack    what a second report reads instead of the dumps
    .written.json                 what a second report replaces
"""

from __future__ import annotations

import contextlib
import datetime
import os
from importlib.metadata import version
from pathlib import Path

import msgspec
from rich.console import Console

from vlnorm_verl.files import UserError, write_json
from vlnorm_verl.report.identity import parse_method
from vlnorm_verl.report.output import missing_libraries
from vlnorm_verl.report.readers import read_runs
from vlnorm_verl.report.runs import Run

WRITTEN = ".written.json"


def build(
    arguments: list[str],
    out: Path,
    smooth: int | None = None,
    console: Console | None = None,
    metric: str = "",
    baseline: str = "",
) -> int:
    """Write the report of the runs at and below the arguments, each RUN or label=RUN. Exit code: 2 for a wrong request.

    smooth: steps of the trailing mean of curves and of the speed-up, 1 for none; None for three validations.
    metric: what the accuracy is, instead of verl's mean@n. baseline: what others are compared with, instead of VL Norm.
    """
    console = console or Console()
    try:
        return _build(arguments, out, smooth, console, metric, baseline)
    except UserError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2


def _build(arguments: list[str], out: Path, smooth: int | None, console: Console, metric: str, baseline: str) -> int:
    if smooth is not None and smooth < 1:
        raise UserError(f"--smooth {smooth}: accepted are whole numbers from 1 (no smoothing)")
    if problem := missing_libraries():
        raise UserError(problem)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; accepted is a folder, which is made if it is not there")
    runs, baseline = _read(arguments, out, metric, baseline)

    from vlnorm_verl.report import tables as tables_module
    from vlnorm_verl.report.figures import figures as draw
    from vlnorm_verl.report.output import Figure, Table, print_table, write_figures, write_page, write_tables

    tables = tables_module.tables(runs, smooth, baseline)
    missing = tables_module.missing(tables)
    with console.status("drawing …"):
        figures = draw([run for run in runs if len(run.steps)], smooth, baseline)
    write_tables(tables, out / "tables")
    write_figures(figures, out / "figures")
    files = [f"tables/{table.name}.{ending}" for table in tables for ending in ("md", "csv", "json", "tex")]
    files += [f"figures/{figure.name}.{ending}" for figure in figures for ending in ("png", "svg")]
    _replace(out, files)
    intro = [
        f"{len(runs)} runs, read on {datetime.date.today()} by vlnorm-verl {version('vlnorm-verl')}. The last table "
        "says which, and what was odd.",
        *missing,
    ]
    parts: list[Table | Figure | str] = ["Tables", *tables[:-1]] if tables[:-1] else []
    parts += ["Figures", *figures] if figures else []
    write_page(out / "report.html", "VL Norm: report", intro, [*parts, "Runs", tables[-1]])
    for table in tables:
        print_table(table, console)
    for sentence in missing:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"page: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"tables and figures: {out}/tables, {out}/figures", markup=False, highlight=False, soft_wrap=True)
    return 0


def _method_key(baseline: str, runs: list[Run]) -> str:
    """The key of the method that --baseline names, as a loss_agg_mode or as the runs' own method."""
    if not baseline:
        return ""
    method, alpha = parse_method(baseline, "--baseline")
    key = method if alpha is None else f"{method}:{alpha:g}"
    known = {run.method_key for run in runs if len(run.steps)}
    if key not in known:
        raise UserError(f"--baseline {baseline}: no run of that method; there are {', '.join(sorted(known))}")
    return key


def _read(arguments: list[str], out: Path, metric: str, baseline: str) -> tuple[list[Run], str]:
    """The runs and the baseline's key; `out` is made before, and not left behind for a wrong request."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); accepted is a folder to write to") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: cannot be written to; accepted is a folder to write to")
    try:
        runs = read_runs(arguments, out, metric=metric)
        return runs, _method_key(baseline, runs)
    except UserError:
        with contextlib.suppress(OSError):  # the counts of dumps stay for the next try
            for folder in made:
                folder.rmdir()
        raise


def _replace(out: Path, files: list[str]) -> None:
    """Remove what an earlier report wrote here and this one has no runs for; remember what this one wrote."""
    record = out / WRITTEN
    for name in set(_written(record)) - set(files):
        (out / name).unlink(missing_ok=True)
    write_json(record, {"files": files})


def _written(record: Path) -> list[str]:
    """What an earlier report wrote; nothing if its record is missing or broken."""
    try:
        return msgspec.json.decode(record.read_bytes(), type=_Written).files
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return []


class _Written(msgspec.Struct):
    files: list[str]
