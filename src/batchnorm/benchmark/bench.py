"""`batchnorm bench`: a training step on a shape of the user's own, beside the rival's."""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from batchnorm.benchmark.case import Case, count_bytes, count_copied_bytes
from batchnorm.benchmark.machine import count_cores, describe_machine, describe_versions
from batchnorm.benchmark.problem import make_problem
from batchnorm.benchmark.runner import measure
from batchnorm.benchmark.timing import Clock, round_to, time_calls
from batchnorm.benchmark.variant import make_copy

__all__ = ["FRAMEWORKS", "run"]


class Framework(NamedTuple):
    """A framework's own layer, as far as problems depend on it.

    Attributes:
        axis: of its channels.
        eps: its default.
        packages: distributions to report.
    """

    axis: int
    eps: float
    packages: tuple[str, ...]


FRAMEWORKS = {
    "torch": Framework(1, 1e-5, ("torch",)),
    "jax": Framework(-1, 1e-5, ("jax", "jaxlib", "flax")),
    "keras": Framework(-1, 1e-3, ("keras",)),
}
_LEAST = 7  # rounds
_SILENCE = 5.0  # seconds between two lines about the work
# Bytes for each element of the input: both gradients, the right result in float64, its parts.
_WORKSPACE = 80


def run(
    framework: str,
    shape: Sequence[int],
    *,
    masked: float | None = None,
    inference: bool = False,
    seconds: float = 3.0,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure this library's layer, the framework's own and a plain copy.

    Args:
        framework: a key of `FRAMEWORKS`.
        shape: of the input, float32; channels where the framework's own layer has them: axis 1 in
            torch, the last axis elsewhere.
        masked: share of padded rows, at least 0 and below 1; None for no mask.
        inference: measure a forward pass in evaluation instead of a training step.
        seconds: time to measure, about.
        tell: function that is given a line about each part of the work.

    Returns:
        Plain types only: the job, the machine, and for each variant its median, quartiles, error
        and GB/s.

    Raises:
        ValueError: a shape or share that cannot be measured, or at which the framework's layer is
            wrong; a wrong result has no speed.
        RuntimeError: this library's result is wrong.
    """
    _check(shape, masked, inference)
    own = FRAMEWORKS[framework]
    mode = "inference" if inference else "training"
    case = Case("bench", "", tuple(shape), mode, own.axis, own.eps, padded=masked)
    variants = _measure(framework, case, seconds, tell)
    ours, theirs, copy = (figures["ms"] for figures in variants.values())
    return {
        "framework": _name_backend(framework),
        "shape": list(shape),
        "mode": mode,
        "padded": masked,
        "bytes": count_bytes(case),
        "variants": variants,
        "times as fast": round_to(theirs / ours, 3),
        "times a copy": round_to(ours / copy, 3),
        "machine": describe_machine(count_cores()),
        "versions": describe_versions(*own.packages, *_backend_packages(framework)),
    }


def _measure(
    framework: str, case: Case, seconds: float, tell: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Figures of this library's layer, the framework's own and a copy, in this order."""
    steps = importlib.import_module(f"batchnorm.benchmark.{framework}_steps")
    rival, title = steps.name_rival(case)
    problem = make_problem(case)
    copies = count_bytes(case.bare) // count_copied_bytes(case)
    made = steps.make_variants(problem, ("ours", rival))
    named = {"batchnorm": made["ours"], title: made[rival], "copy": make_copy(problem, copies)}
    tell(f"bench: comparing {', '.join(named)} with float64")
    variants = measure(problem, named, seconds, _LEAST, clock=_make_clock(seconds, tell))
    del variants["copy"]["error"]  # it is a copy, or none
    return variants


def _make_clock(seconds: float, tell: Callable[[str], None]) -> Clock:
    """A clock that tells every few seconds for how long it has measured."""
    begun = told = None

    def clock(step: Callable[[], object], calls: int) -> float:
        nonlocal begun, told
        now = time.perf_counter()
        if begun is None or told is None:
            begun = told = now
            tell(f"bench: timing them in turns for about {seconds:.3g} s")
        elif now - told > _SILENCE:
            told = now
            tell(f"bench: {now - begun:.0f} of about {seconds:.3g} s")
        return time_calls(step, calls)

    return clock


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


def _backend() -> str:
    import keras

    return str(keras.backend.backend())


def _backend_packages(framework: str) -> tuple[str, ...]:
    backend = _backend() if framework == "keras" else ""
    return FRAMEWORKS[backend].packages if backend in FRAMEWORKS else ()


def _name_backend(framework: str) -> str:
    return f"keras on {_backend()}" if framework == "keras" else framework
