"""Steps of torch: this library's layer, torch's own, and what people write by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from batchnorm.benchmark.case import Case
from batchnorm.benchmark.problem import Problem
from batchnorm.benchmark.torch_job import Job, pick_layer, place
from batchnorm.benchmark.torch_passes import make_step
from batchnorm.benchmark.torch_rivals import activate, formula, pack
from batchnorm.benchmark.variant import Variant
from batchnorm.kernels.schedules import visiting

__all__ = ["make_variants", "name_rival"]


def make_variants(
    problem: Problem, only: tuple[str, ...] = (), *, device: str = "cpu", fused: bool | None = None
) -> dict[str, Variant]:
    """The variants of a problem, by name.

    Args:
        problem: to solve; channels along axis 1.
        only: names of those to make; none for all.
        device: of their tensors.
        fused: option of this library's layers.
    """
    if "torch._dynamo" in sys.modules:  # steps compiled for another case are in nobody's way
        torch.compiler.reset()
    job = place(problem, device, fused)
    makers = _list_makers(job)
    return {name: make() for name, make in makers.items() if not only or name in only}


def name_rival(case: Case) -> tuple[str, str]:
    """The variant that torch offers for the job: its name, and its name for readers.

    Raises:
        ValueError: torch has no layer for the shape.
    """
    layer = pick_layer(len(case.shape))
    if case.padded is None or case.inference:
        return "torch", f"torch.nn.{layer.__name__}"
    return "pack", "torch on x[mask], scattered"


def _list_makers(job: Job) -> dict[str, Callable[[], Variant]]:
    case = job.case
    found: dict[str, Callable[[], Variant]] = {"ours": lambda: _ours(job)}
    if case.inference:
        found["torch"] = lambda: _infer(job, job.theirs())
    elif case.padded is not None:
        elementwise = formula(job)
        found["pack"] = lambda: _step(job, pack(job), job.mask)
        found["formula"] = lambda: _step(job, elementwise, job.real)
        found["formula, compiled"] = lambda: _step(job, _compile(elementwise), job.real)
    elif case.activation is not None:
        found["torch"] = lambda: _step(job, activate(job.theirs(), in_place=False))
        found["torch, in place"] = lambda: _step(job, activate(job.theirs(), in_place=True))
        if job.x.is_cuda:
            found["torch, compiled"] = lambda: _step(
                job, _compile(activate(job.theirs(), in_place=False))
            )
    else:
        found["torch"] = lambda: _step(job, job.theirs())
        if case.reused and job.x.is_cpu and not job.fused:
            found["ours, reused buffers"] = lambda: Variant(
                make_step(job.x, job.dy, job.ours(), case.eps), ours=True
            )
    if case.compiled:
        found["ours, compiled"] = lambda: _ours(job, compiled=True)
    if case.rival_compiled:
        found["torch, compiled"] = lambda: _theirs_compiled(job)
    if case.visits and (job.x.is_cuda or job.fused):
        found["ours, visits"] = lambda: _visits(job)
    found["copy"] = lambda: _copy(job)
    if case.padded is not None:
        found["ours, zeroed"] = lambda: _zeroed(job)
    if case.padded is not None and not case.inference:
        found["ours, no mask"] = lambda: _step(job, job.ours(), ours=True, unmasked=True)
    return found


def _zeroed(job: Job) -> Variant:
    """This library's layer with zeros at padded rows of y."""
    layer = job.ours("zero")
    if job.case.inference:
        made = _infer(job, lambda x: layer(x, job.mask), ours=True)
    else:
        made = _step(job, layer, job.mask, ours=True)
    return replace(made, zeroed=True)


def _ours(job: Job, *, compiled: bool = False) -> Variant:
    layer: Any = job.ours()
    if compiled:
        layer = _compile(layer, fullgraph=True)
    if job.case.inference:
        return _infer(job, layer, ours=True)
    if job.residual is None:
        return _step(job, layer, job.mask, ours=True)
    return _step(job, lambda x, residual: layer(x, residual=residual), ours=True)


def _visits(job: Job) -> Variant:
    """This library's layer in the GPU's other schedule."""
    variant = _ours(job)

    def step() -> Any:
        with visiting():
            return variant.step()

    return replace(variant, step=step)


def _theirs_compiled(job: Job) -> Variant:
    layer = _compile(job.theirs(), fullgraph=True)
    return _infer(job, layer) if job.case.inference else _step(job, layer)


def _compile(function: Any, *, fullgraph: bool = False) -> Any:
    return torch.compile(function, dynamic=False, fullgraph=fullgraph)


def _step(
    job: Job,
    forward: Any,
    mask: Tensor | None = None,
    *,
    ours: bool = False,
    unmasked: bool = False,
) -> Variant:
    """A forward and a backward pass on leaves of the variant's own."""
    x, dy = job.x.detach().requires_grad_(), job.dy
    if job.residual is not None:
        return _step_with_residual(job, forward, x, ours=ours)
    arguments = (x,) if mask is None else (x, mask)

    def step() -> tuple[Tensor, Tensor | None]:
        x.grad = None
        y: Tensor = forward(*arguments)
        y.backward(dy)
        return y, x.grad

    return Variant(step, ours=ours, unmasked=unmasked)


def _step_with_residual(job: Job, forward: Any, x: Tensor, *, ours: bool) -> Variant:
    assert job.residual is not None
    dy, residual = job.dy, job.residual.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor | None, Tensor | None]:
        x.grad = residual.grad = None
        y: Tensor = forward(x, residual)
        y.backward(dy)
        return y, x.grad, residual.grad

    return Variant(step, ("y", "dx", "dresidual"), ours)


def _infer(job: Job, layer: Any, *, ours: bool = False) -> Variant:
    x = job.x
    inputs = (x, x[:-1]) if job.case.turns else (x,)

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple([layer(a) for a in inputs])

    return Variant(step, ("y",), ours)


def _copy(job: Job) -> Variant:
    """x copied into an array that is kept."""
    x, y = job.x, torch.empty_like(job.x)
    return Variant(lambda: (y.copy_(x),), ("y",), copies=1)
