"""The compiled kernels as one differentiable function, with the plain path behind it.

Everything a step does runs in two calls of the extension, one forward and one backward. What the
kernels cannot do, transformations and higher derivatives, goes to the differentiable path (S8).

A small step is dominated by what surrounds the kernels, so that what depends on shapes and
options alone is found once (`prepare`), and the rest is kept short.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from batchnorm.core import config
from batchnorm.core.layout import Layout, make_layout
from batchnorm.core.moments import Moments, centre
from batchnorm.core.namespace import select
from batchnorm.core.normalize import (
    Affine,
    activation_gradient,
    normalize_batch,
    normalize_running,
)
from batchnorm.core.running import Running
from batchnorm.kernels import cpu
from batchnorm.kernels.select import select_kernel
from batchnorm.torch.namespace import XP
from batchnorm.torch.runtime import StepHistory

_NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
_CODES = {dtype: cpu.TYPES[name] for dtype, name in _NAMES.items()}
_TEAM = cpu.find_team(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
_PLAIN = (Tensor, torch.nn.Parameter)


class Prepared(NamedTuple):
    """What a call's shapes, memory and options decide.

    Attributes:
        layout: of x.
        refusal: why no kernel serves such calls, or None.
        plan: compiled side; None where x or the mask must be copied into other memory first.
        geometry: of x's memory; None like plan.
        mask_shape: the mask's shape in x's rank, or None.
    """

    layout: Layout
    refusal: str | None
    plan: Any = None
    geometry: cpu.Geometry | None = None
    mask_shape: tuple[int, ...] | None = None


@lru_cache(maxsize=4096)
def prepare(
    owner: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    axis: int | tuple[int, ...],
    virtual_batch_size: int | None,
    adjusted: bool,
    activation: str | None,
    mask: tuple[tuple[int, ...], tuple[int, ...], int] | None,
) -> Prepared:
    """Decide how calls of these shapes run; `mask` is its shape, strides and bytes an element.

    Raises:
        ValueError: shapes that do not fit.
    """
    # Plain tuples: torch.Size would show in error messages.
    layout = make_layout(owner, tuple(shape), axis, virtual_batch_size)
    mask_shape = None if mask is None else layout.mask_shape(tuple(mask[0]), owner)
    per_channel = mask_shape is not None and any(mask_shape[a] != 1 for a in layout.channel_axes)
    choice = select_kernel("cpu", _NAMES[dtype], adjusted=adjusted, per_channel_mask=per_channel)
    if choice.kernel is None:
        return Prepared(layout, choice.reason)
    geometry = cpu.find_geometry(layout, strides)
    if geometry is None:
        return Prepared(layout, None, mask_shape=mask_shape)
    view, width = None, 1
    if mask is not None:
        assert mask_shape is not None
        width = mask[2]
        view = cpu.view_mask(geometry, shape, mask_shape, _strides_in(mask_shape, mask))
        if view is None:
            return Prepared(layout, None, mask_shape=mask_shape)
    plan = cpu.make_plan(layout, geometry, _NAMES[dtype], activation, view, width, _TEAM)
    return Prepared(layout, None, plan, geometry, mask_shape)


class Call:
    """One call of the kernels: all that they need beside the tensors that gradients flow to."""

    __slots__ = (
        "batch",
        "history",
        "mask",
        "options",
        "prepared",
        "residual",
        "running",
        "state",
        "update",
    )

    def __init__(
        self,
        prepared: Prepared,
        mask: Tensor | None,
        running: Running | None,
        state: tuple[int, ...],
        options: config.Options,
        batch: bool,
        update: bool,
        residual: bool,
        history: StepHistory | None,
    ) -> None:
        self.prepared = prepared
        self.mask = mask
        self.running = running
        self.state = state  # from `find_state`
        self.options = options
        self.batch = batch  # normalize by the batch's own statistics
        self.update = update  # move the running ones
        self.residual = residual  # one is added before the activation
        self.history = history  # where a step with renormalization is remembered, or None

    @property
    def renorm(self) -> bool:
        return self.options.renorm is not None and self.batch and self.running is not None


def find_state(
    weight: Tensor | None, bias: Tensor | None, running: Running | None
) -> tuple[int, ...]:
    """Addresses and types of the per-channel tensors, as the kernels take them."""
    mean, var, batches = (None, None, None) if running is None else running[:3]
    return (
        0 if weight is None else weight.data_ptr(),
        2 if weight is None else _CODES[weight.dtype],
        0 if bias is None else bias.data_ptr(),
        2 if bias is None else _CODES[bias.dtype],
        0 if mean is None else mean.data_ptr(),
        2 if mean is None else _CODES[mean.dtype],
        0 if var is None else var.data_ptr(),
        0 if batches is None else batches.data_ptr(),
    )


def is_plain(x: Tensor) -> bool:
    """Whether x, and the moment, are such that its memory may be touched directly."""
    return (
        type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and _has_memory(x)
    )


def refuse_tensors(tensors: Sequence[Tensor | None], running: Running | None) -> str | None:
    """What the kernels have against these tensors, or None."""
    for a in tensors:
        if a is not None and not (a.is_cpu and type(a) in _PLAIN):
            return f"there is none for a {type(a).__name__} on device {a.device}"
    if running is None:
        return None
    dtype = running.mean.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return f"it keeps float32 or float64 statistics, and got {dtype}"
    for a in (running.mean, running.var, *running[3:]):
        if a is not None and not (
            a.is_cpu and type(a) in _PLAIN and a.dtype is dtype and a.is_contiguous()
        ):
            return "it takes contiguous running statistics of one type, on the CPU"
    batches = running.batches
    if batches is not None and not (batches.is_cpu and batches.dtype is torch.int64):
        return f"it counts batches in int64 on the CPU, and got {batches.dtype}"
    return None


def normalize(
    x: Tensor,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    running: Running | None,
    prepared: Prepared,
    options: config.Options,
    *,
    batch: bool,
    update: bool,
    history: StepHistory,
    again: bool,
    owner: str,
) -> Tensor | str:
    """Normalize by the kernels; the reason where x's memory does not suit them.

    Args:
        x, mask, parameters, residual, running: checked, and nothing that `is_plain` or
            `refuse_tensors` objects to.
        prepared: of x and the mask.
        options: as in Options.
        batch: normalize by the batch's own statistics.
        update: move the running ones.
        history: of steps with renormalization, for when one is recomputed.
        again: whether this one is a recomputation (S9).
        owner: whose name error messages carry.
    """
    if prepared.plan is None:
        x, mask, prepared = _rearrange(x, mask, prepared, options.activation)
        if prepared.plan is None:
            return f"channel axes {prepared.layout.channel_axes} are apart in memory"
    if mask is not None:
        mask = mask.view(prepared.mask_shape)
    weight, bias = parameters
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if residual is not None:
        residual = _like(residual.to(x.dtype), x, prepared)
    state = find_state(weight, bias, running)
    call = Call(prepared, mask, running, state, options, batch, update, residual is not None, None)
    if call.renorm:
        assert running is not None
        if again:  # the statistics have moved since the step that is recomputed
            moments = find_moments(call, x)
            call.running = history.recall(owner, running.renorm_mean, moments)
            call.state = find_state(weight, bias, call.running)
        else:
            call.history = history
    return run(call, x, weight, bias, residual)


def run(
    call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """y, recorded for autograd where a gradient may be asked for."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _apply(x, weight, bias, residual, call)
    return _forward(call, x, residual)[0]


class _Fused(torch.autograd.Function):
    """The kernels' forward and backward step."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
    ) -> Tensor:
        y, ctx.kept = _forward(call, x, residual)
        ctx.save_for_backward(
            x, weight, call.mask, None if call.options.activation is None else y
        )
        ctx.renorm, ctx.bias_type = call.renorm, None if bias is None else bias.dtype
        # Running statistics have served their turn, and may move before the backward pass.
        call.running = call.mask = call.history = None
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mask, y = ctx.saved_tensors
        if torch.is_grad_enabled() or type(dy) is not Tensor or not _has_memory(dy):
            return _differentiable_backward(ctx, dy, x, weight, mask, y)
        return _backward(ctx, dy, x, weight, mask, y)


# Function.apply without its search for functorch's wrappers, which `is_plain` has ruled out: that
# takes as long as the kernel on a small tensor.
_apply: Any = super(torch.autograd.Function, _Fused).apply


def _forward(call: Call, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Any]:
    """y, and what the kernels keep for the backward step."""
    prepared, options, running, mask = call.prepared, call.options, call.running, call.mask
    geometry = prepared.geometry
    assert geometry is not None
    y = torch.empty_like(x)
    before, renorm = None, None
    if call.renorm:
        assert running is not None
        renorm = _renorm(options.renorm, running)
        if call.history is not None:
            before = Running(*(None if a is None else a.clone() for a in running))
    kept = prepared.plan.forward(
        x.data_ptr(),
        geometry.row,
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else _row(residual, x, prepared),
        0 if mask is None else mask.data_ptr(),
        y.data_ptr(),
        geometry.dense,
        *call.state,
        renorm,
        options.eps,
        -1.0 if options.decay is None else options.decay,
        call.batch,
        call.update,
        options.unbiased,
        torch.get_num_threads(),
    )
    if call.update:
        assert running is not None
        increment_version([a for a in running if a is not None])
    if before is not None:
        assert call.history is not None
        call.history.record(running.renorm_mean, _moments(call, kept), before)
    return y, kept


def _backward(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    y: Tensor | None,
) -> tuple[Tensor | None, ...]:
    call: Call = ctx.call
    wants_x, wants_weight, wants_bias, wants_residual, _ = ctx.needs_input_grad
    prepared, gated = call.prepared, call.options.activation is not None
    geometry = prepared.geometry
    assert geometry is not None
    dense = geometry.dense
    dy = _like(dy, x, prepared)
    dx = torch.empty_like(x) if wants_x or (gated and wants_residual) else None
    dresidual = torch.empty_like(x) if gated and wants_residual else None
    dweight = torch.empty_like(weight) if wants_weight else None
    dbias = torch.empty(prepared.layout.channels, dtype=ctx.bias_type) if wants_bias else None
    prepared.plan.backward(
        dy.data_ptr(),
        _row(dy, x, prepared),
        x.data_ptr(),
        geometry.row,
        # y decides where the activation's input was not x's doing alone.
        y.data_ptr() if call.residual and gated else 0,
        dense,
        0 if mask is None else mask.data_ptr(),
        0 if dx is None else dx.data_ptr(),
        dense,
        0 if dresidual is None else dresidual.data_ptr(),
        dense,
        0 if dweight is None else dweight.data_ptr(),
        2 if dweight is None else _CODES[dweight.dtype],
        0 if dbias is None else dbias.data_ptr(),
        2 if dbias is None else _CODES[dbias.dtype],
        ctx.kept,
        call.batch,
        torch.get_num_threads(),
    )
    if wants_residual and not gated:
        dresidual = dy
    return dx if wants_x else None, dweight, dbias, dresidual, None


def _differentiable_backward(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    y: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The same gradients by the plain path, differentiable again in dy, x and weight (S8)."""
    call: Call = ctx.call
    wants_x, wants_weight, wants_bias, wants_residual, _ = ctx.needs_input_grad
    layout = call.prepared.layout
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    if call.options.activation is not None:
        dy = activation_gradient(dy, y, call.options.activation, XP)
    real = None if mask is None else mask != 0
    inputs = [a for a, wanted in ((x, wants_x), (weight, wants_weight)) if wanted]
    found: list[Any] = []
    if inputs:
        with torch.enable_grad():
            z = _replay(call, ctx, x.to(work), weight, real)
            z = z.to(x.dtype)
        again = torch.is_grad_enabled()
        found = list(torch.autograd.grad(z, inputs, dy, create_graph=again))
    dx = found.pop(0) if wants_x else None
    dweight = found.pop(0) if wants_weight else None
    dbias = None
    if wants_bias:
        reduced = tuple(a for a in range(x.dim()) if a not in layout.channel_axes)
        total = XP.sum(select(real, dy.to(work), 0.0, XP), axis=reduced, keepdims=False)
        dbias = total.to(ctx.bias_type)
    return dx, dweight, dbias, dy if wants_residual else None, None


def _replay(
    call: Call, ctx: Any, x: Tensor, weight: Tensor | None, mask: Tensor | None
) -> Tensor:
    """What the forward step made of x and gamma, in differentiable operations."""
    layout, options = call.prepared.layout, call.options

    def row(name: str) -> Tensor:
        values = torch.from_numpy(ctx.kept.row(cpu.STATISTICS[name]))
        return values.to(x.dtype, copy=True).reshape(layout.statistics)

    affine = Affine(gamma=layout.expand(None if weight is None else weight.to(x.dtype), XP))
    if not call.batch:
        return normalize_running(x, row("mean"), row("var"), mask, affine, eps=options.eps, xp=XP)
    if ctx.renorm:
        affine = affine._replace(r=row("r"), d=row("d"))
    split, real = layout.split(x, XP), layout.split(mask, XP)
    centred = centre(split, real, layout.reduced, eps=options.eps, xp=XP)
    # Where a group is empty all its rows are padding, whose values no gradient depends on.
    fallback = (torch.zeros_like(centred.power), torch.ones_like(centred.power))
    z = normalize_batch(
        split,
        centred,
        real,
        affine,
        fallback,
        eps=options.eps,
        correction=options.correction,
        xp=XP,
    )
    return layout.merge(z, XP)


def find_moments(call: Call, x: Tensor) -> Moments:
    """The moments that a forward step would find."""
    prepared = call.prepared
    assert prepared.geometry is not None
    mask = 0 if call.mask is None else call.mask.data_ptr()
    threads = torch.get_num_threads()
    return _moments(
        call, prepared.plan.moments(x.data_ptr(), prepared.geometry.row, mask, threads)
    )


def _moments(call: Call, kept: Any) -> Moments:
    shape = call.prepared.layout.moments
    mean, var = (
        torch.from_numpy(kept.row(cpu.STATISTICS[name])).clone().reshape(shape)
        for name in ("mean", "var")
    )
    return Moments(torch.from_numpy(kept.count()).clone(), mean, var)


def _rearrange(
    x: Tensor, mask: Tensor | None, prepared: Prepared, activation: str | None
) -> tuple[Tensor, Tensor | None, Prepared]:
    """x and the mask copied, as far as needed, into memory that the kernels can walk."""
    layout = prepared.layout
    geometry = cpu.find_geometry(layout, x.stride())
    if geometry is None:
        x = x.contiguous()
        geometry = cpu.find_geometry(layout, x.stride())
    if geometry is None:
        return x, mask, prepared
    view, width = None, 1
    if mask is not None:
        assert prepared.mask_shape is not None
        mask, width = mask.reshape(prepared.mask_shape), mask.element_size()
        view = cpu.view_mask(geometry, layout.shape, prepared.mask_shape, mask.stride())
        if view is None:
            sizes = [1 if a in layout.channel_axes else n for a, n in enumerate(layout.shape)]
            rest = [a for a in range(x.dim()) if a not in geometry.order]
            order = [*geometry.order, *rest]
            dense = mask.expand(sizes).permute(order).contiguous()
            mask = dense.permute([order.index(a) for a in range(x.dim())])
            view = cpu.view_mask(geometry, layout.shape, tuple(sizes), mask.stride())
            prepared = prepared._replace(mask_shape=tuple(sizes))
    plan = cpu.make_plan(layout, geometry, _NAMES[x.dtype], activation, view, width, _TEAM)
    return x, mask, prepared._replace(plan=plan, geometry=geometry)


def _strides_in(
    wanted: tuple[int, ...], mask: tuple[tuple[int, ...], tuple[int, ...], int]
) -> tuple[int, ...]:
    """The strides of a mask that is viewed with axes of size 1 put in between."""
    shape, strides, _ = mask
    if len(shape) == len(wanted):
        return strides
    known = iter(zip(shape, strides, strict=True))
    found, pending = [], next(known, None)
    for n in wanted:
        if pending is not None and n == pending[0]:
            found.append(pending[1])
            pending = next(known, None)
        else:
            found.append(0)
    return tuple(found)


def _has_memory(a: Tensor) -> bool:
    """Whether its memory holds its values: no wrapper of a transformation, no lazy negation."""
    functorch = torch._C._functorch
    return not (
        functorch.is_functorch_wrapped_tensor(a)
        or functorch.is_legacy_batchedtensor(a)  # is_grads_batched=True
        or a.is_neg()
    )


def _like(a: Tensor, x: Tensor, prepared: Prepared) -> Tensor:
    """A tensor of x's shape, copied if it does not lie in memory as x does."""
    if a.stride() == x.stride():
        return a
    assert prepared.geometry is not None
    if cpu.row_distance(prepared.geometry, prepared.layout.shape, a.stride()) is not None:
        return a
    return torch.empty_like(x).copy_(a)


def _row(a: Tensor, x: Tensor, prepared: Prepared) -> int:
    """The distance between rows of a tensor that `_like` has returned."""
    assert prepared.geometry is not None
    if a.stride() == x.stride():
        return prepared.geometry.row
    row = cpu.row_distance(prepared.geometry, prepared.layout.shape, a.stride())
    assert row is not None
    return row


def _renorm(renorm: config.Renorm | None, running: Running) -> tuple[Any, ...]:
    assert renorm is not None
    addresses = (a.data_ptr() for a in running[3:])
    return (*addresses, renorm.decay, renorm.rmin, renorm.rmax, renorm.dmax)
