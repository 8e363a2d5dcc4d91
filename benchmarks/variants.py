"""The ways to do each job: this library's, torch's, and what people write by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.benchmark.torch_steps import pack, pick_layer
from batchnorm.core.running import Running
from batchnorm.kernels.kept import TYPES
from batchnorm.torch import BatchNorm
from batchnorm.torch.kernels import on_cpu
from batchnorm.torch.kernels.decision import decide
from problem import EPS, Problem

Step = Callable[[], Tensor]


@dataclass
class Variant:
    """One way to do a job.

    Attributes:
        step: does it once, and returns y.
        gradients: dx and the residual's gradient, as the last step left them.
        exact: held to this library's bound rather than to a loose one.
        padding: whether y at padded rows is what the library promises there.
        copies: moves bytes, and normalizes nothing.
    """

    step: Step
    gradients: list[Callable[[], Tensor | None]] = field(default_factory=list)
    exact: bool = False
    padding: bool = False
    copies: bool = False


def make_variants(problem: Problem) -> dict[str, Variant]:
    """Every variant of a case, by name."""
    case = problem.case
    ours = _ours(problem)
    torch._dynamo.reset()  # what was compiled for another case is in nobody's way
    if case.mode == "inference":
        found = {"ours": _forward(problem, ours, True), "torch": _forward(problem, _torch(problem))}
    elif case.padded is not None:
        found = _masked(problem, ours)
    elif case.activation is not None:
        found = _activated(problem, ours)
    else:
        found = {"ours": _step(problem, ours, exact=True), "torch": _step(problem, _torch(problem))}
        if case.copied and problem.x.is_cpu and not problem.fused:
            found["ours, reused buffers"] = _reused(problem)
    if case.compiled:
        found["ours, compiled"] = _compiled(problem)
    if case.copied:
        found["copy"] = _copy(problem)
    return found


def make_default_variants(problem: Problem) -> dict[str, Variant]:
    """The library's way and its rival's only."""
    found = make_variants(problem)
    return {name: found[name] for name in ("ours", problem.case.rival)}


def _masked(problem: Problem, ours: nn.Module) -> dict[str, Variant]:
    formula = _formula(problem)
    compiled = torch.compile(formula, dynamic=False)
    packed = pack(_load(nn.BatchNorm1d(problem.x.shape[1], EPS), problem))
    return {
        "ours": _step(problem, ours, problem.mask, exact=True),
        "pack": _step(problem, packed, problem.mask),
        "formula": _step(problem, formula, problem.real),
        "formula, compiled": _step(problem, compiled, problem.real),
    }


def make_unmasked(problem: Problem) -> Variant:
    """The library's step on the same tensors without their mask."""
    return _step(problem, _ours(problem), exact=True)


def _activated(problem: Problem, ours: nn.Module) -> dict[str, Variant]:
    layer = _torch(problem)

    def separate(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = layer(x)
        return torch.relu(y if residual is None else y + residual)

    def in_place(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = layer(x)
        return torch.relu_(y if residual is None else y.add_(residual))

    def fused_step(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ours(x, residual=residual)

    found = {
        "ours": _step(problem, fused_step, exact=True),
        "torch": _step(problem, separate),
        "torch, in place": _step(problem, in_place),
    }
    if problem.x.is_cuda:
        found["torch, compiled"] = _step(problem, torch.compile(separate, dynamic=False))
    return found


def _compiled(problem: Problem) -> Variant:
    """The library's layer under torch.compile."""
    layer = torch.compile(_ours(problem), dynamic=False, fullgraph=True)
    if problem.case.mode == "inference":
        return _forward(problem, layer, exact=True)
    if problem.residual is None:
        return _step(problem, layer, problem.mask, exact=True)
    return _step(problem, lambda x, residual: layer(x, residual=residual), exact=True)


def _step(
    problem: Problem, forward: Any, mask: Tensor | None = None, *, exact: bool = False
) -> Variant:
    """A forward and a backward pass on leaves of the variant's own."""
    x, dy = problem.x.detach().requires_grad_(), problem.dy
    if problem.residual is not None:
        return _residual_step(problem, forward, x, exact)
    arguments = (x,) if mask is None else (x, mask)

    def step() -> Tensor:
        x.grad = None
        y: Tensor = forward(*arguments)
        y.backward(dy)
        return y

    return Variant(step, [lambda: x.grad], exact, padding=exact)


def _residual_step(problem: Problem, forward: Any, x: Tensor, exact: bool) -> Variant:
    assert problem.residual is not None
    dy, residual = problem.dy, problem.residual.detach().requires_grad_()

    def step() -> Tensor:
        x.grad = residual.grad = None
        y: Tensor = forward(x, residual)
        y.backward(dy)
        return y

    return Variant(step, [lambda: x.grad, lambda: residual.grad], exact, padding=exact)


def _forward(problem: Problem, layer: nn.Module, exact: bool = False) -> Variant:
    x = problem.x

    def step() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return Variant(step, [], exact, padding=exact)


def _copy(problem: Problem) -> Variant:
    """As many bytes as the job needs, read and written by copying x into one buffer."""
    x, y = problem.x, torch.empty_like(problem.x)
    copies = 1 if problem.case.mode == "inference" else 4

    def step() -> Tensor:
        for _ in range(copies):
            y.copy_(x)
        return y

    return Variant(step, copies=True)


def _reused(problem: Problem) -> Variant:
    """The compiled passes alone, on addresses, with y and dx in memory that is kept."""
    x, dy, layer = problem.x, problem.dy, _ours(problem)
    y, dx = torch.empty_like(x), torch.empty_like(x)
    dgamma, dbeta = torch.empty_like(layer.weight), torch.empty_like(layer.bias)
    decision = decide(
        (x.shape, x.stride(), x.dtype, "cpu"),
        *(1, None, False, None, None, False),
    )
    plan, geometry = decision.plan, decision.geometry
    assert geometry is not None
    running = Running(layer.running_mean, layer.running_var, layer.num_batches_tracked)
    kind, threads = TYPES["float32"], torch.get_num_threads()
    forward = partial(
        plan.forward,
        x=x.data_ptr(),
        mask=0,
        y=y.data_ptr(),
        residual=0,
        residual_row=0,
        eps=EPS,
        decay=0.9,
        batch=True,
        update=True,
        unbiased=True,
        renorm=None,
        threads=threads,
        kept=None,
    )
    backward = partial(
        plan.backward,
        dy=dy.data_ptr(),
        dy_row=geometry.dense,
        x=x.data_ptr(),
        y=0,
        mask=0,
        dx=dx.data_ptr(),
        dresidual=0,
        batch=True,
        threads=threads,
        dgamma_type=kind,
        dbeta_type=kind,
    )

    def step() -> Tensor:  # which keeps the tensors whose addresses it hands over
        kept = forward(state=on_cpu.find_state(layer.weight, layer.bias, running))
        backward(kept=kept, dgamma=dgamma.data_ptr(), dbeta=dbeta.data_ptr())
        return y

    return Variant(step, [lambda: dx], exact=True, padding=True)


def _formula(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """Masked normalization in elementwise operations; without running statistics."""
    row = (1, -1, *(1,) * (problem.x.dim() - 2))
    gamma = problem.gamma.reshape(row).clone().requires_grad_()
    beta = problem.beta.reshape(row).clone().requires_grad_()
    reduced = [a for a in range(problem.x.dim()) if a != 1]

    def formula(x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum()
        mean = torch.where(mask, x, 0.0).sum(reduced, keepdim=True) / count
        centred = torch.where(mask, x - mean, 0.0)
        var = (centred * centred).sum(reduced, keepdim=True) / count
        return centred * (gamma * torch.rsqrt(var + EPS)) + beta

    return formula


def _ours(problem: Problem) -> BatchNorm:
    case, channels = problem.case, problem.x.shape[1]
    layer = BatchNorm(channels, EPS, axis=1, activation=case.activation, fused=problem.fused)
    return _load(layer, problem)


def _torch(problem: Problem) -> Any:
    return _load(pick_layer(problem.x.dim())(problem.x.shape[1], EPS), problem)


def _load(layer: Any, problem: Problem) -> Any:
    layer = layer.to(problem.x.device)
    with torch.no_grad():
        layer.weight.copy_(problem.gamma)
        layer.bias.copy_(problem.beta)
        layer.running_mean.copy_(problem.mean)
        layer.running_var.copy_(problem.var)
    return layer.train(problem.case.mode == "training")
