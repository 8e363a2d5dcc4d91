"""The compiled passes as XLA custom calls; native/bind_xla.cpp is the other side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchnorm.core.layout import Layout
from batchnorm.jax.call import Call
from batchnorm.jax.checks import working_type
from batchnorm.kernels import cpu
from batchnorm.kernels.select import select_kernel

# What an explanation adds, since a program may yet be compiled for something else.
NOTE = "where it is compiled for one CPU device; array code elsewhere"

cpu.warn_if_missing()


@lru_cache(maxsize=1)
def _registered() -> str | None:
    """Make the handlers known to XLA; why that is not possible, or None."""
    try:
        for name, handler in cpu.xla_handlers().items():
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except RuntimeError as error:  # an XLA whose interface these kernels were not built for
        return f"this jaxlib does not take its custom calls ({error})"
    return None


def refuse(layout: Layout, dtype: Any, mask_shape: tuple[int, ...] | None) -> str | None:
    """Why no kernel serves calls with these arrays, or None."""
    if not all(isinstance(n, int) for n in layout.shape):
        return "x has a size that is only known when the program runs"
    per_channel = mask_shape is not None and any(mask_shape[a] != 1 for a in layout.channel_axes)
    choice = select_kernel(
        "cpu", np.dtype(dtype).name, adjusted=False, per_channel_mask=per_channel
    )
    if choice.kernel is None:
        return choice.reason
    if cpu.find_geometry(layout, _dense(layout.shape)) is None:
        return f"channel axes {layout.channel_axes} are apart in memory"
    return _registered()


def refuse_context(context: Any) -> str | None:
    """Why no kernel serves the program that is being compiled, or None."""
    module = context.module_context
    if module.lowering_parameters.for_export:
        return "an exported program must not depend on this library"
    axes = module.axis_context
    if hasattr(axes, "manual_axes"):
        manual = set(axes.manual_axes) == set(axes.mesh.axis_names)
        return None if manual or axes.mesh.size == 1 else _PARTITIONED
    return None if getattr(axes, "num_devices", None) == 1 else _PARTITIONED


_PARTITIONED = "XLA would gather an array that is sharded over devices in front of it"


def readable_mask(layout: Layout, mask: Array | None, owner: str) -> Array | None:
    """`mask` in x's rank, and such that the kernels can walk it."""
    if mask is None:
        return None
    shape = layout.mask_shape(tuple(mask.shape), owner)
    mask = mask.reshape(shape)
    geometry = cpu.find_geometry(layout, _dense(layout.shape))
    if geometry is None or cpu.view_mask(geometry, layout.shape, shape, _dense(shape)):
        return mask
    sizes = [1 if a in layout.channel_axes else n for a, n in enumerate(layout.shape)]
    return jnp.broadcast_to(mask, sizes)


def step(*arrays: Array, call: Call) -> Sequence[Array]:
    """`array_code.step` by the kernels."""
    operands = call.operands(arrays)
    layout, x = call.layout, operands.x
    work = working_type(x)
    groups = 1 if layout.groups is None else layout.groups
    rows = (len(cpu.STATISTICS), *layout.moments)
    renorm = call.renorm
    limits = (0.0, 0.0, 0.0) if renorm is None else (renorm.rmin, renorm.rmax, renorm.dmax)
    return jax.ffi.ffi_call(
        "batchnorm_forward",
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(rows, work),
            jax.ShapeDtypeStruct((groups,), work),
        ),
    )(
        x,
        *(_or_nothing(a, work) for a in operands[1:]),
        geometry=_geometry(layout, operands.mask),
        numbers=np.array([call.eps, *limits], np.float64),
        batch=np.bool_(call.batch),
        renorm=np.bool_(renorm is not None),
    )


def gradient(*arrays: Array, call: Call, wanted: tuple[bool, ...]) -> list[Array]:
    """`array_code.gradients` by the kernels: those of x, gamma and beta that are wanted."""
    dy, statistics, count, *rest = arrays
    operands = call.operands(rest)
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
        geometry=_geometry(call.layout, operands.mask),
        batch=np.bool_(call.batch),
        renorm=np.bool_(call.renorm is not None),
    )
    return [a for a, want in zip(found, wanted, strict=True) if want]


def _or_nothing(a: Array | None, dtype: Any) -> Array:
    """An absent operand is an empty array."""
    return jnp.zeros((0,), dtype) if a is None else a


def _geometry(layout: Layout, mask: Array | None) -> np.ndarray:
    """In the order of `Size` in bind_xla.cpp."""
    geometry = cpu.find_geometry(layout, _dense(layout.shape))
    assert geometry is not None
    view = cpu.MaskView(1, 0, 0)
    if mask is not None:
        found = cpu.view_mask(geometry, layout.shape, tuple(mask.shape), _dense(mask.shape))
        assert found is not None
        view = found
    return np.array([*cpu.sizes_of(layout, geometry), *view], np.int64)


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of an array without gaps, in elements: XLA's operands are such."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
