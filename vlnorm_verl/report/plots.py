"""The page's charts as PNG and SVG files, drawn by matplotlib when `--figures` asks for them: for papers and slides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vlnorm_verl.methods import method_of
from vlnorm_verl.report.charts import Chart, Panel, by_method, y_range
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.labels import Look
from vlnorm_verl.report.style import DOTS, Figure, figure_text, render, use_style
from vlnorm_verl.report.svg import axis_limit
from vlnorm_verl.report.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3


def plots(charts: list[Chart], looks: dict[str, Look], results: Table | None) -> Iterator[Figure]:
    """A figure for each chart, and the differences of the table of results."""
    with use_style():
        if results is not None and results.forest in results.columns:
            yield _differences(results)
        for chart in charts:
            yield _chart(chart, looks)


def _chart(chart: Chart, looks: dict[str, Look]) -> Figure:
    import matplotlib.pyplot as plt

    columns = min(COLUMNS, len(chart.panels))
    rows = math.ceil(len(chart.panels) / columns)
    size = (6.4, 4.2) if columns == 1 else (3.9 * columns, 0.9 + 2.7 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
    keys: dict[str, None] = {}
    for axes, panel in zip(grid.flat, chart.panels, strict=False):
        keys |= dict.fromkeys(_panel(axes, panel, looks))
        axes.set_xlabel("step")
        axes.set_title(figure_text(panel.title))
    for axes in grid.flat[len(chart.panels) :]:
        axes.set_visible(False)
    figure.suptitle(figure_text(chart.title))
    handles = [plt.Line2D([], [], **_line(key, looks[key]), label=figure_text(looks[key].label)) for key in keys]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, int(size[0] // 2.3)), handlelength=3)
    return render(figure, chart.name, chart.title, chart.caption)


def _line(key: str, look: Look) -> dict[str, Any]:
    dashes = tuple(float(part) / 2 for part in look.dash.split())
    return {"color": look.color, "linestyle": (0, dashes) if dashes else "-", "marker": method_of(key).marker}


def _panel(axes: Axes, panel: Panel, looks: dict[str, Look]) -> list[str]:
    means = by_method(panel.series, panel.smooth)
    for key, mean in reversed(means.items()):
        line = _line(key, looks[key])
        thin: dict[str, Any] = {"color": looks[key].color, "linewidth": 0.8}
        if not len(mean.steps):
            for series in (seed for seed in panel.series if seed.key == key):
                axes.plot(series.steps, series.values, **thin)
            continue
        axes.fill_between(mean.steps, mean.low, mean.high, color=looks[key].color, alpha=0.16, linewidth=0)
        every = max(1, mean.whole // 12)
        axes.plot(mean.steps[: mean.whole], mean.mean[: mean.whole], **line, markevery=every)
        axes.plot(mean.steps[mean.whole - 1 :], mean.mean[mean.whole - 1 :], **thin)
    axes.set_ylim(*y_range(panel, means))
    if panel.target is not None:
        axes.axhline(panel.target, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        for mark in panel.marks:
            color, size = looks[mark.key].color, 8 if mark.filled else 12
            face = color if mark.filled else "none"
            axes.plot([mark.step], [panel.target], "o", color=color, markerfacecolor=face, markersize=size, zorder=5)
            axes.annotate(
                mark.label,
                (mark.step, panel.target),
                xytext=(0, 9 if mark.filled else -18),
                textcoords="offset points",
                ha="center",
            )
    return [*means]


def _differences(results: Table) -> Figure:
    """Forest plot: a row a method; filled: established, hollow: open, grey: one seed."""
    import matplotlib.pyplot as plt

    at = results.columns.index(results.forest)
    rows = [(str(row[0]), str(row[1]), row[at]) for row in results.rows]
    drawn = [(*row[:2], row[2]) for row in rows if isinstance(row[2], Estimate) and math.isfinite(row[2].value)]
    settings = list(dict.fromkeys(setting for setting, _, _ in drawn))
    heights = [drawn_at + 1.4 * settings.index(row[0]) for drawn_at, row in enumerate(drawn)]
    figure, axes = plt.subplots(figsize=(7.2, 1.4 + 0.28 * (len(drawn) + 1.4 * len(settings))))
    for height, (_, _, difference) in zip(heights, drawn, strict=True):
        color = "black" if difference.state in ("established", "open") else "#9A9A9A"
        ends = np.array([[difference.value - difference.low], [difference.high - difference.value]])
        face = "white" if difference.state == "open" else color
        xerr = ends if math.isfinite(difference.low) else None
        axes.errorbar(difference.value, height, xerr=xerr, fmt="o", color=color, markerfacecolor=face)
    for setting in settings:
        top = min(height for height, row in zip(heights, drawn, strict=True) if row[0] == setting)
        axes.text(0.0, top - 0.95, figure_text(setting), transform=axes.get_yaxis_transform(), fontweight="bold")
    axes.axvline(0, color="#777777", linewidth=0.9, linestyle=":")
    axes.set_yticks(heights, [figure_text(method) for _, method, _ in drawn])
    axes.set_ylim(max(heights, default=0) + 0.8, -1.8)
    limit = axis_limit([difference for _, _, difference in drawn])
    axes.set_xlim(-limit, limit)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(figure_text(results.forest))
    return render(figure, "differences", results.forest, DOTS)
