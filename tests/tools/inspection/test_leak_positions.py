"""Real positions at other resolutions, against the arithmetic of the layers that make them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest

from batchnorm.tools.inspection.leaks.comparing import compare, give_back, tolerance_of
from batchnorm.tools.inspection.leaks.positions import locate
from batchnorm.tools.inspection.leaks.resolution import Sizes


class Window(NamedTuple):
    """A convolution or pooling: position j reads `kernel` positions from `j·stride - before` on."""

    kernel: int
    stride: int
    before: int
    behind: int

    def size(self, length: int) -> int:
        """The number of positions behind it."""
        return (length + self.before + self.behind - self.kernel) // self.stride + 1


def make_windows(seed: int) -> list[Window]:
    """One to three layers."""
    source, found = random.Random(seed), []
    for _ in range(source.randint(1, 3)):
        kernel = source.choice([1, 2, 3, 4, 5, 7])
        side = source.choice([0, (kernel - 1) // 2, kernel // 2])
        found.append(Window(kernel, source.choice([1, 1, 2, 2, 3, 4]), side, side))
    return found


def run(windows: Sequence[Window], length: int) -> tuple[int, list[tuple[float, int]]]:
    """The size behind all of them, and for each position its middle and its end in the input."""
    middles, ends = [float(i) for i in range(length)], list(range(length))
    for window in windows:
        size = window.size(len(middles))
        starts = [j * window.stride - window.before for j in range(size)]
        last = len(middles) - 1
        at = [min(max(s + (window.kernel - 1) / 2, 0), last) for s in starts]
        middles = [(middles[int(a)] + middles[-int(-a // 1)]) / 2 for a in at]
        ends = [ends[min(s + window.kernel - 1, last)] for s in starts]
    return len(middles), list(zip(middles, ends, strict=True))


@pytest.mark.parametrize("seed", range(150))
def test_positions_behind_strided_layers_are_real_and_nearly_all(seed: int) -> None:
    windows, source = make_windows(seed), random.Random(-seed - 1)
    long = source.randint(40, 90)
    more = 32 * source.randint(1, 2)
    lengths = sorted({long, source.randint(20, long), source.randint(20, long)}, reverse=True)
    real = np.arange(long) < np.array(lengths)[:, None]
    n, places = run(windows, long)
    m, _ = run(windows, long + more)
    if n < 1 or n == m:
        pytest.skip("a layer so coarse has no position, or as many with more padding")
    shape = (len(lengths), 3, n), (len(lengths), 3, m)
    place = locate(*shape, Sizes(real, (long,), (long + more,)))
    assert place is not None
    judged = np.broadcast_to(place.real, place.before)[:, 0]
    for row, length in zip(judged, lengths, strict=True):
        count = int(row.sum())
        assert row[:count].all()  # the first ones
        assert all(middle < length for middle, _ in places[:count])
        stride = np.prod([window.stride for window in windows])
        inside = sum(end < length - stride for _, end in places)  # all that they read is real
        assert count >= inside - max(3, inside // 4)  # strides are not known exactly


def test_equal_sizes_are_exact_with_holes() -> None:
    real = np.random.default_rng(0).random((3, 10)) < 0.5
    real[:, -1] = True
    sizes = Sizes(real, (10,), (42,))
    place = locate((3, 10, 4), (3, 42, 4), sizes)
    assert place is not None
    assert np.array_equal(place.real[..., 0], real)
    attention = locate((3, 2, 10, 10), (3, 2, 42, 42), sizes)
    assert attention is not None
    assert np.array_equal(attention.real[:, 0], real[:, :, None] & real[:, None])
    halves = locate((3, 4, 5), (3, 4, 21), sizes)
    assert halves is not None
    assert np.array_equal(halves.real[:, 0], real.reshape(3, 5, 2).all(-1))
    finer = locate((3, 4, 20), (3, 4, 84), sizes)
    assert finer is not None
    assert np.array_equal(finer.real[:, 0], real.repeat(2, 1))


def test_images_rows_heads_and_tables() -> None:
    real = np.zeros((2, 4, 6), bool)
    real[0], real[1, :2, :5] = True, True
    sizes = Sizes(real, (4, 6), (36, 38))
    image = locate((2, 3, 4, 6), (2, 3, 36, 38), sizes)
    assert image is not None
    assert np.array_equal(image.real[:, 0], real)
    assert image.ends is not None
    assert image.ends[1, 0].tolist()[0] == [1, 1, 1, 1, 0, 0]
    rows = locate((2 * 24, 3), (2 * 36 * 38, 3), sizes)
    assert rows is not None
    assert rows.before == (2, 4, 6, 3)
    assert np.array_equal(rows.real[..., 0], real)
    patches = locate((2, 6, 3), (2, 18 * 19, 3), sizes)
    assert patches is not None
    assert patches.before == (2, 2, 3, 3)
    assert patches.real[1, ..., 0].tolist() == [[True, True, False], [False, False, False]]
    line = Sizes(np.arange(5) < np.array([[5], [2]]), (5,), (37,))
    heads = locate((4, 5, 3), (4, 37, 3), line)
    assert heads is not None
    assert heads.real[..., 0].sum(1).tolist() == [5, 2, 2, 2]  # whichever of the two comes first
    table = locate((1, 9, 3), (1, 73, 3), line)
    assert table is not None
    assert not table.real.any()
    assert locate((3, 5), (3, 37), line) is None  # neither samples nor heads
    assert locate((2, 5), (2, 37, 1), line) is None
    assert locate((2, 5), (2, 4), line) is None  # fewer positions with more padding


def test_differences_are_relative_to_the_layer_and_the_value() -> None:
    sizes = Sizes(np.array([[True, True, False]]), (3,), (5,))
    a = np.array([[[3.0], [4.0], [9.0]]])
    b = np.array([[[3.0], [4.5], [0.0], [7.0], [7.0]]])
    found = compare(a, b, sizes, 1e-4, profile=True)
    assert found is not None
    scale = np.sqrt((9 + 16) / 2)
    assert found.amount == 0.5
    assert found.relative == pytest.approx(0.5 / (scale + 4))
    assert found.profile.tolist() == [pytest.approx(found.relative), 0.0]
    mended = give_back(a, b, sizes, edges=False)
    assert mended.tolist() == [[[3.0], [4.0], [0.0], [7.0], [7.0]]]
    assert b[0, 1, 0] == 4.5
    assert give_back(a, mended, sizes, edges=False) is None


@pytest.mark.parametrize(("value", "other"), [(np.nan, 1.0), (1.0, np.nan), (np.inf, 0.0)])
def test_values_that_are_not_finite_differ_unless_both_are(value: float, other: float) -> None:
    sizes = Sizes(np.array([[True, True]]), (2,), (3,))
    a = np.array([[[1.0], [value]]])
    same = compare(a, np.array([[[1.0], [value], [5.0]]]), sizes, 1e-4)
    assert same is not None
    assert same.relative == 0
    found = compare(a, np.array([[[1.0], [other], [5.0]]]), sizes, 1e-4)
    assert found is not None
    assert found.relative > 0.1


def test_tolerance_is_that_of_the_coarsest_type() -> None:
    assert tolerance_of({"float64"}) < 1e-12
    assert tolerance_of({"float64", "float32"}) == pytest.approx(1.22e-4, rel=1e-2)
    assert tolerance_of({"float32", "bfloat16", "float16"}) == 0.0625
    assert tolerance_of(set()) == tolerance_of({"float32"})
