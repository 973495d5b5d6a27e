"""The launcher without a cluster: what it decides, refuses and would start.

Covered: settings and loggers, the folder of a run, checks before anything starts. Not covered: runs (test_e2e.py), Ray
clusters and jobs (test_clusters.py), SLURM and Kubernetes (test_cluster_files.py), the recipes' values
(test_recipes.py).
"""

import contextlib
import importlib.metadata
import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig
from rich.console import Console
from typer.testing import CliRunner

from tests.byte_level import byte_level_model
from vlnorm_verl import machine
from vlnorm_verl.cli import app
from vlnorm_verl.files import UserError
from vlnorm_verl.runs import config as configs
from vlnorm_verl.runs import launch, limits, reproduce, smoke
from vlnorm_verl.runs.check import validate
from vlnorm_verl.runs.progress import terminal
from vlnorm_verl.runs.reproduce import RunSet
from vlnorm_verl.runs.request import Request, folder_of, settings

RECIPES = Path(__file__).parent.parent / "recipes"
MODULES = "ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES"


def composed(tmp_path: Path, *overrides: str, **request: Any) -> DictConfig:
    """What verl's trainer is given."""
    paths = [f"recipe.root={tmp_path / 'runs'}", f"recipe.data={tmp_path / 'data'}"]
    return complete(Request(RECIPES, [*paths, *overrides], **request))


def complete(request: Request) -> DictConfig:
    asked = configs.compose(request.recipes / "config", request.overrides)
    return configs.with_settings(asked, settings(request, asked, folder_of(request, asked)))


def dry_run(*overrides: str, smoke: bool = False) -> list[str]:
    """The lines of a dry run, which must end well."""
    console = terminal(record=True, width=400, file=io.StringIO())
    assert launch.launch(Request(RECIPES, list(overrides), dry_run=True, smoke=smoke), console) == 0
    return console.export_text().splitlines()


def refused(request: Request) -> str:
    with pytest.raises(UserError) as error:
        launch.launch(request, terminal(quiet=True))
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------- overrides


def test_one_flag_adds_loggers(tmp_path: Path) -> None:
    config = composed(tmp_path, loggers=["wandb", "tensorboard"])
    assert list(config.trainer.logger) == ["console", "file", "wandb", "tensorboard"]
    validate(composed(tmp_path, loggers=["trackio", "swanlab", "mlflow"]))  # verl knows them, without their packages
    with pytest.raises(UserError, match="--logger wandbb is not accepted"):
        composed(tmp_path, loggers=["wandbb"])


def test_paths_are_absolute_and_last_overrides_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    request = Request(RECIPES, ["recipe.root=here", "recipe.data='~/data'", "recipe.steps=7"])
    config = complete(request)
    assert config.recipe.folder == f"{tmp_path}/here/aggregation-countdown-3b-8192-vl_norm-seed0"
    assert config.recipe.data == "/home/me/data"
    assert config.trainer.total_training_steps == 7


def test_paths_may_have_hydras_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given by the user in quotes, and as the project's folder, which relative paths begin with."""
    project = tmp_path / "it's a,b (copy), x=y #2 [1] {a: b} a:b"
    shutil.copytree(RECIPES / "config", project / "recipes" / "config")
    monkeypatch.chdir(project)
    for given in ([], [configs.override("recipe.root", str(project / "runs"))]):
        request = Request(Path("recipes"), given)
        config = complete(request)
        assert config.recipe.data == f"{project}/data"
        assert config.recipe.folder == f"{project}/runs/aggregation-countdown-3b-8192-vl_norm-seed0"
        (run,) = reproduce.plan(request.recipes, [RunSet("x", "", "", "", "", [["method=vl_norm"]])], [], given)
        assert run.folder.absolute() == Path(config.recipe.folder)


def test_smoke_is_the_worst_case_and_then_an_ordinary_step(tmp_path: Path) -> None:
    full = composed(tmp_path, "family=dapo", "length=3072")
    worst = composed(tmp_path, "family=dapo", "length=3072", "trainer.save_freq=-1", smoke=True)
    assert (worst.trainer.total_training_steps, worst.trainer.save_freq, worst.trainer.test_freq) == (1, 1, -1)
    assert worst.actor_rollout_ref.rollout.ignore_eos
    assert not worst.algorithm.filter_groups.enable  # answers without an end would never fill a batch
    usual = configs.flatten(full)
    changed = {k for k, v in configs.flatten(worst).items() if usual[k] != v}
    assert not [
        key for key in changed if key.startswith(("data.", "actor_rollout_ref.actor.", "actor_rollout_ref.model."))
    ]

    folder = Path(worst.recipe.folder)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1")
    given = [f"recipe.root={tmp_path}/runs", "family=dapo", "length=3072"]
    second = configs.with_settings(full, settings(Request(RECIPES, given, smoke=True), full, folder))
    assert (second.trainer.total_training_steps, second.trainer.save_freq, second.trainer.test_freq) == (2, -1, 1)
    assert second.algorithm.filter_groups.enable
    assert not second.actor_rollout_ref.rollout.ignore_eos
    assert composed(tmp_path, "family=dapo", "length=3072", smoke=True).recipe.folder != str(folder)


def test_what_a_smoke_run_shows(tmp_path: Path) -> None:
    """1,000 steps by the two that were measured: 20 s without the checkpoint, 10 s; 20 validations, 50 checkpoints."""
    timings = [
        {"timing_s/step": 25.0, "timing_s/save_checkpoint": 5.0},
        {"timing_s/step": 10.0, "timing_s/testing": 60.0},
    ]
    memory = [{"actor/perf/max_memory_allocated_gb": value} for value in (70.04, 30.0)]
    memory[1]["training/rollout_actor_probs_pearson_corr"] = 0.99951
    lines = [json.dumps({"step": n, "data": {**timings[n - 1], **memory[n - 1]}}) for n in (1, 2)]
    (tmp_path / "metrics-000.jsonl").write_text(f"{lines[0]}\n")
    (tmp_path / "metrics-001.jsonl").write_text(f"{lines[1]}\n")
    for name in ("model", "optim"):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / f"{name}_world_size_1_rank_0.pt").write_bytes(bytes(10**7))
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(smoke.table(tmp_path, composed(tmp_path), 100.0))
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:4]]
        for line in console.export_text().splitlines()
        if len(cells := line.split("│")) > 3
    }
    assert rows["GPU memory, most allocated by the actor"] == ["70.0 GB", "30.0 GB"]
    assert rows["correlation of token probabilities, vLLM and actor"] == ["", "0.9995"]
    assert rows["seconds: validation"] == ["", "60.0 s"]
    assert rows["seconds: start, with a checkpoint loaded, and end"] == ["", "30.0 s"]
    total = 20 * 60 + 50 * 5
    assert rows["1000 steps like this one, validated and saved"] == [
        f"{(20_000 + total) / 3600:.1f} h",
        f"{(10_000 + total) / 3600:.1f} h",
    ]
    assert rows["disk: a checkpoint; when finished, without the optimizer"] == ["0.02 GB", "0.01 GB"]


# ------------------------------------------------------------------------------------------------- before it starts


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["actor_rollout_ref.actor.loss_agg_mode=vl-norm"], "Did you mean 'vl_norm'"),
        (["actor_rollout_ref.actor.loss_scale_factor=null", "method=dr_grpo"], "loss_scale_factor=None with"),
        (["model=7b", "attention=sdpa"], "Accepted: attention=flash, or model=3b"),
        (
            ["actor_rollout_ref.actor.policy_loss.loss_mode=dapo_norm_as_coded", "attention=sdpa"],
            "a micro-batch. Accepted: attention=flash",
        ),
        (["actor_rollout_ref.rollout.name=sglang"], "rollout.name=sglang: accepted is vllm"),
        (["trainer.test_freq=null"], "trainer.test_freq=null: accepted is a number of steps; -1 is never"),
        (["trainer.default_local_dir=/big/disk"], "default_local_dir=/big/disk: accepted is "),
        (["trainer.save_freq=null"], "trainer.save_freq=null: accepted is a number of steps; -1 is never"),
        (
            ["trainer.n_gpus_per_node=6", "actor_rollout_ref.actor.use_dynamic_bsz=true"],
            "responses cannot be dealt out evenly to 6 GPUs",
        ),
        (["actor_rollout_ref.actor.loss_scale_factor='3072'"], "loss_scale_factor='3072': accepted is a number"),
        (["actor_rollout_ref.actor.loss_scale_factor=0"], "M must be a positive number"),
        # verl itself divides by whatever it is given.
        *(
            ([f"actor_rollout_ref.actor.loss_scale_factor={text}", "method=dr_grpo"], "M must be a positive number")
            for text in ("0", "-1", "nan")
        ),
        (
            [
                "actor_rollout_ref.actor.loss_agg_mode=vl_norm",
                "method=grpo_norm",
                "actor_rollout_ref.actor.loss_scale_factor='3072'",
            ],
            "loss_scale_factor='3072': M must be",
        ),
        (["trainer.nnodes=two"], "trainer.nnodes='two': accepted is a number, as in trainer.nnodes=1"),
        (["trainer.n_gpus_per_node=0"], "trainer.n_gpus_per_node=0: accepted is a whole number of at least 1"),
        (["recipe.steps=0"], "recipe.steps=0: accepted is a whole number of at least 1"),
        (["recipe.steps=1e3"], "recipe.steps=1000.0: accepted is a whole number of at least 1"),
        *(
            (
                [f"trainer.max_actor_ckpt_to_keep={n}"],
                f"_to_keep={n}: accepted is null, or a whole number of at least 0",
            )
            for n in (-1, 2.5)
        ),
        *(
            (
                [f"recipe.{key}={value}"],
                f"recipe.{key}={shown}: accepted is a folder, as in recipe.{key}=/scratch/{key}",
            )
            for key, value, shown in (
                *((key, "", "") for key in ("root", "data", "folder")),  # of an unset variable
                *(("folder", "1", "1"), ("root", "null", "None")),
            )
        ),
        ([f"recipe.folder={__file__}"], f"Not a directory: '{__file__}/"),
        (["recipe.keep=2"], "recipe.keep=2 is not accepted. Accepted: model, all"),
        *(
            ([f"data.{value}"], f"data.{key}_files={shown}: accepted is a parquet file, or a list of some")
            for value, key, shown in (
                ("val_files=null", "val", "None"),
                ("val_files=[]", "val", "[]"),
                ("train_files=[a.parquet,7]", "train", "['a.parquet', 7]"),
            )
        ),
        (["~trainer.save_freq"], "save_freq: no key can be taken away. Accepted: trainer.save_freq=…, or null"),
        (["recipe.seed=-1"], "recipe.seed=-1: accepted is a whole number of at least 0"),
        (["trainer.total_training_steps=null"], "trainer.total_training_steps=None: accepted is a whole number"),
        (["method=vl_norm_as_coded", "recipe.alpha=3"], "(recipe.alpha): α = 3 is out of range; accepted: 0 ≤ α ≤ 2"),
        *(
            (
                ["family=dapo", "length=3072", "method=soft_punishment", f"recipe.overlong_buffer={tokens}"],
                f"overlong_buffer_cfg.len={tokens} (recipe.overlong_buffer): accepted is a whole number",
            )
            for tokens in (0, 3073)
        ),
        *(
            (
                ["family=dapo", "length=3072", f"algorithm.filter_groups.metric={metric}"],
                f"metric={shown}: no group could be dropped by it. Accepted: acc, reward",
            )
            for metric, shown in (("null", "None"), ("seq_reward", "seq_reward"))  # the second is older verl's name
        ),
        (["trainer.logger=wandb"], "trainer.logger=wandb: it must have `file` in a list"),
        (["trainer.logger=[console]"], "it must have `file` in a list"),
        (["recipe.task=math"], "the run's name alone: its task is countdown. Accepted: task=math"),
        (["recipe.length=3072"], "its length is 8192. Accepted: length=3072"),
        (["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=0"], "micro-batches. Accepted: a divisor of 40"),
        (["recipe.steps=[3]"], "recipe.steps=[3]: accepted is a number"),
        (["actor_rollout_ref.actor.shuffle=yes"], "actor_rollout_ref.actor.shuffle='yes': accepted is true or false"),
        *(
            ([f"{key}.path=/no/file.py"], "verl refuses the configuration: FileNotFoundError: Custom module file not")
            for key in ("reward.custom_reward_function", "trainer.v1.sampler.custom_sampler")
        ),
        (["reward.reward_manager.name=mine"], "refuses the configuration: ValueError: Unknown reward manager: mine"),
        (["trainer.device=cpu"], "model=tiny is on the CPU and the others on GPUs"),
        (["model=tiny", "trainer.device=cuda"], "model=tiny is on the CPU and the others on GPUs"),
        (["actor_rollout_ref.model.path='~/Qwen'"], f"know ~. Accepted: the whole path, {Path.home()}/Qwen"),
        (["recipe.data=/tmp/a,b"], """"recipe.root='~/a, (b)=#1'\""""),
        (["recipe.data=/tmp/run(copy)"], "Hydra cannot read this"),
        (["recipe.seed=0,1,2"], "reproduce.sh SET --seeds 0,1,2"),
        (["hydra.run.dir=/x"], "The run's folder is recipe.folder="),
        (["actor_rollout_ref.actor.checkpoint.async_save=true"], "verl then names no checkpoint as the last"),
        (["actor_rollout_ref.actor.checkpoint.save_contents=[model]"], "go on with a new optimizer"),
        (["actor_rollout_ref.rollout.full_determinism=true"], "would get the same seed"),
        (["actor_rollout_ref.rollout.val_kwargs.do_sample=false"], "for greedy validation val_kwargs.temperature=0"),
        (["actor_rollout_ref.actor.optim.clip_grad=0"], "clip_grad=0: gradients are scaled down to that norm"),
        (["data.max_prompt_length=2000"], "max_model_len=9216: vLLM would cut responses. Accepted: at least"),
        (["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=6"], "a divisor of 40"),
        (["trainer.nnodes=3", "data.train_batch_size=96"], "cannot be dealt out evenly to 24 GPUs"),
        (["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=7"], "a divisor of 160"),
    ],
)
def test_a_run_that_cannot_work_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refused(Request(RECIPES, [f"recipe.root={tmp_path}", *overrides]))
    assert not list(tmp_path.iterdir())


def test_missing_data_names_both_ways_to_get_it(tmp_path: Path) -> None:
    text = refused(Request(RECIPES, [f"recipe.root={tmp_path}", f"recipe.data='{tmp_path}/not there'", "task=math"]))
    assert "which is built without CUDA" in text  # all that is missing, at once
    assert "bash recipes/install_gpu.sh" in text
    assert f"vlnorm-verl data math --out '{tmp_path}/not there/math'\n" in text
    assert "--offline" in text
    assert "minerva.parquet" in text


def test_a_model_or_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    tiny, gpu = composed(tmp_path, "model=tiny"), composed(tmp_path)
    for config in (tiny, composed(tmp_path, "model=tiny", "task=math")):
        assert configs.missing_files(config) == ""  # the launcher makes all of it
    for path in (f"{tmp_path}/Qwen2.5-3B", "./Qwen2.5-3B", "my/models/Qwen2.5-3B"):
        for config in (tiny, gpu):
            config.actor_rollout_ref.model.path = path
            wrong = f"no model: actor_rollout_ref.model.path={path} is no folder here. Accepted: a folder that"
            assert wrong in configs.missing_files(config)
    for name in ("Qwen/Qwen2.5-3B", "gpt2", "hdfs://host/models/x", str(tmp_path)):
        gpu.actor_rollout_ref.model.path = tiny.actor_rollout_ref.model.path = name
        assert configs.missing_files(gpu).startswith("no data: ")
    gpu.data.train_files = "hdfs://host/train.parquet"  # which verl copies
    for config in (tiny, gpu):  # what `vlnorm-verl data` does not make
        config.data.val_files = f"{tmp_path}/typo.parquet"
        assert configs.missing_files(config) == f"no data: {tmp_path}/typo.parquet"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "logits_scaling": 8.0},
            "'logits_scaling': 8",
        ),
        ({"final_logit_softcapping": 30.0}, r"does to its logits, {'final_logit_softcapping': 30.0}"),
        ({"tie_word_embeddings": False}, "read the weight of lm_head"),
        ({"model_type": "qwen2"}, r"cannot take this tokenizer: .*<\|im_end\|>"),
        ({"tokenizer_class": "LlamaTokenizerFast"}, "actor_rollout_ref.model.path=.*loses spaces and line ends"),
        ({}, ""),
    ],
)
def test_a_model_that_would_be_trained_as_another_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = byte_level_model(tmp_path / "model", settings.get("tokenizer_class", "PreTrainedTokenizerFast"))
    usual = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(usual | settings))
    config = composed(tmp_path, "attention=sdpa", f"actor_rollout_ref.model.path={folder}")
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        validate(config)


def test_a_reward_that_cannot_be_imported_is_refused_with_the_reason(tmp_path: Path) -> None:
    (file := tmp_path / "reward.py").write_text("import nothing_here\n")
    with pytest.raises(UserError, match=r"reward\.py.*ModuleNotFoundError: No module named 'nothing_here'"):
        validate(composed(tmp_path, f"reward.custom_reward_function.path={file}"))


def test_fewer_problems_than_a_rollout_batch_are_refused(tmp_path: Path) -> None:
    config, file = composed(tmp_path, "model=tiny", "data.train_batch_size=11"), tmp_path / "mine.parquet"
    config.data.train_files = [str(file)]
    pq.write_table(pa.table({"prompt": ["?"] * 10}), file)
    assert "have 10 rows, and data.train_batch_size=11 needs as many" in configs.missing_files(config)
    config.data.train_files = [str(file), str(file)]
    assert configs.missing_files(config) == ""
    file.write_text("no parquet")
    assert "mine.parquet" in configs.missing_files(config)


def test_the_cost_is_of_the_steps_that_are_left(tmp_path: Path) -> None:
    def hours() -> str:
        return next(line for line in dry_run(f"recipe.folder={tmp_path}") if "hours of" in line)

    whole, tracker = hours(), tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.parent.mkdir()
    tracker.write_text("900")
    assert hours() != whole
    assert not [line for line in dry_run(f"recipe.root={tmp_path}", smoke=True) if line.startswith("cost")]


def test_a_dry_run_shows_value_source_and_command(tmp_path: Path) -> None:
    lines = dry_run(f"recipe.root={tmp_path}", "recipe.alpha=0.5")
    assert not list(tmp_path.iterdir())
    assert "recipe.alpha=0.5  # command line" in lines
    (mode,) = [line for line in lines if line.startswith("actor_rollout_ref.actor.loss_agg_mode=")]
    assert all(part in mode for part in ("=vl_norm:0.5  # method/vl_norm.yaml", "paper:"))
    assert any(line.startswith('trainer.logger=["console", "file"]  # config/common.yaml:') for line in lines)
    assert any(line.startswith("cost, worked out on paper") for line in lines)
    assert lines[-1].endswith(": valid")


def test_the_command_of_a_dry_run_trains_what_the_launcher_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:6379")
    root = configs.override("recipe.root", f"{tmp_path}/a (b)")
    overrides = [root, f"recipe.data={tmp_path}", "length=3072", f"+{MODULES}=json"]
    (line,) = [line for line in dry_run(*overrides) if line.startswith("command: ")]
    path, name, *typed = shlex.split(line)[4:]
    assert (path, name) == (f"--config-path={RECIPES}/config", "--config-name=recipe")
    assert line.count(MODULES) == 1
    by_hand = configs.compose(RECIPES / "config", [text for text in typed if not text.startswith("hydra.")])
    assert configs.flatten(by_hand) == configs.flatten(complete(Request(RECIPES, overrides)))


def test_a_dry_run_names_what_does_nothing_and_no_cost_of_another_model(tmp_path: Path) -> None:
    another = "actor_rollout_ref.model.path=Qwen/Qwen2.5-32B"
    lines = dry_run(f"recipe.root={tmp_path}", "actor_rollout_ref.actor.grad_clip=0.5", another)
    (note,) = [line for line in lines if "does nothing" in line]
    assert "actor_rollout_ref.actor.grad_clip" in note
    assert f"no cost with {another}: only the paper's models and batches are worked out" in lines
    assert not [line for line in lines if line.startswith("cost")]


def test_a_folder_without_the_recipes_is_refused(tmp_path: Path) -> None:
    for arguments in (["launch", "--dry-run"], ["reproduce", "--list"]):
        result = CliRunner().invoke(app, [*arguments, "--recipes", str(tmp_path / "recipes")])
        assert result.exit_code == 2
        # A terminal that is called dumb is 80 columns wide whatever COLUMNS says: the words, without the box's breaks.
        text = re.sub(r"[\s│]", "", result.output)
        assert f"Invalidvaluefor'--recipes':{tmp_path}/recipeshasnoconfig/recipe.yaml" in text


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"vlnorm-verl {importlib.metadata.version('vlnorm-verl')}\n")


# -------------------------------------------------------------------------------------------------------- CPU or GPUs


@pytest.mark.parametrize(
    ("overrides", "on_cpu", "flash"),
    [
        ([], False, True),
        (["model=3b", "attention=sdpa"], False, False),
        (["model=7b", "+actor_rollout_ref.model.override_config.attn_implementation=eager"], False, False),
        (["model='tiny'"], True, False),
    ],
)
def test_the_configuration_says_where_a_run_is(tmp_path: Path, overrides: list[str], on_cpu: bool, flash: bool) -> None:
    config = composed(tmp_path, *overrides)
    assert configs.is_cpu(config) == on_cpu
    assert configs.wants_flash_attention(config) == flash


def test_a_leftover_of_a_cpu_run_in_the_shell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert "VERL_PLATFORM=cpu is set, and this run is on GPUs: unset it" in refused(Request(RECIPES))


def test_without_flash_attn_a_run_on_gpus_is_told_of_sdpa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "driver", lambda: ((13, 0), 8))
    monkeypatch.setattr(machine, "cpus", lambda: 34)
    assert "Give runs attention=sdpa" in launch.cannot_run(composed(tmp_path))
    said = launch.cannot_run(composed(tmp_path, "attention=sdpa"))
    assert said == ""


def test_vllms_one_port_for_all_engines_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "driver", lambda: ((13, 0), 8))
    monkeypatch.setattr(machine, "cpus", lambda: 34)
    monkeypatch.setenv("VLLM_PORT", "8000")
    said = launch.cannot_run(composed(tmp_path, "attention=sdpa"))
    assert said == "VLLM_PORT=8000 is set, and all vLLM engines of a node would take that port. Unset it"
    assert said in map(str, machine.environment_problems(on_cpu=False, flash_attention=False))  # of a cluster's node
    assert launch.cannot_run(composed(tmp_path, "model=tiny")) == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "verl reserves 34 CPUs of Ray, and this machine has 21"),
        (["trainer.n_gpus_per_node=4"], "verl reserves 22 CPUs of Ray, and this machine has 21"),
        (["ray_kwargs.ray_init.num_cpus=34"], ""),
        (["ray_kwargs.ray_init.num_cpus=33"], "reserves 34 CPUs of Ray, and ray_kwargs.ray_init.num_cpus is 33"),
        (["model=tiny"], ""),
        (["model=tiny", "trainer.n_gpus_per_node=2"], ""),
        (["model=tiny", "trainer.n_gpus_per_node=8"], "27 CPUs of Ray, and ray_kwargs.ray_init.num_cpus is 16"),
        (["model=tiny", "trainer.n_gpus_per_node=8", "ray_kwargs.ray_init.num_cpus=27"], ""),
    ],
)
def test_a_ray_with_fewer_cpus_than_verl_reserves_is_told_so(
    tmp_path: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "driver", lambda: ((13, 0), 8))
    monkeypatch.setattr(machine, "cpus", lambda: 21)
    said = launch.cannot_run(composed(tmp_path, "attention=sdpa", *overrides))
    assert message in said
    assert bool(message) == bool(said)


def test_several_nodes_need_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed(tmp_path, "model=tiny", "trainer.nnodes=2")
    assert "trainer.nnodes=2, and this run would start a Ray of its own" in launch.cannot_run(config)
    monkeypatch.setattr(launch, "prepare_environment", lambda *_: "")  # it would turn this process to the CPU
    monkeypatch.setattr(launch, "run_here", lambda *_: pytest.fail("started"))
    asked = Request(RECIPES, [f"recipe.root={tmp_path}", "model=tiny", "trainer.nnodes=2"])
    assert "this run would start a Ray of its own" in refused(asked)
    monkeypatch.setenv("RAY_ADDRESS", "host:6379")
    assert launch.cannot_run(config) == ""


@pytest.mark.parametrize("model", ["tiny", "3b"])
def test_a_ray_of_ones_own_needs_a_home_and_short_paths(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "driver", lambda: ((13, 0), 8))
    monkeypatch.setattr(machine, "cpus", lambda: 34)
    monkeypatch.setattr(machine, "compiler_problem", lambda: None)
    monkeypatch.setattr(machine, "home_problem", lambda own_ray: machine.Defect("no home", "Take one"))
    monkeypatch.setenv("TMPDIR", "/" + "x" * 60)
    config = composed(tmp_path, f"model={model}", "attention=sdpa")
    first, second = launch.cannot_run(config).splitlines()
    assert first == "no home. Take one"
    assert "is too long for Ray's sockets" in second
    # Ray's own setting of its folder, and a Ray that runs already.
    elsewhere = composed(tmp_path, f"model={model}", "attention=sdpa", "+ray_kwargs.ray_init._temp_dir=/tmp/r")
    assert launch.cannot_run(elsewhere) == first
    monkeypatch.setenv("RAY_ADDRESS", "host:6379")
    assert launch.cannot_run(config) == ""


def test_little_memory_is_a_note_of_a_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_problem", lambda ranks: machine.Defect("3.9 GB", "Close"))
    monkeypatch.setattr(launch, "prepare_environment", lambda *_: "")  # it would turn this process to the CPU
    monkeypatch.setattr(launch, "run_here", lambda *_: 0)
    console = terminal(record=True, width=400, file=io.StringIO())
    paths = [f"recipe.root={tmp_path / 'runs'}", f"recipe.data={tmp_path / 'data'}"]
    assert launch.launch(Request(RECIPES, [*paths, "model=tiny"]), console) == 0
    assert "note: 3.9 GB. Close" in console.export_text()


# ------------------------------------------------------------------------------------------------------ where it runs


def test_a_local_run_gets_a_ray_of_its_own(tmp_path: Path) -> None:
    ray_init = composed(tmp_path, "model=tiny").ray_kwargs.ray_init
    assert ray_init.address == "local"
    assert "env_vars" not in ray_init.runtime_env


def test_where_is_one_of_two() -> None:
    assert "--on lsf: accepted are slurm and kubernetes" in refused(Request(RECIPES, on="lsf"))


def test_slurm_needs_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--on slurm: no sbatch here" in refused(Request(RECIPES, on="slurm"))


def test_slurm_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job would be given its nodes, and end: an installed package has no recipes/python.sh."""
    (tmp_path / "sbatch").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    shutil.copytree(RECIPES / "config", tmp_path / "recipes" / "config")
    assert "a job starts in a checkout" in refused(Request(tmp_path / "recipes", on="slurm"))


def test_a_slurm_job_without_data_is_not_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be given its nodes, and end."""
    (tmp_path / "sbatch").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no data: " in refused(Request(RECIPES, [f"recipe.data={tmp_path}/none"], on="slurm"))


def test_a_wrong_request_is_one_message_and_exit_code_2() -> None:
    result = CliRunner().invoke(app, ["launch", f"--recipes={RECIPES}", "model=14b"])
    assert (result.exit_code, result.output) == (2, "model=14b is not accepted. Accepted: 3b, 7b, tiny\n")
