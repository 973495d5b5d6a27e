"""The lab from the command line to the page, on the real tiny model with few responses, and what its sentences say.

Not covered: whether the numbers are right (test_lab_analysis.py, test_lab_gradients.py); how the figures look.
"""

from __future__ import annotations

import csv
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vlnorm_verl.cli import app
from vlnorm_verl.files import UserError
from vlnorm_verl.lab import report
from vlnorm_verl.lab.analysis import ALPHAS, LOST, Tradeoff
from vlnorm_verl.lab.cli import folder_of
from vlnorm_verl.report.estimates import Estimate

RECIPE = Path(__file__).parent.parent / "recipes" / "lab_cpu.sh"
MODEL = Path(__file__).parent.parent / "vlnorm_verl" / "tiny" / "weights"
SMALL = ["--deep-prompts=2", "--deep-responses=12", "--pool-prompts=16", "--pool-responses=4"]
FEW = [*SMALL, "--max-response-length=160", "--mini-batch=64", "--projection=4096"]


def lab(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["lab", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lab") / "tiny"
    done = lab("run", MODEL, "--out", out, "--modules=last-qkv", "--modules=layers.2.mlp", *FEW)
    assert done.exit_code == 0, done.output
    assert "Which α should I use?" in done.output
    return out


def read(folder: Path, table: str) -> list[dict[str, str]]:
    with open(folder / "tables" / f"{table}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_one_command_makes_the_page_with_its_tables_and_figures(folder: Path) -> None:
    page = (folder / "report" / "lab.html").read_text()
    for heading in ("In short", "How variance grows with length", "Which α", "What “unbiased” assumes"):
        assert heading in page
    slopes = read(folder / "report", "slopes")
    mlp = folder_of("layers.2.mlp")
    assert {(row["gradients"], row["part"]) for row in slopes} == {
        *(("last-qkv", part) for part in ("all", "q_proj", "k_proj", "v_proj")),
        *((mlp, part) for part in ("all", "gate_proj", "up_proj", "down_proj")),
    }
    assert {row["g_i"] for row in slopes} == {"score only (A = 1)", "advantages"}
    methods = read(folder / "report", "methods")
    assert {row["aggregation"] for row in methods} >= {"GRPO Norm", "DAPO Norm", "Dr. GRPO Norm", "VL Norm (α = 1)"}
    assert {row["mini-batch"] for row in read(folder / "report", "alpha")} == {"16", "64"}
    figures = {path.stem for path in (folder / "report" / "figures").glob("*.png")}
    assert {"overview", "methods", "alpha", "thirds", "growth", "deviations-tiny-last-qkv"} <= figures


def test_the_same_command_again_computes_nothing_anew(folder: Path) -> None:
    files = [folder / "rollouts.jsonl", *folder.glob("gradients/*/*.npy")]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert lab("run", MODEL, "--out", folder, "--modules=last-qkv", *FEW).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before
    done = lab("run", MODEL, "--out", folder, *FEW, "--seed=1")
    assert done.exit_code == 2
    assert "seed" in done.output


def test_several_models_side_by_side(folder: Path, tmp_path: Path) -> None:
    done = lab("report", f"start={folder}", f"<b>end</b>={folder}", "--out", tmp_path, "--mini-batch=640")
    assert done.exit_code == 0, done.output
    assert [row["model"] for row in read(tmp_path, "summary")] == ["start"] * 4 + ["<b>end</b>"] * 4
    assert {row["mini-batch"] for row in read(tmp_path, "summary")} == {"16", "640"}
    page = (tmp_path / "lab.html").read_text()
    assert "<b>end" not in page
    assert "&lt;b&gt;end" in page


def test_gradients_that_are_not_complete_are_left_out(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lab"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("report"))
    (copy / "gradients" / "last-qkv" / "003.npy").unlink()
    done = lab("report", copy, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "last-qkv left out, 1 prompts have no gradients yet" in done.output
    (copy / "gradients" / folder_of("layers.2.mlp") / "003.npy").unlink()
    done = lab("report", copy, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "no complete gradients" in done.output


def test_wrong_requests_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "rollouts.jsonl").write_text("{}\n")
    for arguments, words in (
        (["report", tmp_path, "--out", tmp_path], "is no folder of `vlnorm-verl lab run`"),
        (["report", tmp_path / "bare", "--out", tmp_path], "has no gradients"),
        (["report", folder, folder, "--out", tmp_path], "give one another name with NAME="),
        (["report", folder, "--out", tmp_path, "--mini-batch=0"], "--mini-batch 0: must be 1 or more"),
        (["run", MODEL, "--out", tmp_path / "x", "--task=countdwn"], "Did you mean 'countdown'?"),
        (["run", MODEL, "--out", tmp_path / "x", *FEW, "--pool-prompts=3", "--modules=last-qkv"], "--pool-prompts 3"),
    ):
        done = lab(*arguments)
        assert done.exit_code == 2, done.output
        assert words in " ".join(done.output.split())


def test_a_choice_of_parameters_has_a_folder_of_its_own() -> None:
    assert folder_of("last-qkv") == "last-qkv"
    assert folder_of("all") == "all"
    names = {folder_of(text) for text in (r"layers\.\d+", r"layers\.d+", "layers..d+", "../../x")}
    assert len(names) == 4
    assert all("/" not in name and "." not in name for name in names)


# ------------------------------------------------------------------------------------------------------------ recipe


def recipe(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(RECIPE), *map(str, arguments)], capture_output=True, text=True, timeout=580)


def test_the_recipe_refuses_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    done = recipe(tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path}/checkpoints is not there; accepted:" in done.stderr


@pytest.mark.slow
def test_the_recipe_measures_before_and_after_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = subprocess.run(
        ["bash", str(RECIPE.with_name("quickstart.sh")), "recipe.steps=2", f"recipe.folder={run}"],
        capture_output=True,
        timeout=580,
    )
    assert trained.returncode == 0
    done = recipe(run, tmp_path / "lab")
    assert done.returncode == 0, done.stderr
    summary = read(tmp_path / "lab" / "report", "summary")
    assert {row["model"] for row in summary} == {"before", "step 2"}
    assert {row["gradients"] for row in summary} == {"last-qkv", "all"}
    slopes = read(tmp_path / "lab" / "report", "slopes")
    assert {"q_proj", "k_proj", "v_proj", "layer 0", "layer 1", "layer 2"} <= {row["part"] for row in slopes}


# ---------------------------------------------------------------------------------------------------------- sentences


def trade(best: float, among: tuple[float, float], responses: int = 320) -> Tradeoff:
    known = [Estimate(0.1, 0.05, 0.2)] * len(ALPHAS)
    return Tradeoff(responses, ALPHAS, known, known, known, known, known, known, best, among, 1.125)


@pytest.mark.parametrize(
    ("best", "among", "words"),
    [
        (0.875, (0.25, 2.0), "Recommended: α = 1, the paper's value nearest"),
        (0.75, (0.5, 1.5), "Recommended: α = 0.75, the paper's value nearest"),
        (0.5, (0.25, 0.75), "Recommended: α = 0.75"),
        (0.25, (0.125, 0.5), "Recommended: α = 0.25; the paper's 0.75 and 1 have a larger error here."),
        (1.5, (1.25, 2.0), "Recommended: α = 1.5"),
        (1.0, (1.0, 1.0), "every other α on the grid has a larger error"),
        (0.25, (0.0, 2.0), "No recommendation: from α = 0 to 2 the data do not tell the errors apart"),
    ],
)
def test_an_alpha_is_recommended_only_where_the_data_speak(best: float, among: tuple[float, float], words: str) -> None:
    said = report.advice(trade(best, among))
    assert words in said
    assert ("Recommended" in said) == (among[0] > 0)


def test_the_verdict_says_what_is_unknown(folder: Path) -> None:
    one = report.analyse(report.store.load(folder, "gradients/last-qkv"), "m", "last-qkv", 64)
    lost = replace(one, tradeoffs=[trade(math.nan, (math.nan, math.nan))])
    assert "cannot be said: the mean gradient is lost in noise" in report.verdict(lost)
    sure = replace(one, tradeoffs=[trade(1.0, (1.0, 1.0))])
    assert "Alignment, which no common factor changes, is largest at α = 1.125." in report.verdict(sure)
    assert "For mini-batches of 320 responses" in report.verdict(sure)
    assert report.interval(Estimate(math.nan, note=LOST)) == f"unknown ({LOST})"
    assert report.interval(Estimate(1.25, 1.0, 1.5)) == "1.25 [1.00, 1.50]"


def test_the_most_parameters_speak_for_a_model(folder: Path) -> None:
    found = [
        report.analyse(report.store.load(folder, f"gradients/{choice}"), "m", choice, 64)
        for choice in report.choices(folder)
    ]
    (main,) = report.of_most_parameters(found)
    assert main.entries == max(one.entries for one in found)
    with pytest.raises(UserError, match="has no gradients"):
        report.choices(folder.parent)
