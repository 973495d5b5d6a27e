"""The lab's figures: the paper's Figures 1 (right), 4 and 5 as measured, and which α.

Covered: what is drawn, with nothing where a number is lost in noise. Not covered: the numbers (analysis.py), style and
files (vlnorm_verl/report/style.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlnorm_verl.lab.aggregations import ALPHAS, COMPARED, LEAST_VARIANCE, Tradeoff
from vlnorm_verl.lab.analysis import Analysis, of_most_parameters
from vlnorm_verl.lab.jackknife import LOST
from vlnorm_verl.lab.length_means import PAIRS, THIRDS
from vlnorm_verl.lab.slopes import Slope
from vlnorm_verl.methods import alpha_color, alpha_of, label_of, method_of
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.style import Figure, figure_text, render, use_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 8
PROMPT_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
BIAS_COLOR, VARIANCE_COLOR, ERROR_COLOR = "#D55E00", "#0072B2", "#000000"


def figures(analyses: Sequence[Analysis]) -> list[Figure]:
    """All figures, the overview first; one without anything to show is left out."""
    main = of_most_parameters(analyses)
    made: list[Figure] = []
    with use_style():
        made.append(overview(main))
        made += [deviations(analysis) for analysis in analyses if analysis.slopes]
        made.append(methods(main))
        made.append(alpha(main))
        if any(analysis.thirds for analysis in main):
            made.append(thirds(main))
        if any(analysis.growth for analysis in main):
            made.append(growth(main))
    return made


def stem(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "model"


def grid(rows: int, columns: int, width: float = 3.6, height: float = 2.9, **options: Any) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **options)


def title(analysis: Analysis) -> str:
    return figure_text(f"{analysis.name} ({analysis.gradients})")


def color_of(mode: str) -> str:
    """As everywhere; VL Norm's α by shades."""
    alpha = alpha_of(mode)
    return method_of(mode).color if alpha is None else alpha_color(alpha)


def bar(axes: Axes, x: float, estimate: Estimate, **style: Any) -> None:
    """A point with its interval, where there is one."""
    if not math.isfinite(estimate.value):
        return
    ends = (estimate.value - estimate.low, estimate.high - estimate.value)
    error = [[end] for end in ends] if all(map(math.isfinite, ends)) else None
    axes.errorbar([x], [estimate.value], yerr=error, capsize=2.5, **style)


def overview(main: Sequence[Analysis]) -> Figure:
    """One row a model: deviation against length, noise of the aggregations, error against α."""
    canvas, axes = grid(len(main), 3, 4.0, 3.1)
    for row, analysis in zip(axes, main, strict=True):
        if analysis.slope:
            draw_deviations(row[0], analysis.slope)
        row[0].set_title(title(analysis))
        draw_noise(row[1], analysis)
        row[1].set_title(f"noise of a mini-batch of {analysis.drawn} responses")
        draw_tradeoff(row[2], analysis.tradeoffs[-1])
        row[2].set_title(f"error against α, mini-batch of {analysis.tradeoffs[-1].responses}")
    return render(
        canvas,
        "overview",
        "Growth of variance, noise of the aggregations, error against α",
        "Left: squared deviation of a response's gradient from its prompt's mean (the other responses) against its "
        "length, one colour a prompt, on their common level; black: means of bins, line: fitted to the mean, β with "
        "its interval. Middle: standard deviation of the aggregated gradient for a given sum of weights, over that of "
        "VL Norm with α = 1; crosses: closed forms with variance ∝ L, plus signs: ∝ L^β. Right: bias², variance and "
        "their sum in units of ‖E G‖²; band: 95% interval of the sum; shaded: α that the data do not tell from the "
        "best.",
    )


def draw_deviations(axes: Axes, slope: Slope) -> None:
    beta = slope.interval
    exponent = beta.value if math.isfinite(beta.value) else 1.0
    # β is fitted with a constant for each prompt; for bins and one line the prompts are put on their common level.
    constants = [(d / lengths**exponent).mean() for lengths, d in slope.points]
    level = float(np.exp(np.mean(np.log(constants))))
    levelled = [(lengths, d * level / c) for (lengths, d), c in zip(slope.points, constants, strict=True)]
    for k, (lengths, d) in enumerate(levelled):
        axes.plot(lengths, d, ".", color=PROMPT_COLORS[k % len(PROMPT_COLORS)], alpha=0.35, markersize=3)
    x = np.concatenate([lengths for lengths, _ in levelled])
    y = np.concatenate([d for _, d in levelled])
    edges = np.unique(np.quantile(x, np.linspace(0, 1, BINS + 1)))
    bins = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    means = [(x[bins == b].mean(), y[bins == b].mean()) for b in range(len(edges) - 1) if (bins == b).any()]
    axes.plot(*zip(*means, strict=True), "ko", markersize=4)
    if math.isfinite(beta.value):
        line = np.geomspace(x.min(), x.max(), 50)
        axes.plot(line, level * line**beta.value, color="black", linewidth=1.2)
        known = f" [{beta.low:.2f}, {beta.high:.2f}]" if math.isfinite(beta.low) else ""
        axes.text(0.03, 0.97, f"β = {beta.value:.2f}{known}", transform=axes.transAxes, va="top")
    axes.set(xscale="log", yscale="log", xlabel="response length, tokens", ylabel="‖g − E g‖²")


def deviations(analysis: Analysis) -> Figure:
    """The paper's Figure 4: parts in columns; A = 1 above, real advantages below."""
    prompts, responses = analysis.slope_prompts
    parts = list(dict.fromkeys(slope.part for slope in analysis.slopes))
    kinds = [kind for kind in (True, False) if any(slope.score_only is kind for slope in analysis.slopes)]
    canvas, axes = grid(len(kinds), len(parts), sharex=True)
    for row, kind in zip(axes, kinds, strict=True):
        for panel, part in zip(row, parts, strict=True):
            slope = next((s for s in analysis.slopes if s.part == part and s.score_only is kind), None)
            panel.set_title(f"{part}, {'A = 1' if kind else 'advantages'}")
            if slope:
                draw_deviations(panel, slope)
    canvas.suptitle(title(analysis))
    return render(
        canvas,
        f"deviations-{stem(analysis.name)}-{stem(analysis.gradients)}",
        f"‖g_i − E g_i‖² against L_i: {analysis.name}, {analysis.gradients}",
        f"The paper's Figure 4 on {prompts} prompts with {responses} responses each, one colour a prompt; E g_i "
        "is the mean of the prompt's other responses. Prompts are put on their common level. Black: means of bins; "
        "line: fitted to the mean, β with the wider of its two 95% intervals. A prompt whose responses all have one "
        "reward has no advantages and is left out.",
    )


def draw_noise(axes: Axes, analysis: Analysis) -> None:
    for k, method in enumerate(analysis.methods):
        color = color_of(method.mode)
        if method.mode == LEAST_VARIANCE:
            axes.plot([k], [1.0], marker=method_of(method.mode).marker, color=color, linestyle="none")
        else:
            bar(axes, k, method.noise, fmt=method_of(method.mode).marker, color=color)
        axes.plot([k + 0.22], [method.noise_predicted], "x", color="#555555")
        if math.isfinite(method.noise_by_beta):
            axes.plot([k + 0.36], [method.noise_by_beta], "+", color="#555555", markersize=6)
    axes.axhline(1.0, color="#999999", linewidth=0.8)
    axes.set_xticks(
        range(len(analysis.methods)), [short_label(method.mode) for method in analysis.methods], rotation=30, ha="right"
    )
    axes.set_ylabel("noise / noise of VL Norm (α = 1)")


def short_label(mode: str) -> str:
    return label_of(mode).replace("VL Norm (α = ", "VL α=").removesuffix(")").replace(" Norm", "")


def methods(main: Sequence[Analysis]) -> Figure:
    """Noise and coefficient of variation of each aggregation, predicted and measured."""
    canvas, axes = grid(len(main), 2, 4.4, 3.0)
    for row, analysis in zip(axes, main, strict=True):
        draw_noise(row[0], analysis)
        row[0].set_title(title(analysis))
        for k, method in enumerate(analysis.methods):
            bar(row[1], k, method.cv, fmt=method_of(method.mode).marker, color=color_of(method.mode))
            if math.isfinite(method.cv_predicted):
                row[1].plot([k + 0.22], [method.cv_predicted], "x", color="#555555")
        if not any(math.isfinite(method.cv.value) for method in analysis.methods):
            row[1].text(0.5, 0.5, "the mean gradient is lost in noise", transform=row[1].transAxes, ha="center")
        labels = [short_label(method.mode) for method in analysis.methods]
        row[1].set_xticks(range(len(analysis.methods)), labels, rotation=30, ha="right")
        row[1].set(ylabel="√(E‖G − E G‖²) / ‖E G‖", title=f"CV of a mini-batch of {analysis.drawn} responses")
    return render(
        canvas,
        "methods",
        "Noise and coefficient of variation of the aggregated gradient",
        "The paper's Figure 5 and Table 1, measured with real advantages. Markers: measured, 95% intervals; crosses: "
        "closed forms with variance ∝ L; plus signs: ∝ L^β. Left: for a given sum of weights, over VL Norm with α = 1.",
    )


def draw_tradeoff(axes: Axes, trade: Tradeoff) -> None:
    bias, variance, error = (np.array([e.value for e in part]) for part in (trade.bias, trade.variance, trade.error))
    if not np.isfinite(error).any():
        axes.text(0.5, 0.5, "the mean gradient is lost in noise", transform=axes.transAxes, ha="center")
        return
    axes.plot(ALPHAS, bias, "--", color=BIAS_COLOR, label="bias²")
    axes.plot(ALPHAS, variance, ":", color=VARIANCE_COLOR, label="variance")
    axes.plot(ALPHAS, error, color=ERROR_COLOR, label="error")
    low, high = np.array([e.low for e in trade.error]), np.array([e.high for e in trade.error])
    band = np.isfinite(low) & np.isfinite(high)
    axes.fill_between(ALPHAS, low, high, where=band.tolist(), color=ERROR_COLOR, alpha=0.12, linewidth=0)
    if math.isfinite(trade.best):
        axes.axvspan(*trade.among, color="#009E73", alpha=0.12, linewidth=0)
        axes.axvline(trade.best, color="#009E73", linewidth=1.0)
    axes.set(xlabel="α", ylabel="in units of ‖E G‖²", ylim=(np.nanmin([0.0, *bias]), 1.6 * np.nanmax(error)))
    axes.legend()


def alpha(main: Sequence[Analysis]) -> Figure:
    """Bias, variance and error against α, for each size of the mini-batch."""
    canvas, axes = grid(len(main), max(len(analysis.tradeoffs) for analysis in main), 4.2, 3.0)
    for row, analysis in zip(axes, main, strict=True):
        for panel, trade in zip(row, analysis.tradeoffs, strict=False):
            draw_tradeoff(panel, trade)
            panel.set_title(f"{title(analysis)}, mini-batch of {trade.responses}")
        for panel in row[len(analysis.tradeoffs) :]:
            panel.set_visible(False)
    return render(
        canvas,
        "alpha",
        "Which α",
        "VL Norm(α) about the mean gradient of Dr. GRPO Norm (α = 0). Line: α of least error; shaded: those that the "
        "data do not tell from it; grey band: 95% interval of the error. A larger mini-batch has less variance and no "
        "less bias, so it wants a smaller α if E[g | L] depends on the length.",
    )


def thirds(main: Sequence[Analysis]) -> Figure:
    """Norms of E[g | third] and cosines between them."""
    shown = [(analysis, third) for analysis in main for third in analysis.thirds]
    canvas, axes = grid(len(shown), 2, 4.0, 2.7)
    for row, (analysis, third) in zip(axes, shown, strict=True):
        for k in range(3):
            bar(row[0], k, third.norm[k], fmt="o", color="#0072B2")
            if not math.isfinite(third.norm[k].value):
                row[0].text(k, 0.05, LOST, transform=row[0].get_xaxis_transform(), ha="center", color="#777777")
        labels = [f"{name}\n{length:.0f}" for name, length in zip(THIRDS, third.length, strict=True)]
        row[0].set_xticks(range(3), labels)
        row[0].set(ylabel="‖E[g | third]‖", title=f"{title(analysis)}, {third.where}", xlim=(-0.5, 2.5), ylim=(0, None))
        for k, pair in enumerate(PAIRS):
            bar(row[1], k, third.cosine[pair], fmt="o", color="#0072B2", label="without noise" if k == 0 else None)
            row[1].plot([k + 0.15], [third.plain[pair]], "x", color="#D55E00", label="plain" if k == 0 else None)
            if not math.isfinite(third.cosine[pair].value):
                row[1].text(k, 0.05, LOST, transform=row[1].get_xaxis_transform(), ha="center", color="#777777")
            floor = math.sqrt(max(third.plain[pair[0], pair[0]] * third.plain[pair[1], pair[1]], 0.0))
            row[1].plot([k + 0.3], [floor], "_", color="#D55E00", markersize=12, label="its floor" if k == 0 else None)
        row[1].axhline(1.0, color="#999999", linewidth=0.8)
        row[1].set_xticks(range(3), [f"{THIRDS[a]} –\n{THIRDS[b]}" for a, b in PAIRS])
        row[1].set(
            ylabel="cosine", title="cosine of the means", xlim=(-0.5, 2.6), ylim=(min(-0.4, row[1].get_ylim()[0]), None)
        )
        row[1].legend()
    return render(
        canvas,
        "thirds",
        "What “unbiased” assumes",
        "If E[g | L] were the same for all lengths, norms would be equal and cosines 1. Blue: without the noise's "
        "share, 95% intervals (none where a norm is lost in noise). Orange crosses: plain means of disjoint halves; "
        "orange bars: what they would be for equal means with this noise (geometric mean of the two thirds' own).",
    )


def growth(main: Sequence[Analysis]) -> Figure:
    """‖E G‖ against the mean length of the prompts' responses."""
    shown = [analysis for analysis in main if analysis.growth]
    canvas, axes = grid(1, len(shown), 4.6, 3.4)
    for panel, analysis in zip(axes[0], shown, strict=True):
        for k, mode in enumerate(COMPARED):
            x = [third.length * 1.02 ** (k - len(COMPARED) / 2) for third in analysis.growth]
            color, marker = color_of(mode), method_of(mode).marker
            panel.plot(x, [third.predicted[mode] for third in analysis.growth], color=color, linewidth=0.9, alpha=0.8)
            for at, third in zip(x, analysis.growth, strict=True):
                bar(panel, at, third.norm[mode], fmt=marker, color=color)
            panel.plot([], [], marker=marker, color=color, label=label_of(mode))
        panel.set(
            xscale="log", yscale="log", xlabel="mean response length of the prompts, tokens", title=title(analysis)
        )
        panel.set_ylabel("‖E G‖ over Dr. GRPO's on all prompts")
        lines = [value for third in analysis.growth for value in third.predicted.values()]
        panel.set_ylim(min(lines) / 6, max(lines) * 6)  # an interval may reach down to 0
    canvas.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(shown))
    return render(
        canvas,
        "growth",
        "The mean gradient as lengths grow",
        "Prompts with short, middle and long responses. Lines: M Σx, what the weights do if E g is the same for all; "
        "markers: measured, 95% intervals, none where a norm is lost in noise. GRPO Norm and DAPO Norm shrink the "
        "update as responses grow.",
    )
