"""The ways in torch to do by hand what its layer does not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.benchmark.torch_job import Job

__all__ = ["activate", "formula", "pack"]


def pack(job: Job) -> Callable[[Tensor, Tensor], Tensor]:
    """torch's layer on the real rows, scattered into zeros: torch takes no mask."""
    layer = job.load(nn.BatchNorm1d(job.case.channels, job.case.eps))

    def forward(x: Tensor, mask: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        y = torch.zeros(rows.shape, dtype=x.dtype, device=x.device)
        return y.index_put_((mask,), layer(rows[mask])).movedim(-1, 1)

    return forward


def activate(layer: Any, *, in_place: bool) -> Callable[..., Tensor]:
    """torch's layer, addition and ReLU as operators of their own."""

    def separate(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = layer(x)
        return torch.relu(y if residual is None else y + residual)

    def overwrite(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = layer(x)
        return torch.relu_(y if residual is None else y.add_(residual))

    return overwrite if in_place else separate


def formula(job: Job) -> Callable[[Tensor, Tensor], Tensor]:
    """Masked normalization in elementwise operations; without running statistics."""
    row, eps = (1, -1, *(1,) * (job.x.dim() - 2)), job.case.eps
    gamma, beta = (
        torch.tensor(a, device=job.device).reshape(row).requires_grad_()
        for a in (job.problem.gamma, job.problem.beta)
    )
    reduced = [a for a in range(job.x.dim()) if a != 1]

    def apply_formula(x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum()
        mean = torch.where(mask, x, 0.0).sum(reduced, keepdim=True) / count
        centred = torch.where(mask, x - mean, 0.0)
        var = (centred * centred).sum(reduced, keepdim=True) / count
        return centred * (gamma * torch.rsqrt(var + eps)) + beta

    return apply_formula
