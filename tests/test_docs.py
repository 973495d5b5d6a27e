"""README and docs: every command on them is one that its program accepts, and every page of the site leads somewhere.

A command is a line of a ```bash block, or `code` in a text that begins with the name of a program. Its arguments are
read by the program itself (typer, argparse, Hydra), which is kept from doing anything; of a shell script, bash reads
the syntax and each option must be in its text. COMMANDS says for people which test or workflow really runs it. A
command that is in no list fails.

Not covered: what a command prints, programs that are not this project's (kubectl, docker, git), and code of other
languages than the README's Python; that of docs/extending.md is run by test_plugin_install.py and
test_plugin_losses.py.
"""

import argparse
import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.core
import verl
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from typer.main import get_command
from typer.testing import CliRunner

import vlnorm_verl
from vlnorm_verl import aggregation
from vlnorm_verl.aggregation import aggregate, mini_batch_sum, response_lengths, response_weights
from vlnorm_verl.cli import app
from vlnorm_verl.plugin.names import TESTED_RELEASES
from vlnorm_verl.registry import parse_mode
from vlnorm_verl.runs import config as configs
from vlnorm_verl.runs import reproduce

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "patches/README.md", *sorted(ROOT.glob("docs/**/*.md"))]

# How a command begins: who runs it, a test or a file that has it in it.
COMMANDS = {
    "bash recipes/quickstart.sh": "tests/test_benchmarks.py::test_every_benchmark_runs",
    r"bash recipes/(dapo_)?(countdown|math)\.sh": "tests/test_e2e.py::test_the_mode_is_at_work",
    "bash recipes/reproduce.sh": "tests/test_reproduce.py::test_dry_run_of_a_set",
    "bash recipes/lab_cpu.sh": "tests/test_lab_report.py::test_the_recipe_measures_before_and_after_a_run",
    "bash recipes/install_cpu.sh": "recipes/test.sh",
    "bash recipes/install_gpu.sh": "tests/test_install.py::test_wrong_requests",
    "bash recipes/test.sh": ".github/workflows/ci.yml",
    "bash recipes/test_releases.sh": ".github/workflows/nightly.yml",
    "bash recipes/examples/own_run.sh": "tests/test_benchmarks.py::test_the_example_trains",
    "bash benchmarks/gpu/check.sh": "tests/test_gpu_check.py::test_everything_at_tiny_sizes",
    r"python benchmarks/\w+\.py": "tests/test_benchmarks.py::test_every_benchmark_runs",
    "bash benchmarks/lab/run.sh": "tests/test_lab_benchmark.py::test_the_script_measures_and_reports",
    "python -m benchmarks.study": "tests/test_study.py",
    "python -m tests.engine.scenarios": "tests/test_engine.py",
    "python -m tests.engine.other_engines": "tests/test_other_engines.py",
    "python -m vlnorm_verl.tasks.tiny.warmstart": "tests/test_tiny.py",
    "python -m sphinx": "tests/test_docs.py::test_the_site_is_built_without_a_warning",
    "python -m verl.model_merger": "tests/test_lab_models.py::test_verl_checkpoint_is_merged",
    "python -m verl.trainer.main_ppo": "tests/test_benchmarks.py::test_the_example_trains",
    "(vlnorm-verl|python -m vlnorm_verl) doctor": "tests/test_doctor.py::test_works_here_and_in_a_ray_worker",
    "vlnorm-verl data": "tests/data_command.py",
    "vlnorm-verl report": "tests/test_report.py",
    "vlnorm-verl lab": "tests/test_lab_report.py",
    r"pip install (--no-deps|\.|-e)": "tests/test_wheel.py",
    "pip install 'wrapt": "tests/test_docs.py::test_what_is_installed_beside_verl",
    'pip install "pyarrow<26"': "recipes/test_releases.sh",
    "(patch -p1|git apply)": "tests/test_patches.py::test_patch_is_undone_and_git_applies_it_too",
    "python -m pytest tests/trainer": "tests/test_patches.py::test_tests_inside_of_the_patch_pass",
}
# Words of a shell, programs of others, and what downloads 400 MB.
NOT_RUN = (
    r"(cd|source|export|cp|mkdir|eval|patches=|grep|git|kubectl|docker|pre-commit|pip show|pip install$)|"
    "bash benchmarks/gpu/prepare.sh"
)
# What stands for something of the reader's.
PLACEHOLDERS = {"METHOD": "vl_norm", "MATH500": "tests/data_samples/math500.json", "…": "", "...": ""}
PROGRAM = re.compile(r"(bash|python|pip|vlnorm-verl|git|patch|kubectl|docker|\.venv/bin/\S+|[A-Z_]+=\S+ bash) ")


def commands_of(page: Path) -> Iterator[str]:
    """Those of one page, without comments, variables before them, pipes, and the parentheses of a subshell."""
    text = page.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    lines += [text for span in spans if PROGRAM.match(text := " ".join(span.split()))]
    for line in lines:
        command = re.split(r"\s#\s|\s\\?\|\s|\s&&\s|\s[<>]\s", line.strip())[0].strip()
        command = re.sub(r"^([A-Z_]+=\S+ )+", "", command)
        if command not in ("", "(", ")") and not command.startswith("#"):
            yield command.replace(".venv/bin/", "")


@cache
def commands() -> tuple[str, ...]:
    return tuple(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


def arguments(beginning: str) -> list[list[str]]:
    """The words of each command that begins so, what stands for the reader's own filled in."""
    found = []
    for command in commands():
        if re.match(beginning, command):
            for name, value in PLACEHOLDERS.items():
                command = command.replace(name, value)
            found.append(shlex.split(command.replace("$PWD", str(ROOT))))
    assert found, beginning
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_in_a_list(page: Path) -> None:
    known = [*COMMANDS, NOT_RUN]
    unknown = [command for command in commands_of(page) if not any(re.match(begin, command) for begin in known)]
    assert not unknown, "which test runs this? Say it in COMMANDS"


# -------------------------------------------------------------------------------------------------------- vlnorm-verl


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """The parameters of each command of vlnorm-verl that would have run, in a folder with the reader's files."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(typer.core.TyperCommand, "invoke", lambda self, context: seen.append(context.params))
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("recipes").symlink_to(RECIPES)
    return seen


def with_files(words: list[str]) -> list[str]:
    """The words; a file that one names is made in the working directory, if it is not there."""
    for word in words:
        path = Path(word.partition("=")[2] or word)
        if re.fullmatch(r"(\w[\w.-]*/)*\w[\w-]*\.(parquet|jsonl?|py)", str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return words


def accepted(words: list[str]) -> None:
    result = CliRunner().invoke(app, with_files(words))
    assert result.exit_code == 0, f"vlnorm-verl {' '.join(words)}\n{result.output}"


def test_vlnorm_verl_takes_its_commands(parsed: list[dict[str, Any]]) -> None:
    for words in arguments("vlnorm-verl"):
        accepted([*words[1:], *(["--help"] if words[1:] in (["data"], ["lab"]) else [])])
    assert len(parsed) > 10


def test_no_option_or_word_is_cut_where_a_terminal_has_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    found: list[tuple[list[str], Any]] = [([], get_command(app))]
    for words, command in found:
        found += [([*words, name], sub) for name, sub in getattr(command, "commands", {}).items()]
        help_text = CliRunner().invoke(app, [*words, "--help"]).output
        assert "… │" not in help_text, words
        shown = {word for line in help_text.splitlines() if line.startswith("│") for word in line.split()}
        options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        assert not {name for name in options if name.startswith("--")} - shown, words
    assert len(found) > 10


def test_what_commands_write_is_in_no_commit_image_or_job() -> None:
    """Git and `ray job submit` go by .gitignore, docker by its own file. Names in capitals are the reader's."""
    folders = {
        out.partition("/")[0] for command in commands() for out in re.findall(r"--out (?![A-Z]+\b)(\S+)", command)
    }
    assert folders == {"data", "runs"}
    ignored = (ROOT / ".gitignore").read_text().split()
    of_docker = (RECIPES / "cluster/Dockerfile.dockerignore").read_text().split()
    for folder in {*folders, "wandb"}:  # of wandb where a run starts
        assert f"/{folder}/" in ignored
        assert folder in of_docker


@pytest.mark.parametrize("script", [s.stem for s in sorted(RECIPES.glob("*.sh")) if "verl launch " in s.read_text()])
def test_recipes_compose(script: str, parsed: list[dict[str, Any]]) -> None:
    """Each command, and the script by itself; choices and keys as Hydra and verl know them."""
    own = (RECIPES / f"{script}.sh").read_text().splitlines()[-1].partition("vlnorm_verl ")[2].split()[:-1]
    for words in [["bash", f"recipes/{script}.sh"], *arguments("bash recipes")]:
        if words[1] == f"recipes/{script}.sh":
            accepted([*own, *words[2:]])
    config = configs.compose(RECIPES / "config", parsed[0]["overrides"])  # each command's own takes long
    for overrides in (found["overrides"] for found in parsed):
        chosen = configs.choices(RECIPES / "config", overrides)
        outlined = reproduce.outline(RECIPES / "config", overrides).recipe
        assert chosen["method"] in outlined.methods, overrides
        assert chosen["length"] in outlined.lengths, overrides
        keys = {text.partition("=")[0] for text in overrides}
        assert all("." not in key or OmegaConf.select(config, key) is not None for key in keys), overrides


def test_sets_of_runs_are_known(parsed: list[dict[str, Any]]) -> None:
    manifest = reproduce.read_manifest(RECIPES)
    for words in arguments(r"bash recipes/reproduce\.sh"):
        accepted(["reproduce", *words[2:]])
        what = parsed.pop()["what"] or []
        for word in what:
            assert configs.parsed([word]) if "=" in word else manifest.find(word)


# ------------------------------------------------------------------------------------------ other programs of our own


def test_programs_take_their_arguments(monkeypatch: pytest.MonkeyPatch, parsed: list[dict[str, Any]]) -> None:
    """Each is run up to where it has read its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self: argparse.ArgumentParser, *given: Any) -> None:
        parsed.append(vars(parse(self, *given)))
        sys.exit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    begin = r"python (benchmarks/|-m (benchmarks\.|tests\.|vlnorm_verl\.tasks\.|verl\.model_merger))"
    programs = [words[1:] for words in arguments(begin)]
    programs += [["benchmarks/gpu/check.py", *words[2:]] for words in arguments("bash benchmarks/gpu/check.sh")]
    for words in programs:
        run, name = (runpy.run_module, words[1]) if words[0] == "-m" else (runpy.run_path, words[0])
        monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        with pytest.raises(SystemExit) as end:
            run(name, run_name="__main__")
        assert not end.value.code, words
    assert len(parsed) == len(programs)


@pytest.mark.parametrize("script", sorted(ROOT.glob("recipes/**/*.sh")) + sorted(ROOT.glob("benchmarks/**/*.sh")))
def test_scripts_know_the_options_of_their_commands(script: Path) -> None:
    """Those that hand all on to Python are checked above."""
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    name = script.relative_to(ROOT)
    for command in commands() if '"$@"' not in text.splitlines()[-1] else ():
        if command.startswith(f"bash {name} "):
            unknown = [
                word for word in command.split()[2:] if word.startswith("--") and not re.search(rf"{word}\b", text)
            ]
            assert not unknown, command


# ------------------------------------------------------------------------------------------------------- verl's trainer


CONFIGS = ("cpu", "own_run", "ppo_trainer")


def composed(words: list[str]) -> Any:
    """What verl's main_ppo would be given."""
    options = [word for word in words if word.startswith("--") or Path(word).is_dir() or word in CONFIGS]
    pairs = dict(zip(options[::2], options[1::2], strict=True))
    folder = pairs.get("--config-path") or str(ROOT / "vlnorm_verl/cpu/config")
    with initialize_config_dir(folder, version_base=None):
        overrides = [word for word in words if word and word not in options]
        return hydra_compose(pairs.get("--config-name", "cpu"), overrides)


def test_what_is_installed_beside_verl() -> None:
    """Both pages name it; torch and omegaconf come with verl."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {text for text in project["dependencies"] if not re.match("verl|torch|omegaconf", text)}
    (command,) = arguments("pip install 'wrapt")
    assert {*command[2:]} == needed


def test_verl_takes_its_commands() -> None:
    modes = [composed(words[3:]).actor_rollout_ref.actor.loss_agg_mode for words in arguments("python -m verl.trainer")]
    assert set(modes) == {"vl_norm", "vl_norm:0.75"}


def test_the_examples_are_one_run() -> None:
    script = (RECIPES / "examples/own_run.sh").read_text().partition("main_ppo")[2]
    for name, value in {"`# CPU`": "", '"$@"': "", "$PWD": str(ROOT), "\\\n": ""}.items():
        script = script.replace(name, value)
    by_keys = composed(shlex.split(script))
    assert by_keys == composed(["--config-path", f"{RECIPES}/examples", "--config-name", "own_run"])
    assert by_keys.actor_rollout_ref.actor.loss_agg_mode == "vl_norm"


def test_the_example_is_a_run_on_gpus_without_its_lines_for_the_cpu() -> None:
    _, *lines = (RECIPES / "examples/own_run.sh").read_text().partition("main_ppo")[2].splitlines()
    words = [word for line in lines if "CPU" not in line for word in shlex.split(line.strip(" \\").replace('"$@"', ""))]
    folder = str(Path(verl.__file__).parent / "trainer/config")
    config = composed(["--config-path", folder, "--config-name", "ppo_trainer", *words])
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (rollout.name, rollout.tensor_model_parallel_size, list(config.trainer.logger)) == ("vllm", 1, ["console"])
    # What verl refuses otherwise, after minutes, in a worker: on 8 GPUs, the number that its configuration has.
    ranks = config.trainer.n_gpus_per_node
    assert config.data.train_batch_size * rollout.n % (ranks * rollout.log_prob_micro_batch_size_per_gpu) == 0
    assert actor.ppo_mini_batch_size * rollout.n % (ranks * actor.ppo_micro_batch_size_per_gpu) == 0


# ----------------------------------------------------------------------------------------------------- README and site


def test_the_code_of_the_readme_is_the_loss() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    generator = torch.Generator().manual_seed(0)
    names = {
        "torch": torch,
        "token_losses": torch.randn(5, 7, generator=generator, dtype=torch.float64),
        "response_mask": torch.arange(7) < torch.tensor([[3], [7], [0], [1], [5]]),
        "alpha": 0.75,
        "M": 7.0,
    }
    exec(code, names)
    method = parse_mode("vl_norm:0.75")
    total = mini_batch_sum(method, response_lengths(names["response_mask"]))
    expected = aggregate(names["token_losses"], names["response_mask"], method, total, 7.0)
    torch.testing.assert_close(names["loss"], expected, rtol=1e-12, atol=0)


def test_the_maths_works_in_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/api.md has it: two files are copied."""
    package = tmp_path / "copied_maths"
    package.mkdir()
    for name in ("aggregation.py", "registry.py"):
        shutil.copy(ROOT / "vlnorm_verl" / name, package)
    monkeypatch.syspath_prepend(tmp_path)
    registry = importlib.import_module("copied_maths.registry")
    assert type(registry.parse_mode("vl_norm:0.75")).__module__ == "copied_maths.aggregation"


def test_the_loop_for_another_trainer_adds_up_to_the_loss() -> None:
    """On one of two ranks. The other has no response: a collective of torch's fake group changes nothing."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/api.md").read_text(), re.M | re.S)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        group = torch.distributed.group.WORLD
        mask = torch.arange(7) < torch.tensor([[3], [7], [1], [5]])
        losses = torch.ones(4, 7, dtype=torch.float64, requires_grad=True)
        micro_batches = [*zip(losses.split((3, 1)), mask.split((3, 1)), strict=True)]
        names = {**vars(aggregation), "torch": torch, "parse_mode": parse_mode, "M": 7.0}
        exec(code, names | {"group": group, "averaged": 2, "micro_batches": micro_batches})
    finally:
        torch.distributed.destroy_process_group()
    lengths, method = response_lengths(mask), parse_mode("vl_norm:0.75")
    weights = response_weights(method, lengths, mini_batch_sum(method, lengths), 7.0)
    torch.testing.assert_close(losses.grad / 2, weights[:, None] * mask, rtol=1e-12, atol=0)


def test_the_links_of_the_readme_lead_to_files_and_headings() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\((?!https://)([^)\s]+)\)", page.read_text()):
            file, _, anchor = link.partition("#")
            assert (ROOT / file).exists(), link
            assert not anchor or anchor in anchors(ROOT / file), link


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Sphinx follows every link, to anchors and source files too, and misses no page."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "0"})
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path).with_suffix(".md") for path in tmp_path.rglob("*.html")}
    assert {page.relative_to(ROOT / "docs") for page in ROOT.glob("docs/**/*.md")} <= built


def test_the_limit_of_a_collective() -> None:
    """verl gives torch a backend for each device, and no limit (utils/distributed.py:88): torch's is not NCCL's."""
    minutes = distributed_c10d._get_default_timeout(torch.distributed.Backend("cpu:gloo,cuda:nccl")).seconds / 60
    assert f"| a collective ends after {minutes:g} minutes |" in (ROOT / "docs" / "gpu.md").read_text()


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == vlnorm_verl.__version__
    assert f"\n## {vlnorm_verl.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    for file in ("recipes/cluster/Dockerfile", "recipes/cluster/rayjob.yaml", "docs/clusters.md"):
        assert f"registry.example.com/vlnorm-verl:{vlnorm_verl.__version__}" in (ROOT / file).read_text()


def test_one_list_of_releases_everywhere() -> None:
    also = re.findall(r"^  \[(.*)\]=", (RECIPES / "test_releases.sh").read_text(), re.M)
    assert tuple(also) == TESTED_RELEASES
    for page in (ROOT / "README.md", ROOT / "docs/support.md"):
        assert f" verl {', '.join(also[:-1])} and {also[-1]}" in " ".join(page.read_text().split()), page
