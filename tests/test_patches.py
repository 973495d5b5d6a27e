"""The patches that give verl the mode without the plugin: they apply, are what the script makes, and are exact.

Covered, for every release that has a patch: `patch` and `git apply` without fuzz and back, remaking, verl's real FSDP2
engine on two gloo ranks without the plugin (tests/engine/scenarios.py --native), the tests inside of the patch (which
train BaseEngine with a linear model, critic's loss included), refused configurations on verl's own yaml (`slow` but for
the newest). For the newest also verl's own modes bit for bit, and the plugin beside either patch. Older releases are
imported with the dependencies of the newest. Not covered: engines that need CUDA, Ray.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parent.parent
PATCHES = REPOSITORY / "patches"
TOLERANCE = 1e-12
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


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_patches", PATCHES / "make_patches.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["make_patches"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_patches = load_script()
RELEASE = {name: release for name, release, *_ in make_patches.patches()}
REGISTRY = "register_loss_agg-0.9.1.patch"
Runs = dict[tuple[str, str], Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The unpacked wheel of every release."""
    folder = tmp_path_factory.mktemp("releases")
    return {release: make_patches.fetch(release, folder / release) for release in make_patches.RELEASES}


@pytest.fixture(scope="module")
def trees(releases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Patch name -> folder with the patched `verl` package and the tests inside of the patch."""
    trees = {}
    for name, release in RELEASE.items():
        trees[name] = tree = tmp_path_factory.mktemp(name.removesuffix(".patch"))
        shutil.copytree(releases[release] / "verl", tree / "verl")
        apply_patch(name, tree)
    return trees


def apply_patch(name: str, tree: Path, *options: str) -> None:
    command = ["patch", "-p1", "--fuzz=0", "--silent", "--no-backup-if-mismatch", *options, "-i", str(PATCHES / name)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def python(tree: Path, *arguments: str, plugin: str = "none") -> subprocess.CompletedProcess[str]:
    """Python with the patched verl, without the plugin unless `auto`, and without the CPU platform of the package."""
    inherited = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}
    variables = {"VERL_USE_EXTERNAL_PLUGINS": plugin, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, trees: dict[str, Path]) -> Iterator[Runs]:
    """By test and patch, the two programs that take longest: one of each at a time, beside other tests."""
    programs = {
        "test_gradients_are_the_closed_form_without_the_plugin": exactness,
        "test_own_tests_pass": own_tests,
    }
    selected = {item.name for item in request.session.items}
    runs: Runs = {}
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for (test, program), pool in zip(programs.items(), (first, second), strict=True):
            for name in RELEASE:
                if f"{test}[{name}]" in selected:
                    runs[test, name] = pool.submit(program, name, trees[name])
        yield runs
        first.shutdown(cancel_futures=True)
        second.shutdown(cancel_futures=True)


def exactness(name: str, tree: Path) -> subprocess.CompletedProcess[str]:
    out = str(tree / "results.json")
    arguments = ["-m", "tests.engine.scenarios", "--native", "--ranks", "2", "--dtype", "float64", "--out", out]
    if name == REGISTRY:
        (tree / "registered_vl_norm.py").write_text(REGISTERED)
        arguments += ["--load", "registered_vl_norm"]
    return python(tree, *arguments)


def own_tests(name: str, tree: Path) -> subprocess.CompletedProcess[str]:
    (tests,) = tree.glob("tests/trainer/ppo/test_*_on_cpu.py")
    return python(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tree), str(tests))


def texts(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------------- the files


def test_every_patch_is_what_the_script_makes(releases: dict[str, Path]) -> None:
    assert {path.name for path in PATCHES.glob("*.patch")} == set(RELEASE)
    for name, release in RELEASE.items():
        assert make_patches.make(name, releases[release]) == (PATCHES / name).read_text(encoding="utf-8"), name


def test_check_tells_a_patch_that_was_edited_by_hand(releases: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(PATCHES, tmp_path / "patches")
    command = [sys.executable, str(folder / "make_patches.py"), "--check", "--release", "0.9.1"]
    command += ["--source", str(releases["0.9.1"])]
    assert subprocess.run(command).returncode == 0
    edited = folder / "vl_norm-0.9.1.patch"
    edited.write_text(edited.read_text(encoding="utf-8").replace("ALPHA_MAX = 2.0", "ALPHA_MAX = 3.0"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "vl_norm-0.9.1.patch is not what make_patches.py makes" in done.stderr


def test_anchor_that_is_gone_or_not_unique_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "verl" / "some.py"
    file.parent.mkdir()
    edit = make_patches.after("verl/some.py", "anchor\n", "new\n")
    for text, count in (("other\n", 0), ("anchor\nanchor\n", 2)):
        file.write_text(text)
        with pytest.raises(
            make_patches.AnchorError, match=rf"verl/some\.py of verl 0\.9\.1.*found {count} times:\nanch"
        ):
            make_patches.apply_edits(tmp_path, [edit], "0.9.1")
    file.write_text("anchor\n")
    assert make_patches.apply_edits(tmp_path, [edit], "0.9.1") == {"verl/some.py": ("anchor\n", "anchor\nnew\n")}


@pytest.mark.parametrize("name", RELEASE)
def test_patch_is_undone_and_git_applies_it_too(name: str, releases: dict[str, Path], tmp_path: Path) -> None:
    original, patched = releases[RELEASE[name]] / "verl", tmp_path / "by_patch"
    texts_before = texts(original)
    shutil.copytree(original, patched / "verl")
    apply_patch(name, patched)
    by_git = tmp_path / "by_git"
    shutil.copytree(original, by_git / "verl")
    subprocess.run(["git", "init", "--quiet", str(by_git)], check=True)
    subprocess.run(["git", "apply", str(PATCHES / name)], cwd=by_git, check=True)
    assert texts(by_git / "verl") == texts(patched / "verl") != texts_before
    for file, text in texts(patched / "verl").items():
        if file.endswith(".py") and text != texts_before.get(file):
            compile(text, file, "exec")  # Megatron's engine cannot be imported here
    apply_patch(name, patched, "-R")
    assert texts(patched / "verl") == texts_before


def test_patches_are_small(releases: dict[str, Path]) -> None:
    """Lines of verl that change; new files apart."""
    for name, release in RELEASE.items():
        edits = next(edits for patch, _, edits, _ in make_patches.patches() if patch == name)
        diff = make_patches.unified_diff(make_patches.apply_edits(releases[release], edits, release))
        changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
        assert len(changed) < 200, (name, len(changed))


# ------------------------------------------------------------------------------------------------- verl's own modes

# Both agg_loss in one process: the second is the stock file of the same release.
COMPARE = """
import importlib.util, itertools, sys, torch
from verl.trainer.ppo.core_algos import agg_loss
spec = importlib.util.spec_from_file_location("stock", sys.argv[1])
stock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stock)
assert agg_loss.__code__ != stock.agg_loss.__code__
generator = torch.Generator().manual_seed(0)
lengths = torch.tensor([3, 0, 17, 5, 1, 9])
mask = torch.arange(17) < lengths[:, None]
modes = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
given = [{}, {"batch_num_tokens": 99, "global_batch_size": 13}]
given.append(given[1] | {"dp_size": 3, "loss_scale_factor": 48})
for dtype, mask_type, mode, info in itertools.product(
    (torch.float32, torch.bfloat16), (torch.bool, torch.int64), modes, given
):
    loss_mat = torch.randn(6, 17, generator=generator).to(dtype)
    values = []
    for function in (agg_loss, stock.agg_loss):
        leaf = loss_mat.clone().requires_grad_()
        loss = function(leaf, mask.to(mask_type), mode, **info)
        loss.backward()
        values.append((loss.detach(), leaf.grad))
    same = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(*values))
    print("same" if same else "different", mode, dtype, mask_type, info)
"""


@pytest.mark.parametrize("name", ["vl_norm-0.9.1.patch", REGISTRY])
@pytest.mark.usefixtures("runs")  # these start meanwhile
def test_stock_modes_are_bit_identical(name: str, trees: dict[str, Path], releases: dict[str, Path]) -> None:
    """Of the newest release; the registry moves verl's own modes into functions of their own."""
    done = python(trees[name], "-c", COMPARE, str(releases["0.9.1"] / "verl/trainer/ppo/core_algos.py"))
    lines = [line for line in done.stdout.splitlines() if line.startswith(("same", "different"))]
    assert len(lines) == 60, done.stderr[-2000:]
    assert not [line for line in lines if not line.startswith("same")]


# ---------------------------------------------------------------------------------------------------- configuration

VALIDATE = """
import sys
from pathlib import Path
import hydra, verl
from verl.utils.config import validate_config
from verl.workers.config import CriticConfig
folder = str(Path(verl.__file__).parent / "trainer" / "config")
common = ["trainer.n_gpus_per_node=1", "data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4",
          "actor_rollout_ref.actor.use_dynamic_bsz=true", *sys.argv[1].split()]
for line in sys.argv[2:]:
    with hydra.initialize_config_dir(folder, version_base=None):
        config = hydra.compose("ppo_trainer", [*common, *line.split()])
    try:
        validate_config(config, use_reference_policy=False, use_critic=False)
        print(f"accepted, critic {config.critic.get('loss_agg_mode')} {config.critic.get('loss_scale_factor')}")
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        print(f"refused, {type(error).__name__}: {error}".replace(chr(10), " "))
"""
MODE = "actor_rollout_ref.actor.loss_agg_mode=vl_norm"
SCALE = "actor_rollout_ref.actor.loss_scale_factor=${data.max_response_length}"
BYPASS = "algorithm.rollout_correction.bypass_mode=true algorithm.rollout_correction.rollout_rs=token_k1"


@pytest.mark.parametrize(
    "release", [*(pytest.param(r, marks=pytest.mark.slow) for r in make_patches.RELEASES[:-1]), make_patches.NEWEST]
)
def test_configuration_is_checked_on_verls_own_yaml(release: str, trees: dict[str, Path]) -> None:
    """The mode and M reach the critic; what cannot be exact is refused on the driver."""
    legacy = "trainer.use_legacy_worker_impl=disable" if release == "0.7.1" else ""
    cases = [
        (f"{MODE}:0.75 {SCALE} {legacy}", r"accepted, critic vl_norm:0\.75 512"),
        (f"{MODE} {legacy}", r"refused, .*actor\.loss_scale_factor > 0.*data\.max_response_length"),
        (f"{MODE}:3 {SCALE} {legacy}", r"refused, .*Invalid loss_agg_mode: vl_norm:3"),
        (f"{MODE} {SCALE} {BYPASS} {legacy}", "refused, .*rollout_rs with bypass_mode=True"),
        (f"{MODE} {SCALE} actor_rollout_ref.actor.policy_loss.loss_mode=sapo {legacy}", "refused, .*loss_mode=sapo"),
        (f"{BYPASS} {legacy}", "accepted, critic token-mean"),
    ]
    if release == "0.7.1":
        cases.append((f"{MODE} {SCALE}", "refused, .*needs trainer.use_legacy_worker_impl=disable, got auto"))
    done = python(trees[f"vl_norm-{release}.patch"], "-c", VALIDATE, "", *(line for line, _ in cases))
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("accepted", "refused"))]
    assert len(verdicts) == len(cases), done.stderr[-2000:]
    for (line, expected), verdict in zip(cases, verdicts, strict=True):
        assert re.match(expected, verdict), (line, verdict)


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", RELEASE)
def test_gradients_are_the_closed_form_without_the_plugin(name: str, runs: Runs, trees: dict[str, Path]) -> None:
    done = runs["test_gradients_are_the_closed_form_without_the_plugin", name].result()
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((trees[name] / "results.json").read_text())
    assert {row["mode"] for row in rows} >= {"vl_norm", "vl_norm:0.75", "vl_norm:0"}
    wrong = [(row["scenario"], row["mode"], row["error"]) for row in rows if not row["error"] <= TOLERANCE]
    assert not wrong
    assert all(row["norm"] > 1e-3 for row in rows if not row["scenario"].startswith("no valid token"))


@pytest.mark.parametrize("name", RELEASE)
def test_own_tests_pass(name: str, runs: Runs) -> None:
    """The test file inside of the patch."""
    done = runs["test_own_tests_pass", name].result()
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 13  # type: ignore[index]


# ----------------------------------------------------------------------------------------------- with the plugin

BOTH = """
import logging, torch, verl
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.config import FSDPActorConfig
from vlnorm_verl import plugin

for mode in ("vl_norm", "vl_norm:0.75", "grpo_norm"):
    FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode, loss_scale_factor=2)
    print(mode, "plugin" if plugin.is_ours(mode) else "verl")
one = torch.ones(1, 2)
print(agg_loss(one, one, "vl_norm", loss_scale_factor=2).item())
"""


def test_plugin_leaves_the_mode_to_a_patched_verl_and_says_so(trees: dict[str, Path], tmp_path: Path) -> None:
    tree = trees["vl_norm-0.9.1.patch"]
    done = python(tree, "-c", BOTH, plugin="auto")
    # The plugin's own aggregation would refuse the last call: it is outside of a mini-batch. x = 1/M, times two tokens.
    assert done.stdout.splitlines() == ["vl_norm verl", "vl_norm:0.75 verl", "grpo_norm plugin", "1.0"], done.stderr
    assert done.stderr.count("vlnorm-verl leaves the aggregation to it") == 1

    out = tmp_path / "results.json"
    arguments = ["-m", "tests.engine.scenarios", "--native", "--ranks", "1", "--dtype", "float64", "--out", str(out)]
    done = python(tree, *arguments, plugin="auto")
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(out.read_text())
    assert all(row["error"] <= TOLERANCE and "vl_norm/length_mean" not in row["metrics"] for row in rows)


def test_plugin_beside_the_registry_answers_for_its_own_modes(trees: dict[str, Path], tmp_path: Path) -> None:
    """The patched losses ask the registry for the mode; the plugin's modes are not in it."""
    out = tmp_path / "results.json"
    arguments = ["-m", "tests.engine.features", "--ranks", "1", "--dtype", "float64", "--out", str(out)]
    done = python(trees[REGISTRY], *arguments, "--only", "KL loss", "critic", plugin="auto")
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(out.read_text())
    assert [row["row"] for row in rows] == ["KL loss", "critic", "critic, dynamic, tool masks"]
    assert all(row["kind"] == "exact" and row["error"] <= TOLERANCE for row in rows), rows
