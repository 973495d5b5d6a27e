"""The recipes, without running one: which runs there are, what they compose to, and whether verl accepts it.

Covered: each script of recipes/ and each pair of choices, with verl's own checks and dataclasses; how choices depend on
each other; the source of each value of recipes/config; `vlnorm-verl reproduce` with a launcher that only pretends. Not
covered: each value (recipes/config says it, and whose it is), that a run trains (test_e2e.py), and what needs a GPU.
"""

import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig
from typer.testing import CliRunner

from vlnorm_verl.cli import app
from vlnorm_verl.files import UserError
from vlnorm_verl.runs import config as configs
from vlnorm_verl.runs import process, reproduce, resources
from vlnorm_verl.runs.check import unread_keys, validate
from vlnorm_verl.runs.folder import left, remember
from vlnorm_verl.runs.progress import terminal
from vlnorm_verl.runs.provenance import commented_values
from vlnorm_verl.runs.reproduce import PlannedRun

PROJECT = Path(__file__).parent.parent
RECIPES = PROJECT / "recipes"
CONFIG = RECIPES / "config"
DOCS = PROJECT / "docs"
SCALE = DOCS / "scale.md"
SOURCES = ("ours", "paper", "code")  # of a value; see recipes/config/recipe.yaml
SCRIPTS = {"countdown.sh", "math.sh", "dapo_countdown.sh", "dapo_math.sh"}


def planned(*names: str, seeds: tuple[int, ...] = (), overrides: tuple[str, ...] = ()) -> list[PlannedRun]:
    manifest = reproduce.read_manifest(RECIPES)
    sets = [run_set for name in names for run_set in manifest.find(name)]
    return reproduce.plan(RECIPES, sets, list(seeds), list(overrides))


def composed(*overrides: str) -> DictConfig:
    return configs.compose(CONFIG, list(overrides))


# ---------------------------------------------------------------------------------------------------- what verl accepts


def recipes() -> Iterator[dict[str, str]]:
    """Every combination of choices that is a recipe on GPUs."""
    for family in ("aggregation", "dapo"):
        content = yaml.safe_load((CONFIG / "family" / f"{family}.yaml").read_text())["recipe"]
        groups = [
            [family],
            ["countdown", "math"],
            content["lengths"],
            content["methods"],
            ["flash", "sdpa"],
            ["3b", "7b"],
        ]
        for choices in itertools.product(*groups):
            recipe = dict(zip(("family", "task", "length", "method", "attention", "model"), choices, strict=True))
            if recipe["attention"] == "flash" or (recipe["method"] != "dapo_norm_as_coded" and recipe["model"] != "7b"):
                yield recipe


def pairwise() -> list[list[str]]:
    """A few of them in which every pair of choices that occurs together in any occurs, as overrides."""
    left = [(set(itertools.combinations(sorted(recipe.items()), 2)), recipe) for recipe in recipes()]
    wanted = set().union(*(pairs for pairs, _ in left))
    taken = []
    while wanted:
        pairs, recipe = max(left, key=lambda entry: len(entry[0] & wanted))
        wanted -= pairs
        taken.append([f"{group}={choice}" for group, choice in recipe.items()])
    return taken


@pytest.mark.parametrize("overrides", pairwise(), ids="-".join)
def test_verl_accepts_every_pair_of_choices(overrides: list[str]) -> None:
    config = composed(*overrides)
    validate(config)
    # What `--list` and `--status` look at, without composing.
    run = PlannedRun(overrides, reproduce.outline(CONFIG, overrides))
    assert run.folder == Path(config.recipe.folder).absolute()
    assert run.outline.trainer.total_training_steps == config.trainer.total_training_steps
    assert run.name == config.trainer.experiment_name == run.folder.name


def test_m_is_the_longest_response() -> None:
    for method in ("vl_norm", "dr_grpo", "vl_norm_as_coded"):
        config = composed(f"method={method}", "data.max_response_length=5000")
        assert config.actor_rollout_ref.actor.loss_scale_factor == 5000


@pytest.mark.parametrize(("task", "alpha"), [("countdown", 1.0), ("math", 0.75)])
def test_alpha_is_the_tasks(task: str, alpha: float) -> None:
    assert composed(f"task={task}").actor_rollout_ref.actor.loss_agg_mode == f"vl_norm:{alpha}"
    assert composed(f"task={task}", "method=vl_norm_as_coded").algorithm.vl_norm_as_coded_alpha == alpha


def test_only_dr_grpo_leaves_the_standard_deviation_out() -> None:
    normed = {m: composed(f"method={m}").algorithm.norm_adv_by_std_in_grpo for m in composed().recipe.methods}
    assert [method for method, value in normed.items() if not value] == ["dr_grpo"]


def test_only_dapo_filters_groups_and_the_sampler_is_told() -> None:
    for family in ("aggregation", "dapo"):
        config = composed(f"family={family}", "length=3072")
        assert config.algorithm.filter_groups.enable == (family == "dapo")
        assert config.trainer.v1.sampler.sampler_kwargs.filter_groups.enable == (family == "dapo")


def test_no_response_of_the_paper_is_cut() -> None:
    for task, length in itertools.product(("countdown", "math"), (3072, 8192)):
        config = composed(f"task={task}", f"length={length}")
        assert config.recipe.length == str(length)
        longest = config.data.max_prompt_length + config.data.max_response_length
        assert config.actor_rollout_ref.rollout.max_model_len >= longest


# ------------------------------------------------------------------------------------------------------ the tiny model


@pytest.mark.parametrize(("length", "tokens"), [("3072", 128), ("8192", 256)])
def test_a_tiny_run_is_called_by_what_it_is(length: str, tokens: int) -> None:
    config = composed("model=tiny", f"length={length}")
    assert (config.recipe.model, config.recipe.length, config.data.max_response_length) == ("tiny", str(tokens), tokens)
    assert config.recipe.name == f"aggregation-countdown-tiny-{tokens}-vl_norm"


def test_a_tiny_run_is_the_recipe_made_small() -> None:
    """What is the method is the same; sizes, paths and what a CPU needs are not."""
    large, tiny = (configs.flatten(composed("family=dapo", "length=3072", f"model={m}")) for m in ("3b", "tiny"))
    method = ("algorithm.", "trainer.v1.trainer_mode", "actor_rollout_ref.rollout.val_kwargs")
    method += tuple(
        f"actor_rollout_ref.actor.{key}" for key in ("clip", "use_kl", "entropy_coeff", "ppo_epochs", "shuffle")
    )
    assert not [key for key in large if key.startswith(method) and large[key] != tiny[key]]
    assert tiny["actor_rollout_ref.actor.loss_agg_mode"] == large["actor_rollout_ref.actor.loss_agg_mode"]


def test_the_tiny_models_runs_of_a_set_are_made_once() -> None:
    runs = planned("countdown", overrides=("model=tiny",))  # 3b and 7b are one
    assert len(runs) == 10
    assert {run.folder.parent for run in runs} == {Path("runs/cpu").absolute()}
    assert [run.name for run in planned("fig2", overrides=("model=tiny",))] == [
        f"dapo-countdown-tiny-128-{method}-seed0" for method in ("dapo", "vl_norm")
    ]


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
    assert len(planned("all", overrides=("model=tiny",))) > 10  # 3B and 7B are one run there
    for given in ("recipe.folder=/x/y", "recipe.name=mine"):
        with pytest.raises(UserError, match="would be the folder of several runs"):
            planned("countdown", overrides=(given,))
    with pytest.raises(UserError, match="give one of them"):
        planned("fig2", seeds=(0, 1), overrides=("recipe.seed=5",))


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
    config = composed(*runs[-1].overrides)
    validate(config)  # with a whole number of micro-batches on 4 GPUs
    assert config.trainer.n_gpus_per_node == 4
    assert config.actor_rollout_ref.rollout.seed == config.data.seed == 2
    # A choice that the set makes, too: the user's wins, and what becomes the same run is one.
    assert {run.name.split("-")[2] for run in planned("countdown", overrides=("model=3b",))} == {"3b"}
    assert len(planned("countdown", overrides=("model=3b",))) == 10


# ------------------------------------------------------------------------------------------------------------- scripts


def test_every_recipe_script(tmp_path: Path) -> None:
    """What each script asks the launcher for, with the user's choices behind it; and no script is missing here."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin"}
    asked: dict[str, DictConfig] = {}
    shutil.copytree(RECIPES, tmp_path / "recipes")
    for script in RECIPES.glob("*.sh"):
        if " launch " in script.read_text() and script.name != "quickstart.sh":
            command = ["bash", str(tmp_path / "recipes" / script.name), "trainer.n_gpus_per_node=4"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            words = done.stdout.split()
            assert words[:3] == ["-m", "vlnorm_verl", "launch"]
            asked[script.name] = composed(*words[3:])
    assert asked.keys() == SCRIPTS
    for name, config in asked.items():
        family, task = ("dapo", name[5:-3]) if name.startswith("dapo_") else ("aggregation", name[:-3])
        assert (config.recipe.family, config.recipe.task) == (family, task)
        assert config.trainer.n_gpus_per_node == 4


def test_the_quickstarts_values() -> None:
    """Those with which docs/results/quickstart.md was measured."""
    words = (RECIPES / "quickstart.sh").read_text().splitlines()[-1].split()
    config = composed(*(word for word in words if "=" in word))
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (config.data.train_batch_size, rollout.n, actor.ppo_mini_batch_size) == (16, 8, 8)
    assert (actor.optim.lr, actor.shuffle, config.trainer.v1.trainer_mode) == (2e-4, True, "sync")
    assert (config.data.max_prompt_length, config.data.max_response_length) == (16, 256)
    assert (actor.loss_agg_mode, actor.clip_ratio_low, actor.clip_ratio_high) == ("vl_norm:1.0", 0.2, 0.3)
    assert (config.trainer.total_training_steps, config.trainer.test_freq, config.trainer.val_before_train) == (
        60,
        60,
        True,
    )
    assert (config.data.val_max_samples, rollout.val_kwargs.n, rollout.val_kwargs.temperature) == (-1, 8, 1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=dapo"],
            "Accepted: grpo_norm, dapo_norm, dr_grpo_norm, dr_grpo, vl_norm, dapo_norm_as_coded, vl_norm_as",
        ),
        (["family=dapo", "length=3072", "method=grpo_norm"], "dapo, overlong_filtering, soft_punishment, vl_norm"),
        (["family=dapo", "length=8192"], "family=dapo length=8192 is not accepted. Accepted: 3072"),
        (["method=vlnorm"], "Did you mean 'vl_norm'?"),
        (["length=4096"], "Accepted: 3072, 8192"),
        (["trainer.n_gpu=4"], "trainer.n_gpu"),
    ],
)
def test_what_is_no_recipe_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        configs.compose(CONFIG, overrides)


# ---------------------------------------------------------------------------------------------------------- provenance


def test_every_value_has_a_source() -> None:
    """Each of verl's keys that a recipe sets says why. Not model/tiny.yaml, which is the setting made small."""
    bare = [
        f"{file.relative_to(CONFIG)}:{line} {key}"
        for file in sorted(CONFIG.rglob("*.yaml"))
        if file.name != "tiny.yaml"
        for key, line, comment in commented_values(file)
        if not key.startswith("recipe.") and comment.partition(":")[0] not in SOURCES
    ]
    assert not bare, "two spaces, `# `, and code, paper or ours are missing behind\n" + "\n".join(bare)


def test_every_key_is_read_by_somebody() -> None:
    """Of the recipes, and of the CPU stack."""
    files = [*CONFIG.rglob("*.yaml"), *(PROJECT / "vlnorm_verl/cpu/config").glob("*.yaml")]
    keys = [key for file in files for key, _, _ in commented_values(file)]
    assert len(keys) > 170
    assert unread_keys(composed(), keys) == []


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
    assert unread_keys(composed(), [key]) == ([] if read else [key])


def generated(page: Path, command: str, content: str) -> None:
    """The page has that command's output between two marks. UPDATE_DOCS=1 writes it."""
    start, end = f"<!-- output of: {command} -->\n", "<!-- end of output -->"
    before, rest = page.read_text().split(start)
    present, after = rest.split(end, 1)
    if os.environ.get("UPDATE_DOCS"):
        page.write_text(f"{before}{start}{content}\n{end}{after}")
    else:
        assert present == content + "\n", f"{page.name} is out of date; UPDATE_DOCS=1 with this test writes it"


def values_table() -> str:
    """Every value of the recipes that has a source, ours first, as Markdown."""
    rows = []
    for file in [CONFIG / "common.yaml", *sorted(CONFIG.glob("*/*.yaml"))]:
        values = configs.flatten(yaml.safe_load(file.read_text()))
        for key, _, comment in commented_values(file):
            source, _, why = comment.partition(":")
            if source in SOURCES:
                cells = (source, f"`{key}`", f"`{values[key]}`", str(file.relative_to(CONFIG)), why.strip())
                rows.append((SOURCES.index(source), " | ".join(cell.replace("|", r"\|") for cell in cells)))
    rows.sort(key=lambda row: row[0])
    return "\n".join(
        ["| source | key | value | file | why |", "|---|---|---|---|---|", *(f"| {row} |" for _, row in rows)]
    )


def test_the_docs_have_every_value() -> None:
    content = values_table()
    for key in ("`actor_rollout_ref.actor.shuffle`", "`data.train_batch_size`", "`vl_norm:${recipe.alpha}`"):
        assert key in content
    generated(DOCS / "values.md", "UPDATE_DOCS=1 pytest tests/test_recipes.py", content)


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
    config = omega_conf_to_dataclass(composed(*overrides).actor_rollout_ref.actor.optim)
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


def test_the_docs_have_the_resources() -> None:
    generated(DOCS / "costs.md", "python -m vlnorm_verl.runs.resources", resources.tables())


def test_resources_know_the_models() -> None:
    """The dimensions give Qwen's number of parameters, and the recipes' own values are those of the composed runs."""
    for model in resources.MODELS:
        attention = 2 * model.hidden**2 + 2 * model.hidden * model.kv_heads * model.head_size
        total = model.layers * (attention + 3 * model.hidden * model.intermediate) + model.embedding_parameters
        assert total == pytest.approx(model.parameters, rel=0.002)
    assert {entry.script for entry in resources.RECIPES} == SCRIPTS
    for entry in resources.RECIPES:
        family, task = ("dapo", entry.script[5:-3]) if entry.dapo else ("aggregation", entry.script[:-3])
        config = composed(f"family={family}", f"task={task}", f"length={entry.limit}")
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
    text = resources.cost([left(run.outline) for run in runs])
    h100, row = resources.GPU_TYPES[0], resources.RECIPES[4]
    low, high = resources.run_hours(resources.MODELS[0], row, h100, 4, 2000) or (0, 0)
    assert f"H100 80 GB: {resources.between(low, high)} hours of 4 GPUs" in text
    assert "disk: 150 GB for two checkpoints of each" in text  # 4 · 12 bytes · 3.09e9
    checkpoints = runs[0].folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("500")
    low, high = resources.run_hours(resources.MODELS[0], row, h100, 4, 1500) or (0, 0)
    assert f"H100 80 GB: {resources.between(low, high)} hours of 4 GPUs" in resources.cost(
        [left(run.outline) for run in runs]
    )
    assert "; 10 of 20 runs do not fit" in resources.cost(
        [left(run.outline) for run in planned("countdown")]
    )  # 7B on 24 GB
    for without in ("model=tiny", "attention=sdpa"):
        assert resources.cost([left(run.outline) for run in planned("fig2", overrides=(without,))]) == ""
    assert resources.applies_to(["length=8192", "recipe.steps=7", "actor_rollout_ref.actor.optim.lr=1e-6"])
    assert not resources.applies_to(["length=8192", "++actor_rollout_ref.rollout.n=64"])


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
    assert invoked("all", "--status", f"recipe.root={tmp_path}")[1].endswith("0 of 74 runs are finished\n")


def test_dry_run_of_a_set() -> None:
    code, output = invoked("fig2", "--dry-run")
    assert code == 0
    assert "2 of 2 runs are valid" in output.splitlines()
    assert "H100 80 GB: 12–97 hours of 8 GPUs" in output


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
        config = configs.with_settings(composed(*run.overrides), {"recipe.folder": str(run.folder)})
        remember(config, run.folder)
        (run.folder / "finished").write_text("1000")
    assert invoked("fig2", "--dry-run", root)[0] == 0
    code, output = invoked("fig2", "--dry-run", root, "actor_rollout_ref.actor.loss_scale_factor=600")
    assert code == 1
    assert "actor_rollout_ref.actor.loss_scale_factor: 3072 there, 600 asked for" in output
    assert "recipe.root=…" in output


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
    handlers = {number: signal.getsignal(number) for number in process.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_pretended(monkeypatch: pytest.MonkeyPatch, folder: Path, dapo: str) -> tuple[int, str, list[str]]:
    """Run fig2 with `dapo` as what its first run does; exit code, output, and the launcher's command lines."""
    (folder / "python").write_text(PRETENDS.format(folder=folder, dapo=dapo))
    (folder / "python").chmod(0o755)
    (folder / "calls").write_text("")
    monkeypatch.setattr(reproduce.sys, "executable", str(folder / "python"))
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


def test_recipes_need_the_v1_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"verl": "0.8.0"}.get)
    with pytest.raises(UserError, match=r"the installed verl is 0\.8\.0: .* 0\.9\.0 and later"):
        configs.compose(CONFIG, [])
