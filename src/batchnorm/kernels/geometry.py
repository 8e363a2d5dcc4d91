"""Arrays in memory as the passes see them: rows of channels, or channels of rows, and a mask."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from batchnorm.core.layout import Layout


class MaskView(NamedTuple):
    """Mask entry (o, i) is element `(o // repeat) * outer + i * inner`."""

    repeat: int
    outer: int
    inner: int


class Geometry(NamedTuple):
    """Memory of one shape and its strides, as the kernels see it.

    Attributes:
        order: x's axes in their order in memory: outer (reduced), channels, inner (reduced).
        split: number of axes before the channels, and before the inner axes.
        outer, channels, inner: sizes of the three parts.
        row: distance between rows of outer, in elements.
        dense: the distance where nothing lies between the rows.
    """

    order: tuple[int, ...]
    split: tuple[int, int]
    outer: int
    channels: int
    inner: int
    row: int
    dense: int


@lru_cache(maxsize=4096)
def find_geometry(layout: Layout, strides: tuple[int, ...]) -> Geometry | None:
    """The geometry of x, or None if its memory is not rows of channels, or channels of rows.

    Args:
        layout: of x; with ghost batches axis 0 must come first in memory.
        strides: of x, in elements.
    """
    shape, channel_axes = layout.shape, layout.channel_axes
    wide = [a for a in range(len(shape)) if shape[a] != 1 or a in channel_axes]
    order = sorted(wide, key=lambda a: (-strides[a] if shape[a] != 1 else 0, a))
    order = _place_single_channels(order, layout)
    at = [order.index(a) for a in channel_axes]
    if at != list(range(at[0], at[0] + len(at))):
        return None
    split = (at[0], at[-1] + 1)
    if layout.groups is not None and shape[0] != 1 and (not order or order[0] != 0):
        return None
    sizes = [shape[a] for a in order]
    outer, channels, inner = (
        _product(sizes[: split[0]]),
        _product(sizes[split[0] : split[1]]),
        _product(sizes[split[1] :]),
    )
    dense = channels * inner
    found = Geometry(tuple(order), split, outer, channels, inner, dense, dense)
    row = row_distance(found, shape, strides)
    return None if row is None else found._replace(row=row)


@lru_cache(maxsize=4096)
def row_distance(
    geometry: Geometry, shape: tuple[int, ...], strides: tuple[int, ...]
) -> int | None:
    """Distance between outer rows of an array of x's shape; None if its memory is not as x's."""
    order, (first, _) = geometry.order, geometry.split
    if _product([shape[a] for a in order]) == 0:
        return geometry.dense
    inside = [(shape[a], strides[a]) for a in order[first:]]
    if _product([size for size, _ in inside]) > 1 and _collapse(inside) != 1:
        return None
    distance = _collapse([(shape[a], strides[a]) for a in order[:first]])
    if geometry.outer == 1:
        return geometry.dense
    return distance if distance is not None and distance >= geometry.dense else None


def row_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of an array without gaps whose axes lie in order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def dense_strides(geometry: Geometry, shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of an array of x's shape whose axes lie in memory as x's do, without gaps."""
    strides, step = [1] * len(shape), 1
    for axis in reversed(geometry.order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


@lru_cache(maxsize=4096)
def view_mask(
    geometry: Geometry,
    shape: tuple[int, ...],
    mask_shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> MaskView | None:
    """The view of a mask of x's rank, sizes x's or 1; None if the mask must be copied first."""
    order, (first, last) = geometry.order, geometry.split
    if geometry.outer * geometry.inner == 0:  # nothing is read, whatever the strides
        return MaskView(1, 0, 0)

    def walk(axes: Sequence[int]) -> list[tuple[int, int]]:
        return [(shape[a], strides[a] if mask_shape[a] != 1 else 0) for a in axes]

    outer, repeat = walk(order[:first]), 1
    while outer and outer[-1][1] == 0:
        repeat *= outer.pop()[0]
    distance, inner = _collapse(outer), _collapse(walk(order[last:]))
    if distance is None or inner is None:
        return None
    return MaskView(max(repeat, 1), distance, inner)


def row_mask_shape(layout: Layout) -> tuple[int, ...]:
    """The shape to which a mask is copied where its own memory cannot be walked (`view_mask`)."""
    return tuple(1 if a in layout.channel_axes else n for a, n in enumerate(layout.shape))


class Sizes(NamedTuple):
    """native/batchnorm.hpp's Layout."""

    outer: int
    channels: int
    inner: int
    groups: int
    run: int


def sizes_of(layout: Layout, geometry: Geometry) -> Sizes:
    """The sizes that the kernels get for x's shape."""
    groups = 1 if layout.groups is None else layout.groups
    samples = layout.shape[0]
    run = 1 if layout.groups is None else max(geometry.outer // max(samples, 1), 1)
    return Sizes(geometry.outer, geometry.channels, geometry.inner, groups, run)


def _place_single_channels(order: list[int], layout: Layout) -> list[int]:
    """Channel axes of size 1 have no place in memory of their own: put them beside the others."""
    single = [a for a in layout.channel_axes if layout.shape[a] == 1]
    if not single:
        return order
    kept = [a for a in order if a not in single]
    others = [a for a in layout.channel_axes if layout.shape[a] != 1]
    if others:
        begin = min(kept.index(a) for a in others)
        moved = sorted([*single, *kept[begin : begin + len(others)]])
        return [*kept[:begin], *moved, *kept[begin + len(others) :]]
    return [*kept, *single]


def _collapse(axes: Sequence[tuple[int, int]]) -> int | None:
    """The stride of several (size, stride) axes as one axis; None if they have no common one."""
    wide = [(size, stride) for size, stride in axes if size != 1]
    if not wide:
        return 0
    for (_, stride), (size, inner) in pairwise(wide):
        if stride != size * inner:
            return None
    return wide[-1][1]


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
