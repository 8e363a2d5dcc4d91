"""The kernels as one differentiable function, with the plain path behind it.

Everything a step does runs in two calls of the kernels, one forward and one backward (`steps`).
What the kernels cannot do, transformations and higher derivatives, goes to the differentiable
path (S8).

A small step is dominated by what surrounds the kernels, so that what depends on shapes and
options alone is found once (`prepare`), and the rest is kept short.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.running import Running
from batchnorm.torch.kernels.decision import Decision, decide
from batchnorm.torch.kernels.memory import empty_output, like
from batchnorm.torch.kernels.second_order import differentiable_backward
from batchnorm.torch.kernels.step import (
    KernelStep,
    Wanted,
    arrange,
    backward,
    find_moments,
    find_passes,
    forward,
)
from batchnorm.torch.kernels.tensors import has_memory, is_plain, refuse_parameters, refuse_tensors
from batchnorm.torch.ranks.synchronizer import Participation
from batchnorm.torch.recompute import StepHistory
from batchnorm.torch.rollback import unmoved_on_failure
from batchnorm.torch.tracing import untraced

__all__ = [
    "Decision",
    "decide",
    "is_plain",
    "normalize",
    "refuse_parameters",
    "refuse_tensors",
    "run",
]


def normalize(
    x: Tensor,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    running: Running | None,
    decision: Decision,
    options: config.Options,
    *,
    batch: bool,
    update: bool,
    history: StepHistory,
    again: bool,
    owner: str,
    part: Participation | None = None,
) -> Tensor | str:
    """Normalize by the kernels; the reason where x's memory does not suit them.

    Args:
        x, mask, parameters, residual, running: checked, and nothing that `is_plain` or
            `refuse_tensors` objects to.
        decision: of x and the mask.
        options: as in Options.
        batch: normalize by the batch's own statistics.
        update: move the running ones.
        history: of steps with renormalization, for when one is recomputed.
        again: whether this one is a recomputation (S9).
        owner: whose name error messages carry.
        part: how the call takes part in synchronization, or None (S14).
    """
    arranged = arrange(x, mask, parameters, residual, decision, options.activation)
    if isinstance(arranged, str):
        return arranged
    x, mask, weight, bias, residual, decision = arranged
    passes = find_passes(decision)
    state = passes.find_state(weight, bias, running)
    residuals = residual is not None
    call = KernelStep(decision, mask, running, state, options, batch, update, residuals, None, part)
    if call.renorm:
        assert running is not None
        if again:  # the statistics have moved since the step that is recomputed
            moments = find_moments(call, x)
            call.running = history.recall(owner, running.renorm_mean, moments)
            call.state = passes.find_state(weight, bias, call.running)
        else:
            call.history = history
    return run(call, x, weight, bias, residual)


def run(
    call: KernelStep, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """y, recorded for autograd where a gradient may be asked for."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if call.options.activation is not None and _has_hooks(True) is not None:
            y = _run_before_hooks(call, x, weight, bias, residual)
        else:
            # What autograd refuses to save it refuses before the kernels move statistics (S9).
            y = _apply(x, weight, bias, residual, call)
            forward(call, x, weight, bias, residual, y)
        # Running statistics have served their turn, and may move before the backward pass.
        call.running = call.mask = call.history = None
    else:
        y = empty_output(x, call.decision)
        forward(call, x, weight, bias, residual, y)
    return y


def _run_before_hooks(
    call: KernelStep, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The same where hooks on saved tensors, which may raise, take y as soon as it is recorded."""
    y = empty_output(x, call.decision)
    with unmoved_on_failure(call.running if call.update else None):
        forward(call, x, weight, bias, residual, y)
        call.y = y
        recorded: Tensor = _apply(x, weight, bias, residual, call)
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
        call: KernelStep,
    ) -> Tensor:
        y = empty_output(x, call.decision) if call.y is None else call.y
        call.y = None
        ctx.save_for_backward(x, weight, call.mask, None if call.options.activation is None else y)
        ctx.memory = _memory(x, call.mask, y)
        ctx.renorm, ctx.bias_type = call.renorm, None if bias is None else bias.dtype
        ctx.call = call
        return y

    @staticmethod
    @untraced
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mask, y = ctx.saved_tensors
        if (
            torch.is_grad_enabled()
            or type(dy) is not Tensor
            or not has_memory(dy)
            # Hooks on saved tensors may bring them back in other memory.
            or _memory(x, mask, y) != (*ctx.memory[:2], None if y is None else ctx.memory[2])
        ):
            passes = find_passes(ctx.call.decision)
            return differentiable_backward(passes, ctx, dy, x, weight, mask, y)
        wants_x, wants_weight, wants_bias, wants_residual, _ = ctx.needs_input_grad
        gated = ctx.call.options.activation is not None
        wanted = Wanted(
            wants_x,
            weight.dtype if wants_weight else None,
            ctx.bias_type if wants_bias else None,
            wants_residual and gated,
        )
        dy = like(dy, x, ctx.call.decision)
        found = backward(ctx.call, dy, x, y, mask, ctx.call.kept, wanted)
        return (*found[:3], dy if wants_residual and not gated else found[3], None)


def _memory(x: Tensor, mask: Tensor | None, y: Tensor | None) -> tuple[Any, ...]:
    return (
        x.stride(),
        None if mask is None else mask.stride(),
        None if y is None else y.stride(),
    )


# Function.apply without its search for functorch's wrappers, which `is_plain` has ruled out: that
# takes as long as the kernel on a small tensor.
_apply: Any = super(torch.autograd.Function, _Fused).apply

_has_hooks = torch._C._autograd._top_saved_tensors_default_hooks
