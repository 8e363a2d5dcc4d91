"""Calls on small tensors, whose time is that of the code around the kernels.

    python benchmarks/small_steps.py                  # eager code
    python benchmarks/small_steps.py --compiled       # under torch.compile, large shapes too
    python benchmarks/small_steps.py --case "(32, 64)" --rounds 400

Variants take turns in short rounds, and the least time of a round counts: other programs on the
machine can only add to it. Results of the same cases are compared with torch's before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.torch import BatchNorm

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Shapes that come in turn, in training (forward and backward) or in inference."""

    shapes: tuple[tuple[int, ...], ...]
    training: bool

    @property
    def name(self) -> str:
        """The shapes, and the mode if it is not training."""
        shapes = ", ".join(map(str, self.shapes))
        return shapes if self.training else f"{shapes}, inference"


_SMALL = ((32, 64), (128, 256), (512, 128), (16, 64, 8, 8))
_LARGE = ((262144, 64), (32, 64, 56, 56))
EAGER = (
    *(Case((shape,), True) for shape in _SMALL),
    Case(((1, 4096),), False),
    Case(((32, 64), (31, 64)), False),
)
COMPILED = tuple(Case((s,), training) for s in (*_SMALL, *_LARGE) for training in (True, False))


def make_step(layer: nn.Module, case: Case) -> Step:
    """A call that runs the case once for each of its shapes."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=generator) for shape in case.shapes]
    dys = [torch.randn(shape, generator=generator) for shape in case.shapes]
    if not case.training:

        def infer() -> Tensor:
            with torch.no_grad():
                for x in xs:
                    y = layer(x)
            return y

        return infer
    x, dy = xs[0].requires_grad_(), dys[0]
    wanted = [x, *layer.parameters()]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), wanted, dy)

    return step


def make_variants(case: Case, compiled: bool) -> dict[str, Step]:
    """The library's layer and torch's, and both compiled."""
    channels = case.shapes[0][1]

    def make(kind: str) -> nn.Module:
        rival = nn.BatchNorm2d if len(case.shapes[0]) == 4 else nn.BatchNorm1d
        layer = BatchNorm(channels) if kind == "ours" else rival(channels)
        return layer.train(case.training)

    found = {kind: make_step(make(kind), case) for kind in ("ours", "torch")}
    if compiled:
        for kind in ("ours", "torch"):
            torch.compiler.reset()
            found[f"{kind}, compiled"] = make_step(torch.compile(make(kind)), case)
            found[f"{kind}, compiled"]()
    return found


def check(variants: dict[str, Step]) -> None:
    """Compare all results with torch's."""
    expected = variants["torch"]()
    for step in variants.values():
        torch.testing.assert_close(step(), expected, rtol=1e-3, atol=1e-4)


def measure(variants: dict[str, Step], rounds: int, seconds: float) -> dict[str, float]:
    """The least microseconds of a call in any round of about `seconds` for each variant."""
    calls = {}
    for name, step in variants.items():
        for _ in range(5):
            step()
        begin = time.perf_counter()
        step()
        calls[name] = max(1, int(seconds / (time.perf_counter() - begin)))
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for name, step in variants.items():
            step()
            begin = time.perf_counter()
            for _ in range(calls[name]):
                step()
            best[name] = min(best[name], (time.perf_counter() - begin) / calls[name] * 1e6)
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure small steps.")
    parser.add_argument("--compiled", action="store_true", help="under torch.compile")
    parser.add_argument("--case", action="append", default=[], help="only cases with this name")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.003, help="of a round and variant")
    options = parser.parse_args()
    for case in COMPILED if options.compiled else EAGER:
        if options.case and not any(name in case.name for name in options.case):
            continue
        variants = make_variants(case, options.compiled)
        check(variants)
        best = measure(variants, options.rounds, options.seconds)
        times = ", ".join(f"{name} {value / len(case.shapes):.1f}" for name, value in best.items())
        ratios = [f"torch / ours {best['torch'] / best['ours']:.2f}"]
        if options.compiled:
            mine = best["ours, compiled"]
            ratios.append(f"compiled / eager {mine / best['ours']:.2f}")
            ratios.append(f"torch compiled / ours {best['torch, compiled'] / mine:.2f}")
        print(f"{case.name:<30} µs: {times}; {'; '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
