"""The wheel and the sdist: what is in them, and what they do in an empty environment.

Needs the package index: build, twine and the closure of the base dependencies are installed, torch as its CPU build.
Not covered: other Pythons than the one that runs the tests.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PACKAGED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "vlnorm_verl", "recipes")
TEMPTING = ("tests", "docs", "patches", "benchmarks")  # are not to be packaged
INSTALL = """
set -euo pipefail
target=$1
source recipes/installer.sh
shift
install_cpu_torch
install "$cpu_torch" "$@"
"""
MODES = """
import sys
import verl
from verl.workers.config import FSDPActorConfig

for mode in ("vl_norm:0.75", "vl_nrom"):
    try:
        FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode, loss_scale_factor=512)
        print(mode, "accepted")
    except ValueError as error:
        print(mode, "refused:", error)
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def run(*command: str | Path, cwd: Path = PROJECT, status: int = 0) -> str:
    """Standard output and error of a command that ends with that status, without this checkout on any path."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VERL_PLATFORM")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == status, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist by suffix, as an index has them; "tree": the wheel that pip builds in a checkout."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in (*PACKAGED, *TEMPTING):
        path = PROJECT / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(path, source)
    run(sys.executable, "-m", "venv", folder / "tools")
    run(folder / "tools/bin/pip", "install", "--quiet", "build", "twine")
    run(folder / "tools/bin/python", "-m", "build", "--outdir", folder / "dist", source)
    files = {path.suffix: path for path in (folder / "dist").iterdir()}
    assert set(files) == {".whl", ".gz"}
    run(folder / "tools/bin/twine", "check", "--strict", *files.values())
    removed = source / "build/lib/vlnorm_verl/removed.py"  # is left of a build of an earlier version
    removed.parent.mkdir(parents=True)
    removed.touch()
    run(folder / "tools/bin/python", "-m", "build", "--wheel", "--outdir", folder / "tree", source)
    (tree,) = (folder / "tree").iterdir()
    return files | {"tree": tree}


@pytest.fixture(scope="module")
def environment(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and its base dependencies only."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    run("bash", "-c", INSTALL, "bash", folder, built[".whl"])
    return folder


def package_files() -> set[str]:
    """Of the package, as git knows them, and the recipes' files that it takes with it."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "vlnorm_verl", "recipes").splitlines()
    files = {name for name in listed if name.startswith("vlnorm_verl/") and name != "vlnorm_verl/recipes"}
    others = ("recipes/cluster/rayjob.yaml", "recipes/manifest.yaml", "recipes/examples/own_run.yaml")
    return files | {f"vlnorm_verl/{n}" for n in listed if n.startswith("recipes/config/") or n in others}


@pytest.mark.parametrize("wheel", [".whl", "tree"])
def test_the_wheel_holds_the_package_and_the_recipes_values_and_nothing_else(
    built: dict[str, Path], wheel: str
) -> None:
    names = set(zipfile.ZipFile(built[wheel]).namelist())
    assert {name for name in names if ".dist-info/" not in name} == package_files()


def test_the_sdist_holds_what_the_wheel_is_built_from_and_nothing_else(built: dict[str, Path]) -> None:
    with tarfile.open(built[".gz"]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    written = {"PKG-INFO", "setup.cfg"}
    kept = {name for name in names if not name.startswith("vlnorm_verl.egg-info/")} - written
    assert kept == package_files() | {name for name in PACKAGED if (PROJECT / name).is_file()}


def test_verl_finds_the_mode_in_an_environment_of_base_dependencies(environment: Path, tmp_path: Path) -> None:
    said = run(environment / "bin/python", "-c", MODES, cwd=tmp_path)
    assert "vl_norm:0.75 accepted" in said
    assert "vl_nrom refused: Invalid loss_agg_mode" in said
    assert "--no-ray" in run(environment / "bin/vlnorm-verl", "doctor", "--help", cwd=tmp_path)
    run(environment / "bin/vlnorm-verl", "doctor", "--no-ray", cwd=tmp_path)


def test_a_run_is_composed_from_the_recipes_of_the_wheel(
    environment: Path, built: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ("launch", "--dry-run", "model=3b", "task=countdown", "method=vl_norm")
    command = (environment / "bin/vlnorm-verl", *arguments)
    assert "pip install '.[recipes]'" in run(*command, cwd=tmp_path, status=2)
    run("bash", "-c", INSTALL, "bash", environment, f"vlnorm-verl[recipes] @ {built['.whl'].as_uri()}")
    said = run(*command, cwd=tmp_path)
    assert "actor_rollout_ref.actor.loss_agg_mode" in said
    assert f"{environment}/lib" in said
    assert "vlnorm_verl/recipes/config" in said
