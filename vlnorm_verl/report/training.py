"""The figures of training: what verl logs at each step, lengths of responses, and the aggregation's own metrics.

Not covered: validation accuracy (figures.py). verl's dumps hold texts, not token counts: distributions are in
characters, tokens have verl's own mean, minimum and maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from vlnorm_verl.methods import LineStyle, Method, alpha_color, method_of
from vlnorm_verl.report import curves
from vlnorm_verl.report.curves import Curve, Drawing, Entry, Methods, Series
from vlnorm_verl.report.identity import Setting
from vlnorm_verl.report.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING = {
    "actor/entropy": "entropy, nats a token",
    "response_length/mean": "mean response length, tokens",
    "actor/grad_norm": "gradient norm before clipping",
    "critic/score/mean": "training reward",
}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Line = tuple[str, list[Series], str, LineStyle]  # method key, one series a run, colour, line style


def draw_training(setting: Setting, methods: Methods, smooth: int | None) -> Drawing | None:
    """Entropy, mean response length, gradient norm and training reward over steps: raw thin, trailing mean thick."""
    methods, aside = curves.with_one_alpha(setting, methods)
    window = curves.window_of(methods, smooth)
    panels: dict[str, list[Line]] = {}
    for metric in TRAINING:
        lines = [
            (key, series, method_of(key).color, method_of(key).line)
            for key, runs in methods.items()
            if (series := curves.metric_of(runs, metric))
        ]
        if lines:
            panels[metric] = lines
    if not panels:
        return None
    shown = {key for lines in panels.values() for key, *_ in lines}
    caption = (
        f"As verl logs it at each step. Thin: every run. Thick: trailing mean of {window} steps of the mean over "
        "seeds. Entropy: divided by the sum of the tokens' weights, since verl aggregates it as the loss; a method "
        f"whose sum is not known is left out. A gradient norm has the scale of the method's weights."
        f"{curves.ended_words([methods], panels)}{aside}"
    )
    return _small_multiples(
        {TRAINING[metric]: lines[::-1] for metric, lines in panels.items()},
        window,
        curves.entries_of([key for key in methods if key in shown], setting.family),
        (curves.name_of("training", *setting), curves.titled("Training", setting), caption),
    )


def _draw_smoothed(axes: Axes, series: list[Series], window: int, color: str, line: LineStyle) -> None:
    for steps, values in series:
        if len(steps) == 1:
            axes.plot(steps, values, marker=".", color=color)
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=max(0.15, 0.45 / len(series)))
    curve = curves.curve_of(series)
    if curve is not None and len(curve.steps):
        axes.plot(curve.steps, curves.trailing(curve, window), color=color, linestyle=line, zorder=3)


def _small_multiples(
    panels: dict[str, list[Line]], window: int, entries: list[Entry], words: tuple[str, str, str]
) -> Drawing:
    """A panel for each title. words: name, title and caption of the figure."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 4.5 * columns if columns > 1 else 6.4
    figure, grid = curves.subplots(rows, columns, width, 0.9 + 2.5 * rows)
    for axes, (heading, lines) in zip(grid.flat, panels.items(), strict=False):
        for _, series, color, line in lines:
            _draw_smoothed(axes, series, window, color, line)
        curves.log_if_wide(axes, (values for _, series, _, _ in lines for _, values in series))
        axes.set_title(heading)
        curves.from_step_0(axes)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    name, title, caption = words
    figure.suptitle(title)
    curves.draw_legend(figure, [(text, look._replace(marker="")) for text, look in entries], width)
    return Drawing(figure, name, title, caption)


# ---------------------------------------------------------------------------------------------------------- lengths


def draw_lengths(setting: Setting, methods: Methods) -> Drawing | None:
    """Lengths over training, one column a method: tokens of training responses, characters of validation responses."""
    methods, aside = curves.with_one_alpha(setting, methods)
    tokens = {key: ranges for key, runs in methods.items() if (ranges := _token_range(runs))}
    clipped = {
        key: curve
        for key, runs in methods.items()
        if (curve := curves.curve_of(curves.metric_of(runs, "response_length/clip_ratio"))) and len(curve.steps)
    }
    texts = {key: quantiles for key, runs in methods.items() if (quantiles := _character_quantiles(runs))}
    rows: list[tuple[str, dict[str, Any], Callable[..., None], float]] = [
        ("tokens, training", tokens, _draw_token_range, 1.0),
        ("cut off at the limit", clipped, _draw_share, 0.45),
        ("characters, validation", texts, _draw_quantiles, 1.0),
    ]
    rows = [row for row in rows if row[1]]
    keys = [key for key in methods if any(key in of_methods for _, of_methods, _, _ in rows)]
    if not keys:
        return None
    width = max(6.4, min(2.5 * len(keys), 16.0))
    heights = [height for _, _, _, height in rows]
    figure, grid = curves.subplots(
        len(rows), len(keys), width, 0.7 + 2.4 * sum(heights), sharex=True, sharey="row", height_ratios=heights
    )
    for (words, of_methods, draw, _), axes_row in zip(rows, grid, strict=True):
        for key, axes in zip(keys, axes_row, strict=True):
            if key in of_methods:
                draw(axes, of_methods[key], method_of(key).color)
            axes.set_ylabel(words)
            axes.label_outer()
        if axes_row[0].get_yscale() == "linear":
            curves.from_0(axes_row)
    curves.from_step_0(*grid.flat)
    for axes in grid[:-1].flat:
        axes.set_xlabel("")
    for key, axes in zip(keys, grid[0], strict=True):
        words = curves.method_label(key, setting.family).replace(" + ", " +\n")
        axes.set_title(words, color=method_of(key).color, fontweight="bold")
    title = curves.titled("Response lengths", setting)
    figure.suptitle(title)
    parts = []
    if tokens:
        parts.append(
            "Tokens: mean of the training responses of each step, band from their shortest to their longest, as verl "
            "logs it."
        )
    if clipped:
        parts.append("Cut off: share of training responses that end at the length limit.")
    if texts:
        parts.append(
            "Characters: of the validation responses' text (verl's dumps have no token counts); line: median; bands: "
            "25% to 75% and 5% to 95%."
        )
    return Drawing(figure, curves.name_of("lengths", *setting), title, f"{' '.join(parts)} All seeds together.{aside}")


def _token_range(runs: list[Run]) -> dict[str, Series]:
    """Over the runs: mean of the mean, lowest minimum, highest maximum, at the steps that any run has."""
    ranges: dict[str, Series] = {}
    for name, over_runs in (("mean", np.mean), ("min", np.min), ("max", np.max)):
        at: dict[int, list[float]] = {}
        for steps, values in curves.metric_of(runs, f"response_length/{name}"):
            for step, value in zip(steps, values, strict=True):
                at.setdefault(int(step), []).append(float(value))
        if at:
            steps = np.array(sorted(at))
            ranges[name] = (steps, np.array([over_runs(at[step]) for step in steps]))
    return ranges


def _draw_token_range(axes: Axes, ranges: dict[str, Series], color: str) -> None:
    if "min" in ranges and "max" in ranges:
        steps, of_min, of_max = np.intersect1d(ranges["min"][0], ranges["max"][0], return_indices=True)
        curves.draw_band(axes, steps, ranges["min"][1][of_min], ranges["max"][1][of_max], color, 0.2)
    if "mean" in ranges:
        marker = "o" if len(ranges["mean"][0]) == 1 else ""
        axes.plot(*ranges["mean"], color=color, linewidth=1, marker=marker)
    curves.log_if_wide(axes, (values for _, values in ranges.values()))


def _draw_share(axes: Axes, curve: Curve, color: str) -> None:
    from matplotlib.ticker import PercentFormatter

    marker = "o" if len(curve.steps) == 1 else ""
    axes.plot(curve.steps, curve.mean, color=color, linewidth=1, marker=marker)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _character_quantiles(runs: list[Run]) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps [T] and the quantiles [T, 5] of the lengths of all validation responses of all seeds, in characters."""
    at: dict[int, list[np.ndarray]] = {}
    for run in runs:
        for step, sets in run.validations.items():
            for validation in sets.values():
                if validation.characters is not None and len(validation.characters):
                    at.setdefault(step, []).append(validation.characters)
    if not at:
        return None
    steps = np.array(sorted(at))
    return steps, np.array([np.quantile(np.concatenate(at[step]), QUANTILES) for step in steps])


def _draw_quantiles(axes: Axes, over_steps: tuple[np.ndarray, np.ndarray], color: str) -> None:
    steps, quantiles = over_steps
    curves.draw_band(axes, steps, quantiles[:, 0], quantiles[:, 4], color, 0.18)
    curves.draw_band(axes, steps, quantiles[:, 1], quantiles[:, 3], color, 0.3)
    axes.plot(steps, quantiles[:, 2], color=color, marker="o")


# ------------------------------------------------------------------------------------------------- VL Norm's metrics

VL_NORM: dict[str, dict[str, LineStyle]] = {  # panel: metric of the plugin, line style
    "lengths, tokens: A solid, H dashed": {"length_mean": "-", "length_harmonic_mean": "--"},
    "√(A/H), predicted ratio of CVs": {"variance_ratio": "-"},
    "effective responses of a mini-batch": {"effective_responses": "-"},
    "weights M·N·x: largest solid, smallest dashed": {"weight_max": "-", "weight_min": "--"},
}


def draw_vl_norm(setting: Setting, methods: Methods, smooth: int | None) -> Drawing | None:
    """The metrics that the plugin logs: A and H, √(A/H), effective responses, range of the weights."""

    def look(key: str) -> Method:
        alpha, row = methods[key][0].alpha, method_of(key)._replace(line="-")
        return row if alpha is None else row._replace(color=alpha_color(alpha))

    panels: dict[str, list[Line]] = {
        heading: [
            (key, curves.metric_of(runs, f"actor/vl_norm/{metric}"), look(key).color, line)
            for key, runs in methods.items()
            for metric, line in metrics.items()
        ]
        for heading, metrics in VL_NORM.items()
    }
    logged = {key for lines in panels.values() for key, series, _, _ in lines if series}
    if not logged:
        return None
    shown = {key: runs for key, runs in methods.items() if key in logged}
    window = curves.window_of(shown, smooth)
    caption = (
        "As the plugin logs it, mean of a step's mini-batches. A and H: arithmetic and harmonic mean length; √(A/H): "
        "coefficient of variation of DAPO's or Dr. GRPO's gradient over that of α = 1, if the variance of a response's "
        "gradient is proportional to its length; weights: 1 is the average response's. Thin: every run. Thick: "
        f"trailing mean of {window} steps of the mean over seeds."
    )
    return _small_multiples(
        panels,
        window,
        [(curves.method_label(key, setting.family), look(key)) for key in shown],
        (curves.name_of("vl-norm", *setting), curves.titled("The aggregation's own metrics", setting), caption),
    )
