"""The lab from the command line to the page, on the real tiny model with few responses; and what it says, writes and
draws of pools that say little.

Not covered: whether the numbers are right (the other test_lab files); how the figures look.
"""

from __future__ import annotations

import inspect
import math
import re
import shutil
import statistics
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.lab_laws import group, stored
from tests.report_runs import table_of
from vlnorm_verl.cli import app
from vlnorm_verl.files import UserError, locked
from vlnorm_verl.lab import build, mini_batches, rollouts, verdict
from vlnorm_verl.lab.aggregations import ALPHAS, Comparison, NoisyResponse, Tradeoff
from vlnorm_verl.lab.analysis import Analysis, analyse, of_most_parameters
from vlnorm_verl.lab.figures import overview
from vlnorm_verl.lab.jackknife import LOST
from vlnorm_verl.lab.length_means import PAIRS, Thirds
from vlnorm_verl.lab.slopes import Slope
from vlnorm_verl.lab.store import folder_of, grpo_advantages
from vlnorm_verl.lab.tables import tables
from vlnorm_verl.report.estimates import Estimate
from vlnorm_verl.report.style import Figure
from vlnorm_verl.report.writers import to_markdown
from vlnorm_verl.tasks.tiny import WEIGHTS as MODEL

RECIPE = Path(__file__).parent.parent / "recipes" / "lab_cpu.sh"
SMALL = ["--slope-prompts=2", "--slope-responses=12", "--pool-prompts=16", "--pool-responses=4"]
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


def test_one_command_makes_the_page_with_its_tables_and_figures(folder: Path) -> None:
    page = (folder / "report" / "lab.html").read_text()
    for heading in ("Which α should I use?", "<summary>How variance grows with length", "What was sampled"):
        assert heading in page
    assert "α" in page[page.index("<h1>") : page.index("</h1>")]
    slopes = table_of(folder / "report", "slopes")
    mlp = folder_of("layers.2.mlp")
    assert {(row["gradients"], row["part"]) for row in slopes} == {
        *(("last-qkv", part) for part in ("all", "q_proj", "k_proj", "v_proj")),
        *((mlp, part) for part in ("all", "gate_proj", "up_proj", "down_proj")),
    }
    assert {row["g_i"] for row in slopes} == {"score only (A = 1)", "advantages"}
    methods = table_of(folder / "report", "methods")
    assert {row["aggregation"] for row in methods} >= {"GRPO Norm", "DAPO Norm", "Dr. GRPO Norm", "VL Norm (α = 1)"}
    assert {row["model"] for row in table_of(folder / "report", "alpha")} == {"tiny"}
    assert float(table_of(folder / "report", "noisy_responses")[0]["share of the noise"]) > 0.1
    assert {path.name for path in (folder / "report" / "figures").iterdir()} == {"overview.png", "overview.svg"}


@pytest.mark.usefixtures("_no_figures")
def test_the_same_command_again_computes_nothing_anew(folder: Path) -> None:
    files = [folder / "rollouts.jsonl", *folder.glob("gradients/*/*.npy")]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert lab("run", MODEL, "--out", folder, "--modules=last-qkv", *FEW).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before
    done = lab("run", MODEL, "--out", folder, *FEW, "--seed=1")
    assert done.exit_code == 2
    assert "seed" in done.output


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longest, and the first test has drawn everything."""
    monkeypatch.setattr(build, "overview", lambda analyses: Figure("overview", "nothing", "", b"", "<svg/>"))


def test_a_full_gpu_is_said_with_what_needs_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 1.74 GiB.")

    monkeypatch.setattr(rollouts, "sample", full)
    done = lab("run", MODEL, "--out", tmp_path)
    assert done.exit_code == 2
    assert "those of --modules all less with --checkpointing" in " ".join(done.output.replace("│", " ").split())
    assert "Tried to allocate 1.74 GiB." in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modules=last_qkv"], "--modules 'last_qkv' matches no parameter. Near: model"),
        (["--modules=all", "--modules=layers.(2"], "--modules 'layers.(2' is not a regular expression"),
        (["--projection=2"], "--projection 2: fewer numbers than the 3 parts"),
    ],
)
def test_parameters_that_cannot_be_had_are_refused_before_sampling(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "sample", lambda *_: pytest.fail("it has sampled"))
    done = lab("run", MODEL, "--out", tmp_path, *arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize("flags", [[], ["--no-chat-template"]])
def test_the_chat_template_is_the_users_choice(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature, kept = inspect.signature(rollouts.sample), dict[str, Any]()

    def sample(*arguments: Any, **options: Any) -> None:
        kept.update(signature.bind(*arguments, **options).arguments)
        raise UserError("enough")

    monkeypatch.setattr(rollouts, "sample", sample)
    assert "enough" in lab("run", MODEL, "--out", tmp_path, *flags).output
    assert kept["chat_template"] == (not flags)


@pytest.mark.usefixtures("_no_figures")
def test_several_models_side_by_side(folder: Path, tmp_path: Path) -> None:
    done = lab("report", f"start={folder}", f"<b>end</b>={folder}", "--out", tmp_path, "--mini-batch=640")
    assert done.exit_code == 0, done.output
    assert [row["model"] for row in table_of(tmp_path, "summary")] == ["start"] * 2 + ["<b>end</b>"] * 2
    page = (tmp_path / "lab.html").read_text()
    assert "for mini-batches of 640 responses" in page
    assert "<b>end" not in page
    assert "&lt;b&gt;end" in page


@pytest.mark.usefixtures("_no_figures")
def test_a_folders_name_may_be_any(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "alpha=0.75"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("report"))
    done = lab("run", MODEL, "--out", copy, "--modules=last-qkv", *FEW)
    assert done.exit_code == 0, done.output
    assert {row["model"] for row in table_of(copy / "report", "summary")} == {"alpha=0.75"}
    monkeypatch.chdir(folder)
    assert lab("report", ".", "--out", tmp_path / "out").exit_code == 0
    assert {row["model"] for row in table_of(tmp_path / "out", "summary")} == {"tiny"}


@pytest.mark.usefixtures("_no_figures")
def test_gradients_that_are_not_complete_are_left_out(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lab"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("report"))
    (copy / "gradients" / "last-qkv" / "003.npy").unlink()
    done = lab("report", copy, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert re.search(r"last-qkv left out: .* lacks the gradients of 1 prompts", " ".join(done.output.split()))
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
        (["report", folder, "--out", tmp_path, "--mini-batch=0"], "Invalid value for '--mini-batch'"),
        (["run", MODEL, "--out", tmp_path / "x", "--task=countdwn"], "Did you mean 'countdown'?"),
        (["run", MODEL, "--out", tmp_path / "x", "--pool-prompts=3"], "Invalid value for '--pool-prompts'"),
        (["run", MODEL, "--out", tmp_path / "x", "--slope-responses=2"], "Invalid value for '--slope-responses'"),
        (["run", MODEL, "--out", tmp_path / "x", "--seed=-1"], "Invalid value for '--seed'"),
        (["report", folder, "--out", tmp_path, "--seed=-1"], "Invalid value for '--seed'"),
    ):
        done = lab(*arguments)
        assert done.exit_code == 2, done.output
        assert words in " ".join(done.output.replace("│", " ").split())


def test_two_calls_into_one_folder_are_refused(tmp_path: Path) -> None:
    with locked(tmp_path):
        done = lab("run", MODEL, "--out", tmp_path)
    assert done.exit_code == 2
    assert "another `vlnorm-verl lab run` writes into it" in " ".join(done.output.split())


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
@pytest.mark.timeout(1500)
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
    summary = table_of(tmp_path / "lab" / "report", "summary")
    assert {row["model"] for row in summary} == {"before", "step 2"}
    assert {row["gradients"] for row in summary} == {"last-qkv", "all"}
    slopes = table_of(tmp_path / "lab" / "report", "slopes")
    assert {"q_proj", "k_proj", "v_proj", "layer 0", "layer 1", "layer 2"} <= {row["part"] for row in slopes}


# ------------------------------------------------------------------------------------------------ pools that say little


def of_pool(mixed: int, reward: float = 0.0) -> Analysis:
    """A pool of which so many groups have rewards that differ; the others have this reward throughout."""
    rng = np.random.default_rng(mixed)
    groups = [group(rng, "slope", 16) for _ in range(2)] + [group(rng, "pool", 8) for _ in range(16)]
    for index, of_prompt in enumerate(groups):
        of_prompt.rewards = (
            np.arange(len(of_prompt.lengths)) % 2.0 if index < 2 + mixed else of_prompt.rewards * 0 + reward
        )
        of_prompt.advantages = grpo_advantages(of_prompt.rewards)
    settings = {"task": "synthetic", "temperature": 1.0, "seed": 0}
    return analyse(replace(stored(groups, **settings), parts={}), f"{mixed} mixed, {reward:g}", "all", mini_batch=320)


@pytest.fixture(scope="module")
def little() -> list[Analysis]:
    """Pools of 0, 1, 2 and 8 mixed groups, one of equal rewards whose advantages are rounding, one with lost α,
    one all NaN, one whose prompts with many responses have no rewards that differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini_batches, "ROUNDS", 16)
        pools = [of_pool(0), of_pool(1), of_pool(2), of_pool(8), of_pool(0, reward=0.1), of_pool(16)]
    no_slope = replace(pools[5], name="no slope", slopes=[s for s in pools[5].slopes if s.score_only], slope=None)
    return [*pools, replace(pools[3], name="some α lost", tradeoff=some_lost()), nothing_known(pools[5]), no_slope]


def some_lost() -> Tradeoff:
    known, lost = Estimate(0.5, 0.2, math.inf), Estimate(math.nan, note=LOST)
    some = [known] * 9 + [lost] * 8
    return replace(trade(0.75, (0.5, 1.0)), error=some, alignment=some, bias=[lost] * 4 + [known] * 13)


def nothing_known(analysis: Analysis) -> Analysis:
    """With NaN for every number that an analysis can have one for."""
    nan, lost = math.nan, Estimate(math.nan, note=LOST)

    def unknown(value: Any) -> Any:
        if isinstance(value, Estimate):
            return lost
        if isinstance(value, float):
            return nan
        if isinstance(value, dict):
            return dict.fromkeys(value, lost)
        estimates = isinstance(value, list) and value and isinstance(value[0], Estimate)
        return [lost] * len(value) if estimates else value

    def blank(of: Any) -> Any:
        return replace(of, **{field.name: unknown(getattr(of, field.name)) for field in fields(of)})

    return replace(
        analysis,
        name="NaN",
        slope=analysis.slope and blank(analysis.slope),
        slopes=[blank(slope) for slope in analysis.slopes],
        methods=[blank(method) for method in analysis.methods],
        tradeoff=replace(blank(analysis.tradeoff), among=(nan, nan), lost=LOST),
        thirds=analysis.thirds and replace(blank(analysis.thirds), norm=[lost] * 3),
    )


def test_pools_without_a_signal_are_lost_in_noise(little: list[Analysis]) -> None:
    """Nor is an α recommended by advantages that are rounding alone, of eight equal rewards of 0.1."""
    for analysis in (little[0], little[1], little[4]):
        assert math.isnan(analysis.tradeoff.best)
        for method in analysis.methods:
            assert {estimate.note.partition(";")[0] for estimate in (method.cv, method.bias)} == {LOST}


def test_mixed_groups_are_those_whose_rewards_differ(little: list[Analysis]) -> None:
    assert [analysis.mixed for analysis in little[:6]] == [0, 1, 2, 8, 0, 16]


def test_tables_of_pools_without_a_signal_say_so(little: list[Analysis]) -> None:
    made = {table.name: table for table in tables(little)}
    text = "".join(map(to_markdown, made.values()))
    assert LOST in text
    assert "nan" not in text
    lost = [row for row in made["alpha"].rows if row[0] == "0 mixed, 0"]
    assert lost == [["0 mixed, 0", "all", f"8 rows: {LOST}", *[None] * 6]]
    assert len([row for row in made["alpha"].rows if row[0] == "some α lost"]) == 8
    assert [row[2] for row in made["summary"].rows if row[0] == "NaN"] == ["none"]
    (row,) = (row for row in made["summary"].rows if row[0] == "no slope")
    assert row[made["summary"].columns.index("β")] is None


def test_each_column_has_what_its_heading_says(little: list[Analysis]) -> None:
    e, pool = [Estimate(float(number)) for number in range(10)], little[5]
    cosine, difference = (dict(zip(PAIRS, e[first : first + 3], strict=True)) for first in (3, 6))
    known = replace(
        pool,
        slopes=[Slope("q_proj", True, e[1], e[2], e[3], pool.slopes[0].points)],
        methods=[Comparison("vl_norm:1", 1.0, e[2], e[3], e[4], 5.0, 6.0, e[7], 8.0, e[9])],
        thirds=Thirds([10.0, 20.0, 30.0], e[:3], cosine, difference),
    )
    made = {t.name: [dict(zip(t.columns[2:], row[2:], strict=True)) for row in t.rows] for t in tables([known])}
    assert made["slopes"] == [
        {
            "part": "q_proj",
            "g_i": "score only (A = 1)",
            "β, log–log": e[1],
            "β, of the mean": e[2],
            "β, over prompts": e[3],
            "prompts": 2,
        }
    ]
    assert made["methods"] == [
        {
            "aggregation": "VL Norm (α = 1)",
            "M Σx": 1,
            "along Dr. GRPO's E G": e[2],
            "cosine to Dr. GRPO's": e[3],
            "noise, measured": e[4],
            "noise, predicted": 5,
            "noise, predicted by β": 6,
            "CV, measured": e[7],
            "CV, predicted": 8,
            "bias²": e[9],
        }
    ]
    names = "thirds", "mean length", "‖E g‖ of the shorter", "of the longer", "cosine", "difference²"
    assert made["thirds"] == [
        dict(zip(names, values, strict=True))
        for values in (
            ("short – middle", "10 – 20", e[0], e[1], e[3], e[6]),
            ("middle – long", "20 – 30", e[1], e[2], e[4], e[7]),
            ("short – long", "10 – 30", e[0], e[2], e[5], e[8]),
        )
    ]
    assert made["sampled"] == [
        {
            "task": "synthetic",
            "many responses": "2 × 16",
            "pool": "16 × 8",
            "of mixed reward": 16,
            "mean reward": 0.5,
            "mean length": f"{np.mean(pool.lengths):.0f}",
            "harmonic": f"{statistics.harmonic_mean(pool.lengths.tolist()):.0f}",
            "lengths": f"{min(pool.lengths)} to {max(pool.lengths)}",
            "cut": "0.0%",
            "temperature": "1",
            "seed": 0,
            "parameters": f"{pool.entries:,}",
            "projected to": None,
        }
    ]


def test_pools_without_a_signal_can_be_drawn(little: list[Analysis]) -> None:
    drawn = overview(little).svg
    assert drawn.count("lost in noise") == 8
    assert "alignment against α, mini-batch of 320" in drawn
    assert drawn.count("no prompt with many responses") == 1
    assert drawn.count("β with all advantages 1 is in the table on β") == 1


def test_verdicts_of_pools_without_a_signal_recommend_nothing(little: list[Analysis]) -> None:
    for analysis in (little[0], little[1], little[4]):
        said = verdict.verdict(analysis)
        assert "The mean gradient is lost in noise" in said
        assert f"of 16 prompts of the pool {analysis.mixed} have rewards that differ" in said
        assert verdict.headline(analysis.tradeoff).startswith(f"Which α: {LOST}")
        assert "nan" not in said


def test_numbers_are_on_the_disk_before_anything_is_drawn(
    little: list[Analysis], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot_draw(_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(build, "overview", cannot_draw)
    with pytest.raises(ZeroDivisionError):
        build.write(little, tmp_path, Console(quiet=True))
    assert {row["model"] for row in table_of(tmp_path, "summary")} == {analysis.name for analysis in little}


# ---------------------------------------------------------------------------------------------------------- sentences


def trade(best: float, among: tuple[float, float], responses: int = 320) -> Tradeoff:
    known = [Estimate(0.1, 0.05, 0.2)] * len(ALPHAS)
    return Tradeoff(responses, known, known, known, known, known, best, among, 1.125, "")


@pytest.mark.parametrize(
    ("best", "among", "answer"),
    [
        (0.875, (0.25, 2.0), "Use α = 1 (the data allow 0.25 to 2)"),
        (0.75, (0.5, 1.5), "Use α = 0.75 (the data allow 0.5 to 1.5)"),
        (0.5, (0.25, 0.75), "Use α = 0.75 (the data allow 0.25 to 0.75)"),
        (0.25, (0.125, 0.5), "Use α = 0.25 (the data allow 0.125 to 0.5)"),
        (1.5, (1.25, 2.0), "Use α = 1.5 (the data allow 1.25 to 2)"),
        (1.0, (1.0, 1.0), "Use α = 1 (the data allow no other)"),
        (0.25, (0.0, 2.0), "No α is shown to be better than 0 (the data allow 0 to 2)"),
    ],
)
def test_an_alpha_is_recommended_only_where_the_data_speak(
    best: float, among: tuple[float, float], answer: str, little: list[Analysis]
) -> None:
    assert verdict.headline(trade(best, among)) == answer
    made = next(t for t in tables([replace(little[3], tradeoff=trade(best, among))]) if t.name == "summary")
    row = dict(zip(made.columns, made.rows[0], strict=True))
    assert row["recommended"] == (answer.split()[3] if among[0] > 0 else "none")
    assert row["the data allow"] == (f"{among[0]:g} to {among[1]:g}" if among[0] < among[1] else "1")
    assert (row["best alignment"], row["least error"]) == (f"{best:g}", "1.125")


def test_the_verdict_says_what_is_known(little: list[Analysis]) -> None:
    said = verdict.verdict(replace(little[3], tradeoff=trade(1.0, (1.0, 1.0)), noisy=[]))
    assert "mini-batches of 320 responses" in said
    assert "the cosine 0.10 [0.05, 0.20] to that of α = 0" in said
    assert "alignment, which no common factor changes, decides: it is largest at α = 1, where" in said
    assert "The mean squared error, which rewards a shorter update, is least at α = 1.125." in said
    assert "(all, 24 parameters)" in said  # they may be few of the model's
    assert "if E[g | L], and the variance at a given length, were the same for all prompts and lengths, α = β" in said


def test_the_verdict_of_a_pool_without_beta_is_silent_on_it(little: list[Analysis]) -> None:
    assert ["L^β" in verdict.verdict(analysis) for analysis in (little[5], little[8])] == [True, False]


def test_the_verdict_warns_of_single_responses(little: list[Analysis]) -> None:
    noisy = [NoisyResponse("vl_norm:1", 3, 0, 2, 0.0, share) for share in (0.11, 0.34)]
    said = verdict.verdict(replace(little[3], noisy=noisy))
    assert "Single responses have more than 10% of an aggregation's noise, up to 34%" in said


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (Estimate(1.25, 1.0, 1.5), "1.25 [1.00, 1.50]"),
        (Estimate(1.25, note="one prompt"), "1.25 (no interval: one prompt)"),
        (Estimate(math.nan, note=LOST), f"unknown ({LOST})"),
        (Estimate(math.nan), "unknown"),
        (Estimate(-0.125, -0.5, 0.25), "−0.12 [−0.50, 0.25]"),
        (Estimate(-0.001, -0.5, 0.25), "0.00 [−0.50, 0.25]"),
    ],
)
def test_an_estimate_in_words(estimate: Estimate, words: str) -> None:
    assert verdict.interval(estimate) == words


def test_the_most_parameters_speak_for_a_model(little: list[Analysis]) -> None:
    few, many = replace(little[0], name="m", entries=5), replace(little[1], name="m", entries=7)
    assert of_most_parameters([few, little[2], many]) == [many, little[2]]


# ---------------------------------------------------------------------------------------------------------- altogether


def test_everything_of_a_model(little: list[Analysis]) -> None:
    analysis = little[5]
    assert (analysis.drawn, analysis.prompts, analysis.mixed, analysis.slope_prompts) == (32, 16, 16, (2, 16))
    assert analysis.tradeoff.responses == 320
    assert {slope.score_only for slope in analysis.slopes} == {True, False}
    assert analysis.slope is not None
    assert not analysis.slope.score_only
    assert analysis.thirds is not None
