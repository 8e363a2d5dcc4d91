"""Processes that form a gloo group of torch.distributed, and what runs in them."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from narrow_device import register
from processes import World

PATIENCE = 60.0  # seconds, where no rank is meant to fail


def make_world(size: int, timeout: float = PATIENCE) -> World:
    return World(size, start, stop, timeout)


def start(rank: int, size: int, address: int | None, timeout: float) -> int:
    """Meet at the store of rank 0, whose port is the address; `join` then forms a group."""
    register()  # before any backward pass
    warnings.simplefilter("error")
    for category in (DeprecationWarning, FutureWarning):  # of torch's own imports
        warnings.filterwarnings("ignore", "`torch.jit.*` is deprecated", category)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # these processes may have no children
    wait = timedelta(seconds=timeout)
    store = dist.TCPStore(
        "127.0.0.1",
        address or 0,
        size,
        is_master=rank == 0,
        timeout=timedelta(seconds=PATIENCE),
        wait_for_workers=False,
    )
    _join.update(store=store, rank=rank, size=size, timeout=wait)
    return store.port


def join(generation: int = 0) -> None:
    """Form the default group, once more after it has been destroyed."""
    if dist.is_initialized():
        return
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"generation{generation}", _join["store"]),
        rank=_join["rank"],
        world_size=_join["size"],
        timeout=_join["timeout"],
    )


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


_join: dict[str, Any] = {}
