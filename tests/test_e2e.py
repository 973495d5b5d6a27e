"""Whole training runs of the quickstart: verl.trainer.main_ppo, Ray, an FSDP2 actor, vLLM on the CPU.

Covered in CI: two steps with validation and a checkpoint, and bad settings. Marked slow: two ranks, resume, critic with
KL and entropy, Ctrl-C, a rollout engine that dies inside a weight sync. What a run learns is in the README, by seeds.
"""

import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from vlnorm_verl.runs.process import average_at_8, read_metrics
from vlnorm_verl.runs.quickstart import Settings, check, command, run
from vlnorm_verl.runs.recipe import parsed

SMALL_VALIDATION = "data.val_max_samples=8"


def trained(out: Path, **settings: Any) -> list[dict[str, Any]]:
    """Metrics of a run that must end well, by step."""
    overrides = [SMALL_VALIDATION, *settings.pop("overrides", [])]
    code = run(Settings(out=out, overrides=overrides, **settings), Console(quiet=True))
    assert code == 0, (out / "train.log").read_text()[-3000:]
    assert not processes_of(out)
    return [record["data"] for record in read_metrics(out)]


def processes_of(out: Path) -> list[psutil.Process]:
    """Processes, Ray's included, whose environment names this run's metrics file."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("VERL_FILE_LOGGER_PATH", "").startswith(f"{out.resolve()}/"):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [p for p in found if p.pid != os.getpid() and p.status() != psutil.STATUS_ZOMBIE]


def test_out_may_have_hydras_characters(tmp_path: Path) -> None:
    out = tmp_path / "runs (copy), a=1#2" / "it's"
    given = parsed([word for word in command(Settings(out=out))[3:] if not word.startswith("--")])
    values = {one.key_or_group: one.value() for one in given}
    assert values["hydra.run.dir"] == str(out)
    assert values["data.train_files"] == f"{out}/data/train.parquet"
    assert values["trainer.default_local_dir"] == f"{out}/checkpoints"


def test_two_steps(tmp_path: Path) -> None:
    before, first, last = trained(tmp_path, steps=2)
    assert average_at_8(before) is not None
    assert average_at_8(last) is not None
    for data in (first, last):
        # Each mini-batch is drawn at random, so its lengths spread as those of the batch do.
        assert 1.2 < data["actor/vl_norm/variance_ratio"] < 3
        assert data["actor/vl_norm/length_mean"] == pytest.approx(data["response_length/mean"], rel=1e-6)
        assert data["actor/grad_norm"] > 0
        assert data["training/rollout_probs_diff_max"] < 1e-5
        assert data["training/rollout_probs_diff_mean"] < 1e-6
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "checkpoints" / "global_step_2").is_dir()
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "vl-norm"}, "Did you mean 'vl_norm'"),
        ({"mode": "vl_norm:9"}, "0 ≤ α ≤ 2"),
        ({"resume": True}, "there is no run"),
    ],
)
def test_bad_settings_end_at_once(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    assert run(Settings(out=tmp_path, **settings), console) == 2
    assert message in console.export_text()
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics-000.jsonl").write_text('{"step": 1, "data": {"a": 1}}\n{"step": 2, "da')
    (tmp_path / "settings.json").write_text('{"mode": "token-mean", "seed": 0, "ranks": 1, "overrides": []}')
    assert run(Settings(out=tmp_path), Console(quiet=True)) == 2
    assert "begun with mode 'token-mean'" in str(check(Settings(out=tmp_path, resume=True)))
    assert check(Settings(out=tmp_path, mode="token-mean", resume=True)) is None
    assert read_metrics(tmp_path) == [{"step": 1, "data": {"a": 1}}]  # and a cut last line is no error


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    dumps = tmp_path / "responses"
    _, first, _ = trained(
        tmp_path / "run",
        steps=2,
        ranks=2,
        overrides=[
            "actor_rollout_ref.actor.ppo_mini_batch_size=16",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
            f"trainer.rollout_data_dir={dumps}",
        ],
    )
    # One token a character, and the end of sequence where the text is not cut. One mini-batch, so the harmonic mean of
    # all responses is that of the sums over both ranks; a mean of two ranks' own would lie beside it.
    texts = [json.loads(line)["output"] for line in (dumps / "1.jsonl").read_text().splitlines()]
    lengths = [min(len(text.removesuffix(".")) + 1, 256) for text in texts]
    assert len(lengths) == 128
    assert first["actor/vl_norm/length_harmonic_mean"] == pytest.approx(statistics.harmonic_mean(lengths), rel=1e-6)
    assert first["training/rollout_probs_diff_max"] < 1e-5


@pytest.mark.slow
def test_two_steps_and_two_resumed_are_four(tmp_path: Path) -> None:
    """Sampling is deterministic here (top_k 1, one response a prompt): vLLM's generator is in no checkpoint."""
    deterministic = [
        "actor_rollout_ref.rollout.n=1",
        "actor_rollout_ref.rollout.top_k=1",
        "algorithm.adv_estimator=reinforce_plus_plus",
        # One mini-batch: verl deals the responses to several in the order in which they happened to be finished.
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    ]
    whole = trained(tmp_path / "whole", steps=4, overrides=deterministic)
    trained(tmp_path / "parts", steps=2, overrides=deterministic)
    parts = trained(tmp_path / "parts", steps=4, resume=True, overrides=deterministic)
    assert [data["training/global_step"] for data in parts[-2:]] == [3, 4]
    for one, other in zip(whole[-2:], parts[-2:], strict=True):
        for key in ("critic/score/mean", "response_length/mean", "prompt_length/mean", "actor/lr"):
            assert one[key] == pytest.approx(other[key], rel=1e-6), key
        assert one["actor/grad_norm"] == pytest.approx(other["actor/grad_norm"], rel=1e-3)
    assert whole[-1]["actor/grad_norm"] != pytest.approx(whole[-2]["actor/grad_norm"], rel=1e-2)


@pytest.mark.slow
def test_critic_kl_and_entropy(tmp_path: Path) -> None:
    """The critic inherits vl_norm and its mini-batch sums; reference policy and entropy bonus go through it too."""
    *_, last = trained(
        tmp_path,
        steps=2,
        overrides=[
            "algorithm.adv_estimator=gae",
            "critic.model.path=${actor_rollout_ref.model.path}",
            "critic.ppo_micro_batch_size_per_gpu=32",
            "actor_rollout_ref.actor.use_kl_loss=true",
            "actor_rollout_ref.actor.entropy_coeff=0.01",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=64",
        ],
    )
    assert last["critic/vl_norm/length_mean"] == pytest.approx(last["response_length/mean"], rel=1e-6)
    assert last["critic/vf_loss"] > 0
    assert "actor/kl_loss" in last
    assert "actor/entropy_loss" in last


@pytest.fixture
def background(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A quickstart as a user starts it, past its first step."""
    command = [sys.executable, "-m", "vlnorm_verl", "quickstart", "--steps", "50", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [*command, SMALL_VALIDATION], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: len(read_metrics(tmp_path)) > 1 or process.poll() is not None, seconds=240)
    assert process.poll() is None, process.communicate()[0]
    yield process, tmp_path
    process.kill()
    for member in processes_of(tmp_path):
        member.kill()


def wait_for(condition: Callable[[], Any], seconds: float, every: float = 0.2) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(every)


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(background: tuple[subprocess.Popen[str], Path]) -> None:
    process, out = background
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)  # as people do
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in text
    wait_for(lambda: not processes_of(out), seconds=15)


@pytest.mark.slow
def test_engine_that_dies_inside_a_weight_sync_ends_the_run(background: tuple[subprocess.Popen[str], Path]) -> None:
    process, out = background
    running = processes_of(out)
    # Ray writes the method that an actor runs into its process title.
    trainer = next(p for p in running if "WorkerDict" in "".join(p.cmdline()))
    engine = next(p for p in running if "EngineCore" in "".join(p.cmdline()))
    title = Path(f"/proc/{trainer.pid}/cmdline")
    wait_for(lambda: b"update_weights" in title.read_bytes(), seconds=120, every=0.002)
    engine.kill()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text
    assert "weight sync: the rollout engine" in (out / "train.log").read_text(errors="replace")
    wait_for(lambda: not processes_of(out), seconds=15)
