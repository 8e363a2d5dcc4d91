"""Time saved if a synchronized layer's exchange overlaps with other work of a backward pass.

Two gloo processes of one thread each run backward through blocks of a matrix product and a
synchronized normalization, in three orders:

in turn               gradients of a block's weights are added over ranks before anything else
reduction in flight   that runs while the next block's backward pass does, as in
                      DistributedDataParallel
exchange in flight    also, the product for the gradient of a block's weights is put off until
                      the next exchange of statistics is on its way, and computed meanwhile

The last one is a prototype: it reaches into the exchange, and autograd has no place for it.

Run: .venv/bin/python benchmarks/overlap.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from batchnorm.torch import BatchNorm
from batchnorm.torch.ranks.messages import Peers

RANKS = 2
WARM_UP = 3


def main() -> None:
    """Measure in as many processes as there are ranks; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=6272)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, RANKS, is_master=True, wait_for_workers=False)
    multiprocessing.spawn(_measure, (store.port, arguments), RANKS)


class Block:
    """y = norm(x @ weight), with a backward pass in parts."""

    def __init__(self, channels: int) -> None:
        self.weight = torch.randn(channels, channels) / channels**0.5
        self.norm = BatchNorm(channels, synchronized=True)

    def forward(self, x: Tensor) -> Tensor:
        """y; the block keeps the tensors that the backward pass needs."""
        self.x = x
        self.u = (x @ self.weight).requires_grad_()
        self.y = self.norm(self.u)
        return self.y.detach()

    def normalization(self, dy: Tensor) -> Tensor:
        """The gradient of the norm's input."""
        return torch.autograd.grad(self.y, self.u, dy)[0]


def in_turn(blocks: list[Block], dy: Tensor) -> list[Tensor]:
    """Gradients of the weights."""
    found = []
    for block in reversed(blocks):
        du = block.normalization(dy)
        found.append(block.x.T @ du)
        dist.all_reduce(found[-1])
        dy = du @ block.weight.T
    return found


def reduction_in_flight(blocks: list[Block], dy: Tensor) -> list[Tensor]:
    """Gradients of the weights, as `in_turn` gives them."""
    found, works = [], []
    for block in reversed(blocks):
        du = block.normalization(dy)
        found.append(block.x.T @ du)
        works.append(dist.all_reduce(found[-1], async_op=True))
        dy = du @ block.weight.T
    for work in works:
        work.wait()
    return found


def exchange_in_flight(blocks: list[Block], dy: Tensor) -> list[Tensor]:
    """Gradients of the weights, as `in_turn` gives them."""
    found: list[Tensor] = []
    works: list[Any] = []
    pending: list[tuple[Block, Tensor]] = []

    def finish() -> None:
        for block, du in pending:
            found.append(block.x.T @ du)
            works.append(dist.all_reduce(found[-1], async_op=True))
        pending.clear()

    with _while_waiting(finish):
        for block in reversed(blocks):
            du = block.normalization(dy)
            pending.append((block, du))
            dy = du @ block.weight.T
    finish()
    for work in works:
        work.wait()
    return found


ORDERS = {
    "in turn": in_turn,
    "reduction in flight": reduction_in_flight,
    "exchange in flight": exchange_in_flight,
}


@contextmanager
def _while_waiting(task: Callable[[], None]) -> Iterator[None]:
    """`task` runs in every exchange, once this rank's message is on its way."""
    send = Peers.send

    def send_and_work(*arguments: Any) -> None:
        send(*arguments)
        task()

    Peers.send = send_and_work  # type: ignore[method-assign]
    try:
        yield
    finally:
        Peers.send = send  # type: ignore[method-assign]


def _measure(rank: int, port: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, RANKS)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    blocks = [Block(arguments.channels) for _ in range(arguments.blocks)]
    torch.manual_seed(rank)
    x, dy = (torch.randn(arguments.rows, arguments.channels) for _ in range(2))
    times: dict[str, list[float]] = {name: [] for name in ORDERS}
    for step in range(arguments.steps + WARM_UP):
        expected: list[Tensor] = []
        for name, run in ORDERS.items():
            y = x
            for block in blocks:
                y = block.forward(y)
            dist.barrier()
            begin = time.perf_counter()
            found = run(blocks, dy)
            seconds = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)  # over when all ranks are
            expected = expected or found
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
            if step >= WARM_UP:
                times[name].append(seconds.item() * 1e3)
    if rank == 0:
        _report(times, arguments)
    dist.destroy_process_group()


def _report(times: dict[str, list[float]], arguments: argparse.Namespace) -> None:
    shape = f"{arguments.blocks} blocks of ({arguments.rows}, {arguments.channels}) per rank"
    print(f"{RANKS} processes of 1 thread, {shape}, {arguments.steps} steps, medians")
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        ratios = [a / b for a, b in zip(found, times["in turn"], strict=True)]
        ratio = statistics.median(ratios)
        print(f"{name:20} {middle:7.2f} ms ({low:.2f} to {high:.2f}), {ratio:.3f} of the first")


if __name__ == "__main__":
    main()
