"""The recipes, without running one: what they compose to, and whether verl accepts it.

Covered: each script of recipes/ and each pair of choices, with verl's own checks and dataclasses; how choices depend on
each other; the source of each value of recipes/config; memory, time and disk. Not covered: sets of runs
(test_reproduce.py), each value (recipes/config says it, and whose it is), that a run trains (test_e2e.py), and what
needs a GPU.
"""

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig

from tests import processes
from vlnorm_verl.files import UserError
from vlnorm_verl.runs import config as configs
from vlnorm_verl.runs import reproduce, resources
from vlnorm_verl.runs.check import unread_keys, validate
from vlnorm_verl.runs.provenance import commented_values
from vlnorm_verl.runs.reproduce import PlannedRun

PROJECT = Path(__file__).parent.parent
RECIPES = PROJECT / "recipes"
CONFIG = RECIPES / "config"
DOCS = PROJECT / "docs"
SCALE = DOCS / "scale.md"
SOURCES = ("ours", "paper", "code")  # of a value; see recipes/config/recipe.yaml
SCRIPTS = {"countdown.sh", "math.sh", "dapo_countdown.sh", "dapo_math.sh"}


def composed(*overrides: str) -> DictConfig:
    return configs.compose(CONFIG, list(overrides))


# ---------------------------------------------------------------------------------------------------- what verl accepts


def recipes() -> Iterator[dict[str, str]]:
    """Every combination of choices that is a recipe on GPUs."""
    for family in sorted({path.stem for path in CONFIG.glob("family/*.yaml")} - {"quickstart"}):
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
    validate(config)  # no response is cut, for one
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


# ------------------------------------------------------------------------------------------------------------- scripts


def test_every_recipe_script(tmp_path: Path) -> None:
    """What each script asks the launcher for, with the user's choices behind it; and no script is missing here."""
    processes.script(tmp_path / ".venv" / "bin" / "python", '[ "$1" = -c ] || printf "%s\\n" "$@"')
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
        ("reward.custom_reward_function.reward_kwargs.judge_url", True),  # the user's reward's
        ("data.apply_chat_template_kwargs.thinking_budget", True),  # the tokenizer's
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
    generated(DOCS / "values.md", "UPDATE_DOCS=1 pytest tests/test_recipes.py", values_table())


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
    assert [resources.remedy(three, row, rtx, 8) for row in (short, long)] == [("micro 2", 2), ("micro 1", 1)]
    assert resources.remedy(seven, short, rtx, 8) is None
    assert resources.remedy(seven, short, a100_40, 4) is None
    assert resources.remedy(seven, long, h100, 4) == ("yes", 4)
    # 40 micro-batches a step: seconds on NVLink, over a minute on PCIe
    nvlink, pcie = (resources.link_seconds(three, long, 8, 4, link[1]) for link in (h100.link, rtx.link))
    assert nvlink < 6
    assert pcie > 60


def test_recipes_need_the_v1_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.__version__", "0.8.0")
    with pytest.raises(UserError, match=r"the installed verl is 0\.8\.0: .* 0\.9\.0 and later"):
        configs.compose(CONFIG, [])
