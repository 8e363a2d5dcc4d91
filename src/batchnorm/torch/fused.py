"""The compiled kernels as one differentiable function, with the plain path behind it.

Everything a step does runs in two calls of the extension, one forward and one backward. What the
kernels cannot do, transformations and higher derivatives, goes to the differentiable path (S8).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from batchnorm.core import config
from batchnorm.core.layout import Layout
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
_PLAIN = (Tensor, torch.nn.Parameter)


class Call(NamedTuple):
    """What one call of the kernels needs beside the tensors that gradients flow to.

    Attributes:
        plan: the compiled side.
        geometry: of x's memory.
        layout: of x.
        mask: real rows, of x's rank, or None.
        running: statistics, or None.
        options: as in Options.
        batch: normalize by the batch's own statistics.
        update: move the running ones.
        renorm: whether renormalization applies.
        residual: whether a residual was added before the activation.
        history: where a step with renormalization is remembered, or None.
    """

    plan: Any
    geometry: cpu.Geometry
    layout: Layout
    mask: Tensor | None
    running: Running | None
    options: config.Options
    batch: bool
    update: bool
    renorm: bool
    residual: bool
    history: StepHistory | None


class Result(NamedTuple):
    """y in x's type, and what the kernels keep of the statistics, one row after the other."""

    y: Tensor
    statistics: Tensor


def find_refusal(
    x: Tensor,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, ...],
    residual: Tensor | None,
    running: Running | None,
    layout: Layout,
    adjusted: bool,
) -> str | None:
    """Why no kernel serves a call, or None."""
    if torch.compiler.is_compiling():
        return "a compiler is tracing, which fuses the plain path into its own code"
    if (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return "a transformation (vmap, jvp, a trace, a dispatch mode) is active"
    for a in (x, mask, residual, *parameters, *(running or ())):
        if a is not None and not (type(a) in _PLAIN and a.is_cpu):
            return f"there is none for a {type(a).__name__} on device {a.device}"
    choice = select_kernel(
        "cpu", _NAMES[x.dtype], adjusted=adjusted, per_channel_mask=_is_per_channel(mask, layout)
    )
    if choice.kernel is None:
        return choice.reason
    return _refuse_running(running)


def normalize(
    x: Tensor,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    running: Running | None,
    layout: Layout,
    options: config.Options,
    *,
    batch: bool,
    update: bool,
    history: StepHistory,
    again: bool,
    owner: str,
) -> Tensor | None:
    """Normalize by the kernels; None where x's memory does not suit them.

    Args:
        x, mask, parameters, residual, running, layout, options: checked, and nothing that
            `find_refusal` objects to.
        batch: normalize by the batch's own statistics.
        update: move the running ones.
        history: of steps with renormalization, for when one is recomputed.
        again: whether this one is a recomputation (S9).
        owner: whose name error messages carry.
    """
    x, geometry = _arrange(x, layout)
    if geometry is None:
        return None
    view, mask = _view_mask(mask, layout, geometry)
    width = 1 if mask is None else mask.element_size()
    plan = cpu.make_plan(layout, geometry, _NAMES[x.dtype], options.activation, view, width)
    renorm = options.renorm is not None and batch and running is not None
    call = Call(
        plan,
        geometry,
        layout,
        mask,
        running,
        options,
        batch,
        update,
        renorm,
        residual is not None,
        None if again or not renorm else history,
    )
    if renorm and again:
        # The statistics have moved since the step that is recomputed (S9).
        assert running is not None
        call = call._replace(
            running=history.recall(owner, running.renorm_mean, find_moments(call, x))
        )
    weight, bias = (None if a is None else a.contiguous() for a in parameters)
    if residual is not None:
        residual = _like(residual.to(x.dtype), x, geometry)
    differentiable = torch.is_grad_enabled() and any(
        a is not None and a.requires_grad for a in (x, weight, bias, residual)
    )
    if differentiable:
        return _Fused.apply(x, weight, bias, residual, call)
    return _forward(call, x, weight, bias, residual).y


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
        y, statistics = _forward(call, x, weight, bias, residual)
        # Running statistics have served their turn; they may move before the backward pass.
        ctx.call = call._replace(running=None, mask=None, history=None)
        ctx.bias_type = None if bias is None else bias.dtype
        kept = y if call.options.activation is not None else None
        ctx.save_for_backward(x, weight, call.mask, kept, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mask, y, statistics = ctx.saved_tensors
        call = ctx.call._replace(mask=mask)
        wanted = _Wanted(*ctx.needs_input_grad[:4], ctx.bias_type)
        if torch.is_grad_enabled() or type(dy) is not Tensor or _is_transformed(dy):
            found = _differentiable_backward(call, dy, x, weight, y, statistics, wanted)
        else:
            found = _backward(call, dy, x, weight, y, statistics, wanted)
        return *found, None


class _Wanted(NamedTuple):
    """Which gradients a backward pass is asked for."""

    x: bool
    weight: bool
    bias: bool
    residual: bool
    bias_type: torch.dtype | None


def _forward(
    call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Result:
    geometry, options, running = call.geometry, call.options, call.running
    y = torch.empty_like(x)
    statistics = torch.empty(call.plan.statistics_size, dtype=torch.float64)
    before = None
    if call.history is not None and running is not None:
        before = Running(*(None if a is None else a.clone() for a in running))
    mean, var, batches, *renorm = running if running is not None else (None,) * 6
    call.plan.forward(
        x.data_ptr(),
        geometry.row,
        *_rows_of(residual, geometry, x),
        _address(call.mask),
        *_rows_of(y, geometry, x),
        *_parameter(weight),
        *_parameter(bias),
        *_parameter(mean),
        _address(var),
        _address(batches),
        _renorm(options.renorm, renorm) if call.renorm else None,
        statistics.data_ptr(),
        options.eps,
        -1.0 if options.decay is None else options.decay,
        call.batch,
        call.update,
        options.unbiased,
        torch.get_num_threads(),
    )
    if call.update and running is not None:
        increment_version([a for a in running if a is not None])
    if before is not None:
        call.history.record(running.renorm_mean, kept_moments(call, statistics), before)
    return Result(y, statistics)


def _backward(
    call: Call,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    y: Tensor | None,
    statistics: Tensor,
    wanted: _Wanted,
) -> tuple[Tensor | None, ...]:
    geometry, activation = call.geometry, call.options.activation
    dy = _like(dy, x, geometry)
    gated = wanted.residual and activation is not None
    dx = torch.empty_like(x) if wanted.x or gated else None
    dresidual = torch.empty_like(x) if gated else None
    dweight = torch.empty_like(weight) if wanted.weight else None
    dbias = torch.empty(call.layout.channels, dtype=wanted.bias_type) if wanted.bias else None
    call.plan.backward(
        *_rows_of(dy, geometry, x),
        x.data_ptr(),
        geometry.row,
        # y decides where the activation's input was another tensor's doing as well.
        *_rows_of(y if call.residual else None, geometry, x),
        _address(call.mask),
        *_rows_of(dx, geometry, x),
        *_rows_of(dresidual, geometry, x),
        *_parameter(dweight),
        *_parameter(dbias),
        statistics.data_ptr(),
        call.batch,
        torch.get_num_threads(),
    )
    if wanted.residual and activation is None:
        dresidual = dy
    return dx if wanted.x else None, dweight, dbias, dresidual if wanted.residual else None


def _differentiable_backward(
    call: Call,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    y: Tensor | None,
    statistics: Tensor,
    wanted: _Wanted,
) -> tuple[Tensor | None, ...]:
    """The same gradients by the plain path, differentiable again in dy, x and weight (S8)."""
    layout = call.layout
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    if call.options.activation is not None:
        dy = activation_gradient(dy, y, call.options.activation, XP)
    mask = None if call.mask is None else call.mask != 0
    inputs = [a for a, asked in ((x, wanted.x), (weight, wanted.weight)) if asked]
    found: list[Any] = []
    if inputs:
        with torch.enable_grad():
            z = _replay(call, x.to(work), weight, mask, statistics.to(work)).to(x.dtype)
        again = torch.is_grad_enabled()
        found = list(torch.autograd.grad(z, inputs, dy, create_graph=again, allow_unused=True))
    dx = found.pop(0) if wanted.x else None
    dweight = found.pop(0) if wanted.weight else None
    dbias = None
    if wanted.bias:
        reduced = tuple(a for a in range(x.dim()) if a not in layout.channel_axes)
        real = select(mask, dy.to(work), 0.0, XP)
        dbias = XP.sum(real, axis=reduced, keepdims=False).to(wanted.bias_type)
    return dx, dweight, dbias, dy if wanted.residual else None


def _replay(
    call: Call, x: Tensor, weight: Tensor | None, mask: Tensor | None, statistics: Tensor
) -> Tensor:
    """x̂·gamma as the forward step made it, in differentiable operations."""
    layout, options = call.layout, call.options

    def row(name: str) -> Tensor:
        size = layout.statistics
        n = math.prod(size)
        start = cpu.STATISTICS[name] * n
        return statistics[start : start + n].reshape(size)

    affine = Affine(gamma=layout.expand(None if weight is None else weight.to(x.dtype), XP))
    if not call.batch:
        z = normalize_running(x, row("mean"), row("var"), mask, affine, eps=options.eps, xp=XP)
        return z
    if call.renorm:
        affine = affine._replace(r=row("r"), d=row("d"))
    split, real = layout.split(x, XP), layout.split(mask, XP)
    centred = centre(split, real, layout.reduced, eps=options.eps, xp=XP)
    # Where a group is empty all rows are padding, whose values no gradient depends on.
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
    """The moments that the kernels' forward step would use."""
    statistics = torch.empty(call.plan.statistics_size, dtype=torch.float64)
    call.plan.moments(
        x.data_ptr(),
        call.geometry.row,
        _address(call.mask),
        statistics.data_ptr(),
        torch.get_num_threads(),
    )
    return kept_moments(call, statistics)


def kept_moments(call: Call, statistics: Tensor) -> Moments:
    """The moments that a forward step has kept."""
    n = math.prod(call.layout.statistics)
    mean, var = (
        statistics[cpu.STATISTICS[name] * n :][:n].reshape(call.layout.moments)
        for name in ("mean", "var")
    )
    return Moments(statistics[len(cpu.STATISTICS) * n :], mean, var)


def _arrange(x: Tensor, layout: Layout) -> tuple[Tensor, cpu.Geometry | None]:
    """x, copied if its memory is neither rows of channels nor channels of rows."""
    geometry = cpu.find_geometry(layout, x.stride())
    if geometry is None or x.data_ptr() % x.element_size() != 0:
        x = x.clone(memory_format=torch.contiguous_format)
        geometry = cpu.find_geometry(layout, x.stride())
    return x, geometry


def _view_mask(
    mask: Tensor | None, layout: Layout, geometry: cpu.Geometry
) -> tuple[cpu.MaskView | None, Tensor | None]:
    """How the kernels read the mask, and the mask in x's rank."""
    if mask is None:
        return None, None
    mask = mask.reshape(layout.mask_shape(tuple(mask.shape), "mask"))
    view = cpu.view_mask(geometry, layout.shape, tuple(mask.shape), mask.stride())
    if view is None:
        sizes = [1 if a in layout.channel_axes else n for a, n in enumerate(layout.shape)]
        rest = [a for a in range(len(sizes)) if a not in geometry.order]
        order = [*geometry.order, *rest]
        dense = mask.expand(sizes).permute(order).contiguous()
        mask = dense.permute([order.index(a) for a in range(len(order))])
        view = cpu.view_mask(geometry, layout.shape, tuple(mask.shape), mask.stride())
    assert view is not None
    return view, mask


def _is_per_channel(mask: Tensor | None, layout: Layout) -> bool:
    if mask is None or mask.dim() < len(layout.shape):
        return False
    return any(mask.shape[a] != 1 for a in layout.channel_axes)


def _refuse_running(running: Running | None) -> str | None:
    if running is None:
        return None
    mean, _, batches, *_ = running
    if mean.dtype not in (torch.float32, torch.float64):
        return f"it updates float32 or float64 statistics, and got {mean.dtype}"
    for a in running:
        if a is batches:
            continue
        if a is not None and (a.dtype != mean.dtype or not a.is_contiguous()):
            return "it takes contiguous running statistics of one type only"
    if batches is not None and batches.dtype != torch.int64:
        return f"it counts batches in int64, and got {batches.dtype}"
    return None


def _is_transformed(dy: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(dy) or dy.is_neg()


def _like(dy: Tensor, x: Tensor, geometry: cpu.Geometry) -> Tensor:
    """dy in memory that suits x's geometry."""
    if dy.stride() == x.stride():
        return dy
    if cpu.row_distance(geometry, tuple(x.shape), dy.stride()) is not None:
        return dy
    return torch.empty_like(x).copy_(dy)


def _rows_of(a: Tensor | None, geometry: cpu.Geometry, x: Tensor) -> tuple[int, int]:
    """Address, and distance between rows, of a tensor of x's shape."""
    if a is None:
        return 0, 0
    if a.stride() == x.stride():
        return a.data_ptr(), geometry.row
    row = cpu.row_distance(geometry, tuple(x.shape), a.stride())
    assert row is not None
    return a.data_ptr(), row


def _parameter(a: Tensor | None) -> tuple[int, int]:
    return (0, 2) if a is None else (a.data_ptr(), _CODES[a.dtype])


def _address(a: Tensor | None) -> int:
    return 0 if a is None else a.data_ptr()


def _renorm(renorm: config.Renorm | None, statistics: list[Tensor]) -> tuple[Any, ...]:
    assert renorm is not None
    addresses = (a.data_ptr() for a in statistics)
    return (*addresses, renorm.decay, renorm.rmin, renorm.rmax, renorm.dmax)
