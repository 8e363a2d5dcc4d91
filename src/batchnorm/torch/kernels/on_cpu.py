"""The compiled kernels as `step` calls them: tensors become addresses and sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.core.config import Renorm
from batchnorm.core.running import Running
from batchnorm.kernels import cpu
from batchnorm.torch.kernels.decision import Decision
from batchnorm.torch.kernels.memory import row_of
from batchnorm.torch.kernels.records import Gradients, KernelStep, Rows
from batchnorm.torch.kernels.tensors import NAMES

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


def moments(step: KernelStep, x: Tensor) -> Any:
    """What the first pass keeps: count, mean and variance."""
    decision = step.decision
    assert decision.geometry is not None
    mask = 0 if step.mask is None else step.mask.data_ptr()
    return decision.plan.moments(x.data_ptr(), decision.geometry.row, mask, torch.get_num_threads())


def forward(
    step: KernelStep,
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
    decision, options, mask = step.decision, step.options, step.mask
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
        *step.state,
        _renorm(options.renorm, step.running) if step.renormalizes else None,
        options.eps,
        -1.0 if options.decay is None else options.decay,
        step.batch,
        step.update,
        options.unbiased,
        torch.get_num_threads(),
        merged,
    )
    return merged if kept is None else kept


def backward(step: KernelStep, rows: Rows, found: Gradients, kept: Any) -> None:
    """Fill the gradients that are given."""
    step.decision.plan.backward(
        *_rows(step, rows),
        *_output(step, found.x),
        *_output(step, found.residual),
        *_parameters(found.weight, found.bias),
        kept,
        step.batch,
        torch.get_num_threads(),
    )


def reduce(step: KernelStep, rows: Rows, found: Gradients, kept: Any) -> Tensor:
    """The sums that `apply` needs; fills the gradients that are given."""
    sums = step.decision.plan.reduce(
        *_rows(step, rows),
        *_output(step, found.residual),
        *_parameters(found.weight, found.bias),
        kept,
        torch.get_num_threads(),
    )
    return torch.from_numpy(sums)


def apply(step: KernelStep, rows: Rows, found: Gradients, sums: Tensor, kept: Any) -> None:
    """Fill dx."""
    step.decision.plan.apply(
        *_rows(step, rows),
        *_output(step, found.x),
        *_output(step, found.residual),
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


def _rows(step: KernelStep, rows: Rows) -> tuple[int, ...]:
    geometry = step.decision.geometry
    assert geometry is not None
    dy, x, y, mask = rows
    return (
        dy.data_ptr(),
        row_of(dy, x, step.decision),
        x.data_ptr(),
        geometry.row,
        0 if y is None else y.data_ptr(),
        geometry.dense,
        0 if mask is None else mask.data_ptr(),
    )


def _output(step: KernelStep, a: Tensor | None) -> tuple[int, int]:
    assert step.decision.geometry is not None
    return 0 if a is None else a.data_ptr(), step.decision.geometry.dense


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
