"""Starts Ray's Python workers by forking one process that has imported everything already.

A verl run on one machine has about ten Python processes, each of which imports torch, transformers, verl and vLLM:
5 to 10 s of one core each, one after the other. Ray lets a run name its worker command
(`runtime_env.py_executable`); here that is this file, run as a script:

- the first worker of a run starts the zygote in the background and goes on as an ordinary `python`;
- the zygote imports PRELOAD once, then serves a Unix socket;
- every later worker sends its command line, environment, working directory and standard streams there, and the
  zygote forks a process that runs the command line. The process that Ray started stays as its shadow: it passes
  on SIGTERM, and ends with the same exit status.

If the zygote is not (or not yet, after WAIT_S) there, the worker is an ordinary `python`: slower, nothing else.
The zygote ends as soon as the raylet that it was started under has ended, or when it lost its socket.
Only processes of the same user are served. A fork has the first worker's libraries: variables that are read when a
library is loaded (OMP_NUM_THREADS, PYTHONPATH, VERL_USE_EXTERNAL_PLUGINS) are the zygote's there, whatever a
`runtime_env` says; processes that a fork spawns, vLLM's engine among them, get the worker's own.
Only the standard library is imported here, so that the shadow costs 20 ms.
"""

import array
import contextlib
import gc
import importlib
import itertools
import json
import os
import runpy
import signal
import socket
import struct
import sys
import time
from typing import NoReturn

PRELOAD = (
    "ray._private.workers.default_worker",
    "verl",
    "transfer_queue",
    "verl.trainer.ppo.v1",
    "verl.workers.engine_workers",
    "verl.workers.engine.fsdp.transformer_impl",
    "verl.workers.rollout.vllm_rollout.vllm_async_server",
    "verl.experimental.agent_loop",
    "verl.experimental.reward_loop",
)
WAIT_S = 30.0  # for a zygote that is still importing
END_S = 5.0  # for workers that lost their raylet
GREETING = b"!"
LENGTH = struct.Struct("!I")


def socket_path(raylet: int) -> str:
    """One zygote per user and raylet, in the abstract namespace: nothing to clean up."""
    return f"\0vlnorm-zygote-{os.getuid()}-{raylet}"


def plain_python(arguments: list[str]) -> NoReturn:
    os.execv(sys.executable, [sys.executable, *arguments])


def is_own(connection: socket.socket) -> bool:
    """Whether the other side runs as this user: an abstract socket has no file permissions."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return bool(uid == os.getuid())


def receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the other side closed the connection")
        data += part
    return data


# ---------------------------------------------------------------- the shadow (what Ray starts)


def shadow(arguments: list[str]) -> NoReturn:
    """Run `python *arguments` as a fork of the zygote; start the zygote if there is none."""
    raylet = os.getppid()  # setup_worker.py ends in exec, so the parent is still the raylet
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(socket_path(raylet))
    except OSError:
        start_zygote(raylet)
        plain_python(arguments)
    if not is_own(connection):
        plain_python(arguments)
    request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    streams = array.array("i", [0, 1, 2])
    try:
        connection.settimeout(WAIT_S)
        receive(connection, len(GREETING))  # only now is the zygote going to read the request
        connection.settimeout(None)
        connection.sendmsg([LENGTH.pack(len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(request)
        (pid,) = LENGTH.unpack(receive(connection, LENGTH.size))
    except OSError:
        plain_python(arguments)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    try:
        (status,) = LENGTH.unpack(receive(connection, LENGTH.size))
    except OSError:
        status = 1  # the zygote was killed; its forks end with the raylet
    os._exit(status)


def start_zygote(raylet: int) -> None:
    """Start the zygote with this process's environment and log, as nobody's child: Ray kills a worker's children."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    os.execv(sys.executable, [sys.executable, "-m", "vlnorm_verl.cpu.zygote", "--serve", str(raylet)])


# ---------------------------------------------------------------- the zygote


def birth(pid: int) -> bytes:
    """When a process was started, b"" if it has ended, also as a zombie. With its pid this is no other process.

    Not os.pidfd_open: conda's Python and kernels before 5.3 have none.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            state, *fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return b""
    return b"" if state in b"ZX" else fields[18]  # field 22 of proc(5)


def serve(raylet: int) -> None:
    """Bind first (the socket is the lock), import, then fork on request until the raylet has ended."""
    if not (born := birth(raylet)):
        return
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(socket_path(raylet))
    except OSError:
        return  # another worker's zygote was faster
    server.listen(64)
    for name in PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # keep the collector from touching (copying) the shared pages in every fork
    server.settimeout(0.2)
    shadows: dict[int, socket.socket] = {}  # pid of a fork -> connection to its shadow
    while birth(raylet) == born:
        report_ended(shadows)
        kill_orphans(shadows)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        if not is_own(connection):
            connection.close()
            continue
        try:
            fork_worker(connection, server, shadows)
        except (OSError, ValueError) as error:
            print(f"vlnorm zygote: a worker's request failed: {error}", file=sys.stderr, flush=True)
            connection.close()
    end_forks(shadows)


def end_forks(shadows: dict[int, socket.socket]) -> None:
    """The raylet has ended, and the workers end by themselves; kill those that do not within END_S."""
    deadline = time.monotonic() + END_S
    while shadows and time.monotonic() < deadline:
        report_ended(shadows)
        time.sleep(0.05)
    for pid in shadows:
        kill_group(pid)
        os.waitpid(pid, 0)


def kill_group(pid: int) -> None:
    """A fork and what it started: it leads a process group (run_worker), and vLLM's engine is its child."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def kill_orphans(shadows: dict[int, socket.socket]) -> None:
    """End the forks whose shadow was killed: Ray kills the process that it started, and means the worker."""
    for pid, connection in shadows.items():
        with contextlib.suppress(BlockingIOError, ConnectionError):
            if connection.recv(1, socket.MSG_PEEK) == b"":
                kill_group(pid)


def report_ended(shadows: dict[int, socket.socket]) -> None:
    """Tell the shadows of forks that have ended their exit status (128 + signal number for a killed one)."""
    while shadows:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        code = os.waitstatus_to_exitcode(status)
        connection = shadows.pop(pid, None)
        if connection is None:  # a process that one of PRELOAD left behind
            continue
        with contextlib.suppress(OSError):  # the shadow is gone already if Ray killed it
            connection.sendall(LENGTH.pack(code if code >= 0 else 128 - code))
        connection.close()


def fork_worker(connection: socket.socket, server: socket.socket, shadows: dict[int, socket.socket]) -> None:
    connection.settimeout(5.0)
    connection.sendall(GREETING)
    streams = array.array("i")
    head, control, _, _ = connection.recvmsg(LENGTH.size, socket.CMSG_SPACE(3 * streams.itemsize))
    if len(head) != LENGTH.size or not control:
        raise ValueError("incomplete request")
    streams.frombytes(control[0][2][: 3 * streams.itemsize])
    try:
        request = json.loads(receive(connection, LENGTH.unpack(head)[0]))
        pid = os.fork()
        if pid == 0:
            server.close()
            for other in shadows.values():
                other.close()
            connection.close()
            run_worker(request, streams)
    finally:
        for stream in streams:
            os.close(stream)
    shadows[pid] = connection
    with contextlib.suppress(OSError):  # a shadow that was killed meanwhile: kill_orphans sees it
        connection.sendall(LENGTH.pack(pid))
    connection.setblocking(False)  # from here on it is only looked at (kill_orphans) and gets four bytes at the end


def run_worker(request: dict, streams: array.array) -> NoReturn:
    """In the fork: become what `python *arguments` would have been, then end."""
    os.setsid()
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    # Python's own options: -u, and -s where the driver has it (PYTHONNOUSERSITE; ray/_private/services.py:1819).
    arguments = list(itertools.dropwhile(lambda argument: argument.startswith("-"), request["arguments"]))
    sys.argv = arguments
    sys.path[0] = os.path.dirname(arguments[0])
    import numpy

    numpy.random.seed()  # else all forks draw the same numbers; Python's own random re-seeds itself
    code = 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]))
    else:
        shadow(sys.argv[1:])
