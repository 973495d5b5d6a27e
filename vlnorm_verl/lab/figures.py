"""The lab's figure: the paper's Figures 4 and 5 as measured, and which α.

Covered: what is drawn, with nothing where a number is lost in noise. Not covered: the numbers (analysis.py), style and
files (vlnorm_verl/report/style.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlnorm_verl.lab.aggregations import ALPHAS, Tradeoff
from vlnorm_verl.lab.analysis import Analysis
from vlnorm_verl.lab.jackknife import LOST
from vlnorm_verl.lab.slopes import Slope
from vlnorm_verl.lab.verdict import interval
from vlnorm_verl.methods import BLACK, GREEN, PALETTE, color_of, label_of, method_of
from vlnorm_verl.report.style import Figure, figure_text, render, use_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 8


def overview(analyses: Sequence[Analysis]) -> Figure:
    """A row for each: deviation against length, noise of the aggregations, alignment against α."""
    import matplotlib.pyplot as plt

    with use_style():
        canvas, axes = plt.subplots(len(analyses), 3, figsize=(12.0, 3.1 * len(analyses)), squeeze=False)
        for row, analysis in zip(axes, analyses, strict=True):
            if analysis.slope:
                draw_deviations(row[0], analysis.slope)
            else:
                draw_no_slope(row[0], analysis)
            row[0].set_title(figure_text(f"{analysis.name} ({analysis.gradients})"))
            draw_noise(row[1], analysis)
            row[1].set_title(f"noise of a mini-batch of {analysis.drawn} responses")
            draw_tradeoff(row[2], analysis.tradeoff)
            row[2].set_title(f"alignment against α, mini-batch of {analysis.tradeoff.responses}")
    return render(
        canvas,
        "overview",
        "Growth of variance, noise of the aggregations, alignment against α",
        "Left: squared deviation of a response's gradient from its prompt's mean (the other responses) against its "
        "length, one colour a prompt, on their common level; black: means of bins, line: fitted to the mean, β with "
        "its interval. Middle: standard deviation of the aggregated gradient for a given sum of weights, over that of "
        "VL Norm with α = 1; crosses: closed forms with variance ∝ L, plus signs: ∝ L^β. Right: alignment with the "
        "mean gradient at α = 0, and its 95% interval; vertical line: the best α; shaded: α that the data do not tell "
        "from it.",
    )


def draw_deviations(axes: Axes, slope: Slope) -> None:
    from scipy.stats import binned_statistic

    beta = slope.interval
    exponent = beta.value if math.isfinite(beta.value) else 1.0
    # β is fitted with a constant for each prompt; for bins and one line the prompts are put on their common level.
    constants = [(d / lengths**exponent).mean() for lengths, d in slope.points]
    level = float(np.exp(np.mean(np.log(constants))))
    levelled = [(lengths, d * level / c) for (lengths, d), c in zip(slope.points, constants, strict=True)]
    for k, (lengths, d) in enumerate(levelled):
        axes.plot(lengths, d, ".", color=PALETTE[k % len(PALETTE)], alpha=0.35, markersize=3)
    x = np.concatenate([lengths for lengths, _ in levelled])
    y = np.concatenate([d for _, d in levelled])
    edges = np.unique(np.quantile(x, np.linspace(0, 1, BINS + 1)))
    axes.plot(*binned_statistic(x, [x, y], bins=edges).statistic, "ko", markersize=4)
    if math.isfinite(beta.value):
        line = np.geomspace(x.min(), x.max(), 50)
        axes.plot(line, level * line**beta.value, color="black", linewidth=1.2)
        axes.text(0.03, 0.97, f"β = {interval(beta)}", transform=axes.transAxes, va="top")
    axes.set(xscale="log", yscale="log", xlabel="response length, tokens", ylabel="‖g − E g‖²")


def draw_no_slope(axes: Axes, analysis: Analysis) -> None:
    said = "no prompt with many responses\nhas rewards and lengths that differ"
    if analysis.slopes:  # of the score alone
        said += ";\nβ with all advantages 1 is in the table on β"
    axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", va="center")
    axes.set(xticks=[], yticks=[])


def draw_noise(axes: Axes, analysis: Analysis) -> None:
    for k, method in enumerate(analysis.methods):
        noise, marker = method.noise, method_of(method.mode).marker
        ends = [[noise.value - noise.low], [noise.high - noise.value]]  # without an end there is no bar
        axes.errorbar([k], [noise.value], yerr=ends, capsize=2.5, fmt=marker, color=color_of(method.mode))
        axes.plot([k + 0.22], [method.noise_predicted], "x", color="#555555")
        axes.plot([k + 0.36], [method.noise_by_beta], "+", color="#555555", markersize=6)
    axes.axhline(1.0, color="#999999", linewidth=0.8)
    axes.set_xticks(
        range(len(analysis.methods)), [short_label(method.mode) for method in analysis.methods], rotation=30, ha="right"
    )
    axes.set_ylabel("noise / noise of VL Norm (α = 1)")


def short_label(mode: str) -> str:
    return label_of(mode).replace("VL Norm (α = ", "VL α=").removesuffix(")").replace(" Norm", "")


def draw_tradeoff(axes: Axes, trade: Tradeoff) -> None:
    value, low, high = np.array([(e.value, e.low, e.high) for e in trade.alignment]).T
    if not np.isfinite(value).any():
        axes.text(0.5, 0.5, (trade.lost or LOST).replace("; ", ";\n"), transform=axes.transAxes, ha="center")
        axes.set(xticks=[], yticks=[])
        return
    axes.plot(ALPHAS, value, color=BLACK)
    axes.fill_between(ALPHAS, low, high, color=BLACK, alpha=0.12, linewidth=0)
    if math.isfinite(trade.best):
        axes.axvspan(*trade.among, color=GREEN, alpha=0.12, linewidth=0)
        axes.axvline(trade.best, color=GREEN, linewidth=1.0)
    axes.set(xlabel="α", ylabel="alignment")
