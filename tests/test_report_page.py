"""The page and its verdicts on runs of known truth (tests/synthetic_runs.py), and the page in a browser.

Covered: that what is said first is what the dumps say, that nothing a model wrote is markup, what changes when a run
goes on. The browser test needs Chromium and Playwright (`pip install playwright`), and is slow.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread
from rich.console import Console

from tests.report_runs import dump_line, line, looked_at, put, random_dump, read, report, table_of, text, write_run
from tests.synthetic_runs import EFFECTS, truth, write
from tests.test_report_files import Page
from vlnorm_verl.report import build, changes, charts, configs, examples, labels, plots, tables, verdict
from vlnorm_verl.report.changes import Memo
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.groups import Comparison
from vlnorm_verl.report.run import Run
from vlnorm_verl.report.style import use_style

STEPS, PROBLEMS = 100, 64
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DAPO = "CountDown, 3B, 3072 tokens, full DAPO"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic")
    write(root / "runs", STEPS, PROBLEMS)
    return root


@pytest.fixture(scope="module")
def said(folder: Path) -> list[str]:
    return report(folder / "runs", out=folder / "out")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Run]:
    return read(folder / "runs")


def counted(folder: Path, name: str, step: int) -> float:
    """Share of correct responses in a dump, by plain JSON."""
    rows = (folder / "runs" / name / "validation" / f"{step}.jsonl").read_text().splitlines()
    return float(np.mean([json.loads(row)["acc"] for row in rows]))


# ------------------------------------------------------------------------------------------------------------- numbers


def test_every_value_is_what_the_dumps_say_and_near_the_truth(folder: Path, said: list[str]) -> None:
    rows = {(row["setting"], row["method"]): row for row in table_of(folder / "out", "results")}
    assert len(rows) == 20
    covered = 0
    for place, effects in EFFECTS.items():
        for method in effects:
            stem = f"{place.family}-{place.task}-3b-{place.length}-{method.replace(':', '-alpha')}-seed"
            names = [path.name for path in (folder / "runs").glob(f"{stem}[0-9]")]
            names = [name for name in names if (folder / "runs" / name / "validation" / f"{STEPS}.jsonl").exists()]
            expected = np.mean([counted(folder, name, STEPS) for name in names])
            (row,) = (row for row in rows.values() if abs(float(row["Avg@8"]) - expected) < 1e-9)
            covered += float(row["Avg@8 low"]) <= truth(place, method, 1.0, PROBLEMS) <= float(row["Avg@8 high"])
    assert covered >= 18, "95% intervals of 20 values"


def test_the_verdict_names_the_best_method_and_what_is_established(said: list[str]) -> None:
    verdicts = {sentence.split(":")[0]: sentence for sentence in said[:4]}
    assert "GRPO Norm 0." in verdicts["CountDown, 3B, 8192 tokens"].split("highest")[0]
    assert "over Dr. GRPO," in verdicts["CountDown, 3B, 8192 tokens"].replace("Dr. GRPO.", "Dr. GRPO,")
    assert "DAPO + VL Norm (α = 1) 0." in verdicts[DAPO]
    assert "over DAPO + overlong filtering (one seed; 1 of 3 seeds: no interval)" in verdicts[DAPO]
    assert "established over none" in verdicts["Math, 3B, 8192 tokens"], "all methods are the same there"
    several = next(sentence for sentence in said if "differences are judged" in sentence)
    assert "up to " in several


@pytest.mark.parametrize(("methods", "pairs"), [(2, None), (3, 3), (5, 10)])
def test_every_pair_of_methods_counts_as_one_that_could_look_established(methods: int, pairs: int | None) -> None:
    over = tuple(verdict.Over(str(other), "open", "+1.0", "over") for other in range(1, methods))
    said = verdict.several_at_once([verdict.Verdict("", "", Estimate(0.5), "", over, "")])
    assert (f"up to {1 - 0.95 ** (pairs or 0):.0%}" in said) == (pairs is not None)
    assert (f"each of the {pairs} pairs" in said) == (pairs is not None)


def test_what_is_wrong_is_said_with_the_runs_names(runs: list[Run]) -> None:
    odd = looked_at(runs)
    assert odd["Not a finite number any more"][0].startswith("aggregation-countdown-3b-8192-dr_grpo_norm-seed1 (")
    assert odd["Not in the report"] == ["aggregation-countdown-3b-8192-dr_grpo_norm-seed2 (no metrics yet)"]
    assert [which.split(" (")[0][-13:] for which in odd["Not finished"]] == ["dr_grpo-seed2", "ishment-seed1"]
    assert odd["One seed only"] == [f"DAPO + overlong filtering ({DAPO})"]


def test_a_metric_that_ended_is_said_of_its_own_run(tmp_path: Path) -> None:
    for name, last in (("a", "NaN"), ("b", "0.5")):
        end = line(21).replace('"actor/grad_norm": 0.5', f'"actor/grad_norm": {last}')
        put(tmp_path / f"{name}.jsonl", text((0, 20, 0.0)) + end)
    odd = looked_at(read(f"mine={tmp_path}/a.jsonl", f"mine={tmp_path}/b.jsonl"))
    assert odd["Not a finite number any more"] == ["mine/a (actor/grad_norm, from step 21 on)"]


@pytest.mark.parametrize(
    ("estimate", "state"),
    [
        (Estimate(0.1, 0.05, 0.2), "established"),
        (Estimate(-0.1, -0.2, -0.05), "established"),
        (Estimate(0.1, -0.05, 0.2), "open"),
        (Estimate(0.1, 0.05, 0.2).of_one_seed().noted("at step 4"), "one seed"),
        (Estimate(0.1, note="not paired"), "no interval"),
    ],
)
def test_states_of_a_difference(estimate: Estimate, state: str) -> None:
    assert estimate.state == state


def test_a_method_that_is_behind_where_both_were_is_not_established(tmp_path: Path) -> None:
    for seed in range(3):
        put(tmp_path / f"vl_norm_s{seed}.jsonl", text((0, 20, 0.1 + seed / 1000)))
        put(tmp_path / f"token-mean_s{seed}.jsonl", text((0, 60, 0.0)))
    (found,) = verdict.verdicts(Comparison(read(tmp_path)))
    assert (found.best, found.over[0].relation, found.sure) == ("DAPO Norm", "behind", False)
    assert "(over seeds only; at step 20)" in found.over[0].words
    assert not verdict.Over("another", "established", "−10.1 points", "behind").established


def test_what_is_established_at_an_earlier_step_is_so_far(tmp_path: Path) -> None:
    for seed in range(3):
        put(tmp_path / f"vl_norm_s{seed}.jsonl", text((0, 60, 0.2 + seed / 1000)))
        put(tmp_path / f"token-mean_s{seed}.jsonl", text((0, 20, 0.0)))
    (found,) = verdict.verdicts(Comparison(read(tmp_path)))
    assert (found.best, found.claim) == ("VL Norm (α = 1)", "best of 2 so far, established")
    assert "(over seeds only; at step 20)" in found.over[0].words


def test_the_verdict_says_when_the_best_method_was_where_the_next_one_ended(tmp_path: Path) -> None:
    for seed in range(3):
        put(tmp_path / f"vl_norm_s{seed}.jsonl", text((0, 60, 0.2 + seed / 1000)))
        put(tmp_path / f"token-mean_s{seed}.jsonl", text((0, 60, 0.0)))
    (found,) = verdict.verdicts(Comparison(read(tmp_path)))
    assert found.reach == (
        "It reaches DAPO Norm's final accuracy at step 10–20, 3.00–6.00× sooner than DAPO Norm's last step; "
        "DAPO Norm itself is there at 50–60."
    )


def test_of_equal_methods_the_bold_one_is_the_verdicts(tmp_path: Path) -> None:
    for name in ("vl_norm", "token-mean"):
        put(tmp_path / f"{name}.jsonl", text((0, 20, 0.0)))
    compared = Comparison(read(tmp_path))
    results, (found,) = tables.tables(compared)[0], verdict.verdicts(compared)
    assert [results.rows[index][1] for index in results.bold] == [found.best]


def test_what_configurations_differ_in(runs: list[Run]) -> None:
    found = configs.differing(Comparison(runs))
    assert found is not None
    rows = [row for row in found.rows if str(row[0]).startswith("Math")]
    assert [row[1] for row in rows] == ["actor_rollout_ref.actor.optim.lr"]
    assert str(rows[0][2]).endswith("2e-06: Dr. GRPO")


def test_long_values_are_compared_whole(tmp_path: Path) -> None:
    for method in ("vl_norm", "dapo_norm"):
        config = write_run(tmp_path, method, curve={1: 0.5}) / "config.yaml"
        config.write_text(f"{config.read_text()}data: {{prompt: {'x' * 100} {method}}}\n")
    found = configs.differing(Comparison(read(tmp_path)))
    assert found is not None
    assert [row[1] for row in found.rows] == ["data.prompt"]
    assert str(found.rows[0][2]).startswith(f"{'x' * (configs.LONGEST - 1)}…: ")


# ---------------------------------------------------------------------------------------------------------------- page


def test_an_example_is_right_where_its_score_is_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={10: 0.5})
    lines = dump_line("p", 1, output="good") + dump_line("q", 0, output="bad")
    put(folder / "validation" / "10.jsonl", lines)
    _, found = examples.examples(read(folder))
    assert [(example.right, example.response) for example in found] == [(True, "good"), (False, "bad")]


def test_figures_on_request_have_the_pages_lines(folder: Path, tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    report(*sorted((folder / "runs").glob("dapo-*")), out=tmp_path, figures=True)
    names = {file.stem for file in (tmp_path / "figures").glob("*.png")}
    assert {"differences", "accuracy", "training-dapo-countdown-3b-3072", "reached-dapo-countdown-3b-3072"} <= names
    assert imread(tmp_path / "figures" / "differences.png").std() > 0.01
    series = [charts.Series("vl_norm:1", np.array([1.0, 2.0]), np.array([0.25, 0.75]))]
    with use_style():
        _, axes = plt.subplots()
        plots._panel(axes, charts.Panel("p", series), labels.looks(["vl_norm:1"]))
        assert next(list(one.get_ydata()) for one in axes.get_lines()) == [0.25, 0.75]
        plt.close()


def test_the_page_begins_with_the_verdicts_and_runs_only_its_own_script(folder: Path, said: list[str]) -> None:
    content = (folder / "out" / "report.html").read_text()
    page = Page(content)
    assert len(content) < 3_000_000
    assert content.index('class="verdict"') < content.index("Look at") < content.index("<table>")
    assert page.names.count("script") == 2
    assert "default-src 'none'" in content
    assert "<b>bold</b>" not in content, "what a model wrote is text"
    assert "&lt;b&gt;bold&lt;/b&gt;&lt;script&gt;1" in content
    assert content.count(">right:") == content.count(">wrong:") == 5 * 20
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", content)


def test_nothing_is_done_again_for_the_same_inputs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", curve={1: 0.5, 2: 0.6})
    first = report(tmp_path / "runs", out=tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    page.write_text("mine")
    assert report(tmp_path / "runs", out=tmp_path / "out") == first
    assert page.read_text() == "mine"
    put(run / "validation" / "2.jsonl", "")
    report(tmp_path / "runs", out=tmp_path / "out")
    assert "<html" in page.read_text()
    page.write_text("mine")
    report(tmp_path / "runs", out=tmp_path / "out", baseline="vl_norm")
    assert "<html" in page.read_text()
    page.unlink()
    report(tmp_path / "runs", out=tmp_path / "out", baseline="vl_norm")
    assert "<html" in page.read_text()


def test_nothing_is_done_again_where_the_dumps_are_elsewhere(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", dumps={10: random_dump(1, 0.5)})
    dumps = (run / "validation").rename(tmp_path / "dumps")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["validation_data_dir"] = str(dumps)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    first = report(tmp_path / "runs", out=tmp_path / "out")
    assert "[" in first[0], "there is an interval, so the dumps were found"
    page = tmp_path / "out" / "report.html"
    page.write_text("mine")
    assert report(tmp_path / "runs", out=tmp_path / "out") == first
    assert page.read_text() == "mine"
    (dumps / "10.jsonl").write_text("")
    report(tmp_path / "runs", out=tmp_path / "out")
    assert "<html" in page.read_text()


def test_a_report_of_another_version_of_the_package_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "runs", curve={1: 0.5, 2: 0.6})
    module = put(tmp_path / "package" / "report" / "tables.py", "")
    monkeypatch.setattr(changes, "__file__", str(module))
    report(tmp_path / "runs", out=tmp_path / "out")
    page = put(tmp_path / "out" / "report.html", "old")
    module.write_text("# new")
    report(tmp_path / "runs", out=tmp_path / "out")
    assert "<html" in page.read_text()


def test_tables_are_printed_once_while_nothing_changes(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", curve={1: 0.5, 2: 0.6})
    request = build.Request((str(tmp_path / "runs"),), tmp_path / "out", verbose=True)
    memo, console = Memo(), Console(file=io.StringIO(), width=200)
    for _ in range(2):
        build.build(request, console, memo)
    assert console.file.getvalue().count("What was read") == 1  # type: ignore[attr-defined]
    build.build(request, console)
    assert console.file.getvalue().count("What was read") == 2  # type: ignore[attr-defined]


def test_only_logs_that_have_changed_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [put(tmp_path / f"{name}.jsonl", text((0, 20, 0.0))) for name in ("vl_norm", "token-mean")]
    memo = Memo()
    before = read(tmp_path, memo=memo)
    from vlnorm_verl.report import read as reading

    touched: list[Path] = []
    original = reading.read_starts
    monkeypatch.setattr(reading, "read_starts", lambda of, notes: touched.extend(of) or original(of, notes))
    with open(files[0], "a") as file:
        file.write(text((21, 30, 0.0)))
    after = read(tmp_path, memo=memo)
    assert touched == [files[0]]
    assert [len(run.steps) for run in before] == [21, 21]
    assert sorted(len(run.steps) for run in after) == [21, 31]


# ------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without one on the PATH it is playwright's own, which it says how to install.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844)])
def test_a_reader_toggles_hovers_changes_x_and_zooms(
    width: int, height: int, browser: object, folder: Path, said: list[str]
) -> None:
    page = browser.new_page(viewport={"width": width, "height": height})  # type: ignore[attr-defined]
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(f"file://{folder}/out/report.html")
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing is wider than the screen"
    assert page.locator(".verdict").first.bounding_box()["y"] < 100
    chart = page.locator("svg.panel").first
    chart.scroll_into_view_if_needed()
    assert chart.locator("path.line").count() == 5
    page.get_by_label("GRPO Norm", exact=True).uncheck()
    assert chart.locator("path.line").count() == 4
    page.get_by_label("each seed").check()
    assert chart.locator("path.thin").count() >= 3 * 4 - 1
    page.locator("select[name=x]").select_option("tokens")
    assert chart.locator("text.axis").text_content() == "tokens"
    box = chart.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.5 * box["width"], middle)
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert "VL Norm (α = 1) 0." in tip.text_content()
    assert "GRPO Norm 0." not in tip.text_content().replace("Dr. GRPO Norm", "")
    before = chart.locator("text.x").all_text_contents()
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], middle)
    page.mouse.up()
    assert chart.locator("text.x").all_text_contents() != before
    page.get_by_role("button", name="whole range").click()
    assert chart.locator("text.x").all_text_contents() == before
    page.get_by_label("log y").check()
    assert errors == []


@pytest.mark.slow
def test_what_is_printed_is_what_was_chosen(browser: object, folder: Path, said: list[str]) -> None:
    page = browser.new_page()  # type: ignore[attr-defined]
    page.goto(f"file://{folder}/out/report.html")
    page.get_by_label("VL Norm (α = 1)", exact=True).uncheck()
    place = page.get_by_label("VL Norm (α = 1)", exact=True).get_attribute("value")
    assert page.locator(f"details svg.panel g.m{place}:not(.mark)").count() > 0, "nobody has seen these yet"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(f"svg.panel g.m{place}:not(.mark)").count() == 0
    assert page.locator("details:not(.example):not([open])").count() == 0


@pytest.mark.slow
def test_without_javascript_the_picture_stays(browser: object, folder: Path, said: list[str]) -> None:
    context = browser.new_context(java_script_enabled=False)  # type: ignore[attr-defined]
    page = context.new_page()
    page.goto(f"file://{folder}/out/report.html")
    assert page.locator("svg.panel").first.locator("path.line").count() == 5
    assert not page.locator("#tools").is_visible()
    assert page.locator(".legend").is_visible()


@pytest.mark.slow
def test_where_the_script_is_blocked_a_legend_stays(browser: object, folder: Path) -> None:
    """As by a server's Content-Security-Policy, with scripting on."""
    page = browser.new_page()  # type: ignore[attr-defined]
    page.route(
        "**/report.html",
        lambda route: route.fulfill(
            body=(folder / "out" / "report.html").read_bytes(),
            headers={"Content-Type": "text/html", "Content-Security-Policy": "script-src 'self'"},
        ),
    )
    page.goto("http://blocked.invalid/report.html")
    assert not page.locator("#tools").is_visible()
    assert page.locator(".legend").is_visible()
