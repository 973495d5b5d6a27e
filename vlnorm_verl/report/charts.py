"""What is drawn of runs, as data: the page (svg.py, charts.js) and files on request (plots.py) draw the same.

| chart            | one for each         | panels                                                                  |
|------------------|----------------------|-------------------------------------------------------------------------|
| accuracy         | report               | the paper's Figure 3: validation accuracy, one panel a setting          |
| reached-SETTING  | setting with a pair  | the paper's Figure 2: one panel a pair, who is when at the other's end  |
| training-SETTING | setting              | reward, entropy, lengths, gradient norm, the aggregation's own metrics  |

A training metric of more than POINTS steps is drawn by as many means of neighbouring steps. A curve of accuracies is
drawn as it is, and never smoothed.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlnorm_verl.files import UserError
from vlnorm_verl.report import measures
from vlnorm_verl.report.groups import Comparison, Groups, Pair, by_setting, runs_of
from vlnorm_verl.report.identity import Setting
from vlnorm_verl.report.labels import accuracy_label, file_name
from vlnorm_verl.report.read import nearest
from vlnorm_verl.report.run import Run

POINTS = 200
TRAINING = {
    "critic/score/mean": "training reward",
    "actor/entropy": "entropy, nats a token",
    "response_length/mean": "mean response length, tokens",
    "response_length/clip_ratio": "share of responses cut off at the limit",
    "actor/grad_norm": "gradient norm before clipping",
    "actor/vl_norm/variance_ratio": "√(A/H), predicted ratio of CVs",
    "actor/vl_norm/length_harmonic_mean": "harmonic mean length H, tokens",
    "actor/vl_norm/effective_responses": "effective sample size of the weights (Kish)",
    "actor/vl_norm/weight_max": "largest weight N·x/Σx",
}
MEASURED = {  # drawn instead of what verl logs under this name
    "actor/entropy": measures.entropy_per_token,
    "response_length/clip_ratio": measures.cut_off_share,
}
MOST_PLOTTED = 24  # metrics that --plot adds to a setting


class Series(NamedTuple):
    """One seed of a method. steps, values: [T]; tokens, hours: [T] that training had taken, None where not known."""

    key: str
    steps: np.ndarray
    values: np.ndarray
    tokens: np.ndarray | None = None
    hours: np.ndarray | None = None


class Mark(NamedTuple):
    """Where a method is first at the target: a filled mark of the one that reaches, an open one of the other itself."""

    key: str
    step: float
    label: str
    filled: bool


@dataclass(frozen=True)
class Panel:
    """series: one or more, none without a step. smooth: steps of the trailing mean of each seed, 1 for none.

    target: a line across, with marks on it.
    """

    title: str
    series: list[Series]
    smooth: int = 1
    target: float | None = None
    marks: tuple[Mark, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """Panels side by side. name: file stem."""

    name: str
    title: str
    caption: str
    panels: list[Panel]


class Mean(NamedTuple):
    """One method over steps [T]: mean, lowest and highest seed. whole: steps before any seed's end, 1 or more."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    whole: int


def plotted(runs: Sequence[Run], patterns: Sequence[str]) -> list[str]:
    """The metrics that `--plot` asks for ("timing_s/*"), in its order, without those that are drawn anyway.

    Raises:
        UserError: no run has a metric of a pattern.
    """
    logged = sorted({key for run in runs for key in run.metrics})
    found = {pattern: fnmatch.filter(logged, pattern) for pattern in patterns}
    for pattern, metrics in found.items():
        if not metrics:
            raise UserError(f"--plot {pattern}: no run logs it; they log for instance {nearest(pattern, runs)}")
    return [key for key in dict.fromkeys(key for metrics in found.values() for key in metrics) if key not in TRAINING]


def charts(
    compared: Comparison, smooth: int | None = None, plots: Sequence[str] = ()
) -> tuple[list[Chart], dict[Setting, list[Chart]]]:
    """(accuracy, {setting: its other charts}); no chart is without a panel.

    smooth: steps of the trailing mean of training metrics, 1 for none; None for 2% of them.
    plots: further metrics.
    """
    panels = []
    for setting, groups in by_setting(compared.validated).items():
        if series := _accuracy(groups):
            label = accuracy_label(runs_of(groups))
            panels.append(Panel(f"{compared.titles[setting]}: {label}", series))
    caption = (
        "On validation prompts. Line: mean of the seeds; band: from the lowest to the highest seed. Thin line, after a "
        "seed's end: the mean of the others."
    )
    accuracy = Chart("accuracy", "Accuracy over training", caption, panels)
    others = {}
    for setting, groups in by_setting(compared.groups).items():
        drawn = _reached(setting, compared), _training(setting, groups, smooth, plots)
        others[setting] = [chart for chart in drawn if chart.panels]
    return [accuracy] if panels else [], others


def _accuracy(groups: Groups) -> list[Series]:
    return [
        Series(group.key, *curve, *_clock(run, curve[0]))
        for group, runs in groups.items()
        for run in runs
        if len((curve := measures.accuracy_curve(run))[0])
    ]


def _reached(setting: Setting, compared: Comparison) -> Chart:
    pairs = [pair for pair in compared.pairs if pair.higher.setting == setting and pair.hits.pairs]
    caption = (
        "The paper's Figure 2. Dashed: the final accuracy of the lower one. Filled mark: where the higher one first "
        "reaches it; open mark: where the lower one itself first did, since curves are flat at the end and its last "
        "step flatters whoever is compared with it. Each seed's own curve is read, and the mean over seeds marked."
    )
    panels = [_pair(pair, {group: compared.validated[group] for group in (pair.higher, pair.lower)}) for pair in pairs]
    return Chart(
        file_name("reached", *setting),
        "When the higher one reaches the final accuracy of the lower one",
        caption,
        panels,
    )


def _pair(pair: Pair, groups: Groups) -> Panel:
    hits, name, other = pair.hits, pair.higher.label, pair.lower.label
    of_both = (pair.lower.key, hits.reference, False), (pair.higher.key, hits.own, True)
    marks = [Mark(key, hit.first, str(hit), filled) for key, hit, filled in of_both if hit.first is not None]
    words = f"{name} has not reached it" if hits.own.first is None else f"{name} reaches it {hits.when(other)}"
    notes = f" ({hits.note})" if hits.note else ""
    return Panel(
        f"{name} against {other}",
        _accuracy(groups),
        target=hits.target,
        marks=tuple(marks),
        note=f"{words}; {other} itself at {hits.reference}{notes}.",
    )


def _training(setting: Setting, groups: Groups, smooth: int | None, plots: Sequence[str]) -> Chart:
    every = runs_of(groups)
    longest = max((len(run.steps) for run in every), default=0)
    width = max(1, math.ceil(max((run.steps[-1] for run in every if len(run.steps)), default=1) / POINTS))
    window = max(1, round((smooth or max(3, math.ceil(longest / 50))) / width)) * width
    asked = [key for key in plots if any(key in run.metrics for run in every)]
    panels = []
    for metric, heading in (TRAINING | {key: key for key in asked[:MOST_PLOTTED]}).items():
        series = [
            binned
            for group, runs in groups.items()
            for run in runs
            if (binned := _binned(group.key, run, metric, width)) is not None
        ]
        panels += [Panel(heading, series, window)] if series else []
    mean = f"trailing mean of {window} steps, then " if window > width else ""
    caption = (
        f"As verl logs it at each step{f', in means of {width} steps' if width > 1 else ''}. Line: {mean}mean over the "
        f"seeds; band: from the lowest to the highest {'smoothed ' if mean else ''}seed. The axis has 1% to 99% of the "
        "values: a spike beyond is cut off, and dragging over it shows it. Entropy: divided by the sum "
        "of the tokens' weights, since verl aggregates it as the loss; a method whose sum is not known is left out. A "
        "gradient norm has the scale of the method's weights. √(A/H): coefficient of variation of DAPO's or Dr. GRPO's "
        "gradient over that of α = 1, if variance is proportional to length."
    )
    if len(asked) > MOST_PLOTTED:
        caption += f" --plot asked for {MOST_PLOTTED} metrics of these and {len(asked) - MOST_PLOTTED} more."
    return Chart(file_name("training", *setting), "Training", caption, panels)


def _binned(key: str, run: Run, metric: str, width: int) -> Series | None:
    """A metric's means over bins of `width` steps, at the bins' middles; None where the run has no value of it."""
    of = MEASURED.get(metric)
    values = of(run) if of else run.metrics.get(metric)
    if values is None or not (has := np.isfinite(values) & (run.steps > 0)).any():
        return None
    bins = (run.steps[has] - 1) // width
    each, index = np.unique(bins, return_inverse=True)
    means = np.bincount(index, values[has]) / np.bincount(index)
    last = np.searchsorted(bins, each, side="right") - 1  # the clock stands as at the last step of the bin
    clock = [None if taken is None else taken[last] for taken in _clock(run, run.steps[has])]
    return Series(key, each * width + (width + 1) / 2, means, *clock)


def _clock(run: Run, steps: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(tokens, hours) that training had taken at these steps; a step without a record counts as the mean one."""
    found: list[np.ndarray | None] = []
    for metric, unit in (("perf/total_num_tokens", 1.0), ("perf/time_per_step", 3600.0)):
        each = run.metrics.get(metric, np.full(run.steps.shape, math.nan))
        known = np.isfinite(each) & (run.steps > 0)
        if run.late_start is not None or not known.any():
            found.append(None)
            continue
        sums = np.concatenate([[0.0], np.cumsum(each[known])])
        records = np.searchsorted(run.steps[known], steps, side="right")
        found.append((sums[records] + (steps - records) * each[known].mean()) / unit)
    return found[0], found[1]


# ------------------------------------------------------------------------------------------------------- over seeds


def by_method(series: Iterable[Series], smooth: int = 1) -> dict[str, Mean]:
    """The mean and the range of each method's seeds, each smoothed before."""
    methods: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for seed in series:
        values = measures.trailing_mean(seed.steps, seed.values, smooth) if smooth > 1 else seed.values
        methods.setdefault(seed.key, []).append((seed.steps, values))
    return {key: mean_of(seeds) for key, seeds in methods.items()}


def mean_of(seeds: Sequence[tuple[np.ndarray, np.ndarray]]) -> Mean:
    """Over (steps, values) of seeds, at the steps that all seeds that have not ended have; empty if there is none."""
    every = np.unique(np.concatenate([steps for steps, _ in seeds]))
    table = np.full((len(seeds), len(every)), math.nan)  # [S, T]
    for row, (steps, values) in zip(table, seeds, strict=True):
        row[np.isin(every, steps)] = values
    ends = np.array([steps[-1] for steps, _ in seeds])
    kept = (np.isfinite(table) | (every > ends[:, None])).all(axis=0)
    every, table = every[kept], table[:, kept]
    whole = int((every <= ends.min()).sum())
    if not whole:
        return Mean(every[:0], np.empty(0), np.empty(0), np.empty(0), 0)
    return Mean(every, np.nanmean(table, axis=0), np.nanmin(table, axis=0), np.nanmax(table, axis=0), whole)


def y_range(panel: Panel, means: Mapping[str, Mean]) -> tuple[float, float]:
    """Of the axis: from the 1% to the 99% quantile of what is drawn, and the target, with a margin."""
    ranges = [part for mean in means.values() for part in (mean.low, mean.high)]
    alone = [series.values for series in panel.series if not len(means[series.key].steps)]  # drawn seed by seed
    values = np.concatenate([*ranges, *alone])
    outer = 0.01 if len(values) > 50 else 0.0
    low, high = float(np.quantile(values, outer)), float(np.quantile(values, 1 - outer))
    if panel.target is not None:
        low, high = min(low, panel.target), max(high, panel.target)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return (low - margin if low < 0 or low - margin > 0 else 0.0), high + margin


def ticks(low: float, high: float, count: int = 5) -> Iterator[float]:
    """About `count` round numbers from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next((times for times in (1, 2, 2.5, 5) if (high - low) / (step * times) <= count), 10)
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield index * step
