"""Variants: the ways to do a case's job, and the check that one does it right."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchnorm.benchmark.machine import count_cores
from batchnorm.benchmark.problem import SMALL, Expected, Problem, in_parts

__all__ = ["Variant", "check", "find_error", "make_copy", "to_numpy"]

Array = Any
# Allowed errors, relative to 1 + |expected|. Others sum many rows in float32: torch 262144 rows of
# mean 0 to 6e-5.
_OURS, _THEIRS = 5e-6, 1e-3
_ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8}  # of y and dx to their type, relative


@dataclass(frozen=True)
class Variant:
    """One way to do a job.

    Attributes:
        step: does it once; returns the results, and maybe more behind them.
        results: names of the results in order, as `Expected` has them.
        ours: held to this library's bound, and at padded rows too; others to a loose one.
        unmasked: does the job without the case's mask.
        copies: number of plain copies of x that it makes, if it normalizes nothing; else 0.
        zeroed: padded rows of y are 0 (S4).
        find_error: checks the variant where it runs, if that is not here, and returns the largest
            error; raises as `check`.
    """

    step: Callable[[], Any]
    results: tuple[str, ...] = ("y", "dx")
    ours: bool = False
    unmasked: bool = False
    copies: int = 0
    zeroed: bool = False
    find_error: Callable[[], float] | None = None


def check(name: str, variant: Variant, problem: Problem, expected: Expected) -> float:
    """The largest error of a variant's results, once it is known to be allowed.

    Args:
        name: of the variant, for messages.
        variant: to run once.
        problem: the problem that it has to solve.
        expected: the problem's solution.

    Raises:
        RuntimeError: a result of this library is wrong, or a copy is none.
        ValueError: a result of another library is too far off.
    """
    if variant.find_error is not None:
        return variant.find_error()
    label, found = f"{problem.case.name}: {name}", variant.step()
    if variant.copies:
        if not np.array_equal(to_numpy(found[0]).reshape(-1), problem.x.reshape(-1)):
            raise RuntimeError(f"{label} is no copy; a wrong result has no speed.")
        return 0.0
    named = dict(zip(variant.results, found, strict=False))
    needed = [n for n in ("y", "dx", "dresidual") if getattr(expected, n) is not None]
    if not {*needed} <= named.keys():
        raise RuntimeError(f"{label} must have {', '.join(needed)}; got {', '.join(named)}.")
    if variant.zeroed:
        assert problem.real is not None
        expected = replace(expected, y=np.where(problem.real, expected.y, 0.0))
    named = {n: expected.take(n, to_numpy(a)) for n, a in named.items()}
    # At padded rows nobody else promises anything of y.
    error = find_error(named, expected, None if variant.ours else problem.real)
    rounding = _ROUNDING[problem.case.dtype]
    if variant.ours and not error <= _OURS + rounding:
        raise RuntimeError(f"{label} is off by {error:.1e}; a wrong result has no speed.")
    if not variant.ours and not error <= _THEIRS + 4 * rounding:
        raise ValueError(
            f"{label} is off by {error:.1e} at this shape, and a wrong result has no speed to "
            "compare with. Take fewer rows."
        )
    return error


def find_error(named: dict[str, Array], expected: Expected, real: Array | None) -> float:
    """The largest error, relative to 1 + |expected|; NaN if a result has one.

    Args:
        named: results under the names that `Expected` has for them.
        expected: the same in float64.
        real: mask of the rows that count for y, in x's rank; None for all.
    """
    errors = []
    for name, array in named.items():
        right = getattr(expected, name)
        # dgamma and dbeta are sums over rows, whose errors grow with the root of their number.
        scale = math.sqrt(expected.y.size / right.size)
        errors.append(_find(to_numpy(array), right, scale, real if name == "y" else None))
    return math.nan if any(math.isnan(e) for e in errors) else max(errors)


def _find(found: Array, right: Array, scale: float, real: Array | None) -> float:
    if found.shape != right.shape:
        raise RuntimeError(f"a result must have shape {right.shape}; got {found.shape}.")

    def work(part: slice) -> float:
        off = np.abs(found[part] - right[part])
        off /= scale + np.abs(right[part])
        if real is not None:
            off = np.where(real[part], off, 0.0)
        return float(np.max(off, initial=0.0))  # NaN if there is one

    return float(np.max(in_parts(len(right), right.size, work)))


def to_numpy(array: Array) -> Array:
    """An array of any framework as numpy's; bfloat16 as float32."""
    return np.asarray(array.detach().float().cpu() if hasattr(array, "detach") else array)


def make_copy(problem: Problem, times: int = 1) -> Variant:
    """Copies of x into an array that is kept, on all cores.

    Args:
        problem: x's.
        times: number of copies that a step makes.
    """
    x, y = problem.x.reshape(-1), np.empty_like(problem.x).reshape(-1)
    cores = count_cores()
    bounds = np.linspace(0, x.size, cores + 1, dtype=np.int64).tolist()
    pool = ThreadPoolExecutor(cores)

    def copy(part: int) -> None:
        piece = slice(bounds[part], bounds[part + 1])
        for _ in range(times):
            np.copyto(y[piece], x[piece])

    def step() -> tuple[Array]:
        if x.size < SMALL:
            for _ in range(times):
                np.copyto(y, x)
        else:
            list(pool.map(copy, range(cores)))
        return (y,)

    return Variant(step, ("y",), copies=times)
