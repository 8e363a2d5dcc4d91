"""The kernels as two operators of torch, for graphs that `torch.compile` makes.

Compilers do not look into an operator, and one that has a gradient must not change its arguments:
a step returns moments, and the graph moves the running statistics by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.running import Running
from batchnorm.kernels.kept import STATISTICS
from batchnorm.torch.call import Call, Tensors
from batchnorm.torch.kernels.decision import Decision, decide
from batchnorm.torch.kernels.memory import empty_output, like
from batchnorm.torch.kernels.records import KernelStep, Rows, Wanted, changes_dy
from batchnorm.torch.kernels.step import arrange, backward, find_passes, forward

__all__ = ["step"]


def step(call: Call) -> tuple[Tensor, Tensor]:
    """y of a call that the kernels have no objection to, and the record for `centred_of`.

    The record is a constant to gradients, and has moments only if `call.by_batch`.
    """
    (x, mask, weight, bias, residual, running), layout = call.tensors, call.layout
    y, kept = _step(
        x,
        mask,
        weight,
        bias,
        residual,
        *((None, None) if running is None else running[:2]),
        list(layout.channel_axes),
        None if layout.groups is None else call.options.virtual_batch_size,
        call.options.eps,
        call.options.activation,
        call.options.padded_output,
        call.by_batch,
        call.settings.fused is True,
    )
    return y, kept.detach()


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
    padded_output: str,
    batch: bool,
    demanded: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the record for the backward step."""
    options = config.Options(
        eps=eps, virtual_batch_size=size, activation=activation, padded_output=padded_output
    )
    running = None
    if running_mean is not None:
        assert running_var is not None
        running = Running(running_mean, running_var)
    given = Tensors(x, mask, weight, bias, residual, running)
    tensors, decision = _arrange(given, axes, options, demanded)
    passes = find_passes(decision)
    done = KernelStep(
        decision,
        tensors.mask,
        running,
        passes.find_state(tensors.weight, tensors.bias, running),
        options,
        batch,
        update=False,
        residual=residual is not None,
    )
    y = empty_output(tensors.x, decision)
    forward(done, tensors.x, tensors.weight, tensors.bias, tensors.residual, y)
    # Zero the rows that this mode leaves unset: an operator must not return uninitialized memory.
    for name in ("r", "d") if batch else ("low", "var", "r", "d"):
        passes.row(done.kept, name).zero_()
    return _laid_like(y, x), passes.pack(done.kept)


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
    padded_output: str,
    batch: bool,
    residual: bool,
    demanded: bool,
    wants_x: bool,
    weight_type: torch.dtype | None,
    bias_type: torch.dtype | None,
    wants_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dresidual, each without elements where it is not wanted."""
    given = Tensors(x, mask, None, None, None, None)
    options = config.Options(
        virtual_batch_size=size, activation=activation, padded_output=padded_output
    )
    (there, mask, *_), decision = _arrange(given, axes, options, demanded)
    done = KernelStep(decision, None, None, (), options, batch, update=False, residual=residual)
    gate = None if y is None else like(y, there, decision)
    rows = Rows(like(dy, there, decision), there, gate, mask)
    unpacked = find_passes(decision).unpack(decision, kept)
    wanted = Wanted(wants_x, weight_type, bias_type, wants_residual)
    found = backward(done, rows, unpacked, wanted)
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
    wants_x, weight_type, bias_type, wants_residual = options[-4:]
    channels = [x.shape[a] for a in axes]

    def like_x(wanted: bool) -> Tensor:
        return torch.empty_like(x) if wanted else x.new_empty(0)

    def per_channel(dtype: torch.dtype | None) -> Tensor:
        return x.new_empty(0) if dtype is None else x.new_empty(channels, dtype=dtype)

    per_channels = per_channel(weight_type), per_channel(bias_type)
    return like_x(wants_x), *per_channels, like_x(wants_residual)


class _Saved(NamedTuple):
    """The arguments of `_gradient` that are no tensors, and the parameters' types."""

    axes: Sequence[int]
    size: int | None
    activation: str | None
    padded_output: str
    batch: bool
    residual: bool
    demanded: bool
    weight_type: torch.dtype | None
    bias_type: torch.dtype | None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, mask, weight, bias, residual, _, _, axes, size, _, *options, batch, demanded = inputs
    y, kept = output
    activation, padded_output = options
    # With a residual only y tells the sign of the activation's input.
    gate = y if activation is not None and residual is not None else None
    ctx.save_for_backward(x, gate, mask, kept)
    weight_type, bias_type = (None if a is None else a.dtype for a in (weight, bias))
    ctx.saved = _Saved(
        axes,
        size,
        activation,
        padded_output,
        batch,
        residual is not None,
        demanded,
        weight_type,
        bias_type,
    )
    ctx.inputs = len(inputs)


def _differentiate(ctx: Any, dy: Tensor, _kept: Any) -> tuple[Any, ...]:
    saved: _Saved = ctx.saved
    wants_x, _, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:5]
    x, y, mask, kept = ctx.saved_tensors
    options = config.Options(activation=saved.activation, padded_output=saved.padded_output)
    changed = changes_dy(options, mask is not None)
    wanted = Wanted(
        wants_x,
        saved.weight_type if wants_weight else None,
        saved.bias_type if wants_bias else None,
        wants_residual and changed,
    )
    found = _gradient(dy, x, y, mask, kept, *saved[:7], *wanted)
    pairs = zip(found, wanted, strict=True)
    dx, dweight, dbias, dresidual = (a if is_wanted else None for a, is_wanted in pairs)
    if wants_residual and not changed:
        dresidual = dy
    gradients = (dx, None, dweight, dbias, dresidual)
    return (*gradients, *(None,) * (ctx.inputs - len(gradients)))


_step.register_autograd(_differentiate, setup_context=_keep)


def _arrange(
    tensors: Tensors,
    axes: Sequence[int],
    options: config.Options,
    demanded: bool,
) -> tuple[Tensors, Decision]:
    """The tensors in memory that suits the kernels; raises if none serves them in this process."""
    x, mask = tensors.x, tensors.mask
    decision = decide(
        (x.shape, x.stride(), x.dtype, x.device.type),
        tuple(axes),
        options.virtual_batch_size,
        False,
        options.activation,
        options.zero_padding,
        None if mask is None else (mask.shape, mask.stride(), mask.element_size()),
        demanded,
    )
    if decision.refusal is not None:
        raise RuntimeError(
            f"batchnorm: a graph was compiled for kernels that do not serve it here: "
            f"{decision.refusal}. Compile it again in this process."
        )
    return arrange(tensors, decision, options)


def _laid_like(a: Tensor, x: Tensor) -> Tensor:
    """a, if of x's shape, in the memory order that the graph expects of such an output."""
    if a.shape != x.shape or a.stride() == x.stride():
        return a
    expected = torch.empty_like(x)
    return a if a.stride() == expected.stride() else expected.copy_(a)
