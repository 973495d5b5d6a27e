"""Ends a run whose rollout engine died inside a weight sync, with the cause.

verl's sender waits for the engine without a limit (workers/rollout/vllm_rollout/bucketed_weight_transfer.py:136,
164, 197: `socket.send_pyobj`, `socket.recv`), while the error of the engine sits unread in the Ray future of
`update_weights_from_ipc` (vllm_rollout.py:229, 244). So the sender's socket is wrapped: every wait is cut into slices,
and after each slice the future is looked at. It is ready before the sender is done only if the update failed: an
exception in the engine, a dead engine process, a dead Ray actor.

VLNORM_WEIGHT_SYNC_TIMEOUT_S (default 300) bounds a single wait for an engine that lives but does not answer.
"""

import asyncio
import functools
import os
import time
from typing import Any

import ray
import wrapt
import zmq

from vlnorm_verl.cpu import PatchError

SLICE_S = 0.5  # between two looks at the engine
GRACE_S = 5.0  # an engine that finished well may be ahead of its last acknowledgement
TIMEOUT_VARIABLE = "VLNORM_WEIGHT_SYNC_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 300.0


class RolloutEngineError(RuntimeError):
    """The rollout engine failed, died or did not answer during a weight sync."""


def timeout_s() -> float:
    """Seconds from the environment; raises ValueError if it is not a positive number."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{TIMEOUT_VARIABLE}={text!r}: a positive number of seconds is needed")
    return seconds


class WatchedSocket(wrapt.ObjectProxy):
    """A zmq socket whose send_pyobj and recv give up when `update` (a Ray future) shows that the engine failed."""

    def __init__(self, socket: Any, update: Any) -> None:
        super().__init__(socket)
        self._self_update = update
        self._self_timeout_s = timeout_s()

    def send_pyobj(self, obj: Any) -> Any:
        self._wait(zmq.POLLOUT)  # type: ignore[attr-defined]
        return self.__wrapped__.send_pyobj(obj)

    def recv(self) -> Any:
        self._wait(zmq.POLLIN)  # type: ignore[attr-defined]
        return self.__wrapped__.recv()

    def _wait(self, event: int) -> None:
        start = time.monotonic()
        finished_at = None
        while not self.__wrapped__.poll(int(SLICE_S * 1000), event):
            now = time.monotonic()
            if self._self_update is not None and self._is_update_over():
                finished_at = finished_at or now
                if now - finished_at > GRACE_S:
                    raise RolloutEngineError(
                        "weight sync: the rollout engine ended its update before it had all weights"
                    )
            if now - start > self._self_timeout_s:
                raise RolloutEngineError(
                    f"weight sync: no answer from the rollout engine for {self._self_timeout_s:.0f} s "
                    f"(limit: {TIMEOUT_VARIABLE})"
                )

    def _is_update_over(self) -> bool:
        ready, _ = ray.wait([self._self_update], timeout=0)
        if not ready:
            return False
        try:
            ray.get(ready[0])
        except Exception as error:
            raise RolloutEngineError(f"weight sync: the rollout engine failed: {error}") from error
        return True


def patch_server_adapter(module: Any) -> None:
    """Patch verl.workers.rollout.vllm_rollout.vllm_rollout: hand the future to the sender, watch its socket."""
    for owner, name in (("ServerAdapter", "_execute_method"), ("BucketedWeightSender", "_init_socket")):
        if not hasattr(getattr(module, owner, None), name):
            raise PatchError(f"verl: {module.__name__}.{owner}.{name} not found; the watchdog cannot be set up")

    adapter_cls, sender_cls = module.ServerAdapter, module.BucketedWeightSender
    execute_method, init_socket = adapter_cls._execute_method, sender_cls._init_socket
    updates: dict[str, Any] = {}  # zmq address -> future of the running update

    @functools.wraps(execute_method)
    async def remember_update(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        result = await execute_method(self, method, *args, **kwargs)
        if method == "update_weights_from_ipc":
            updates[self.zmq_handle] = result  # None on a rank that has no server of its own
        return result

    @functools.wraps(init_socket)
    def watch_socket(self: Any) -> None:
        init_socket(self)
        self.socket = WatchedSocket(self.socket, updates.pop(self.zmq_handle, None))

    adapter_cls._execute_method = remember_update
    sender_cls._init_socket = watch_socket


def patch_server(module: Any) -> None:
    """Patch verl.workers.rollout.vllm_rollout.vllm_async_server: a call to a dead engine fails.

    vLLM does not end the calls that were under way when its engine process died (vllm/v1/engine/core_client.py:1131
    awaits a future that nobody sets), so the Ray future above would never be ready.
    """
    collective_rpc = getattr(getattr(module, "vLLMHttpServer", None), "collective_rpc", None)
    if collective_rpc is None:
        raise PatchError(f"verl: {module.__name__}.vLLMHttpServer.collective_rpc not found; no watchdog")

    @functools.wraps(collective_rpc)
    async def fail_if_dead(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = asyncio.ensure_future(collective_rpc(self, *args, **kwargs))
        while not (await asyncio.wait({call}, timeout=SLICE_S))[0]:
            if self.engine.errored:
                call.cancel()
                raise RolloutEngineError(f"the vLLM engine process died: {self.engine.dead_error}")
        return call.result()

    module.vLLMHttpServer.collective_rpc = fail_if_dead
