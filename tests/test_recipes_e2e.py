"""Recipes as users start them: `bash recipes/*.sh scale=cpu`, with verl, Ray, FSDP2 and vLLM on this machine's CPU.

Covered in CI: two steps of each kind (aggregation only, dynamic sampling, overlong filtering, soft punishment, Math), a
finished run that is not repeated, a folder that is in use or holds another run. Marked slow: kill -9 of the trainer, of
a Ray worker, of a raylet, and of trainer and launcher at once, each followed by the same command; a Ray job on two
nodes; a node without the package. Every family × task × method: `bash recipes/reproduce.sh each scale=cpu`.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vlnorm_verl.runs.process import read_metrics

RECIPES = Path(__file__).parent.parent / "recipes"
SHORT = ["scale=cpu", "length=3072", "data.val_max_samples=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def command(script: str, root: Path, data: Path, *overrides: str) -> list[str]:
    return ["bash", str(RECIPES / script), *SHORT, f"recipe.root={root}", f"recipe.data={data}", *overrides]


def started(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"COLUMNS": "200"} | variables
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=540)


def trained(script: str, root: Path, data: Path, *overrides: str) -> tuple[Path, list[dict[str, Any]]]:
    """(folder, metrics by step) of a run that must end well."""
    done = started(command(script, root, data, *overrides))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder,) = [path for path in root.iterdir() if (path / "config.yaml").exists()]
    return folder, [record["data"] for record in read_metrics(folder)]


def dumped(folder: Path, kind: str, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / kind / f"{step}.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- two steps of each kind


def test_aggregation_only(tmp_path: Path, data: Path) -> None:
    folder, (before, first, last) = trained("countdown.sh", tmp_path, data, "method=vl_norm")
    assert "val-core/vlnorm_tiny_countdown/acc/mean@8" in before
    for metrics in (first, last):
        assert 1 < metrics["actor/vl_norm/variance_ratio"] < 3  # the mode is at work
        assert metrics["actor/grad_norm"] > 0
        outcomes = {k: v for k, v in metrics.items() if k.startswith("training/outcome/")}
        assert sum(outcomes.values()) == pytest.approx(1)
        assert outcomes["training/outcome/right"] == pytest.approx(metrics["critic/score/mean"])
    assert len(dumped(folder, "rollouts", 1)) == 16 * 10  # every response of training, to be read
    # The prompt came through verl and vLLM as it is in the data: no chat format around it.
    assert all(len(row["input"]) == 12 and row["input"].endswith(":") for row in dumped(folder, "rollouts", 1))

    again = started(command("countdown.sh", tmp_path, data, "method=vl_norm"))
    assert again.returncode == 0
    assert "finished, step 2" in again.stdout
    assert len(list(folder.glob("metrics-*.jsonl"))) == 1  # a finished run is not repeated
    kept = {path.name.split("_world")[0] for path in folder.glob("checkpoints/global_step_2/actor/*.pt")}
    assert kept == {"model", "extra_state"}  # and its optimizer is gone

    other = started(
        command(
            "countdown.sh",
            tmp_path,
            data,
            "method=vl_norm",
            "recipe.steps=3",
            "recipe.seed=0",
            "actor_rollout_ref.actor.optim.lr=1e-5",
        )
    )
    assert other.returncode == 2
    assert "actor_rollout_ref.actor.optim.lr: 0.0002 then, 1e-05 now" in other.stdout

    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = started(command("countdown.sh", tmp_path, data, "method=vl_norm", "recipe.steps=3"))
    assert second.returncode == 2
    assert "another run is writing there" in second.stdout


def test_dynamic_sampling_and_overlong_filtering(tmp_path: Path, data: Path) -> None:
    folder, (first, last) = trained("dapo_countdown.sh", tmp_path, data, "method=overlong_filtering")
    assert (
        first.get("training/filter_groups/evicted_samples", 0) + last.get("training/filter_groups/evicted_samples", 0)
        > 0
    )
    for step in (1, 2):
        groups: dict[str, set[float]] = {}
        for row in dumped(folder, "rollouts", step):
            groups.setdefault(row["uid"].split("_")[0], set()).add(row["score"])
        assert len(groups) == 16
        assert all(scores == {0.0, 1.0} for scores in groups.values())  # no group of equal outcome is left
    assert first["response_length/clip_ratio"] > 0  # there was something to filter


# What attention=sdpa sets, over what scale=cpu sets.
WITHOUT_FLASH_ATTN = [
    "attention=sdpa",
    "actor_rollout_ref.model.use_remove_padding=true",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1",
]


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


# ------------------------------------------------------------------------------------------------------------- crashes


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes, Ray's included, that were started with this run's metrics file in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("VERL_FILE_LOGGER_PATH", "").startswith(f"{folder}/"):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


def named(folder: Path, part: str) -> psutil.Process:
    """The first process of the run with this in its command line or title."""
    return next(p for p in processes_of(folder) if part in " ".join(p.cmdline()))


def wait_for(condition: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


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
    folder = tmp_path / "aggregation-countdown-3b-3072-vl_norm-seed0"
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    launcher = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: tracker.exists() and int(tracker.read_text()) >= 2, 300)
    family = processes_of(folder)
    for victim in victims:
        (psutil.Process(launcher.pid) if victim == "launcher" else named(folder, victim)).kill()
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
    key = "val-core/vlnorm_tiny_countdown/acc/mean@8"
    assert key in last
    assert key in record["data"]
    assert "timing_s/step" not in record["data"]  # nothing was trained
    assert len(dumped(folder, "validation", 2)) == 4 * 8
    assert (folder / "finished").read_text() == "2\n"


# ------------------------------------------------------------------------------------------------------------ clusters

PORT, DASHBOARD = 6391, 8291


def ray(*arguments: str, **variables: str) -> None:
    environment = {**os.environ, **variables}
    subprocess.run(
        [Path(sys.executable).with_name("ray"), *arguments],
        env=environment,
        check=True,
        timeout=120,
        capture_output=True,
    )


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Callable[..., dict[str, str]]]:
    """Starts a head and a second raylet, each with one logical GPU; gives the variables that a client needs."""
    from vlnorm_verl.cpu import cpu_environment

    # Ray tells nodes of one machine apart by port, and unpacks a job's files into the temporary folder: one each.
    folders = [Path(f"/tmp/vlnorm-{os.getpid()}-{node}") for node in (0, 1)]
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
    resources = ["--num-cpus=8", "--num-gpus=1", "--object-store-memory=300000000", "--disable-usage-stats"]

    def start(second_python: str = sys.executable) -> dict[str, str]:
        for node, python in enumerate((sys.executable, second_python)):
            # As in an activated environment: a job's `python` is the raylet's.
            path = f"{Path(python).parent}:{os.environ['PATH']}"
            where = (
                ["--head", "--node-ip-address=127.0.0.1", f"--port={PORT}", f"--dashboard-port={DASHBOARD}"]
                if node == 0
                else [f"--address=127.0.0.1:{PORT}"]
            )
            environment = {**os.environ, **cpu_environment(), **client, "PATH": path}
            subprocess.run(
                [python, "-m", "ray.scripts.scripts", "start", *where, f"--temp-dir={folders[node]}", *resources],
                env=environment,
                check=True,
                timeout=120,
                capture_output=True,
            )
        return client

    yield start
    ray("stop", "--force")


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
    """The second node has no vlnorm_verl of its own: Ray sends it there with the job."""
    client = cluster(second_python=without_package)
    arguments = command("countdown.sh", tmp_path / "runs", data, "method=vl_norm", "trainer.nnodes=2")
    done = started(arguments, RAY_ADDRESS=f"http://127.0.0.1:{DASHBOARD}", **client)
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.count("\nnode ") == 2
    folder = tmp_path / "runs" / "aggregation-countdown-3b-3072-vl_norm-seed0"
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
    client = cluster(second_python=without_package)
    arguments = command("countdown.sh", tmp_path / "runs", data, "method=vl_norm", "trainer.nnodes=2")
    done = started(arguments, RAY_ADDRESS=f"127.0.0.1:{PORT}", **client)
    assert done.returncode == 2, done.stdout[-3000:]
    assert "the run cannot work on every node" in done.stdout
    assert done.stdout.count("cannot import vlnorm_verl") == 1  # and the other node is not accused


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
