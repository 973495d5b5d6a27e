"""`vlnorm-verl reproduce`: which runs a set has, what it prints, and how it starts them.

Covered: the sets of recipes/manifest.yaml; --list, --status, --dry-run, --on; one run after the other, by a launcher
that only pretends. Not covered: that a run trains (test_e2e.py), and a scheduler that takes the jobs.
"""

import io
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from tests.processes import script
from vlnorm_verl.cli import app
from vlnorm_verl.files import UserError
from vlnorm_verl.runs import config as configs
from vlnorm_verl.runs import process, reproduce, resources
from vlnorm_verl.runs.check import validate
from vlnorm_verl.runs.folder import left, remember
from vlnorm_verl.runs.progress import terminal
from vlnorm_verl.runs.reproduce import PlannedRun

RECIPES = Path(__file__).parent.parent / "recipes"
CONFIG = RECIPES / "config"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are in `runs` of the working directory by default, where the checkout may have begun or finished ones."""
    monkeypatch.chdir(tmp_path)


def planned(*names: str, seeds: tuple[int, ...] = (), overrides: tuple[str, ...] = ()) -> list[PlannedRun]:
    manifest = reproduce.read_manifest(RECIPES)
    sets = [run_set for name in names for run_set in manifest.find(name)]
    return reproduce.plan(RECIPES, sets, list(seeds), list(overrides))


# ------------------------------------------------------------------------------------------------- which runs there are


def test_number_of_runs() -> None:
    sets = reproduce.read_manifest(RECIPES).sets
    assert {name: len(planned(name)) for name in (*sets, "all")} == {
        **{"countdown": 20, "math": 20, "alpha": 8, "dapo": 16, "as_coded": 12, "fig2": 2, "fig3": 40, "each": 26},
        "all": 74,
    }
    for run_set in sets.values():
        if run_set.alias:
            assert [run.name for run in planned(run_set.alias)] == [run.name for run in planned(run_set.name)]


def test_a_folder_belongs_to_one_run() -> None:
    """Rows of two sets with one folder must be the same run, else one of them would never be made."""
    seen: dict[Path, list[str]] = {}
    for row in (row for run_set in reproduce.read_manifest(RECIPES).sets.values() for row in run_set.rows):
        folder = PlannedRun(row, reproduce.outline(CONFIG, row)).folder
        assert seen.setdefault(folder, sorted(row)) == sorted(row)


def test_runs_that_would_share_a_folder_are_refused() -> None:
    for given in ("recipe.folder=/x/y", "recipe.name=mine"):
        with pytest.raises(UserError, match="would be the folder of several runs"):
            planned("countdown", overrides=(given,))
    with pytest.raises(UserError, match="give one of them"):
        planned("fig2", seeds=(0, 1), overrides=("recipe.seed=5",))


def test_one_model_for_runs_of_two_sizes_is_refused() -> None:
    """The runs of 3B would be of another model, under their own names."""
    local = "actor_rollout_ref.model.path=/models/Qwen2.5-7B"
    message = f"{local} would be the model of all these runs: give one of model=3b, model=7b with it"
    for given in (local, f"++{local}"):
        with pytest.raises(UserError, match=re.escape(message)):
            planned("dapo", overrides=(given,))
    assert len(planned("dapo", overrides=("model=7b", local))) == 8
    assert len(planned("fig2", overrides=(local,))) == 2  # of 3B alone


def test_an_unset_variable_is_no_folder() -> None:
    for key in ("root", "folder"):
        with pytest.raises(UserError, match=f"^recipe.{key}=: accepted is a folder"):
            planned("fig2", overrides=(f"recipe.{key}=",))


def test_a_home_folder_is_found_where_the_launcher_puts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert {run.folder.parent for run in planned("fig2", overrides=("recipe.root='~/runs'",))} == {tmp_path / "runs"}


def test_sets_share_runs() -> None:
    names = {
        name: {run.name for run in planned(name)} for name in ("countdown", "math", "alpha", "dapo", "fig2", "fig3")
    }
    assert names["fig3"] == names["countdown"] | names["math"]
    assert names["fig2"] == {"dapo-countdown-3b-3072-dapo-seed0", "dapo-countdown-3b-3072-vl_norm-seed0"}
    assert names["fig2"] < names["dapo"]
    # The default α is the run of the table, not another one.
    assert names["alpha"] & names["fig3"] == {
        "aggregation-countdown-3b-3072-vl_norm-seed0",
        "aggregation-math-3b-3072-vl_norm-seed0",
    }
    for task in ("countdown", "math"):
        alphas = [run.outline.recipe.alpha for run in planned("alpha") if f"-{task}-" in run.name]
        assert sorted(alphas) == [0.25, 0.5, 0.75, 1.0]


def test_seeds_and_overrides_reach_every_run() -> None:
    runs = planned("fig2", seeds=(0, 1, 2), overrides=("recipe.root=elsewhere", "trainer.n_gpus_per_node=4"))
    assert [str(run.folder.relative_to(Path.cwd())) for run in runs] == [
        f"elsewhere/dapo-countdown-3b-3072-{method}-seed{seed}" for method in ("dapo", "vl_norm") for seed in (0, 1, 2)
    ]
    config = configs.compose(CONFIG, list(runs[-1].overrides))
    validate(config)  # with a whole number of micro-batches on 4 GPUs
    assert config.trainer.n_gpus_per_node == 4
    assert config.actor_rollout_ref.rollout.seed == config.data.seed == 2
    # A choice that the set makes, too: the user's wins, and what becomes the same run is one.
    assert {run.name.split("-")[2] for run in planned("countdown", overrides=("model=3b",))} == {"3b"}
    assert len(planned("countdown", overrides=("model=3b",))) == 10


def test_the_tiny_models_runs_of_a_set_are_made_once() -> None:
    runs = planned("countdown", overrides=("model=tiny",))  # 3b and 7b are one
    assert len(runs) == 10
    assert {run.folder.parent for run in runs} == {Path("runs/cpu").absolute()}
    assert [run.name for run in planned("fig2", overrides=("model=tiny",))] == [
        f"dapo-countdown-tiny-128-{method}-seed0" for method in ("dapo", "vl_norm")
    ]


def test_the_cost_of_a_set(tmp_path: Path) -> None:
    def cost(name: str, *overrides: str) -> str:
        return resources.cost([(left(run.outline), run.overrides) for run in planned(name, overrides=overrides)])

    def of_steps(steps: int) -> str:
        hours = resources.run_hours(resources.MODELS[0], resources.RECIPES[4], resources.GPU_TYPES[0], 4, steps)
        return f"H100 80 GB: {resources.between(*hours or (0, 0))} hours of 4 GPUs"

    here = f"recipe.root={tmp_path}", "trainer.n_gpus_per_node=4"
    assert of_steps(2000) in cost("fig2", *here)
    assert "disk: 150 GB for two checkpoints of each" in cost("fig2", *here)  # 4 · 12 bytes · 3.09e9
    checkpoints = planned("fig2", overrides=here)[0].folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("500")
    assert of_steps(1500) in cost("fig2", *here)
    assert " GPUs with micro 2 and micro 1 (docs/costs.md); 10 of 20 runs do not fit" in cost("countdown")  # 24 GB
    for without in ("model=tiny", "attention=sdpa"):
        assert cost("fig2", without) == ""
    copy, more = "actor_rollout_ref.model.path=/models/Qwen2.5-3B", "++actor_rollout_ref.rollout.n=64"
    assert cost("fig2", *here, copy, "actor_rollout_ref.actor.optim.lr=1e-6") == cost("fig2", *here)
    assert cost("fig2", *here, copy, more).startswith(f"no cost with {more}: ")
    small = "actor_rollout_ref.model.path=Qwen/Qwen2.5-1.5B"
    assert cost("fig2", *here, small, "recipe.model=qwen2.5-1.5b").startswith(f"no cost with {small}: ")
    one, other = [(left(run.outline), run.overrides) for run in planned("fig2", overrides=here)]
    both = resources.cost([one, (other[0], [*other[1], more])])
    assert both.startswith("cost, ")
    assert f"no cost with {more}: " in both


def test_on_several_nodes_no_hours_are_known(tmp_path: Path) -> None:
    runs = planned("fig2", overrides=(f"recipe.root={tmp_path}", "trainer.nnodes=2"))
    said = resources.cost([(run.outline, run.overrides) for run in runs])
    assert "  no hours with trainer.nnodes above 1: " in said
    assert "hours of" not in said
    assert "disk: 150 GB" in said


# --------------------------------------------------------------------------------------------------------- the command


def invoked(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["reproduce", "--recipes", str(RECIPES), *arguments], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_list_names_every_set_and_the_assumption() -> None:
    code, output = invoked("--list", "recipe.root=/nowhere")
    assert code == 0
    for name in ("countdown", "math", "alpha", "dapo", "fig2", "fig3", "(table2)", "(table5)"):
        assert name in output
    assert "is our assumption" in " ".join(output.split())
    assert output.splitlines()[-1] == "74 different runs"


def test_status_counts_checkpoints(tmp_path: Path) -> None:
    tracker = tmp_path / "dapo-countdown-3b-3072-dapo-seed0" / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir(parents=True)
    tracker.write_text("375")
    code, output = invoked("fig2", "--status", f"recipe.root={tmp_path}")
    assert code == 0
    assert "step 375 of 1000" in output
    assert "not begun" in output
    assert output.splitlines()[-1] == "0 of 2 runs are finished"
    (tracker.parent.parent / "finished").write_text("375\n")
    assert invoked("fig2", "--status", f"recipe.root={tmp_path}", "recipe.steps=375")[1].endswith(
        "1 of 2 runs are finished\n"
    )


@pytest.mark.parametrize(
    ("name", "runs", "hours"),
    [
        ("fig2", 2, "H100 80 GB: 12–97 hours of 8 GPUs"),
        pytest.param("alpha", 8, "", marks=pytest.mark.slow),  # the rows with a name of their own
    ],
)
def test_dry_run_of_a_set(name: str, runs: int, hours: str) -> None:
    code, output = invoked(name, "--dry-run")
    assert code == 0
    assert output.strip().splitlines()[-1] == f"{runs} of {runs} runs are valid"
    assert hours in output


def test_dry_run_fails_if_a_run_does() -> None:
    code, output = invoked("fig2", "--dry-run", "trainer.n_gpus_per_node=7")
    assert code == 1
    assert "verl refuses the configuration" in output
    assert output.strip().splitlines()[-1] == "0 of 2 runs are valid"
    # One that fails among others: only vl_norm refuses this α.
    code, output = invoked("fig2", "--dry-run", "recipe.alpha=9")
    assert code == 1
    assert "0 ≤ α ≤ 2" in output
    assert output.strip().splitlines()[-1] == "1 of 2 runs are valid"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["fig22"],
            "the set of runs 'fig22' is not accepted. Did you mean 'fig2'? Accepted: countdown, math, alpha, dapo",
        ),
        ([], "name what to reproduce: countdown"),
        (["fig2", "--seeds", "0,x"], "--seeds 0,x: give whole numbers with commas, as in 0,1,2"),
        (["fig2", "model=14b"], "model=14b is not accepted. Accepted: 3b, 7b, tiny"),
        (["fig2", "--on", "lsf"], "--on lsf: accepted are slurm and kubernetes"),
    ],
)
def test_wrong_requests_are_refused(arguments: list[str], message: str) -> None:
    code, output = invoked(*arguments)
    assert code == 2
    assert message in " ".join(output.split())


def test_nothing_starts_without_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reproduce, "run_all", lambda *_: pytest.fail("started"))
    code, output = invoked("fig2", f"recipe.root={tmp_path}/runs", f"recipe.data={tmp_path}/data")
    assert code == 1
    assert "vlnorm-verl data countdown" in output


def test_a_finished_run_of_other_values_is_not_taken_for_this_one(tmp_path: Path) -> None:
    root = f"recipe.root={tmp_path}"
    for run in planned("fig2", overrides=(root,)):
        config = configs.with_settings(configs.compose(CONFIG, list(run.overrides)), {"recipe.folder": str(run.folder)})
        remember(config, run.folder)
        (run.folder / "finished").write_text("1000")
    assert invoked("fig2", "--dry-run", root)[0] == 0
    code, output = invoked("fig2", "--dry-run", root, "actor_rollout_ref.actor.loss_scale_factor=600")
    assert code == 1
    assert "actor_rollout_ref.actor.loss_scale_factor: 3072 there, 600 asked for" in output
    assert "recipe.root=…" in output


# --------------------------------------------------------------------------------------------------- a job for each run


def test_one_job_for_each_run_on_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "sbatch", f'echo "$@" >> {tmp_path}/jobs')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for file in ("countdown/train.parquet", "countdown/test.parquet"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"prompt": ["?"] * 128}), tmp_path / file)
    done = tmp_path / "dapo-countdown-3b-3072-dapo-seed1"
    done.mkdir()
    (done / "finished").write_text("1000")
    folders = f"recipe.root={tmp_path}", f"recipe.data={tmp_path}"
    code, output = invoked("fig2", "--seeds", "0,1", "--on", "slurm", *folders)
    assert code == 0, output
    assert "3 of 3 jobs are made" in output
    jobs = (tmp_path / "jobs").read_text().splitlines()
    assert [job.split("--job-name=")[1].split()[0].rpartition("-")[0] for job in jobs] == [
        f"dapo-countdown-3b-3072-{name}" for name in ("dapo-seed0", "vl_norm-seed0", "vl_norm-seed1")
    ]
    assert all("--dependency=singleton" in job and f"recipe.root={tmp_path}" in job for job in jobs)
    script(tmp_path / "sbatch", "exit 1")
    (run, *_), console = planned("fig2", overrides=folders), terminal(record=True, file=io.StringIO())
    assert reproduce.submit_all(RECIPES, [run], "slurm", console) == 1
    assert "0 of 1 jobs are made" in console.export_text()


def test_one_manifest_for_each_run_on_kubernetes() -> None:
    """The manifests alone are on stdout: it goes to `kubectl create -f -`."""
    result = CliRunner().invoke(app, ["reproduce", "--recipes", str(RECIPES), "fig2", "--on", "kubernetes"])
    assert result.exit_code == 0
    jobs = list(yaml.safe_load_all(result.stdout))
    assert [job["metadata"]["name"] for job in jobs] == [
        f"dapo-countdown-3b-3072-{method}-seed0" for method in ("dapo", "vl-norm")
    ]
    assert "cost, worked out on paper" in result.stderr


# --------------------------------------------------------------------------- running: a launcher that only pretends

PRETENDS = """
echo "$@" >> {folder}/calls
case " $* " in
  *" method=dapo "*) {dapo} ;;
esac
mkdir -p {folder}/dapo-countdown-3b-3072-vl_norm-seed0
echo 1000 > {folder}/dapo-countdown-3b-3072-vl_norm-seed0/finished
"""


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in process.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_pretended(monkeypatch: pytest.MonkeyPatch, folder: Path, dapo: str) -> tuple[int, str, list[str]]:
    """Run fig2 with `dapo` as what its first run does; exit code, output, and the launcher's command lines."""
    python = script(folder / "python", PRETENDS.format(folder=folder, dapo=dapo))
    (folder / "calls").write_text("")
    monkeypatch.setattr(reproduce.sys, "executable", str(python))
    console = terminal(record=True, width=200, file=io.StringIO())
    code = reproduce.run_all(RECIPES, planned("fig2", overrides=(f"recipe.root={folder}",)), console)
    return code, console.export_text(), (folder / "calls").read_text().splitlines()


def test_one_failing_run_does_not_stop_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, output, calls = run_pretended(monkeypatch, tmp_path, "exit 3")
    assert code == 1
    assert len(calls) == 2
    assert calls[1] == (
        f"-m vlnorm_verl launch --recipes {RECIPES} family=dapo task=countdown model=3b length=3072 method=vl_norm "
        f"recipe.root={tmp_path}"
    )
    assert "failed with exit code 3" in output
    assert "train.log" not in output  # it ended before verl's trainer began
    assert "1 of 2 runs are finished" in output

    code, _, calls = run_pretended(monkeypatch, tmp_path, "exit 0")
    assert code == 0
    assert len(calls) == 1  # the finished one is not started again


def test_a_stop_reaches_the_run_and_ends_the_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    # bash starts its background jobs without SIGINT, hence a sleep in the foreground
    trap = f"trap 'echo once >> {tmp_path}/interrupted; exit 130' INT"
    waits = f"{trap}; touch {tmp_path}/started; for i in {{1..200}}; do sleep 0.1; done"
    code, output, calls = run_pretended(monkeypatch, tmp_path, waits)
    assert code == 130
    assert len(calls) == 1
    assert (tmp_path / "interrupted").read_text() == "once\n"
    assert "the same command goes on from there" in output
