"""What the charts show of runs, and the marks, colours and axes that draw it: seeds, clocks, smoothing, dark pages."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.report_runs import line, put, read, text
from vlnorm_verl.methods import METHODS
from vlnorm_verl.report import charts, labels, svg
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.groups import Comparison


def test_a_mean_is_over_the_seeds_that_have_not_ended() -> None:
    one, two = (np.array([1, 2, 3]), np.array([0.0, 2.0, 4.0])), (np.array([1, 2]), np.array([2.0, 4.0]))
    found = charts.mean_of([one, two])
    assert (found.steps.tolist(), found.mean.tolist(), found.whole) == ([1, 2, 3], [1.0, 3.0, 4.0], 2)
    assert (found.low.tolist(), found.high.tolist()) == ([0.0, 2.0, 4.0], [2.0, 4.0, 4.0])
    assert not len(charts.mean_of([(np.array([1]), np.ones(1)), (np.array([2]), np.ones(1))]).steps)


def test_seeds_without_a_common_step_are_inside_the_axis() -> None:
    seeds = [charts.Series("x", np.array([step]), np.array([5.0 + step])) for step in (1, 2)]
    shown = charts.Panel("entropy", seeds)
    low, high = charts.y_range(shown, charts.by_method(seeds))
    assert low < 6
    assert high > 7


def test_long_series_are_means_of_neighbouring_steps_and_know_their_clock(tmp_path: Path) -> None:
    more = {"perf/total_num_tokens": 10.0, "perf/time_per_step": 36.0}
    put(tmp_path / "vl_norm.jsonl", "".join(line(step, **more, **{"x/y": float(step)}) for step in range(1001)))
    _, rest = charts.charts(Comparison(read(tmp_path)), plots=["x/y"])
    (training,) = (chart for of in rest.values() for chart in of)
    (panel,) = (panel for panel in training.panels if panel.title == "x/y")
    (series,) = panel.series
    assert len(series.values) == charts.POINTS
    assert series.values[:2].tolist() == series.steps[:2].tolist() == [3.0, 8.0]
    assert series.tokens is not None
    assert series.hours is not None
    assert series.tokens[:2].tolist() == [50.0, 100.0]
    assert series.hours[-1] == pytest.approx(10.0)


@pytest.mark.parametrize(("steps", "smooth", "window"), [(100, 1, 1), (100, None, 3), (100, 7, 7), (1000, 1, 5)])
def test_smoothing_of_one_step_is_none(steps: int, smooth: int | None, window: int, tmp_path: Path) -> None:
    put(tmp_path / "vl_norm.jsonl", text((0, steps, 0.0)))
    (accuracy,), rest = charts.charts(Comparison(read(tmp_path)), smooth)
    (training,) = (chart for of in rest.values() for chart in of)
    assert {panel.smooth for panel in training.panels} == {window}
    assert {panel.smooth for panel in accuracy.panels} == {1}
    assert ("trailing mean" in training.caption) == (window not in (1, 5))


def test_further_metrics_keep_the_reports_headings_and_say_what_is_left_out(tmp_path: Path) -> None:
    more = {f"timing_s/{index}": 1.0 for index in range(30)}
    put(tmp_path / "vl_norm.jsonl", "".join(line(step, **more) for step in range(21)))
    runs = read(tmp_path)
    _, rest = charts.charts(Comparison(runs), None, charts.plotted(runs, ["actor/grad_norm", "timing_s/*"]))
    (training,) = (chart for of in rest.values() for chart in of)
    titles = [panel.title for panel in training.panels]
    assert titles[0] == charts.TRAINING["actor/grad_norm"]
    assert len(titles) == 1 + charts.MOST_PLOTTED
    assert training.caption.endswith(f"{charts.MOST_PLOTTED} metrics of these and {30 - charts.MOST_PLOTTED} more.")


def test_the_clock_of_a_far_step_counts_the_gap_as_mean_steps(tmp_path: Path) -> None:
    steps = (0, 1, 10, 10**12)
    put(tmp_path / "vl_norm.jsonl", "".join(line(s, **{"perf/total_num_tokens": 10.0}) for s in steps))
    (accuracy,), _ = charts.charts(Comparison(read(tmp_path)))
    (series,) = accuracy.panels[0].series
    assert series.tokens is not None
    assert series.tokens.tolist() == [0.0, 100.0, 1e13]


def test_a_panel_says_whose_last_step_it_means(tmp_path: Path) -> None:
    put(tmp_path / "vl_norm.jsonl", text((0, 100, 0.1)))
    put(tmp_path / "token-mean.jsonl", text((0, 100, 0.0)))
    _, rest = charts.charts(Comparison(read(tmp_path)))
    (panel,) = next(chart for of in rest.values() for chart in of if chart.name.startswith("reached")).panels
    assert "sooner than DAPO Norm's last step; DAPO Norm itself at 90–100." in panel.note


def test_a_mark_at_the_foot_of_a_panel_keeps_its_label_inside() -> None:
    series = charts.Series("vl_norm:1", np.array([1.0, 2.0]), np.array([0.9, 0.5]))
    shown = charts.Panel("p", [series], target=0.5, marks=(charts.Mark("vl_norm:1", 2.0, "1–2", False),))
    (y,) = re.findall(r'y="([\d.]+)" text-anchor="end">1–2<', svg.panel(shown, labels.looks(["vl_norm:1"])))
    assert float(y) < svg.HEIGHT - svg.BOTTOM


def test_a_difference_of_nothing_has_no_sign() -> None:
    assert [labels.points(value, True) for value in (0.046, 0.0001, -0.0001, -0.02)] == ["+4.6", "0.0", "0.0", "−2.0"]
    assert [labels.points(value, False) for value in (0.046, -0.0001)] == ["+0.046", "0.000"]


def test_colours_mean_one_thing_on_a_page() -> None:
    found = labels.looks(["dapo", "dapo_norm", "vl_norm:1", "vl_norm:0.5", "vl_norm:0", "mine", "grpo_norm"])
    assert len({look.color for look in found.values()}) == len(found)
    assert found["vl_norm:1"].color == "#D55E00"
    assert len({found[key].dash for key in ("vl_norm:1", "vl_norm:0.5", "vl_norm:0")}) == 3


def test_every_line_is_seen_on_a_dark_page() -> None:
    """WCAG 2.2, 1.4.11: a contrast of 3 with what is around."""

    def luminance(color: str) -> float:
        rgb = np.array([*bytes.fromhex(color[1:])]) / 255
        return float([0.2126, 0.7152, 0.0722] @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4))

    keys = [*METHODS, *(f"vl_norm:{alpha}" for alpha in range(4)), "mine", "yours"]
    for look in labels.looks(keys).values():
        assert (luminance(look.dark) + 0.05) / (luminance("#16181b") + 0.05) > 3, look


def test_an_axis_of_differences_is_not_ruled_by_the_widest_interval() -> None:
    cells = [Estimate(0.02, 0.01, 0.03), Estimate(0.03, -0.5, 0.56)]
    assert svg.axis_limit(cells) == pytest.approx(1.08 * 0.09)
    assert svg.axis_limit([Estimate(0.5), Estimate(0.01, 0.0, 0.02)]) == pytest.approx(1.08 * 0.5)
    drawn = svg.difference(cells[0], 0.1)
    assert 'class="difference established"' in drawn
    assert 'x1="55.0%" x2="65.0%"' in drawn
    assert svg.difference(None, 0.1) == ""


def test_settings_have_figures_of_their_own_in_the_folder() -> None:
    names = [labels.file_name("training", "", task) for task in ("数学", "物理", "../../x", "..", "a b/\0\ud800")]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"training[\w.-]+", name) for name in names)
