"""The Triton kernels as `step` calls them: launches on the device of the tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from batchnorm.core.running import Running
from batchnorm.kernels.kept import STATISTICS
from batchnorm.kernels.triton.arguments import Array, Kept, Mask, Parameters
from batchnorm.torch.kernels.decision import Decision
from batchnorm.torch.kernels.memory import row_of
from batchnorm.torch.kernels.records import Gradients, KernelStep, Rows


def find_state(
    weight: Tensor | None, bias: Tensor | None, running: Running | None
) -> tuple[int, ...]:
    """Nothing: launches take the tensors themselves."""
    return ()


def moments(step: KernelStep, x: Tensor) -> Kept:
    """The record of the first pass: count, mean and variance."""
    with _on_device(x):
        return step.decision.plan.moments(_input(step, x, x), _mask(step, step.mask))


def forward(
    step: KernelStep,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    merged: Kept | None,
) -> Kept:
    """Fill y, move the running statistics, and return the record for the backward step.

    `merged`: the record of `moments`, merged with other ranks'; or None.
    """
    with _on_device(x):
        return step.decision.plan.forward(
            _input(step, x, x),
            _input(step, residual, x),
            _mask(step, step.mask),
            _output(step, y),
            Parameters(weight, bias),
            step.running,
            step.options,
            batch=step.batch,
            update=step.update,
            kept=merged,
        )


def backward(step: KernelStep, rows: Rows, found: Gradients, kept: Kept) -> None:
    """Fill the gradients that are given."""
    with _on_device(rows.x):
        step.decision.plan.backward(
            _input(step, rows.x, rows.x),
            _input(step, rows.dy, rows.x),
            _output(step, rows.y),
            _output(step, found.x),
            _output(step, found.residual),
            _mask(step, rows.mask),
            Parameters(found.weight, found.bias),
            kept,
            step.options,
            batch=step.batch,
        )


def reduce(step: KernelStep, rows: Rows, found: Gradients, kept: Kept) -> Tensor:
    """The sums that `apply` needs; fills the gradients that are given."""
    with _on_device(rows.x):
        return step.decision.plan.reduce(
            _input(step, rows.x, rows.x),
            _input(step, rows.dy, rows.x),
            _output(step, rows.y),
            _output(step, found.residual),
            _mask(step, rows.mask),
            Parameters(found.weight, found.bias),
            kept,
            step.options,
        )


def apply(step: KernelStep, rows: Rows, found: Gradients, sums: Tensor, kept: Kept) -> None:
    """Fill dx."""
    with _on_device(rows.x):
        step.decision.plan.apply(
            _input(step, rows.x, rows.x),
            _input(step, rows.dy, rows.x),
            _output(step, rows.y),
            _output(step, found.x),
            _output(step, found.residual),
            _mask(step, rows.mask),
            sums,
            kept,
            step.options,
        )


def row(kept: Kept, name: str) -> Tensor:
    """One of STATISTICS, a value for each group and channel: memory of `kept` itself."""
    return kept.row(name)


def count(kept: Kept) -> Tensor:
    """Real rows of each group: memory of `kept` itself."""
    return kept.counts()


def pack(kept: Kept) -> Tensor:
    """The part of `kept` that a backward step needs, as one array: its memory itself."""
    return kept.data[: len(STATISTICS) * kept.size + kept.groups]


def unpack(decision: Decision, data: Tensor) -> Kept:
    """The record of a step without renormalization, from the array that `pack` gave."""
    return Kept(data, decision.plan.statistics, decision.plan.sizes.groups)


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device, which may be another one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _input(step: KernelStep, a: Tensor | None, x: Tensor) -> Array:
    return Array(None) if a is None else Array(a, row_of(a, x, step.decision))


def _output(step: KernelStep, a: Tensor | None) -> Array:
    assert step.decision.geometry is not None
    return Array(None) if a is None else Array(a, step.decision.geometry.dense)


def _mask(step: KernelStep, mask: Tensor | None) -> Mask:
    if mask is None:
        return Mask(None)
    assert step.decision.view is not None
    # The bytes of a bool, which is what a kernel reads.
    data = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
    return Mask(data, *step.decision.view)
