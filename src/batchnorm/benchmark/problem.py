"""The arrays of a case, and the right results in float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from batchnorm.benchmark.case import Case
from batchnorm.benchmark.machine import count_cores
from batchnorm.reference import batch_norm, batch_norm_gradient

__all__ = ["SMALL", "Expected", "Problem", "in_parts", "make_problem", "solve"]

Array = Any
SMALL = 1 << 16  # elements; handing fewer to threads costs more than it saves
_TOSS_UP = 1e-3  # one rounding decides the sign of an activation's input nearer to 0


@dataclass(frozen=True, eq=False)
class Problem:
    """A case's numpy arrays, float32; every framework's steps copy them.

    Attributes:
        case: the job.
        x: input; with values of the case's dtype.
        dy: gradient with respect to the output.
        residual: of x's shape, or None.
        mask: True at real rows, x's shape without channels; or None.
        gamma: scale of each channel.
        beta: offset of each channel.
        mean: running mean of each channel.
        var: running variance of each channel.
    """

    case: Case
    x: Array
    dy: Array
    residual: Array | None
    mask: Array | None
    gamma: Array
    beta: Array
    mean: Array
    var: Array

    @property
    def real(self) -> Array | None:
        """The mask in x's rank."""
        return None if self.mask is None else np.expand_dims(self.mask, self.case.axis)

    @property
    def dy_at_real_rows(self) -> Array:
        """dy with zeros at padded rows, for layers that do not ignore it there (S8)."""
        return self.dy if self.real is None else np.where(self.real, self.dy, np.float32(0.0))

    def take(self, part: slice) -> Problem:
        """The same problem for some of the channels."""
        at = _index(self, part)
        x, dy = self.x[at], self.dy[at]
        residual = None if self.residual is None else self.residual[at]
        rows = (a[part] for a in (self.gamma, self.beta, self.mean, self.var))
        shape = replace(self.case, shape=x.shape)
        return Problem(shape, x, dy, residual, self.mask, *rows)

    @property
    def unmasked(self) -> Problem:
        """The same arrays without the mask."""
        return replace(self, case=replace(self.case, padded=None), mask=None)


@dataclass(frozen=True, eq=False)
class Expected:
    """Results in float64; in inference y alone.

    Attributes:
        y: output.
        dx: gradient of x.
        dgamma: gradient of gamma.
        dbeta: gradient of beta.
        dresidual: gradient of the residual, if there is one.
        every: these are the results of each so many channels.
        axis: of the channels.
    """

    y: Array
    dx: Array | None = None
    dgamma: Array | None = None
    dbeta: Array | None = None
    dresidual: Array | None = None
    every: int = 1
    axis: int = 1

    def take(self, name: str, array: Array) -> Array:
        """The part of the result `name` of all channels that is known here."""
        axis = 0 if name in ("dgamma", "dbeta") else self.axis % array.ndim
        return array[(slice(None),) * axis + (slice(None, None, self.every),)]


def make_problem(case: Case) -> Problem:
    """Random arrays, the same ones for the same case."""
    rng = np.random.default_rng(0)
    row = [1] * len(case.shape)
    row[case.axis] = case.channels

    def draw() -> Array:
        return rng.standard_normal(case.shape, np.float32)

    x, dy = draw(), draw()
    x *= rng.uniform(0.5, 1.5, row).astype(np.float32)
    x += rng.standard_normal(row, np.float32)
    residual = draw() if case.residual else None
    gamma, var = (rng.uniform(0.5, 1.5, case.channels).astype(np.float32) for _ in range(2))
    beta, mean = (rng.standard_normal(case.channels, np.float32) for _ in range(2))
    mask = None if case.padded is None else _draw_mask(case, rng)
    for array in (x, dy, residual):
        if array is not None and case.dtype == "bfloat16":
            _round_to_bfloat16(array)
    problem = Problem(case, x, dy, residual, mask, gamma, beta, mean, var)
    if case.activation is not None and not case.inference:
        plain = replace(problem, case=replace(case, activation=None))
        dy[np.abs(_solve_forward(plain)) < _TOSS_UP] = 0.0
    return problem


def _draw_mask(case: Case, rng: np.random.Generator) -> Array:
    axis = case.axis % len(case.shape)
    rows = case.shape[:axis] + case.shape[axis + 1 :]
    assert case.padded is not None
    if not case.at_end:
        return rng.random(rows) >= case.padded
    mask = np.zeros(rows, bool)
    mask[: rows[0] - int(rows[0] * case.padded)] = True
    return mask


def _round_to_bfloat16(a: Array) -> None:
    """Round float32 to the nearest values that bfloat16 has, ties to even, in place."""
    bits = a.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    bits &= 0xFFFF0000


def solve(problem: Problem, every: int = 1) -> Expected:
    """The right results, by the float64 reference, a few channels at a time on all cores.

    Args:
        problem: to solve.
        every: solve only each so many channels, which do not depend on each other.
    """
    if every > 1:
        return replace(solve(problem.take(slice(None, None, every))), every=every)
    case, shape = problem.case, problem.x.shape
    y = _solve_forward(problem)
    if case.inference:
        return Expected(y, axis=case.axis)
    dx = np.empty(shape)
    dgamma, dbeta = np.empty(case.channels), np.empty(case.channels)

    def work(part: slice) -> None:
        at = _index(problem, part)
        gradients = batch_norm_gradient(problem.dy[at], problem.x[at], **_settings(problem, part))
        dx[at], dgamma[part], dbeta[part] = gradients

    in_parts(case.channels, problem.x.size, work)
    if problem.residual is None:
        return Expected(y, dx, dgamma, dbeta, axis=case.axis)
    passes = True if case.activation is None else y > 0.0
    dresidual = np.where(passes, problem.dy.astype(np.float64), 0.0)
    return Expected(y, dx, dgamma, dbeta, dresidual, axis=case.axis)


def _solve_forward(problem: Problem) -> Array:
    y = np.empty(problem.x.shape)

    def work(part: slice) -> None:
        at = _index(problem, part)
        y[at] = batch_norm(problem.x[at], **_settings(problem, part))[0]

    in_parts(problem.case.channels, problem.x.size, work)
    return y


def _index(problem: Problem, part: slice) -> tuple[slice, ...]:
    index = [slice(None)] * problem.x.ndim
    index[problem.case.axis] = part
    return tuple(index)


def _settings(problem: Problem, part: slice) -> dict[str, Any]:
    """Arguments of the reference for some of the channels."""
    case, training = problem.case, problem.case.mode == "training"
    residual = problem.residual
    return {
        "gamma": problem.gamma[part],
        "beta": problem.beta[part],
        "mask": problem.mask,
        "axis": case.axis,
        "eps": case.eps,
        "training": training,
        "running_mean": None if training else problem.mean[part],
        "running_var": None if training else problem.var[part],
        "residual": None if residual is None else residual[_index(problem, part)],
        "activation": case.activation,
    }


def in_parts(count: int, elements: int, work: Callable[[slice], Any]) -> list[Any]:
    """Results of `work` on slices that make up `range(count)`, on all cores if that pays.

    Args:
        count: end of the last slice.
        elements: size of the whole work; a small one runs in this thread.
        work: called with each slice.
    """
    cores = count_cores()
    parts = 1 if elements < SMALL else min(count, 4 * cores)
    bounds = np.linspace(0, count, parts + 1, dtype=np.int64).tolist()
    slices = [slice(*pair) for pair in pairwise(bounds)]
    if parts == 1:
        return [work(part) for part in slices]
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(work, slices))
