"""The kernels' step as one differentiable function.

A step is two calls of the kernels, one forward and one backward (`step`). Higher derivatives are
array code (S8).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from batchnorm.torch.kernels import on_cpu
from batchnorm.torch.kernels.memory import empty_output, like
from batchnorm.torch.kernels.records import KernelStep, Rows, Wanted, changes_dy
from batchnorm.torch.kernels.second_order import differentiable_backward
from batchnorm.torch.kernels.simple import find_gradients
from batchnorm.torch.kernels.step import backward, find_passes, forward
from batchnorm.torch.kernels.tensors import has_memory
from batchnorm.torch.private import find_saving_hooks
from batchnorm.torch.rollback import unmoved_on_failure
from batchnorm.torch.tracing import untraced

__all__ = ["run", "run_unrecorded"]


def run(
    step: KernelStep, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """y, recorded for autograd where a gradient may be asked for."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if step.options.activation is not None and find_saving_hooks(True) is not None:
            y = _run_before_hooks(step, x, weight, bias, residual)
        else:
            # First, so that autograd raises for what it cannot save before statistics move (S9).
            y = _apply(x, weight, bias, residual, step)
            forward(step, x, weight, bias, residual, y)
        # Drop what the backward pass does not need; the statistics may have changed by then.
        step.running = step.mask = None
    else:
        y = run_unrecorded(step, x, weight, bias, residual)
    return y


def run_unrecorded(
    step: KernelStep, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """y without autograd; the step may run again."""
    y = empty_output(x, step.decision)
    forward(step, x, weight, bias, residual, y)
    return y


def run_simple(step: KernelStep, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The same as `run` for a step of x alone on the CPU (`KernelStep.simple`), in fewer calls."""
    recorded = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    if not recorded:
        y = empty_output(x, step.decision)
    elif step.simple:
        y = _apply(x, weight, bias, None, step)
    else:
        return run(step, x, weight, bias, None)
    if step.update:
        increment_version(step.written)
    step.kept = on_cpu.forward(step, x, None, None, None, y, None)
    if recorded:
        step.running = None
    return y


def _run_before_hooks(
    step: KernelStep, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The same where hooks on saved tensors, which may raise, take y as soon as it is recorded."""
    y = empty_output(x, step.decision)
    with unmoved_on_failure(step.running if step.update else None):
        forward(step, x, weight, bias, residual, y)
        step.y = y
        recorded: Tensor = _apply(x, weight, bias, residual, step)
    return recorded


class _Fused(torch.autograd.Function):
    """The kernels' step for autograd; `run` fills y."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        step: KernelStep,
    ) -> Tensor:
        if step.simple:
            ctx.save_for_backward(x, weight, None, None)
            ctx.memory = (x.stride(), None, None)
            ctx.renorm, ctx.bias_type = False, None if bias is None else bias.dtype
            ctx.step = step
            return empty_output(x, step.decision)
        y = empty_output(x, step.decision) if step.y is None else step.y
        step.y = None
        gate = None if step.options.activation is None else y
        ctx.save_for_backward(x, weight, step.mask, gate)
        ctx.memory = _memory(x, step.mask, gate)
        ctx.renorm, ctx.bias_type = step.renormalizes, None if bias is None else bias.dtype
        ctx.step = step
        return y

    @staticmethod
    @untraced
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mask, y = ctx.saved_tensors
        step: KernelStep = ctx.step
        if (
            step.simple
            and not torch.is_grad_enabled()
            and type(dy) is Tensor
            and dy.stride() == x.stride() == ctx.memory[0]
            and has_memory(dy)
        ):
            return find_gradients(step, ctx.needs_input_grad, dy, x, weight, ctx.bias_type)
        if (
            torch.is_grad_enabled()
            or type(dy) is not Tensor
            or not has_memory(dy)
            # Hooks on saved tensors may bring them back in other memory.
            or _memory(x, mask, y) != ctx.memory
        ):
            passes = find_passes(step.decision)
            return differentiable_backward(passes, ctx, dy, x, weight, mask, y)
        wants_x, wants_weight, wants_bias, wants_residual, _ = ctx.needs_input_grad
        changed = wants_residual and changes_dy(step.options, mask is not None)
        wanted = Wanted(
            wants_x,
            weight.dtype if wants_weight else None,
            ctx.bias_type if wants_bias else None,
            changed,
        )
        dy = like(dy, x, step.decision)
        # With a residual only y tells the sign of the activation's input.
        rows = Rows(dy, x, y if step.residual else None, mask)
        found = backward(step, rows, step.kept, wanted)
        return (*found[:3], dy if wants_residual and not changed else found.residual, None)


def _memory(x: Tensor, mask: Tensor | None, y: Tensor | None) -> tuple[Any, ...]:
    return (
        x.stride(),
        None if mask is None else mask.stride(),
        None if y is None else y.stride(),
    )


# Function.apply without its search for functorch's wrappers, which `is_plain` has ruled out: that
# takes as long as the kernel on a small tensor.
_apply: Any = super(torch.autograd.Function, _Fused).apply
