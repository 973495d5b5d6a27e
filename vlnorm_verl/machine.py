"""What a Python environment and a machine lack for a run on GPUs, or on the CPU, each with what mends it.

Only the standard library, but for `flash_attention_problem` (torch), `cpus` (Ray), `free_memory` (Ray, psutil),
`verl_problem`. So recipes/install_gpu.sh can run this file before anything is installed, and the launcher in
environments other than its own.

    python vlnorm_verl/machine.py driver         in words; exit code 1 if the driver is too old for the wheels
    python vlnorm_verl/machine.py environment    the versions that decide between CPU and GPU, as JSON

Covered: this machine, NVIDIA. Not covered: other nodes of a cluster, AMD, how fast disk and network are.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

INSTALL_GPU = "bash recipes/install_gpu.sh"
INSTALL_CPU = "bash recipes/install_cpu.sh"
OWN_RUN = "For AMD GPUs there is vl_norm in a run of your own (docs/your-own-run.md)"
ENVIRONMENTS = (".venv-gpu", ".venv")  # made by the two scripts, in the project's folder
WHEELS_CUDA = "13.0"  # of torch and vllm in recipes/requirements-gpu.txt
# NVIDIA's first driver for Linux with each major version of CUDA; within one, a driver runs newer minor versions too.
FIRST_DRIVER = {12: "525.60", 13: "580.65"}
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Defect:
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what}. {self.mend}"


# ---------------------------------------------------------------------------------------------------- environments


@dataclass(frozen=True)
class Environment:
    """A Python environment: versions of what decides between CPU and GPU, "" for what is not there."""

    python: str
    prefix: str
    verl: str
    torch: str
    cuda: str  # of torch's build
    vllm: str
    vllm_cpu: str
    hip: str = ""  # of torch's build, for AMD GPUs

    def __str__(self) -> str:
        torch = f"torch {self.torch} " + (f"for CUDA {self.cuda}" if self.cuda else "without CUDA")
        return f"{self.prefix} ({torch if self.torch else 'no torch'}, vllm {self.vllm or self.vllm_cpu or '-'})"

    def lacks(self, on_cpu: bool) -> list[str]:
        """Why a run cannot use it; nothing if it can."""
        if not self.torch or not self.verl:
            return ["has no verl" if self.torch else "has no torch"]
        if on_cpu:
            return [] if self.vllm_cpu else ["has no vLLM for CPUs"]
        if self.hip:
            return [f"has torch {self.torch}, which is for AMD GPUs, and the recipes are for NVIDIA's"]
        reasons = [] if self.cuda else [f"has torch {self.torch}, which is built without CUDA"]
        if self.vllm_cpu:
            reasons.append(f"has vllm-cpu {self.vllm_cpu}, whose files lie where vllm's belong")
        elif not self.vllm:
            reasons.append("has no vllm")
        return reasons


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def this_environment() -> Environment:
    built: dict[str, str | None] = {}
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin:
        built = runpy.run_path(str(Path(torch.origin).with_name("version.py")))
    vllm = version("vllm")
    own_cpu_build = vllm if "+cpu" in vllm else ""  # the vLLM project's own has the name vllm
    return Environment(
        python=sys.executable,
        prefix=sys.prefix,
        verl=version("verl"),
        torch=built.get("__version__") or "",
        cuda=built.get("cuda") or "",
        vllm="" if own_cpu_build else vllm,
        vllm_cpu=version("vllm-cpu") or own_cpu_build,
        hip=built.get("hip") or "",
    )


class Elsewhere(Exception):
    """Another environment of the project can do the run, and the one of this process cannot."""

    def __init__(self, environment: Environment, message: str) -> None:
        super().__init__(message)
        self.python = environment.python


def require_environment(on_cpu: bool, project: Path) -> str:
    """Why no environment here can do a run, each one's reasons and how to make one; "" if this process's can.

    Raises:
        Elsewhere: it cannot, but .venv-gpu or .venv of the project can.
    """
    here = this_environment()
    if not (lacks := here.lacks(on_cpu)):
        return ""
    run = f"This run is on {'the CPU' if on_cpu else 'GPUs'}"
    reasons = [f"{here.prefix} {' and '.join(lacks)}"]
    for folder in ENVIRONMENTS:
        python = project / folder / "bin" / "python"
        if not python.exists() or (project / folder).resolve() == Path(here.prefix).resolve():
            continue
        done = subprocess.run([python, __file__, "environment"], capture_output=True, text=True)
        if done.returncode:
            reasons.append(f"{project / folder} does not work ({done.stderr.strip()[-200:]})")
            continue
        there = Environment(**json.loads(done.stdout))
        if not (lacks := there.lacks(on_cpu)):
            raise Elsewhere(there, f"{run}: taken is {there}, since {reasons[0]}")
        reasons.append(f"{there.prefix} {' and '.join(lacks)}")
    how = f"{INSTALL_CPU} makes one that can"
    if not on_cpu:
        how = (OWN_RUN if here.hip else f"{INSTALL_GPU} makes one that can") + " (for the CPU: model=tiny)"
    return f"{run}, and no environment here can do it: {'; '.join(reasons)}. {how}"


# --------------------------------------------------------------------------------------------------------- machine


def driver() -> tuple[tuple[int, int], int] | None:
    """((major, minor) of the newest CUDA that the NVIDIA driver can run, GPUs that it shows); None without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number, gpus = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(number)) or not number.value:
        return None
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(gpus)):
        gpus.value = 0
    return (number.value // 1000, number.value % 1000 // 10), gpus.value


def driver_problem(cuda: str, gpus: int = 1) -> Defect | None:
    """What keeps wheels for a version of CUDA from running on as many GPUs of this machine."""
    found = driver()
    if found is None:
        return Defect(
            "no NVIDIA driver is here (libcuda.so.1 cannot be loaded)", "In a container: start it with --gpus all"
        )
    (newest, minor), shown = found
    if newest < (major := int(cuda.split(".")[0])):
        return Defect(
            f"the NVIDIA driver runs CUDA up to {newest}.{minor}, the wheels are for CUDA {cuda}",
            f"Install driver {FIRST_DRIVER.get(major, 'for that CUDA')} or newer, or on data-centre cards "
            f"NVIDIA's package cuda-compat-{cuda.replace('.', '-')}",
        )
    if shown < gpus:
        return Defect(
            f"the driver shows {shown} GPUs here, and {gpus} are asked for",
            f"Give trainer.n_gpus_per_node={max(shown, 1)}, or look at CUDA_VISIBLE_DEVICES",
        )
    return None


def flash_attention_problem() -> Defect | None:
    """Why verl's default attention, flash_attention_2 (workers/config/model.py:185), cannot be loaded."""
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # not there, or built for another torch: an undefined symbol
        return Defect(
            f"flash-attn cannot be loaded ({type(error).__name__}: {error})",
            f"Give runs attention=sdpa, which is slower, or compile it: FLASH_ATTN=build {INSTALL_GPU}",
        )
    return None


def compiler_problem() -> Defect | None:
    """What Triton lacks to build and load launchers of kernels (triton/runtime/build.py): vLLM's, torch.compile's."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    lacking = [] if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") else ["a C compiler"]
    lacking += [] if header.exists() else [str(header)]
    if not lacking:
        variables = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        kept = next(filter(None, map(os.environ.get, variables)), tempfile.gettempdir())
        kernels = nearest(Path(kept).absolute())
        if not os.statvfs(kernels).f_flag & os.ST_NOEXEC:
            return None
        return Defect(
            f"{kernels} is mounted noexec, and kernels of torch.compile and Triton are loaded from there",
            "Set TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to folders that allow execution, before Ray starts",
        )
    mend = "Install gcc and python3-dev"
    if not header.exists():
        mend += f"; without root: rm -rf .venv-gpu, and {INSTALL_GPU} with PYTHON= a conda or uv Python, which has it"
    return Defect(f"Triton cannot build its kernels: {' and '.join(lacking)} is missing", mend)


def vllm_port_problem() -> Defect | None:
    """Why vLLM's engines, of which verl starts one a GPU at once, would take each other's port.

    Each looks for the first free port from VLLM_PORT on (vllm/utils/network_utils.py), and opens it a moment later.
    Kubernetes sets the variable to an URL, which vLLM refuses, where a Service has the name vllm.
    """
    if not (port := os.environ.get("VLLM_PORT")):
        return None
    return Defect(f"VLLM_PORT={port} is set, and all vLLM engines of a node would take that port", "Unset it")


def environment_problems(on_cpu: bool, flash_attention: bool) -> list[Defect]:
    """What this process's environment lacks for a run, which may want verl's default attention."""
    here = this_environment()
    mend = INSTALL_CPU if on_cpu else OWN_RUN if here.hip else INSTALL_GPU
    problems = [Defect(f"{here.prefix} {reason}", mend) for reason in here.lacks(on_cpu)]
    further = (
        flash_attention and flash_attention_problem(),
        not on_cpu and compiler_problem(),
        not on_cpu and vllm_port_problem(),
        home_problem(own_ray=False),
    )
    return problems + [problem for problem in further if problem]


def verl_problem() -> str:
    """Why `import verl` fails, as any process of a run does it; "" if it does not."""
    try:
        importlib.import_module("verl")
    except Exception as error:
        named = os.environ.get("VERL_USE_EXTERNAL_MODULES")
        by = f" (verl imports what VERL_USE_EXTERNAL_MODULES={named} names)" if named else ""
        return f"import verl fails: {type(error).__name__}: {error}{by}"
    return ""


def cpus() -> int:
    """Of a Ray that is started here: the container's limit, if there is one (ray/_private/utils.py:432)."""
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus(override_docker_cpu_warning=True))


def cgroups() -> list[Path]:
    """The control groups (v2) around this process that Ray does not read: a user's on a login node, a batch job's.

    Not the outermost one, which is a container's.
    """
    own = re.search("^0::/(.+)", OWN_CGROUP.read_text(), re.M) if OWN_CGROUP.exists() else None
    folder = CGROUPS / own[1] if own else CGROUPS
    return [group for group in (folder, *folder.parents) if CGROUPS in group.parents]


def usable_cpus() -> int:
    """How many this process can keep busy: its affinity, or less by a limit of a container, a user or a job."""
    quotas = []
    for folder in cgroups():
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            quotas.append(quota // period)
    return max(1, min(len(os.sched_getaffinity(0)), cpus(), *quotas))


def free_memory() -> int:
    """Bytes, of the machine or of the least limit of a container, a user or a job. Swap is not counted."""
    import psutil
    from ray._private.utils import estimate_available_memory  # of a container's limit, if there is one

    free = [psutil.virtual_memory().available, estimate_available_memory()]
    for folder in cgroups():
        for limit in ("memory.max", "memory.high"):
            with contextlib.suppress(OSError, ValueError):
                cached = re.findall(r"^(?:in)?active_file (\d+)", (folder / "memory.stat").read_text(), re.M)
                used = int((folder / "memory.current").read_text()) - sum(map(int, cached))
                free.append(int((folder / limit).read_text()) - used)
    return min(free)


def nearest(path: Path) -> Path:
    """The path, or the first of its parents that is there and that this user may see."""
    return next(path for path in (path, *path.parents) if os.path.exists(path))


def home_problem(own_ray: bool) -> Defect | None:
    """What keeps datasets from writing its cache, or a Ray of the run's own its token (ray/_private/authentication)."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    folders = [os.environ.get("HF_DATASETS_CACHE") or os.environ.get("HF_HOME") or f"{cache}/huggingface"]
    given = os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if own_ray and not given and not os.path.exists(os.path.expanduser("~/.ray/auth_token")):
        folders.append("~/.ray")
    paths = [Path(folder).expanduser() for folder in folders]
    closed = [str(path) for path in paths if not os.access(nearest(path), os.W_OK)]
    if not closed:
        return None
    return Defect(
        f"{' and '.join(closed)} cannot be written, where datasets and Ray keep files",
        "Set HOME to a folder of yours, or for datasets HF_HOME",
    )


def main(question: str) -> int:
    if question == "environment":
        print(json.dumps(asdict(this_environment())))
        return 0
    found, problem = driver(), driver_problem(WHEELS_CUDA, gpus=0)
    if found and not problem:
        (major, minor), gpus = found
        print(f"NVIDIA driver: runs CUDA up to {major}.{minor}, shows {gpus} GPUs; wheels are for CUDA {WHEELS_CUDA}")
    else:
        print(f"NVIDIA driver: {problem}")
    return int(bool(found and problem))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
