"""A run on a Ray cluster, and as a Ray job: what its configuration, its command and its environment get.

Not covered: a training there (test_e2e.py), SLURM and Kubernetes (test_cluster_files.py).
"""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.test_launch import MODULES, RECIPES, complete, composed, dry_run, refused
from vlnorm_verl.files import UserError
from vlnorm_verl.runs import clusters, launch, probe
from vlnorm_verl.runs.progress import terminal
from vlnorm_verl.runs.request import Request, again


def test_a_cluster_keeps_its_resources_and_is_given_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:6379")
    config = composed(tmp_path, "model=tiny")
    ray_init = config.ray_kwargs.ray_init
    assert ray_init.address == "auto"
    assert (ray_init.num_cpus, ray_init.num_gpus, ray_init.object_store_memory) == (None, None, None)
    assert ray_init.runtime_env.py_executable is None
    variables = dict(ray_init.runtime_env.env_vars)
    assert variables["VERL_USE_EXTERNAL_MODULES"] == "vlnorm_verl.verl_entry"
    assert variables["VERL_FILE_LOGGER_PATH"] == f"{config.recipe.folder}/metrics-000.jsonl"
    # Without it, where the trainer's actor starts.
    assert variables["TENSORBOARD_DIR"] == f"{config.recipe.folder}/tensorboard"
    assert variables["WANDB_DIR"] == config.recipe.folder


@pytest.mark.parametrize("address", ["gpu-head", "gpu-head:abc", "http:/head:8265", "::1:6379", "head:", "local"])
def test_an_address_without_a_port_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert f"RAY_ADDRESS={address}: accepted are host:port, auto" in refused(Request(RECIPES, dry_run=True))
    launch.check_place("slurm")  # whose script has an address of its own


@pytest.mark.parametrize(
    "address", ["", "auto", "head.example:6379", "[fe80::1]:6379", "http://head:8265", "https://a/b"]
)
def test_an_address_is_accepted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    launch.check_place("")


@pytest.mark.parametrize("given", ["+{}=json", "+{}='vlnorm_verl.verl_entry, json'", "in the environment"])
def test_a_cluster_keeps_the_users_modules(tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:6379")
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "csv")
    lines = dry_run(f"recipe.root={tmp_path}", *([given.format(MODULES)] if "{}" in given else []))
    wanted = "vlnorm_verl.verl_entry,json" if "{}" in given else "vlnorm_verl.verl_entry,csv"
    assert f"{MODULES}={wanted}  # launcher" in lines


def test_a_ray_job_is_the_same_command_with_this_project_and_its_plugin_sent_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "csv")
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = ["method=dr_grpo", "trainer.nnodes=2", f"recipe.root={tmp_path}/runs"]
    request = Request(RECIPES, given, smoke=True, report=True, loggers=["wandb"])
    config = complete(request)
    jobs: list[tuple[list[str], dict[str, Any]]] = []

    def ray(command: list[str]) -> int:
        (file,) = [word.partition("=")[2] for word in command if word.startswith("--runtime-env=")]
        jobs.append((command, json.loads(Path(file).read_text())))
        return 7  # it could not be submitted

    monkeypatch.setattr(clusters.subprocess, "call", ray)
    assert clusters.submit(RECIPES, again(request, config), config, terminal(quiet=True)) == 7
    ((command, runtime_env),) = jobs
    assert {"--address=http://head:8265", f"--working-dir={RECIPES.parent}"} <= set(command)
    entry = command[command.index("--") + 1 :]
    assert entry[:6] == ["python", "-m", "vlnorm_verl", "launch", "--recipes", "recipes"]
    assert {"--smoke", "--report", "--logger=wandb", *given, f"recipe.data={config.recipe.data}"} <= set(entry)
    assert runtime_env["env_vars"]["VERL_USE_EXTERNAL_MODULES"] == "vlnorm_verl.verl_entry,csv"
    assert runtime_env["env_vars"]["WANDB_MODE"] == "offline"
    assert all(name.startswith("/") for name in runtime_env["excludes"])  # /data, and not vlnorm_verl/tasks


@pytest.mark.parametrize(
    ("answers", "followed", "code"),
    [
        (["SUCCEEDED"], 1, 0),
        (["FAILED"], 1, 1),
        (["STOPPED"], 1, 1),
        (["RUNNING", "", "", "RUNNING", "SUCCEEDED"], 3, 0),  # "": the dashboard is away
        (["RUNNING", "", "", ""], 2, None),
    ],
)
def test_a_ray_job_is_over_when_ray_says_so(
    answers: list[str], followed: int, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when its log ends. With Ray's own client, and a stand-in for Ray's dashboard."""
    left, commands = iter(answers), list[list[str]]()

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = "" if self.path == "/api/version" else next(left)
            job = {"type": "SUBMISSION", "entrypoint": "", "status": status}
            self.send_response(200 if status or self.path == "/api/version" else 500)
            self.end_headers()
            self.wfile.write(json.dumps(job if status else {"ray_version": "2.60.0"}).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    def ray(command: list[str]) -> int:
        commands.append(command)
        return 0

    monkeypatch.setattr(clusters.subprocess, "call", ray)
    monkeypatch.setattr(clusters, "ASK_S", 0)
    monkeypatch.setattr(clusters, "UNANSWERED", 3)
    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.server_port}")
        try:
            if code is None:
                with pytest.raises(
                    UserError, match=r"not told the status of a-job for .* may run on\. The last answer: .*500"
                ):
                    clusters._follow("a-job", terminal(quiet=True))
            else:
                assert clusters._follow("a-job", terminal(quiet=True)) == code
        finally:
            server.shutdown()
    assert not list(left)
    assert len(commands) == followed
    assert all(command[3:5] == ["job", "logs"] and command[-2:] == ["--follow", "a-job"] for command in commands)


def test_a_launch_elsewhere_has_the_paths_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = Request(RECIPES, ["recipe.root=here"])
    root, data = f"recipe.root={tmp_path}/here", f"recipe.data={tmp_path}/data"
    folder = f"recipe.folder={tmp_path}/here/aggregation-countdown-3b-8192-vl_norm-seed0"
    assert again(request, complete(request)) == [root, data, folder]


VARIABLES = {
    "WANDB_API_KEY": "secret",
    "HF_HOME": "/shared/hf",
    "NCCL_SOCKET_IFNAME": "ib0",
    "https_proxy": "http://proxy",
}
ON_A_WORKER = """
import json, os, ray
verls = {"env_vars": {"NCCL_SOCKET_IFNAME": "verl's"}}
ray.init(address="local", num_cpus=1, include_dashboard=False, runtime_env=verls, log_to_driver=False)
print(json.dumps(ray.get(ray.remote(lambda: dict(os.environ)).remote())))
"""


def test_variables_are_forwarded_past_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real Ray's worker has them, and the configuration, which verl logs, has no key."""
    monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:6379")
    for name in clusters.forwarded():  # of whoever runs the tests
        monkeypatch.delenv(name)
    for name, value in (VARIABLES | {"OTHER_TOKEN": "x"}).items():
        monkeypatch.setenv(name, value)
    job = clusters.job_environment()
    lines = dry_run(f"recipe.root={tmp_path}")
    assert "forwarded to the workers: HF_HOME, NCCL_SOCKET_IFNAME, WANDB_API_KEY, https_proxy" in lines
    assert not [line for line in lines if "secret" in line]
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES and k != "RAY_ADDRESS"} | job
    done = subprocess.run([sys.executable, "-c", ON_A_WORKER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    worker = json.loads(done.stdout.splitlines()[-1])
    assert {name: worker.get(name) for name in VARIABLES} == VARIABLES | {"NCCL_SOCKET_IFNAME": "verl's"}


FIRST = """
import ray, transfer_queue
context = ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
print(context.address_info["gcs_address"], flush=True)
input()
transfer_queue.init()  # as verl's trainer does
print("begun", flush=True)
input()
"""


@pytest.mark.slow
def test_a_second_run_on_one_ray_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the real TransferQueue leaves on a real Ray."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else the first Ray makes a token, and this process has none
    first = subprocess.Popen([sys.executable, "-c", FIRST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdin is not None
    assert first.stdout is not None
    try:
        lines = iter(first.stdout.readline, "")
        monkeypatch.setenv("RAY_ADDRESS", next(line for line in lines if ":" in line).strip())
        config = composed(tmp_path, "model=tiny")
        config.reward.custom_reward_function.path = f"{tmp_path}/reward.py"
        Path(config.recipe.folder).mkdir(parents=True)
        (node,) = probe.probe(config, {})
        first.stdin.write("\n")
        first.stdin.flush()
        assert "begun\n" in lines
        with pytest.raises(UserError, match="another verl run is on this Ray cluster"):
            probe.probe(config, {})
    finally:
        first.stdin.close()
        first.wait(60)
    assert (node.cpus, node.gpus) == (4, 2)
    files = ("data/model", "data/countdown/test.parquet", "reward.py")
    assert {f"does not see {tmp_path}/{file}" for file in files} <= {*node.problems}


@pytest.mark.parametrize(
    ("nodes", "waits"),
    [
        ([(24, 8), (40, 8)], False),
        ([(64, 16)], False),  # one node in place of two
        ([(48, 4)] * 4, True),  # as many GPUs
        ([(20, 8), (60, 8)], True),
        ([(64, 16), (0, 0)], False),
        ([(64, 12), (64, 4)], True),
    ],
)
def test_nodes_that_are_too_small_are_refused(
    nodes: list[tuple[int, int]], waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two times eight GPUs with 24 CPUs: verl itself would wait for nodes that have them."""
    reports = [probe.NodeReport(f"node-{n}", *resources, {}, []) for n, resources in enumerate(nodes)]
    monkeypatch.setenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # set there for good
    monkeypatch.setattr(clusters, "probe", lambda *_: reports)
    config = composed(tmp_path, "attention=sdpa", "trainer.nnodes=2")
    said = ""
    try:
        clusters.check_nodes(config, terminal(quiet=True))
    except UserError as error:
        said = str(error)
    cpus, gpus = nodes[0]
    reserved = "of trainer.nnodes=2 groups of 8 GPUs (trainer.n_gpus_per_node) and 24 CPUs, each on one node"
    assert (reserved in said, f": node-0 has {gpus} GPUs, {cpus} CPUs; " in said) == (waits, waits)
    assert bool(said) == waits


def test_a_ray_jobs_own_configuration_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "mine")
    given = {
        "runtime_env": {"working_dir": "gcs://x.zip", "env_vars": {"WANDB_API_KEY": "the job's"}},
        "metadata": {"a": "b"},
    }
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(given))
    job = json.loads(clusters.job_environment()["RAY_JOB_CONFIG_JSON_ENV_VAR"])
    assert (job["metadata"], job["runtime_env"]["working_dir"]) == ({"a": "b"}, "gcs://x.zip")
    assert job["runtime_env"]["env_vars"]["WANDB_API_KEY"] == "the job's"


def test_what_a_node_answers_may_be_an_error_without_text() -> None:
    assert [probe._last_line(ConnectionError(text)) for text in ("", "first\nlast\n")] == ["", "last"]
