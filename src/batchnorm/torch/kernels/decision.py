"""Decisions about calls of the same shapes, memory and options, each taken once."""

from __future__ import annotations

import math
import sys
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.core.layout import Layout, make_layout
from batchnorm.kernels import extension
from batchnorm.kernels import geometry as memory
from batchnorm.kernels.select import Choice, select_kernel, triton_status
from batchnorm.torch.kernels.recycling import LEAST
from batchnorm.torch.kernels.tensors import NAMES

extension.warn_if_missing()
# torch's own library, whose threads the kernels share.
_LIBRARY = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}
_TEAM = extension.find_team(
    Path(torch.__file__).parent / "lib" / _LIBRARY.get(sys.platform, "libtorch_cpu.so")
)


class Decision(NamedTuple):
    """The decision about calls of the same shapes, memory and options.

    Attributes:
        layout: of x.
        refusal: the reason why no kernel serves such calls, or None.
        plan: the kernels' side; None where x or the mask must be copied into other memory first.
        geometry: of x's memory; None like plan.
        mask_shape: the mask's shape in x's rank, or None.
        gapped: there are gaps between the rows of x, which outputs do not have.
        kernel: which kernels, "cpu" or "triton".
        view: of the mask as the kernels read it, or None.
        large: outputs of the CPU's kernels are worth recycled memory.
    """

    layout: Layout
    refusal: str | None
    plan: Any = None
    geometry: memory.Geometry | None = None
    mask_shape: tuple[int, ...] | None = None
    gapped: bool = False
    kernel: str = "cpu"
    view: memory.MaskView | None = None
    large: bool = False


# The kind of x: shape, strides, type and kind of device. The kind of a mask: shape, strides and
# bytes an element. Plain tuples, which a call makes in no time.
InputKind = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, str]
MaskKind = tuple[tuple[int, ...], tuple[int, ...], int]


@lru_cache(maxsize=4096)
def decide(
    x: InputKind,
    axis: int | tuple[int, ...],
    virtual_batch_size: int | None,
    adjusted: bool,
    activation: str | None,
    zero_padding: bool,
    mask: MaskKind | None,
    demanded: bool,
) -> Decision:
    """Decide how calls of one kind run.

    Args:
        x, mask: the tensors' kinds.
        axis, virtual_batch_size, adjusted, activation, zero_padding: the options that matter.
        demanded: fused=True demands a kernel.

    Raises:
        ValueError: shapes that do not fit.
    """
    shape, strides, dtype, device = x
    # Plain tuples: torch.Size would show in error messages.
    layout = make_layout(tuple(shape), axis, virtual_batch_size)
    mask_shape = None if mask is None else layout.mask_shape(tuple(mask[0]))
    varies = mask_shape is not None and layout.varies_along_channels(mask_shape)
    choice = choose(device, NAMES[dtype], adjusted, varies, demanded)
    if choice.kernel is None:
        return Decision(layout, choice.reason)
    geometry = memory.find_geometry(layout, strides)
    large = device == "cpu" and math.prod(shape) * dtype.itemsize >= LEAST
    unsuited = Decision(layout, None, mask_shape=mask_shape, kernel=choice.kernel, large=large)
    if geometry is None:
        if _order_to_copy(layout, strides) is None:
            return Decision(layout, f"channel axes {layout.channel_axes} are apart in memory")
        return unsuited
    view, width = None, 1
    if mask is not None:
        assert mask_shape is not None
        width = mask[2]
        view = memory.view_mask(geometry, shape, mask_shape, _strides_in(mask_shape, mask))
        if view is None:
            return unsuited
    return _with_plan(unsuited, geometry, dtype, (activation, zero_padding), (view, width))


def _with_plan(
    decision: Decision,
    geometry: memory.Geometry,
    dtype: torch.dtype,
    ending: tuple[str | None, bool],
    mask: tuple[memory.MaskView | None, int],
) -> Decision:
    """The decision with the kernels' side.

    `ending`: the activation, and whether padding is zeroed; `mask`: its view, and bytes an element.
    """
    layout, name = decision.layout, NAMES[dtype]
    plan: Any
    if decision.kernel == "cpu":
        plan = extension.make_plan(layout, geometry, name, *ending, *mask, _TEAM)
    else:
        from batchnorm.kernels.triton.launch import Plan  # imports Triton

        plan = Plan(layout, geometry, name)
    gapped = geometry.row != geometry.dense
    return decision._replace(plan=plan, geometry=geometry, gapped=gapped, view=mask[0])


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
    x: Tensor, mask: Tensor | None, decision: Decision, ending: tuple[str | None, bool]
) -> tuple[Tensor, Tensor | None, Decision]:
    """x and the mask copied, as far as needed, into memory that the kernels can walk."""
    layout = decision.layout
    geometry = memory.find_geometry(layout, x.stride())
    if geometry is None:
        order = _order_to_copy(layout, x.stride())
        assert order is not None  # or the decision were a refusal
        x = x.permute(order).contiguous().permute([order.index(a) for a in range(x.dim())])
        geometry = memory.find_geometry(layout, x.stride())
        assert geometry is not None
    view, width = None, 1
    if mask is not None:
        assert decision.mask_shape is not None
        mask, width = mask.reshape(decision.mask_shape), mask.element_size()
        view = memory.view_mask(geometry, layout.shape, decision.mask_shape, mask.stride())
        if view is None:
            sizes = [1 if a in layout.channel_axes else n for a, n in enumerate(layout.shape)]
            rest = [a for a in range(x.dim()) if a not in geometry.order]
            wide = [*geometry.order, *rest]
            dense = mask.expand(sizes).permute(wide).contiguous()
            mask = dense.permute([wide.index(a) for a in range(x.dim())])
            view = memory.view_mask(geometry, layout.shape, tuple(sizes), mask.stride())
            decision = decision._replace(mask_shape=tuple(sizes))
    return x, mask, _with_plan(decision, geometry, x.dtype, ending, (view, width))


def _order_to_copy(layout: Layout, strides: tuple[int, ...]) -> list[int] | None:
    """An order of x's axes in which a dense copy suits the kernels: its own, or torch's."""
    plain = list(range(len(strides)))
    for order in (sorted(plain, key=lambda a: -strides[a]), plain):
        dense, step = [1] * len(order), 1
        for a in reversed(order):
            dense[a] = step
            step *= max(layout.shape[a], 1)
        if memory.find_geometry(layout, tuple(dense)) is not None:
            return order
    return None


def _strides_in(wanted: tuple[int, ...], mask: MaskKind) -> tuple[int, ...]:
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
