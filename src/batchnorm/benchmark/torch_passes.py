"""A step of the compiled passes alone, on addresses, into memory that is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from batchnorm.core.running import Running
from batchnorm.kernels.kept import TYPES
from batchnorm.torch import BatchNorm
from batchnorm.torch.kernels import on_cpu
from batchnorm.torch.kernels.decision import Decision, decide

__all__ = ["make_step"]


def make_step(x: Tensor, dy: Tensor, layer: BatchNorm, eps: float) -> Callable[[], Any]:
    """A training step that returns y and dx, always in the same memory.

    Args:
        x: float32, on the CPU, channels along axis 1.
        dy: gradient with respect to y, like x.
        layer: has gamma, beta and the running statistics.
        eps: added to the variance.
    """
    y, dx = torch.empty_like(x), torch.empty_like(x)
    dgamma, dbeta = torch.empty_like(layer.weight), torch.empty_like(layer.bias)
    signature = (x.shape, x.stride(), x.dtype, "cpu")
    decision = decide(signature, 1, None, False, None, False, None, False)
    running = Running(layer.running_mean, layer.running_var, layer.num_batches_tracked)
    forward = _bind_forward(decision, x, y, eps)
    backward = _bind_backward(decision, dy, x, dx)

    def step() -> tuple[Tensor, ...]:
        kept = forward(state=on_cpu.find_state(layer.weight, layer.bias, running))
        backward(kept=kept, dgamma=dgamma.data_ptr(), dbeta=dbeta.data_ptr())
        return y, dx, x, dy  # all that the passes know by address lives as long as the step

    return step


def _bind_forward(decision: Decision, x: Tensor, y: Tensor, eps: float) -> Callable[..., Any]:
    return partial(
        decision.plan.forward,
        x=x.data_ptr(),
        mask=0,
        y=y.data_ptr(),
        residual=0,
        residual_row=0,
        eps=eps,
        decay=0.9,
        batch=True,
        update=True,
        unbiased=True,
        renorm=None,
        threads=torch.get_num_threads(),
        kept=None,
    )


def _bind_backward(decision: Decision, dy: Tensor, x: Tensor, dx: Tensor) -> Callable[..., Any]:
    assert decision.geometry is not None
    return partial(
        decision.plan.backward,
        dy=dy.data_ptr(),
        dy_row=decision.geometry.dense,
        x=x.data_ptr(),
        y=0,
        mask=0,
        dx=dx.data_ptr(),
        dresidual=0,
        batch=True,
        threads=torch.get_num_threads(),
        dgamma_type=TYPES["float32"],
        dbeta_type=TYPES["float32"],
    )
