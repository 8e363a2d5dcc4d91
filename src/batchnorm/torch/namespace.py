"""torch as the core's `xp`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from batchnorm.core.namespace import Namespace
from batchnorm.torch import sums


def _view_memory(a: Tensor) -> Tensor:
    """`a` itself, which a compiler must write to memory, as a view needs it.

    Inductor puts what makes a value into each loop that reads it: without end where values follow
    from each other, which took a small layer ten times as long to compile.
    """
    return torch.as_strided(a, a.shape, a.stride())


class _TorchNamespace:
    """The functions that `batchnorm.core.namespace.Namespace` lists."""

    abs = staticmethod(torch.abs)
    sqrt = staticmethod(torch.sqrt)
    square = staticmethod(torch.square)
    log = staticmethod(torch.log)
    expm1 = staticmethod(torch.expm1)
    isfinite = staticmethod(torch.isfinite)
    where = staticmethod(torch.where)
    reshape = staticmethod(torch.reshape)
    zeros_like = staticmethod(torch.zeros_like)
    ones_like = staticmethod(torch.ones_like)

    @staticmethod
    def sum(a: Tensor, *, axis: Sequence[int], keepdims: bool) -> Tensor:
        axes = tuple(axis)
        if keepdims:
            return sums.sum_axes(a, axes)
        return sums.sum_axes(a, axes).reshape([n for i, n in enumerate(a.shape) if i not in axes])

    @staticmethod
    def max(a: Tensor, *, axis: int) -> Tensor:
        return torch.amax(a, dim=axis)

    @staticmethod
    def broadcast_like(a: Tensor, x: Tensor) -> Tensor:
        return sums.broadcast_like(a, x)

    @staticmethod
    def materialize(a: Tensor) -> Tensor:
        compiler = torch.compiler
        made_once = a.requires_grad or not compiler.is_compiling() or compiler.is_exporting()
        return a if made_once or not a.is_cpu else _view_memory(a)

    @staticmethod
    def cast(a: Tensor, dtype: torch.dtype) -> Tensor:
        return a.to(dtype)

    @staticmethod
    def stop_gradient(a: Tensor) -> Tensor:
        return a.detach()


class _Once(_TorchNamespace):
    """The same for the compiler's code on a CPU: values per channel are made once.

    Inductor would put the operations that make them into each loop over elements.
    """

    @staticmethod
    def sum(a: Tensor, *, axis: Sequence[int], keepdims: bool) -> Tensor:
        return sums.sum_briefly(a, tuple(axis), keepdims)

    @staticmethod
    def broadcast_like(a: Tensor, x: Tensor) -> Tensor:
        return _view_memory(a).expand(x.shape)

    @staticmethod
    def materialize(a: Tensor) -> Tensor:
        return _view_memory(a)


class _OverRanks(_TorchNamespace):
    """The same for arrays that have ranks on axis 0, and are summed over that axis alone."""

    @staticmethod
    def sum(a: Any, *, axis: Sequence[int], keepdims: bool) -> Any:
        assert tuple(axis) == (0,)
        total = sums.sum_pairwise(a)
        return total if keepdims else total[0]


class _HostOverRanks:
    """The functions that merging needs, for numpy arrays, whose operations start faster."""

    where = staticmethod(np.where)
    square = staticmethod(np.square)
    isfinite = staticmethod(np.isfinite)
    reshape = staticmethod(np.reshape)
    sum = _OverRanks.sum

    @staticmethod
    def broadcast_like(a: Any, x: Any) -> Any:
        return np.broadcast_to(a, x.shape)


XP = cast(Namespace, _TorchNamespace)
ONCE = cast(Namespace, _Once)
OVER_RANKS = cast(Namespace, _OverRanks)
HOST_OVER_RANKS = cast(Namespace, _HostOverRanks)
