"""One interpreter that has imported what verl imports, forked for each program of the tests.

`import verl` takes six seconds of CPU in a fresh interpreter, nearly all of them for other packages; here, one. verl
itself and this package are imported by the program alone: how that goes is what some programs are about. A fork that
is asked for an environment sees it as a new interpreter would, but for what torch and OpenMP read when they are loaded:
one thread, no compiler.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
PACKAGES = (
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.profiler"),
    *("torch.distributed.tensor.parallel", "torch.utils.tensorboard", "torch._inductor.config"),
    *("tensordict", "transformers", "transformers.models.qwen2.modeling_qwen2", "transformers.trainer_pt_utils"),
    *("transformers.models.auto.modeling_auto", "ray", "ray.util.placement_group", "hydra", "peft", "accelerate"),
    *("datasets", "pandas", "networkx", "einops", "torchdata.stateful_dataloader", "numpy", "yaml", "triton"),
)


def python(
    *arguments: str, timeout: float = 300, cwd: Path = REPOSITORY, check: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What `python *arguments` does: `-c CODE` or `-m MODULE …`, with this process's environment and more.

    Raises:
        AssertionError: with `check`, it failed.
        subprocess.TimeoutExpired: it and what it started were killed.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "arguments": arguments,
            "cwd": str(cwd),
            "environment": {**os.environ, **environment},
            "folder": folder,
        }
        server.stdin.write(json.dumps(request).encode() + b"\n")
        pid = int(_line(server, 60))
        try:
            code = int(_line(server, timeout))
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            _line(server, 60)
            raise subprocess.TimeoutExpired(arguments, timeout) from None
        out, err = ((Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    assert code == 0 or not check, out[-2000:] + err[-4000:]
    return subprocess.CompletedProcess(arguments, code, out, err)


def results(program: str, *options: str, **environment: str) -> Any:
    """What a program of tests/engine writes to --out."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        python("-m", f"tests.engine.{program}", *options, "--out", str(out), timeout=500, check=True, **environment)
        return json.loads(out.read_text())


@functools.cache
def _server() -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "tests.warm"]
    # Unbuffered: `select` would not see a second line that was read along with the first.
    server = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    atexit.register(_end, server)
    _line(server, 600)  # its imports are done
    return server


def _end(server: Any) -> None:
    server.stdin.close()
    server.wait()  # so that what the programs took is in this process's times


def _line(server: Any, timeout: float) -> bytes:
    ready, _, _ = select.select([server.stdout], [], [], timeout)
    if not ready:
        raise TimeoutError
    return server.stdout.readline()


def serve() -> None:
    """Answer requests until there are no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except Exception:  # not every release of verl comes with all of them; a program that needs it will say so
            continue
    gc.freeze()  # else a collection in a fork would copy all pages
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            error: BaseException | None = None
            try:
                become(**json.loads(line))
            except BaseException as raised:
                error = raised
            code = exit_code(error)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # taking all modules apart, as an interpreter does at its end, takes a second
        print(pid, file=replies, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, file=replies, flush=True)


def become(arguments: list[str], cwd: str, environment: dict[str, str], folder: str) -> None:
    """The process that was asked for: its files, environment and paths, then the program."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path[0] = cwd  # as for `python -m` and `python -c`
    sys.path[1:1] = [entry for entry in environment.get("PYTHONPATH", "").split(":") if entry not in sys.path]
    option, program, *rest = arguments
    sys.argv = [option if option == "-c" else program, *rest]
    if option == "-c":
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def exit_code(error: BaseException | None) -> int:
    """Of a program that ended so, whose message a Python interpreter would print."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


if __name__ == "__main__":
    serve()
    os._exit(0)
