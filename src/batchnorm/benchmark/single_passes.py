"""Each compiled pass alone: one core, data in its cache, memory that is kept.

A step adds passes up, so that a slow one hides among faster ones, or behind memory. A call of a
pass costs some microseconds around the pass itself. So each is timed at two sizes, and the
difference of times over the difference of sizes is what an element costs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.benchmark.case import Case
from batchnorm.benchmark.problem import Problem, make_problem, solve
from batchnorm.benchmark.timing import round_to, take_turns
from batchnorm.benchmark.variant import Variant, check
from batchnorm.kernels.kept import TYPES
from batchnorm.torch.kernels import on_cpu
from batchnorm.torch.kernels.decision import decide

__all__ = ["CASES", "PASSES", "make_passes", "measure_passes"]

PASSES = ("moments", "normalize", "reduce", "apply")
# 256 KiB an array: three of them fit in a core's own cache of 1 MiB.
CASES = (
    Case("rows", "(1024, 64)", (1024, 64)),
    Case("channels-first", "(8, 64, 128)", (8, 64, 128)),
    Case("rows-mask", "(1024, 64), half padded", (1024, 64), padded=0.5),
    Case("channels-first-mask", "(8, 64, 128), half padded", (8, 64, 128), padded=0.5),
)
# The smaller size is one in so many. Half of either is over 128 values a channel: fewer are summed
# in double (native/passes/soundness.hpp), and the difference would mean nothing.
_SHARE = 2


@dataclass(frozen=True, eq=False)
class _Memory:
    """The tensors that passes read and write, which live as long as they do."""

    x: Tensor
    dy: Tensor
    mask: Tensor | None
    gamma: Tensor
    beta: Tensor
    y: Tensor
    dx: Tensor
    dgamma: Tensor
    dbeta: Tensor


def make_passes(problem: Problem) -> tuple[dict[str, Callable[[], object]], Variant]:
    """The passes by name, with a copy of x; and a step of them all, to be checked.

    Args:
        problem: float32, channels along axis 1.
    """
    m = _place(problem)
    signature = (m.x.shape, m.x.stride(), m.x.dtype, "cpu")
    mask = None if m.mask is None else (m.mask.shape, m.mask.stride(), 1)
    decision = decide(signature, 1, None, False, None, False, mask, True)
    assert decision.geometry is not None
    plan, threads = decision.plan, 1
    x, dy, y, dx = (a.data_ptr() for a in (m.x, m.dy, m.y, m.dx))
    at = {"mask": 0 if m.mask is None else m.mask.data_ptr(), "threads": threads}
    state = on_cpu.find_state(m.gamma, m.beta, None)
    moments = partial(plan.moments, x=x, **at)
    kept = moments()
    how: dict[str, Any] = {"eps": problem.case.eps, "decay": 0.9, "batch": True, "update": False}
    how |= {"unbiased": True, "renorm": None, "residual": 0, "residual_row": 0}
    normalize = partial(plan.forward, x=x, y=y, state=state, kept=kept, **how, **at)
    normalize()
    rows = {"dy": dy, "dy_row": decision.geometry.dense, "x": x, "y": 0, "dresidual": 0} | at
    types = {"dgamma_type": TYPES["float32"], "dbeta_type": TYPES["float32"]}
    sums = {"dgamma": m.dgamma.data_ptr(), "dbeta": m.dbeta.data_ptr()} | types
    reduce = partial(plan.reduce, kept=kept, **sums, **rows)
    apply = partial(plan.apply, dx=dx, sums=reduce(), kept=kept, **rows)
    copy = partial(np.copyto, m.y.numpy(), m.x.numpy())

    def step() -> tuple[Tensor, ...]:
        found = moments()
        plan.forward(x=x, y=y, state=state, kept=found, **how, **at)
        total = plan.reduce(kept=found, **sums, **rows)
        plan.apply(dx=dx, sums=total, kept=found, **rows)
        return m.y, m.dx, m.dgamma, m.dbeta

    calls: tuple[Callable[[], object], ...] = (moments, normalize, reduce, apply, copy)
    named = dict(zip((*PASSES, "copy"), calls, strict=True))
    return named, Variant(step, ("y", "dx", "dgamma", "dbeta"), ours=True)


def _place(problem: Problem) -> _Memory:
    x, dy, gamma, beta = (
        torch.from_numpy(a).clone() for a in (problem.x, problem.dy, problem.gamma, problem.beta)
    )
    mask = None if problem.mask is None else torch.from_numpy(problem.mask).clone()
    outputs = (torch.empty_like(a) for a in (x, x, gamma, beta))
    return _Memory(x, dy, mask, gamma, beta, *outputs)


def measure_passes(seconds: float, least: int) -> dict[str, Any]:
    """Nanoseconds an element of each pass and of a copy, and the passes over the copy, by case.

    Args:
        seconds: time to take turns for a case, about.
        least: least number of rounds, however long they take.

    Raises:
        RuntimeError: a result is wrong.
    """
    return {case.name: _measure(case, seconds, least) for case in CASES}


def _measure(case: Case, seconds: float, least: int) -> dict[str, Any]:
    shape = (case.shape[0] // _SHARE, *case.shape[1:])
    steps: dict[str, Callable[[], object]] = {}
    sizes, kept = [], []
    for size in (case, replace(case, shape=shape)):
        problem = make_problem(size)
        passes, whole = make_passes(problem)
        check("passes", whole, problem, solve(problem))
        steps |= {f"{name} {problem.x.size}": step for name, step in passes.items()}
        sizes.append(problem.x.size)
        kept.append(whole)  # whose tensors the passes know by address
    large, small = sizes
    times = take_turns(steps, seconds, least)
    figures: dict[str, Any] = {"title": case.title, "ns": {}, "quartiles": {}}
    for name in (*PASSES, "copy"):
        pairs = zip(times[f"{name} {large}"], times[f"{name} {small}"], strict=True)
        seen = [1e9 * (a - b) / (large - small) for a, b in pairs]
        low, median, high = statistics.quantiles(seen, n=4, method="inclusive")
        figures["ns"][name] = round_to(median, 3)
        figures["quartiles"][name] = [round_to(low, 3), round_to(high, 3)]
    copy = figures["ns"]["copy"]
    figures["over a copy"] = {name: round_to(figures["ns"][name] / copy, 3) for name in PASSES}
    return figures
