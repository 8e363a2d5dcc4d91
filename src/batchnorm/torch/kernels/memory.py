"""Memory for outputs of the kernels, and for other tensors of x's shape."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.kernels import geometry
from batchnorm.torch.kernels.decision import Decision
from batchnorm.torch.kernels.recycling import RECYCLER


def empty_output(x: Tensor, decision: Decision) -> Tensor:
    """Memory for an output of x's shape and type, its axes in x's order."""
    if not decision.gapped:
        if decision.large and RECYCLER.on:
            return RECYCLER.empty(x.shape, x.stride(), x.dtype)
        return torch.empty_like(x)
    assert decision.geometry is not None
    strides = geometry.dense_strides(decision.geometry, decision.layout.shape)
    if decision.large and RECYCLER.on:
        return RECYCLER.empty(x.shape, strides, x.dtype)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def like(a: Tensor, x: Tensor, decision: Decision) -> Tensor:
    """A tensor of x's shape, copied if it does not lie in memory as x does."""
    if a.stride() == x.stride():
        return a
    assert decision.geometry is not None
    if geometry.row_distance(decision.geometry, decision.layout.shape, a.stride()) is not None:
        return a
    return empty_output(x, decision).copy_(a)


def row_of(a: Tensor, x: Tensor, decision: Decision) -> int:
    """The distance between rows of a tensor that `like` has returned."""
    assert decision.geometry is not None
    if a.stride() == x.stride():
        return decision.geometry.row
    row = geometry.row_distance(decision.geometry, decision.layout.shape, a.stride())
    assert row is not None
    return row
