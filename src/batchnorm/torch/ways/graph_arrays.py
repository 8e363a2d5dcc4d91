"""A training step of a graph on the CPU in array code, as one operator made of others.

A small step takes microseconds under `torch.compile`. The tracer does not look into the operator,
so that a call checks no guards on the core. The gradient is the closed form, values per channel are
made once instead of for every element, and sums stay in float32, which the compiler's loops add
several times as fast as they convert to float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.forward import Inputs, average_of, forward_batch, move_by_average
from batchnorm.core.gradient import gradient
from batchnorm.core.layout import Layout, count_values, make_layout
from batchnorm.core.moments import centre_once, centred_from
from batchnorm.core.normalize import Affine, activation_gradient
from batchnorm.core.running import Running
from batchnorm.torch.call import Call
from batchnorm.torch.kernels.tensors import refuse_tensors
from batchnorm.torch.namespace import ONCE
from batchnorm.torch.private import constant_in_graphs, find_transformation, in_forward_mode
from batchnorm.torch.tracing import code_digest, define_operator

_WORK = torch.float32


def serves(call: Call) -> bool:
    """True if the operator computes such calls."""
    x, settings = call.tensors.x, call.settings
    return (
        call.traced
        and call.by_batch
        and x.device.type == "cpu"
        and x.dtype is not torch.float64
        and settings.pending is None
        and settings.synchronizer is None
        and settings.adjustment is None
        and call.options.renorm is None
        and refuse_tensors(x, call.tensors[:5], call.tensors.running, traced=True) is None
        and not torch.compiler.is_exporting()
        and not in_forward_mode()  # read where it is traced, so that graphs depend on it
        and not _is_transformed()
    )


def run(call: Call) -> Tensor:
    """y; the running statistics have moved."""
    x, mask, weight, bias, residual, running = call.tensors
    options = call.options
    mean, var, batches, *_ = (None,) * 3 if running is None else running
    y: Tensor = _operator(
        x,
        mask,
        weight,
        bias,
        residual,
        mean,
        var,
        batches,
        list(call.layout.channel_axes),
        None if call.layout.groups is None else options.virtual_batch_size,
        options.eps,
        options.decay,
        options.unbiased,
        options.activation,
        options.padded_output,
        options.debias,
        call.update,
        code_digest(),
    )
    return y


def _step(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    axes: Sequence[int],
    size: int | None,
    eps: float,
    decay: float | None,
    unbiased: bool,
    activation: str | None,
    padded_output: str,
    debias: bool,
    update: bool,
    code: str,
) -> Tensor:
    """y; moves the running statistics, unless the pass is a recomputation (S9)."""
    options = config.Options(
        eps,
        decay,
        unbiased,
        virtual_batch_size=size,
        activation=activation,
        padded_output=padded_output,
        debias=debias,
    )
    layout = make_layout(tuple(x.shape), tuple(axes), size)
    running = None
    if running_mean is not None:
        running = Running(running_mean, running_var, batches)
    fixed = _Fixed(layout, options, running)
    y: Tensor
    y, *moments = _Step.apply(x, mask, weight, bias, residual, fixed)
    if running is not None and update:
        moved = _move(running, moments, fixed)
        leaves = torch.ops.batchnorm.leaves_statistics.default(x.detach())
        for old, new in zip(running[:3], moved[:3], strict=True):
            if old is not None:
                old.copy_(torch.where(leaves, old, new.to(old.dtype)))
    return y


class _Fixed(NamedTuple):
    """The arguments that no gradient flows to."""

    layout: Layout
    options: config.Options
    running: Running | None


def _move(running: Running, moments: Sequence[Tensor], fixed: _Fixed) -> Running:
    count, mean, low, var = moments
    average = average_of(centred_from(count, mean, low, var, ONCE), fixed.layout, ONCE)
    wide = running.map(lambda a: a.to(_WORK))
    return move_by_average(wide, average, fixed.layout, fixed.options, ONCE)


class _Step(torch.autograd.Function):
    """y and the moments, and the gradient in closed form (S8)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        fixed: _Fixed,
    ) -> tuple[Tensor, ...]:
        layout, options, running = fixed
        real = None if mask is None else mask != 0
        if running is not None:
            running = running.map(_cast)
        inputs = Inputs(*map(_cast, (x, real, weight, bias, residual)))
        first, rest = _subtract_first_mean(inputs, layout)
        outcome = forward_batch(rest, running, layout, options, update=False, xp=ONCE)
        y = outcome.y.to(x.dtype)
        centred = outcome.centred
        count, var = centred.count, centred.var
        mean = first + centred.mean
        low = ((first - mean) + centred.anchor) + centred.shift
        ctx.save_for_backward(
            x,
            real,
            weight,
            None if options.activation is None else y,
            None if mask is None else count,
            mean,
            low,
            outcome.rstd,
        )
        ctx.mark_non_differentiable(count, mean, low, var)
        ctx.set_materialize_grads(False)
        ctx.fixed = fixed._replace(running=None)
        ctx.types = [None if a is None else a.dtype for a in (weight, bias, residual)]
        return y, count, mean, low, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        x, real, weight, y, count, mean, low, rstd = ctx.saved_tensors
        layout, options, _ = ctx.fixed
        if count is None:
            count = torch.ones_like(rstd) * count_values(layout)
        dy = activation_gradient(_cast(dy), y, options.activation, ONCE)
        split = layout.split(_cast(x), ONCE)
        kept = layout.kept if layout.groups is None else layout.kept[1:]
        found = gradient(
            layout.split(dy, ONCE),
            ((split - mean) - low) * rstd,
            rstd,
            count,
            layout.mask(real, ONCE),
            Affine(gamma=layout.expand(_cast(weight), ONCE)),
            layout.reduced,
            tuple(a for a in range(len(layout.working)) if a not in kept),
            correction=0,
            xp=ONCE,
        )
        weight_type, bias_type, residual_type = ctx.types
        if real is not None and options.zero_padding:
            real = real.reshape(layout.mask_shape(tuple(real.shape)))
            dy = torch.where(real, dy, 0.0)
        return (
            layout.merge(found.dx, ONCE).to(x.dtype),
            None,
            None if weight_type is None else found.dgamma.reshape(weight.shape).to(weight_type),
            None if bias_type is None else found.dbeta.reshape(layout.channels).to(bias_type),
            None if residual_type is None else dy.to(residual_type),
            None,
        )


def _subtract_first_mean(inputs: Inputs, layout: Layout) -> tuple[Tensor, Inputs]:
    """The mean as one float32 sum finds it, 0 without real rows, and x less it.

    It may miss by many deviations, and the core centres twice more, so that sums lose no digits to
    the mean (S3).
    """
    x: Any = layout.split(inputs.x, ONCE)
    mean: Tensor = centre_once(x, layout.mask(inputs.mask, ONCE), layout.reduced, ONCE)
    return mean, inputs._replace(x=layout.merge(x - ONCE.broadcast_like(mean, x), ONCE))


def _cast(a: Tensor | None) -> Tensor | None:
    return a if a is None or a.dtype is torch.bool else a.to(_WORK)


@constant_in_graphs
def _is_transformed() -> bool:
    return find_transformation() is not None


define_operator("array_step", _step, mutates=("running_mean", "running_var", "batches"))
_operator = torch.ops.batchnorm.array_step.default
