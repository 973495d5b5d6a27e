"""The report's figures, drawn from runs: the paper's Figures 2 and 3, and what verl logs of training.

| figure           | one for each            | shows                                                                 |
|------------------|-------------------------|-----------------------------------------------------------------------|
| fig2-SETTING     | setting with VL Norm    | validation accuracy of VL Norm and a reference, and who is when there |
| fig3-FAMILY      | family                  | validation accuracy of each method: rows task and model, columns length |
| training-SETTING | setting                 | entropy, response length, gradient norm, training reward              |
| lengths-SETTING  | setting                 | distribution of lengths over training                                 |
| vl-norm-SETTING  | setting that logs them  | the aggregation's own metrics                                         |
| alpha-SETTING    | setting with several α  | accuracy over steps and against α                                     |

A figure without runs for it isn't drawn. One method has one colour in all of them.

Covered: which figures there are, and those of validation accuracy; training.py has those of training. Not covered:
numbers (measures.py, first_hit.py) and how a figure looks and becomes a file (style.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from vlnorm_verl.methods import Method, alpha_color, alpha_of, is_vl_norm, method_of, split
from vlnorm_verl.report import curves, measures
from vlnorm_verl.report.curves import Curve, Drawing, Entry, Methods
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.first_hit import SpeedUp, speed_up
from vlnorm_verl.report.groups import grouped, main_vl_norm
from vlnorm_verl.report.identity import Setting
from vlnorm_verl.report.run import Run
from vlnorm_verl.report.style import Figure, figure_text, render, use_style
from vlnorm_verl.report.training import draw_lengths, draw_training, draw_vl_norm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCES = ("dapo", "dapo_norm")
FAMILIES = {"aggregation": "loss aggregations", "dapo": "full DAPO"}


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
    """The figures before they are rendered, one at a time; call it within `style.use_style`."""
    return (drawing for drawing in _drawings(runs, smooth, baseline) if drawing is not None)


def _drawings(runs: list[Run], smooth: int | None, baseline: str) -> Iterator[Drawing | None]:
    settings = by_setting(runs)
    for setting, methods in settings.items():
        yield draw_reached(setting, methods, baseline)
    for family in dict.fromkeys(setting.family for setting in settings):
        yield draw_accuracies({setting: of for setting, of in settings.items() if setting.family == family})
    for setting, methods in settings.items():
        yield draw_training(setting, methods, smooth)
        yield draw_lengths(setting, methods)
        yield draw_vl_norm(setting, methods, smooth)
        yield draw_alpha(setting, methods)


def by_setting(runs: list[Run]) -> dict[Setting, Methods]:
    """Settings in the order of their first runs, methods in that of the legends."""
    settings: dict[Setting, Methods] = {setting: {} for setting, _ in grouped(runs)}
    for (setting, key), seeds in sorted(grouped(runs).items(), key=lambda item: curves.order(item[0][1])):
        settings[setting][key] = seeds
    return settings


# ------------------------------------------------------------------------------------------------- the paper's Fig. 2


def draw_reached(setting: Setting, methods: Methods, baseline: str = "") -> Drawing | None:
    """Figure 2: VL Norm against DAPO, in other families against DAPO Norm or the first other method there is.

    With a baseline, VL Norm against that, or the first other method where there is no VL Norm.

    Left, accuracy over steps, a line at the reference's final accuracy, a filled mark where VL Norm is there first and
    an open one where the reference itself was: its last step flatters whoever is compared with it, since curves are
    flat at the end. Both are the speed-up table's, unsmoothed. Right, both accuracies at the last step that both were
    validated at, and their difference.
    """
    methods, aside = curves.with_one_alpha(setting, methods)
    drawn = {key: curve for key, runs in methods.items() if (curve := curves.accuracy_of(runs))}
    drawn = {key: curve for key, curve in drawn.items() if (curve.steps > 0).any()}
    others = [key for key in drawn if not is_vl_norm(key) and key != baseline]
    ours = main_vl_norm(setting, drawn)
    if baseline:
        ours = others[0] if ours in (None, baseline) and others else ours
        others = [key for key in drawn if key == baseline]
    if ours is None or not others or ours == baseline:
        return None
    reference = next((key for key in others if split(key)[0] in REFERENCES), others[0])
    width = 9.0
    figure, ((left, right),) = curves.subplots(1, 2, width, 3.9, width_ratios=(2.3, 1))
    for key in (reference, ours):
        curves.draw_curve(left, drawn[key], method_of(key))
    name = curves.method_label(reference, setting.family)
    hits = speed_up(methods[ours], methods[reference], 1)
    target, words = None, "no accuracy to reach yet."
    if hits is not None and hits.pairs:
        target = hits.target
        left.axhline(target, color="#555555", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        words = _mark_first_hits(left, hits, reference, ours, setting.family)
    elif hits is not None:
        words = f"no first hit is marked: {hits.note.replace('the reference', name)}."
    curves.from_step_0(left)
    accuracy = curves.accuracy_label(run for key in (reference, ours) for run in methods[key])
    left.set_ylabel(f"validation {accuracy}")
    if target is not None:
        left.set_title(f"dashed: {name}'s final accuracy, {target:.3f}", loc="left")
    where = _draw_final(right, [(key, methods[key]) for key in (reference, ours)], setting.family)
    title = curves.titled(f"{curves.method_label(ours, setting.family)} against {name}", setting)
    figure.suptitle(title)
    curves.draw_legend(figure, curves.entries_of((reference, ours), setting.family), width)
    caption = (
        f"Left: {accuracy} on validation prompts over training; {words} Right: accuracy {where}, its "
        "95% interval, and the difference in points; where there is one seed, the interval is over problems only."
        f"{curves.band_words(drawn[key] for key in (reference, ours))}"
        f"{curves.ended_words([{key: methods[key] for key in (reference, ours)}])}{aside}"
    )
    return Drawing(figure, curves.name_of("fig2", *setting), title, caption)


def _mark_first_hits(axes: Axes, hits: SpeedUp, reference_key: str, key: str, family: str) -> str:
    """Both marks with their labels, on the line at the target; returns the caption's words."""
    name, our_name = curves.method_label(reference_key, family), curves.method_label(key, family)
    axes.set_ylim(bottom=axes.get_ylim()[0])
    own = f"{'at or before ' if hits.reference_late else ''}{hits.reference_first:.6g}"
    # Larger than the star and behind it, so that both are seen where they coincide.
    _mark(axes, hits.reference_first, hits.target, own, 22, method_of(reference_key).color, "o", "reached-reference")
    own_words = f"the open mark is where {name} itself was first there, step {own}"
    seeds = f" in {hits.reached} of {hits.pairs} seeds" if hits.reached < hits.pairs else ""
    note = f" ({hits.note.replace('the reference', name)})" if hits.note else ""
    if hits.first is None or hits.by_last is None or hits.by_first is None:
        what = "not reached" if hits.waiting is None else f"not yet, at step {hits.waiting}"
        if hits.first is not None:
            what = f"at or before step {hits.first:.6g}"
        words = f"{our_name}: {what}"
        axes.text(0.5, 0.04, words, transform=axes.transAxes, ha="center", color=method_of(key).color)
        has = "has not reached" if hits.first is None else "has reached"
        return f"{our_name} {has} {name}'s final accuracy ({what}); {own_words}{note}."
    hit, ratio = f"{hits.first:.6g}", f" ({hits.by_last.value:.2f}×)"
    _mark(axes, hits.first, hits.target, f"{hit}{ratio}", 6, method_of(key).color, "*", "reached")
    return (
        f"the star is where {our_name} first reaches the final accuracy of {name}, step {hit}{ratio}{seeds}, the "
        f"factor being the last step of {name}, {hits.reference_last:.6g}, over it; {own_words}, "
        f"{hits.by_first.value:.2f} times that of {our_name}. Each seed's own curve is read, unsmoothed, at its "
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
        hatch = "" if is_vl_norm(key) else "//"
        axes.bar(index, final.value, width=0.62, color=method_of(key).color, edgecolor="white", hatch=hatch, zorder=2)
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
    axes.set_xticks(
        range(len(methods)), [curves.method_label(key, family).replace(" + ", " +\n") for key, _ in methods]
    )
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
    """Figure 3: accuracy of every method over training; rows task and model, columns length. One family."""
    panels: dict[Setting, dict[str, Curve]] = {}
    aside = ""
    compared: list[Methods] = []
    for setting, methods in settings.items():
        shown, words = curves.with_one_alpha(setting, methods)
        compared.append(shown)
        lines = {key: curve for key, runs in shown.items() if (curve := curves.accuracy_of(runs))}
        if lines:
            panels[setting] = lines
            aside += words
    if not panels:
        return None
    keys = sorted({key for lines in panels.values() for key in lines}, key=curves.order)
    # α differs by task: one line of the legend, and each panel says its own.
    ours = [key for key in keys if is_vl_norm(key)]
    family = next(iter(panels)).family
    rows = sorted({(setting.task, setting.model) for setting in panels})
    lengths = sorted({setting.length for setting in panels}, key=lambda text: (len(text), text))
    width = max(6.4, 4.2 * len(lengths))
    figure, grid = curves.subplots(len(rows), len(lengths), width, 0.9 + 2.6 * len(rows), sharey="row")
    for row, axes_row in zip(rows, grid, strict=True):
        in_row = [length for length in lengths if Setting(family, *row, length) in panels]
        for length, axes in zip(lengths, axes_row, strict=True):
            setting = Setting(family, *row, length)
            if setting not in panels:
                axes.set_visible(False)
                continue
            for key, curve in panels[setting].items():
                curves.draw_curve(axes, curve, method_of(key))
            alpha = next((f", α = {alpha:g}" for key in panels[setting] if (alpha := alpha_of(key)) is not None), "")
            axes.set_title(figure_text(curves.setting_title(setting)) + (alpha if len(ours) > 1 else ""))
            curves.from_step_0(axes)
            if any(Setting(family, *below, length) in panels for below in rows[rows.index(row) + 1 :]):
                axes.set_xlabel("")
            if length == in_row[0]:
                axes.tick_params(labelleft=True)  # a shared axis has them in the first column, which may be empty
                runs = (run for key in panels[setting] for run in settings[setting][key])
                axes.set_ylabel(f"validation {curves.accuracy_label(runs)}")
    title = figure_text(", ".join(filter(None, ("Validation accuracy over training", FAMILIES.get(family, family)))))
    figure.suptitle(title)
    in_legend = ["vl_norm", *(key for key in keys if key not in ours)] if len(ours) > 1 else keys
    drawn = [curve for lines in panels.values() for curve in lines.values()]
    curves.draw_legend(figure, curves.entries_of(in_legend, family), width)
    caption = (
        "Accuracy on validation prompts over training; on Math the four sets are weighted by size."
        f"{curves.band_words(drawn)}{curves.ended_words(compared)}{aside}"
    )
    return Drawing(figure, curves.name_of("fig3", family), title, caption)


# ------------------------------------------------------------------------------------------------------------------ α


def draw_alpha(setting: Setting, methods: Methods) -> Drawing | None:
    """Accuracy over steps at each α, and the final one against α. Dr. GRPO Norm, where it was run, is α = 0."""
    variants = {
        key: (runs, curve)
        for key, runs in sorted(methods.items(), key=lambda item: item[1][0].alpha or 0.0)
        if is_vl_norm(key) and runs[0].alpha is not None and (curve := curves.accuracy_of(runs))
    }
    if len(variants) < 2:
        return None
    width = 9.0
    figure, ((left, right),) = curves.subplots(1, 2, width, 3.9, width_ratios=(1.5, 1))
    lines = ("-", "--", "-.", ":")
    entries: list[Entry] = []
    for index, (key, (runs, curve)) in enumerate(variants.items()):
        alpha = runs[0].alpha or 0.0
        look = method_of(key)._replace(color=alpha_color(alpha), line=lines[index % len(lines)])
        curves.draw_curve(left, curve, look)
        entries.append((curves.method_label(key, setting.family), look))
        _draw_final_point(right, alpha, runs, look)
    alphas = [runs[0].alpha or 0.0 for runs, _ in variants.values()]
    finals = [_final(runs).value for runs, _ in variants.values()]
    right.plot(alphas, finals, color="#999999", linewidth=0.9, zorder=1)
    zero = next((key for key in methods if split(key)[0] == "dr_grpo_norm" and curves.accuracy_of(methods[key])), None)
    if zero is not None:
        look = method_of(zero)._replace(line="")
        _draw_final_point(right, 0.0, methods[zero], look)
        entries.append((curves.method_label(zero, setting.family), look))
    right.set(xlabel="α", ylabel="final accuracy")
    right.set_xticks(sorted({*alphas, *([0.0] if zero else [])}))
    curves.from_step_0(left)
    left.set_ylabel(f"validation {curves.accuracy_label(run for runs, _ in variants.values() for run in runs)}")
    title = curves.titled("VL Norm's α", setting)
    figure.suptitle(title)
    curves.draw_legend(figure, entries, width)
    caption = (
        "Left: accuracy on validation prompts over training. Right: at the last validation, with its 95% interval."
        f"{curves.band_words(curve for _, curve in variants.values())}"
        f"{curves.ended_words([{key: runs for key, (runs, _) in variants.items()}])}"
        + (" Dr. GRPO Norm is VL Norm at α = 0." if zero is not None else "")
    )
    return Drawing(figure, curves.name_of("alpha", *setting), title, caption)


def _draw_final_point(axes: Axes, alpha: float, runs: list[Run], look: Method) -> None:
    final = _final(runs)
    if np.isfinite(final.low) and np.isfinite(final.high):
        axes.vlines(alpha, final.low, final.high, color=look.color, linewidth=1.4)
    axes.plot([alpha], [final.value], marker=look.marker, color=look.color, markersize=7, zorder=3)
