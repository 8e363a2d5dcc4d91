"""The kernels as operators of torch, for graphs that `torch.compile` makes.

Compilers do not look into an operator, and one that has a gradient must not change its arguments:
a step returns moments, and the graph moves the running statistics by them. The tracer sees one
operator, `differentiable_step`. What remains of it in a graph is `forward` and `backward`, which
know nothing of autograd and take their settings as one text: calls of them take microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
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
from batchnorm.torch.kernels.tensors import NAMES
from batchnorm.torch.tracing import code_digest, define_operator

__all__ = ["step"]

_TYPES = {name: dtype for dtype, name in NAMES.items()}


def step(call: Call) -> tuple[Tensor, Tensor]:
    """y of a call that the kernels have no objection to, and the record for `centred_of`.

    The record is a constant to gradients, and has moments only if `call.by_batch`.
    """
    (x, mask, weight, bias, residual, running), layout = call.tensors, call.layout
    y, kept = torch.ops.batchnorm.differentiable_step.default(
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
        code_digest(),
    )
    return y, kept.detach()


class _Kind(NamedTuple):
    """The settings of a step."""

    axes: tuple[int, ...]
    options: config.Options
    batch: bool
    demanded: bool


@lru_cache(maxsize=4096)
def _parse_kind(text: str) -> _Kind:
    axes, size, eps, activation, padded_output, batch, demanded = json.loads(text)
    options = config.Options(
        eps=eps, virtual_batch_size=size, activation=activation, padded_output=padded_output
    )
    return _Kind(tuple(axes), options, batch, demanded)


@lru_cache(maxsize=4096)
def _parse_wanted(text: str) -> tuple[bool, Wanted]:
    residual, wants_x, weight, bias, wants_residual = json.loads(text)
    weight_type, bias_type = (None if name is None else _TYPES[name] for name in (weight, bias))
    return residual, Wanted(wants_x, weight_type, bias_type, wants_residual)


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
    code: str,
) -> tuple[Tensor, Tensor]:
    """y, and the record for the backward step."""
    kind = json.dumps([list(axes), size, eps, activation, padded_output, batch, demanded])
    found: tuple[Tensor, Tensor] = _Step.apply(
        x, mask, weight, bias, residual, (running_mean, running_var), kind
    )
    return found


class _Step(torch.autograd.Function):
    """A step and its gradient, as the two operators that a graph holds."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        kind: str,
    ) -> tuple[Tensor, Tensor]:
        y, kept = torch.ops.batchnorm.forward.default(
            x, mask, weight, bias, residual, *running, kind
        )
        options = _parse_kind(kind).options
        # With a residual only y tells the sign of the activation's input.
        gate = y if options.activation is not None and residual is not None else None
        ctx.save_for_backward(x, gate, mask, kept)
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.residual = kind, residual is not None
        ctx.types = [None if a is None else NAMES[a.dtype] for a in (weight, bias)]
        return y, kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _kept: Any) -> Any:
        wants_x, _, wants_weight, wants_bias, wants_residual, *_ = ctx.needs_input_grad
        x, y, mask, kept = ctx.saved_tensors
        changed = changes_dy(_parse_kind(ctx.kind).options, mask is not None)
        weight_type, bias_type = ctx.types
        wanted = (
            wants_x,
            weight_type if wants_weight else None,
            bias_type if wants_bias else None,
            wants_residual and changed,
        )
        found = torch.ops.batchnorm.backward.default(
            dy, x, y, mask, kept, ctx.kind, json.dumps([ctx.residual, *wanted])
        )
        pairs = zip(found, wanted, strict=True)
        dx, dweight, dbias, dresidual = (a if is_wanted else None for a, is_wanted in pairs)
        if wants_residual and not changed:
            dresidual = dy
        return dx, None, dweight, dbias, dresidual, None, None


def _forward(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    """y, and the record for the backward step."""
    settings = _parse_kind(kind)
    running = None
    if running_mean is not None:
        assert running_var is not None
        running = Running(running_mean, running_var)
    given = Tensors(x, mask, weight, bias, residual, running)
    tensors, decision = _arrange(given, settings)
    passes = find_passes(decision)
    done = KernelStep(
        decision,
        tensors.mask,
        running,
        passes.find_state(tensors.weight, tensors.bias, running),
        settings.options,
        settings.batch,
        update=False,
        residual=residual is not None,
    )
    y = empty_output(tensors.x, decision)
    forward(done, tensors.x, tensors.weight, tensors.bias, tensors.residual, y)
    if decision.kernel != "cpu":  # whose records are zeros at first
        # Zero the rows that this mode leaves unset: an operator must not return uninitialized
        # memory.
        for name in ("r", "d") if settings.batch else ("low", "var", "r", "d"):
            passes.row(done.kept, name).zero_()
    return _laid_like(y, x), passes.pack(done.kept)


def _shape_forward(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    axes, options, *_ = _parse_kind(kind)
    size = options.virtual_batch_size
    groups = 1 if size is None else x.shape[0] // size
    channels = 1
    for a in axes:
        channels = channels * x.shape[a]
    kept = (len(STATISTICS) * channels + 1) * groups
    return torch.empty_like(x), x.new_empty(kept, dtype=torch.float64)


def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    kept: Tensor,
    kind: str,
    wanted: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dresidual, each without elements where it is not wanted."""
    settings, (residual, gradients) = _parse_kind(kind), _parse_wanted(wanted)
    (there, mask, *_), decision = _arrange(Tensors(x, mask, None, None, None, None), settings)
    done = KernelStep(
        decision, None, None, (), settings.options, settings.batch, update=False, residual=residual
    )
    gate = None if y is None else like(y, there, decision)
    rows = Rows(like(dy, there, decision), there, gate, mask)
    unpacked = find_passes(decision).unpack(decision, kept)
    found = backward(done, rows, unpacked, gradients)
    dx, dweight, dbias, dresidual = (x.new_empty(0) if a is None else a for a in found)
    return _laid_like(dx, x), dweight, dbias, _laid_like(dresidual, x)


def _shape_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    kept: Tensor,
    kind: str,
    wanted: str,
) -> tuple[Tensor, ...]:
    wants_x, weight_type, bias_type, wants_residual = _parse_wanted(wanted)[1]
    channels = [x.shape[a] for a in _parse_kind(kind).axes]

    def like_x(wanted: bool) -> Tensor:
        return torch.empty_like(x) if wanted else x.new_empty(0)

    def per_channel(dtype: torch.dtype | None) -> Tensor:
        return x.new_empty(0) if dtype is None else x.new_empty(channels, dtype=dtype)

    per_channels = per_channel(weight_type), per_channel(bias_type)
    return like_x(wants_x), *per_channels, like_x(wants_residual)


define_operator("forward", _forward, _shape_forward)
define_operator("backward", _backward, _shape_backward)
define_operator("differentiable_step", _step)


def _arrange(tensors: Tensors, kind: _Kind) -> tuple[Tensors, Decision]:
    """The tensors in memory that suits the kernels; raises if none serves them in this process."""
    x, mask, options = tensors.x, tensors.mask, kind.options
    decision = decide(
        (x.shape, x.stride(), x.dtype, x.device.type),
        kind.axes,
        options.virtual_batch_size,
        False,
        options.activation,
        options.zero_padding,
        None if mask is None else (mask.shape, mask.stride(), mask.element_size()),
        kind.demanded,
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
