"""recipes/cluster/: the SLURM script with the real Ray, the Kubernetes manifest as the launcher fills it in.

Covered: the SLURM script from beginning to end on one and two "nodes" of this machine; its signals and exit code; that
no process of its Ray stays behind; which address it gives to the head; the manifest's structure, sizes and command.
Not covered: SLURM and Kubernetes themselves. `srun` and `scontrol` are stand-ins that run the command here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer.main
import yaml

from tests.engine.ranks import free_port
from tests.processes import kill, named, script, wait_for, with_variable
from vlnorm_verl.cli import app
from vlnorm_verl.runs.clusters import rayjob, sbatch_command
from vlnorm_verl.runs.config import compose

PROJECT = Path(__file__).parent.parent
SCRIPT = PROJECT / "recipes" / "cluster" / "slurm.sbatch"
CHOICE = ["family=aggregation", "task=countdown"]

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "%s\\n" $NODES; else echo "$@" >>"$RECORD/scontrol"; fi',
    # Without the options of srun itself, as the one task that the test has on other nodes.
    "srun": 'echo "$@" >"$RECORD/srun"\nwhile case $1 in -*) ;; *) false ;; esac; do shift; done\nexec "$@"',
}
# Ends by TERM as the launcher does: with 130, after a moment.
WAITING_LAUNCHER = """
trap 'sleep 1; echo in order >>"$RECORD/launcher"; exit 130' TERM
echo started >>"$RECORD/launcher"
while :; do sleep 0.1; done
"""


class Job:
    """slurm.sbatch as SLURM would start it on the first node."""

    def __init__(self, folder: Path) -> None:
        self.record, self.bin, self.project = folder / "record", folder / "bin", folder / "project"
        for path in (self.record, self.bin, self.project / "recipes"):
            path.mkdir(parents=True)
        for name, text in STAND_INS.items():
            script(self.bin / name, text)
        self.mark = uuid.uuid4().hex
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_", "VIRTUAL_"))},
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RECORD": str(self.record),
            "NODES": "node-a",
            "MARK": self.mark,
            "SLURM_SUBMIT_DIR": str(self.project),
            "SLURM_JOB_NODELIST": "any",
            "SLURM_JOB_ID": "7",
            "RAY_ADDRESS": "another-cluster:6379",
            "ROCR_VISIBLE_DEVICES": "0",
            "VLNORM_RAY_IP": "127.0.0.1",
            "VLNORM_RAY_PORT": str(free_port()),
            # Two nodes on one machine may not share a port.
            "VLNORM_RAY_OPTIONS": "--num-cpus=1 --object-store-memory=80000000 --dashboard-agent-listen-port=0",
        }

    def launcher(self, text: str, ray: str = "") -> None:
        """A python3 whose launcher is this text; it says too which Python the run takes, as the real one does.

        Its folder has no `ray`. ray: text of a Ray that is not the real one.
        """
        real = f'exec {sys.executable} "$@"'
        cases = f"case $2 in vlnorm_verl) shift 3 ;; ray.scripts.scripts) {ray or real} ;; *) {real} ;; esac"
        answer = f'if [ "${{@: -1}}" = --python ]; then echo {self.bin}/python3; exit; fi'
        script(self.bin / "python3", f"{cases}\n{answer}\n{text}")
        shutil.copy(PROJECT / "recipes" / "python.sh", self.project / "recipes")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        copy = self.record / "slurm_script"  # as sbatch does
        shutil.copy(SCRIPT, copy)
        command = ["bash", "-c", 'ulimit -Sn 1024; exec bash "$0" "$@"', str(copy), *arguments]  # as a login shell's
        with open(self.record / "log", "w") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, text=True)

    def run(self, *arguments: str) -> int:
        return self.start(*arguments).wait(240)

    def recorded(self, name: str) -> str:
        path = self.record / name
        return path.read_text() if path.exists() else ""

    def processes(self) -> list[psutil.Process]:
        """Whatever this job has started and is still there."""
        return with_variable("MARK", self.mark)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    kill(job.processes())


# ------------------------------------------------------------------------------------------------------------ SLURM


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_sbatch_sees_every_option() -> None:
    lines = SCRIPT.read_text().splitlines()
    command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.split(maxsplit=1)[1] for line in lines[:command] if line.startswith("#SBATCH ")]
    assert not [line for line in lines[command:] if line.startswith("#SBATCH")]  # sbatch stops at the first command
    assert {"--ntasks-per-node=1", "--requeue", "--signal=B:USR1@180"} <= set(options)


def test_the_launcher_submits_this_script() -> None:
    overrides = [*CHOICE, "method=vl_norm", "trainer.nnodes=2", "trainer.n_gpus_per_node=4"]
    command = sbatch_command(PROJECT / "recipes", overrides, compose(PROJECT / "recipes/config", overrides))
    assert {"--nodes=2", "--gpus-per-node=4"} <= set(command)
    assert command[command.index(str(SCRIPT)) + 1 :] == overrides
    overrides = [*CHOICE, "model=tiny"]
    command = sbatch_command(PROJECT / "recipes", overrides, compose(PROJECT / "recipes/config", overrides))
    assert not [argument for argument in command if "gpus" in argument]  # a cluster may have none


def test_a_job_waits_for_another_of_its_folder_only() -> None:
    """SLURM goes by the job's name."""
    names = []
    for folder in ("/a/run", "/a/run", "/b/run", "/a/other"):
        overrides = [*CHOICE, f"recipe.folder={folder}"]
        command = sbatch_command(PROJECT / "recipes", overrides, compose(PROJECT / "recipes/config", overrides))
        assert "--dependency=singleton" in command
        names += [argument for argument in command if argument.startswith("--job-name=")]
    assert names[0].startswith("--job-name=run-")
    assert names[0] == names[1]
    assert len(names) == 4
    assert len({*names}) == 3


def test_outside_the_project(job: Job) -> None:
    assert job.run() == 2
    assert "submit from the project's folder" in job.recorded("log")


def test_without_an_environment_for_the_run_the_job_ends_and_says_why(job: Job) -> None:
    job.launcher("")
    script(job.bin / "python3", '[ "$1" = -c ] || { echo no environment here can do it >&2; exit 2; }')
    assert job.run("task=countdown") == 2
    assert job.recorded("log") == "no environment here can do it\n"


@pytest.mark.parametrize(
    ("named", "own", "taken"),
    [
        ("192.0.2.7", "172.17.0.1 192.0.2.7", "192.0.2.7"),  # not the bridge of a container engine
        ("127.0.1.1", "192.0.2.7 2001:db8::7", "192.0.2.7"),
        ("", "2001:db8::7 192.0.2.7", "192.0.2.7"),
        ("2001:db8::8", "2001:db8::7 2001:db8::8", "2001:db8::8"),
        ("192.0.2.99", "192.0.2.9", "192.0.2.9"),
        ("192.0.2.7", "", "192.0.2.7"),  # no -I: the name's, if that is not this node's loopback
        ("127.0.1.1", "", ""),
    ],
)
def test_address_of_the_head(tmp_path: Path, named: str, own: str, taken: str) -> None:
    script(tmp_path / "getent", f"[ -n '{named}' ] && printf '%s STREAM\\n%s DGRAM\\n' '{named}' '{named}'")
    script(tmp_path / "hostname", f"echo '{own} '" if own else "echo 'invalid option -- I' >&2; exit 64")
    text = SCRIPT.read_text()
    function = text[text.index("own_address() {") :].split("\n}\n")[0] + "\n}\n"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", f"{function}\nip=$(own_address node-a); echo $ip"]
    assert subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip() == taken


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({}, f"/tmp/ray-{os.getuid()}"),
        ({"TMPDIR": "/job"}, f"/tmp/ray-{os.getuid()}"),
        ({"RAY_TMPDIR": "/mine"}, "/mine"),
    ],
)
def test_each_user_has_a_folder_for_ray(job: Job, given: dict[str, str], taken: str) -> None:
    job.launcher("", ray='echo "$RAY_TMPDIR" >"$RECORD/ray"; exit 1')
    job.environment.pop("TMPDIR", None)
    job.environment |= given
    assert job.run() == 1
    assert job.recorded("ray") == f"{taken}\n"


def test_ray_may_open_as_many_files_as_the_hard_limit_allows(job: Job) -> None:
    job.launcher("", ray='echo $(ulimit -Sn) $(ulimit -Hn) >"$RECORD/ray"; exit 1')
    assert job.run() == 1
    soft, hard = job.recorded("ray").split()
    assert soft == hard


@pytest.mark.slow
def test_exit_code_of_the_launcher_and_nothing_left(job: Job) -> None:
    job.launcher('echo "$RAY_ADDRESS${ROCR_VISIBLE_DEVICES-} $*" >"$RECORD/launcher"; exit 3')
    assert job.run("a=1", "b='x y'") == 3
    assert job.recorded("launcher") == f"127.0.0.1:{job.environment['VLNORM_RAY_PORT']} a=1 b='x y'\n"
    assert not job.recorded("scontrol")
    assert not job.processes()


@pytest.mark.slow
def test_two_nodes_and_the_real_launcher(job: Job) -> None:
    job.environment |= {"SLURM_SUBMIT_DIR": str(PROJECT), "NODES": "node-a node-b"}
    assert job.run(*CHOICE, "model=tiny", "trainer.nnodes=2", "--dry-run") == 0, job.recorded("log")
    log = job.recorded("log")
    assert f"environment: {sys.executable}" in log
    assert f"Ray: 2 node(s) at 127.0.0.1:{job.environment['VLNORM_RAY_PORT']}" in log
    assert "ray_kwargs.ray_init.runtime_env.env_vars" in log  # the launcher has seen that it is on a cluster
    options = {"--export=ALL", "--propagate=NOFILE,NPROC", "--nodes=1", "--ntasks=1", "--relative=1"}
    assert options <= set(job.recorded("srun").split())
    assert not job.processes()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, "requeue 7\n"), (signal.SIGTERM, "")])
def test_stops_in_order(job: Job, sent: signal.Signals, requeued: str) -> None:
    job.launcher(WAITING_LAUNCHER)
    process = job.start()
    wait_for(lambda: job.recorded("launcher") or process.poll() is not None, 400)
    assert process.poll() is None, job.recorded("log")
    assert named(job.processes(), "raylet")
    process.send_signal(sent)
    assert process.wait(60) == 130
    assert job.recorded("launcher") == "started\nin order\n"
    assert job.recorded("scontrol") == requeued
    assert not job.processes()


@pytest.mark.slow
def test_a_node_that_does_not_come_is_named(job: Job) -> None:
    job.launcher('touch "$RECORD/launcher"')
    here = socket.gethostname()
    job.environment |= {"NODES": f"{here} node-b", "VLNORM_RAY_SECONDS": "60"}
    script(job.bin / "srun", "exec sleep 300")
    assert job.run() == 1
    assert "1 of 2 nodes are in the Ray cluster after 60 s; missing: node-b" in job.recorded("log")
    assert not (job.record / "launcher").exists()
    assert not job.processes()


@pytest.mark.slow
def test_a_ray_that_cannot_start_ends_the_job_at_once(job: Job) -> None:
    job.launcher('touch "$RECORD/launcher"')
    script(job.bin / "srun", "echo srun: error >&2; exit 1")
    job.environment["NODES"] = "node-a node-b"
    start = time.monotonic()
    assert job.run() == 1
    assert time.monotonic() - start < 120  # the default limit is 300
    assert "a Ray ended before all nodes were there" in job.recorded("log")
    assert not (job.record / "launcher").exists()
    assert not job.processes()


# ------------------------------------------------------------------------------------------------------- Kubernetes


def manifest(*overrides: str) -> dict[str, Any]:
    arguments = list(overrides)
    text = rayjob(PROJECT / "recipes", arguments, compose(PROJECT / "recipes/config", arguments))
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_manifest() -> None:
    job = manifest(*CHOICE)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["submissionMode"] == "HTTPMode"  # the others take the end of the log's stream for the run's
    for group in groups(job):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        kinds = {volume["name"]: set(volume) - {"name"} for volume in pod["volumes"]}
        # A relative recipe.root and recipe.data are below the working directory.
        for folder in ("runs", "data"):
            assert kinds[mounts[f"{container['workingDir']}/{folder}"]] == {"persistentVolumeClaim"}
        assert kinds[mounts["/dev/shm"]] == {"emptyDir"}
        secrets = {v["name"]: v["valueFrom"]["secretKeyRef"] for v in container["env"] if "valueFrom" in v}
        assert set(secrets) == {"HF_TOKEN", "WANDB_API_KEY"}
        assert all(secret["optional"] for secret in secrets.values())  # a run without wandb and with open models starts


def test_the_manifest_names_the_image_that_the_dockerfile_makes() -> None:
    text = (PROJECT / "recipes" / "cluster" / "Dockerfile").read_text()
    (container,) = groups(manifest(*CHOICE))[0]["template"]["spec"]["containers"]
    assert f"docker build -f recipes/cluster/Dockerfile -t {container['image']} ." in text
    assert "~/.ray" in text.splitlines()[-1], "no token of a Ray in the image"
    assert f"WORKDIR {container['workingDir']}\n" in text
    for line in text.splitlines():  # what it copies is there
        if line.startswith("COPY "):
            assert all((PROJECT / source).exists() for source in line.split()[1:-1])


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (4, 2)])
def test_size_of_the_cluster(nodes: int, gpus: int) -> None:
    head, workers = groups(manifest(*CHOICE, f"trainer.nnodes={nodes}", f"trainer.n_gpus_per_node={gpus}"))
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [nodes - 1] * 3
    for group in (head, workers):
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == gpus
        assert resources["limits"]["memory"] == resources["requests"]["memory"]
        assert "cpu" not in resources["limits"]


def test_the_command_arrives_as_it_was_given() -> None:
    overrides = [
        *CHOICE,
        "trainer.experiment_name='a b: \"c\" # d'",
        "recipe.folder=${recipe.root}/$HOME",
        "trainer.logger=[console,file]",
    ]
    entrypoint = manifest(*overrides)["spec"]["entrypoint"]
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {entrypoint}"], check=True, capture_output=True, text=True)
    words = printed.stdout.split("\0")[:-1]
    assert words == shlex.split(entrypoint)
    assert words[:4] == ["python", "-m", "vlnorm_verl", "launch"]
    context = typer.main.get_command(app).commands["launch"].make_context("launch", words[4:])  # type: ignore[attr-defined]
    assert list(context.params["overrides"]) == overrides
    assert context.params["recipes"] == Path("recipes")


@pytest.mark.parametrize(
    "overrides",  # the longest names of the paper's runs, and one that is no DNS label
    [
        ("family=aggregation", "method=dr_grpo_norm", "recipe.seed=10"),
        ("family=dapo", "length=3072", "method=overlong_filtering", "recipe.seed=10"),
        ("family=aggregation", "recipe.name=My_run.0.75"),
    ],
    ids=" ".join,
)
def test_kuberay_accepts_the_name(overrides: tuple[str, ...]) -> None:
    name = manifest("task=countdown", *overrides)["metadata"]["name"]
    # ValidateRayJobMetadata of KubeRay: a DNS label, and room for what KubeRay adds to it.
    assert len(name) <= 47
    assert name[0].isalpha()
    assert name[-1] != "-"
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
