"""The compiled kernels as `step` calls them: tensors become addresses and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.core.config import Renorm
from batchnorm.core.running import Running
from batchnorm.kernels import cpu
from batchnorm.torch.kernels.decision import Decision
from batchnorm.torch.kernels.memory import row_of
from batchnorm.torch.kernels.tensors import NAMES

if TYPE_CHECKING:
    from batchnorm.torch.kernels.step import KernelStep

_CODES = {dtype: cpu.TYPES[name] for dtype, name in NAMES.items()}


def find_state(
    weight: Tensor | None, bias: Tensor | None, running: Running | None
) -> tuple[int, ...]:
    """Addresses and types of the per-channel tensors."""
    mean, var, batches = (None, None, None) if running is None else running[:3]
    return (
        0 if weight is None else weight.data_ptr(),
        2 if weight is None else _CODES[weight.dtype],
        0 if bias is None else bias.data_ptr(),
        2 if bias is None else _CODES[bias.dtype],
        0 if mean is None else mean.data_ptr(),
        2 if mean is None else _CODES[mean.dtype],
        0 if var is None else var.data_ptr(),
        0 if batches is None else batches.data_ptr(),
    )


def moments(call: KernelStep, x: Tensor) -> Any:
    """What the first pass keeps: count, mean and variance."""
    decision = call.decision
    assert decision.geometry is not None
    mask = 0 if call.mask is None else call.mask.data_ptr()
    return decision.plan.moments(x.data_ptr(), decision.geometry.row, mask, torch.get_num_threads())


def forward(
    call: KernelStep,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    merged: Any,
) -> Any:
    """Fill y and move the running statistics; what the backward step needs.

    `merged`: what `moments` keeps, merged with other ranks'; or None.
    """
    decision, options, mask = call.decision, call.options, call.mask
    geometry = decision.geometry
    assert geometry is not None
    kept = decision.plan.forward(
        x.data_ptr(),
        geometry.row,
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else row_of(residual, x, decision),
        0 if mask is None else mask.data_ptr(),
        y.data_ptr(),
        geometry.dense,
        *call.state,
        _renorm(options.renorm, call.running) if call.renorm else None,
        options.eps,
        -1.0 if options.decay is None else options.decay,
        call.batch,
        call.update,
        options.unbiased,
        torch.get_num_threads(),
        merged,
    )
    return merged if kept is None else kept


def backward(
    call: KernelStep,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    kept: Any,
) -> None:
    """Fill the gradients that are given."""
    call.decision.plan.backward(
        *_rows(call, dy, x, y, mask),
        *_output(call, dx),
        *_output(call, dresidual),
        *_parameters(dweight, dbias),
        kept,
        call.batch,
        torch.get_num_threads(),
    )


def reduce(
    call: KernelStep,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    dresidual: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    kept: Any,
) -> Tensor:
    """The sums that `apply` needs; fills the gradients that are given."""
    sums = call.decision.plan.reduce(
        *_rows(call, dy, x, y, mask),
        *_output(call, dresidual),
        *_parameters(dweight, dbias),
        kept,
        torch.get_num_threads(),
    )
    return torch.from_numpy(sums)


def apply(
    call: KernelStep,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    dx: Tensor | None,
    dresidual: Tensor | None,
    sums: Tensor,
    kept: Any,
) -> None:
    """Fill dx."""
    call.decision.plan.apply(
        *_rows(call, dy, x, y, mask),
        *_output(call, dx),
        *_output(call, dresidual),
        sums.numpy(),
        kept,
        torch.get_num_threads(),
    )


def row(kept: Any, name: str) -> Tensor:
    """One of STATISTICS, a value for each group and channel: memory of `kept` itself."""
    return torch.from_numpy(kept.row(cpu.STATISTICS[name]))


def count(kept: Any) -> Tensor:
    """Real rows of each group: memory of `kept` itself."""
    return torch.from_numpy(kept.count())


def pack(kept: Any) -> Tensor:
    """What a backward step needs of `kept` as one array: its memory itself."""
    return torch.from_numpy(kept.all())


def unpack(decision: Decision, data: Tensor) -> Any:
    """What a step kept, without renormalization, from the array that `pack` gave."""
    return decision.plan.restore(data.data_ptr(), data.numel(), False)


def _rows(
    call: KernelStep, dy: Tensor, x: Tensor, y: Tensor | None, mask: Tensor | None
) -> tuple[int, ...]:
    geometry = call.decision.geometry
    assert geometry is not None
    return (
        dy.data_ptr(),
        row_of(dy, x, call.decision),
        x.data_ptr(),
        geometry.row,
        0 if y is None else y.data_ptr(),
        geometry.dense,
        0 if mask is None else mask.data_ptr(),
    )


def _output(call: KernelStep, a: Tensor | None) -> tuple[int, int]:
    assert call.decision.geometry is not None
    return 0 if a is None else a.data_ptr(), call.decision.geometry.dense


def _parameters(dweight: Tensor | None, dbias: Tensor | None) -> tuple[int, ...]:
    return (
        0 if dweight is None else dweight.data_ptr(),
        2 if dweight is None else _CODES[dweight.dtype],
        0 if dbias is None else dbias.data_ptr(),
        2 if dbias is None else _CODES[dbias.dtype],
    )


def _renorm(renorm: Renorm | None, running: Running | None) -> tuple[Any, ...]:
    assert renorm is not None
    assert running is not None
    addresses = (a.data_ptr() for a in running[3:] if a is not None)
    return (*addresses, renorm.decay, renorm.rmin, renorm.rmax, renorm.dmax)
