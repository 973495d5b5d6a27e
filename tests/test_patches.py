"""The patches that give verl the mode without the plugin: they apply, change nothing else, and are exact.

Covered: `patch` and `git apply` without fuzz, and back; verl's real FSDP2 engine on gloo ranks without the plugin; the
tests inside of a patch, which train BaseEngine with a linear model, critic's loss included; refused configurations on
verl's own yaml; for the newest release also verl's own modes bit for bit, and the size of the minimal patch. `slow`:
older releases, imported with the dependencies of the newest, the proposal, and the plugin beside a patched verl. Not
covered: engines that need CUDA, Ray.
"""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.releases import TOLERANCE, judge_exactness

REPOSITORY = Path(__file__).parent.parent
PATCHES = REPOSITORY / "patches"
WHEELS = REPOSITORY / ".cache" / "wheels"
NEWEST = "0.9.1"
FULL, MINIMAL, REGISTRY = (
    f"vl_norm-{NEWEST}.patch",
    f"vl_norm-{NEWEST}.minimal.patch",
    f"register_loss_agg-{NEWEST}.patch",
)
ALL = sorted(path.name for path in PATCHES.glob("*.patch"))
# vl_norm registered through the proposed registry; lengths from the mask, sums from the engine.
REGISTERED = """
import torch
from verl.utils.loss_agg import register_loss_agg

def register(name, alpha):
    @register_loss_agg(name, length_stat=lambda lengths: lengths**-alpha)
    def vl_norm(loss_mat, loss_mask, *, dp_size, loss_scale_factor, batch_stat_sum, **_):
        lengths = loss_mask.sum(-1)
        weights = torch.where(lengths > 0, lengths.clamp(min=1).to(loss_mat.dtype) ** -alpha, 0.0)
        losses = torch.where(loss_mask.bool(), loss_mat, 0.0).sum(-1)
        return (weights * losses).sum() / (batch_stat_sum or 1.0) / loss_scale_factor * dp_size

for name, alpha in {"vl_norm": 1.0, "vl_norm:0.75": 0.75, "vl_norm:0": 0.0, "vl_norm:2": 2.0}.items():
    register(name, alpha)
"""
MODE = "actor_rollout_ref.actor.loss_agg_mode=vl_norm"
SCALE = "actor_rollout_ref.actor.loss_scale_factor=${data.max_response_length}"
BYPASS = "algorithm.rollout_correction.bypass_mode=true algorithm.rollout_correction.rollout_rs=token_k1"
VERDICTS = {
    f"{MODE}:0.75 {SCALE}": r"accepted, critic vl_norm:0\.75 512",
    MODE: r"refused, .*actor\.loss_scale_factor > 0.*data\.max_response_length",
    f"{MODE}:3 {SCALE}": r"refused, .*Invalid loss_agg_mode: vl_norm:3",
    f"{MODE} {SCALE} {BYPASS}": "refused, .*rollout_rs with bypass_mode=True",
    f"{MODE} {SCALE} actor_rollout_ref.actor.policy_loss.loss_mode=sapo": "refused, .*loss_mode=sapo",
    BYPASS: "accepted, critic token-mean",
}


def release_of(name: str) -> str:
    return re.search(r"-([\d.]+?)(\.minimal)?\.patch$", name)[1]  # type: ignore[index]


def slow_but_newest(*names: str) -> list[Any]:
    """Parameters, slow for older releases and for the proposal."""
    return [pytest.param(n, marks=[] if n in (FULL, MINIMAL) else [pytest.mark.slow]) for n in names]


def apply_patch(name: str, tree: Path, *options: str) -> None:
    command = ["patch", "-p1", "--fuzz=0", "--silent", "--no-backup-if-mismatch", *options, "-i", str(PATCHES / name)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def python(tree: Path, *arguments: str, plugin: str = "none") -> subprocess.CompletedProcess[str]:
    """Python with the patched verl, without the plugin unless `auto`; it must end well."""
    return warm.python(*arguments, timeout=500, check=True, PYTHONPATH=str(tree), VERL_USE_EXTERNAL_PLUGINS=plugin)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The unpacked wheel of a release; pip fetches it once."""

    @cache
    def unpacked(version: str) -> Path:
        if not list(WHEELS.glob(f"verl-{version}-*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(WHEELS)]
            subprocess.run([*command, f"verl=={version}"], check=True)
        folder = tmp_path_factory.mktemp(version)
        with zipfile.ZipFile(next(WHEELS.glob(f"verl-{version}-*.whl"))) as wheel:
            wheel.extractall(folder)
        return folder / "verl"

    return unpacked


@pytest.fixture(scope="module")
def tree(release: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with the patched `verl` package and the tests inside of the patch."""

    @cache
    def patched(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name.removesuffix(".patch"))
        shutil.copytree(release(release_of(name)), folder / "verl")
        apply_patch(name, folder)
        test = folder / "tests/trainer/ppo/test_vl_norm_on_cpu.py"
        if name not in (MINIMAL, REGISTRY) and not test.exists():  # the newest release's is that of older ones, too
            command = ["git", "apply", "--include=tests/*", str(PATCHES / FULL)]
            subprocess.run(command, cwd=folder, check=True)
        return folder

    return patched


@pytest.fixture(scope="module")
def answers(release: Callable[[str], Path], tree: Callable[[str], Path]) -> Callable[[str], dict[str, Any]]:
    """What tests/engine/patched.py says of a patched verl without the plugin."""

    @cache
    def asked(name: str) -> dict[str, Any]:
        folder = tree(name)
        # The tests first: the registry's are also about which modes are registered.
        parts = [f"tests:{file}" for file in folder.glob("tests/trainer/ppo/test_*_on_cpu.py")]
        parts.append("exact:2")
        if release_of(name) == NEWEST:
            parts.append(f"stock:{release(NEWEST)}/trainer/ppo/core_algos.py")
        if name == MINIMAL:
            parts.append("without_sum")
        elif name == REGISTRY:
            (folder / "registered_vl_norm.py").write_text(REGISTERED)
        else:
            new_workers = " trainer.use_legacy_worker_impl=disable" if release_of(name) == "0.7.1" else ""
            parts.append("configuration:" + ";".join(line + new_workers for line in VERDICTS) + f";{MODE} {SCALE}")
        python(folder, "-m", "tests.engine.patched", str(folder / "answers.json"), *parts)
        return json.loads((folder / "answers.json").read_text())

    return asked


def texts(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def changed_lines(name: str) -> int:
    """Lines of verl that are added or removed; new files apart."""
    parts = re.split(r"^diff --git .*\n", (PATCHES / name).read_text(), flags=re.MULTILINE)[1:]
    return sum(len(re.findall(r"^[+-](?![+-]{2} )", p, re.MULTILINE)) for p in parts if not p.startswith("new file"))


# ------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", ALL)
def test_patch_is_undone_and_git_applies_it_too(name: str, release: Callable[[str], Path], tmp_path: Path) -> None:
    by_patch, by_git = tmp_path / "by_patch", tmp_path / "by_git"
    for folder in (by_patch, by_git):
        shutil.copytree(release(release_of(name)), folder / "verl")
    texts_before = texts(by_patch)
    apply_patch(name, by_patch)
    subprocess.run(["git", "init", "--quiet", str(by_git)], check=True)
    subprocess.run(["git", "apply", str(PATCHES / name)], cwd=by_git, check=True)
    shutil.rmtree(by_git / ".git")
    assert texts(by_git) == texts(by_patch) != texts_before
    for file, text in texts(by_patch).items():
        if file.endswith(".py") and text != texts_before.get(file):
            compile(text, file, "exec")  # Megatron's engine cannot be imported here
    apply_patch(name, by_patch, "-R")
    assert texts(by_patch) == texts_before


def test_patches_are_small() -> None:
    sizes = {name: changed_lines(name) for name in ALL}
    minimal = sizes.pop(MINIMAL)
    assert 10 < minimal <= 30
    assert f"{minimal} changed lines" in (PATCHES / MINIMAL).read_text()
    assert 50 < min(sizes.values()) <= max(sizes.values()) < 200, sizes


# ------------------------------------------------------------------------------------------------ without the plugin


@pytest.mark.parametrize("name", slow_but_newest(*ALL))
def test_gradients_are_the_closed_form(name: str, answers: Callable[[str], dict[str, Any]]) -> None:
    check_exact(answers(name)["exact:2"])


@pytest.mark.slow
def test_gradients_of_the_minimal_patch_on_one_and_four_ranks(tree: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "answers.json"
    python(tree(MINIMAL), "-m", "tests.engine.patched", str(out), "exact:1", "exact:4")
    for rows in json.loads(out.read_text()).values():
        check_exact(rows)


def check_exact(rows: list[dict[str, Any]]) -> None:
    assert {row["mode"] for row in rows} >= {"vl_norm", "vl_norm:0.75", "vl_norm:0"}
    assert judge_exactness(rows, TOLERANCE["float64"]).bad == []
    without_gradient = [row["metrics"] for row in rows if row["scenario"] == "micro-batches of 1"]
    for metrics in without_gradient:
        assert metrics["loss_without_gradient"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert without_gradient


@pytest.mark.parametrize("name", slow_but_newest(FULL, MINIMAL, REGISTRY))
def test_stock_modes_are_bit_identical(name: str, answers: Callable[[str], dict[str, Any]]) -> None:
    """The registry moves verl's own modes into functions of their own."""
    same = answers(name)["stock"]
    assert len(same) == 60
    assert not [case for case, equal in same.items() if not equal]


def test_minimal_patch_has_no_gradient_of_a_micro_batchs_own_sum(answers: Callable[[str], dict[str, Any]]) -> None:
    """What a loss gets to which nobody hands the sum on: the critic's, the distillation's, a user's own."""
    assert "for a gradient, the mini-batch's batch_power_sum" in answers(MINIMAL)["without_sum"]


@pytest.mark.parametrize("name", slow_but_newest(*(n for n in ALL if n not in (MINIMAL, REGISTRY))))
def test_configuration_is_checked_on_verls_own_yaml(name: str, answers: Callable[[str], dict[str, Any]]) -> None:
    """The mode and M reach the critic; what cannot be exact is refused on the driver."""
    *verdicts, old_workers = answers(name)["configuration"]
    for (line, expected), verdict in zip(VERDICTS.items(), verdicts, strict=True):
        assert re.match(expected, verdict), (line, verdict)
    if release_of(name) == "0.7.1":
        assert "needs trainer.use_legacy_worker_impl=disable, got auto" in old_workers


@pytest.mark.parametrize("name", slow_but_newest(*(n for n in ALL if n != MINIMAL)))
def test_tests_inside_of_the_patch_pass(name: str, answers: Callable[[str], dict[str, Any]]) -> None:
    status, output = answers(name)["tests"]
    assert status == 0, output
    assert int(re.search(r"(\d+) passed", output)[1]) >= 13  # type: ignore[index]


# ----------------------------------------------------------------------------------------------- with the plugin

BESIDE = """
import sys
from tests.engine import scenarios
from tests.engine.ranks import import_verl
import_verl("cpu")
import torch
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.config import FSDPActorConfig

for mode in ("vl_norm", "vl_norm:0.75", "grpo_norm"):
    FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode, loss_scale_factor=2)
    try:  # outside of a mini-batch both refuse a gradient, each in its own words
        agg_loss(torch.ones(1, 2, requires_grad=True), torch.ones(1, 2), mode, loss_scale_factor=2)
    except Exception as error:
        print(mode, "verl" if "batch_weight_sum" in str(error) or "batch_power_sum" in str(error) else "plugin")
scenarios.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [FULL, MINIMAL])
def test_plugin_leaves_the_mode_to_a_patched_verl_and_says_so(
    name: str, tree: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    arguments = ["--native", "--ranks", "1", "--dtype", "float64", "--out", str(out)]
    done = python(tree(name), "-c", BESIDE, *arguments, plugin="auto")
    assert done.stdout.splitlines()[:3] == ["vl_norm verl", "vl_norm:0.75 verl", "grpo_norm plugin"]
    assert done.stderr.count("vlnorm-verl leaves the aggregation to it") == 1
    rows = json.loads(out.read_text())
    assert all(row["error"] <= TOLERANCE["float64"] and "vl_norm/length_mean" not in row["metrics"] for row in rows)


@pytest.mark.slow
def test_plugin_beside_the_registry_answers_for_its_own_modes(tree: Callable[[str], Path]) -> None:
    """The patched losses ask the registry for the mode; the plugin's modes are not in it."""
    options = ("--ranks", "1", "--dtype", "float64", "--only", "KL loss", "critic")
    rows = warm.results("features", *options, PYTHONPATH=str(tree(REGISTRY)), VERL_USE_EXTERNAL_PLUGINS="auto")
    assert [row["row"] for row in rows] == ["KL loss", "critic", "critic, dynamic, tool masks"]
    assert all(row["kind"] == "exact" and row["error"] <= TOLERANCE["float64"] for row in rows), rows
