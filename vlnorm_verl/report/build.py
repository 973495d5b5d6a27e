"""`vlnorm-verl report`: reads runs, says what they show, and writes it.

The parts are the modules beside this one. What is written beside what cli.py names:

    .validation-counts-N.msgpack    what a second report reads instead of the dumps
    .written.json                   what a second report replaces, and of which inputs this one is
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
from rich.console import Console

from vlnorm_verl import __version__, methods
from vlnorm_verl.files import UserError, write_json
from vlnorm_verl.report import labels
from vlnorm_verl.report.changes import Memo, fingerprint
from vlnorm_verl.report.charts import Chart, charts, plotted
from vlnorm_verl.report.examples import examples
from vlnorm_verl.report.find import find
from vlnorm_verl.report.groups import Comparison, by_setting
from vlnorm_verl.report.identity import Setting, parse_method
from vlnorm_verl.report.page import Examples, Fold, Lead, Part, write_page
from vlnorm_verl.report.plots import plots
from vlnorm_verl.report.read import read_runs
from vlnorm_verl.report.run import Run
from vlnorm_verl.report.style import Figure, write_figures
from vlnorm_verl.report.table import Table, one_line
from vlnorm_verl.report.tables import tables
from vlnorm_verl.report.verdict import look_at, several_at_once, shortened, verdicts
from vlnorm_verl.report.writers import FORMATS, print_table, write_tables
from vlnorm_verl.runs.records import Unread

WRITTEN = ".written.json"


@dataclass(frozen=True)
class Request:
    """What is asked for, as cli.py explains it. arguments: each RUN; plots: of each --plot."""

    arguments: tuple[str, ...]
    out: Path
    smooth: int | None = None
    metric: str = ""
    baseline: str = ""
    plots: tuple[str, ...] = ()
    figures: bool = False
    verbose: bool = False


class _Written(msgspec.Struct):
    """What an earlier report left: its files, of which inputs, folders of dumps outside runs, and what it said."""

    files: list[str]
    inputs: str = ""
    dumps: list[str] = []
    said: list[str] = []


def build(request: Request, console: Console, memo: Memo | None = None) -> list[str]:
    """Write the report, unless one of the same inputs is there; what it says first, as lines of text.

    memo: of an earlier call; logs that have not changed since are not read again, nor the same tables printed.

    Raises:
        UserError: a wrong request, also where no run is found.
    """
    memo = memo or Memo()
    with _folder(request.out):
        earlier, options = _earlier(request.out), asdict(request) | {"verbose": False}
        sources = find(request.arguments)
        inputs = fingerprint(sources, options, earlier.dumps)
        there = earlier.inputs == inputs and all((request.out / name).is_file() for name in earlier.files)
        if there and (memo.inputs == inputs or not request.verbose):
            return earlier.said
        runs = read_runs(sources, request.out, request.metric, memo)
        dumps = _outside(runs)
        if dumps != earlier.dumps:  # what is in them has to be among the inputs before it is read
            inputs = fingerprint(sources, options, dumps)
            runs = read_runs(sources, request.out, request.metric, memo)
        compared = Comparison(runs, _method_key(request.baseline, runs))
        asked = plotted(runs, request.plots)
    with console.status("computing and drawing …"):
        made = tables(compared, request.smooth)
        said, files = _write(request, compared, made, asked)
    for name in set(earlier.files) - set(files):
        if re.fullmatch(r"(tables|figures)/\w[^/]*", name):  # the record may have come with the folder
            (request.out / name).unlink(missing_ok=True)
    if any(isinstance(note, Unread) and not note.forbidden for run in runs for note in run.notes):
        inputs = ""  # the next report is to try again
    write_json(request.out / WRITTEN, {"files": files, "inputs": inputs, "dumps": dumps, "said": said})
    memo.inputs = inputs
    for table in made if request.verbose else ():
        print_table(table, console)
    return said


def _outside(runs: Sequence[Run]) -> list[str]:
    """The folders of dumps that are not in the folders of their runs."""
    files = ((run, file) for run in runs for file in run.dumps.values())
    return sorted({str(file.parent) for run, file in files if file.parent != run.folder / "validation"})


def watch(request: Request, seconds: float, console: Console) -> None:
    """Build the report again whenever a file of its runs has changed, until it is interrupted."""
    memo = Memo()
    last: list[str] = []
    while True:
        try:
            said = build(request, console, memo)
        except (OSError, UserError) as error:  # a disk that is away for a moment ends no watch
            if not last:
                raise
            said = [f"{error}; tried again every {seconds:g} s"]
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
    known = {run.method_key for run in runs if not run.left_out}
    if key not in known:
        raise UserError(f"--baseline {baseline}: no run of that method; there are {', '.join(sorted(known))}")
    return key


def _earlier(out: Path) -> _Written:
    with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return msgspec.json.decode((out / WRITTEN).read_bytes(), type=_Written)
    return _Written([])


def _write(
    request: Request, compared: Comparison, made: list[Table], plots_asked: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Writes all files; (what is said on the terminal, the files)."""
    out = request.out
    accuracy, drawn = charts(compared, request.smooth, plots_asked)
    looks = labels.looks(group.key for group in compared.groups)
    found = verdicts(compared)
    several = several_at_once(found)
    odd = {what: shortened(which) for what, which in look_at(compared).items()}
    write_tables(made, out / "tables")
    named = {table.name: table for table in made}
    pictures: list[Figure] = []
    if request.figures:
        of_settings = [
            replace(chart, title=f"{compared.titles[setting]}: {chart.title}")
            for setting, others in drawn.items()
            for chart in others
        ]
        pictures = [*plots([*accuracy, *of_settings], looks, named.get("results"))]
        write_figures(pictures, out / "figures")
    files = ["report.html", *(f"tables/{table.name}.{ending}" for table in made for ending in FORMATS)]
    files += [f"figures/{figure.name}.{ending}" for figure in pictures for ending in ("png", "svg")]
    count = sum(not run.left_out for run in compared.runs)
    origin = f"{count} run{'s' * (count != 1)}, read on {datetime.date.today()} by vlnorm-verl {__version__}."
    page = out / "report.html"
    lead = Lead(found, several, odd, looks)
    write_page(page, "Report on runs of verl", [origin], _parts(compared, accuracy, drawn, named), lead)
    lacking = "accuracy that can be compared" if compared.validated else "validation"
    said = [verdict.sentence() for verdict in found] or [f"No {lacking} in these runs."]
    said += [f"Look at: {what}: {which}." for what, which in odd.items()]
    said += [several] if several else []
    return [*map(one_line, said), f"page: {page}", f"tables: {out / 'tables'}"], files


def _parts(
    compared: Comparison, accuracy: list[Chart], drawn: dict[Setting, list[Chart]], named: dict[str, Table]
) -> list[Part]:
    """Results, accuracy curves, and all else folded, by setting."""
    parts: list[Part] = [*([named["results"]] if "results" in named else []), *accuracy]
    validated = by_setting(compared.validated)
    for setting, title in compared.titles.items():
        inside: list[Part] = [*drawn[setting]]
        for group, runs in validated.get(setting, {}).items():
            where, responses = examples(runs)
            if responses:
                inside.append(Fold(f"Responses of {group.label}", [Examples(group.label, where, responses)]))
        parts += [Fold(title, inside)] if inside else []
    for name in ("speedup", "details", "sets", "settings", "inputs"):
        parts += [Fold(named[name].title, [named[name]])] if name in named else []
    return parts
