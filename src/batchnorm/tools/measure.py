"""Exact moments of one array, per channel, in float64."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from batchnorm.core.layout import Layout
from batchnorm.core.moments import Moments, centre, merge_moments
from batchnorm.kernels import extension
from batchnorm.kernels.geometry import find_geometry, view_mask
from batchnorm.kernels.kept import STATISTICS, TYPES
from batchnorm.kernels.select import select_kernel
from batchnorm.numpy_namespace import XP

_BLOCK = 2**22  # elements that are held in float64 at a time


def measure(x: Any, mask: Any, axes: Sequence[int]) -> Moments:
    """Moments of an array over its real rows, summed in double precision.

    Args:
        x: NumPy array, floating.
        mask: boolean, of x's rank with sizes of x or 1; or None.
        axes: channel axes, sorted, not negative.

    Returns:
        Moments of shape (C,), float64; several channel axes are flattened in C order.

    Source: S2, S3.
    """
    if x.dtype.name not in TYPES or x.dtype.name == "bfloat16":
        x = x.astype(np.float32)  # NumPy cannot add bfloat16
    layout = Layout(x.shape, tuple(axes))
    found = _by_kernel(x, mask, layout) if x.size else None
    return _by_array_code(x, mask, layout) if found is None else found


def merge(parts: Sequence[Moments]) -> Moments:
    """Moments of the rows of all parts together (S14).

    A part that is not finite in a channel does not count there (S9).
    """
    usable = [np.isfinite(part.mean) & np.isfinite(part.var) for part in parts]
    return _join(
        [
            Moments(*(np.where(ok, field, 0.0) for field in part))
            for ok, part in zip(usable, parts, strict=True)
        ]
    )


def _by_kernel(x: Any, mask: Any, layout: Layout) -> Moments | None:
    """Moments by the compiled pass; None where it does not apply."""
    per_channel = mask is not None and any(mask.shape[a] != 1 for a in layout.channel_axes)
    choice = select_kernel("cpu", x.dtype.name, adjusted=False, per_channel_mask=per_channel)
    if choice.kernel is None:
        return None
    geometry = find_geometry(layout, _strides(x))
    if geometry is None:
        x = np.ascontiguousarray(x)
        geometry = find_geometry(layout, _strides(x))
    if geometry is None:
        return None
    view = None
    if mask is not None:
        mask = np.ascontiguousarray(mask)
        view = view_mask(geometry, layout.shape, mask.shape, _strides(mask))
        if view is None:
            return None
    plan = extension.make_plan(layout, geometry, x.dtype.name, None, False, view, 1, 0)
    address = 0 if mask is None else mask.ctypes.data
    kept = plan.moments(x=x.ctypes.data, mask=address, threads=os.cpu_count() or 1)
    rows = (np.array(kept.row(STATISTICS[name])) for name in ("mean", "var"))
    channels = geometry.channels
    return Moments(np.full(channels, kept.count()), *rows)


def _by_array_code(x: Any, mask: Any, layout: Layout) -> Moments:
    samples = x.shape[0]
    step = samples
    if 0 not in layout.channel_axes and x.size:
        step = max(1, _BLOCK * samples // x.size)
    parts = []
    for begin in range(0, max(samples, 1), max(step, 1)):
        block = x[begin : begin + step].astype(np.float64)
        real = mask
        if mask is not None and mask.shape[0] != 1:
            real = mask[begin : begin + step]
        with np.errstate(all="ignore"):  # NaN and inf in x are data, not errors
            found = centre(block, real, layout.reduced, eps=0.0, xp=XP).moments
        parts.append(Moments(*(a.reshape(-1) for a in found)))
    return parts[0] if len(parts) == 1 else _join(parts)


def _join(parts: Sequence[Moments]) -> Moments:
    return merge_moments(Moments(*(np.stack(fields) for fields in zip(*parts, strict=True))), 0, XP)


def _strides(a: Any) -> tuple[int, ...]:
    return tuple(n // a.itemsize for n in a.strides)
