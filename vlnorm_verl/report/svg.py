"""The page's pictures as SVG of its own, for want of JavaScript and for printing; charts.js draws the same, and more.

Every text is escaped. Colours are CSS: class "m3" is the fourth method, in the dark as on white.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import isfinite
from typing import Any

import numpy as np

from vlnorm_verl.report.charts import Chart, Mean, Panel, by_method, ticks, y_range
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.labels import Look

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 8, 36
FRAME = f'x="{LEFT}" y="{TOP - 6}" width="{WIDTH - LEFT - RIGHT + 6}" height="{HEIGHT - TOP - BOTTOM + 6}"'
DRAWN = 100  # points of a line; the script has all
DIGITS = 4


def plain(number: float) -> str:
    """A tick: 1500, 0.25, 1e-05."""
    return f"{number:.6g}".replace("-", "−")


def panel(shown: Panel, looks: dict[str, Look]) -> str:
    """One panel over steps."""
    means = by_method(shown.series, shown.smooth)
    low, high = y_range(shown, means)
    last = max(float(series.steps[-1]) for series in shown.series) or 1.0

    def x(step: Any) -> Any:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: Any) -> Any:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    grid = [_tick_y(y(tick), plain(tick)) for tick in ticks(low, high)]
    grid += [_tick_x(x(tick), plain(tick)) for tick in ticks(0.0, last)]
    grid.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}">step</text>')
    drawn = [_method(looks[key], mean, shown, key, x, y) for key, mean in means.items()][::-1]
    if shown.target is not None:
        drawn.insert(0, f'<path class="target" d="M{LEFT},{y(shown.target):.1f}H{WIDTH - RIGHT}"/>')
        for mark in shown.marks:
            at_x, at_y = x(mark.step), y(shown.target)
            side = "end" if at_x > 0.8 * WIDTH else "start"
            label_y = min(at_y + (-9 if mark.filled else 20), HEIGHT - BOTTOM - 3)
            drawn.append(
                f'<g class="m{looks[mark.key].place} mark{" filled" if mark.filled else ""}">'
                f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="{5 if mark.filled else 7}"/>'
                f'<text x="{at_x:.1f}" y="{label_y:.1f}" text-anchor="{side}">{escape(mark.label)}</text></g>'
            )
    return (
        f'<svg class="panel" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(shown.title)}">'
        f'<g class="grid">{"".join(grid)}</g><g class="data" clip-path="url(#frame)">{"".join(drawn)}</g></svg>'
    )


def _tick_x(at: float, text: str) -> str:
    return (
        f'<path d="M{at:.1f},{TOP}V{HEIGHT - BOTTOM}"/><text class="x" x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}">'
        f"{text}</text>"
    )


def _tick_y(at: float, text: str) -> str:
    return f'<path d="M{LEFT},{at:.1f}H{WIDTH - RIGHT}"/><text class="y" x="{LEFT - 6}" y="{at + 4:.1f}">{text}</text>'


def _method(look: Look, mean: Mean, shown: Panel, key: str, x: Any, y: Any) -> str:
    """Band, line, and thin line after a seed's end; the seeds where they have no step in common."""
    dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
    if not len(mean.steps):
        seeds = [(x(series.steps), y(series.values)) for series in shown.series if series.key == key]
        return f'<g class="m{look.place}">{"".join(_path(*seed, "thin", dash) for seed in seeds)}</g>'
    kept = np.unique(np.linspace(0, len(mean.steps) - 1, min(DRAWN, len(mean.steps))).round().astype(int))
    steps, of_line, low, high = (x(mean.steps[kept]), *(y(line[kept]) for line in (mean.mean, mean.low, mean.high)))
    parts = []
    if (mean.high > mean.low).any():
        parts.append(_path(np.append(steps, steps[::-1]), np.append(high, low[::-1]), "band"))
    whole = int((kept < mean.whole).sum())
    if whole < len(kept):
        parts.append(_path(steps[whole - 1 :], of_line[whole - 1 :], "thin", dash))
    if whole == 1:
        parts.append(f'<circle cx="{steps[0]:.1f}" cy="{of_line[0]:.1f}" r="3.5"/>')
    parts.append(_path(steps[:whole], of_line[:whole], "line", dash))
    return f'<g class="m{look.place}">{"".join(parts)}</g>'


def _path(x: np.ndarray, y: np.ndarray, kind: str, more: str = "") -> str:
    along = "L".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return f'<path class="{kind}"{more} d="M{along}"/>'


# -------------------------------------------------------------------------------------------------- what the script has


def data(charts: Sequence[Chart], looks: dict[str, Look]) -> dict[str, Any]:
    """What charts.js draws: the panels in their order on the page; x: [steps, tokens, hours] of several series."""
    axes: dict[bytes, int] = {}
    x: list[list[Any]] = []
    panels = []
    for shown in (panel for chart in charts for panel in chart.panels):
        series = []
        for seed in shown.series:
            arrays = (seed.steps, seed.tokens, seed.hours)
            key = b"".join(b"-" if array is None else np.asarray(array, dtype=np.float64).tobytes() for array in arrays)
            if key not in axes:
                axes[key] = len(x)
                x.append([None if array is None else _short(array) for array in arrays])
            series.append([looks[seed.key].place, axes[key], _short(seed.values)])
        marks = [[looks[mark.key].place, mark.step, mark.label, mark.filled] for mark in shown.marks]
        panels.append({"smooth": shown.smooth, "target": shown.target, "marks": marks, "series": series})
    frame = [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM]
    methods = [{"label": look.label, "dash": look.dash} for look in looks.values()]
    return {"frame": frame, "methods": methods, "x": x, "panels": panels}


def _short(array: np.ndarray) -> list[float | int]:
    numbers = (float(f"{value:.{DIGITS}g}") if value < 1e4 else round(float(value)) for value in array)
    return [int(number) if number == int(number) else number for number in numbers]


# ---------------------------------------------------------------------------------------------------------- differences


def axis_limit(cells: Sequence[Any]) -> float:
    """How far from 0 an axis of differences goes: all values, and of wide intervals at most thrice the largest."""
    found = [cell for cell in cells if isinstance(cell, Estimate) and isfinite(cell.value)]
    values = max((abs(cell.value) for cell in found), default=0.0)
    ends = max((abs(end) for cell in found for end in (cell.low, cell.high) if isfinite(end)), default=0.0)
    return 1.08 * max(values, min(ends, 3 * values) if values else ends) or 1.0


def difference(cell: Any, limit: float) -> str:
    """A difference and its interval on an axis from −limit to limit, as wide as the page has room."""
    if not isinstance(cell, Estimate) or not isfinite(cell.value):
        return ""

    def at(value: float) -> str:
        return f"{50 + 50 * max(-1.0, min(1.0, value / limit)):.1f}%"

    line = ""
    if isfinite(cell.low):
        line = f'<line class="interval" x1="{at(cell.low)}" x2="{at(cell.high)}" y1="9" y2="9"/>'
    return (
        f'<svg class="difference {cell.state.replace(" ", "-")}" role="img" aria-label="{cell.state}">'
        f'<line class="zero" x1="50%" x2="50%" y1="0" y2="18"/>{line}'
        f'<circle cx="{at(cell.value)}" cy="9" r="4.5"/></svg>'
    )


def difference_axis(limit: float) -> str:
    """The axis of those differences: 0 and both ends."""
    half = [*ticks(0.0, limit, 3)][-1]
    marks = "".join(
        f'<text x="{50 + 50 * value / limit:.1f}%" y="11">{plain(value)}</text>' for value in (-half, 0.0, half)
    )
    return f'<svg class="difference axis" aria-hidden="true">{marks}</svg>'
