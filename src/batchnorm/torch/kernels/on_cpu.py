"""The compiled kernels as `step` calls them: tensors become addresses."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchnorm.core.config import Options
from batchnorm.core.running import Running, Scalars, debiased_decay
from batchnorm.kernels import extension
from batchnorm.kernels.kept import STATISTICS, TYPES
from batchnorm.torch.kernels.decision import Decision
from batchnorm.torch.kernels.memory import row_of
from batchnorm.torch.kernels.records import Gradients, KernelStep, Rows
from batchnorm.torch.kernels.tensors import NAMES

if TYPE_CHECKING:
    from batchnorm.kernels import _cpu

CODES = {dtype: TYPES[name] for dtype, name in NAMES.items()}
FLOAT32 = TYPES["float32"]  # also of absent arrays


def find_state(
    weight: Tensor | None, bias: Tensor | None, running: Running | None
) -> extension.State:
    """Addresses and types of the per-channel tensors."""
    state = Running(None, None) if running is None else running
    return extension.State(
        gamma=_address(weight),
        gamma_type=_type(weight),
        beta=_address(bias),
        beta_type=_type(bias),
        running_type=_type(state.mean),
        running_mean=_address(state.mean),
        running_var=_address(state.var),
        batches=_address(state.batches),
        running_stddev=_address(state.stddev),
        renorm_mean=_address(state.renorm_mean),
        renorm_stddev=_address(state.renorm_stddev),
    )


def moments(step: KernelStep, x: Tensor) -> _cpu.Kept:
    """The record of the first pass: count, mean and variance."""
    plan: _cpu.Plan = step.decision.plan
    return plan.moments(x=x.data_ptr(), mask=_address(step.mask), threads=torch.get_num_threads())


def forward(
    step: KernelStep,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    merged: _cpu.Kept | None,
) -> _cpu.Kept:
    """Fill y, move the running statistics, and return the record for the backward step.

    `merged`: the record of `moments`, merged with other ranks'; or None.
    """
    plan: _cpu.Plan = step.decision.plan
    options, mask = step.options, step.mask
    if options.debias and step.update:
        options = _debiased(options, step.running)
    return plan.forward(
        x=x.data_ptr(),
        mask=0 if mask is None else mask.data_ptr(),
        y=y.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        residual_row=0 if residual is None else row_of(residual, x, step.decision),
        state=step.state,
        eps=options.eps,
        decay=-1.0 if options.decay is None else options.decay,
        batch=step.batch,
        update=step.update,
        unbiased=options.unbiased,
        renorm=extension.make_renorm(options.renorm) if step.renormalizes else None,
        threads=torch.get_num_threads(),
        kept=merged,
    )


def _debiased(options: Options, running: Running | None) -> Options:
    """The options of the next step, whose weights are known here (S23)."""
    assert running is not None
    assert running.batches is not None
    steps, renorm = int(running.batches) + 1, options.renorm
    if renorm is not None:
        renorm = replace(renorm, decay=debiased_decay(renorm.decay, steps, Scalars))
    decay = options.decay
    if decay is not None:
        decay = debiased_decay(decay, steps, Scalars)
    return replace(options, decay=decay, renorm=renorm)


def backward(step: KernelStep, rows: Rows, found: Gradients, kept: _cpu.Kept) -> None:
    """Fill the gradients that are given."""
    plan: _cpu.Plan = step.decision.plan
    (dy, x, y, mask), (dx, dweight, dbias, dresidual) = rows, found
    plan.backward(
        dy=dy.data_ptr(),
        dy_row=row_of(dy, x, step.decision),
        x=x.data_ptr(),
        y=0 if y is None else y.data_ptr(),
        mask=0 if mask is None else mask.data_ptr(),
        dx=0 if dx is None else dx.data_ptr(),
        dresidual=0 if dresidual is None else dresidual.data_ptr(),
        dgamma=0 if dweight is None else dweight.data_ptr(),
        dgamma_type=FLOAT32 if dweight is None else CODES[dweight.dtype],
        dbeta=0 if dbias is None else dbias.data_ptr(),
        dbeta_type=FLOAT32 if dbias is None else CODES[dbias.dtype],
        kept=kept,
        batch=step.batch,
        threads=torch.get_num_threads(),
    )


def reduce(step: KernelStep, rows: Rows, found: Gradients, kept: _cpu.Kept) -> Tensor:
    """The sums that `apply` needs; fills the gradients that are given."""
    plan: _cpu.Plan = step.decision.plan
    sums = plan.reduce(
        dy=rows.dy.data_ptr(),
        dy_row=row_of(rows.dy, rows.x, step.decision),
        x=rows.x.data_ptr(),
        y=_address(rows.y),
        mask=_address(rows.mask),
        dresidual=_address(found.residual),
        dgamma=_address(found.weight),
        dgamma_type=_type(found.weight),
        dbeta=_address(found.bias),
        dbeta_type=_type(found.bias),
        kept=kept,
        threads=torch.get_num_threads(),
    )
    return torch.from_numpy(sums)


def apply(step: KernelStep, rows: Rows, found: Gradients, sums: Tensor, kept: _cpu.Kept) -> None:
    """Fill dx."""
    plan: _cpu.Plan = step.decision.plan
    plan.apply(
        dy=rows.dy.data_ptr(),
        dy_row=row_of(rows.dy, rows.x, step.decision),
        x=rows.x.data_ptr(),
        y=_address(rows.y),
        mask=_address(rows.mask),
        dx=_address(found.x),
        dresidual=_address(found.residual),
        sums=sums.numpy(),
        kept=kept,
        threads=torch.get_num_threads(),
    )


def row(kept: _cpu.Kept, name: str) -> Tensor:
    """One of STATISTICS, a value for each group and channel: memory of `kept` itself."""
    return torch.from_numpy(kept.row(STATISTICS[name]))


def count(kept: _cpu.Kept) -> Tensor:
    """Real rows of each group: memory of `kept` itself."""
    return torch.from_numpy(kept.count())


def pack(kept: _cpu.Kept) -> Tensor:
    """The part of `kept` that a backward step needs, as one array: its memory itself."""
    return torch.from_numpy(kept.all())


def unpack(decision: Decision, data: Tensor) -> _cpu.Kept:
    """The record of a step without renormalization, from the array that `pack` gave."""
    plan: _cpu.Plan = decision.plan
    return plan.restore(data=data.data_ptr(), size=data.numel(), renorm=False)


def _address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def _type(a: Tensor | None) -> int:
    return FLOAT32 if a is None else CODES[a.dtype]
