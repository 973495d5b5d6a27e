"""What the figures share: curves over seeds with their bands, the words on them, axes, legends and names.

What is averaged over seeds is so at the steps that every seed has; after a seed's end the mean of the others goes on as
a thin line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlnorm_verl.methods import Method, is_vl_norm, label_of, method_of, place_of
from vlnorm_verl.report import measures
from vlnorm_verl.report.estimates import t_half_width
from vlnorm_verl.report.groups import main_vl_norm
from vlnorm_verl.report.identity import Setting
from vlnorm_verl.report.run import Run
from vlnorm_verl.report.style import figure_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

Methods = dict[str, list[Run]]  # method key -> runs, one for each seed
Series = tuple[np.ndarray, np.ndarray]  # steps [T], values [T]
Entry = tuple[str, Method]  # of a legend: label, look

TASKS = {"countdown": "CountDown", "math": "Math"}
FEW_SEEDS = 5  # below that a band is from the lowest to the highest seed


class Drawing(NamedTuple):
    """A figure before it is rendered."""

    figure: MatplotlibFigure
    name: str
    title: str
    caption: str


# ------------------------------------------------------------------------------------------------------------ names


def order(method_key: str) -> tuple[bool, int, str]:
    """VL Norm first, then as in the tables, then the others by name."""
    return not is_vl_norm(method_key), place_of(method_key), method_key


def setting_title(setting: Setting) -> str:
    task = TASKS.get(setting.task, setting.task)
    model = setting.model.upper() if setting.model[:1].isdigit() else setting.model
    return ", ".join(filter(None, (task, model, f"{setting.length} tokens" if setting.length else "")))


def titled(what: str, setting: Setting) -> str:
    return figure_text(": ".join(filter(None, (what, setting_title(setting)))))


def name_of(what: str, *parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(filter(None, (what, *parts)))).rstrip("-")


def method_label(key: str, family: str) -> str:
    return figure_text(label_of(key, family))


def accuracy_label(runs: Iterable[Run]) -> str:
    """Avg@8, or what the runs were validated with; several sets in one number are weighted."""
    runs = list(runs)
    name, (variables, _) = measures.accuracy_name(runs), measures.accuracies_of(runs)
    weighted = any(len(measures.validation_sets([run])) > 1 for run in runs)
    of = f" of {', '.join(sorted(variables))}" if variables - {"acc", name} else ""
    return figure_text(("weighted " if weighted else "") + name + of)


def with_one_alpha(setting: Setting, methods: Methods) -> tuple[Methods, str]:
    """The methods with VL Norm at one α, `groups.main_vl_norm`'s, and the caption's word on it."""
    variants = [key for key in methods if is_vl_norm(key)]
    if len(variants) < 2:
        return methods, ""
    chosen = main_vl_norm(setting, variants)
    kept = {key: runs for key, runs in methods.items() if key == chosen or key not in variants}
    return kept, f" VL Norm at other α: figure {name_of('alpha', *setting)}."


# ----------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """One method over steps. At the T steps that all seeds that have not ended have: mean, and the band's low and high.

    whole: how many of these steps are before any seed's end. apart: every seed, where they have none in common.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int
    whole: int
    apart: list[Series]


def curve_of(series: Sequence[Series]) -> Curve | None:
    """The mean and the band of one series a seed; None if there is no value at all.

    The band is from the lowest to the highest seed, from 5 seeds on Student's 95% interval of the mean.
    """
    finite = [(steps[np.isfinite(values)], values[np.isfinite(values)]) for steps, values in series]
    finite = [(steps, values) for steps, values in finite if len(steps)]
    if not finite:
        return None
    every = np.unique(np.concatenate([steps for steps, _ in finite]))
    table = np.full((len(finite), len(every)), math.nan)  # [S, T]
    for row, (steps, values) in zip(table, finite, strict=True):
        row[np.isin(every, steps)] = values
    ends = np.array([steps[-1] for steps, _ in finite])
    kept = (np.isfinite(table) | (every > ends[:, None])).all(axis=0)
    every, table = every[kept], table[:, kept]
    mean = np.nanmean(table, axis=0)
    if len(finite) < FEW_SEEDS:
        low, high = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
    else:
        half = t_half_width(table)
        low, high = mean - half, mean + half
    whole = int((every <= ends.min()).sum())
    return Curve(every, mean, low, high, len(finite), whole, [] if whole else finite)


def band_words(curves: Iterable[Curve | None]) -> str:
    seeds = {curve.seeds for curve in curves if curve is not None}
    words = []
    if 1 in seeds:
        words.append("one seed: no band")
    if any(1 < count < FEW_SEEDS for count in seeds):
        words.append(f"fewer than {FEW_SEEDS} seeds: mean, band from the lowest to the highest seed")
    if any(count >= FEW_SEEDS for count in seeds):
        words.append(f"{FEW_SEEDS} seeds or more: mean, band its 95% interval over seeds")
    counted = f"{min(seeds)} to {max(seeds)} seeds" if len(seeds) > 1 else f"{max(seeds, default=0)} seeds"
    joined = "; ".join(words)
    return f" {joined[:1].upper()}{joined[1:]}" + (f" ({counted})." if seeds != {1} else ".")


def draw_curve(axes: Axes, curve: Curve, look: Method) -> None:
    color, depth = look.color, 3.0 if look.name == "vl_norm" else 2.0
    axes.plot(
        curve.steps[: curve.whole],
        curve.mean[: curve.whole],
        color=color,
        linestyle=look.line,
        marker=look.marker,
        markevery=max(1, curve.whole // 20),
        zorder=depth,
    )
    if curve.seeds > 1 and len(curve.steps):
        draw_band(axes, curve.steps, curve.low, curve.high, color, 0.18)
    joined = max(0, curve.whole - 1)
    rest = [(curve.steps[joined:], curve.mean[joined:])] if curve.whole < len(curve.steps) else []
    for steps, values in curve.apart or rest:
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.6, zorder=depth)


def draw_band(axes: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, strength: float) -> None:
    if len(x) == 1:  # a band of no width can't be seen
        axes.vlines(x, low, high, color=color, alpha=strength, linewidth=6)
    else:
        axes.fill_between(x, low, high, color=color, alpha=strength, linewidth=0)


def accuracy_of(runs: list[Run]) -> Curve | None:
    return curve_of([measures.accuracy_curve(run) for run in runs])


def series_of(run: Run, metric: str) -> Series:
    """A metric at the steps that have it, the entropy as nats a token; empty where the run has none."""
    values = measures.entropy_per_token(run) if metric == "actor/entropy" else run.metrics.get(metric)
    if values is None:
        return run.steps[:0], np.empty(0)
    return run.steps[np.isfinite(values)], values[np.isfinite(values)]


def metric_of(runs: list[Run], metric: str) -> list[Series]:
    """The metric of each run that has it."""
    return [series for run in runs if len((series := series_of(run, metric))[0])]


def ended_words(compared: Sequence[Methods], metrics: Iterable[str] = ("",)) -> str:
    """The caption's word on seeds that end before another of their method: in accuracy (""), or in a metric."""
    names: dict[str, None] = {}
    for metric in metrics:
        for runs in (runs for methods in compared for runs in methods.values()):
            series = [(run, series_of(run, metric) if metric else measures.accuracy_curve(run)) for run in runs]
            ends = [(run, int(steps[-1])) for run, (steps, _) in series if len(steps)]
            furthest = max((end for _, end in ends), default=0)
            for run, end in ends:
                if end < furthest:
                    which = f"{metric}, " if metric and end < run.steps[-1] else ""
                    names[f"{run.name} ({which}step {end})"] = None
    return f" After a seed's end the mean is of the others: {', '.join(names)}." if names else ""


def window_of(methods: Methods, smooth: int | None) -> int:
    longest = max((len(run.steps) for runs in methods.values() for run in runs), default=0)
    return max(smooth or 3, math.ceil(longest / 50))


def trailing(curve: Curve, window: int) -> np.ndarray:
    return np.asarray(measures.trailing_mean(curve.steps, curve.mean, window))


# ------------------------------------------------------------------------------------------------- axes and legends


def subplots(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[MatplotlibFigure, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)


def draw_legend(figure: MatplotlibFigure, entries: Iterable[Entry], width: float) -> None:
    """One legend for all panels, below them."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.color, linestyle=look.line, marker=look.marker, label=text)
        for text, look in dict.fromkeys(entries)
    ]
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, min(len(handles), int(width / (0.7 + 0.072 * longest))))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3)


def entries_of(keys: Iterable[str], family: str) -> list[Entry]:
    return [(method_label(key, family), method_of(key)) for key in keys]


def from_step_0(*panels: Axes) -> None:
    """Steps on the horizontal axis, the same for all panels."""
    from matplotlib.ticker import MaxNLocator

    last = max((axes.dataLim.x1 for axes in panels if axes.has_data()), default=0.0)
    for axes in panels:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
        if last > 0:
            axes.set_xlim(-0.02 * last, 1.03 * last)


def from_0(panels: Iterable[Axes]) -> None:
    """A vertical axis from 0 for all panels; called when everything is drawn, since it ends the automatic limits."""
    panels = list(panels)
    top = max((axes.dataLim.y1 for axes in panels if axes.has_data()), default=0.0)
    for axes in panels:
        axes.set_ylim(0, 1.05 * top or 1)


def log_if_wide(axes: Axes, values: Iterable[np.ndarray]) -> None:
    """A logarithmic axis for positive values that span more than a factor of 50."""
    everything = np.concatenate([*values, np.empty(0)])
    everything = everything[np.isfinite(everything)]
    if len(everything) and everything.min() > 0 and everything.max() > 50 * everything.min():
        axes.set_yscale("log")
