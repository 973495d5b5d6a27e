"""The CPU platform: inactive unless asked for, never auto-detected, every patch fits the installed verl and vLLM."""

import asyncio
import datetime
import importlib
import importlib.metadata
import inspect
import json
import math
import os
import socket
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import vlnorm_verl.cpu as cpu
from tests import warm
from tests.processes import wait_for
from vlnorm_verl import machine
from vlnorm_verl.cpu import PatchError, install, patches, vllm_plugin, zygote


def run_python(code: str, **environment: str) -> str:
    """stdout of a process of its own: platform and patches must not leak into other tests."""
    return warm.python("-c", code, check=True, **environment).stdout


def test_inactive_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    before = importlib.metadata.version
    monkeypatch.setattr(vllm_plugin, "MODULE", "types")  # without vLLM's function: it would raise
    install.register()
    vllm_plugin.register()
    assert importlib.metadata.version is before
    assert not install._registered


def test_platform_in_verl() -> None:
    """In one process: registered by verl's own plugin loading, usable, twice is once, never auto-detected."""
    run_python(
        """
import os, importlib.metadata, verl, torch
from verl.plugin.platform import PlatformRegistry, get_platform, platform_manager
from verl.utils.device import get_device_name, get_torch_device, get_device_id
import vlnorm_verl.cpu.install as install
first, version = PlatformRegistry.get("cpu"), importlib.metadata.version
install.register()
assert PlatformRegistry.get("cpu") is first and importlib.metadata.version is version
platform = get_platform()
assert platform.device_name == "cpu" and platform.is_available()
assert not platform.is_platform_available(use_smi_check=True) and not platform.is_platform_available()
assert get_device_name() == "cpu" and get_device_id() == torch.device("cpu")
assert torch.zeros(1).to(get_device_id()).device.type == "cpu"
device = get_torch_device()
device.synchronize(); device.empty_cache(); device.set_rng_state(device.get_rng_state())
assert device.memory_allocated() > 0 and device.mem_get_info()[0] > 0
del os.environ["VERL_PLATFORM"]
assert platform_manager._detect_platform_name() != "cpu"
""",
        VERL_PLATFORM="cpu",
    )


def test_patches_fit_verl_and_vllm() -> None:
    """In one process, since importing both takes longest.

    Each module of verl that is patched can be imported, and its name is changed before others import it; vLLM keeps a
    layer's weight; the names and the two calls that the watchdog relies on are in the installed verl.
    """
    run_python(
        """
import importlib, verl
from vlnorm_verl.cpu import patches
for name in patches.AFTER_IMPORT:
    importlib.import_module(name)
from verl.utils.distributed import initialize_global_process_group_ray as initialize
from verl.workers import engine_workers
assert engine_workers.initialize_global_process_group_ray is initialize
import os, torch
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
initialize()
torch.distributed.all_reduce(torch.ones(1))
from verl.workers.engine.fsdp import transformer_impl
assert transformer_impl.CPUOffloadPolicy(pin_memory=True).pin_memory is False
from verl.utils.fsdp_utils import fsdp2_sharded_load_from_cpu as load, fsdp2_sharded_save_to_cpu as save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
model = fully_shard(torch.nn.Linear(3, 2), mesh=init_device_mesh("cpu", (1,)))
before = [p.full_tensor().clone() for p in model.parameters()]
kept = save(model)
with torch.no_grad():
    for p in model.parameters():
        p.add_(1)  # as an optimizer step does
load(model, *kept)
assert all(torch.equal(p.full_tensor(), old) for p, old in zip(model.parameters(), before, strict=True))
torch.distributed.destroy_process_group()
from verl.utils.torch_functional import logprobs_from_logits
logits, labels = torch.randn(3, 5, 7, requires_grad=True), torch.randint(7, (3, 5))
expected = torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
assert torch.allclose(logprobs_from_logits(logits, labels), expected, atol=1e-6)
rounded = (20 * logits.detach()).bfloat16()
expected = torch.log_softmax(rounded, -1).gather(-1, labels[..., None])[..., 0]
assert torch.equal(logprobs_from_logits(rounded, labels), expected)
from verl.experimental.agent_loop import agent_loop
assert agent_loop.hydra.utils.instantiate({"_target_": "fractions.Fraction"}, numerator=3, denominator=6) * 2 == 1
assert agent_loop.hydra.utils.instantiate({"_target_": "fractions.Fraction", "numerator": 3}, denominator=6) * 2 == 1
from verl.workers.rollout.vllm_rollout import vllm_async_server as server
assert not server.SamplingParams(max_tokens=3, temperature=0.5).detokenize
assert server.SamplingParams(max_tokens=3, stop=["end"]).detokenize  # text is looked at

import torch
from vlnorm_verl.cpu import vllm_plugin
vllm_plugin.register(); vllm_plugin.register()
from vllm.model_executor.layers import utils
layer = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
assert layer.weight.shape == (64, 64)
x = torch.randn(4, 64)
assert torch.allclose(layer.cpu_linear(x, layer.weight, None), x @ layer.weight.T, atol=1e-5)

import inspect
from verl.workers.rollout.vllm_rollout import vllm_rollout
assert inspect.getsource(vllm_rollout.ServerAdapter.update_weights).count('"update_weights_from_ipc"') == 1
assert vllm_rollout.ServerAdapter._execute_method.__wrapped__ is not None
assert vllm_rollout.BucketedWeightSender._init_socket.__wrapped__ is not None
""",
        **cpu.cpu_environment(),
    )


@pytest.mark.parametrize(("stop", "sent"), [([], [1, 32, 17]), (["end"], [1] * 50)])
def test_tokens_are_sent_by_the_dozen(stop: list[str], sent: list[int]) -> None:
    """The first at once, the rest with the end; each with its own log-probability. Stop strings need every token."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
    from vllm.v1.outputs import LogprobsLists

    request = types.SimpleNamespace(num_output_tokens=0, sampling_params=SamplingParams(stop=stop))

    class Engine:  # vLLM's would need a model; its outputs are vLLM's own
        scheduler = types.SimpleNamespace(requests={"a": request}, has_requests=lambda: request.num_output_tokens < 50)

        def step(self) -> tuple[dict[int, EngineCoreOutputs], bool]:
            token = request.num_output_tokens = request.num_output_tokens + 1
            columns = (np.array([[token]]), np.array([[-token / 8]]), np.array([0]))
            end = FinishReason.LENGTH if token == 50 else None
            output = EngineCoreOutput("a", [token], LogprobsLists(*columns), finish_reason=end)
            return {0: EngineCoreOutputs(outputs=[output])}, True

    vllm_plugin.send_seldom(types.SimpleNamespace(EngineCore=Engine))
    engine = Engine()
    outputs = [output for _ in range(50) for output in engine.step()[0][0].outputs]
    assert [len(output.new_token_ids) for output in outputs] == sent
    assert [token for output in outputs for token in output.new_token_ids] == [*range(1, 51)]
    logprobs = np.concatenate([output.new_logprobs.logprobs for output in outputs])
    assert logprobs.tolist() == [[-token / 8] for token in range(1, 51)]
    assert outputs[-1].finished


def test_cached_files_are_no_used_memory_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils import cpu_resource_utils

    gib = 2**30
    monkeypatch.setattr(cpu_resource_utils, "get_cgroup_memory_limit", lambda: (8 * gib, 8 * gib))
    monkeypatch.setattr("ray._private.utils.get_used_memory", lambda: 4 * gib)
    assert cpu_resource_utils.get_memory_node_info(0).available_memory == 0
    vllm_plugin.without_cached_files(cpu_resource_utils)
    assert 0 < cpu_resource_utils.get_memory_node_info(0).available_memory <= 4 * gib


@pytest.mark.parametrize("patch", sorted(patches.AFTER_IMPORT.values(), key=lambda patch: patch.__name__))
def test_a_missing_name_is_loud(patch) -> None:
    with pytest.raises(PatchError, match="not found"):
        patch(types.ModuleType("verl.renamed"))


def test_a_missing_vllm_function_is_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setattr(vllm_plugin, "MODULE", "types")
    with pytest.raises(PatchError, match="dispatch_cpu_unquantized_gemm"):
        vllm_plugin.register()


def test_environment_is_complete() -> None:
    environment = cpu.cpu_environment(threads=3)
    assert environment["VERL_PLATFORM"] == "cpu"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert all(isinstance(value, str) for value in environment.values())


def test_threads_are_the_users_or_the_cpus_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cpus", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5})
    assert cpu.cpu_environment()["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(machine, "cpus", lambda: 2)
    assert cpu.cpu_environment()["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as modules of some clusters do
    assert cpu.cpu_environment()["OMP_NUM_THREADS"] == "1"
    assert cpu.cpu_environment(threads=4)["OMP_NUM_THREADS"] == "4"


# ---------------------------------------------------------------- weights between processes


def test_weights_travel_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two actor ranks and two rollout workers, a thread each, called in the order of verl's manager; two updates."""
    from vlnorm_verl.cpu import checkpoint_engine

    monkeypatch.setattr(checkpoint_engine.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(checkpoint_engine, "TIMEOUT", datetime.timedelta(seconds=120))
    engine_class = checkpoint_engine.CheckpointEngineRegistry.get("gloo")
    actors = [engine_class(bucket_size=0, is_master=rank == 0) for rank in range(2)]
    rollouts = [engine_class(bucket_size=0) for _ in range(2)]

    async def received(engine) -> dict[str, torch.Tensor]:
        return {name: weight async for name, weight in engine.receive_weights()}

    with ThreadPoolExecutor(4) as pool:
        for update in (1.0, 2.0):
            sent = {
                "matrix": torch.arange(6.0).view(2, 3).T * update,  # not contiguous
                "half": torch.tensor([update, math.nan], dtype=torch.bfloat16),
                "scalar": torch.tensor(update),
            }
            metadata = [engine.prepare() for engine in actors + rollouts]
            for_actors, for_rollouts = engine_class.build_topology(2, 2, metadata)
            joins = []
            for engines, arguments in ((actors, for_actors), (rollouts, for_rollouts)):
                for rank, engine in enumerate(engines):
                    own = {name: values[rank] for name, values in arguments.items()}
                    joins.append(pool.submit(engine.init_process_group, **own))
            [join.result(60) for join in joins]
            sends = [pool.submit(asyncio.run, engine.send_weights(iter(sent.items()))) for engine in actors]
            gets = [pool.submit(asyncio.run, received(engine)) for engine in rollouts]
            assert [send.result(60) for send in sends] == [{}, {}]
            for get in gets:
                weights = get.result(60)
                assert list(weights) == list(sent)
                for name, weight in sent.items():
                    torch.testing.assert_close(weights[name], weight, rtol=0, atol=0, equal_nan=True)
            for engine in actors + rollouts:
                engine.finalize()


# ---------------------------------------------------------------- watchdog


WATCHED = """
import os, time, ray, zmq
from vlnorm_verl.cpu import watchdog

@ray.remote(max_retries=0)
def fail():
    raise RuntimeError("EngineCore died unexpectedly")

@ray.remote
def update_for_ever():
    time.sleep(600)

watchdog.GRACE_S = 0.0
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
unanswered = zmq.Context().socket(zmq.REQ)
unanswered.bind("tcp://127.0.0.1:*")
# The limit is short for the last alone: a worker that Ray has to start first may take many seconds.
for update, limit in ((fail.remote(), "120"), (ray.put(None), "120"), (update_for_ever.remote(), "1")):
    os.environ[watchdog.TIMEOUT_VARIABLE] = limit
    for wait in (lambda socket: socket.send_pyobj({}), lambda socket: socket.recv()):
        try:
            wait(watchdog.WatchedSocket(unanswered, update))
        except watchdog.RolloutEngineError as error:
            print(str(error).replace(chr(10), " "))
"""


def test_watchdog_ends_a_wait_that_nobody_answers() -> None:
    """Because the engine failed, ended too early, or lives and does nothing; on real sockets and futures."""
    lines = run_python(WATCHED).splitlines()
    assert len(lines) == 6
    assert all("the rollout engine failed" in line and "EngineCore died unexpectedly" in line for line in lines[:2])
    assert all("ended its update before it had all weights" in line for line in lines[2:4])
    assert all("no answer from the rollout engine for 1 s (limit: VLNORM_WEIGHT" in line for line in lines[4:])


@pytest.mark.parametrize("text", ["0", "-3", "soon", "nan"])
def test_watchdog_refuses_a_bad_limit(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    watchdog = importlib.import_module("vlnorm_verl.cpu.watchdog")
    monkeypatch.setenv(watchdog.TIMEOUT_VARIABLE, text)
    with pytest.raises(ValueError, match=watchdog.TIMEOUT_VARIABLE):
        watchdog.timeout_s()


# ---------------------------------------------------------------- zygote


def test_zygote_imports_only_the_standard_library() -> None:
    path = Path(inspect.getfile(zygote))
    code = f"import runpy, sys; runpy.run_path({str(path)!r}); print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_zygote_forks_a_worker(tmp_path: Path) -> None:
    """Served by a zygote without preloads: command line, environment, folder, output and exit status arrive."""
    script = tmp_path / "work.py"
    script.write_text(
        "import os, sys\nprint(sys.argv[1:], os.environ['WORD'], os.getcwd(), os.getppid(), flush=True)\nsys.exit(7)\n"
    )
    server_code = "import os; from vlnorm_verl.cpu import zygote; zygote.PRELOAD = (); zygote.serve(os.getppid())"
    server = subprocess.Popen([sys.executable, "-c", server_code])
    try:
        wait_code = f"from vlnorm_verl.cpu import zygote as z; z.shadow(['-s', '-u', {str(script)!r}, 'a b'])"
        wait_for(lambda: zygote.socket_path(os.getpid())[1:] in Path("/proc/net/unix").read_text(), seconds=60)
        # One whose shadow is killed right after its request, before it has heard of its fork.
        killed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        killed.connect(zygote.socket_path(os.getpid()))
        zygote.receive(killed, len(zygote.GREETING))
        asked = {"arguments": [str(script)], "environment": {"WORD": ""}, "folder": str(tmp_path)}
        request = json.dumps(asked).encode()
        with open(os.devnull, "w") as nowhere:
            socket.send_fds(killed, [zygote.LENGTH.pack(len(request)) + request], [nowhere.fileno()] * 3)
        killed.close()
        result = subprocess.run(
            [sys.executable, "-c", wait_code],
            env={**os.environ, "WORD": "hello"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.kill()
        server.wait()
    assert result.returncode == 7, result.stderr
    # The server's pid as the parent: a shadow that fell back to a plain python would have its own.
    assert result.stdout.strip() == f"['a b'] hello {tmp_path} {server.pid}"


def test_zygote_ends_with_its_raylet() -> None:
    """Though nobody waits for that, so that it is a zombie; with a Python that has no os.pidfd_open, as conda's."""
    raylet = subprocess.Popen(["sleep", "600"])
    code = "import os, sys; from vlnorm_verl.cpu import zygote; zygote.PRELOAD = ()\nif hasattr(os, 'pidfd_open'):"
    code += " del os.pidfd_open\nzygote.serve(int(sys.argv[1]))"
    server = subprocess.Popen([sys.executable, "-c", code, str(raylet.pid)])
    try:
        wait_for(lambda: zygote.socket_path(raylet.pid)[1:] in Path("/proc/net/unix").read_text(), seconds=60)
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(1)
        raylet.kill()
        assert server.wait(60) == 0
        assert zygote.birth(raylet.pid) == b""
    finally:
        server.kill()
        server.wait()
        raylet.kill()
        raylet.wait()
    assert zygote.birth(raylet.pid) == b""
    assert zygote.birth(os.getpid())
