"""Every recipe, without running one: what its script asks for, what it composes to, and whether verl accepts it.

Covered: each run of recipes/manifest.yaml and each recipe script, with verl's own checks and dataclasses; each value of
the paper's setting as a literal; the source of each value of recipes/config; `vlnorm-verl reproduce` with a launcher
that only pretends. Not covered: that a run trains (test_launch.py, at scale=cpu), and anything that needs a GPU.
"""

import functools
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig
from rich.console import Console
from typer.testing import CliRunner

from vlnorm_verl.cli import app
from vlnorm_verl.files import UserError
from vlnorm_verl.runs import recipe, reproduce, resources
from vlnorm_verl.runs.reproduce import Run

PROJECT = Path(__file__).parent.parent
RECIPES = PROJECT / "recipes"
CONFIG = RECIPES / "config"
README = RECIPES / "README.md"
SCALE = PROJECT / "docs" / "scale.md"
SCRIPTS = {"countdown.sh", "math.sh", "dapo_countdown.sh", "dapo_math.sh"}


def planned(*names: str, seeds: tuple[int, ...] = (), overrides: tuple[str, ...] = ()) -> list[Run]:
    manifest = reproduce.read_manifest(RECIPES)
    sets = [one for name in names for one in manifest.find(name)]
    return reproduce.plan(RECIPES, sets, list(seeds), list(overrides))


@functools.cache
def composed(overrides: tuple[str, ...]) -> DictConfig:
    return recipe.compose(CONFIG, list(overrides))


RUNS = planned("all")
each_run = pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])

# ------------------------------------------------------------------------------------- the paper's values, as literals

ALL_RUNS = {
    "algorithm.adv_estimator": "grpo",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "algorithm.use_kl_in_reward": False,
    "algorithm.filter_groups.enable": False,
    "data.train_batch_size": 128,
    "data.filter_overlong_prompts": True,
    "data.truncation": "error",
    "data.seed": 0,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.actor.use_dynamic_bsz": False,
    "actor_rollout_ref.actor.ppo_epochs": 1,
    "actor_rollout_ref.actor.shuffle": False,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.3,
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "actor_rollout_ref.actor.loss_scale_factor": None,
    "actor_rollout_ref.actor.policy_loss.loss_mode": "vanilla",
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
    "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
    "actor_rollout_ref.actor.optim.weight_decay": 0.01,
    "actor_rollout_ref.actor.optim.clip_grad": 1.0,
    "actor_rollout_ref.actor.strategy": "fsdp2",
    "actor_rollout_ref.actor.fsdp_config.param_offload": True,
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload": True,
    "actor_rollout_ref.actor.data_loader_seed": 0,
    "actor_rollout_ref.actor.fsdp_config.seed": 0,
    "actor_rollout_ref.model.use_remove_padding": True,
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    # Nothing around the prompt: these are base models.
    "actor_rollout_ref.model.custom_chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    "actor_rollout_ref.rollout.seed": 0,
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.temperature": 1.0,
    "actor_rollout_ref.rollout.top_p": 1.0,
    "actor_rollout_ref.rollout.top_k": -1,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.gpu_memory_utilization": 0.8,
    "actor_rollout_ref.rollout.max_num_seqs": 512,
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
    "actor_rollout_ref.rollout.val_kwargs.n": 8,
    "actor_rollout_ref.rollout.val_kwargs.do_sample": True,
    "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0,
    "actor_rollout_ref.rollout.val_kwargs.top_p": 1.0,
    "actor_rollout_ref.rollout.val_kwargs.top_k": -1,
    "reward.custom_reward_function.name": "compute_score",
    "reward.reward_manager.name": "naive",
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
    "trainer.total_training_steps": 1000,
    "trainer.resume_mode": "auto",
    "trainer.save_freq": 20,
    "trainer.max_actor_ckpt_to_keep": 2,
    "trainer.logger": ["console", "file"],
    "trainer.log_val_generations": 0,
    "trainer.v1.trainer_mode": "sync_whole_groups",
    "trainer.v1.sampler.custom_sampler.path": "pkg://vlnorm_verl.paper.replay_buffer",
    "trainer.v1.sampler.custom_sampler.name": "BoundedReplayBuffer",
}
FAMILY: dict[str, dict[str, Any]] = {
    "aggregation": {
        "actor_rollout_ref.actor.clip_ratio_c": 3.0,
        "actor_rollout_ref.rollout.n": 10,
        "trainer.test_freq": 50,
        "trainer.val_before_train": True,
    },
    "dapo": {
        "actor_rollout_ref.actor.clip_ratio_c": 10.0,
        "actor_rollout_ref.rollout.n": 8,
        "trainer.val_before_train": False,
        "algorithm.filter_groups.enable": True,
        "algorithm.filter_groups.metric": "acc",
        "algorithm.filter_groups.max_num_gen_batches": 10,
        "algorithm.filter_groups.max_inflight_gen_batches": 3,  # 384 prompts for 128
        "trainer.v1.sampler.sampler_kwargs.filter_groups.enable": True,
        "trainer.v1.sampler.sampler_kwargs.filter_groups.max_num_gen_batches": 10,
        "trainer.v1.sampler.sampler_kwargs.train_batch_size": 128,
    },
}
DAPO_VALIDATES_EVERY = {"countdown": 25, "math": 50}
TASK: dict[str, dict[str, Any]] = {
    "countdown": {
        "data.max_prompt_length": 256,
        "data.train_files": "data/countdown/train.parquet",
        "data.val_files": "data/countdown/test.parquet",
        "reward.custom_reward_function.path": "pkg://vlnorm_verl.tasks.countdown",
    },
    "math": {
        "data.max_prompt_length": 1024,
        "data.train_files": "data/math/train.parquet",
        "data.val_files": [
            "data/math/math500.parquet",
            "data/math/aime2024.parquet",
            "data/math/amc.parquet",
            "data/math/minerva.parquet",
        ],
        "reward.custom_reward_function.path": "pkg://vlnorm_verl.tasks.math",
    },
}
ALPHA = {"countdown": "1.0", "math": "0.75"}
MODEL = {"3b": "Qwen/Qwen2.5-3B", "7b": "Qwen/Qwen2.5-7B"}
MODE = {
    "grpo_norm": "seq-mean-token-mean",
    "dapo_norm": "token-mean",
    "dr_grpo_norm": "seq-mean-token-sum-norm",
    "dr_grpo": "seq-mean-token-sum-norm",
    "dapo": "token-mean",
    "overlong_filtering": "token-mean",
    "soft_punishment": "token-mean",
    "dapo_norm_as_coded": "token-mean",
    "vl_norm_as_coded": "seq-mean-token-sum-norm",
}


def papers_values(name: str) -> dict[str, Any]:
    """What the run of that name is to be, from the tables above."""
    family, task, model, length, method, *alpha, _ = name.split("-")
    expected = ALL_RUNS | FAMILY[family] | TASK[task]
    if family == "dapo":
        expected["trainer.test_freq"] = DAPO_VALIDATES_EVERY[task]
    expected["actor_rollout_ref.model.path"] = MODEL[model]
    expected["data.max_response_length"] = int(length)
    expected["actor_rollout_ref.rollout.max_model_len"] = 1024 + int(length)  # the longest prompt of both tasks
    if method == "vl_norm":
        given = alpha[0].removeprefix("alpha") if alpha else ALPHA[task]
        expected["actor_rollout_ref.actor.loss_agg_mode"] = f"vl_norm:{given}"
    else:
        expected["actor_rollout_ref.actor.loss_agg_mode"] = MODE[method]
    if method in ("vl_norm", "vl_norm_as_coded", "dr_grpo", "dr_grpo_norm"):
        expected["actor_rollout_ref.actor.loss_scale_factor"] = int(length)  # M
    if method == "dr_grpo":
        expected["algorithm.norm_adv_by_std_in_grpo"] = False
    if method.endswith("as_coded"):
        expected["actor_rollout_ref.model.external_lib"] = "vlnorm_verl.paper.as_coded"
    if method == "dapo_norm_as_coded":
        expected["actor_rollout_ref.actor.policy_loss.loss_mode"] = "dapo_norm_as_coded"
    if method == "vl_norm_as_coded":
        expected["algorithm.adv_estimator"] = "grpo_vl_norm_as_coded"
        expected["algorithm.vl_norm_as_coded_alpha"] = float(ALPHA[task])
    if method == "overlong_filtering":
        expected["algorithm.adv_estimator"] = "grpo_overlong_filtering"
        expected["algorithm.overlong_filtering_length"] = 3072
    if method == "soft_punishment":
        expected["reward.reward_manager.source"] = "importlib"
        expected["reward.reward_manager.name"] = "SoftPunishment"
        expected["reward.reward_manager.module.path"] = "pkg://vlnorm_verl.paper.soft_punishment"
        expected["reward.reward_manager.module.name"] = "SoftPunishment"
        expected["reward.reward_kwargs.max_resp_len"] = 3072
        expected["reward.reward_kwargs.overlong_buffer_cfg.enable"] = True
        expected["reward.reward_kwargs.overlong_buffer_cfg.len"] = 2048
        expected["reward.reward_kwargs.overlong_buffer_cfg.penalty_factor"] = 1.0
    return expected


@each_run
def test_each_run_has_the_papers_values(run: Run) -> None:
    values = recipe.flatten(composed(tuple(run.overrides)))
    expected = papers_values(run.name)
    wrong = {key: values.get(key, "not set") for key, value in expected.items() if values.get(key, "not set") != value}
    assert not wrong, f"expected { ({key: expected[key] for key in wrong}) }"
    if "soft_punishment" not in run.name:
        assert not [key for key in values if "overlong_buffer_cfg" in key]


@each_run
def test_verl_accepts_each_run(run: Run) -> None:
    config = composed(tuple(run.overrides))
    recipe.validate(config)
    # What `--list` and `--status` look at, without composing.
    assert run.folder == Path(config.recipe.folder)
    assert run.progress.trainer.total_training_steps == config.trainer.total_training_steps
    assert run.name == config.trainer.experiment_name == run.folder.name
    # What the launcher, the report and a resume look for.
    assert config.trainer.default_local_dir == f"{run.folder}/checkpoints"
    assert config.trainer.rollout_data_dir == f"{run.folder}/rollouts"
    assert config.trainer.validation_data_dir == f"{run.folder}/validation"


# ------------------------------------------------------------------------------------------------- which runs there are


@pytest.mark.parametrize(
    ("name", "alias", "runs"),
    [
        ("countdown", "table2", 20),
        ("math", "table3", 20),
        ("alpha", "table4", 8),
        ("dapo", "table5", 16),
        ("as_coded", "as_coded", 12),
        ("fig2", "fig2", 2),
        ("fig3", "fig3", 40),
        ("each", "each", 26),
        ("all", "all", 74),
    ],
)
def test_number_of_runs(name: str, alias: str, runs: int) -> None:
    assert len(planned(name)) == runs
    assert [run.name for run in planned(alias)] == [run.name for run in planned(name)]


def test_a_folder_belongs_to_one_run() -> None:
    """Rows of two sets with one folder must be the same run, else one of them would never be made."""
    seen: dict[Path, list[str]] = {}
    rows = [row for one in reproduce.read_manifest(RECIPES).sets.values() for row in one.rows]
    assert len(rows) == 144  # 20 + 20 + 8 + 16 + 12 + 2 + 40 + 26
    for row in rows:
        folder = Path(reproduce.outline(CONFIG, row).recipe.folder)
        assert seen.setdefault(folder, sorted(row)) == sorted(row)


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
        alphas = [run.progress.recipe.alpha for run in planned("alpha") if f"-{task}-" in run.name]
        assert sorted(alphas) == [0.25, 0.5, 0.75, 1.0]


def test_seeds_and_overrides_reach_every_run() -> None:
    runs = planned("fig2", seeds=(0, 1, 2), overrides=("recipe.root=elsewhere", "trainer.n_gpus_per_node=4"))
    assert [str(run.folder) for run in runs] == [
        f"elsewhere/dapo-countdown-3b-3072-{method}-seed{seed}" for method in ("dapo", "vl_norm") for seed in (0, 1, 2)
    ]
    config = composed(tuple(runs[-1].overrides))
    recipe.validate(config)  # with a whole number of micro-batches on 4 GPUs
    assert config.trainer.n_gpus_per_node == 4
    assert config.actor_rollout_ref.rollout.seed == config.data.seed == 2
    # A choice that the set makes, too: the user's wins, and what becomes the same run is one.
    assert {run.name.split("-")[2] for run in planned("countdown", overrides=("model=3b",))} == {"3b"}
    assert len(planned("countdown", overrides=("model=3b",))) == 10


# ------------------------------------------------------------------------------------------------------------- scripts


def test_every_recipe_script(tmp_path: Path) -> None:
    """What each script hands to the launcher, with the user's choices behind it; and no script is missing here."""
    (tmp_path / "launch.sh").write_text('printf "%s\\n" "$@"\n')
    found: dict[str, list[str]] = {}
    for script in RECIPES.glob("*.sh"):
        if "/launch.sh" not in script.read_text():
            continue
        (tmp_path / script.name).write_text(script.read_text())
        user = ["method=vl_norm", "trainer.n_gpus_per_node=4", "actor_rollout_ref.actor.optim.lr=2e-6"]
        output = subprocess.run(["bash", tmp_path / script.name, *user], capture_output=True, text=True, check=True)
        found[script.name] = output.stdout.split()
        config = composed(tuple(found[script.name]))
        recipe.validate(config)
        assert config.trainer.n_gpus_per_node == 4
        assert config.actor_rollout_ref.actor.optim.lr == 2e-6
        family, task = ("dapo", script.stem[5:]) if script.stem.startswith("dapo_") else ("aggregation", script.stem)
        assert (config.recipe.family, config.recipe.task) == (family, task)
    assert found.keys() == SCRIPTS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=dapo"],
            "Accepted: grpo_norm, dapo_norm, dr_grpo_norm, dr_grpo, vl_norm, dapo_norm_as_coded, vl_norm_as",
        ),
        (["family=dapo", "length=3072", "method=grpo_norm"], "dapo, overlong_filtering, soft_punishment, vl_norm"),
        (["family=dapo", "length=8192"], "Accepted: 3072"),
        (["method=vlnorm"], "vl_norm"),
        (["length=4096"], "8192"),
        (["model=14b"], "7b"),
        (["trainer.n_gpu=4"], "trainer.n_gpu"),
    ],
)
def test_what_is_no_recipe_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        recipe.compose(CONFIG, overrides)


def test_length_is_a_choice_and_a_number() -> None:
    for length in ("3072", "8192"):
        config = composed((f"length={length}",))
        assert config.recipe.length == length
        assert config.data.max_response_length == int(length)
        assert config.actor_rollout_ref.actor.loss_scale_factor == int(length)


# ---------------------------------------------------------------------------------------------------------- provenance


def test_every_value_has_a_source() -> None:
    """Each of verl's keys that a recipe sets says why. Not scale/cpu.yaml, which is the setting made small."""
    bare = [
        f"{file.relative_to(CONFIG)}:{line} {key}"
        for file in sorted(CONFIG.rglob("*.yaml"))
        if file.name != "cpu.yaml"
        for key, line, comment in recipe.commented_values(file)
        if not key.startswith("recipe.") and comment.partition(":")[0] not in reproduce.SOURCES
    ]
    assert not bare, "two spaces, `# `, and code, paper, verl or ours are missing behind\n" + "\n".join(bare)


def test_every_key_is_read_by_somebody() -> None:
    """Of the recipes, and of the CPU stack."""
    files = [*CONFIG.rglob("*.yaml"), *(PROJECT / "vlnorm_verl/cpu/config").glob("*.yaml")]
    keys = [key for file in files for key, _, _ in recipe.commented_values(file)]
    assert len(keys) > 170
    assert recipe.unread_keys(composed(()), keys) == []


@pytest.mark.parametrize(
    ("key", "read"),
    [
        ("actor_rollout_ref.actor.optim.clip_grad", True),
        ("actor_rollout_ref.actor.grad_clip", False),  # its dataclass still has it
        ("actor_rollout_ref.actor.optim.warmup_style", True),  # by its own dataclass, which renames it
        ("actor_rollout_ref.actor.freeze_vision_tower", False),
        ("algorithm.overlong_filtering_length", True),  # by this package
        ("algorithm.overlong_length", False),  # a new key of a config file, misspelled
        ("actor_rollout_ref.rollout.engine_kwargs.vllm.stream_interval", True),  # vLLM's
        ("actor_rollout_ref.actor.megatron.use_mbridge", False),  # another engine's
    ],
)
def test_a_key_that_nobody_reads_is_found(key: str, read: bool) -> None:
    config = composed(())
    assert recipe.unread_keys(config, [key]) == ([] if read else [key])


def generated(command: str, content: str) -> None:
    """The README has that command's output between two marks. UPDATE_README=1 writes it."""
    start, end = f"<!-- output of: {command} -->\n", "<!-- end of output -->"
    before, rest = README.read_text().split(start)
    present, after = rest.split(end, 1)
    if os.environ.get("UPDATE_README"):
        README.write_text(f"{before}{start}{content}\n{end}{after}")
    else:
        assert present == content + "\n", (
            f"`{command}` prints something else now; UPDATE_README=1 with this test writes it"
        )


def test_readme_has_every_value() -> None:
    result = CliRunner().invoke(app, ["reproduce", "--recipes", str(RECIPES), "--values"])
    assert result.exit_code == 0
    content = result.output.rstrip("\n")
    for key in ("`actor_rollout_ref.actor.shuffle`", "`data.train_batch_size`", "`vl_norm:${recipe.alpha}`"):
        assert key in content
    generated("bash recipes/reproduce.sh --values", content)


# --------------------------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize(
    ("overrides", "eps"),
    [((), 1e-8), (("actor_rollout_ref.actor.optim.override_optimizer_config={eps: 1e-12}",), 1e-12)],
)
def test_adams_eps_is_what_the_docs_say(overrides: tuple[str, ...], eps: float) -> None:
    import torch
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config.optimizer import build_optimizer

    if overrides:
        assert f"'{overrides[0]}'" in SCALE.read_text()
    config = omega_conf_to_dataclass(composed(overrides).actor_rollout_ref.actor.optim)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], config)
    assert [group["eps"] for group in optimizer.param_groups] == [eps]


def test_the_docs_arithmetic_of_eps() -> None:
    rows = re.findall(r"^\| Qwen\S+ \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", SCALE.read_text(), re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        parameters, scaled, tenth, hundredth = map(float, row)
        expected = 1e-8 * parameters**0.5
        assert (scaled, tenth / 10, hundredth / 100) == pytest.approx((expected,) * 3, rel=0.04)
    mean, harmonic, longest, norm = 600, 270, 8192, 0.1
    vl_norm, grpo = norm * (mean * harmonic) ** 0.5 / longest, norm * (mean / harmonic) ** 0.5
    assert (vl_norm, grpo) == pytest.approx((0.005, 0.15), rel=0.02)
    shares = [1e-8 * parameters**0.5 / of for of in (vl_norm, grpo) for parameters in (3.09e9, 7.62e9)]
    assert shares == pytest.approx([0.11, 0.18, 0.004, 0.006], rel=0.08)


# ----------------------------------------------------------------------------------------------------------- resources


def test_readme_has_the_resources() -> None:
    generated("python -m vlnorm_verl.runs.resources", resources.tables())


def test_resources_know_the_models() -> None:
    """The dimensions give Qwen's number of parameters, and the recipes' own values are those of the composed runs."""
    for model in resources.MODELS:
        attention = 2 * model.hidden**2 + 2 * model.hidden * model.kv_heads * model.head_size
        total = model.layers * (attention + 3 * model.hidden * model.intermediate) + model.embedding_parameters
        assert total == pytest.approx(model.parameters, rel=0.002)
    assert {entry.script for entry in resources.RECIPES} == SCRIPTS
    for entry in resources.RECIPES:
        family, task = ("dapo", entry.script[5:-3]) if entry.dapo else ("aggregation", entry.script[:-3])
        run = next(run for run in RUNS if run.name == f"{family}-{task}-3b-{entry.limit}-vl_norm-seed0")
        config = composed(tuple(run.overrides))
        assert entry.n == config.actor_rollout_ref.rollout.n
        assert (entry.prompt, entry.limit) == (config.data.max_prompt_length, config.data.max_response_length)
        assert config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu == resources.MICRO_BATCH
        assert config.data.train_batch_size == resources.PROMPTS
        assert config.trainer.n_gpus_per_node in resources.NODES
        assert config.actor_rollout_ref.rollout.gpu_memory_utilization == resources.VLLM_SHARE


def test_what_fits_where() -> None:
    """As two readings of verl's code came to, by hand."""
    three, seven = resources.MODELS
    short, long = resources.RECIPES[:2]
    h100, _, a100_40, rtx = resources.GPU_TYPES

    def named(model: Any, row: Any, gpu: Any, gpus: int) -> str | None:
        found = resources.remedy(model, row, gpu, gpus)
        return found and found[0]

    assert [named(three, row, rtx, 8) for row in (short, long)] == ["micro 2", "micro 1"]
    assert named(seven, short, rtx, 8) is None
    assert named(seven, short, a100_40, 4) is None
    assert named(seven, long, h100, 4) == "yes"
    # 40 micro-batches a step: seconds on NVLink, over a minute on PCIe
    nvlink, pcie = (resources.link_seconds(three, long, 8, 4, link[1]) for link in (h100.link, rtx.link))
    assert nvlink < 6
    assert pcie > 60


def test_the_cost_of_a_set(tmp_path: Path) -> None:
    runs = planned("fig2", overrides=(f"recipe.root={tmp_path}", "trainer.n_gpus_per_node=4"))
    text = resources.cost([run.left for run in runs])
    h100, row = resources.GPU_TYPES[0], resources.RECIPES[4]
    low, high = resources.run_hours(resources.MODELS[0], row, h100, 4, 2000) or (0, 0)
    assert f"H100 80 GB: {resources.between(low, high)} hours of 4 GPUs" in text
    assert "disk: 150 GB for two checkpoints of each" in text  # 4 · 12 bytes · 3.09e9
    checkpoints = runs[0].folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("500")
    low, high = resources.run_hours(resources.MODELS[0], row, h100, 4, 1500) or (0, 0)
    assert f"H100 80 GB: {resources.between(low, high)} hours of 4 GPUs" in resources.cost([run.left for run in runs])
    assert "; 10 of 20 runs do not fit" in resources.cost([run.left for run in planned("countdown")])  # 7B on 24 GB
    assert resources.cost([run.left for run in planned("fig2", overrides=("scale=cpu",))]) == ""


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
    assert invoked("--all", "--status", f"recipe.root={tmp_path}")[1].endswith("0 of 74 runs are finished\n")


def test_dry_run_of_a_set() -> None:
    code, output = invoked("fig2", "--dry-run")
    assert code == 0
    assert "2 of 2 runs are valid" in output.splitlines()
    assert "H100 80 GB: 12–97 hours of 8 GPUs" in output


def test_dry_run_fails_if_a_run_does() -> None:
    code, output = invoked("fig2", "--dry-run", "trainer.n_gpus_per_node=7")
    assert code == 1
    assert "verl refuses the configuration" in output
    assert output.splitlines()[-1] == "0 of 2 runs are valid"
    # One that fails among others: only vl_norm refuses this α.
    code, output = invoked("fig2", "--dry-run", "recipe.alpha=9")
    assert code == 1
    assert "0 ≤ α ≤ 2" in output
    assert output.splitlines()[-1] == "1 of 2 runs are valid"


def test_dry_run_on_the_cpu() -> None:
    """In a process of its own: verl looks for its platform when it is imported."""
    command = [sys.executable, "-m", "vlnorm_verl", "reproduce", "fig2", "scale=cpu", "--dry-run"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "2 of 2 runs are valid"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig22"], "'fig22' is no set of runs. Did you mean 'fig2'? Accepted: countdown, math, alpha, dapo"),
        ([], "name what to reproduce: countdown"),
        (["fig2", "--seeds", "0,x"], "--seeds 0,x: give whole numbers with commas, as in 0,1,2"),
        (["fig2", "model=14b"], "model=14b: accepted are 3b, 7b"),
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


# --------------------------------------------------------------------------------------------------- a job for each run


def test_one_job_for_each_run_on_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sbatch").write_text(f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/jobs\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for file in ("countdown/train.parquet", "countdown/test.parquet"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    done = tmp_path / "dapo-countdown-3b-3072-dapo-seed1"
    done.mkdir()
    (done / "finished").write_text("1000")
    code, output = invoked(
        "fig2", "--seeds", "0,1", "--on", "slurm", f"recipe.root={tmp_path}", f"recipe.data={tmp_path}"
    )
    assert code == 0, output
    assert "3 of 3 jobs are made" in output
    jobs = (tmp_path / "jobs").read_text().splitlines()
    assert [job.split("--job-name=")[1].split()[0] for job in jobs] == [
        f"dapo-countdown-3b-3072-{name}" for name in ("dapo-seed0", "vl_norm-seed0", "vl_norm-seed1")
    ]
    assert all("--dependency=singleton" in job and f"recipe.root={tmp_path}" in job for job in jobs)


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

PRETENDS = """#!/usr/bin/env bash
echo "$@" >> {folder}/calls
case " $* " in
  *" method=dapo "*) {dapo} ;;
esac
mkdir -p {folder}/dapo-countdown-3b-3072-vl_norm-seed0
echo 1000 > {folder}/dapo-countdown-3b-3072-vl_norm-seed0/finished
"""


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in reproduce.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_pretended(monkeypatch: pytest.MonkeyPatch, folder: Path, dapo: str) -> tuple[int, str, list[str]]:
    """Run fig2 with `dapo` as what its first run does; exit code, output, and the launcher's command lines."""
    (folder / "python").write_text(PRETENDS.format(folder=folder, dapo=dapo))
    (folder / "python").chmod(0o755)
    (folder / "calls").write_text("")
    monkeypatch.setattr(reproduce.sys, "executable", str(folder / "python"))
    console = Console(record=True, width=200, file=io.StringIO())
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


def test_recipes_need_the_v1_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"verl": "0.8.0"}.get)
    with pytest.raises(UserError, match=r"the installed verl is 0\.8\.0: .* 0\.9\.0 and later"):
        recipe.compose(CONFIG, [])
