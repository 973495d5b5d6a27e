"""verl's checkpoint engine over gloo: weights from the trainer to rollout engines that live in processes of their own.

The trainers that keep rollout and training apart (V1 separate_async, one_step_off_policy, fully_async_policy) need one;
those of verl move weights with CUDA or NPU libraries. Used by verl's own setting, without a patch:

    actor_rollout_ref.rollout.checkpoint_engine.backend=gloo
    actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=vlnorm_verl.cpu.checkpoint_engine

One broadcast a parameter from rank 0 of the actor, in a process group of its own that lives for one update. Meant for
small models on one machine: nothing is bucketed or overlapped.

Base class and order of calls: verl 0.9.1, checkpoint_engine/base.py:116 and :510.
"""

import asyncio
import datetime
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import ray
import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

TIMEOUT = datetime.timedelta(seconds=300)
Address = tuple[str, int, int]  # host and port of rank 0's store, number of the update


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Args: bucket_size is not used. is_master: whether this is rank 0 of the actor, which has the store."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self.store: TCPStore | None = None
        self.updates = 0
        self.group: ProcessGroupGloo | None = None  # None on the actor's other ranks

    def prepare(self) -> Address | None:
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        if self.store is None:
            self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        self.updates += 1
        return host, self.store.port, self.updates

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Address | None]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        address, size = metadata[0], rollout_world_size + 1

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            return {"rank": ranks, "world_size": [size] * len(ranks), "address": [address] * len(ranks)}

        return arguments([0] + [-1] * (actor_wg_world_size - 1)), arguments(list(range(1, size)))

    def init_process_group(self, rank: int, world_size: int, address: Address) -> None:
        if rank < 0:
            return
        host, port, update = address
        if self.store is None:
            self.store = TCPStore(host, port, is_master=False, timeout=TIMEOUT)
        self.group = ProcessGroupGloo(PrefixStore(f"update {update}", self.store), rank, world_size, TIMEOUT)

    def finalize(self) -> None:
        self.group = None

    @torch.no_grad()
    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, Any]:
        # Every rank goes through the parameters: gathering each one is a collective of the actor's ranks.
        for name, weight in weights:
            if self.group is not None:
                weight = weight.detach().cpu().contiguous()
                self._send_header((name, list(weight.shape), str(weight.dtype).removeprefix("torch.")))
                self._broadcast(weight.view(-1).view(torch.uint8))
        if self.group is not None:
            self._send_header(None)
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        # In a thread: the worker has to answer Ray meanwhile.
        while (header := await asyncio.to_thread(self._receive_header)) is not None:
            name, shape, dtype = header
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            await asyncio.to_thread(self._broadcast, weight.view(-1).view(torch.uint8))
            yield name, weight

    def _broadcast(self, data: torch.Tensor) -> None:
        assert self.group is not None
        self.group.broadcast(data, 0).wait()

    def _send_header(self, header: tuple[str, list[int], str] | None) -> None:
        data = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
        self._broadcast(torch.tensor([data.numel()]))
        self._broadcast(data)

    def _receive_header(self) -> tuple[str, list[int], str] | None:
        size = torch.empty(1, dtype=torch.int64)
        self._broadcast(size)
        data = torch.empty(int(size), dtype=torch.uint8)
        self._broadcast(data)
        header: tuple[str, list[int], str] | None = json.loads(data.numpy().tobytes())
        return header
