"""What is decided once for calls of the same shapes, memory and options; and what is not plain."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.core.layout import Layout, make_layout
from batchnorm.core.running import Running
from batchnorm.kernels import extension
from batchnorm.kernels.geometry import (
    Geometry,
    MaskView,
    dense_strides,
    find_geometry,
    row_distance,
    row_mask_shape,
    view_mask,
)
from batchnorm.kernels.select import Choice, select_kernel, triton_status
from batchnorm.torch.runtime import untraced

NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
_PLAIN = (Tensor, torch.nn.Parameter)


extension.warn_if_missing()
_TEAM = extension.find_team(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")


class Prepared(NamedTuple):
    """What a call's shapes, memory and options decide.

    Attributes:
        layout: of x.
        refusal: why no kernel serves such calls, or None.
        plan: the kernels' side; None where x or the mask must be copied into other memory first.
        geometry: of x's memory; None like plan.
        mask_shape: the mask's shape in x's rank, or None.
        gapped: whether there are gaps between the rows of x, which outputs do not have.
        kernel: which kernels, "cpu" or "triton".
        view: how the mask is read, or None.
    """

    layout: Layout
    refusal: str | None
    plan: Any = None
    geometry: Geometry | None = None
    mask_shape: tuple[int, ...] | None = None
    gapped: bool = False
    kernel: str = "cpu"
    view: MaskView | None = None


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
    device: str = "cpu",
    demanded: bool = False,
) -> Prepared:
    """Decide how calls of these shapes run.

    Args:
        owner: whose name error messages carry.
        shape, strides, dtype: of x.
        axis, virtual_batch_size, adjusted, activation: the options that matter.
        mask: its shape, strides and bytes an element, or None.
        device: of x, its kind.
        demanded: whether fused=True demands a kernel.

    Raises:
        ValueError: shapes that do not fit.
    """
    # Plain tuples: torch.Size would show in error messages.
    layout = make_layout(owner, tuple(shape), axis, virtual_batch_size)
    mask_shape = None if mask is None else layout.mask_shape(tuple(mask[0]), owner)
    per_channel = mask_shape is not None and any(mask_shape[a] != 1 for a in layout.channel_axes)
    choice = choose(device, NAMES[dtype], adjusted, per_channel, demanded)
    if choice.kernel is None:
        return Prepared(layout, choice.reason)
    geometry = find_geometry(layout, strides)
    unsuited = Prepared(layout, None, mask_shape=mask_shape, kernel=choice.kernel)
    if geometry is None:
        return unsuited
    view, width = None, 1
    if mask is not None:
        assert mask_shape is not None
        width = mask[2]
        view = view_mask(geometry, shape, mask_shape, _strides_in(mask_shape, mask))
        if view is None:
            return unsuited
    return _with_plan(unsuited, geometry, dtype, activation, view, width)


def _with_plan(
    prepared: Prepared,
    geometry: Geometry,
    dtype: torch.dtype,
    activation: str | None,
    view: MaskView | None,
    mask_width: int,
) -> Prepared:
    layout, name = prepared.layout, NAMES[dtype]
    plan: Any
    if prepared.kernel == "cpu":
        plan = extension.make_plan(layout, geometry, name, activation, view, mask_width, _TEAM)
    else:
        from batchnorm.kernels.triton.launch import Plan  # imports Triton

        plan = Plan(layout, geometry, name)
    gapped = geometry.row != geometry.dense
    return prepared._replace(plan=plan, geometry=geometry, gapped=gapped, view=view)


def choose(
    device: str, dtype: str, adjusted: bool, per_channel_mask: bool, demanded: bool
) -> Choice:
    """`select_kernel`, with one warning where a GPU's kernels are missing."""
    if device == "cuda" and torch.version.hip:
        device = "hip"
    if device == "cuda":
        _warn_without_triton()
    return select_kernel(
        device, dtype, adjusted=adjusted, per_channel_mask=per_channel_mask, demanded=demanded
    )


@lru_cache(maxsize=1)
def _warn_without_triton() -> None:
    status = triton_status()
    if status.kernel is None:
        warnings.warn(
            f"batchnorm: {status.reason}; on GPUs layers use plain array code, which moves "
            "several times the bytes.",
            RuntimeWarning,
            stacklevel=2,
        )


def rearrange(
    x: Tensor, mask: Tensor | None, prepared: Prepared, activation: str | None
) -> tuple[Tensor, Tensor | None, Prepared]:
    """x and the mask copied, as far as needed, into memory that the kernels can walk."""
    layout = prepared.layout
    geometry = find_geometry(layout, x.stride())
    if geometry is None:
        order = sorted(range(x.dim()), key=lambda a: -x.stride()[a])
        back = [order.index(a) for a in range(x.dim())]
        for dense in (x.permute(order).contiguous().permute(back), x.contiguous()):
            geometry = find_geometry(layout, dense.stride())
            if geometry is not None:
                x = dense
                break
    if geometry is None:
        return x, mask, prepared
    view, width = None, 1
    if mask is not None:
        assert prepared.mask_shape is not None
        mask, width = mask.reshape(prepared.mask_shape), mask.element_size()
        view = view_mask(geometry, layout.shape, prepared.mask_shape, mask.stride())
        if view is None:
            sizes = row_mask_shape(layout)
            rest = [a for a in range(x.dim()) if a not in geometry.order]
            order = [*geometry.order, *rest]
            dense = mask.expand(sizes).permute(order).contiguous()
            mask = dense.permute([order.index(a) for a in range(x.dim())])
            view = view_mask(geometry, layout.shape, sizes, mask.stride())
            prepared = prepared._replace(mask_shape=sizes)
    return x, mask, _with_plan(prepared, geometry, x.dtype, activation, view, width)


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


@untraced
def is_plain(x: Tensor) -> bool:
    """Whether x, and the moment, are such that its memory may be touched directly."""
    return (
        type(x) in _PLAIN
        and x.layout is torch.strided
        and not x.is_nested
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and has_memory(x)
    )


def has_memory(a: Tensor) -> bool:
    """Whether its memory holds its values: no wrapper of a transformation, no lazy negation."""
    functorch = torch._C._functorch
    return not (
        functorch.is_functorch_wrapped_tensor(a)
        or functorch.is_legacy_batchedtensor(a)  # is_grads_batched=True
        or a.is_neg()
        or a._is_zerotensor()
    )


def refuse_parameters(parameters: Sequence[Tensor | None]) -> str | None:
    """What the kernels have against weight and bias, or None."""
    for a in parameters:
        if a is not None and a.dtype not in NAMES:
            return f"it takes floating parameters, and got {a.dtype}"
    return None


def refuse_tensors(
    x: Tensor, tensors: Sequence[Tensor | None], running: Running | None, *, traced: bool = False
) -> str | None:
    """What the kernels that serve x have against these tensors, or None.

    `traced`: they are of a graph, whose operators get lazily negated tensors resolved.
    """
    device, cpu = x.device, x.is_cpu  # the latter is asked in half the time
    for a in tensors:
        if a is None:
            continue
        if not ((a.is_cpu if cpu else a.device == device) and type(a) in _PLAIN):
            return f"there is none for a {type(a).__name__} on device {a.device}"
        if not traced and (a.is_neg() or a._is_zerotensor()):
            return "it reads memory, where a lazily computed tensor holds other values, or none"
    if running is None:
        return None
    dtype = running.mean.dtype
    if dtype is not torch.float32 and dtype is not torch.float64:
        return f"it keeps float32 or float64 statistics, and got {dtype}"
    for a in (running.mean, running.var, *running[3:]):
        if a is not None and not (
            (a.is_cpu if cpu else a.device == device)
            and type(a) in _PLAIN
            and a.dtype is dtype
            and a.is_contiguous()
            and (traced or not (a.is_neg() or a._is_zerotensor()))
        ):
            return f"it takes contiguous running statistics of one type, on {device}"
    a = running.batches
    if a is not None and not (
        (a.is_cpu if cpu else a.device == device)
        and type(a) in _PLAIN
        and a.dtype is torch.int64
        and a.numel() == 1
        and (traced or not a.is_neg())
    ):
        return f"it counts batches in one int64 on {device}, and got {a.dtype}"
    return None


def empty_output(x: Tensor, prepared: Prepared) -> Tensor:
    """Memory for an output of x's shape and type, its axes in x's order."""
    if not prepared.gapped:
        return torch.empty_like(x)
    assert prepared.geometry is not None
    strides = dense_strides(prepared.geometry, prepared.layout.shape)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def like(a: Tensor, x: Tensor, prepared: Prepared) -> Tensor:
    """A tensor of x's shape, copied if it does not lie in memory as x does."""
    if a.stride() == x.stride():
        return a
    assert prepared.geometry is not None
    if row_distance(prepared.geometry, prepared.layout.shape, a.stride()) is not None:
        return a
    return empty_output(x, prepared).copy_(a)


def row_of(a: Tensor, x: Tensor, prepared: Prepared) -> int:
    """The distance between rows of a tensor that `like` has returned."""
    assert prepared.geometry is not None
    if a.stride() == x.stride():
        return prepared.geometry.row
    row = row_distance(prepared.geometry, prepared.layout.shape, a.stride())
    assert row is not None
    return row
