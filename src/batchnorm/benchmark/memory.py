"""The memory that a training step takes, in arrays of x's size.

It is the resident memory that the system counts for the process, less what was resident before the
first step: that sees torch's allocator, this library's kernels, autograd, and outputs that are
kept to be used again, and it cannot be told less than what is there. Arrays above glibc's largest
threshold are mapped and unmapped one by one, so that a freed one is gone from the count at once.
Linux only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from batchnorm.benchmark.problem import Problem
from batchnorm.benchmark.timing import round_to
from batchnorm.benchmark.torch_job import Job, place
from batchnorm.benchmark.torch_rivals import activate
from batchnorm.memory import release_memory

__all__ = ["LEAST", "measure_memory"]

LEAST = 32 << 20  # bytes of x; smaller arrays may come from a heap that keeps what is freed
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_STEPS = 3


def measure_memory(problem: Problem) -> dict[str, dict[str, float]]:
    """For each variant `kept`, what the first forward pass leaves, and `peak`, the most.

    `kept` is y, which the caller holds, and what the backward pass needs; later forward passes
    find memory that is idle besides. The peak is that of several steps. x, dy and the residual
    were there before. Empty on systems that do not tell, and for arrays too small to be seen.

    Args:
        problem: float32, without a mask.
    """
    if problem.x.nbytes < LEAST or not _can_reset():
        return {}
    job = place(problem, "cpu", None)
    case = problem.case
    makers: dict[str, Callable[[], Any]] = {"ours": job.ours, "torch": job.theirs}
    if case.activation is not None:
        makers["torch"] = lambda: activate(job.theirs(), in_place=False)
        makers["torch, in place"] = lambda: activate(job.theirs(), in_place=True)
    found = {}
    for name, make in makers.items():
        layer = make()
        takes_residual = name == "ours" and case.residual
        forward = _by_name(layer) if takes_residual else layer
        found[name] = _measure(job, forward)
    return found


def _by_name(layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, residual: layer(x, residual=residual)


def _measure(job: Job, forward: Callable[..., Tensor]) -> dict[str, float]:
    inputs = [a.detach().requires_grad_() for a in (job.x, job.residual) if a is not None]
    # Threads, and code that is loaded when first used. Arrays of some megabytes would come from
    # the heap, which keeps them.
    *small, dy = (_cut(a) for a in (*inputs, job.dy))
    forward(*(a.requires_grad_() for a in small)).backward(dy)
    release_memory()
    before = _read("VmRSS")
    kept = peak = 0
    for step in range(_STEPS):
        _RESET.write_text("5")  # the peak is what is resident now
        for a in inputs:
            a.grad = None
        y = forward(*inputs)
        if step == 0:
            kept = _read("VmRSS") - before
        y.backward(job.dy)
        peak = max(peak, _read("VmHWM") - before)
        del y
    array = job.x.nbytes
    return {"kept": round_to(kept / array, 3), "peak": round_to(peak / array, 3)}


def _cut(a: Tensor) -> Tensor:
    """Two positions along each axis but the channels'."""
    at = [slice(None) if axis == 1 else slice(2) for axis in range(a.dim())]
    return a.detach()[tuple(at)].contiguous()


def _read(name: str) -> int:
    """A figure of the process's status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {name}.")


def _can_reset() -> bool:
    try:
        _RESET.write_text("5")
        _read("VmHWM")
    except (OSError, RuntimeError):
        return False
    return True
