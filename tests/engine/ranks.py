"""The processes of the engine programs: options, environment, one process a rank."""

import argparse
import functools
import importlib
import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.engine import older_verl
from vlnorm_verl import cpu
from vlnorm_verl.cpu.install import register as register_cpu


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that scenarios.py and features.py share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, required=True, choices=[1, 2, 4])
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16"], required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", choices=["nccl", "gloo"], default="nccl", help="of the ranks on GPUs")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--out", required=True, help="JSON file to write")
    return parser


def start(run: Callable[[int, argparse.Namespace], None], args: argparse.Namespace) -> None:
    """run(rank, args) in a process for each rank."""
    with tempfile.TemporaryDirectory() as folder:
        args.folder, args.port = folder, free_port()
        # CUDA does not survive a fork. Elsewhere a rank would spend longer on importing verl than on its gradients.
        method = "fork" if args.device == "cpu" else "spawn"
        torch.multiprocessing.start_processes(run, (args,), nprocs=args.ranks, start_method=method)


def prepare(args: argparse.Namespace) -> None:
    """verl and what the command line asks for beside it. Before forking, and in every rank."""
    import_verl(args.device)
    if getattr(args, "load", None):
        importlib.import_module(args.load)


@functools.cache
def import_verl(device: str) -> None:
    """verl for that device, once: forked ranks have it already."""
    import_without_engines(device)
    if older_verl.needed():
        older_verl.prepare()
    importlib.import_module("verl.workers.engine_workers")


def import_without_engines(device: str) -> None:
    """verl.workers.engine imports every engine whose package it finds, so other_engines.py puts that off."""
    set_environment(device)
    importlib.import_module("verl")
    if not older_verl.needed():
        # With VERL_USE_EXTERNAL_PLUGINS=none the plugin is off, but the CPU still has to be a platform.
        register_cpu()
    older_verl.unpad_without_flash_attn()


def set_environment(device: str) -> None:
    """What verl reads at import. On GPUs no kernel that computes in float32 whatever the type."""
    if device == "cuda":
        os.environ.update(VERL_DISABLE_FLASH_ATTN_CE="1", TORCHDYNAMO_DISABLE="1")
    elif older_verl.needed():
        os.environ.update(OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
    else:
        os.environ.update(cpu.cpu_environment(threads=1))
    torch.set_num_threads(1)  # a pool of threads would not survive a fork


def join(rank: int, args: argparse.Namespace) -> None:
    """Environment, device and, where it is not verl's default, process group of this rank."""
    shared = args.device == "cuda" and torch.cuda.device_count() < args.ranks
    local = "0" if shared else str(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=local, WORLD_SIZE=str(args.ranks), LOCAL_WORLD_SIZE=str(args.ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    if args.device == "cuda":
        torch.cuda.set_device(int(local))
    if shared:
        # NCCL refuses two ranks of one host on one GPU: each is a host of its own, and they meet over loopback.
        os.environ.update(NCCL_HOSTID=f"rank-{rank}", NCCL_P2P_DISABLE="1", NCCL_SHM_DISABLE="1")
        os.environ.update(NCCL_NET="Socket", NCCL_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
    if args.backend == "gloo" and args.device == "cuda":
        # verl would ask for nccl; it takes a group that is there.
        torch.distributed.init_process_group("cpu:gloo,cuda:gloo", rank=rank, world_size=args.ranks)


def finish(rank: int, args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    if rank == 0:
        Path(args.out).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
