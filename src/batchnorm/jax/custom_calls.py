"""The compiled passes as XLA custom calls; native/bind/xla.cpp is the other side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchnorm.core.layout import Layout
from batchnorm.jax.checks import working_type
from batchnorm.jax.operands import Static
from batchnorm.kernels import extension
from batchnorm.kernels.geometry import (
    MaskView,
    Sizes,
    find_geometry,
    row_major_strides,
    row_mask_shape,
    sizes_of,
    view_mask,
)
from batchnorm.kernels.kept import STATISTICS
from batchnorm.kernels.select import select_kernel

# An explanation is made before it is known what the program is compiled for.
NOTE = "where it is compiled for one CPU device; array code elsewhere"

extension.warn_if_missing()


@lru_cache(maxsize=1)
def _registered() -> str | None:
    """Make the handlers known to XLA; the reason if that is not possible, or None."""
    try:
        for name, handler in extension.xla_handlers().items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except RuntimeError as error:  # an XLA whose interface these kernels were not built for
        return f"this jaxlib does not take its custom calls ({error})"
    return None


def refuse(layout: Layout, dtype: Any, mask_shape: tuple[int, ...] | None) -> str | None:
    """The reason against kernels for calls with these arrays, or None."""
    if not all(isinstance(n, int) for n in layout.shape):
        return "x has a size that is only known when the program runs"
    per_channel = mask_shape is not None and any(mask_shape[a] != 1 for a in layout.channel_axes)
    choice = select_kernel(
        "cpu", np.dtype(dtype).name, adjusted=False, per_channel_mask=per_channel
    )
    if choice.kernel is None:
        return choice.reason
    if find_geometry(layout, row_major_strides(layout.shape)) is None:
        return f"channel axes {layout.channel_axes} are apart in memory"
    return _registered()


def readable_mask(layout: Layout, mask: Array | None) -> Array | None:
    """`mask` in x's rank, and such that the kernels can walk it."""
    if mask is None:
        return None
    shape = layout.mask_shape(tuple(mask.shape))
    mask = mask.reshape(shape)
    geometry = find_geometry(layout, row_major_strides(layout.shape))
    if geometry is None or view_mask(geometry, layout.shape, shape, row_major_strides(shape)):
        return mask
    return jnp.broadcast_to(mask, row_mask_shape(layout))


def step(*arrays: Array, static: Static) -> Sequence[Array]:
    """`array_code.step` by the kernels."""
    operands = static.operands(arrays)
    layout, x = static.layout, operands.x
    work = working_type(x)
    groups = 1 if layout.groups is None else layout.groups
    rows = (len(STATISTICS), *layout.moments)
    moved = jax.ShapeDtypeStruct(layout.channels if static.update else (0,), work)
    found = jax.ffi.ffi_call(
        "batchnorm_forward",
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(rows, work),
            jax.ShapeDtypeStruct((groups,), work),
            moved,
            moved,
        ),
    )(
        x,
        *(_or_nothing(a, work) for a in operands[1:]),
        **_geometry(layout, operands.mask),
        eps=np.float64(static.eps),
        batch=np.bool_(static.batch),
        renorm=np.bool_(static.renorm),
        update=np.bool_(static.update),
        zero_padding=np.bool_(static.options(None).zero_padding),
    )
    return found if static.update else found[:3]


def gradient(*arrays: Array, static: Static, wanted: tuple[bool, ...]) -> list[Array]:
    """`array_code.gradients` by the kernels: those of x, gamma and beta that are wanted."""
    dy, statistics, count, *rest = arrays
    operands = static.operands(rest)
    like: Any = (operands.x, operands.gamma, operands.beta)
    nothing = jax.ShapeDtypeStruct((0,), statistics.dtype)
    found = jax.ffi.ffi_call(
        "batchnorm_backward",
        tuple(
            jax.ShapeDtypeStruct(a.shape, a.dtype) if want else nothing
            for a, want in zip(like, wanted, strict=True)
        ),
    )(
        dy,
        operands.x,
        _or_nothing(operands.mask, statistics.dtype),
        statistics,
        count,
        **_geometry(static.layout, operands.mask),
        batch=np.bool_(static.batch),
        renorm=np.bool_(static.renorm),
    )
    return [a for a, want in zip(found, wanted, strict=True) if want]


def _or_nothing(a: Array | None, dtype: Any) -> Array:
    """An absent operand is an empty array."""
    return jnp.zeros((0,), dtype) if a is None else a


def _geometry(layout: Layout, mask: Array | None) -> dict[str, dict[str, np.int64]]:
    """Sizes and strides that follow from the shapes of x and mask, as attributes by name."""
    geometry = find_geometry(layout, row_major_strides(layout.shape))
    assert geometry is not None
    view = MaskView(1, 0, 0)
    if mask is not None:
        found = view_mask(geometry, layout.shape, tuple(mask.shape), row_major_strides(mask.shape))
        assert found is not None
        view = found
    return {"layout": _named(sizes_of(layout, geometry)), "view": _named(view)}


def _named(sizes: Sizes | MaskView) -> dict[str, np.int64]:
    return {name: np.int64(n) for name, n in sizes._asdict().items()}
