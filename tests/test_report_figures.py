"""The report's figures: what is drawn where, read from matplotlib's artists, and that odd runs are drawn too.

Runs are made here with known curves; the intervals are measures.py's and tested there. Not covered: how it looks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from vlnorm_verl.methods import METHODS, label_of
from vlnorm_verl.report import curves, figures, measures, style, tables, training
from vlnorm_verl.report.curves import Drawing
from vlnorm_verl.report.identity import Setting
from vlnorm_verl.report.run import Run, Validation

AGGREGATIONS = ("grpo_norm", "dapo_norm", "dr_grpo_norm", "dr_grpo", "vl_norm")


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    import matplotlib.pyplot as plt

    with style.use_style(), warnings.catch_warnings():
        warnings.simplefilter("error")
        # Raised when garbage is collected, which may be that of any test before this one.
        warnings.simplefilter("ignore", ResourceWarning)
        yield
    plt.close("all")


def run(method: str, accuracies: dict[int, float], seed: int = 0, dumps: bool = True, **options: Any) -> Run:
    """A run validated at the steps of `accuracies`, with 100 problems × 8 responses of exactly these accuracies."""
    steps = np.arange(0, max(accuracies, default=0) + 1)
    generator = np.random.default_rng([seed, *method.encode()])
    alpha = options.pop("alpha", 1.0 if method == "vl_norm" else None)
    metrics = {
        "val-core/set/acc/mean@8": np.array([accuracies.get(int(step), math.nan) for step in steps]),
        "actor/entropy": 0.2 + generator.random(len(steps)) / 10,
        "response_length/mean": 100.0 + steps + seed,
        "response_length/min": 10.0 + generator.random(len(steps)),
        "response_length/max": 200.0 + steps + 10 * seed,
        "response_length/clip_ratio": np.full(len(steps), 0.1),
        "actor/grad_norm": np.exp(generator.normal(size=len(steps))),
        "critic/score/mean": generator.random(len(steps)),
    }
    if method == "vl_norm":
        metrics |= {
            "actor/vl_norm/length_mean": 100.0 + steps,
            "actor/vl_norm/length_harmonic_mean": 50.0 + steps / 2,
            "actor/vl_norm/variance_ratio": np.full(len(steps), 2**0.5),
            "actor/vl_norm/effective_responses": 20.0 + generator.random(len(steps)),
            "actor/vl_norm/weight_min": np.full(len(steps), 0.1),
            "actor/vl_norm/weight_max": np.full(len(steps), 9.0),
        }
    validations = {step: {"set": validation(accuracy)} for step, accuracy in accuracies.items()} if dumps else {}
    setting = Setting(**{"family": "dapo", "task": "countdown", "model": "3b", "length": "3072"} | options)
    return Run(
        folder=Path("runs") / method,
        name=f"{method}-{seed}",
        method=method,
        alpha=alpha,
        seed=seed,
        planned_steps=None,
        steps=steps,
        metrics=metrics,
        validations=validations,
        setting=setting,
    )


def validation(accuracy: float) -> Validation:
    correct = np.where(np.arange(100) < round(100 * accuracy), 8, 0)
    characters = np.arange(1, 801, dtype=np.int32)
    return Validation([str(index) for index in range(100)], np.full(100, 8), correct, True, characters)


def drawn(runs: list[Run], smooth: int | None = None, baseline: str = "") -> dict[str, Drawing]:
    return {drawing.name: drawing for drawing in figures.drawings(runs, smooth, baseline)}


def draw(kind: str, runs: list[Run], smooth: int | None = None, baseline: str = "") -> Drawing | None:
    """One figure of runs of one setting; of one family for fig3."""
    settings = figures.by_setting(runs)
    if kind == "fig3":
        return figures.draw_accuracies(settings)
    ((setting, methods),) = settings.items()
    if kind == "fig2":
        return figures.draw_reached(setting, methods, baseline)
    if kind == "training":
        return training.draw_training(setting, methods, smooth)
    if kind == "vl-norm":
        return training.draw_vl_norm(setting, methods, smooth)
    return {"lengths": training.draw_lengths, "alpha": figures.draw_alpha}[kind](setting, methods)


def artist(drawing: Drawing, gid: str) -> Any:
    found = drawing.figure.findobj(lambda one: one.get_gid() == gid)
    return found[0] if found else None


def texts(drawing: Drawing) -> list[str]:
    return [one.get_text() for one in drawing.figure.findobj(lambda one: hasattr(one, "get_text"))]


DAPO = {0: 0.1, 100: 0.4, 200: 0.6, 300: 0.8, 400: 0.7, 500: 0.75}
OURS = {0: 0.1, 100: 0.7, 200: 0.75, 300: 0.74, 400: 0.8, 500: 0.85}

# ------------------------------------------------------------------------------------------------------------ fig. 2


@pytest.mark.parametrize("dumps", [True, False])
def test_marks_are_where_the_final_accuracy_is_reached_first(dumps: bool) -> None:
    drawing = draw("fig2", [run("dapo", DAPO, dumps=dumps), run("vl_norm", OURS, dumps=dumps)])
    left = drawing.figure.axes[0]
    assert [line for line in left.get_lines() if list(line.get_ydata()) == [0.75, 0.75]], "no line at DAPO's final"
    star, own = artist(drawing, "reached"), artist(drawing, "reached-reference")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([200], [0.75])
    assert (list(own.get_xdata()), list(own.get_ydata())) == ([300], [0.75])
    assert "200 (2.50×)" in texts(drawing)
    assert "step 200 (2.50×)" in drawing.caption
    assert "step 300, 1.50 times" in drawing.caption


def test_bars_are_the_final_accuracies_and_their_difference() -> None:
    drawing = draw("fig2", [run("dapo", DAPO), run("vl_norm", OURS)])
    right = drawing.figure.axes[1]
    assert [bar.get_height() for bar in right.patches] == pytest.approx([0.75, 0.85])
    assert right.get_ylim()[0] == 0
    assert right.get_title().startswith("+10.0 points\n[")
    intervals = [segment for lines in right.collections for segment in lines.get_segments()]
    for (low, high), height in zip(np.array(intervals)[:, :, 1], (0.75, 0.85), strict=True):
        assert low < height < high


def test_not_reached_is_said() -> None:
    drawing = draw("fig2", [run("dapo", OURS), run("vl_norm", DAPO)])
    assert artist(drawing, "reached") is None
    assert "DAPO + VL Norm (α = 1): not reached" in texts(drawing)
    assert "has not reached DAPO's final accuracy (not reached)" in drawing.caption
    assert drawing.figure.axes[1].get_title().startswith("−10.0 points")


def test_a_target_that_the_untrained_model_meets_is_not_marked() -> None:
    one = draw("fig2", [run("dapo", {0: 0.5, 10: 0.4, 20: 0.3}), run("vl_norm", {0: 0.5, 10: 0.2, 20: 0.35})])
    assert artist(one, "reached") is artist(one, "reached-reference") is None
    assert "the target was met before training" in one.caption


def test_marks_are_the_speed_up_tables() -> None:
    runs = [run("dapo", {0: 0.1, 10: 0.4, 20: 0.5}, seed) for seed in (0, 1)]
    runs += [run("vl_norm", {0: 0.1, 10: first, 20: 0.8}, seed) for seed, first in enumerate((0.6, 0.3))]
    drawing = draw("fig2", runs)
    table = next(table for table in tables.tables(runs) if table.name == "speedup")
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert list(artist(drawing, "reached").get_xdata()) == [float(row["first hit"])] == [15]
    assert list(artist(drawing, "reached-reference").get_xdata()) == [float(row["its own first hit"])] == [20]
    assert f"15 ({row['last step / first hit'].value:.2f}×)" in texts(drawing)


def test_marks_at_one_step_are_both_seen() -> None:
    drawing = draw("fig2", [run("dapo", DAPO), run("vl_norm", {**DAPO, 500: 0.8})])
    star, own = artist(drawing, "reached"), artist(drawing, "reached-reference")
    assert list(star.get_xdata()) == list(own.get_xdata()) == [300]
    assert own.get_markersize() > star.get_markersize() + 2
    assert own.get_zorder() < star.get_zorder()


def test_bars_and_difference_are_at_the_last_step_of_both() -> None:
    one = draw("fig2", [run("dapo", DAPO), run("vl_norm", {0: 0.1, 100: 0.7, 200: 0.9})])
    right = one.figure.axes[1]
    assert [bar.get_height() for bar in right.patches] == pytest.approx([0.6, 0.9])
    assert right.get_title().startswith("+30.0 points\n[")
    assert right.get_ylabel() == "accuracy at step 200"
    assert "at step 200, the last that both were validated at (one seed; at step 200)" in one.caption


def test_a_reference_that_is_not_finished_is_no_target() -> None:
    dapo = run("dapo", DAPO)
    dapo.planned_steps = 1000
    one = draw("fig2", [dapo, run("vl_norm", OURS)])
    assert artist(one, "reached") is None
    assert "no first hit is marked: DAPO is not finished (step 500 of 1000)." in one.caption


def test_the_reference_is_dapo_norm_in_the_other_family_or_what_there_is() -> None:
    runs = [run(method, DAPO, family="aggregation") for method in AGGREGATIONS]
    assert "against DAPO Norm" in draw("fig2", runs).title
    assert "against Dr. GRPO" in draw("fig2", [runs[3], runs[4]]).title
    assert draw("fig2", runs[:4]) is None
    assert draw("fig2", runs[4:]) is None


# ------------------------------------------------------------------------------------------------------------ curves


@pytest.mark.parametrize("seeds", [1, 2, 4, 5, 20])
def test_bands_contain_the_mean(seeds: int) -> None:
    generator = np.random.default_rng(0)
    series = [(np.arange(5), generator.random(5)) for _ in range(seeds)]
    curve = curves.curve_of(series)
    assert curve is not None
    table = np.array([values for _, values in series])
    assert curve.mean == pytest.approx(table.mean(axis=0))
    assert (curve.low <= curve.mean + 1e-12).all()
    assert (curve.mean <= curve.high + 1e-12).all()
    if seeds < 5:
        assert (curve.low == table.min(axis=0)).all()
        assert (curve.high == table.max(axis=0)).all()
    if seeds == 5:
        half = 2.776 * table.std(axis=0, ddof=1) / math.sqrt(5)  # t of 4 degrees of freedom
        assert curve.high - curve.mean == pytest.approx(half, rel=1e-3)


def test_a_mean_goes_on_without_a_seed_that_has_ended() -> None:
    steps = np.array([0, 10, 20, 30])
    long, short = (steps, np.array([0.0, 0.2, math.nan, 0.8])), (steps[:2], np.array([0.2, 0.4]))
    curve = curves.curve_of([long, short])
    assert curve is not None
    assert (list(curve.steps), curve.mean.tolist()) == ([0, 10, 30], pytest.approx([0.1, 0.3, 0.8]))
    assert (curve.whole, curve.apart) == (2, [])
    assert curve.high.tolist() == pytest.approx([0.2, 0.4, 0.8])
    assert curves.curve_of([(steps, np.full(4, math.nan))]) is None
    apart = curves.curve_of([(steps[:2], np.zeros(2)), (steps[2:], np.ones(2))])
    assert apart is not None
    assert (apart.whole, len(apart.apart)) == (0, 2)


def test_a_seed_that_has_ended_is_named_with_its_step() -> None:
    runs = [run("dapo", DAPO, seed) for seed in (0, 1)] + [run("dapo", {0: 0.1, 100: 0.4}, 2), run("vl_norm", OURS)]
    runs[1].metrics["actor/grad_norm"][300:] = math.nan
    fig3 = draw("fig3", runs)
    for drawing in (draw("fig2", runs), fig3):
        assert "After a seed's end the mean is of the others: dapo-2 (step 100)." in drawing.caption
    means = [line.get_xdata() for line in fig3.figure.axes[0].get_lines()]
    assert [100, 200, 300, 400, 500] in [list(steps) for steps in means], "the others' mean does not go on"
    training = draw("training", runs).caption
    assert "of the others: dapo-2 (step 100), dapo-1 (actor/grad_norm, step 299)." in training


def colors(drawing: Drawing) -> dict[str, str]:
    (legend,) = drawing.figure.legends
    return {
        text.get_text(): to_hex(handle.get_color()).upper()
        for text, handle in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }


def test_a_method_has_one_color_in_all_figures() -> None:
    runs = [run(method, DAPO, seed, family="aggregation") for method in AGGREGATIONS for seed in (0, 1)]
    for shown in (colors(draw(kind, runs)) for kind in ("fig2", "fig3", "training")):
        for label, color in shown.items():
            key = next(run.method_key for run in runs if label_of(run.method_key) == label)
            assert color == METHODS[key.split(":")[0]].color


def test_grid_has_a_row_for_each_task_and_model_and_a_column_for_each_length() -> None:
    places = [
        ("countdown", "3b", "3072"),
        ("countdown", "3b", "8192"),
        ("countdown", "7b", "3072"),
        ("math", "3b", "8192"),
    ]
    runs = [
        run(method, DAPO, family="aggregation", task=task, model=model, length=length)
        for task, model, length in places
        for method in ("dapo_norm", "vl_norm")
    ]
    drawing = draw("fig3", runs)
    shape = [[axes.get_visible() for axes in drawing.figure.axes[start : start + 2]] for start in (0, 2, 4)]
    assert shape == [[True, True], [True, False], [False, True]]
    assert drawing.figure.axes[2].get_title() == "CountDown, 7B, 3072 tokens"
    drawing.figure.draw_without_rendering()
    for axes in (drawing.figure.axes[0], drawing.figure.axes[2], drawing.figure.axes[5]):
        assert axes.get_ylabel()
        assert any(label.get_visible() and label.get_text() for label in axes.get_yticklabels())
    assert not any(label.get_visible() for label in drawing.figure.axes[1].get_yticklabels())
    assert [bool(axes.get_xlabel()) for axes in drawing.figure.axes if axes.get_visible()] == [False, False, True, True]
    lines = [line for line in drawing.figure.axes[0].get_lines() if list(line.get_ydata()) == list(DAPO.values())]
    assert {to_hex(line.get_color()).upper() for line in lines} == {"#009E73", "#D55E00"}


def test_alpha_by_task_is_one_line_of_the_legend() -> None:
    runs = [run("vl_norm", DAPO, family="aggregation", alpha=1.0)]
    runs += [run("vl_norm", DAPO, family="aggregation", alpha=0.75, task="math")]
    drawing = draw("fig3", runs)
    assert list(colors(drawing)) == ["VL Norm"]
    assert [axes.get_title() for axes in drawing.figure.axes] == [
        "CountDown, 3B, 3072 tokens, α = 1",
        "Math, 3B, 3072 tokens, α = 0.75",
    ]


def test_sets_in_one_number_are_called_weighted() -> None:
    one = run("vl_norm", DAPO, task="math")
    for sets in one.validations.values():
        sets["other"] = sets["set"]
    assert draw("fig3", [one]).figure.axes[0].get_ylabel() == "validation weighted Avg@8"
    assert draw("fig3", [run("vl_norm", DAPO)]).figure.axes[0].get_ylabel() == "validation Avg@8"


def test_models_are_named_and_have_panels_of_their_own() -> None:
    runs = [run(method, DAPO, model=model) for method in ("dapo", "vl_norm") for model in ("tiny", "3b")]
    assert [axes.get_title() for axes in draw("fig3", runs).figure.axes] == [
        "CountDown, 3B, 3072 tokens",
        "CountDown, tiny, 3072 tokens",
    ]
    assert draw("training", runs[:1]).title == "Training: CountDown, tiny, 3072 tokens"


# ------------------------------------------------------------------------------------------- training, lengths, alpha


def test_training_shows_each_run_and_the_trailing_mean() -> None:
    runs = [run("dapo", DAPO, seed) for seed in (0, 1)]
    drawing = draw("training", runs, 20)
    assert [axes.get_title() for axes in drawing.figure.axes] == list(training.TRAINING.values())
    *raw, smoothed = drawing.figure.axes[0].get_lines()
    assert [len(line.get_xdata()) for line in raw] == [501, 501]
    both = np.mean([one.metrics["actor/entropy"] for one in runs], axis=0)
    assert smoothed.get_ydata()[-1] == pytest.approx(both[-20:].mean())
    assert "trailing mean of 20 steps" in drawing.caption
    assert "trailing mean of 11 steps" in draw("training", runs, 3).caption


def test_length_bands() -> None:
    drawing = draw("lengths", [run("dapo", DAPO, seed) for seed in (0, 1)])
    tokens, clipped, characters = drawing.figure.axes
    (mean,) = tokens.get_lines()
    assert mean.get_ydata()[[0, -1]] == pytest.approx([100.5, 600.5])
    (band,) = tokens.collections
    extent = band.get_paths()[0].get_extents()
    assert (10 <= extent.y0 <= 11, extent.y1) == (True, 710.0)
    assert set(clipped.get_lines()[0].get_ydata()) == {0.1}
    assert characters.get_lines()[0].get_ydata() == pytest.approx(np.full(6, 400.5))
    outer, inner = (one.get_paths()[0].get_extents() for one in characters.collections)
    assert (outer.y0, outer.y1) == pytest.approx(tuple(np.quantile(np.arange(1, 801), (0.05, 0.95))))
    assert (inner.y0, inner.y1) == pytest.approx(tuple(np.quantile(np.arange(1, 801), (0.25, 0.75))))
    assert characters.get_ylabel() == "characters, validation"


def test_own_metrics_of_the_aggregation() -> None:
    lengths, ratio, _, weights = draw("vl-norm", [run("dapo", DAPO), run("vl_norm", OURS)]).figure.axes
    lasts = {line.get_linestyle(): line.get_ydata()[0] for line in lengths.get_lines() if line.get_linewidth() > 1}
    assert lasts == {"-": 100, "--": 50}
    assert {round(float(value), 6) for line in ratio.get_lines() for value in line.get_ydata()} == {1.414214}
    assert weights.get_yscale() == "log"
    assert draw("vl-norm", [run("dapo", DAPO)]) is None


@pytest.fixture(scope="module")
def alphas() -> list[Run]:
    runs = [
        run("vl_norm", {**OURS, 500: 0.5 + 0.2 * alpha}, alpha=alpha, family="aggregation") for alpha in (0.25, 0.75, 1)
    ]
    return [*runs, run("dr_grpo_norm", DAPO, family="aggregation")]


def test_alpha_figure_has_each_alpha_and_dr_grpo_norm_at_0(alphas: list[Run]) -> None:
    left, right = draw("alpha", alphas).figure.axes
    assert len({to_hex(line.get_color()) for line in left.get_lines()}) == 3
    points = {
        float(line.get_xdata()[0]): float(line.get_ydata()[0])
        for line in right.get_lines()
        if len(line.get_xdata()) == 1
    }
    assert points == pytest.approx({0.25: 0.55, 0.75: 0.65, 1.0: 0.7, 0.0: 0.75})


def test_of_several_alphas_the_other_figures_show_the_papers(alphas: list[Run]) -> None:
    drawing = draw("fig3", alphas)
    assert list(colors(drawing)) == ["VL Norm (α = 1)", "Dr. GRPO Norm"]
    assert "alpha-aggregation-countdown-3b-3072" in drawing.caption
    of_math = [run("vl_norm", OURS, alpha=alpha, task="math") for alpha in (0.75, 1)]
    assert "α = 0.75" in draw("fig2", [*of_math, run("dapo", DAPO, task="math")]).title


# --------------------------------------------------------------------------------------------------------- odd runs


def without(one: Run, *metrics: str) -> Run:
    one.metrics = {key: values for key, values in one.metrics.items() if not key.startswith(metrics)}
    return one


ODD = {
    "no runs": [],
    "one validation": [run("dapo", {0: 0.1}), run("vl_norm", {0: 0.2})],
    "one step": [run("dapo", {1: 0.1}), run("vl_norm", {1: 0.2})],
    "no validation": [run("vl_norm", {})],
    "no metrics": [without(run("vl_norm", DAPO, dumps=False), "")],
    "dumps only": [without(run(method, DAPO), "") for method in ("vl_norm", "dapo")],
    "all zero": [run(method, dict.fromkeys(DAPO, 0.0)) for method in ("vl_norm", "dapo")],
    "seeds without a common step": [run("vl_norm", {0: 0.1, 10: 0.2}), run("vl_norm", {5: 0.1, 15: 0.3}, 1)],
    "unknown setting": [run("mine", DAPO, family="", task="", model="", length="")],
    "names that are markup": [run(name, DAPO, task="$x_{", model="<b>") for name in ("$a_{x$ b", "_hidden", "a/../b")],
    "no α": [run("vl_norm", OURS, alpha=None), run("vl_norm", OURS, alpha=0.5), run("dapo", DAPO)],
    "unpaired sets": [run("vl_norm", OURS, dumps=False), run("dapo", DAPO)],
}


@pytest.mark.parametrize("case", ODD)
def test_odd_runs_are_drawn(case: str) -> None:
    found = drawn(ODD[case])
    assert (case in ("no runs", "no metrics")) == (not found)
    for drawing in found.values():
        drawing.figure.draw_without_rendering()  # lays out and reads all text, as writing a file does
        assert drawing.caption.endswith(".")
        assert "nan" not in drawing.caption


def test_steps_that_lack_a_metric_are_left_out() -> None:
    one = run("dapo", DAPO)
    one.metrics["actor/entropy"][1::2] = math.nan
    one.metrics["actor/grad_norm"][:] = math.nan
    drawing = draw("training", [one])
    raw, smoothed = drawing.figure.axes[0].get_lines()
    assert len(raw.get_xdata()) == 251
    assert np.isfinite(smoothed.get_ydata()).all()
    assert training.TRAINING["actor/grad_norm"] not in [
        axes.get_title() for axes in drawing.figure.axes if axes.get_visible()
    ]


def test_nothing_is_cut_where_runs_stand_at_different_steps() -> None:
    short, long = {0: 0.1, 10: 0.2}, {0: 0.1, 20: 0.3, 40: 0.9}
    runs = [run("vl_norm", short), run("grpo_norm", long), run("dapo_norm", short), run("dapo_norm", short, 1)]
    runs[1].metrics["response_length/clip_ratio"][:] = 0.9
    for sets in runs[1].validations.values():
        sets["set"].characters *= 10
    for drawing in drawn(runs).values():
        for axes in drawing.figure.axes:
            (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
            for x, y in (
                point
                for line in axes.get_lines()
                for point in line.get_xydata()
                if line.get_transform() == axes.transData
            ):
                assert left <= x <= right, drawing.name
                assert bottom <= y <= top, drawing.name
            for extent in (one.get_datalim(axes.transData) for one in axes.collections):
                assert left <= extent.x0 <= extent.x1 <= right, drawing.name
                assert bottom <= extent.y0 <= extent.y1 <= top, drawing.name


def test_many_runs_have_one_legend() -> None:
    runs = [run(method, DAPO, seed, family="aggregation") for method in AGGREGATIONS for seed in range(4)]
    for drawing in (draw(kind, runs) for kind in ("fig2", "fig3", "training", "vl-norm")):
        assert len(drawing.figure.legends) == 1
        assert not [axes for axes in drawing.figure.axes if axes.get_legend()]


def test_each_figure_has_a_name_of_its_own() -> None:
    names = [drawing.name for drawing in figures.drawings([run("dapo", DAPO), run("vl_norm", OURS)], 3)]
    assert len(set(names)) == len(names) == 5


# ------------------------------------------------------------------------------------------------------------- entropy


def test_entropies_of_all_methods_are_nats_a_token() -> None:
    """0.25 nats a token, M = 200, aggregated by verl as each method's weights say."""
    runs = [run(method, {0: 0.1, 9: 0.2}, family="aggregation") for method in ("dapo_norm", "dr_grpo", "vl_norm")]
    plain, over_m, ours = runs
    lengths = over_m.metrics["response_length/mean"]
    plain.metrics["actor/entropy"] = np.full(10, 0.25)
    over_m.metrics["actor/entropy"], over_m.scale_factor = 0.25 * lengths / 200, 200.0
    ours.metrics["actor/entropy"] = np.full(10, 0.25 * 0.3)
    ours.metrics["actor/vl_norm/weighted_tokens"] = np.full(10, 6.0)
    ours.metrics["actor/vl_norm/denominator"] = np.full(10, 20.0)
    for one in runs:
        found = measures.entropy_per_token(one)
        assert found is not None
        np.testing.assert_allclose(found, 0.25)
    del ours.metrics["actor/vl_norm/denominator"]
    assert measures.entropy_per_token(ours) is None
    (panel, *_) = draw("training", runs).figure.axes
    assert {len(line.get_xdata()) for line in panel.lines} == {10}
    assert {round(float(value), 9) for line in panel.lines for value in line.get_ydata()} == {0.25}
