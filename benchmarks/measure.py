"""Checks every variant of a case, then times them in turns."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.benchmark.timing import summarize, take_turns
from batchnorm.torch import BatchNorm
from cases import OFFSETS, Case, count_bytes
from problem import Expected, Problem, check_solution, make_problem, solve
from variants import Variant, make_default_variants, make_unmasked, make_variants

_ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8}  # of y and dx to their type, relative
_OURS, _THEIRS = 5e-6, 1e-3  # torch sums 262144 rows of mean 0 to 6e-5


def measure(
    case: Case, seconds: float, least: int, *, default_only: bool, suffix: str = ""
) -> dict[str, Any]:
    """The case's record: what it is, and each variant's figures.

    Args:
        case: which one.
        seconds: how long to take turns.
        least: how many rounds at least, whatever the time.
        default_only: leave out all but the library's way and its rival's.
        suffix: appended to the variants' names.

    Raises:
        RuntimeError: a variant's result is wrong; a wrong result has no speed.
    """
    check_solution(case)
    problem = make_problem(case)
    variants = (make_default_variants if default_only else make_variants)(problem)
    expected = solve(problem)
    errors = {name: check_variant(name, problem, v, expected) for name, v in variants.items()}
    if case.padded is not None and not default_only:
        name, variant, bare = "ours, no mask", make_unmasked(problem), _unmask(problem)
        errors[name] = check_variant(name, bare, variant, solve(bare))
        variants[name] = variant
    del expected
    gc.collect()
    times = take_turns({name: v.step for name, v in variants.items()}, seconds, least)
    size = count_bytes(case, problem.mask)
    return _describe(case, size) | {
        "variants": {
            name + suffix: summarize(seen, _bytes_of(name, case, size))
            | {"error": float(f"{errors[name]:.1e}")}
            for name, seen in times.items()
        }
    }


def measure_accuracy() -> dict[str, dict[str, float]]:
    """Largest |y - float64| of a training step, float32 (4096, 8), deviation 1, by mean."""
    layers: dict[str, Callable[[], nn.Module]] = {
        "ours": lambda: BatchNorm(8),
        "plain": lambda: BatchNorm(8, fused=False),
        "torch": lambda: nn.BatchNorm1d(8),
    }
    found: dict[str, dict[str, float]] = {}
    for mean in OFFSETS:
        torch.manual_seed(0)
        x = torch.randn(4096, 8) + mean
        expected = torch.from_numpy(batchnorm.batch_norm(x.numpy(), axis=1)[0])
        found[f"{mean:g}"] = {
            name: float(f"{(make()(x).detach() - expected).abs().max().item():.2g}")
            for name, make in layers.items()
        }
    return found


def _unmask(problem: Problem) -> Problem:
    return Problem(**(vars(problem) | {"mask": None}))


def _bytes_of(name: str, case: Case, size: int) -> int:
    return count_bytes(case, None) if name in ("ours, no mask", "copy") else size


def _describe(case: Case, size: int) -> dict[str, Any]:
    return {
        "title": case.title,
        "shape": list(case.shape),
        "mode": case.mode,
        "channels last": case.channels_last,
        "dtype": case.dtype,
        "padded": case.padded,
        "activation": case.activation,
        "residual": case.residual,
        "bytes": size,
    }


def check_variant(name: str, problem: Problem, variant: Variant, expected: Expected) -> float:
    """The variant's largest error, relative to 1 + |expected|, once it is known to be allowed."""
    y = variant.step().detach()
    if variant.copies:
        if not torch.equal(y, problem.x):
            raise RuntimeError(f"{problem.case.name}, {name}: the copy is none")
        return 0.0
    inert = None if problem.real is None or variant.padding else ~problem.real
    errors = [_error(y, expected.y, inert)]
    wanted = [a for a in (expected.dx, expected.dresidual) if a is not None]
    for get, gradient in zip(variant.gradients, wanted, strict=True):
        found = get()
        assert found is not None
        errors.append(_error(found, gradient, None))
    rounding = _ROUNDING[problem.case.dtype]
    allowed = _OURS + rounding if variant.exact else _THEIRS + 4 * rounding
    worst = math.nan if any(math.isnan(e) for e in errors) else max(errors)
    if not worst <= allowed:
        raise RuntimeError(
            f"{problem.case.name}, {name}: off by {errors}, allowed {allowed:.1e}; "
            "a wrong result has no speed"
        )
    return worst


def _error(found: Tensor, expected: Tensor, inert: Tensor | None) -> float:
    if found.shape != expected.shape:
        raise RuntimeError(f"shape {tuple(found.shape)} for {tuple(expected.shape)}")
    worst = 0.0
    for rows in range(0, found.shape[0], max(1, found.shape[0] // 32)):  # stays within the cache
        part = slice(rows, rows + max(1, found.shape[0] // 32))
        wanted = expected[part]
        off = (found[part] - wanted).abs_().div_(wanted.abs().add_(1.0))
        if inert is not None:
            off.masked_fill_(inert[part], 0.0)
        largest = off.max().item()
        if math.isnan(largest):
            return math.nan
        worst = max(worst, largest)
    return worst
