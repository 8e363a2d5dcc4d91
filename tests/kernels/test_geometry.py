"""Strided memory as the kernels see it: rows of channels, or channels of rows, or neither."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.core.layout import Layout
from batchnorm.kernels.geometry import (
    Geometry,
    find_geometry,
    row_distance,
    row_major_strides,
    row_mask_shape,
    view_mask,
)


def strides_of(shape, order=None, gap=0, at=0):
    """Strides, in elements, of an array whose axes have this order in memory.

    Args:
        shape: the array's.
        order: axes from the outermost one in memory to the innermost; None for C order.
        gap: elements left out between neighbours along the axis `order[at]`.
        at: see `gap`.
    """
    order = range(len(shape)) if order is None else order
    strides, step = [0] * len(shape), 1
    for place in reversed(range(len(shape))):
        a = order[place]
        step += gap if place == at else 0
        strides[a] = step
        step *= shape[a]
    return tuple(strides)


def positions(shape, strides):
    """An array that holds, at each index, the element's position in memory."""
    found = np.zeros(shape, np.int64)
    for a, (n, stride) in enumerate(zip(shape, strides, strict=True)):
        along = [n if b == a else 1 for b in range(len(shape))]
        found += np.arange(n).reshape(along) * stride
    return found


def walk(geometry, row):
    """The position at which the kernels read element (outer, channel, inner)."""
    o, c, i = np.indices((geometry.outer, geometry.channels, geometry.inner))
    return o * row + c * geometry.inner + i


def in_memory_order(a, geometry):
    """`a`, of x's rank, as (outer, channels, inner)."""
    rest = [axis for axis in range(a.ndim) if axis not in geometry.order]
    first, last = geometry.split
    sizes = [a.shape[axis] for axis in geometry.order]
    return a.transpose([*geometry.order, *rest]).reshape(
        math.prod(sizes[:first]), math.prod(sizes[first:last]), math.prod(sizes[last:])
    )


def seen(shape, axes, strides, groups=None):
    """(outer, channels, inner, row), or None."""
    found = find_geometry(Layout(shape, axes, groups), strides)
    return None if found is None else (found.outer, found.channels, found.inner, found.row)


# Named cases

FOUND = {
    "rows of channels": ((7, 3), (1,), (0, 1), (7, 3, 1, 3)),
    "channels of rows": ((7, 3), (1,), (1, 0), (1, 3, 7, 21)),
    "contiguous image": ((2, 3, 4, 5), (1,), (0, 1, 2, 3), (2, 3, 20, 60)),
    "channels_last image": ((2, 3, 4, 5), (1,), (0, 2, 3, 1), (40, 3, 1, 3)),
    "channel axis first": ((3, 4, 5), (0,), (0, 1, 2), (1, 3, 20, 60)),
    "channel axis outermost in memory": ((2, 3, 4, 5), (1,), (1, 0, 2, 3), (1, 3, 40, 120)),
    "channels between others": ((2, 3, 4, 5), (1,), (3, 0, 1, 2), (10, 3, 4, 12)),
    "two adjacent channel axes": ((6, 2, 3, 5), (1, 2), (0, 1, 2, 3), (6, 6, 5, 30)),
    "three adjacent channel axes": ((6, 2, 3, 5), (1, 2, 3), (0, 1, 2, 3), (6, 30, 1, 30)),
    "two channel axes made adjacent": ((6, 2, 5, 3), (1, 3), (0, 2, 1, 3), (30, 6, 1, 6)),
    "one value": ((1, 1), (1,), (0, 1), (1, 1, 1, 1)),
    "one channel": ((4, 1, 5), (1,), (0, 1, 2), (20, 1, 1, 1)),
    "one channel, innermost": ((4, 1, 5), (1,), (0, 2, 1), (20, 1, 1, 1)),
    "one sample": ((1, 3, 5), (1,), (0, 1, 2), (1, 3, 5, 15)),
    "one position": ((4, 3, 1, 1), (1,), (0, 1, 2, 3), (4, 3, 1, 3)),
    "size 1 between channel axes": ((4, 2, 1, 3), (1, 3), (0, 1, 2, 3), (4, 6, 1, 6)),
    "channel axis of size 1 apart": ((4, 1, 5, 3), (1, 3), (0, 1, 2, 3), (20, 3, 1, 3)),
    "all channel axes of size 1": ((4, 1, 5, 1), (1, 3), (0, 1, 2, 3), (20, 1, 1, 1)),
}
NONE = {
    "channel axes apart": ((6, 2, 5, 3), (1, 3), (0, 1, 2, 3)),
    "channel axes the wrong way round": ((6, 2, 3), (1, 2), (0, 2, 1)),
    "reduced axis between channels": ((6, 2, 3), (1, 2), (1, 0, 2)),
}


@pytest.mark.parametrize(("shape", "axes", "order", "expected"), FOUND.values(), ids=FOUND)
def test_dense_memory_is_seen_as(shape, axes, order, expected):
    assert seen(shape, axes, strides_of(shape, order)) == expected


@pytest.mark.parametrize(("shape", "axes", "order"), NONE.values(), ids=NONE)
def test_no_geometry_where(shape, axes, order):
    assert seen(shape, axes, strides_of(shape, order)) is None


@pytest.mark.parametrize("stride", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("axis", range(5))
def test_stride_of_an_axis_of_size_1_does_not_matter(axis, stride):
    sizes = [4, 3, 5, 2]
    sizes.insert(axis, 1)
    shape = tuple(sizes)
    channel = 1 if axis > 1 else 2
    strides = list(strides_of(shape))
    strides[axis] = stride
    assert seen(shape, (channel,), tuple(strides)) == (4, 3, 10, 30)


def test_sliced_channels_leave_a_gap_between_rows():
    assert seen((7, 3), (1,), (8, 1)) == (7, 3, 1, 8)


def test_every_second_row_is_a_wider_row():
    assert seen((4, 3, 5), (1,), (30, 5, 1)) == (4, 3, 5, 30)


def test_one_outer_row_lies_densely_whatever_its_stride():
    assert seen((1, 3), (1,), (8, 1)) == (1, 3, 1, 3)


STRIDED = {
    "gap within a row": ((4, 3), (1,), (6, 2)),
    "cropped image": ((2, 3, 4, 4), (1,), (75, 25, 5, 1)),
    "gap between parts of outer": ((2, 4, 3), (2,), (20, 3, 1)),
    "expanded rows": ((4, 3), (1,), (0, 1)),
    "expanded channels": ((4, 3), (1,), (1, 0)),
    "expanded channels of a wider row": ((4, 3), (1,), (8, 0)),
    "expanded channels of one row": ((1, 3), (1,), (8, 0)),
    "expanded inner axis": ((4, 3, 5), (1,), (3, 1, 0)),
    "expanded from one value": ((4, 3, 5), (1,), (0, 0, 0)),
    "one sample expanded from one value": ((1, 3, 5), (1,), (0, 0, 0)),
    "all but the rows expanded": ((4, 3, 5), (1,), (15, 0, 0)),
    "overlapping rows": ((4, 3), (1,), (1, 1)),
    "overlapping windows": ((4, 3), (1,), (2, 1)),
}


@pytest.mark.parametrize(("shape", "axes", "strides"), STRIDED.values(), ids=STRIDED)
def test_strides_that_are_no_rows_have_no_geometry(shape, axes, strides):
    assert seen(shape, axes, strides) is None


@pytest.mark.parametrize(("shape", "axes", "strides"), STRIDED.values(), ids=STRIDED)
def test_strides_that_are_no_rows_have_no_row_distance(shape, axes, strides):
    geometry = find_geometry(Layout(shape, axes), strides_of(shape))
    assert row_distance(geometry, shape, strides) is None


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2)], ids=["first", "last", "middle"]
)
def test_ghost_batches_need_samples_outermost_and_have_them(order):
    shape = (6, 3, 4, 5)
    strides = strides_of(shape, order)
    assert seen(shape, (1,), strides, groups=3) == seen(shape, (1,), strides)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (2, 0, 1, 3), (2, 3, 1, 0)])
def test_ghost_batches_with_samples_inside_have_no_geometry(order):
    shape = (6, 3, 4, 5)
    strides = strides_of(shape, order)
    assert seen(shape, (1,), strides) is not None
    assert seen(shape, (1,), strides, groups=3) is None


def test_ghost_batches_of_one_sample_lie_anywhere():
    assert seen((1, 3, 4), (1,), (1, 4, 1), groups=1) == (1, 3, 4, 12)


EMPTY = {
    "no samples": ((0, 3), (1,), None, (0, 3, 1, 3)),
    "no samples of an image": ((0, 3, 4, 5), (1,), None, (0, 3, 20, 60)),
    "no positions": ((4, 3, 0), (1,), None, (4, 3, 0, 0)),
    "no channels": ((4, 0, 5), (1,), None, (4, 0, 5, 0)),
    "no samples in ghost batches": ((0, 3), (1,), 0, (0, 3, 1, 3)),
    "no positions in ghost batches": ((4, 3, 0), (1,), 2, (4, 3, 0, 0)),
}


@pytest.mark.parametrize(("shape", "axes", "groups", "expected"), EMPTY.values(), ids=EMPTY)
def test_empty_memory_is_dense(shape, axes, groups, expected):
    # As torch and numpy have it: strides as if empty axes had size 1.
    strides = strides_of([max(n, 1) for n in shape])
    assert seen(shape, axes, strides, groups) == expected


@pytest.mark.parametrize("strides", [(0, 0), (5, 7), (1, 0)])
def test_row_distance_of_empty_memory_is_the_dense_one(strides):
    geometry = find_geometry(Layout((0, 3), (1,)), (3, 1))
    assert row_distance(geometry, (0, 3), strides) == 3


ROWS = {
    "the same memory": ((4, 3, 5), (15, 5, 1), 15),
    "a wider buffer": ((4, 3, 5), (40, 5, 1), 40),
    "another order": ((4, 3, 5), (15, 1, 3), None),
    "a transposed one": ((4, 3, 5), (1, 4, 12), None),
    "rows too close": ((4, 3, 5), (14, 5, 1), None),
}


@pytest.mark.parametrize(("shape", "strides", "expected"), ROWS.values(), ids=ROWS)
def test_row_distance_of_another_array_in(shape, strides, expected):
    geometry = find_geometry(Layout(shape, (1,)), strides_of(shape))
    assert row_distance(geometry, shape, strides) == expected


# Masks: (x's shape, order in memory, mask's shape and strides, view)
MASKS = {
    "rows": ((6, 3), (0, 1), (6, 1), (1, 1), (1, 1, 0)),
    "every second row of a longer mask": ((6, 3), (0, 1), (6, 1), (2, 1), (1, 2, 0)),
    "one entry for all rows": ((6, 3), (0, 1), (1, 1), (1, 1), (6, 0, 0)),
    "samples of an image": ((2, 3, 4, 5), (0, 1, 2, 3), (2, 1, 1, 1), (1, 1, 1, 1), (1, 1, 0)),
    "positions": ((2, 3, 4, 5), (0, 1, 2, 3), (2, 1, 4, 5), (20, 20, 5, 1), (1, 20, 1)),
    "positions of every sample alike": (
        (2, 3, 4, 5),
        (0, 1, 2, 3),
        (1, 1, 4, 5),
        (20, 20, 5, 1),
        (2, 0, 1),
    ),
    "samples of rows": ((2, 3, 4, 5), (0, 2, 3, 1), (2, 1, 1, 1), (1, 1, 1, 1), (20, 1, 0)),
    "positions of rows": ((2, 3, 4, 5), (0, 2, 3, 1), (2, 1, 4, 5), (20, 20, 5, 1), (1, 1, 0)),
    "lines of rows": ((2, 3, 4, 5), (0, 2, 3, 1), (2, 1, 4, 1), (4, 4, 1, 1), (5, 1, 0)),
}
COPIED = {
    "transposed": ((4, 5, 3), (0, 1, 2), 2, (4, 5, 1), (1, 4, 1)),
    "repeated outside, not inside": ((4, 5, 3), (0, 1, 2), 2, (1, 5, 1), (5, 1, 1)),
    "transposed inside": ((2, 3, 4, 5), (0, 1, 2, 3), 1, (2, 1, 4, 5), (20, 20, 1, 4)),
    "one line for every other inside": ((2, 3, 4, 5), (0, 1, 2, 3), 1, (2, 1, 4, 1), (4, 4, 1, 1)),
    "sliced inside": ((2, 3, 4, 5), (0, 1, 2, 3), 1, (2, 1, 4, 5), (40, 40, 10, 1)),
}


@pytest.mark.parametrize(
    ("shape", "order", "mask_shape", "strides", "expected"), MASKS.values(), ids=MASKS
)
def test_mask_is_read_in_place_as(shape, order, mask_shape, strides, expected):
    geometry = find_geometry(Layout(shape, (1,)), strides_of(shape, order))
    assert view_mask(geometry, shape, mask_shape, strides) == expected


@pytest.mark.parametrize("shape", [(4, 0, 3), (0, 4, 3), (4, 3, 0), (0, 0, 3)])
def test_a_mask_of_nothing_is_not_copied(shape):
    layout = Layout(shape, (shape.index(3),))
    geometry = find_geometry(layout, (7, 5, 1))
    for mask in (shape, tuple(1 if n == 3 else n for n in shape), (shape[0], 1, 1)):
        assert view_mask(geometry, shape, mask, (1, 9, 4)) == (1, 0, 0)


@pytest.mark.parametrize(
    ("shape", "order", "channel", "mask_shape", "strides"), COPIED.values(), ids=COPIED
)
def test_mask_must_be_copied_if(shape, order, channel, mask_shape, strides):
    geometry = find_geometry(Layout(shape, (channel,)), strides_of(shape, order))
    assert view_mask(geometry, shape, mask_shape, strides) is None


# Any memory


class Memory(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    order: tuple[int, ...]  # axes, outermost in memory first
    strides: tuple[int, ...]
    dense: bool  # nothing left out, nothing twice
    groups: int | None


@st.composite
def memories(draw, smallest=1, dense=None):
    rank = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(smallest, 4), min_size=rank, max_size=rank)))
    order = tuple(draw(st.permutations(range(rank))))
    axes = tuple(sorted(draw(st.sets(st.integers(0, rank - 1), min_size=1, max_size=rank - 1))))
    groups = None
    if 0 not in axes and draw(st.booleans()):
        divisors = [g for g in range(1, shape[0] + 1) if shape[0] % g == 0]
        groups = draw(st.sampled_from(divisors)) if divisors else 0
    if dense is None:
        dense = draw(st.booleans())
    strides = strides_of(shape, order)
    if not dense:
        gap, at = draw(st.integers(0, 7)), draw(st.integers(0, rank - 1))
        strides = list(strides_of(shape, order, gap, at))
        for a in draw(st.sets(st.integers(0, rank - 1), max_size=rank)):
            strides[a] = 0
    return Memory(shape, axes, order, tuple(strides), dense, groups)


def geometry_of(memory: Memory) -> Geometry | None:
    return find_geometry(Layout(memory.shape, memory.axes, memory.groups), memory.strides)


@given(memories())
def test_kernels_find_each_element_where_it_lies(memory):
    geometry = geometry_of(memory)
    if geometry is None:
        return  # `test_dense_memory_has_a_geometry_if_...` says when there must be one
    expected = in_memory_order(positions(memory.shape, memory.strides), geometry)
    assert np.array_equal(walk(geometry, geometry.row), expected)


@given(memories())
def test_rows_never_overlap(memory):
    geometry = geometry_of(memory)
    assert geometry is None or geometry.row >= geometry.channels * geometry.inner


@given(memories())
def test_channels_are_in_the_order_of_their_axes(memory):
    geometry = geometry_of(memory)
    if geometry is not None:
        first, last = geometry.split
        assert geometry.order[first:last] == memory.axes


@given(memories(dense=True))
def test_dense_memory_has_a_geometry_if_its_channel_axes_are_adjacent(memory):
    shape = memory.shape
    wide = [a for a in memory.order if shape[a] != 1]
    channels = [a for a in wide if a in memory.axes]
    at = [wide.index(a) for a in channels]
    adjacent = at == list(range(at[0], at[0] + len(at))) if at else True
    ordered = channels == sorted(channels)
    samples_first = memory.groups is None or shape[0] == 1 or wide[0] == 0
    assert (geometry_of(memory) is not None) == (adjacent and ordered and samples_first)


@given(memories())
def test_outer_rows_of_ghost_batches_belong_to_their_samples(memory):
    geometry = geometry_of(memory)
    if geometry is None or memory.groups is None:
        return
    samples = memory.shape[0]
    run = geometry.outer // samples
    sample = np.arange(samples).reshape(-1, *(1,) * (len(memory.shape) - 1))
    found = in_memory_order(np.broadcast_to(sample, memory.shape), geometry)
    expected = np.broadcast_to(np.arange(geometry.outer)[:, None, None] // run, found.shape)
    assert np.array_equal(found, expected)


@given(memories(dense=True), st.data())
def test_another_array_of_the_shape_is_walked_by_its_own_row_distance(memory, data):
    geometry = geometry_of(memory)
    if geometry is None:
        return
    rank = len(memory.shape)
    gap, at = data.draw(st.integers(0, 7)), data.draw(st.integers(0, rank - 1))
    order = data.draw(st.one_of(st.just(memory.order), st.permutations(range(rank))))
    strides = list(strides_of(memory.shape, order, gap, at))
    for a in data.draw(st.sets(st.integers(0, rank - 1), max_size=2)):
        strides[a] = 0
    row = row_distance(geometry, memory.shape, tuple(strides))
    if row is not None:
        expected = in_memory_order(positions(memory.shape, strides), geometry)
        assert np.array_equal(walk(geometry, row), expected)


@given(memories(smallest=0, dense=True))
def test_sizes_multiply_to_those_of_x(memory):
    geometry = geometry_of(memory)
    if geometry is not None:
        sizes = (geometry.outer, geometry.channels, geometry.inner)
        assert math.prod(sizes) == math.prod(memory.shape)
        assert geometry.channels == math.prod([memory.shape[a] for a in memory.axes])


@given(memories(), st.data())
def test_mask_view_reads_what_the_expanded_mask_holds(memory, data):
    geometry = geometry_of(memory)
    if geometry is None:
        return
    rank = len(memory.shape)
    mask_shape = tuple(
        1 if a in memory.axes else data.draw(st.sampled_from([1, n]))
        for a, n in enumerate(memory.shape)
    )
    order = data.draw(st.one_of(st.just(memory.order), st.permutations(range(rank))))
    gap, at = data.draw(st.integers(0, 3)), data.draw(st.integers(0, rank - 1))
    strides = list(strides_of(mask_shape, order, gap, at))
    for a in data.draw(st.sets(st.integers(0, rank - 1), max_size=2)):
        strides[a] = 0
    view = view_mask(geometry, memory.shape, mask_shape, tuple(strides))
    if view is None:
        return
    rows = tuple(1 if a in memory.axes else n for a, n in enumerate(memory.shape))
    expanded = np.broadcast_to(positions(mask_shape, strides), rows)
    o, i = np.indices((geometry.outer, geometry.inner))
    found = o // view.repeat * view.outer + i * view.inner
    assert np.array_equal(found, in_memory_order(expanded, geometry)[:, 0])


@given(memories(dense=True))
def test_mask_that_lies_as_x_does_needs_no_copy(memory):
    geometry = geometry_of(memory)
    if geometry is None:
        return
    mask_shape = tuple(1 if a in memory.axes else n for a, n in enumerate(memory.shape))
    strides = strides_of(mask_shape, memory.order)
    assert view_mask(geometry, memory.shape, mask_shape, strides) is not None


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 1, 4), (2, 0, 4), (1, 1)])
def test_row_major_strides_are_those_of_an_array_without_gaps(shape):
    strides = row_major_strides(shape)
    expected = np.empty(shape, np.int8).strides
    for n, found, true in zip(shape, strides, expected, strict=True):
        assert found == true or n == 1 or 0 in shape


@pytest.mark.parametrize("channels", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_copied_mask_of_rows_can_be_walked(channels):
    shape = (4, 5, 6)
    layout = Layout(shape, channels)
    geometry = find_geometry(layout, row_major_strides(shape))
    rows = row_mask_shape(layout)
    assert layout.mask_shape(rows) == rows
    if geometry is not None:
        assert view_mask(geometry, shape, rows, row_major_strides(rows)) is not None
