"""A case's tensors, and what must come out of them in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import batchnorm
from cases import Case

EPS = 1e-5
_ANCHOR = 1 << 20  # elements, about, of the small copy on which the float64 results are compared


@dataclass
class Problem:
    """What a case's variants get.

    Attributes:
        case: which one.
        x, dy, residual: of the case's shape; the last or None.
        mask: true at real rows, x's shape without channels, or fewer axes; or None.
        gamma, beta, mean, var: per channel; the last two are running statistics.
        fused: what this library's layers are told.
    """

    case: Case
    x: Tensor
    dy: Tensor
    residual: Tensor | None
    mask: Tensor | None
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    fused: bool | None = None

    @property
    def real(self) -> Tensor | None:
        """The mask in x's rank."""
        if self.mask is None:
            return None
        if self.mask.dim() == 1:
            return self.mask.reshape(-1, *(1,) * (self.x.dim() - 1))
        return self.mask.unsqueeze(1)


@dataclass
class Expected:
    """y, dx and the residual's gradient in float64; those that the case has."""

    y: Tensor
    dx: Tensor | None = None
    dresidual: Tensor | None = None


def make_problem(case: Case, device: str = "cpu", fused: bool | None = None) -> Problem:
    """Random tensors: the same ones for the same case and device, whatever ran before."""
    torch.manual_seed(0)
    with torch.device(device):
        return _make_problem(case, fused)


def _make_problem(case: Case, fused: bool | None) -> Problem:
    channels, dtype = case.shape[1], getattr(torch, case.dtype)
    memory = torch.channels_last if case.channels_last else torch.contiguous_format
    x = torch.empty(case.shape, dtype=dtype, memory_format=memory).normal_()
    row = (1, channels, *(1,) * (len(case.shape) - 2))
    x.mul_((0.5 + torch.rand(row)).to(dtype)).add_(torch.randn(row).to(dtype))
    mask = None
    if case.padded is not None:
        rows = case.shape[:1] + case.shape[2:]
        mask = torch.rand(rows) >= case.padded
    return Problem(
        case,
        x,
        torch.empty_like(x).normal_(),
        torch.empty_like(x).normal_() if case.residual else None,
        mask,
        0.5 + torch.rand(channels),
        torch.randn(channels),
        torch.randn(channels),
        0.5 + torch.rand(channels),
        fused,
    )


def solve(problem: Problem) -> Expected:
    """The case's result in float64. Sets dy to 0 where the activation's side is a toss-up."""
    case, real = problem.case, problem.real
    reduced = [a for a in range(problem.x.dim()) if a != 1]
    x, gamma = problem.x.double(), _in_rank(problem.gamma, problem)
    mean, var = _in_rank(problem.mean, problem), _in_rank(problem.var, problem)
    if case.mode == "training":
        mean = _mean(x, real, reduced)
        var = _mean((x - mean).square_(), real, reduced)
    rstd = (var + EPS).rsqrt()
    normalized = x.sub_(mean).mul_(rstd)
    y = (normalized * gamma).add_(_in_rank(problem.beta, problem))
    if problem.residual is not None:
        y.add_(problem.residual)
    if case.mode == "inference":
        return Expected(y)
    if case.activation is not None:
        # One rounding decides whether such an element passes dy on; no tolerance covers that.
        problem.dy.masked_fill_(y.abs() < 1e-3, 0.0)
    g = problem.dy.double()
    if case.activation is not None:
        g.mul_(y > 0)
        y.relu_()
    dresidual = None if problem.residual is None else g.clone()
    if case.mode == "training":
        inner = _mean(g * normalized, real, reduced)
        g.sub_(_mean(g, real, reduced)).sub_(normalized.mul_(inner))
    g.mul_(gamma * rstd)
    if real is not None:
        g.masked_fill_(~real, 0.0)
    return Expected(y, g, dresidual)


def check_solution(case: Case) -> None:
    """Compare `solve` with the library's float64 reference on a small copy of the case.

    Raises:
        RuntimeError: they differ.
    """
    samples = max(1, min(case.shape[0], _ANCHOR // math.prod(case.shape[1:])))
    problem = make_problem(replace(case, shape=(samples, *case.shape[1:])))
    found = solve(problem)
    training = case.mode == "training"
    x, dy = problem.x.double().numpy(), problem.dy.double().numpy()
    arguments: dict[str, Any] = {
        "gamma": problem.gamma.numpy(),
        "beta": problem.beta.numpy(),
        "mask": None if problem.mask is None else problem.mask.numpy(),
        "axis": 1,
        "eps": EPS,
        "training": training,
        "running_mean": None if training else problem.mean.numpy(),
        "running_var": None if training else problem.var.numpy(),
        "residual": None if problem.residual is None else problem.residual.double().numpy(),
        "activation": case.activation,
    }
    y, _ = batchnorm.batch_norm(x, **arguments)
    pairs = [(found.y, y)]
    if found.dx is not None:
        pairs.append((found.dx, batchnorm.batch_norm_gradient(dy, x, **arguments)[0]))
    for mine, reference in pairs:
        off = (mine - torch.from_numpy(reference)).abs().max().item()
        if not off <= 1e-9:
            raise RuntimeError(f"{case.name}: two float64 results differ by {off:.1e}")


def _in_rank(a: Tensor, problem: Problem) -> Tensor:
    return a.double().reshape(1, -1, *(1,) * (problem.x.dim() - 2))


def _mean(a: Tensor, real: Tensor | None, reduced: list[int]) -> Tensor:
    if real is None:
        return a.mean(reduced, keepdim=True)
    count = real.expand(a.shape[0], 1, *a.shape[2:]).sum()
    return torch.where(real, a, 0.0).sum(reduced, keepdim=True) / count
