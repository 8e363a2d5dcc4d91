"""Training steps of this library and of torch, interleaved in one run, each checked first.

    python benchmarks/run.py            # prints, and writes benchmarks/results/torch-plain.json

Times are medians of whole steps (forward, backward) in milliseconds; only their ratios to torch's
in the same run mean anything. "pack" is torch's layer on x[mask], scattered back.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.torch import BatchNorm
from cases import OFFSETS, SHAPES

RESULTS = Path(__file__).parent / "results" / "torch-plain.json"
SECONDS = 4.0  # of measurement for each variant of a shape


def main() -> None:
    """Measure, print, write."""
    torch.manual_seed(0)
    record = {
        "command": "python benchmarks/run.py",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "batchnorm": batchnorm.__version__},
        "error of y, float32 (4096, 8), std 1": {f"{m:g}": accuracy(m) for m in OFFSETS},
        "training step, ms": {name: speed(shape) for name, shape in SHAPES.items()},
    }
    print(json.dumps(record, indent=2))
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


def accuracy(mean: float) -> dict[str, float]:
    """Largest |y - float64| in training mode."""
    x = torch.randn(4096, 8) + mean
    expected, _ = batchnorm.batch_norm(x.numpy(), axis=1)
    layers = {"torch": nn.BatchNorm1d(8), "plain": BatchNorm(8), "compiled": _compiled(8)}
    return {
        name: float(f"{(layer(x).detach().double() - torch.tensor(expected)).abs().max():.1e}")
        for name, layer in layers.items()
    }


def speed(shape: tuple[int, ...]) -> dict[str, Any]:
    """Median milliseconds of each variant, and their ratio to torch's."""
    variants = _variants(shape)
    steps = {name: step for name, (step, _) in variants.items()}
    for name, (step, expected) in variants.items():
        _check(name, step(), expected)
    start = time.perf_counter()
    for step in steps.values():
        step()
    rounds = max(5, min(200, int(SECONDS * len(steps) / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        name: {
            "median": round(median, 3),
            "quartiles": [round(q, 3) for q in statistics.quantiles(times[name])[::2]],
            "ratio to torch": round(median / medians["torch"], 2),
        }
        for name, median in medians.items()
    } | {"rounds": rounds}


Step = Callable[[], Tensor]


def _variants(shape: tuple[int, ...]) -> dict[str, tuple[Step, Tensor]]:
    """Each variant's step, which returns y, and the y expected at real rows (NaN elsewhere)."""
    channels = shape[1]
    x, dy = torch.randn(shape).requires_grad_(), torch.randn(shape)
    mask = torch.rand(shape[0]) < 0.5
    plain, masked = (
        torch.tensor(batchnorm.batch_norm(x.detach().numpy(), axis=1, mask=m)[0])
        for m in (None, mask.numpy())
    )
    masked[~mask] = torch.nan
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(channels)
    ours, compiled = BatchNorm(channels), _compiled(channels)

    def step(forward: Callable[..., Tensor], *arguments: Tensor) -> Step:
        def run() -> Tensor:
            x.grad = None
            y = forward(x, *arguments)
            y.backward(dy)
            return y.detach()

        return run

    def pack(x: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros_like(x).index_put((mask,), theirs(x[mask]))

    return {
        "torch": (step(theirs), plain),
        "plain": (step(ours), plain),
        "compiled": (step(compiled), plain),
        "torch, pack": (step(pack, mask), masked),
        "plain, masked": (step(ours, mask), masked),
        "compiled, masked": (step(compiled, mask), masked),
    }


def _check(name: str, y: Tensor, expected: Tensor) -> None:
    off = (y - expected).abs().nan_to_num(0.0).max().item()
    # torch sums 262144 rows of mean 0 to 6e-5; that is its own, ours is S3's.
    if off > (1e-3 if name.startswith("torch") else 5e-5):
        raise RuntimeError(f"{name}: off by {off:.1e}; a wrong result has no speed")


def _compiled(channels: int) -> Any:
    return torch.compile(BatchNorm(channels))


if __name__ == "__main__":
    main()
