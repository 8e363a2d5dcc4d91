"""The Triton kernels as `steps` calls them: launches on the device of the tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchnorm.core.running import Running
from batchnorm.kernels.kept import STATISTICS
from batchnorm.kernels.triton.arguments import Array, Kept, Mask, Parameters
from batchnorm.torch.prepared import Prepared, row_of

if TYPE_CHECKING:
    from batchnorm.torch.steps import Call


def find_state(
    weight: Tensor | None, bias: Tensor | None, running: Running | None
) -> tuple[int, ...]:
    """Nothing: launches take the tensors themselves."""
    return ()


def moments(call: Call, x: Tensor) -> Kept:
    """What the first pass keeps: count, mean and variance."""
    with _on_device(x):
        return call.prepared.plan.moments(_input(call, x, x), _mask(call, call.mask))


def forward(
    call: Call,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    merged: Kept | None,
) -> Kept:
    """Fill y and move the running statistics; what the backward step needs.

    `merged`: what `moments` keeps, merged with other ranks'; or None.
    """
    with _on_device(x):
        return call.prepared.plan.forward(
            _input(call, x, x),
            _input(call, residual, x),
            _mask(call, call.mask),
            _output(call, y),
            Parameters(weight, bias),
            call.running,
            call.options,
            batch=call.batch,
            update=call.update,
            kept=merged,
        )


def backward(
    call: Call,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    kept: Kept,
) -> None:
    """Fill the gradients that are given."""
    with _on_device(x):
        call.prepared.plan.backward(
            _input(call, x, x),
            _input(call, dy, x),
            _output(call, y),
            _output(call, dx),
            _output(call, dresidual),
            _mask(call, mask),
            Parameters(dweight, dbias),
            kept,
            call.options,
            batch=call.batch,
        )


def reduce(
    call: Call,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    kept: Kept,
) -> Tensor:
    """The sums that `apply` needs; fills the gradients that are given."""
    with _on_device(x):
        return call.prepared.plan.reduce(
            _input(call, x, x),
            _input(call, dy, x),
            _output(call, y),
            _output(call, dresidual),
            _mask(call, mask),
            Parameters(dweight, dbias),
            kept,
            call.options,
        )


def apply(
    call: Call,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    sums: Tensor,
    kept: Kept,
) -> None:
    """Fill dx."""
    with _on_device(x):
        call.prepared.plan.apply(
            _input(call, x, x),
            _input(call, dy, x),
            _output(call, y),
            _output(call, dx),
            _output(call, dresidual),
            _mask(call, mask),
            sums,
            kept,
            call.options,
        )


def row(kept: Kept, name: str) -> Tensor:
    """One of STATISTICS, a value for each group and channel: memory of `kept` itself."""
    return kept.row(name)


def count(kept: Kept) -> Tensor:
    """Real rows of each group: memory of `kept` itself."""
    return kept.counts()


def pack(kept: Kept) -> Tensor:
    """What a backward step needs of `kept` as one array: its memory itself."""
    return kept.data[: len(STATISTICS) * kept.size + kept.groups]


def unpack(prepared: Prepared, data: Tensor) -> Kept:
    """What a step kept, without renormalization, from the array that `pack` gave."""
    return Kept(data, prepared.plan.statistics, prepared.plan.sizes.groups)


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device, which may be another one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _input(call: Call, a: Tensor | None, x: Tensor) -> Array:
    return Array(None) if a is None else Array(a, row_of(a, x, call.prepared))


def _output(call: Call, a: Tensor | None) -> Array:
    assert call.prepared.geometry is not None
    return Array(None) if a is None else Array(a, call.prepared.geometry.dense)


def _mask(call: Call, mask: Tensor | None) -> Mask:
    if mask is None:
        return Mask(None)
    assert call.prepared.view is not None
    # The bytes of a bool, which is what a kernel reads.
    data = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
    return Mask(data, *call.prepared.view)
