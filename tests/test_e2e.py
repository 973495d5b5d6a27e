"""Recipes as users start them: `bash recipes/*.sh model=tiny`, with verl, Ray, FSDP2 and vLLM on this machine's CPU.

Covered in CI: two steps of VL Norm with validation, checkpoint, table and report. Marked slow: dynamic sampling,
overlong filtering, soft punishment, Math; resume, critic with KL and entropy; Ctrl-C, an engine that dies inside a
weight sync; kill -9 of the trainer, of a Ray worker, of a raylet, and of trainer and launcher at once, then the same
command again; a Ray job on two nodes; a node without the package. What a run learns is in docs/results, by seeds. Every
family × task × method: `bash recipes/reproduce.sh each model=tiny`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine.ranks import free_port
from tests.processes import kill, named, processes_of, wait_for, with_variable
from vlnorm_verl.runs.process import read_metrics

pytestmark = pytest.mark.timeout(1800)  # up to three runs in a test, each with a limit of its own

RECIPES = Path(__file__).parent.parent / "recipes"
ACCURACY = "val-core/vlnorm_tiny_countdown/acc/mean@8"
# The fewest responses that still make two mini-batches of whole groups a step.
SMALL = ("data.train_batch_size=8", "actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4")
# The quickstart's family: mini-batches in which verl puts any responses, responses of at most 256 tokens.
QUICKSTART = ("family=quickstart", "length=8192")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def command(script: str, root: Path, data: Path, *overrides: str) -> list[str]:
    short = ["model=tiny", "length=3072", "data.val_max_samples=4"]
    return ["bash", str(RECIPES / script), *short, f"recipe.root={root}", f"recipe.data={data}", *overrides]


def started(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"} | variables
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=540)


def trained(script: str, root: Path, data: Path, *overrides: str) -> tuple[Path, list[dict[str, Any]]]:
    """(folder, metrics by step) of a run that must end well."""
    done = started(command(script, root, data, *overrides))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder,) = [path for path in root.iterdir() if (path / "config.yaml").exists()]
    assert not processes_of(folder)
    return folder, [record["data"] for record in read_metrics(folder)]


def dumped(folder: Path, kind: str, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / kind / f"{step}.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ two steps, once


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, str]:
    """(folder, what the terminal showed) of two steps of VL Norm. The folder's name has Hydra's characters in it."""
    folder = tmp_path_factory.mktemp("runs") / "it's (a copy), v=1#2"
    quoted = str(folder).replace("'", r"\'")
    asked = command("countdown.sh", folder.parent, data, *SMALL, "--report", f"recipe.folder='{quoted}'")
    done = started(asked, CUDA_VISIBLE_DEVICES="")  # as a shell has it that is to use no GPU
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Warning" not in done.stderr  # verl's, of engines that are not installed
    assert not processes_of(folder)
    return folder, done.stdout


def test_the_mode_is_at_work(run: tuple[Path, str]) -> None:
    folder, _ = run
    _, *steps = [record["data"] for record in read_metrics(folder)]
    assert len(steps) == 2
    for metrics in steps:
        assert 1.1 < metrics["actor/vl_norm/variance_ratio"] < 3
        assert metrics["actor/vl_norm/length_mean"] == pytest.approx(metrics["response_length/mean"], rel=1e-6)
        assert metrics["actor/grad_norm"] > 0
        outcomes = {k: v for k, v in metrics.items() if k.startswith("training/outcome/")}
        assert sum(outcomes.values()) == pytest.approx(1)
        assert outcomes["training/outcome/correct"] == pytest.approx(metrics["critic/score/mean"])


def test_rollout_and_actor_agree(run: tuple[Path, str]) -> None:
    for record in read_metrics(run[0])[1:]:
        # 6e-5 was the most in 35 runs of 60 steps; a wrong temperature gives 0.1.
        assert record["data"]["training/rollout_probs_diff_max"] < 1e-4


def test_it_is_validated_before_and_after(run: tuple[Path, str]) -> None:
    before, _, last = [record["data"] for record in read_metrics(run[0])]
    assert ACCURACY in before
    assert ACCURACY in last
    assert len(dumped(run[0], "validation", 2)) == 4 * 8


def test_every_response_can_be_read(run: tuple[Path, str]) -> None:
    """And the prompt came through verl and vLLM as it is in the data: no chat format around it."""
    rows = dumped(run[0], "rollouts", 1)
    assert len(rows) == 8 * 4
    assert all(len(row["input"]) == 12 and row["input"].endswith(":") for row in rows)


def test_a_finished_run_keeps_its_model_without_the_optimizer(run: tuple[Path, str]) -> None:
    files = run[0].glob("checkpoints/global_step_2/actor/*.pt")
    assert {path.name.split("_world")[0] for path in files} == {"model", "extra_state"}


def test_the_terminal_shows_progress_a_table_and_where_the_report_is(run: tuple[Path, str]) -> None:
    folder, output = run
    lines = output.splitlines()
    assert [line[:9] for line in lines if line.startswith("step ")] == [f"step   {step}/" for step in (0, 1, 2)]
    (row,) = [line for line in lines if "Avg@8, vlnorm_tiny_countdown" in line]
    before, after = (float(cell) for cell in row.split("│")[2:4])
    metrics = [record["data"] for record in read_metrics(folder)]
    assert (before, after) == pytest.approx((metrics[0][ACCURACY], metrics[-1][ACCURACY]), abs=6e-4)
    (report,) = [Path(line.split(": ", 1)[1]) for line in lines if line.startswith("report: ")]
    (curve,) = [Path(line.split(": ", 1)[1]) for line in lines if line.startswith("learning curve: ")]
    assert "VL Norm" in report.read_text()
    assert curve.read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------------- two steps of other kinds


@pytest.mark.slow
def test_dynamic_sampling_and_overlong_filtering(tmp_path: Path, data: Path) -> None:
    # Every response is overlong.
    settings = ["method=overlong_filtering", "algorithm.overlong_filtering_length=1"]
    folder, (first, last) = trained("dapo_countdown.sh", tmp_path, data, *settings)
    assert sum(step.get("training/filter_groups/evicted_samples", 0) for step in (first, last)) > 0
    for step in (1, 2):
        groups: dict[str, set[float]] = {}
        for row in dumped(folder, "rollouts", step):
            groups.setdefault(row["uid"].split("_")[0], set()).add(row["score"])
        assert len(groups) == 16
        assert all(scores == {0.0, 1.0} for scores in groups.values())  # no group of equal outcome is left
    assert first["actor/grad_norm"] == last["actor/grad_norm"] == 0


# What attention=sdpa sets, over what model=tiny sets.
WITHOUT_FLASH_ATTN = [
    "attention=sdpa",
    "actor_rollout_ref.model.use_remove_padding=true",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
]


@pytest.mark.slow
def test_soft_punishment_on_math_without_flash_attn(tmp_path: Path, data: Path) -> None:
    folder, records = trained("dapo_math.sh", tmp_path, data, "method=soft_punishment", *WITHOUT_FLASH_ATTN)
    assert all(record["training/rollout_probs_diff_max"] < 1e-4 for record in records)  # vLLM's against the trainer's
    assert records[0]["critic/score/min"] < 0  # punished in training
    scores = {row["score"] for row in dumped(folder, "validation", 2)}
    assert scores <= {0.0, 1.0}  # and not in validation
    assert any(key.startswith("val-core/") and key.endswith("/acc/mean@8") for key in records[-1])


@pytest.mark.slow
def test_a_failing_reward_ends_the_run(tmp_path: Path, data: Path) -> None:
    """Stock verl would train on without these prompts, and count them as wrong in validation."""
    reward = tmp_path / "reward.py"
    reward.write_text("def compute_score(**kwargs):\n    raise OSError('the grader is gone')\n")
    overrides = ["method=vl_norm", f"reward.custom_reward_function.path={reward}"]
    done = started(command("countdown.sh", tmp_path / "runs", data, *overrides))
    assert done.returncode == 1, done.stdout[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    log = (folder / "train.log").read_text()
    assert "prompts failed in val" in log
    assert "the grader is gone" in log


@pytest.mark.slow
def test_two_steps_and_two_resumed_are_four(tmp_path: Path, data: Path) -> None:
    """Sampling is deterministic here (top_k 1, one response a prompt): vLLM's generator is in no checkpoint."""
    deterministic = [
        *QUICKSTART,
        "actor_rollout_ref.rollout.n=1",
        "actor_rollout_ref.rollout.top_k=1",
        "algorithm.adv_estimator=reinforce_plus_plus",
        # One mini-batch: verl deals the responses to several in the order in which they happened to be finished.
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    ]
    _, whole = trained("countdown.sh", tmp_path / "whole", data, *deterministic, "recipe.steps=4")
    trained("countdown.sh", tmp_path / "parts", data, *deterministic, "recipe.steps=2")
    _, parts = trained("countdown.sh", tmp_path / "parts", data, *deterministic, "recipe.steps=4")
    assert [metrics["training/global_step"] for metrics in parts[-2:]] == [3, 4]
    for expected, resumed in zip(whole[-2:], parts[-2:], strict=True):
        for key in ("critic/score/mean", "response_length/mean", "prompt_length/mean", "actor/lr"):
            assert expected[key] == pytest.approx(resumed[key], rel=1e-6), key
        assert expected["actor/grad_norm"] == pytest.approx(resumed["actor/grad_norm"], rel=1e-3)
    assert whole[-1]["actor/grad_norm"] != pytest.approx(whole[-2]["actor/grad_norm"], rel=1e-2)


@pytest.mark.slow
def test_critic_kl_and_entropy(tmp_path: Path, data: Path) -> None:
    """The critic inherits vl_norm and its mini-batch sums; reference policy and entropy bonus go through it too."""
    overrides = [
        *QUICKSTART,
        "recipe.steps=2",
        "algorithm.adv_estimator=gae",
        "critic.model.path=${actor_rollout_ref.model.path}",
        "critic.ppo_micro_batch_size_per_gpu=32",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.entropy_coeff=0.01",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=64",
    ]
    _, (*_, last) = trained("countdown.sh", tmp_path, data, *overrides)
    assert last["critic/vl_norm/length_mean"] == pytest.approx(last["response_length/mean"], rel=1e-6)
    assert last["critic/vf_loss"] > 0
    assert "actor/kl_loss" in last
    assert "actor/entropy_loss" in last


# ------------------------------------------------------------------------------------------------------------- crashes


@pytest.fixture
def background(tmp_path: Path, data: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run as a user starts it, past its first step."""
    folder = tmp_path / "run"
    arguments = command("countdown.sh", tmp_path, data, *QUICKSTART, f"recipe.folder={folder}", "recipe.steps=50")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: len(read_metrics(folder)) > 1 or process.poll() is not None, seconds=400)
        assert process.poll() is None, process.communicate()[0]
        yield process, folder
    finally:
        process.kill()
        kill(processes_of(folder))


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(background: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = background
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)  # as people do
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in text
    wait_for(lambda: not processes_of(folder), seconds=15)


@pytest.mark.slow
def test_engine_that_dies_inside_a_weight_sync_ends_the_run(background: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = background
    # Ray writes the method that an actor runs into its process title.
    trainer, engine = (named(processes_of(folder), part) for part in ("WorkerDict", "EngineCore"))
    title = Path(f"/proc/{trainer.pid}/cmdline")
    wait_for(lambda: b"update_weights" in title.read_bytes(), seconds=120, every=0.002)
    engine.kill()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text
    assert "weight sync: the rollout engine" in (folder / "train.log").read_text(errors="replace")
    wait_for(lambda: not processes_of(folder), seconds=15)


@pytest.mark.slow
@pytest.mark.parametrize("victims", [["main_ppo"], ["WorkerDict"], ["raylet/raylet"], ["main_ppo", "launcher"]])
def test_a_killed_run_goes_on_where_it_was(victims: list[str], tmp_path: Path, data: Path) -> None:
    steps = 4
    arguments = command(
        "countdown.sh",
        tmp_path,
        data,
        "method=vl_norm",
        f"recipe.steps={steps}",
        "trainer.save_freq=1",
        "trainer.test_freq=-1",
        "trainer.val_before_train=false",
    )
    folder = tmp_path / "aggregation-countdown-tiny-128-vl_norm-seed0"
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    launcher = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: tracker.exists() and int(tracker.read_text() or 0) >= 2, 300)
    family = processes_of(folder)
    for victim in victims:
        (psutil.Process(launcher.pid) if victim == "launcher" else named(family, victim)).kill()
    output = launcher.communicate(timeout=120)[0]
    if "launcher" not in victims:
        assert launcher.returncode == 1, output
        assert "the same command goes on from there" in output
    wait_for(lambda: not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], 60)
    kept = int(tracker.read_text())
    assert kept < steps

    done = started(arguments)
    assert done.returncode == 0, done.stdout[-3000:]
    assert tracker.read_text() == str(steps)
    before, after = (
        [json.loads(line)["step"] for line in (folder / f"metrics-{start:03d}.jsonl").read_text().splitlines()]
        for start in (0, 1)
    )
    assert after == list(range(kept + 1, steps + 1))  # only what was not in the last checkpoint was done again
    assert set(before) | set(after) == set(range(1, steps + 1))
    assert [path.name for path in (folder / "checkpoints").glob("global_step_*")] == [f"global_step_{steps}"]


@pytest.mark.slow
def test_a_validation_that_a_crash_took_is_made(tmp_path: Path, data: Path) -> None:
    """verl names the last checkpoint before it validates and logs that step; no record, no validation."""
    arguments = ["method=vl_norm", "trainer.val_before_train=false", "trainer.test_freq=2", "recipe.keep=all"]
    folder, (_, last) = trained("countdown.sh", tmp_path, data, *arguments)
    (folder / "finished").unlink()
    (folder / "validation" / "2.jsonl").unlink()
    first, _ = (folder / "metrics-000.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics-000.jsonl").write_text(first)
    done = started(command("countdown.sh", tmp_path, data, *arguments))
    assert done.returncode == 0, done.stdout[-3000:]
    (record,) = map(json.loads, (folder / "metrics-001.jsonl").read_text().splitlines())
    assert record["step"] == 2
    assert ACCURACY in last
    assert ACCURACY in record["data"]
    assert "timing_s/step" not in record["data"]  # nothing was trained
    assert len(dumped(folder, "validation", 2)) == 4 * 8
    assert (folder / "finished").read_text() == "2\n"


# ------------------------------------------------------------------------------------------------------------ clusters


@pytest.fixture
def cluster() -> Iterator[Callable[..., dict[str, str]]]:
    """Starts a head and a second raylet, each with one logical GPU; gives the variables of a client at that address."""
    from vlnorm_verl.cpu import cpu_environment

    # Ray tells nodes of one machine apart by port, and unpacks a job's files into the temporary folder: one each.
    folders = [Path(f"/tmp/vlnorm-{os.getpid()}-{node}") for node in (0, 1)]
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
    mark = {"MARK": uuid.uuid4().hex}
    ports = {"port": free_port(), "dashboard-port": free_port()}
    resources = ["--num-cpus=8", "--num-gpus=1", "--object-store-memory=300000000", "--disable-usage-stats"]

    def start(address: str, second_python: str = sys.executable, **variables: str) -> dict[str, str]:
        for node, python in enumerate((sys.executable, second_python)):
            # As in an activated environment: a job's `python` is the raylet's.
            path = f"{Path(python).parent}:{os.environ['PATH']}"
            where = (
                ["--head", "--node-ip-address=127.0.0.1", *(f"--{name}={port}" for name, port in ports.items())]
                if node == 0
                else [f"--address=127.0.0.1:{ports['port']}"]
            )
            environment = {**os.environ, **cpu_environment(), **client, **mark, "PATH": path, **variables}
            subprocess.run(
                [python, "-m", "ray.scripts.scripts", "start", *where, f"--temp-dir={folders[node]}", *resources],
                env=environment,
                check=True,
                timeout=120,
                capture_output=True,
            )
        return client | {"RAY_ADDRESS": address.format(**ports)}

    yield start
    # Not `ray stop`, which ends every Ray of this machine.
    kill(with_variable("MARK", mark["MARK"]))
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


MISSING = """
import sys
class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "vlnorm_verl":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Missing)
"""


@pytest.fixture
def without_package(tmp_path: Path) -> str:
    """A Python that has all libraries of this one, but not this package's editable install."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "libraries.pth").write_text(f"{libraries}\n")
    return str(tmp_path / "venv/bin/python")


@pytest.mark.slow
def test_a_ray_job_trains_on_two_nodes(
    cluster: Callable[..., dict[str, str]], without_package: str, tmp_path: Path, data: Path
) -> None:
    """No node has the plugin by an entry point, the second has no vlnorm_verl at all: Ray sends it with the job."""
    client = cluster("http://127.0.0.1:{dashboard-port}", without_package, VERL_USE_EXTERNAL_PLUGINS="none")
    arguments = command("countdown.sh", tmp_path / "runs", data, "method=vl_norm", "trainer.nnodes=2")
    done = started(arguments, **client)
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.count("\nnode ") == 2
    folder = tmp_path / "runs" / "aggregation-countdown-tiny-128-vl_norm-seed0"
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[-1]["data"]["actor/vl_norm/variance_ratio"] > 1
    assert sorted(path.name for path in (folder / "checkpoints/global_step_2/actor").glob("model_*.pt")) == [
        "model_world_size_2_rank_0.pt",
        "model_world_size_2_rank_1.pt",
    ]


@pytest.mark.slow
def test_a_node_without_the_package_is_named(
    cluster: Callable[..., dict[str, str]], without_package: str, tmp_path: Path, data: Path
) -> None:
    """On the cluster itself (no Ray job) nothing is sent along.

    All nodes of this machine see one disk, and Ray's workers would find the package by the path of the process that
    starts the run: hence its import is blocked on the second node.
    """
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (packages / "sitecustomize.py").write_text(MISSING)
    client = cluster("127.0.0.1:{port}", without_package)
    many = "transfer_queue.backend.SimpleStorage.num_data_storage_units=9"
    arguments = command("countdown.sh", tmp_path / "runs", data, "method=vl_norm", "trainer.nnodes=2", many)
    done = started(arguments, **client)
    assert done.returncode == 2, done.stdout[-3000:]
    assert "the run cannot work on every node" in done.stderr
    assert done.stderr.count("cannot import vlnorm_verl") == 1  # and the other node is not accused
    assert "all nodes: verl reserves 17 CPUs of Ray, and they have 16: the run would wait" in done.stderr


@pytest.mark.slow
def test_smoke_shows_memory_and_time(tmp_path: Path, data: Path) -> None:
    done = started(command("countdown.sh", tmp_path, data, "method=grpo_norm", "--smoke"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "host memory" in done.stdout
    assert "2 steps like this one, validated and saved" in done.stdout
    (folder,) = (tmp_path / "smoke").iterdir()
    assert not (folder / "checkpoints").exists()
    worst, usual = (record["data"] for record in read_metrics(folder))
    assert worst["response_length/mean"] == worst["response_length/max"] == 128
    assert usual["response_length/mean"] < 128
