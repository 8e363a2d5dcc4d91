"""What is measured: its arrays, and what must come out of them in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.reference import batch_norm, batch_norm_gradient

__all__ = ["Expected", "Problem", "count_cores", "error_of", "make_copy", "make_problem", "solve"]

Array = Any


@dataclass(frozen=True, eq=False)
class Problem:
    """A step to measure.

    Args:
        x: input, float32.
        dy: gradient with respect to the output; 0 at padded rows, where only this library ignores
            it (S8), so that there is nothing to differ in.
        mask: True at real rows, x's shape without channels; or None.
        axis: of the channels.
        inference: whether only a forward pass in evaluation is measured.
    """

    x: Array
    dy: Array
    mask: Array | None
    axis: int
    inference: bool

    @property
    def channels(self) -> int:
        """Number of them."""
        return int(self.x.shape[self.axis])

    @property
    def rows(self) -> int:
        """Padded ones included."""
        return int(self.x.size) // max(1, self.channels)

    @property
    def real(self) -> Array | None:
        """The mask, in x's rank."""
        return None if self.mask is None else np.expand_dims(self.mask, self.axis)

    @property
    def bytes(self) -> int:
        """What has to move between memory and processor, a mask's savings left out.

        A training step reads x for the moments; x, and writes y; dy and x for the sums; dy and x,
        and writes dx. A forward pass in evaluation reads x and writes y.
        """
        return int(self.x.nbytes) * (2 if self.inference else 8)


@dataclass(frozen=True, eq=False)
class Expected:
    """Results in float64; dx is None for inference."""

    y: Array
    dx: Array | None


def make_problem(
    shape: Sequence[int], axis: int, *, masked: float | None = None, inference: bool = False
) -> Problem:
    """Random arrays, the same ones for the same arguments.

    Args:
        shape: of x.
        axis: of the channels.
        masked: share of padded rows, or None for no mask.
        inference: as in `Problem`.
    """
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    x *= rng.uniform(0.5, 1.5, sizes).astype(np.float32)
    x += rng.standard_normal(sizes).astype(np.float32)
    mask = None
    if masked is not None:
        mask = rng.random([n for a, n in enumerate(shape) if a != axis % len(shape)]) >= masked
        dy *= np.expand_dims(mask, axis)
    return Problem(x, dy, mask, axis, inference)


def solve(problem: Problem, eps: float) -> Expected:
    """The right result, by the float64 reference.

    Args:
        problem: what to solve, with gamma 1 and beta 0.
        eps: of the layers that are measured.
    """
    settings: dict[str, Any] = {"axis": problem.axis, "eps": eps}
    if problem.inference:
        settings["running_mean"] = np.zeros(problem.channels)
        settings["running_var"] = np.ones(problem.channels)
        return Expected(batch_norm(problem.x, training=False, **settings)[0], None)
    settings["mask"] = problem.mask
    y, _ = batch_norm(problem.x, **settings)
    return Expected(y, batch_norm_gradient(problem.dy, problem.x, **settings)[0])


def error_of(found: Sequence[Array], expected: Expected, real: Array | None) -> float:
    """The largest error, relative to 1 + |expected|; NaN if there is one.

    Args:
        found: y, and for a training step dx.
        expected: the same in float64.
        real: mask of the rows that count for y, in x's rank; None for all.
    """
    wanted = [expected.y] if expected.dx is None else [expected.y, expected.dx]
    worst = 0.0
    for index, (array, right) in enumerate(zip(found, wanted, strict=True)):
        off = np.abs(np.asarray(array).reshape(right.shape) - right) / (1.0 + np.abs(right))
        if index == 0 and real is not None:
            off = np.where(real, off, 0.0)
        largest = float(np.max(off, initial=0.0))
        if math.isnan(largest):
            return math.nan
        worst = max(worst, largest)
    return worst


def make_copy(problem: Problem) -> Any:
    """A step that copies as many bytes as the job must move, on all cores, and nothing else."""
    x, y = problem.x.reshape(-1), np.empty_like(problem.x).reshape(-1)
    cores, times = count_cores(), problem.bytes // max(1, 2 * problem.x.nbytes)
    bounds = np.linspace(0, x.size, cores + 1, dtype=np.int64).tolist()
    pool = ThreadPoolExecutor(cores)

    def copy(part: int) -> None:
        piece = slice(bounds[part], bounds[part + 1])
        for _ in range(times):
            np.copyto(y[piece], x[piece])

    def step() -> None:
        if x.size < _SMALL:  # handing work to threads would be what is measured
            for _ in range(times):
                np.copyto(y, x)
        else:
            list(pool.map(copy, range(cores)))

    return step


_SMALL = 1 << 16


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
