"""The kernels as two operators of torch, for graphs that `torch.compile` makes.

A compiler does not look into a kernel. Nor may an operator that has a gradient change its
arguments: a step returns moments, with which the graph moves the running statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.core import config
from batchnorm.core.layout import Layout
from batchnorm.core.moments import Centred
from batchnorm.core.running import Running
from batchnorm.kernels import cpu
from batchnorm.torch import steps
from batchnorm.torch.prepared import (
    NAMES,
    Prepared,
    choose,
    like,
    prepare,
    refuse_parameters,
    refuse_tensors,
)

__all__ = ["refuse", "step"]


def refuse(
    x: Tensor,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    running: Running | None,
    layout: Layout,
    *,
    adjusted: bool,
    renormalized: bool,
    batch: bool,
    demanded: bool,
    owner: str,
) -> str | None:
    """Why a graph should not hold the operators for such a call, or None.

    Args:
        x, mask, parameters, residual, running: of the call.
        layout: of x.
        adjusted: whether an adjustment applies (S13).
        renormalized: whether renormalization does (S11).
        batch: whether x is normalized by its own statistics.
        demanded: whether fused=True demands a kernel.
        owner: whose name error messages carry.
    """
    if torch.compiler.is_exporting():
        return "an exported program holds array code, which runs without this library"
    if not batch and not demanded:
        return "the compiler fuses evaluation with what surrounds it"
    if renormalized:
        return "a graph would be compiled anew whenever the limits of renormalization move"
    axes = layout.channel_axes
    if axes != tuple(range(axes[0], axes[0] + len(axes))):
        return f"channel axes {axes} are apart in memory"
    shape = None if mask is None else layout.mask_shape(tuple(mask.shape), owner)
    per_channel = shape is not None and any(shape[a] != 1 for a in axes)
    return (
        refuse_parameters(parameters)
        or refuse_tensors(x, (mask, *parameters, residual), running, traced=True)
        or _choose(x.device.type, NAMES[x.dtype], adjusted, per_channel, demanded)
        or None
    )


def _choose(device: str, dtype: str, adjusted: bool, per_channel: bool, demanded: bool) -> str:
    """Why no kernel serves the call, or nothing; found while a graph is traced."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "a transformation of torch is at work"
    return choose(device, dtype, adjusted, per_channel, demanded).reason


# torch.compiler.assume_constant_result, without importing the compiler: that takes seconds.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def step(
    x: Tensor,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    running: Running | None,
    layout: Layout,
    options: config.Options,
    *,
    batch: bool,
    owner: str,
) -> tuple[Tensor, Centred]:
    """y, and the moments of x in float64, which gradients take for constants.

    Args:
        x, mask, parameters, residual, running: what `refuse` has no objection to.
        layout: of x.
        options: as in Options.
        batch: normalize by the batch's own statistics; the moments have no meaning otherwise.
        owner: whose name error messages carry.
    """
    size = None if layout.groups is None else options.virtual_batch_size
    y, kept = _step(
        x,
        mask,
        *parameters,
        residual,
        *((None, None) if running is None else running[:2]),
        list(layout.channel_axes),
        size,
        options.eps,
        options.activation,
        batch,
        owner,
    )
    return y, _moments(kept.detach(), layout)


def _moments(kept: Tensor, layout: Layout) -> Centred:
    """What a step keeps as the core takes moments, in the shape of `layout.statistics`."""
    groups = 1 if layout.groups is None else layout.groups
    rows, counts = torch.split(kept, [kept.shape[0] - groups, groups])
    rows = rows.reshape(len(cpu.STATISTICS), *layout.statistics)
    anchor, shift, var = (rows[cpu.STATISTICS[name]] for name in ("mean", "low", "var"))
    per_group = [n if a == 1 and layout.groups is not None else 1 for a, n in enumerate(var.shape)]
    one = torch.ones_like(var)
    count = counts.reshape(per_group) * one
    nothing = torch.zeros_like(var)
    return Centred(count, anchor, shift, scale=one, power=var, unit=one, deviation=nothing)


@torch.library.custom_op("batchnorm::step", mutates_args=())
def _step(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    axes: Sequence[int],
    size: int | None,
    eps: float,
    activation: str | None,
    batch: bool,
    owner: str,
) -> tuple[Tensor, Tensor]:
    """y, and what the backward step needs."""
    options = config.Options(eps=eps, virtual_batch_size=size, activation=activation)
    running = None
    if running_mean is not None:
        assert running_var is not None
        running = Running(running_mean, running_var)
    arranged = _arrange(x, mask, (weight, bias), residual, axes, size, activation, owner)
    there, mask, weight, bias, residual, prepared = arranged
    passes = steps.find_passes(prepared)
    state = passes.find_state(weight, bias, running)
    call = steps.Call(
        prepared, mask, running, state, options, batch, False, residual is not None, None
    )
    y, kept = steps.forward(call, there, weight, bias, residual)
    packed = passes.pack(kept)
    # Pairs of rows that this step has not written, which no operator may return.
    row = math.prod(prepared.layout.moments)
    for name in ("r",) if batch else ("r", "low"):
        begin = cpu.STATISTICS[name] * row
        packed[begin : begin + 2 * row].zero_()
    return _laid_like(y, x), packed


@_step.register_fake
def _(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    axes: Sequence[int],
    size: int | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    groups = 1 if size is None else x.shape[0] // size
    channels = 1
    for a in axes:
        channels = channels * x.shape[a]
    kept = (len(cpu.STATISTICS) * channels + 1) * groups
    return torch.empty_like(x), x.new_empty(kept, dtype=torch.float64)


@torch.library.custom_op("batchnorm::gradient", mutates_args=())
def _gradient(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    kept: Tensor,
    axes: Sequence[int],
    size: int | None,
    activation: str | None,
    batch: bool,
    residual: bool,
    wants_x: bool,
    weight: torch.dtype | None,
    bias: torch.dtype | None,
    wants_residual: bool,
    owner: str,
) -> list[Tensor]:
    """Those of dx, dweight, dbias and dresidual that are wanted; `weight`, `bias`: their types."""
    arranged = _arrange(x, mask, (None, None), None, axes, size, activation, owner)
    there, mask, _, _, _, prepared = arranged
    options = config.Options(virtual_batch_size=size, activation=activation)
    call = steps.Call(prepared, None, None, (), options, batch, False, residual, None)
    found = steps.backward(
        call,
        like(dy, there, prepared),
        there,
        None if y is None else like(y, there, prepared),
        mask,
        steps.find_passes(prepared).unpack(prepared, kept),
        steps.Wanted(wants_x, weight, bias, wants_residual),
    )
    dx, dweight, dbias, dresidual = found
    arrays = (_laid_like(dx, x), dweight, dbias, _laid_like(dresidual, x))
    return [a for a in arrays if a is not None]


@_gradient.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    kept: Tensor,
    axes: Sequence[int],
    *options: Any,
) -> list[Tensor]:
    wants_x, weight, bias, wants_residual, _ = options[-5:]
    channels = [x.shape[a] for a in axes]
    found = [torch.empty_like(x)] if wants_x else []
    found += [x.new_empty(channels, dtype=t) for t in (weight, bias) if t is not None]
    return found + ([torch.empty_like(x)] if wants_residual else [])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, mask, weight, bias, residual, _, _, axes, size, _, activation, batch, owner = inputs
    y, kept = output
    # y decides where the activation's input was not x's doing alone.
    gate = y if activation is not None and residual is not None else None
    ctx.save_for_backward(x, gate, mask, kept)
    ctx.call = (axes, size, activation, batch, residual is not None)
    ctx.types = tuple(None if a is None else a.dtype for a in (weight, bias))
    ctx.owner = owner


def _differentiate(ctx: Any, dy: Tensor, _kept: Any) -> tuple[Any, ...]:
    x, y, mask, kept = ctx.saved_tensors
    wants_x, _, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:5]
    gated = ctx.call[2] is not None
    wanted = (
        wants_x,
        ctx.types[0] if wants_weight else None,
        ctx.types[1] if wants_bias else None,
        wants_residual and gated,
    )
    found = iter(_gradient(dy, x, y, mask, kept, *ctx.call, *wanted, ctx.owner))
    dx, dweight, dbias, dresidual = (next(found) if a else None for a in wanted)
    if wants_residual and not gated:
        dresidual = dy
    return (dx, None, dweight, dbias, dresidual, *(None,) * 8)


_step.register_autograd(_differentiate, setup_context=_keep)


def _arrange(
    x: Tensor,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    axes: Sequence[int],
    size: int | None,
    activation: str | None,
    owner: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Prepared]:
    """The tensors in memory that suits the kernels, which `refuse` has found to exist."""
    prepared = prepare(
        owner,
        x.shape,
        x.stride(),
        x.dtype,
        tuple(axes),
        size,
        False,
        activation,
        None if mask is None else (mask.shape, mask.stride(), mask.element_size()),
        x.device.type,
        True,
    )
    arranged = steps.arrange(x, mask, parameters, residual, prepared, activation)
    if prepared.refusal is not None or isinstance(arranged, str):
        raise RuntimeError(
            f"{owner}: a graph was compiled for kernels that do not serve it here: "
            f"{prepared.refusal or arranged}. Compile it again in this process."
        )
    return arranged


def _laid_like(a: Any, x: Tensor) -> Any:
    """a in the memory order that the graph expects of an output of x's shape."""
    if a is None or a.stride() == x.stride():
        return a
    expected = torch.empty_like(x)
    return a if a.stride() == expected.stride() else expected.copy_(a)
