"""What a person sees of a run: the line of a step, and the table at the end. Not covered: runs (test_e2e.py)."""

import io
import os
import subprocess
import sys

import pytest

from vlnorm_verl.runs.progress import progress_line, summarize, summary_table, terminal


@pytest.mark.parametrize(
    ("update", "shown"),
    [
        (
            {"actor/grad_norm": None},
            "reward 0.400  length  90.0  grad –  6.0 s",
        ),  # verl logs null for what is not finite
        ({}, "reward 0.400  length  90.0  6.0 s"),  # before trainer.critic_warmup is over verl updates no actor
        (
            {"actor/vl_norm/length_harmonic_mean": 80.0, "actor/vl_norm/variance_ratio": 1.25, "actor/grad_norm": 0.1},
            "reward 0.400  length  90.0  H 80.0  √(A/H) 1.25  grad 0.100  6.0 s",
        ),
    ],
)
def test_a_step_is_shown_by_what_verl_logged_of_it(update: dict[str, float | None], shown: str) -> None:
    data = {"critic/score/mean": 0.4, "response_length/mean": 90.0, "timing_s/step": 6.0, **update}
    assert progress_line({"step": 7, "data": data}, 9) == f"step   7/9  {shown}"
    assert progress_line({"step": 7, "data": {"timing_s/step": 6.0}}, 9) is None


def test_validations_are_shown_with_the_number_of_responses() -> None:
    """Of one set without its name, which may have a slash."""
    one, two = "val-core/openai/gsm8k/acc/mean@16", "val-core/set/reward/mean@16"
    others = {"val-core/set/reward/best@16/mean": 0.9, "val-aux/set/reward/mean@8": 0.9}
    assert progress_line({"step": 0, "data": {one: 0.25, **others}}, 9) == "step   0/9  validation Avg@16 0.250"
    record = {"step": 9, "data": {one: 0.5, two: None}}
    assert progress_line(record, 9) == "step   9/9  validation Avg@16 openai/gsm8k 0.500, set –"
    table = summary_table(summarize([record]), "run", 60.0)
    assert list(table.columns[0].cells)[:2] == ["Avg@16, openai/gsm8k", "Avg@16, set"]


def test_a_run_with_values_that_are_not_finite_has_a_summary() -> None:
    rewards = [None] * 10 + [0.25, 0.75]
    data = [{"critic/score/mean": reward, "response_length/mean": 9.0, "timing_s/step": 6.0} for reward in rewards]
    data[0]["val-core/set/acc/mean@8"] = None
    summary = summarize([{"step": step, "data": of_step} for step, of_step in enumerate(data)])
    assert (summary["reward"], summary["length"]) == ((None, 0.5), (9.0, 9.0))
    assert summary_table(summary, "run", 60.0).row_count == 4


def test_a_run_goes_on_when_nobody_reads_its_output_any_more() -> None:
    printed = "for _ in range(2): terminal().print('step'), terminal(stderr=True).print('step')"
    code = f"from vlnorm_verl.runs.progress import terminal\n{printed}\nraise SystemExit(7)"
    reader, writer = os.pipe()
    os.close(reader)
    assert subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=writer).returncode == 7
    os.close(writer)


def test_no_spinner_is_written_into_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal(file=(log := io.StringIO())).status("starting"):
        pass
    assert log.getvalue() == ""
