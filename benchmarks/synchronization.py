"""The cost of synchronizing: steps of one layer in two gloo processes of one thread each.

Steps follow each other, as in training. A barrier before each would be part of what is measured:
it lets ranks go at different times, and only a synchronized step waits for the later one. The
table of parts says by how much, and where the rest of a step goes.

Run: .venv/bin/python benchmarks/synchronization.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from batchnorm.torch import BatchNorm2d
from batchnorm.torch.ranks.messages import Peers

RANKS = 2
TOGETHER = 5  # steps between barriers
PARTS = ("moments", "exchange forward", "normalize", "reduce", "exchange backward", "apply")


def main() -> None:
    """Measure in as many processes as there are ranks; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=4, default=(32, 256, 28, 28))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pin", action="store_true", help="each process to a core of its own")
    parser.add_argument("--plain", action="store_true", help="array code instead of the kernels")
    arguments = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, RANKS, is_master=True, wait_for_workers=False)
    multiprocessing.spawn(_measure, (store.port, arguments), RANKS)


def _measure(rank: int, port: int, arguments: argparse.Namespace) -> None:
    shape, steps = tuple(arguments.shape), arguments.steps
    if arguments.pin:
        os.sched_setaffinity(0, {rank})
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, RANKS)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    x = (torch.randn(shape) + rank).requires_grad_()
    dy = torch.randn(shape)
    fused = False if arguments.plain else None
    layers = {
        "alone": BatchNorm2d(shape[1], fused=fused),
        "synchronized": BatchNorm2d(shape[1], fused=fused, synchronized=True),
    }
    _check(layers["synchronized"], x)
    times = _find_times(layers, x, dy, steps)
    parts = _find_parts(layers["synchronized"], x, dy, steps)
    if rank == 0:
        path = "array code" if arguments.plain else "kernels"
        where = ", pinned to cores" if arguments.pin else ""
        print(f"{RANKS} processes of 1 thread{where}, {shape} float32 per rank, {path}")
        print(f"{steps} steps, medians (quartiles)")
        _print_times(times)
        _print_parts(parts)
    dist.destroy_process_group()


def _check(layer: BatchNorm2d, x: Tensor) -> None:
    """Over all ranks, and on none of them, outputs have mean 0 and variance 1."""
    y = layer(x).detach().double()
    own = torch.stack([y.mean(), y.square().mean()])
    every = own.clone()
    dist.all_reduce(every)
    wanted = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(every / RANKS, wanted, rtol=1e-4, atol=1e-4)
    assert own[0].abs() > 0.1


def _find_times(
    layers: dict[str, BatchNorm2d], x: Tensor, dy: Tensor, steps: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in layers}
    for block in range(steps // TOGETHER + 1):
        for name, layer in layers.items():
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(TOGETHER):
                x.grad = None
                layer(x).backward(dy)
            seconds = torch.tensor((time.perf_counter() - begin) / TOGETHER)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)  # a step is over when all ranks are
            if block > 0:
                times[name].append(seconds.item() * 1e3)
    return times


def _print_times(times: dict[str, list[float]]) -> None:
    for name, found in times.items():
        low, middle, high = statistics.quantiles(found, n=4)
        print(f"{name:26} {middle:7.2f} ms ({low:.2f} to {high:.2f})")
    pairs = zip(times["synchronized"], times["alone"], strict=True)
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    print(f"{'ratio':26} {middle:7.3f}    ({low:.3f} to {high:.3f})")


def _find_parts(layer: BatchNorm2d, x: Tensor, dy: Tensor, steps: int) -> Tensor:
    """When each rank begins a step behind a barrier, and ends each part: (steps, ranks, times)."""
    marks: list[float] = []
    receive = Peers.receive

    def marked(*arguments: Any) -> Tensor:
        marks.append(time.perf_counter())
        found = receive(*arguments)
        marks.append(time.perf_counter())
        return found

    Peers.receive = marked  # type: ignore[method-assign]
    found = []
    for _ in range(steps):
        x.grad = None
        dist.barrier()
        marks[:] = [time.perf_counter()]
        y = layer(x)
        marks.append(time.perf_counter())
        y.backward(dy)
        mine = torch.tensor([*marks, time.perf_counter()], dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(RANKS)]
        dist.all_gather(every, mine)
        found.append(torch.stack(every))
    Peers.receive = receive  # type: ignore[method-assign]
    return torch.stack(found) * 1e3


def _print_parts(times: Tensor) -> None:
    """Medians over steps: the ranks' mean time in a part, and the delay between their ends."""
    late = times.amax(1) - times.amin(1)
    lasts = times.diff(dim=2).mean(1).median(0).values
    print(f"late out of the barrier    {late[:, 0].median():7.2f} ms")
    for i, name in enumerate(PARTS):
        print(f"{name:26} {lasts[i]:7.2f} ms, then {late[:, i + 1].median():.2f} ms apart")
        if name.startswith("exchange"):
            # From when the later rank is ready until the first one has both messages.
            latency = times[:, :, i + 1].amin(1) - times[:, :, i].amax(1)
            print(f"  without waiting          {latency.median():7.2f} ms")


if __name__ == "__main__":
    main()
