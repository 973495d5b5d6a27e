"""The command `vlnorm-verl report` and its tables, from what real runs of verl wrote (tests/report_samples).

Expected numbers are counted here by other means. Not covered here: how tables and figures look
(tests/test_report_files.py, tests/test_report_page.py), coverage of intervals (tests/test_estimates.py).
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.report_runs import (
    KEY,
    SAMPLES,
    accuracy,
    dump_line,
    foot,
    line,
    looked_at,
    made,
    put,
    random_dump,
    read,
    read_one,
    record,
    report,
    table_of,
    text,
    write_run,
)
from vlnorm_verl.cli import app
from vlnorm_verl.files import UserError
from vlnorm_verl.report import measures, paper, tables, verdict
from vlnorm_verl.report.groups import Comparison
from vlnorm_verl.report.identity import Setting

NAME = "aggregation-countdown-tiny-256"
SET = "vlnorm_tiny_countdown"


# ------------------------------------------------------------------------------------------------------------ real runs


def counted(method: str, seed: int, step: int = 4) -> dict[tuple[str, str], list[float]]:
    """Scores of each problem of a sample's dump, by plain JSON."""
    found = defaultdict(list)
    for row in (SAMPLES / f"{NAME}-{method}-seed{seed}" / "validation" / f"{step}.jsonl").read_text().splitlines():
        entry = json.loads(row)
        found[entry["input"], entry["gts"]].append(entry["acc"])
    return found


def logged(method: str, seed: int, step: int = 4) -> dict[str, float]:
    for row in (SAMPLES / f"{NAME}-{method}-seed{seed}" / "metrics-000.jsonl").read_text().splitlines():
        if (entry := json.loads(row))["step"] == step:
            return entry["data"]
    raise AssertionError


def test_a_real_run_is_what_its_recipe_says() -> None:
    run = read_one(SAMPLES / f"{NAME}-vl_norm-seed0")
    assert run.setting == Setting("aggregation", "countdown", "tiny", "256")
    assert (run.method_key, run.seed, run.planned_steps) == ("vl_norm:1", 0, 4)
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    assert sorted(run.validations) == [0, 2, 4]
    assert run.notes == []
    assert np.isnan(run.metrics["actor/entropy"][0])
    assert run.metrics["actor/entropy"][4] == logged("vl_norm", 0)["actor/entropy"]
    assert run.metrics["actor/vl_norm/length_harmonic_mean"].shape == (5,)


def test_counts_of_a_real_dump() -> None:
    run = read_one(SAMPLES / f"{NAME}-vl_norm-seed0")
    for step in (0, 2, 4):
        problems, found = counted("vl_norm", 0, step), run.validations[step][SET]
        assert len(found.problems) == len(problems) == 16
        assert sorted(zip(found.n, found.correct, strict=True)) == sorted((len(r), sum(r)) for r in problems.values())
        own = logged("vl_norm", 0, step)[f"val-core/{SET}/acc/mean@8"]
        assert found.correct.sum() / found.n.sum() == pytest.approx(own)


@pytest.fixture(scope="module")
def made_of_samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a report on the samples, and what the command printed."""
    out = tmp_path_factory.mktemp("report")
    return out, invoke(SAMPLES, "--out", out, "--smooth", 2, "--figures")


def test_the_command_writes_and_prints_a_report(made_of_samples: tuple[Path, Any]) -> None:
    out, printed = made_of_samples
    assert printed.exit_code == 0, printed.output
    assert "VL Norm" in printed.stdout.strip().splitlines()[0], "the verdict comes first"
    assert f"page: {out}/report.html" in printed.output
    assert "Avg@8 " not in printed.output, "no table unless asked for"
    assert (out / "report.html").stat().st_size > 10_000
    written = json.loads((out / ".written.json").read_text())["files"]
    assert {"tables/results.csv", "tables/sets.tex", "figures/accuracy.png"} <= set(written)
    assert all((out / name).is_file() for name in written)


def test_rows_of_real_runs_have_what_their_dumps_say(made_of_samples: tuple[Path, Any]) -> None:
    rows = {row["method"]: row for row in table_of(made_of_samples[0], "results")}
    more = {row["method"]: row for row in table_of(made_of_samples[0], "details")}
    for method, label in (("dapo_norm", "DAPO Norm"), ("vl_norm", "VL Norm (α = 1)")):
        seeds = [counted(method, seed) for seed in (0, 1)]
        averages = [np.mean([np.mean(r) for r in problems.values()]) for problems in seeds]
        subsets = [
            np.mean([any(s) for r in problems.values() for s in itertools.combinations(r, 8)]) for problems in seeds
        ]
        row = rows[label]
        assert float(row["Avg@8"]) == pytest.approx(np.mean(averages))
        assert float(row["Avg@8 low"]) < np.mean(averages) < float(row["Avg@8 high"])
        assert float(row["Pass@8"]) == pytest.approx(np.mean(subsets))
        own = np.mean([logged(method, seed)[f"val-core/{SET}/acc/best@8/mean"] for seed in (0, 1)])
        assert float(more[label]["verl's best@8"]) == pytest.approx(own)
        assert (row["seeds"], row["step"]) == ("2", "4")


def test_the_difference_of_real_runs_is_over_seeds_with_problems_of_their_own(
    made_of_samples: tuple[Path, Any],
) -> None:
    """verl drew 16 other problems of 128 for each seed: t over seeds, at least what the problems give."""
    (row,) = (row for row in table_of(made_of_samples[0], "results") if row["method"] == "DAPO Norm")
    means = {m: [np.mean(list(counted(m, seed).values())) for seed in (0, 1)] for m in ("vl_norm", "dapo_norm")}
    gap = np.subtract(means["vl_norm"], means["dapo_norm"])
    assert float(row["VL Norm minus this"]) == pytest.approx(gap.mean())
    assert float(row["VL Norm minus this low"]) < gap.mean() - 12.7 * gap.std(ddof=1) / 2**0.5 + 1e-4
    assert row["VL Norm minus this note"] == "other problems in each seed"


def test_a_real_run_with_four_sets(tmp_path: Path) -> None:
    """verl drew eight problems of the four sets; two sets have a single one, which has no interval."""
    run = read_one(SAMPLES / "aggregation-math-tiny-128-vl_norm-seed0")
    sizes = {name: len(found.problems) for name, found in run.validations[2].items()}
    assert sizes == {"aime2024": 3, "amc": 1, "math500": 3, "minerva": 1}
    (row,) = made([run], "results")
    own = {name: run.metrics[f"val-core/{name}/acc/mean@8"][-1] for name in sizes}
    for name, column in tables.MATH_SETS.items():
        assert row[column].value == pytest.approx(own[name])
        assert np.isnan(row[column].low) == (sizes[name] == 1)
    expected = sum(own[name] * size for name, size in sizes.items()) / 8
    assert row["Avg@8"].value == pytest.approx(expected)
    assert "paper's Avg@8" not in row
    assert run.notes == ["no validation dump of steps 0"]


# --------------------------------------------------------------------------------------------------------------- tables


def test_which_table_a_run_belongs_to_is_what_its_recipe_says(tmp_path: Path) -> None:
    dapo = {"family": "dapo"}
    folders = [
        write_run(tmp_path / "a", curve={1: 0.5}),
        write_run(tmp_path / "a", "vl_norm:0.5", curve={1: 0.5}),
        write_run(tmp_path / "b", "dapo", curve={1000: 0.5}, recipe=dapo),
        write_run(tmp_path / "b", curve={1000: 0.6}, recipe=dapo),
        write_run(tmp_path / "c", curve={1: 0.5}, recipe={"task": "sudoku"}),
    ]
    runs = read(*folders)
    rows = made(runs, "results")
    assert [(row["setting"].split(",")[0], row["method"]) for row in rows] == [
        ("CountDown", "VL Norm (α = 0.5)"),
        ("CountDown", "VL Norm (α = 1)"),
        ("sudoku", "VL Norm (α = 1)"),
        ("CountDown", "DAPO"),
        ("CountDown", "DAPO + VL Norm (α = 1)"),
    ]
    families = ["aggregation only"] * 2 + ["3072 tokens"] + ["full DAPO"] * 2
    assert [row["setting"].split(", ")[-1] for row in rows] == families, "named only if two are called the same"
    assert [row["paper's accuracy"] for row in rows[2:]] == [None, "0.866 [paper, Fig. 2]", "not found"]
    assert rows[3]["paper's VL Norm minus this"] == "0.046 [paper, Fig. 2]"


def test_a_run_without_any_validation_is_left_out_of_the_tables(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={1: 0.5})
    (folder / "metrics-000.jsonl").write_text(record(1, **{"actor__grad_norm": 1.0}))
    run = read_one(folder)
    assert "no validation" in run.notes
    assert [table.name for table in tables.tables(Comparison([run]))] == ["inputs"]


def test_a_run_with_dumps_and_no_records_is_in_every_part_of_the_report(tmp_path: Path) -> None:
    bare, dump = write_run(tmp_path, "vl_norm:0.5", curve={10: 0.9}), random_dump(1, 0.9)
    (bare / "metrics-000.jsonl").write_text("")
    lines = [dump_line(problem, right, validation_set="set") for problem, found in dump.items() for right in found]
    put(bare / "validation" / "10.jsonl", "".join(lines))
    write_run(tmp_path, "dapo_norm", dumps={10: random_dump(2, 0.3)})
    said = report(tmp_path, out=tmp_path / "out")
    assert ": VL Norm (α = 0.5) 0." in said[0]
    assert "the only method" not in said[0]
    assert "over DAPO Norm" in said[0]
    assert [row["method"] for row in table_of(tmp_path / "out", "results")] == ["DAPO Norm", "VL Norm (α = 0.5)"]
    runs = read(tmp_path / "vl_norm-0.5-0", tmp_path / "dapo_norm-0")
    assert looked_at(runs)["No metrics, only validation dumps"] == ["vl_norm-0.5-0"]


def test_accuracies_that_are_not_avg_at_8_are_not_called_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path, curve={10: 0.5})
    data = {"val-core/set/reward/mean@1": 0.25, "val-core/set/reward/best@8/mean": 0.75}
    (folder / "metrics-000.jsonl").write_text(record(10, **data))
    (row,) = made([run := read_one(folder)], "results")
    assert row["Avg@1"].value == 0.25
    assert row["verl's best@8"] == 0.75
    assert "Not Avg@8 of verl's acc: mean@1 of reward (all runs)." in foot([run])
    eight = read_one(write_run(tmp_path / "8", "dapo_norm", curve={10: 0.5}))
    assert "Avg@k" in made([run, eight], "results")[0]
    assert "Not Avg@8 of verl's acc: mean@1 of reward (vl_norm-1.0-0)." in foot([run, eight])
    assert "Not Avg@8" not in foot([eight])


def test_a_reward_that_is_no_share_is_in_its_own_unit(tmp_path: Path) -> None:
    """Of the best one every value is in [0, 1]; of the other one not."""
    for method, rewards in (("vl_norm:1.0", (0.1, 0.41)), ("dapo_norm", (-0.8, -0.29))):
        for seed in (0, 1):
            folder = write_run(tmp_path, method, seed, curve={0: 0.5, 10: 0.5}, planned=10)
            data = [{"val-core/set/reward/mean@8": reward + seed / 50} for reward in rewards]
            records = [record(10 * i, **of_step) for i, of_step in enumerate(data)]
            (folder / "metrics-000.jsonl").write_text("".join(records))
    runs = read(tmp_path)
    assert not measures.is_rate(runs)
    (found,) = verdict.verdicts(Comparison(runs))
    assert found.over[0].difference == "+0.700"
    assert "as it was logged" in foot(runs)
    assert "correct responses" not in foot(runs)
    shares = [run for run in runs if run.method == "vl_norm"]
    assert measures.is_rate(shares)
    assert "correct responses" not in foot(shares), "a reward in [0, 1] need not be 0 or 1"


def test_without_vl_norm_and_baseline_the_table_says_how_to_compare(tmp_path: Path) -> None:
    for name in ("token-mean", "seq-mean-token-mean"):
        put(tmp_path / f"{name}.jsonl", text((0, 40, 0.0)))
    runs = read(tmp_path)
    assert "VL Norm minus this" not in made(runs, "results")[0]
    assert "--baseline METHOD" in foot(runs)
    assert made(runs, "speedup") == []


SETS = {"aime2024": 4, "amc": 6, "math500": 20, "minerva": 10}


def write_math(root: Path, method: str, right: dict[str, int], seed: int = 0, field: bool = True) -> Path:
    """right: how many of eight responses are right in each problem of a set."""
    recipe = {"task": "math", "alpha": 0.75}
    folder = write_run(root, method, seed, curve={0: 0.0}, recipe=recipe)
    data = {key: v for name, count in right.items() for key, v in accuracy(count / 8, name).items()}
    (folder / "metrics-000.jsonl").write_text(record(1000, **data))
    lines = [
        dump_line(f"{name} {i}", float(r < right[name]), **({"validation_set": name} if field else {}))
        for name, size in SETS.items()
        for i in range(size)
        for r in range(8)
    ]
    put(folder / "validation" / "1000.jsonl", "".join(lines))
    return folder


def test_sets_are_weighted_by_their_size(tmp_path: Path) -> None:
    right = {"aime2024": 0, "amc": 4, "math500": 6, "minerva": 2}
    folders = [write_math(tmp_path, "vl_norm:0.75", right), write_math(tmp_path, "grpo_norm", dict.fromkeys(SETS, 2))]
    grpo, vl = made(read(*folders), "results")
    assert (grpo["method"], vl["method"]) == ("GRPO Norm", "VL Norm (α = 0.75)")
    assert [vl[name].value for name in ("AIME2024", "AMC", "MATH500", "Minerva")] == [0, 0.5, 0.75, 0.25]
    expected = (0 * 4 + 0.5 * 6 + 0.75 * 20 + 0.25 * 10) / 40
    assert vl["Avg@8"].value == pytest.approx(expected)
    assert vl["Pass@8"].value == pytest.approx(36 / 40)
    assert grpo["VL Norm minus this"].value == pytest.approx(expected - 0.25)
    assert vl["VL Norm minus this"] is None
    steps, values = measures.accuracy_curve(read_one(folders[0]))
    assert (steps.tolist(), values.tolist()) == ([1000], [pytest.approx(expected)])


def test_dumps_that_do_not_say_the_set_leave_verls_numbers_without_intervals(tmp_path: Path) -> None:
    run = read_one(write_math(tmp_path, "vl_norm:0.75", dict.fromkeys(SETS, 2), field=False))
    (row,) = made([run], "results")
    assert (row["AMC"].value, row["AMC"].note) == (0.25, "no dumps")
    assert np.isnan(row["AMC"].low)
    assert "Pass@8" not in row
    assert any("do not say which validation set" in note for note in run.notes)
    assert "there is no weighted average" in foot([run])


def test_without_one_accuracy_it_is_said_how_to_have_one(tmp_path: Path) -> None:
    for method, right in (("vl_norm:0.75", 6), ("dapo_norm", 2)):
        write_math(tmp_path / "runs", method, {"aime2024": right, "amc": 4, "math500": 5, "minerva": 1}, field=False)
    said = report(tmp_path / "runs", out=tmp_path / "out")
    assert said[0] == "No accuracy that can be compared in these runs."
    (several,) = (one for one in said if "Several validation sets" in one)
    assert several.endswith(": DAPO Norm (Math, 3B, 3072 tokens), VL Norm (α = 0.75) (Math, 3B, 3072 tokens).")
    (metric,) = re.findall(r"for instance (\S+)\)", several)
    odd = looked_at(read(tmp_path / "runs"))
    assert not any("No validation" in what for what in odd)
    (which,) = (which for what, which in odd.items() if "do not say the validation set of a response" in what)
    assert which == ["dapo_norm-0", "vl_norm-0.75-0"]
    compared = report(tmp_path / "runs", out=tmp_path / "out", metric=metric)
    assert "VL Norm (α = 0.75) 0.750, highest of 2" in compared[0]
    assert any("do not say the validation set of a response" in one for one in compared)
    assert not any("Several validation sets" in one for one in compared)


def test_there_is_no_table_of_nothing_but_methods(tmp_path: Path) -> None:
    run = read_one(write_run(tmp_path, curve={1: 0.5}, recipe={"length": "8192"}))
    assert [table.name for table in tables.tables(Comparison([run]))] == ["results", "inputs"]


# ------------------------------------------------------------------------------------------------------------ the paper


def test_the_papers_values_stand_beside_its_own_models_only(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / model, curve={1: 0.5}, recipe={"model": model}) for model in ("3b", "tiny")]
    runs = read(*runs)
    rows = {row["setting"].split(", ")[1]: row for row in made(runs, "results")}
    assert rows["3B"]["paper's Avg@8"] == "0.847 [second-hand, of v1]"
    assert rows["3B"]["paper's Pass@8"] == "0.938 [second-hand, of v1]"
    assert rows["tiny"]["paper's Avg@8"] is None
    assert "paper's Avg@8" not in made(runs[1:], "results")[0]


def test_the_papers_values_are_given_to_their_setting_only() -> None:
    at = Setting("aggregation", "countdown", "3b", "3072")
    assert paper.cell(at, "grpo_norm", "avg@8") == "0.811 [second-hand, of v1]"
    assert paper.cell(at, "vl_norm:1", "avg@8") == "0.847 [second-hand, of v1]"
    assert paper.cell(at, "vl_norm:0.5", "avg@8") == "not found"
    assert paper.cell(at._replace(length="8192"), "vl_norm:1", "avg@8") == "not found"
    assert paper.cell(at, "vl_norm_as_coded:1", "avg@8") == "0.847 [second-hand, of v1]"
    figure_2 = at._replace(family="dapo")
    assert paper.cell(figure_2, "dapo", "accuracy") == "0.866 [paper, Fig. 2]"
    assert paper.cell(figure_2, "dapo_norm_as_coded", "accuracy") == "0.866 [paper, Fig. 2]"
    assert paper.cell(figure_2._replace(model="7b"), "dapo", "accuracy") is None


def test_the_foot_says_where_the_papers_values_were_read_and_what_concerns_its_rows(tmp_path: Path) -> None:
    curve = {0: 0.1, 10: 0.5}
    three = read_one(write_run(tmp_path / "3b", "grpo_norm", curve=curve))
    seven = read_one(write_run(tmp_path / "7b", curve=curve, recipe={"model": "7b"}))
    tiny = read_one(write_run(tmp_path / "tiny", curve=curve, recipe={"model": "tiny"}))
    texts = [foot([run]) for run in (three, seven, tiny)]
    assert ["CountDown 7B: in the paper's table GRPO Norm" in text for text in texts] == [False, True, False]
    assert ["entropy under VL Norm: between 0.1 and 0.2" in text for text in texts] == [False, True, False]
    assert ["a digest of the paper's first version" in text for text in texts] == [True, False, False]
    dapo = read_one(write_run(tmp_path / "d", "dapo", curve={1000: 0.5}, recipe={"family": "dapo"}))
    assert "the length is that of the authors' scripts [code]" in foot([dapo])


# ---------------------------------------------------------------------------------------------------------- the command


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "250"})


def test_other_keys_and_no_vl_norm(tmp_path: Path) -> None:
    for name, gain in (("token-mean", 0.0), ("mine", 2.0)):
        for seed in (0, 1):
            rows = (line(s, **{"val/test_score/gsm8k": gain + s / 10 + seed}) for s in range(41))
            put(tmp_path / "logs" / f"{name}_s{seed}.jsonl", "".join(rows).replace("val-core", "other"))
    plain = read(tmp_path / "logs")
    assert "no validation (val/test_score/gsm8k: --metric takes any)" in plain[0].notes
    done = invoke(
        tmp_path / "logs", "--metric", "val/test_score/gsm8k", "--baseline", "token-mean", "--out", tmp_path / "o"
    )
    assert done.exit_code == 0, done.output
    (theirs, ours) = table_of(tmp_path / "o", "results")
    assert float(ours["val/test_score/gsm8k"]) == pytest.approx(6.5)
    assert float(ours["this minus DAPO Norm"]) == pytest.approx(2)
    assert theirs["this minus DAPO Norm"] == ""
    assert not {"VL Norm minus this", "Pass@8", "verl's best@8", "model", "length", "task"} & set(ours)
    speed = table_of(tmp_path / "o", "speedup")[0]
    assert (speed["method"], speed["reaches the final accuracy of"], speed["at step"]) == ("mine", "DAPO Norm", "19–20")
    feet = json.loads((tmp_path / "o" / "tables" / "results.json").read_text())["foot"]
    assert feet[0].startswith("val/test_score/gsm8k: as it was logged, at the last validation.")
    assert not any("Pass@8" in sentence or "correct responses" in sentence for sentence in feet)
    assert "mine 6.500" in done.output
    assert "+2.000 over DAPO Norm (no interval; " in done.output
    assert not (tmp_path / "o" / "figures").exists(), "figures are drawn when asked for"


def test_another_metric_is_the_average_that_its_dumps_agree_with(tmp_path: Path) -> None:
    folder, metric = write_run(tmp_path, dumps={10: random_dump(1, 0.5)}), "val/test_score/gsm8k"
    log = folder / "metrics-000.jsonl"
    log.write_text(log.read_text().replace(KEY, metric))
    runs = read(folder, metric=metric)
    assert np.isfinite(made(runs, "results")[0]["Avg@8"].low)
    assert f"Not Avg@8 of verl's acc: mean@8 of {metric} (all runs)." in foot(runs)


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--metric", "val-core/set/acc/mean@4"], "they log for instance val-core/set/acc/mean@8"),
     (["--plot", "actor/grad_norm", "--plot", "actor/nrm*"], "--plot actor/nrm*: no run logs it"),
     (["--baseline", "grpo_norm"], "there are dapo_norm"), (["--baseline", "vl_norm:9"], "out of range")],
)  # fmt: skip
def test_wrong_keys_and_baselines_are_refused(options: list[str], says: str, tmp_path: Path) -> None:
    put(tmp_path / "logs" / "token-mean.jsonl", text((0, 40, 0.0)))
    done = invoke(tmp_path / "logs", *options, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert says in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(90)
def test_watch_reports_again_what_has_changed_and_ends_at_an_interrupt(tmp_path: Path) -> None:
    log = put(tmp_path / "logs" / "token-mean.jsonl", text((0, 20, 0.0)))
    command = [sys.executable, "-m", "vlnorm_verl", "report", log.parent, "--out", tmp_path / "out", "--watch", "1"]

    def interruptible() -> None:
        """What a shell starts in the background ignores interrupts, and so do its children."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=interruptible) as process:
        assert process.stdout is not None
        try:
            before = next(line for line in process.stdout if "DAPO Norm 0.400" in line)
            log.parent.rename(tmp_path / "away")  # a network disk
            assert any("tried again every 1 s" in line for line in process.stdout)
            (tmp_path / "away").rename(log.parent)
            with open(log, "a") as file:
                file.write(text((21, 30, 0.0)))
            after = next(line for line in process.stdout if "DAPO Norm 0." in line)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert "step 20" in before
    assert "DAPO Norm 0.450, the only method (Avg@8, 1 seed, step 30)" in after


@pytest.mark.parametrize(
    ("argument", "says"),
    [("nowhere", "there is no nowhere"), ("a=nowhere", "there is no nowhere"), (".", "no run there")],
)
def test_what_is_no_run_is_refused_in_one_message(
    argument: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says) as refused:
        report(argument, out=tmp_path / "out")
    assert "metrics-NNN.jsonl" in str(refused.value) or "Accepted:" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="/file: is a file; accepted is"):
        report(SAMPLES, out=tmp_path / "file")


def test_a_folder_that_cannot_be_made_is_refused_before_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlnorm_verl.report.build.read_runs", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match="--out /proc/nope: cannot be made"):
        report(SAMPLES, out=Path("/proc/nope"))


@pytest.mark.parametrize("content", ["[1]", '{"files": ["\xff"]}'])
def test_a_broken_record_of_what_was_written_is_none(content: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", curve={1: 0.5, 2: 0.6})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".written.json").write_text(content, encoding="latin-1")
    report(folder, out=tmp_path / "out")
    assert "tables/results.csv" in json.loads((tmp_path / "out" / ".written.json").read_text())["files"]


def test_a_record_of_what_was_written_removes_nothing_elsewhere(tmp_path: Path) -> None:
    """The folder may be somebody else's."""
    folder, theirs = write_run(tmp_path / "a", curve={1: 0.5, 2: 0.6}), ["../thesis.tex", "tables/..", "tables/old.csv"]
    thesis, old = (put(tmp_path / "out" / name, "") for name in theirs[::2])
    put(tmp_path / "out" / ".written.json", json.dumps({"files": [*theirs, str(thesis)]}))
    report(folder, out=tmp_path / "out")
    assert thesis.exists()
    assert not old.exists()


def test_a_second_report_removes_what_it_has_no_runs_for(tmp_path: Path) -> None:
    write_run(tmp_path / "a", curve={1: 0.5, 2: 0.6})
    write_run(tmp_path / "b", curve={1: 0.5, 2: 0.6}, recipe={"task": "other"})
    put(tmp_path / "out" / "tables" / "mine.csv", "kept")
    report(tmp_path / "a", out=tmp_path / "out")
    assert (tmp_path / "out" / "tables" / "results.csv").exists()
    report(tmp_path / "b", out=tmp_path / "out")
    names = {file.name for file in (tmp_path / "out" / "tables").glob("*.csv")}
    assert names == {"results.csv", "details.csv", "inputs.csv", "mine.csv"}
