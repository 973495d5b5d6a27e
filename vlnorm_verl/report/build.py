"""`vlnorm-verl report`: reads runs, says what they show, and writes it.

The parts are the modules beside this one. What is written to DIR:

    report.html                   everything in one file that needs no network
    tables/                       NAME.md, NAME.csv, NAME.json, NAME.tex
    figures/                      NAME.png, NAME.svg, when asked for
    .validation-counts.msgpack    what a second report reads instead of the dumps
    .written.json                 what a second report replaces, and of which inputs this one is
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
from rich.console import Console

from vlnorm_verl import methods
from vlnorm_verl.files import UserError, write_json
from vlnorm_verl.report import labels
from vlnorm_verl.report.changes import Memo, fingerprint
from vlnorm_verl.report.charts import Chart, charts
from vlnorm_verl.report.examples import examples
from vlnorm_verl.report.groups import Groups, grouped, only, ordered, with_validation
from vlnorm_verl.report.identity import Setting, parse_method
from vlnorm_verl.report.page import Examples, Fold, Lead, Part, write_page
from vlnorm_verl.report.plots import plots
from vlnorm_verl.report.read import read_runs
from vlnorm_verl.report.run import Run
from vlnorm_verl.report.style import Figure, write_figures
from vlnorm_verl.report.table import Table
from vlnorm_verl.report.tables import tables
from vlnorm_verl.report.verdict import look_at, several_at_once, shortened, verdicts
from vlnorm_verl.report.writers import FORMATS, print_table, write_tables

WRITTEN = ".written.json"


@dataclass(frozen=True)
class Request:
    """What is asked for.

    arguments: RUN or label=RUN, each a run or a folder that holds runs.
    smooth: steps of the trailing mean of curves and of the speed-up, 1 for none; None for three validations.
    metric: what the accuracy is, instead of verl's mean@n. baseline: what others are compared with, instead of VL Norm.
    plots: further metrics to draw, as patterns. figures: whether PNG and SVG files are wanted. verbose: print tables.
    """

    arguments: tuple[str, ...]
    out: Path
    smooth: int | None = None
    metric: str = ""
    baseline: str = ""
    plots: tuple[str, ...] = ()
    figures: bool = False
    verbose: bool = False


class _Written(msgspec.Struct):
    """What an earlier report left: its files, of which inputs, folders of dumps among these, and what it said."""

    files: list[str]
    inputs: str = ""
    dumps: list[str] = []
    said: list[str] = []


def build(request: Request, console: Console | None = None, memo: Memo | None = None) -> list[str]:
    """Write the report, unless one of the same inputs is there; what it says first, as lines of text.

    memo: of an earlier call; logs that have not changed since are not read again.

    Raises:
        UserError: a wrong request, which no run found is.
    """
    console = console or Console()
    if request.smooth is not None and request.smooth < 1:
        raise UserError(f"--smooth {request.smooth}: accepted are whole numbers from 1 (no smoothing)")
    with _folder(request.out):
        earlier, options = _earlier(request.out), asdict(request) | {"verbose": False}
        inputs = fingerprint([*request.arguments], options, earlier.dumps)
        if earlier.inputs == inputs and not request.verbose:
            return earlier.said
        runs = read_runs([*request.arguments], request.out, metric=request.metric, memo=memo)
        baseline = _method_key(request.baseline, runs)
    made = tables(runs, request.smooth, baseline)
    with console.status("drawing …"):
        said, files = _write(request, runs, made, baseline)
    for name in set(earlier.files) - set(files):
        (request.out / name).unlink(missing_ok=True)
    dumps = sorted({str(file.parent) for run in runs for file in run.dumps.values()})
    write_json(request.out / WRITTEN, {"files": files, "inputs": inputs, "dumps": dumps, "said": said})
    for table in made if request.verbose else ():
        print_table(table, console)
    return said


def watch(request: Request, seconds: float, console: Console) -> None:
    """Build the report again whenever a file of its runs has changed, until it is interrupted."""
    memo = Memo()
    last: list[str] = []
    while True:
        said = build(request, console, memo)
        if said != last:
            console.rule(f"{datetime.datetime.now():%H:%M:%S}")
            say(said, console)
        last = said
        time.sleep(seconds)


def say(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[None]:
    """`out` is made before anything is read, and not left behind for a wrong request."""
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
        yield
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


def _earlier(out: Path) -> _Written:
    with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return msgspec.json.decode((out / WRITTEN).read_bytes(), type=_Written)
    return _Written([])


def _write(request: Request, runs: list[Run], made: list[Table], baseline: str) -> tuple[list[str], list[str]]:
    """Writes all files; (what is said on the terminal, the files)."""
    out, groups = request.out, ordered(grouped([run for run in runs if len(run.steps)]))
    titles = labels.titles(setting for setting, _ in groups)
    accuracy, drawn = charts(groups, titles, request.smooth, baseline, request.plots)
    looks = labels.looks(key for _, key in groups)
    found = verdicts(groups, titles)
    several, odd = several_at_once(found), look_at(runs, groups, titles)
    write_tables(made, out / "tables")
    named = {table.name: table for table in made}
    pictures: list[Figure] = []
    if request.figures:
        flat = [*([accuracy] if accuracy.panels else []), *(chart for of in drawn.values() for chart in of)]
        pictures = [*plots(flat, looks, named.get("results"))]
        write_figures(pictures, out / "figures")
    files = [f"tables/{table.name}.{ending}" for table in made for ending in FORMATS]
    files += [f"figures/{figure.name}.{ending}" for figure in pictures for ending in ("png", "svg")]
    origin = f"{len(runs)} runs, read on {datetime.date.today()} by vlnorm-verl {version('vlnorm-verl')}."
    page = out / "report.html"
    lead = Lead(found, several, odd, looks)
    write_page(page, "Report on runs of verl", [origin], _parts(groups, titles, accuracy, drawn, named), lead)
    said = [verdict.sentence() for verdict in found] or ["No validation in these runs: nothing can be compared."]
    said += [f"Look at: {what}: {shortened(which)}." for what, which in odd.items()]
    said += [several] if several else []
    return [*said, f"page: {page}", f"tables: {out / 'tables'}"], files


def _parts(
    groups: Groups,
    titles: dict[Setting, str],
    accuracy: Chart,
    drawn: dict[Setting, list[Chart]],
    named: dict[str, Table],
) -> list[Part]:
    """Results, accuracy curves, and all else folded, by setting."""
    parts: list[Part] = [named["results"]] if "results" in named else []
    parts += [accuracy] if accuracy.panels else []
    for setting, title in titles.items():
        inside: list[Part] = [*drawn[setting]]
        for (_, key), runs in only(groups, setting).items():
            label, (where, responses) = methods.label_of(key, setting.family), examples(with_validation(runs))
            if responses:
                inside.append(Fold(f"Responses of {label}", [Examples(label, where, responses)]))
        parts += [Fold(title, inside)] if inside else []
    for name in ("speedup", "details", "sets", "settings", "inputs"):
        parts += [Fold(named[name].title, [named[name]])] if name in named else []
    return parts
