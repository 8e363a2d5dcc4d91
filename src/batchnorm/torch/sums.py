"""Sums whose bits do not depend on the number of threads (S17), and their transpose.

torch splits a large sum over its threads, and the split decides how the terms are grouped. Here
parts of the rows are added elementwise, a fixed tree, until what is left is small enough for
torch to add in one thread. Broadcasting sums in its backward pass, so it comes along.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.torch.tracing import is_more

SERIAL = 2**15  # elements below which torch never splits a sum: its internal grain size
# Terms of a float32 sum in one loop: it misses by 2^-24 of its size for each, so by 3e-5, less than
# the array code's bound of 5e-5 (S3).
BRIEF = 512
_PARTS = 16  # few enough that rounding hardly grows, many enough that the sum stays in cache


def sum_axes(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The sum of x over `axes`, which are kept with size 1."""
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype == torch.float32:
        # Inductor's loops on a CPU add one row after another, which loses digits that the core
        # counts on: a mean must not miss by a deviation.
        return torch.sum(x, dim=axes, keepdim=True, dtype=torch.float64).float()
    if _is_serial(x):
        return torch.sum(x, dim=axes, keepdim=True)
    return _Sum.apply(x, axes)


def sum_briefly(x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    """The sum of x over `axes`, by the loops of the compiler for a CPU.

    Up to `BRIEF` terms in float32, in one loop or in two, one inside the other; more in float64:
    conversions take longer than the sums.
    """
    if x.dtype != torch.float32 or _is_brief(x, axes):
        return torch.sum(x, dim=axes, keepdim=keepdims)
    if len(axes) > 1 and _is_brief(x, axes[:1]) and _is_brief(x, axes[1:]):
        total = torch.sum(x, dim=axes[1:], keepdim=True)
        return torch.sum(total, dim=axes if not keepdims else axes[:1], keepdim=keepdims)
    return torch.sum(x, dim=axes, keepdim=keepdims, dtype=torch.float64).float()


def _is_brief(x: Tensor, axes: tuple[int, ...]) -> bool:
    """True if sums over `axes` have few terms; False where the compiler does not know."""
    terms = math.prod([x.shape[a] for a in axes])
    return is_more(-terms, -BRIEF - 1)


def sum_pairwise(x: Any) -> Any:
    """The sum of x over axis 0, which is kept with size 1: a tree of elementwise additions.

    Every machine gets the same bits, whatever its instructions and threads, and in torch the same
    as in numpy.
    """
    join: Any = torch.cat if isinstance(x, Tensor) else np.concatenate
    size = x.shape[0]
    while size > 1:
        half = size // 2
        total = x[:half] + x[half : 2 * half]
        x = join([total, x[2 * half :]]) if size % 2 else total
        size -= half
    return x


def broadcast_like(a: Tensor, x: Tensor) -> Tensor:
    """`a` broadcast to the shape of x."""
    if a.shape == x.shape or not a.requires_grad or _is_serial(x):
        return a.expand(x.shape)
    if a.dim() < x.dim():
        a = a.reshape((1,) * (x.dim() - a.dim()) + tuple(a.shape))
    return _Broadcast.apply(a, tuple(x.shape))


def _is_serial(x: Tensor) -> bool:
    # A compiler orders its own sums, for a fixed number of threads, and fuses them.
    return torch.compiler.is_compiling() or x.numel() < SERIAL


class _Sum(torch.autograd.Function):
    """Sum over axes; the gradient is a broadcast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        return _add_parts(x, axes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.axes = inputs
        ctx.shape = tuple(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _Broadcast.apply(dy, ctx.shape), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
        return _Sum.apply(tangent, ctx.axes)


class _Broadcast(torch.autograd.Function):
    """Broadcast to a shape of the same rank; the gradient is a sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, shape: tuple[int, ...]) -> Tensor:
        return a.expand(shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, ctx.shape = inputs
        sizes = enumerate(zip(a.shape, ctx.shape, strict=True))
        ctx.axes = tuple(axis for axis, (n, wanted) in sizes if n != wanted)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _Sum.apply(dy, ctx.axes), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Any:
        return _Broadcast.apply(tangent, ctx.shape)


def _add_parts(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    while x.numel() >= SERIAL:
        axis = max(axes, key=lambda a: x.shape[a])
        size = x.shape[axis]
        if size == 1:
            break  # nothing left to add: x is one value per channel
        part = max(size // _PARTS, 1)
        total = x.narrow(axis, 0, part) + x.narrow(axis, part, part)
        for start in range(2 * part, size, part):
            length = min(part, size - start)
            total.narrow(axis, 0, length).add_(x.narrow(axis, start, length))
        x = total
    return torch.sum(x, dim=axes, keepdim=True)
