"""Checks every variant of a step, then times them in turns."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from batchnorm.benchmark.machine import describe_machine, describe_versions
from batchnorm.benchmark.problem import (
    Expected,
    Problem,
    count_cores,
    error_of,
    make_copy,
    make_problem,
    solve,
)
from batchnorm.benchmark.timing import summarize, take_turns

__all__ = ["FRAMEWORKS", "run"]

FRAMEWORKS = {  # where its channels are; what is reported with it
    "torch": (1, ("torch",)),
    "jax": (-1, ("jax", "jaxlib", "flax")),
    "keras": (-1, ("keras",)),
}
_LEAST = 7  # rounds
_OURS, _THEIRS = 5e-6, 1e-3  # allowed errors; theirs sum many rows in float32
# Bytes for each element of the input: both gradients, the right result in float64, its parts.
_WORKSPACE = 80


def run(
    framework: str,
    shape: Sequence[int],
    *,
    masked: float | None = None,
    inference: bool = False,
    seconds: float = 3.0,
) -> dict[str, Any]:
    """Measure this library's layer, the framework's own and a plain copy.

    Args:
        framework: a key of `FRAMEWORKS`.
        shape: of the input, float32; channels where the framework's own layer has them: axis 1 in
            torch, the last axis elsewhere.
        masked: share of padded rows, at least 0 and below 1; None for no mask.
        inference: measure a forward pass in evaluation instead of a training step.
        seconds: how long to take turns, about.

    Returns:
        Plain types only: what was measured, on what, and for each variant its median, quartiles,
        error and GB/s.

    Raises:
        ValueError: a shape or share that cannot be measured, or at which the framework's layer is
            wrong; a wrong result has no speed.
        RuntimeError: this library's result is wrong.
    """
    axis, packages = FRAMEWORKS[framework]
    _check(shape, masked, inference)
    steps_of = importlib.import_module(f"batchnorm.benchmark.{framework}_steps")
    problem = make_problem(shape, axis, masked=masked, inference=inference)
    steps = steps_of.make_steps(problem)
    expected = solve(problem, steps_of.EPS)
    errors = {name: _find_error(name, step(), problem, expected) for name, step in steps.items()}
    del expected
    times = take_turns({**steps, "copy": make_copy(problem)}, seconds, _LEAST)
    variants = {name: summarize(seen, problem.bytes) for name, seen in times.items()}
    for name, error in errors.items():
        variants[name]["error"] = float(f"{error:.1e}")
    ours, theirs = (variants[name]["ms"] for name in steps)
    return {
        "framework": _name_backend(framework),
        "shape": list(shape),
        "mode": "inference" if inference else "training",
        "padded": masked,
        "bytes": problem.bytes,
        "variants": variants,
        "times as fast": _round(theirs / ours),
        "times a copy": _round(ours / variants["copy"]["ms"]),
        "machine": describe_machine(count_cores()),
        "versions": describe_versions(*packages, *_backend_packages(framework)),
    }


def _check(shape: Sequence[int], masked: float | None, inference: bool) -> None:
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"bench: shape must have two or more sizes, each at least 1; got {tuple(shape)}."
        )
    need, memory = math.prod(shape) * _WORKSPACE, _find_memory()
    if need > memory:
        raise ValueError(
            f"bench: shape must fit into memory; {tuple(shape)} needs {_gigabytes(need)}, and this "
            f"machine has {_gigabytes(memory)}. Take fewer rows."
        )
    if masked is not None and not 0.0 <= masked < 1.0:
        raise ValueError(
            f"bench: masked must be the share of padded rows, at least 0 and below 1; got {masked}."
        )
    if masked is not None and inference:
        raise ValueError(
            "bench: masked is for training steps; in inference a mask changes nothing. Leave "
            "out one of the two."
        )


def _find_memory() -> float:
    """Bytes of the machine's memory; infinity where that is not known."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:,.0f} GiB"


def _find_error(name: str, found: Any, problem: Problem, expected: Expected) -> float:
    arrays = [_to_numpy(a) for a in found]
    # At padded rows nobody else promises anything.
    error = error_of(arrays, expected, None if name == "batchnorm" else problem.real)
    if name == "batchnorm" and not error <= _OURS:
        raise RuntimeError(f"bench: {name} is off by {error:.1e}; a wrong result has no speed.")
    if name != "batchnorm" and not error <= _THEIRS:
        raise ValueError(
            f"bench: {name} is off by {error:.1e} at this shape, and a wrong result has no speed "
            "to compare with. Take fewer rows."
        )
    return error


def _to_numpy(array: Any) -> Any:
    return np.asarray(array.detach().numpy() if hasattr(array, "detach") else array)


def _backend_packages(framework: str) -> tuple[str, ...]:
    if framework != "keras":
        return ()
    import keras

    backend = keras.backend.backend()
    return FRAMEWORKS[backend][1] if backend in FRAMEWORKS else ()


def _name_backend(framework: str) -> str:
    if framework != "keras":
        return framework
    import keras

    return f"keras on {keras.backend.backend()}"


def _round(value: float) -> float:
    return float(f"{value:.3g}")
