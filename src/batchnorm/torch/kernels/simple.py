"""The backward pass of simple steps on the CPU, in one function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from batchnorm.torch.kernels.memory import empty_output
from batchnorm.torch.kernels.on_cpu import CODES, FLOAT32
from batchnorm.torch.kernels.records import KernelStep

if TYPE_CHECKING:
    from batchnorm.kernels import _cpu


def find_gradients(
    step: KernelStep,
    wants: tuple[bool, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias_type: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """The gradients of a `simple` step: of x, weight and bias, then two None.

    As `step.backward`, which small steps would spend more time in than in the kernels.
    """
    dx = dweight = dbias = None
    x_at = weight_at = bias_at = 0
    weight_code = bias_code = FLOAT32
    wants_x, wants_weight, wants_bias, *_ = wants
    if wants_x:
        dx = empty_output(x, step.decision)
        x_at = dx.data_ptr()
    if wants_weight:
        assert weight is not None
        dweight = torch.empty_like(weight)
        weight_at, weight_code = dweight.data_ptr(), CODES[weight.dtype]
    if wants_bias:
        if weight is not None and weight.dtype is bias_type:
            dbias = torch.empty_like(weight)  # sooner than by its shape, type and device
        else:
            channels = step.decision.layout.channels
            dbias = torch.empty(channels, dtype=bias_type, device=x.device)
        bias_at, bias_code = dbias.data_ptr(), CODES[dbias.dtype]
    row = step.decision.geometry.row  # type: ignore[union-attr]
    plan: _cpu.Plan = step.decision.plan
    plan.backward(
        dy=dy.data_ptr(),
        dy_row=row,
        x=x.data_ptr(),
        y=0,
        mask=0,
        dx=x_at,
        dresidual=0,
        dgamma=weight_at,
        dgamma_type=weight_code,
        dbeta=bias_at,
        dbeta_type=bias_code,
        kept=step.kept,
        batch=step.batch,
        threads=torch.get_num_threads(),
    )
    return dx, dweight, dbias, None, None
