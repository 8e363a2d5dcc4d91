"""The kernels as two operators of torch, for graphs that `torch.compile` makes.

A compiler does not look into a kernel. Nor may an operator that has a gradient change its
arguments: a step returns moments, with which the graph moves the running statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.layout import Layout
from batchnorm.core.moments import Centred, centred_from
from batchnorm.core.running import Running
from batchnorm.kernels.kept import STATISTICS
from batchnorm.torch import steps
from batchnorm.torch.namespace import XP
from batchnorm.torch.prepared import Prepared, empty_output, like, prepare

__all__ = ["step"]


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
    demanded: bool,
    owner: str,
) -> tuple[Tensor, Centred]:
    """y, and the moments of x, which gradients take for constants.

    Args:
        x, mask, parameters, residual, running: what the kernels have no objection to.
        layout: of x.
        options: as in Options.
        batch: normalize by the batch's own statistics; the moments have no meaning otherwise.
        demanded: whether fused=True demands a kernel.
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
        demanded,
        owner,
    )
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, _moments(kept.detach(), layout, work)


def _moments(kept: Tensor, layout: Layout, work: torch.dtype) -> Centred:
    """What a step keeps as the core takes moments, in the shape of `layout.statistics`.

    In x's working type, in which a variance that overflows is no update (S9).
    """
    groups = 1 if layout.groups is None else layout.groups
    rows, counts = torch.split(kept.to(work), [kept.shape[0] - groups, groups])
    rows = rows.reshape(len(STATISTICS), *layout.statistics)
    mean, low, var = (rows[STATISTICS[name]] for name in ("mean", "low", "var"))
    per_group = [n if a == 1 and layout.groups is not None else 1 for a, n in enumerate(var.shape)]
    count = counts.reshape(per_group) * torch.ones_like(var)
    return centred_from(count, mean, low, var, XP)


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
    demanded: bool,
    owner: str,
) -> tuple[Tensor, Tensor]:
    """y, and what the backward step needs."""
    options = config.Options(eps=eps, virtual_batch_size=size, activation=activation)
    running = None
    if running_mean is not None:
        assert running_var is not None
        running = Running(running_mean, running_var)
    arranged = _arrange(x, mask, (weight, bias), residual, axes, size, activation, demanded, owner)
    there, mask, weight, bias, residual, prepared = arranged
    passes = steps.find_passes(prepared)
    state = passes.find_state(weight, bias, running)
    call = steps.Call(
        prepared,
        mask,
        running,
        state,
        options,
        batch=batch,
        update=False,
        residual=residual is not None,
        history=None,
    )
    y = empty_output(there, prepared)
    steps.forward(call, there, weight, bias, residual, y)
    kept = call.kept
    # This step has not written these, and no operator may return what nobody has written.
    for name in ("r", "d") if batch else ("low", "var", "r", "d"):
        passes.row(kept, name).zero_()
    return _laid_like(y, x), passes.pack(kept)


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
    kept = (len(STATISTICS) * channels + 1) * groups
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
    demanded: bool,
    wants_x: bool,
    weight_type: torch.dtype | None,
    bias_type: torch.dtype | None,
    wants_residual: bool,
    owner: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dresidual, each without elements where it is not wanted."""
    arranged = _arrange(x, mask, (None, None), None, axes, size, activation, demanded, owner)
    there, mask, _, _, _, prepared = arranged
    options = config.Options(virtual_batch_size=size, activation=activation)
    call = steps.Call(
        prepared,
        mask=None,
        running=None,
        state=(),
        options=options,
        batch=batch,
        update=False,
        residual=residual,
        history=None,
    )
    found = steps.backward(
        call,
        like(dy, there, prepared),
        there,
        None if y is None else like(y, there, prepared),
        mask,
        steps.find_passes(prepared).unpack(prepared, kept),
        steps.Wanted(wants_x, weight_type, bias_type, wants_residual),
    )
    dx, dweight, dbias, dresidual = (x.new_empty(0) if a is None else a for a in found)
    return _laid_like(dx, x), dweight, dbias, _laid_like(dresidual, x)


@_gradient.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    kept: Tensor,
    axes: Sequence[int],
    *options: Any,
) -> tuple[Tensor, ...]:
    wants_x, weight_type, bias_type, wants_residual, _ = options[-5:]
    channels = [x.shape[a] for a in axes]

    def like_x(wanted: bool) -> Tensor:
        return torch.empty_like(x) if wanted else x.new_empty(0)

    def per_channel(dtype: torch.dtype | None) -> Tensor:
        return x.new_empty(0) if dtype is None else x.new_empty(channels, dtype=dtype)

    per_channels = per_channel(weight_type), per_channel(bias_type)
    return like_x(wants_x), *per_channels, like_x(wants_residual)


class _Saved(NamedTuple):
    """What a gradient needs beside tensors: arguments of `_gradient`, and types."""

    axes: Sequence[int]
    size: int | None
    activation: str | None
    batch: bool
    residual: bool
    demanded: bool
    weight_type: torch.dtype | None
    bias_type: torch.dtype | None
    owner: str


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, mask, weight, bias, residual, _, _, axes, size, _, activation, batch = inputs[:12]
    demanded, owner = inputs[12:]
    y, kept = output
    # y decides where the activation's input was not x's doing alone.
    gate = y if activation is not None and residual is not None else None
    ctx.save_for_backward(x, gate, mask, kept)
    weight_type, bias_type = (None if a is None else a.dtype for a in (weight, bias))
    ctx.saved = _Saved(
        axes,
        size,
        activation,
        batch,
        residual is not None,
        demanded,
        weight_type,
        bias_type,
        owner,
    )
    ctx.inputs = len(inputs)


def _differentiate(ctx: Any, dy: Tensor, _kept: Any) -> tuple[Any, ...]:
    saved: _Saved = ctx.saved
    wants_x, _, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:5]
    gated = saved.activation is not None
    wanted = steps.Wanted(
        wants_x,
        saved.weight_type if wants_weight else None,
        saved.bias_type if wants_bias else None,
        wants_residual and gated,
    )
    x, y, mask, kept = ctx.saved_tensors
    found = _gradient(dy, x, y, mask, kept, *saved[:6], *wanted, saved.owner)
    pairs = zip(found, wanted, strict=True)
    dx, dweight, dbias, dresidual = (a if is_wanted else None for a, is_wanted in pairs)
    if wants_residual and not gated:
        dresidual = dy
    gradients = (dx, None, dweight, dbias, dresidual)
    return (*gradients, *(None,) * (ctx.inputs - len(gradients)))


_step.register_autograd(_differentiate, setup_context=_keep)


def _arrange(
    x: Tensor,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    axes: Sequence[int],
    size: int | None,
    activation: str | None,
    demanded: bool,
    owner: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Prepared]:
    """The tensors in memory that suits the kernels, which there were when the graph was made."""
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
        demanded,
    )
    arranged = steps.arrange(x, mask, parameters, residual, prepared, activation)
    if prepared.refusal is not None or isinstance(arranged, str):
        raise RuntimeError(
            f"{owner}: a graph was compiled for kernels that do not serve it here: "
            f"{prepared.refusal or arranged}. Compile it again in this process."
        )
    return arranged


def _laid_like(a: Tensor, x: Tensor) -> Tensor:
    """a, if of x's shape, in the memory order that the graph expects of such an output."""
    if a.shape != x.shape or a.stride() == x.stride():
        return a
    expected = torch.empty_like(x)
    return a if a.stride() == expected.stride() else expected.copy_(a)
