"""The launcher without a cluster: what it decides, refuses and would start.

Covered: overrides and loggers, the folder of a run, checks before anything starts, the commands for a local Ray, a Ray
cluster and a Ray job. Not covered: runs (test_recipes_e2e.py), SLURM and Kubernetes (test_cluster_files.py), the
recipes' values (test_recipes.py).
"""

import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vlnorm_verl import launch, recipe
from vlnorm_verl.launch import Request

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def composed(tmp_path: Path, *overrides: str, **request: Any) -> tuple[Request, list[str], Any]:
    asked = Request(
        RECIPES, [f"recipe.root={tmp_path / 'runs'}", f"recipe.data={tmp_path / 'data'}", *overrides], **request
    )
    complete = launch.complete_overrides(asked)
    return asked, complete, recipe.compose(asked.config_folder, complete)


def answered(request: Request) -> tuple[int, str]:
    console = Console(record=True, width=400, file=io.StringIO())
    return launch.launch(request, console), console.export_text()


# ---------------------------------------------------------------------------------------------------------- overrides


def test_one_flag_adds_loggers(tmp_path: Path) -> None:
    _, _, config = composed(tmp_path, loggers=["wandb", "tensorboard"])
    assert list(config.trainer.logger) == ["console", "file", "wandb", "tensorboard"]
    for name in ("trackio", "swanlab", "mlflow"):
        recipe.validate(composed(tmp_path, loggers=[name])[2])  # verl knows it, without its package
    with pytest.raises(recipe.RecipeError, match="--logger wandbb: accepted are console, file, wandb"):
        composed(tmp_path, loggers=["wandbb"])


def test_metrics_cannot_be_switched_off(tmp_path: Path) -> None:
    with pytest.raises(recipe.RecipeError, match="must have `file`"):
        recipe.validate(composed(tmp_path, "trainer.logger=[console]")[2])


def test_paths_are_absolute_and_last_overrides_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = Request(RECIPES, ["recipe.root=here", "recipe.steps=7"])
    config = recipe.compose(request.config_folder, launch.complete_overrides(request))
    assert config.recipe.folder == f"{tmp_path}/here/aggregation-countdown-3b-8192-vl_norm-seed0"
    assert config.trainer.total_training_steps == 7


def test_smoke_is_two_steps_at_full_size_in_a_new_folder(tmp_path: Path) -> None:
    _, _, full = composed(tmp_path)
    _, _, smoke = composed(tmp_path, smoke=True)
    assert (smoke.trainer.total_training_steps, smoke.trainer.save_freq, smoke.trainer.test_freq) == (2, -1, -1)
    assert smoke.data == full.data
    assert smoke.actor_rollout_ref == full.actor_rollout_ref
    Path(smoke.recipe.folder).mkdir(parents=True)
    assert composed(tmp_path, smoke=True)[2].recipe.folder != smoke.recipe.folder


# ------------------------------------------------------------------------------------------------- before it starts


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=vl-norm"], "vl_norm"),
        (["trainer.n_gpus_per_nod=4"], "n_gpus_per_nod"),
        (["actor_rollout_ref.actor.loss_scale_factor=null", "method=dr_grpo"], "give M in tokens"),
        (["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=6"], "a divisor of 40"),
        (["trainer.nnodes=3", "data.train_batch_size=96"], "ppo_micro_batch_size_per_gpu=4"),
        (["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=7"], "a divisor of 160"),
    ],
)
def test_a_run_that_cannot_work_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    code, text = answered(Request(RECIPES, [f"recipe.root={tmp_path}", *overrides]))
    assert code == 2
    assert message in text
    assert not list(tmp_path.iterdir())


def test_missing_data_names_both_ways_to_get_it(tmp_path: Path) -> None:
    code, text = answered(Request(RECIPES, [f"recipe.root={tmp_path}", f"recipe.data={tmp_path}/none", "task=math"]))
    assert code == 2
    assert f"vlnorm-verl data math --out {tmp_path}/none/math" in text
    assert "--offline" in text
    assert "minerva.parquet" in text


def test_a_dry_run_shows_value_source_and_command(tmp_path: Path) -> None:
    code, text = answered(Request(RECIPES, [f"recipe.root={tmp_path}", "recipe.alpha=0.5"], dry_run=True))
    assert code == 0
    assert not list(tmp_path.iterdir())
    (alpha,) = [line for line in text.splitlines() if line.startswith("│ recipe.alpha")]
    assert all(part in alpha for part in ("0.5", "command line"))
    (mode,) = [line for line in text.splitlines() if "actor.loss_agg_mode" in line and "│" in line]
    assert all(part in mode for part in ("vl_norm:0.5", "method/vl_norm.yaml", "paper:"))
    assert "-m verl.trainer.main_ppo" in text
    assert text.rstrip().endswith(": valid")


def test_a_dry_run_names_what_does_nothing(tmp_path: Path) -> None:
    overrides = [f"recipe.root={tmp_path}", "actor_rollout_ref.actor.grad_clip=0.5"]
    _, text = answered(Request(RECIPES, overrides, dry_run=True))
    (note,) = [line for line in text.splitlines() if "does nothing" in line]
    assert "actor_rollout_ref.actor.grad_clip" in note


# ------------------------------------------------------------------------------------------------ the folder of a run


def test_a_folder_keeps_to_its_first_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    launch.remember(composed(tmp_path)[2], folder)
    launch.remember(composed(tmp_path, "recipe.steps=2000", "trainer.save_freq=5", loggers=["wandb"])[2], folder)
    for override, message in (
        ("recipe.alpha=0.5", "loss_agg_mode: 'vl_norm:1.0' then, 'vl_norm:0.5' now"),
        ("trainer.nnodes=2", "trainer.nnodes: 1 then, 2 now"),
        ("recipe.seed=1", "recipe.seed: 0 then, 1 now"),
    ):
        with pytest.raises(recipe.RecipeError, match=message):
            launch.remember(composed(tmp_path, override)[2], folder)


def test_state_is_that_of_the_last_whole_checkpoint(tmp_path: Path) -> None:
    _, _, config = composed(tmp_path, "recipe.steps=40")
    assert launch.state(config) == "not begun"
    checkpoints = Path(config.recipe.folder) / "checkpoints"
    (checkpoints / "global_step_40").mkdir(parents=True)  # verl names it in the tracker once it is whole
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("20")
    assert launch.state(config) == "step 20 of 40"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("40")
    assert launch.state(config) == "finished"


# ------------------------------------------------------------------------------------------------------- the commands


def test_a_local_run_gets_a_ray_of_its_own(tmp_path: Path) -> None:
    request, complete, config = composed(tmp_path, "scale=cpu")
    assert config.ray_kwargs.ray_init.address == "local"
    assert not [a for a in launch.trainer_command(request, complete, on_cluster=False) if "env_vars" in a]


def test_a_cluster_keeps_its_resources_and_is_given_the_plugin(tmp_path: Path) -> None:
    """The command's own overrides, composed by Hydra as verl does."""
    request, complete, _ = composed(tmp_path, "scale=cpu")
    arguments = launch.trainer_command(request, complete, on_cluster=True)
    overrides = [a for a in arguments[3:] if not a.startswith("--") and not a.startswith("hydra.")]
    ray_init = recipe.compose(request.config_folder, overrides).ray_kwargs.ray_init
    assert ray_init.address == "auto"
    assert (ray_init.num_cpus, ray_init.num_gpus, ray_init.object_store_memory) == (None, None, None)
    assert ray_init.runtime_env.py_executable is None
    assert ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES == "vlnorm_verl.verl_entry"


def test_a_ray_job_is_the_same_command_with_this_project_sent_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    request, _, config = composed(tmp_path, "method=dr_grpo", "trainer.nnodes=2", smoke=True)
    command = launch.submit_command(request, config)
    assert "--address=http://head:8265" in command
    (folder,) = [a.split("=", 1)[1] for a in command if a.startswith("--working-dir=")]
    assert Path(folder) == RECIPES.parent
    (runtime,) = [json.loads(a.split("=", 1)[1]) for a in command if a.startswith("--runtime-env-json=")]
    assert all(name.startswith("/") for name in runtime["excludes"])  # /data, and not vlnorm_verl/data
    entry = command[command.index("--") + 1 :]
    assert entry[:6] == ["python", "-m", "vlnorm_verl", "launch", "--recipes", "recipes"]
    assert {"--smoke", "method=dr_grpo", "trainer.nnodes=2", f"recipe.root={tmp_path}/runs"} <= set(entry)
    assert shlex.split(shlex.join(entry)) == entry


def test_where_is_one_of_two(tmp_path: Path) -> None:
    code, text = answered(Request(RECIPES, [], on="lsf"))
    assert code == 2
    assert "--on lsf: accepted are slurm and kubernetes" in text
