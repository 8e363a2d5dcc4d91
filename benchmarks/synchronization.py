"""What synchronizing costs: steps of one layer in two gloo processes of one thread each.

Run: .venv/bin/python benchmarks/synchronization.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from batchnorm.torch import BatchNorm2d

RANKS = 2


def main() -> None:
    """Measure in as many processes as there are ranks; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=4, default=(32, 256, 28, 28))
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, RANKS, is_master=True, wait_for_workers=False)
    settings = (store.port, tuple(arguments.shape), arguments.steps)
    multiprocessing.spawn(_measure, settings, RANKS)


def _measure(rank: int, port: int, shape: tuple[int, ...], steps: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, RANKS)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    x = torch.randn(shape, requires_grad=True)
    dy = torch.randn(shape)
    layers = {
        "alone": BatchNorm2d(shape[1]),
        "synchronized": BatchNorm2d(shape[1], synchronized=True),
        "alone, array code": BatchNorm2d(shape[1], fused=False),
        "synchronized, array code": BatchNorm2d(shape[1], fused=False, synchronized=True),
    }
    times: dict[str, list[float]] = {name: [] for name in layers}
    for step in range(steps + 3):
        for name, layer in layers.items():
            x.grad = None
            dist.barrier()
            begin = time.perf_counter()
            layer(x).backward(dy)
            seconds = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)  # a step is over when all ranks are
            if step >= 3:
                times[name].append(seconds.item() * 1e3)
    exchange = _exchange(shape[1], steps)
    if rank == 0:
        print(f"{RANKS} processes of 1 thread, {shape} float32 per rank, {steps} steps, medians")
        for name, found in times.items():
            low, _, high = statistics.quantiles(found, n=4)
            print(f"{name:26} {statistics.median(found):7.2f} ms ({low:.2f} to {high:.2f})")
        for kind in ("", ", array code"):
            ratios = [
                a / b
                for a, b in zip(times[f"synchronized{kind}"], times[f"alone{kind}"], strict=True)
            ]
            print(f"ratio{kind}: {statistics.median(ratios):.3f}")
        for name, found in exchange.items():
            print(f"{name:26} {statistics.median(found) * 1e3:7.0f} us")
    dist.destroy_process_group()


def _exchange(channels: int, steps: int) -> dict[str, list[float]]:
    """The exchange of one forward pass by itself, beside gloo's own collective."""
    from batchnorm.torch.exchange import find_peers

    peers = find_peers(None)
    assert peers is not None
    message = torch.randn(2 * channels + 1, dtype=torch.float64)
    parts = message.new_empty(RANKS * message.numel())
    runs = {
        "exchange": lambda: peers.gather(message, "measured", "measured"),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(parts, message),
        "all_reduce": lambda: dist.all_reduce(message.clone()),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(5 * steps):
        for name, run in runs.items():
            dist.barrier()
            begin = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return times


if __name__ == "__main__":
    main()
