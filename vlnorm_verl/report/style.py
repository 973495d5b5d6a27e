"""How figures look, and the PNG and SVG that they become. The same drawing gives the same bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlnorm_verl.files import write
from vlnorm_verl.report.table import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure


# Before matplotlib is imported: of a notebook it names a module that only the notebook's own environment has.
os.environ["MPLBACKEND"] = "Agg"

STYLE = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "figure.titlesize": 11,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    # matplotlib names an SVG's elements by random numbers unless it gets its salt.
    "svg.hashsalt": "vlnorm-verl",
}


# What the dots of drawn differences mean.
DOTS = "Filled: the interval does not reach 0; hollow: open; grey: one seed, which knows problems only, or no interval."


@dataclass
class Figure:
    """A drawn figure. `caption`: sentences that say what is shown, what the band is, what is left out."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str


@contextmanager
def use_style() -> Iterator[None]:
    """matplotlib in the style of the report, without a display."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def figure_text(text: str) -> str:
    """Text that isn't ours for a figure: matplotlib reads "$" as mathematics and hides a label that begins with "_"."""
    text = one_line(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def render(figure: MatplotlibFigure, name: str, title: str, caption: str) -> Figure:
    """The figure as PNG and SVG (its text as text, no date: the same figure gives the same bytes). Closes it."""
    import matplotlib.pyplot as plt

    png, svg = io.BytesIO(), io.BytesIO()
    with use_style():
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.set_layout_engine("none")  # stays as laid out for the PNG: it is slow
        figure.savefig(svg, format="svg", metadata={"Date": None})
        plt.close(figure)
    return Figure(name, title, caption, png.getvalue(), svg.getvalue().decode())


def write_figures(figures: Iterable[Figure], out: Path) -> None:
    """NAME.png and NAME.svg of each, in the folder `out`, which is made."""
    for figure in figures:
        write(out / f"{figure.name}.png", figure.png)
        write(out / f"{figure.name}.svg", figure.svg)
