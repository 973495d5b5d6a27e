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

from vlnorm_verl import methods
from vlnorm_verl.files import UserError, write_json
from vlnorm_verl.report.figures import figures
from vlnorm_verl.report.identity import parse_method
from vlnorm_verl.report.page import write_page
from vlnorm_verl.report.read import read_runs
from vlnorm_verl.report.run import Run
from vlnorm_verl.report.style import Figure, write_figures
from vlnorm_verl.report.table import Table
from vlnorm_verl.report.tables import missing, tables
from vlnorm_verl.report.writers import print_table, write_tables

WRITTEN = ".written.json"


def build(
    arguments: list[str],
    out: Path,
    smooth: int | None = None,
    console: Console | None = None,
    metric: str = "",
    baseline: str = "",
) -> None:
    """Write the report of the runs at and below the arguments, each RUN or label=RUN.

    smooth: steps of the trailing mean of curves and of the speed-up, 1 for none; None for three validations.
    metric: what the accuracy is, instead of verl's mean@n. baseline: what others are compared with, instead of VL Norm.

    Raises:
        UserError: a wrong request, which no run found is.
    """
    console = console or Console()
    if smooth is not None and smooth < 1:
        raise UserError(f"--smooth {smooth}: accepted are whole numbers from 1 (no smoothing)")
    runs, baseline = _read(arguments, out, metric, baseline)
    made = tables(runs, smooth, baseline)
    with console.status("drawing …"):
        drawn = figures([run for run in runs if len(run.steps)], smooth, baseline)
    _write(out, made, drawn, [f"{len(runs)} runs, {_origin()}. The last table says which, and what was odd."])
    for table in made:
        print_table(table, console)
    for sentence in (
        *missing(made),
        f"page: {out / 'report.html'}",
        f"tables and figures: {out}/tables, {out}/figures",
    ):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _origin() -> str:
    return f"read on {datetime.date.today()} by vlnorm-verl {version('vlnorm-verl')}"


def _read(arguments: list[str], out: Path, metric: str, baseline: str) -> tuple[list[Run], str]:
    """The runs and the baseline's key; `out` is made before, and not left behind for a wrong request."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; accepted is a folder, which is made if it is not there")
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
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
            for folder in new:
                folder.rmdir()
        raise


def _method_key(baseline: str, runs: list[Run]) -> str:
    """The key of the method that --baseline names, as a loss_agg_mode or as the runs' own method."""
    if not baseline:
        return ""
    key = methods.join(*parse_method(baseline, "--baseline"))
    known = {run.method_key for run in runs if len(run.steps)}
    if key not in known:
        raise UserError(f"--baseline {baseline}: no run of that method; there are {', '.join(sorted(known))}")
    return key


def _write(out: Path, made: list[Table], drawn: list[Figure], intro: list[str]) -> None:
    """All files, without what an earlier report wrote here and this one has no runs for."""
    write_tables(made, out / "tables")
    write_figures(drawn, out / "figures")
    files = [f"tables/{table.name}.{ending}" for table in made for ending in ("md", "csv", "json", "tex")]
    files += [f"figures/{figure.name}.{ending}" for figure in drawn for ending in ("png", "svg")]
    earlier: dict[str, list[str]] = {}
    with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        earlier = msgspec.json.decode((out / WRITTEN).read_bytes(), type=dict[str, list[str]])
    for name in set(earlier.get("files", [])) - set(files):
        (out / name).unlink(missing_ok=True)
    write_json(out / WRITTEN, {"files": files})
    *results, inputs = made
    parts: list[Table | Figure | str] = ["Tables", *results] if results else []
    parts += ["Figures", *drawn] if drawn else []
    write_page(out / "report.html", "VL Norm: report", [*intro, *missing(made)], [*parts, "Runs", inputs])
