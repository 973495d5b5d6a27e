"""The report's figures, drawn from runs: the paper's Figures 2 and 3, and what verl logs of training.

| figure           | one for each            | shows                                                                 |
|------------------|-------------------------|-----------------------------------------------------------------------|
| fig2-SETTING     | setting with VL Norm    | validation accuracy of VL Norm and a reference, and who is when there |
| fig3-FAMILY      | family                  | validation accuracy of each method: rows task and model, columns length |
| training-SETTING | setting                 | entropy, response length, gradient norm, training reward              |
| lengths-SETTING  | setting                 | distribution of lengths over training                                 |
| vl-norm-SETTING  | setting that logs them  | the aggregation's own metrics                                         |
| alpha-SETTING    | setting with several α  | accuracy over steps and against α                                     |

A figure without runs for it isn't drawn. One method has one colour in all of them. What is averaged over seeds is so
at the steps that every seed has; after a seed's end the mean of the others goes on as a thin line.

Not covered: numbers (measures.py) and how a figure looks and becomes a file (output.py). verl's dumps hold texts, not
token counts: distributions are in characters, tokens have verl's own mean, minimum and maximum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlnorm_verl.report import measures
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.output import (
    METHOD_COLORS,
    Figure,
    alpha_color,
    figure_text,
    method_color,
    method_label,
    method_line_style,
    method_marker,
    method_name,
    render,
    use_style,
)
from vlnorm_verl.report.runs import Run, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

Methods = dict[str, list[Run]]  # method key -> runs, one for each seed
Series = tuple[np.ndarray, np.ndarray]  # steps [T], values [T]

REFERENCES = ("dapo", "dapo_norm")
TASKS = {"countdown": "CountDown", "math": "Math"}
FEW_SEEDS = 5  # below that a band is from the lowest to the highest seed
TRAINING = {
    "actor/entropy": "entropy, nats a token",
    "response_length/mean": "mean response length, tokens",
    "actor/grad_norm": "gradient norm before clipping",
    "critic/score/mean": "training reward",
}
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Drawing(NamedTuple):
    figure: MatplotlibFigure
    name: str
    title: str
    caption: str


def figures(runs: list[Run], smooth: int | None = None, baseline: str = "") -> list[Figure]:
    """Every figure that there are runs for.

    Args:
        runs: in any order, of any settings.
        smooth: steps of the trailing mean of training metrics, if that is more than 2% of them.
        baseline: the method that others are compared with.
    """
    with use_style():
        return [render(*drawing) for drawing in drawings(runs, smooth, baseline)]


def drawings(runs: list[Run], smooth: int | None = None, baseline: str = "") -> Iterator[Drawing]:
    """The figures before they are rendered, one at a time; call it within `output.use_style`."""
    settings: dict[Setting, Methods] = {}
    for (setting, key), seeds in measures.grouped(runs).items():
        settings.setdefault(setting, {})[key] = seeds
    settings = {
        setting: {key: methods[key] for key in sorted(methods, key=_order)} for setting, methods in settings.items()
    }
    yield from _some(draw_reached(setting, methods, baseline) for setting, methods in settings.items())
    families: dict[tuple[str, str], dict[Setting, Methods]] = {}
    for setting, methods in settings.items():
        families.setdefault((setting.family, setting.scale), {})[setting] = methods
    yield from _some(draw_accuracies(group) for group in families.values())
    for setting, methods in settings.items():
        yield from _some(
            (
                draw_training(setting, methods, smooth),
                draw_lengths(setting, methods),
                draw_vl_norm(setting, methods, smooth),
                draw_alpha(setting, methods),
            )
        )


def _some(drawn: Iterable[Drawing | None]) -> Iterator[Drawing]:
    return (one for one in drawn if one is not None)


# ------------------------------------------------------------------------------------------------------------ names


def _order(method_key: str) -> tuple[int, str]:
    """VL Norm first, then as the paper lists them, then the others by name."""
    methods = list(METHOD_COLORS)
    method = method_name(method_key)
    return (methods.index(method) if method in methods else len(methods), method_key)


def _setting_title(setting: Setting) -> str:
    task = TASKS.get(setting.task, setting.task)
    if setting.scale == "cpu":
        recipe = " ".join(filter(None, (setting.model, setting.length)))
        return ", ".join(filter(None, (task, "tiny model" + (f" (recipe {recipe})" if recipe else ""))))
    length = f"{setting.length} tokens" if setting.length else ""
    return ", ".join(filter(None, (task, setting.model.upper(), length)))


def _titled(what: str, setting: Setting) -> str:
    return figure_text(": ".join(filter(None, (what, _setting_title(setting)))))


def _name(what: str, *parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(filter(None, (what, *parts)))).rstrip("-")


def _label(key: str, family: str) -> str:
    return figure_text(method_label(key, family))


def _accuracy_name(runs: Iterable[Run]) -> str:
    """Avg@8, or what the runs were validated with; several sets in one number are weighted."""
    runs = list(runs)
    name, (variables, _) = measures.accuracy_name(runs), measures.accuracies_of(runs)
    weighted = any(len(measures.validation_sets([run])) > 1 for run in runs)
    of = f" of {', '.join(sorted(variables))}" if variables - {"acc", name} else ""
    return figure_text(("weighted " if weighted else "") + name + of)


def _is_vl_norm(key: str) -> bool:
    return method_name(key) == "vl_norm"


def _alpha(runs: list[Run]) -> float | None:
    return runs[0].alpha


def _compared(setting: Setting, methods: Methods) -> tuple[Methods, str]:
    """The methods with VL Norm at one α, `measures.main_vl_norm`'s, and the caption's word on it."""
    variants = [key for key in methods if _is_vl_norm(key)]
    if len(variants) < 2:
        return methods, ""
    chosen = measures.main_vl_norm(setting, variants)
    kept = {key: runs for key, runs in methods.items() if key == chosen or key not in variants}
    return kept, f" VL Norm at other α: figure {_name('alpha', *setting)}."


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


def over_seeds(series: Sequence[Series]) -> Curve | None:
    """The mean and the band of one series a seed; None if there is no value at all.

    The band is from the lowest to the highest seed, from 5 seeds on Student's 95% interval of the mean.
    """
    finite = [(steps[np.isfinite(values)], values[np.isfinite(values)]) for steps, values in series]
    finite = [one for one in finite if len(one[0])]
    if not finite:
        return None
    every = np.unique(np.concatenate([steps for steps, _ in finite]))
    table = np.full((len(finite), len(every)), math.nan)  # [S, T]
    for row, (steps, values) in zip(table, finite, strict=True):
        row[np.isin(every, steps)] = values
    ends = np.array([steps[-1] for steps, _ in finite])
    kept = (np.isfinite(table) | (every > ends[:, None])).all(axis=0)
    every, table = every[kept], table[:, kept]
    count, mean = np.isfinite(table).sum(axis=0), np.nanmean(table, axis=0)
    if len(finite) < FEW_SEEDS:
        low, high = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
    else:
        from scipy.stats import t

        several = np.maximum(count, 2)
        spread = np.sqrt(np.nansum((table - mean) ** 2, axis=0) / (several - 1))
        half = t.ppf(0.975, several - 1) * spread / np.sqrt(several)
        low, high = mean - half, mean + half
    whole = int((every <= ends.min()).sum())
    return Curve(every, mean, low, high, len(finite), whole, [] if whole else finite)


def _band_words(curves: Iterable[Curve | None]) -> str:
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


def _draw_curve(axes: Axes, curve: Curve, key: str, color: str = "", line_style: Any = None) -> None:
    color, line_style = color or method_color(key), line_style or method_line_style(key)
    depth = 3.0 if _is_vl_norm(key) else 2.0
    axes.plot(
        curve.steps[: curve.whole],
        curve.mean[: curve.whole],
        color=color,
        linestyle=line_style,
        marker=method_marker(key),
        markevery=max(1, curve.whole // 20),
        zorder=depth,
    )
    if curve.seeds > 1 and len(curve.steps):
        _draw_band(axes, curve.steps, curve.low, curve.high, color, 0.18)
    joined = max(0, curve.whole - 1)
    rest = [(curve.steps[joined:], curve.mean[joined:])] if curve.whole < len(curve.steps) else []
    for steps, values in curve.apart or rest:
        axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.6, zorder=depth)


def _draw_band(axes: Axes, x: np.ndarray, low: np.ndarray, high: np.ndarray, color: str, strength: float) -> None:
    if len(x) == 1:  # a band of no width can't be seen
        axes.vlines(x, low, high, color=color, alpha=strength, linewidth=6)
    else:
        axes.fill_between(x, low, high, color=color, alpha=strength, linewidth=0)


def _accuracy(runs: list[Run]) -> Curve | None:
    return over_seeds([measures.accuracy_curve(run) for run in runs])


def _series(run: Run, metric: str) -> Series:
    """A metric at the steps that have it, the entropy as nats a token; empty where the run has none."""
    values = measures.entropy_per_token(run) if metric == "actor/entropy" else run.metrics.get(metric)
    there = np.isfinite(values) if values is not None else np.zeros(len(run.steps), dtype=bool)
    return run.steps[there], values[there] if values is not None else np.empty(0)


def _metric(runs: list[Run], metric: str) -> list[Series]:
    """The metric of each run that has it."""
    return [one for run in runs if len((one := _series(run, metric))[0])]


def _ended(methods: Methods, metric: str = "") -> list[str]:
    """The seeds that end before another of their method, and where: in accuracy, or in a metric."""
    found = []
    for runs in methods.values():
        series = [(run, _series(run, metric) if metric else measures.accuracy_curve(run)) for run in runs]
        ends = [(run, int(steps[-1])) for run, (steps, _) in series if len(steps)]
        furthest = max((end for _, end in ends), default=0)
        for run, end in ends:
            if end < furthest:
                found.append(f"{run.name} ({f'{metric}, ' if metric and end < run.steps[-1] else ''}step {end})")
    return found


def _ended_words(ended: Iterable[str]) -> str:
    names = ", ".join(dict.fromkeys(ended))
    return f" After a seed's end the mean is of the others: {names}." if names else ""


def _window(methods: Methods, smooth: int | None) -> int:
    longest = max((len(run.steps) for runs in methods.values() for run in runs), default=0)
    return max(smooth or 3, math.ceil(longest / 50))


def _trailing(curve: Curve, window: int) -> np.ndarray:
    return np.asarray(measures.trailing_mean(curve.steps, curve.mean, window))


# --------------------------------------------------------------------------------------------------------- drawing


def _subplots(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[MatplotlibFigure, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)


def _legend(figure: MatplotlibFigure, entries: Iterable[tuple[str, str, Any, str]], width: float) -> None:
    """One legend for all panels, below them; entries are label, colour, line style and marker."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, linestyle=line, marker=marker, label=label)
        for label, color, line, marker in dict.fromkeys(entries)
    ]
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        columns = max(1, min(len(handles), int(width / (0.7 + 0.072 * longest))))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3)


def _entries(keys: Iterable[str], family: str) -> list[tuple[str, str, Any, str]]:
    return [(_label(key, family), method_color(key), method_line_style(key), method_marker(key)) for key in keys]


def _from_step_0(*panels: Axes) -> None:
    """Steps on the horizontal axis, the same for all panels."""
    from matplotlib.ticker import MaxNLocator

    last = max((axes.dataLim.x1 for axes in panels if axes.has_data()), default=0.0)
    for axes in panels:
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True))
        if last > 0:
            axes.set_xlim(-0.02 * last, 1.03 * last)


def _from_0(panels: Iterable[Axes]) -> None:
    """A vertical axis from 0 for all panels; called when everything is drawn, since it ends the automatic limits."""
    panels = list(panels)
    top = max((axes.dataLim.y1 for axes in panels if axes.has_data()), default=0.0)
    for axes in panels:
        axes.set_ylim(0, 1.05 * top or 1)


def _log_if_wide(axes: Axes, values: Iterable[np.ndarray]) -> None:
    """A logarithmic axis for positive values that span more than a factor of 50."""
    everything = np.concatenate([*values, np.empty(0)])
    everything = everything[np.isfinite(everything)]
    if len(everything) and everything.min() > 0 and everything.max() > 50 * everything.min():
        axes.set_yscale("log")


# ------------------------------------------------------------------------------------------------- the paper's Fig. 2


def draw_reached(setting: Setting, methods: Methods, baseline: str = "") -> Drawing | None:
    """Figure 2: VL Norm against DAPO, in other families against DAPO Norm or the first other method there is.

    With a baseline, VL Norm against that, or the first other method where there is no VL Norm.

    Left, accuracy over steps, a line at the reference's final accuracy, a filled mark where VL Norm is there first and
    an open one where the reference itself was: its last step flatters whoever is compared with it, since curves are
    flat at the end. Both are the speed-up table's, unsmoothed. Right, both accuracies at the last step that both were
    validated at, and their difference.
    """
    methods, aside = _compared(setting, methods)
    curves = {key: curve for key, runs in methods.items() if (curve := _accuracy(runs)) and (curve.steps > 0).any()}
    others = [key for key in curves if not _is_vl_norm(key) and key != baseline]
    ours = measures.main_vl_norm(setting, curves)
    if baseline:
        others, ours = (
            [key for key in curves if key == baseline],
            others[0] if ours in (None, baseline) and others else ours,
        )
    if ours is None or not others or ours == baseline:
        return None
    reference = next((key for key in others if method_name(key) in REFERENCES), others[0])
    width = 9.0
    figure, ((left, right),) = _subplots(1, 2, width, 3.9, width_ratios=(2.3, 1))
    for key in (reference, ours):
        _draw_curve(left, curves[key], key)
    name = _label(reference, setting.family)
    found = measures.speed_up(methods[ours], methods[reference], 1)
    target, words = None, "no accuracy to reach yet."
    if found is not None and found.pairs:
        target = found.target
        left.axhline(target, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        words = _mark_first_hits(left, found, reference, ours, setting.family)
    elif found is not None:
        words = f"no first hit is marked: {found.note.replace('the reference', name)}."
    _from_step_0(left)
    accuracy = _accuracy_name(run for key in (reference, ours) for run in methods[key])
    left.set_ylabel(f"validation {accuracy}")
    if target is not None:
        left.set_title(f"dashed: {name}'s final accuracy, {target:.3f}", loc="left")
    where = _draw_final(right, [(key, methods[key]) for key in (reference, ours)], setting.family)
    title = _titled(f"{_label(ours, setting.family)} against {name}", setting)
    figure.suptitle(title)
    _legend(figure, _entries((reference, ours), setting.family), width)
    caption = (
        f"Left: {accuracy} on validation prompts over training; {words} Right: accuracy {where}, its "
        "95% interval, and the difference in points; where there is one seed, the interval is over problems only."
        f"{_band_words(curves[key] for key in (reference, ours))}"
        f"{_ended_words(_ended({key: methods[key] for key in (reference, ours)}))}{aside}"
    )
    return Drawing(figure, _name("fig2", *setting), title, caption)


def _mark_first_hits(axes: Axes, found: measures.SpeedUp, reference_key: str, key: str, family: str) -> str:
    """Both marks with their labels, on the line at the target; returns the caption's words."""
    name, our_name = _label(reference_key, family), _label(key, family)
    axes.set_ylim(bottom=axes.get_ylim()[0])
    own = f"{'at or before ' if found.reference_late else ''}{found.reference_first:.6g}"
    # Larger than the star and behind it, so that both are seen where they coincide.
    _mark(axes, found.reference_first, found.target, own, 22, method_color(reference_key), "o", "reached-reference")
    own_words = f"the open mark is where {name} itself was first there, step {own}"
    seeds = f" in {found.reached} of {found.pairs} seeds" if found.reached < found.pairs else ""
    note = f" ({found.note.replace('the reference', name)})" if found.note else ""
    if found.first is None or found.by_last is None or found.by_first is None:
        what = "not reached" if found.waiting is None else f"not yet, at step {found.waiting}"
        if found.first is not None:
            what = f"at or before step {found.first:.6g}"
        axes.text(
            0.5, 0.04, f"{our_name}: {what}", transform=axes.transAxes, ha="center", color=method_color(key)
        )  # fmt: skip
        has = "has not reached" if found.first is None else "has reached"
        return f"{our_name} {has} {name}'s final accuracy ({what}); {own_words}{note}."
    hit, ratio = f"{found.first:.6g}", f" ({found.by_last.value:.2f}×)"
    _mark(axes, found.first, found.target, f"{hit}{ratio}", 6, method_color(key), "*", "reached")
    return (
        f"the star is where {our_name} first reaches the final accuracy of {name}, step {hit}{ratio}{seeds}, the "
        f"factor being the last step of {name}, {found.reference_last:.6g}, over it; {own_words}, "
        f"{found.by_first.value:.2f} times that of {our_name}. Each seed's own curve is read, unsmoothed, at its "
        f"validations, and the mean over seeds marked, as in the table of the speed-up{note}."
    )


def _mark(axes: Axes, step: float, height: float, label: str, above: int, color: str, marker: str, gid: str) -> None:
    """A filled star or an open circle, a line down to the axis and the label `above` points over it."""
    bottom, star = axes.get_ylim()[0], marker == "*"
    fill, edge, size = (color, "white", 12) if star else ("none", color, 16)
    axes.vlines([step], bottom, height, color=color, linewidth=0.8, linestyle=":")
    axes.plot([step], [height], marker, ms=size, mfc=fill, mec=edge, mew=0.8 if star else 1.6, zorder=5 + star, gid=gid)
    # At the axis no curve is in the way, except at the very left.
    right = step > 0.75 * axes.dataLim.x1
    axes.annotate(
        label,
        (step, bottom),
        xytext=(-5 if right else 5, above),
        textcoords="offset points",
        ha="right" if right else "left",
        color=color,
        fontweight="bold" if star else "normal",
        zorder=7,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
    )


def _final(runs: list[Run]) -> Estimate:
    """Of runs that have an accuracy curve, so there is one."""
    final = measures.final_accuracy(runs)
    assert final is not None
    return final


def _draw_final(axes: Axes, methods: list[tuple[str, list[Run]]], family: str) -> str:
    """Both bars at one step if there is such a step; returns the words for which."""
    step = measures.common_step(methods[0][1], methods[1][1])
    finals = [(measures.accuracy_at(runs, step) if step is not None else None) or _final(runs) for _, runs in methods]
    tops = [0.0]
    for index, ((key, _), final) in enumerate(zip(methods, finals, strict=True)):
        hatch = "" if _is_vl_norm(key) else "//"
        axes.bar(index, final.value, width=0.62, color=method_color(key), edgecolor="white", hatch=hatch, zorder=2)
        top = final.value
        if np.isfinite(final.low) and np.isfinite(final.high):
            axes.vlines(index, final.low, final.high, color="black", linewidth=1.3, zorder=3)
            top = final.high
        axes.annotate(f"{final.value:.3f}", (index, top), xytext=(0, 3), textcoords="offset points", ha="center")
        tops.append(top)
    difference = measures.difference(methods[1][1], methods[0][1])
    if difference is not None and np.isfinite(difference.value):
        is_rate = measures.accuracy_name(methods[0][1]) != methods[0][1][0].metric
        scale, digits, unit = (100, 1, " points") if is_rate else (1, 3, "")
        words = f"{scale * difference.value:+.{digits}f}{unit}"
        if np.isfinite(difference.low) and np.isfinite(difference.high):
            words += f"\n[{scale * difference.low:+.{digits}f}, {scale * difference.high:+.{digits}f}]"
        axes.set_title(words.replace("-", "−"))
    axes.set_xticks(range(len(methods)), [_label(key, family).replace(" + ", " +\n") for key, _ in methods])
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set(
        ylim=(1.15 * min(0.0, *(final.value for final in finals)), 1.15 * max(tops) or 1),
        xlim=(-0.6, len(methods) - 0.4),
    )
    if step is None:
        axes.set_ylabel("final accuracy")
        return "of each at its last validation, since they have none at one step"
    axes.set_ylabel(f"accuracy at step {step}")
    note = f" ({difference.note})" if difference is not None and difference.note else ""
    return f"at step {step}, the last that both were validated at{note}"


# ------------------------------------------------------------------------------------------------- the paper's Fig. 3


def draw_accuracies(settings: dict[Setting, Methods]) -> Drawing | None:
    """Figure 3: accuracy of every method over training; rows task and model, columns length. One family, one scale."""
    panels: dict[tuple[str, str], dict[str, tuple[Setting, dict[str, Curve]]]] = {}
    aside = ""
    ended: list[str] = []
    for setting, methods in settings.items():
        compared, words = _compared(setting, methods)
        ended += _ended(compared)
        curves = {key: curve for key, runs in compared.items() if (curve := _accuracy(runs))}
        if curves:
            panels.setdefault((setting.task, setting.model), {})[setting.length] = (setting, curves)
            aside += words
    if not panels:
        return None
    first = next(iter(settings))
    keys = sorted({key for row in panels.values() for _, curves in row.values() for key in curves}, key=_order)
    # α differs by task: one line of the legend, and each panel says its own.
    ours = {
        key: _alpha(methods[key])
        for methods in settings.values()
        for key in keys
        if _is_vl_norm(key) and key in methods
    }
    lengths = sorted({length for row in panels.values() for length in row}, key=lambda text: (len(text), text))
    width = max(6.4, 4.2 * len(lengths))
    figure, grid = _subplots(len(panels), len(lengths), width, 0.9 + 2.6 * len(panels), sharey="row")
    drawn: list[Curve] = []
    places = sorted(panels)
    for row, (place, axes_row) in enumerate(zip(places, grid, strict=True)):
        for length, axes in zip(lengths, axes_row, strict=True):
            if length not in panels[place]:
                axes.set_visible(False)
                continue
            setting, curves = panels[place][length]
            for key, curve in curves.items():
                _draw_curve(axes, curve, key)
                drawn.append(curve)
            own = next((f", α = {curve_alpha:g}" for key in curves if (curve_alpha := ours.get(key)) is not None), "")
            axes.set_title(figure_text(_setting_title(setting)) + (own if len(ours) > 1 else ""))
            _from_step_0(axes)
            if any(length in panels[below] for below in places[row + 1 :]):
                axes.set_xlabel("")
            if length == next(one for one in lengths if one in panels[place]):
                axes.tick_params(labelleft=True)  # a shared axis has them in the first column, which may be empty
                runs = (run for key in curves for run in settings[setting][key])
                axes.set_ylabel(f"validation {_accuracy_name(runs)}")
    family = {"aggregation": "loss aggregations", "dapo": "full DAPO"}.get(first.family, first.family)
    tiny = "tiny model" if first.scale == "cpu" else ""
    title = figure_text("Validation accuracy over training" + "".join(f", {one}" for one in (family, tiny) if one))
    figure.suptitle(title)
    shown = ["vl_norm", *(key for key in keys if key not in ours)] if len(ours) > 1 else keys
    _legend(figure, _entries(shown, first.family), width)
    caption = (
        "Accuracy on validation prompts over training; on Math the four sets are weighted by size."
        f"{_band_words(drawn)}{_ended_words(ended)}{aside}"
    )
    return Drawing(figure, _name("fig3", first.family, "cpu" if first.scale == "cpu" else ""), title, caption)


# --------------------------------------------------------------------------------------------------------- training


def draw_training(setting: Setting, methods: Methods, smooth: int | None) -> Drawing | None:
    """Entropy, mean response length, gradient norm and training reward over steps: raw thin, trailing mean thick."""
    methods, aside = _compared(setting, methods)
    window = _window(methods, smooth)
    found = {
        metric: {key: series for key, runs in methods.items() if (series := _metric(runs, metric))}
        for metric in TRAINING
    }
    found = {metric: of_methods for metric, of_methods in found.items() if of_methods}
    if not found:
        return None
    ended = [words for metric in found for words in _ended(methods, metric)]
    return _small_multiples(
        [(TRAINING[metric], _method_lines(of_methods, window)) for metric, of_methods in found.items()],
        _entries([key for key in methods if any(key in one for one in found.values())], setting.family),
        "training",
        _titled("Training", setting),
        setting,
        f"As verl logs it at each step. Thin: every run. Thick: trailing mean of {window} steps of the mean over "
        "seeds. Entropy: divided by the sum of the tokens' weights, since verl aggregates it as the loss; a method "
        f"whose sum is not known is left out. A gradient norm has the scale of the method's weights."
        f"{_ended_words(ended)}{aside}",
    )


def _method_lines(of_methods: dict[str, list[Series]], window: int) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for key, series in reversed(of_methods.items()):
            _draw_smoothed(axes, series, window, method_color(key), method_line_style(key))
        _log_if_wide(axes, (values for series in of_methods.values() for _, values in series))

    return draw


def _draw_smoothed(axes: Axes, series: list[Series], window: int, color: str, line_style: Any) -> None:
    for steps, values in series:
        if len(steps) == 1:
            axes.plot(steps, values, marker=".", color=color)
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=max(0.15, 0.45 / len(series)))
    curve = over_seeds(series)
    if curve is not None and len(curve.steps):
        axes.plot(curve.steps, _trailing(curve, window), color=color, linestyle=line_style, zorder=3)


def _small_multiples(
    panels: list[tuple[str, Callable[[Axes], None]]],
    entries: list[tuple[str, str, Any, str]],
    what: str,
    title: str,
    setting: Setting,
    caption: str,
) -> Drawing:
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 4.5 * columns if columns > 1 else 6.4
    figure, grid = _subplots(rows, columns, width, 0.9 + 2.5 * rows)
    for axes, (label, draw) in zip(grid.flat, panels, strict=False):
        draw(axes)
        axes.set_title(label)
        _from_step_0(axes)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title)
    _legend(figure, [(label, color, line, "") for label, color, line, _ in entries], width)
    return Drawing(figure, _name(what, *setting), title, caption)


# ---------------------------------------------------------------------------------------------------------- lengths


def draw_lengths(setting: Setting, methods: Methods) -> Drawing | None:
    """Lengths over training, one column a method: tokens of training responses, characters of validation responses."""
    methods, aside = _compared(setting, methods)
    tokens = {key: ranges for key, runs in methods.items() if (ranges := _token_range(runs))}
    clipped = {
        key: curve
        for key, runs in methods.items()
        if (curve := over_seeds(_metric(runs, "response_length/clip_ratio"))) and len(curve.steps)
    }
    texts = {key: quantiles for key, runs in methods.items() if (quantiles := _character_quantiles(runs))}
    rows: list[tuple[str, dict[str, Any], Callable[[Axes, str], None], float]] = [
        ("tokens, training", tokens, lambda axes, key: _draw_token_range(axes, tokens[key], method_color(key)), 1.0),
        ("cut off at the limit", clipped, lambda axes, key: _draw_share(axes, clipped[key], key), 0.45),
        ("characters, validation", texts, lambda axes, key: _draw_quantiles(axes, *texts[key], method_color(key)), 1.0),
    ]
    rows = [row for row in rows if row[1]]
    keys = [key for key in methods if any(key in found for _, found, _, _ in rows)]
    if not keys:
        return None
    width = max(6.4, min(2.5 * len(keys), 16.0))
    heights = [height for _, _, _, height in rows]
    figure, grid = _subplots(
        len(rows), len(keys), width, 0.7 + 2.4 * sum(heights), sharex=True, sharey="row", height_ratios=heights
    )
    for (label, found, draw, _), axes_row in zip(rows, grid, strict=True):
        for key, axes in zip(keys, axes_row, strict=True):
            if key in found:
                draw(axes, key)
            axes.set_ylabel(label)
            axes.label_outer()
        if axes_row[0].get_yscale() == "linear":
            _from_0(axes_row)
    _from_step_0(*grid.flat)
    for axes in grid[:-1].flat:
        axes.set_xlabel("")
    for key, axes in zip(keys, grid[0], strict=True):
        axes.set_title(_label(key, setting.family).replace(" + ", " +\n"), color=method_color(key), fontweight="bold")
    title = _titled("Response lengths", setting)
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
    return Drawing(figure, _name("lengths", *setting), title, f"{' '.join(parts)} All seeds together.{aside}")


def _token_range(runs: list[Run]) -> dict[str, Series]:
    """Over the runs: mean of the mean, lowest minimum, highest maximum, at the steps that any run has."""
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "mean": lambda column: column.mean(),
        "min": lambda column: column.min(),
        "max": lambda column: column.max(),
    }
    found: dict[str, Series] = {}
    for name, way in ways.items():
        at: dict[int, list[float]] = {}
        for steps, values in _metric(runs, f"response_length/{name}"):
            for step, value in zip(steps, values, strict=True):
                at.setdefault(int(step), []).append(float(value))
        if at:
            steps = np.array(sorted(at))
            found[name] = (steps, np.array([way(np.array(at[step])) for step in steps]))
    return found


def _draw_token_range(axes: Axes, found: dict[str, Series], color: str) -> None:
    if "min" in found and "max" in found:
        steps, of_min, of_max = np.intersect1d(found["min"][0], found["max"][0], return_indices=True)
        _draw_band(axes, steps, found["min"][1][of_min], found["max"][1][of_max], color, 0.2)
    if "mean" in found:
        marker = "o" if len(found["mean"][0]) == 1 else ""
        axes.plot(*found["mean"], color=color, linewidth=1, marker=marker)
    _log_if_wide(axes, (values for _, values in found.values()))


def _draw_share(axes: Axes, curve: Curve, key: str) -> None:
    from matplotlib.ticker import PercentFormatter

    marker = "o" if len(curve.steps) == 1 else ""
    axes.plot(curve.steps, curve.mean, color=method_color(key), linewidth=1, marker=marker)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _character_quantiles(runs: list[Run]) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps [T] and the quantiles [T, 5] of the lengths of all validation responses of all seeds, in characters."""
    at: dict[int, list[np.ndarray]] = {}
    for run in runs:
        for step, sets in run.validations.items():
            lengths = [one.characters for one in sets.values() if one.characters is not None and len(one.characters)]
            if lengths:
                at.setdefault(step, []).extend(lengths)
    if not at:
        return None
    steps = np.array(sorted(at))
    return steps, np.array([np.quantile(np.concatenate(at[step]), QUANTILES) for step in steps])


def _draw_quantiles(axes: Axes, steps: np.ndarray, quantiles: np.ndarray, color: str) -> None:
    _draw_band(axes, steps, quantiles[:, 0], quantiles[:, 4], color, 0.18)
    _draw_band(axes, steps, quantiles[:, 1], quantiles[:, 3], color, 0.3)
    axes.plot(steps, quantiles[:, 2], color=color, marker="o")


# ---------------------------------------------------------------------------------------------- VL Norm's own, and α


def draw_vl_norm(setting: Setting, methods: Methods, smooth: int | None) -> Drawing | None:
    """The metrics that the plugin logs: A and H, √(A/H), effective responses, range of the weights."""
    prefix = "actor/vl_norm/"
    panels: list[tuple[str, tuple[tuple[str, Any], ...]]] = [
        ("lengths, tokens: A solid, H dashed", (("length_mean", "-"), ("length_harmonic_mean", "--"))),
        ("√(A/H), predicted ratio of CVs", (("variance_ratio", "-"),)),
        ("effective responses of a mini-batch", (("effective_responses", "-"),)),
        ("weights M·N·x: largest solid, smallest dashed", (("weight_max", "-"), ("weight_min", "--"))),
    ]
    logged = {
        key: runs
        for key, runs in methods.items()
        if any(_metric(runs, prefix + metric) for _, lines in panels for metric, _ in lines)
    }
    if not logged:
        return None
    window = _window(logged, smooth)

    def lines(metrics: tuple[tuple[str, Any], ...]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            everything = []
            for key, runs in logged.items():
                for metric, line_style in metrics:
                    series = _metric(runs, prefix + metric)
                    _draw_smoothed(axes, series, window, _shade(key, runs), line_style)
                    everything += [values for _, values in series]
            _log_if_wide(axes, everything)

        return draw

    return _small_multiples(
        [(label, lines(metrics)) for label, metrics in panels],
        [(_label(key, setting.family), _shade(key, runs), "-", "") for key, runs in logged.items()],
        "vl-norm",
        _titled("The aggregation's own metrics", setting),
        setting,
        "As the plugin logs it, mean of a step's mini-batches. A and H: arithmetic and harmonic mean length; √(A/H): "
        "coefficient of variation of DAPO's or Dr. GRPO's gradient over that of α = 1, if the variance of a response's "
        "gradient is proportional to its length; weights: 1 is the average response's. Thin: every run. Thick: "
        f"trailing mean of {window} steps of the mean over seeds.",
    )


def _shade(key: str, runs: list[Run]) -> str:
    alpha = _alpha(runs)
    return alpha_color(alpha) if _is_vl_norm(key) and alpha is not None else method_color(key)


def draw_alpha(setting: Setting, methods: Methods) -> Drawing | None:
    """Accuracy over steps at each α, and the final one against α. Dr. GRPO Norm, where it was run, is α = 0."""
    variants = {
        key: (runs, curve)
        for key, runs in sorted(methods.items(), key=lambda item: _alpha(item[1]) or 0.0)
        if _is_vl_norm(key) and _alpha(runs) is not None and (curve := _accuracy(runs))
    }
    if len(variants) < 2:
        return None
    width = 9.0
    figure, ((left, right),) = _subplots(1, 2, width, 3.9, width_ratios=(1.5, 1))
    styles = ("-", "--", "-.", ":")
    entries = []
    for index, (key, (runs, curve)) in enumerate(variants.items()):
        color, line_style = _shade(key, runs), styles[index % len(styles)]
        _draw_curve(left, curve, key, color, line_style)
        entries.append((_label(key, setting.family), color, line_style, method_marker(key)))
        _draw_final_point(right, _alpha(runs) or 0.0, runs, color, method_marker(key))
    alphas = [_alpha(runs) or 0.0 for runs, _ in variants.values()]
    right.plot(
        alphas,
        [_final(runs).value for runs, _ in variants.values()],
        color="#999999",
        linewidth=0.9,
        zorder=1,
    )
    zero = next((key for key in methods if method_name(key) == "dr_grpo_norm" and _accuracy(methods[key])), None)
    if zero is not None:
        color, marker = method_color(zero), method_marker(zero)
        _draw_final_point(right, 0.0, methods[zero], color, marker)
        entries.append((_label(zero, setting.family), color, "", marker))
    right.set(xlabel="α", ylabel="final accuracy")
    right.set_xticks(sorted({*alphas, *([0.0] if zero else [])}))
    _from_step_0(left)
    left.set_ylabel(f"validation {_accuracy_name(run for runs, _ in variants.values() for run in runs)}")
    title = _titled("VL Norm's α", setting)
    figure.suptitle(title)
    _legend(figure, entries, width)
    caption = (
        "Left: accuracy on validation prompts over training. Right: at the last validation, with its 95% interval."
        f"{_band_words(curve for _, curve in variants.values())}"
        f"{_ended_words(_ended({key: runs for key, (runs, _) in variants.items()}))}"
        + (" Dr. GRPO Norm is VL Norm at α = 0." if zero is not None else "")
    )
    return Drawing(figure, _name("alpha", *setting), title, caption)


def _draw_final_point(axes: Axes, alpha: float, runs: list[Run], color: str, marker: str) -> None:
    final = _final(runs)
    if np.isfinite(final.low) and np.isfinite(final.high):
        axes.vlines(alpha, final.low, final.high, color=color, linewidth=1.4)
    axes.plot([alpha], [final.value], marker=marker, color=color, markersize=7, zorder=3)
