"""Masks at the resolution of a layer, from the sizes of its axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Axis", "Sizes", "find_axis", "project"]


@dataclass(frozen=True, eq=False)
class Sizes:
    """The samples and padded axes of the two runs.

    Args:
        real: bool, (N, *before), True at real positions.
        before: sizes of the padded axes in the run with little padding.
        after: the same with more.
    """

    real: Any
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.real.shape[0])

    def unpadded(self) -> Sizes | None:
        """The same, with nothing real in samples that have padding in the first run; or None."""
        full = self.real.all(tuple(range(1, self.real.ndim)), keepdims=True)
        return Sizes(self.real & full, self.before, self.after) if full.any() else None


class Axis(NamedTuple):
    """One axis of a layer that runs along a padded axis: its size, and the stride, if known."""

    number: int
    size: int
    stride: float
    exact: bool


def find_axis(number: int, n: int, m: int, e: int, sizes: Sizes) -> Axis | None:
    """The stride of an axis with sizes n and m in the two runs."""
    long, longer = sizes.before[e], sizes.after[e]
    if (n, m) == (long, longer):
        return Axis(number, n, 1.0, True)
    if m <= n or n == 0:
        return None
    stride = (longer - long) / (m - n)
    whole = stride == round(stride) or 1 / stride == round(1 / stride)
    if not whole:
        # The true stride lies between two bounds; the greater gives fewer real positions.
        stride = (longer - long) / max(1, m - n - 1)
    return Axis(number, n, stride, whole and n * stride == long)


def project(sizes: Sizes, chosen: dict[int, Axis]) -> tuple[Any, Any, Any]:
    """Real positions, those to give back, and distances to the end, at a layer's resolution.

    Padded axes that the layer does not have were reduced: what is left of them is real if any was.
    """
    real, given = sizes.real, sizes.real
    far: Any = None
    for e in range(len(sizes.before)):
        axis = chosen.get(e)
        if axis is None:
            real, given = real.any(e + 1, keepdims=True), given.any(e + 1, keepdims=True)
            far = None if far is None else far.min(e + 1, keepdims=True)
            continue
        ends = _last(sizes.real, e + 1) - np.arange(axis.size).reshape(
            [-1 if i == e + 1 else 1 for i in range(real.ndim)]
        ) * max(axis.stride, 1e-9)
        ends = np.maximum(ends, 0.0)
        far = ends if far is None else np.minimum(far, ends)
        real, given = _scale(real, e + 1, axis), _scale(given, e + 1, axis, margin=True)
    gone = tuple(e + 1 for e in range(len(sizes.before)) if e not in chosen)
    return real.squeeze(gone), given.squeeze(gone), np.broadcast_to(far, real.shape).squeeze(gone)


def _last(real: Any, along: int) -> Any:
    """The last real position along an axis, over all others but the samples; -1 without one."""
    others = tuple(i for i in range(1, real.ndim) if i != along)
    line = real.any(others, keepdims=True)
    place = np.arange(real.shape[along]).reshape(
        [-1 if i == along else 1 for i in range(real.ndim)]
    )
    return np.where(line, place, -1).max(along, keepdims=True)


def _scale(real: Any, along: int, axis: Axis, margin: bool = False) -> Any:
    """A mask's axis at the resolution of a layer.

    Args:
        real: the mask.
        along: its axis.
        axis: of the layer.
        margin: count the last position of a sample without padding as real, if in doubt.
    """
    size, long = axis.size, real.shape[along]
    if axis.exact and size == long:
        return real
    moved = np.moveaxis(real, along, -1)
    if axis.exact and not margin:
        if size < long:
            moved = moved.reshape(*moved.shape[:-1], size, long // size).all(-1)
        else:
            moved = moved.repeat(size // long, -1)
        return np.moveaxis(moved, -1, along)
    lengths = np.cumprod(moved, -1).sum(-1)  # up to the first hole
    counts = _count(lengths, long, axis)
    if margin:
        counts = np.where(lengths == long, size, counts)
    counts = np.clip(counts, 0, size)[..., None]
    return np.moveaxis(np.arange(size) < counts, -1, along)


def _count(lengths: Any, long: int, axis: Axis) -> Any:
    """The number of real positions of samples of these lengths."""
    stride = axis.stride
    whole = stride == round(stride) or 1 / stride == round(1 / stride)
    margin = 0 if whole else 1
    if axis.size * stride > long:  # the last position is partly padding, or beyond the input
        counts = np.floor(lengths / stride + 1e-6) - margin
    else:  # a map without padding: its last position is real if all of the input is
        counts = np.floor(axis.size - (long - lengths) / stride + 1e-6) - margin
        counts = np.where(lengths == long, axis.size, counts)
    return np.where(lengths > 0, counts, 0).astype(np.int64)
