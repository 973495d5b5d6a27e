"""From stored gradients to tables, a figure, a page and sentences: `vlnorm-verl lab report`.

    lab.html                  everything on one page, without a network
    tables/, figures/         Markdown, CSV, JSON, LaTeX; PNG and SVG

Covered: several models (checkpoints of one run) and several choices of parameters side by side. The tables are on the
disk before anything is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from vlnorm_verl.files import UserError
from vlnorm_verl.lab import store
from vlnorm_verl.lab.analysis import Analysis, analyse, of_most_parameters
from vlnorm_verl.lab.figures import overview
from vlnorm_verl.lab.tables import tables
from vlnorm_verl.lab.verdict import headline, verdict
from vlnorm_verl.report.page import Fold, write_page
from vlnorm_verl.report.style import write_figures
from vlnorm_verl.report.writers import print_table, write_tables

# Titles on the page and names of the tables under them; what is not the answer is folded.
FOLDED = {
    "Noise and bias of the aggregations": ("methods", "noisy_responses"),
    "How variance grows with length": ("slopes",),
    "Alignment, bias, variance and error of each α": ("alpha",),
    "Is the mean gradient the same for every length?": ("thirds",),
    "What was sampled": ("sampled",),
}


def build(folders: Mapping[str, Path], out: Path, mini_batch: int, seed: int) -> None:
    """Analyse the folders of `vlnorm-verl lab run`, and write and print what was found.

    Args:
        folders: {name to show: folder}.
        out: where to write.
        mini_batch: responses of the optimizer mini-batch for which an α is wanted.
        seed: of the mini-batches that are drawn and of the bootstrap.

    Raises:
        UserError: a folder without gradients, or with gradients of other rollouts.
    """
    console = Console()
    analyses = []
    with console.status("inner products and resampling …") as status:
        for name, folder in folders.items():
            for choice in choices(folder):
                status.update(f"{name}: gradients of {choice} …")
                try:
                    stored = store.load(folder, choice)
                except store.Incomplete as reason:
                    console.print(f"{name}: {choice} left out: {reason}", markup=False)
                    continue
                analyses.append(analyse(stored, name, choice, mini_batch, seed))
    if not analyses:
        raise UserError("no complete gradients; `vlnorm-verl lab run` goes on where it stopped")
    write(analyses, out, console)


def write(analyses: Sequence[Analysis], out: Path, console: Console) -> None:
    """Tables first, then the figure and the page; prints the answer, the summary and what it rests on."""
    made = {table.name: table for table in tables(analyses)}
    main = of_most_parameters(analyses)
    answers = [(f"{a.name}: " if len(main) > 1 else "") + headline(a.tradeoff) for a in main]
    verdicts = [*map(verdict, main)]
    write_tables(made.values(), out / "tables")
    for answer in answers:
        console.print(answer, style="bold", markup=False, highlight=False)
    print_table(made["summary"], console)
    for text in verdicts:
        console.print(text, markup=False, highlight=False)
    figure = overview(analyses)
    write_figures([figure], out / "figures")
    folds = [Fold(title, [made[name] for name in names if name in made]) for title, names in FOLDED.items()]
    folded = (fold for fold in folds if fold.parts)
    write_page(out / "lab.html", " · ".join(answers), verdicts, [made["summary"], figure, *folded])
    console.print(f"{out / 'lab.html'}", markup=False, highlight=False)


def named(folders: Sequence[str]) -> dict[str, Path]:
    """{name: folder} of paths, or NAME=PATH to show a folder by another name than its own.

    Raises:
        UserError: a folder that is not there, or a name that stands for two.
    """
    result: dict[str, Path] = {}
    for text in folders:
        name, equals, path = text.partition("=")
        folder = Path(path if equals else text)
        name = name if equals else folder.resolve().name
        if not (folder / store.ROLLOUTS).exists():
            raise UserError(f"{folder} is no folder of `vlnorm-verl lab run`: it has no {store.ROLLOUTS}")
        if name in result:
            raise UserError(
                f"{name!r} names both {result[name]} and {folder}: give one another name with NAME={folder}"
            )
        result[name] = folder
    return result


def choices(folder: Path) -> list[str]:
    """The choices of parameters whose gradients are in a lab's folder."""
    folders = sorted(path.parent.name for path in (folder / store.GRADIENTS).glob(f"*/{store.SETTINGS}"))
    if not folders:
        raise UserError(f"{folder} has no gradients; `vlnorm-verl lab run` computes them, and goes on where it stopped")
    return folders
