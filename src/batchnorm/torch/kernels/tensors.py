"""Tensors whose memory the kernels may touch, and why they may not touch others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.core.running import Running
from batchnorm.torch.private import (
    count_modes,
    find_trace,
    find_transformation,
    in_forward_mode,
    is_batched,
    is_wrapped,
    is_zero,
)
from batchnorm.torch.tracing import untraced

NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
NOT_PLAIN = "x is not a plain tensor, or a transformation of torch is at work"
_PLAIN = (Tensor, torch.nn.Parameter)


@untraced
def is_plain(x: Tensor) -> bool:
    """True if x's memory may be read directly, and nothing of torch traces or transforms."""
    return not torch.compiler.is_compiling() and is_plain_uncompiled(x)


@untraced
def is_plain_uncompiled(x: Tensor) -> bool:
    """The same where no compiler is at work, which takes time to find out."""
    return (
        type(x) in _PLAIN
        and x.layout is torch.strided
        and not x.is_nested
        and count_modes() == 0
        and find_transformation() is None
        and find_trace() is None
        and not in_forward_mode()
        and has_memory(x)
    )


def has_memory(a: Tensor) -> bool:
    """True if its memory holds its values: no wrapper of a transformation, no lazy negation."""
    return not (
        is_wrapped(a)
        or is_batched(a)  # is_grads_batched=True
        or a.is_neg()
        or is_zero(a)
    )


def refuse_parameters(parameters: Sequence[Tensor | None]) -> str | None:
    """The kernels' reason against weight and bias, or None."""
    for a in parameters:
        if a is not None and a.dtype not in NAMES:
            return f"it takes floating parameters, and got {a.dtype}"
    return None


def refuse_tensors(
    x: Tensor, tensors: Sequence[Tensor | None], running: Running | None, *, traced: bool = False
) -> str | None:
    """The reason against these tensors of the kernels that serve x, or None.

    `traced`: they are of a graph, whose operators get lazily negated tensors resolved.
    """
    device, cpu = x.device, x.is_cpu  # the latter is asked in half the time
    for a in tensors:
        if a is None:
            continue
        if not ((a.is_cpu if cpu else a.device == device) and type(a) in _PLAIN):
            return f"there is none for a {type(a).__name__} on device {a.device}"
        if not traced and (a.is_neg() or is_zero(a)):
            return "it reads memory, where a lazily computed tensor holds other values, or none"
    if running is None:
        return None
    dtype = running.mean.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return f"it keeps float32 or float64 statistics, and got {dtype}"
    for a in (running.mean, running.var, *running[3:]):
        if a is not None and not (
            (a.is_cpu if cpu else a.device == device)
            and type(a) in _PLAIN
            and a.dtype is dtype
            and a.is_contiguous()
            and (traced or not (a.is_neg() or is_zero(a)))
        ):
            return f"it takes contiguous running statistics of one type, on {device}"
    a = running.batches
    if a is not None and not (
        (a.is_cpu if cpu else a.device == device)
        and type(a) in _PLAIN
        and a.dtype is torch.int64
        and a.numel() == 1
        and (traced or not a.is_neg())
    ):
        return f"it counts batches in one int64 on {device}, and got {a.dtype}"
    return None


def refuse_residual(x: Tensor, residual: Tensor | None) -> str | None:
    """The kernels' reason against the residual, or None."""
    if residual is None or residual.dtype is x.dtype:
        return None
    return f"it takes a residual of x's type {x.dtype}, and got {residual.dtype}"
