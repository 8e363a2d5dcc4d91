"""The real positions of any layer's arrays, found from sizes alone.

Two runs differ in the amount of padding, so an axis whose size differs between them runs along
positions, at the input's resolution or another. A position counts as real here only if the mask
says so for all of the input that belongs to it: too few positions cost a little sharpness, one too
many would accuse a layer that is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from batchnorm.tools.inspection.leaks.resolution import Axis, Sizes, find_axis, project

__all__ = ["Place", "locate"]


class Place(NamedTuple):
    """The part that both runs' arrays of one layer have in common.

    Attributes:
        before: shape for the array of the first run; axes of flattened rows are apart in it.
        after: the same for the second run.
        real: bool, of that rank with sizes of `before` or 1; True at real positions.
        perhaps: `real`, and the last positions of samples without padding, which may lie partly
            beyond the input.
        exact: `real` misses no position.
        ends: distance of each position to the end of its sample, in positions of the input;
            shape like `real`; None where no axis runs along positions.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    real: Any
    perhaps: Any
    exact: bool
    ends: Any = None


def locate(a: Sequence[int], b: Sequence[int], sizes: Sizes) -> Place | None:
    """The positions of a layer that are real, or None if they cannot be told.

    Args:
        a: shape of its array in the run with little padding.
        b: shape in the run with more.
        sizes: of the two runs.

    Shapes that are equal have no padding: all of them is real, except samples that hold no real
    position. Of several heads in axis 0 each has the real positions of its sample.
    """
    a, b = tuple(a), tuple(b)
    if len(a) != len(b) or any(n > m for n, m in zip(a, b, strict=True)):
        return None
    if a == b:
        return _whole(a, sizes)
    if a[0] != b[0]:
        return _unfold(a, b, sizes)
    return _by_sample(a, b, sizes)


def _whole(shape: tuple[int, ...], sizes: Sizes) -> Place:
    real = np.ones((1,) * len(shape), bool)
    if shape and shape[0] == sizes.samples:
        real = sizes.real.reshape(sizes.samples, -1).any(1).reshape(-1, *(1,) * (len(shape) - 1))
    return Place(shape, shape, real, real, True)


def _unfold(a: tuple[int, ...], b: tuple[int, ...], sizes: Sizes) -> Place | None:
    """Positions on axis 0: flattened rows `(N·L, ...)`, or time first, `(L, N, ...)`."""
    n = sizes.samples
    if a[1:] != b[1:]:
        return None
    flat = (a[0], b[0]) == (n * math.prod(sizes.before), n * math.prod(sizes.after))
    if not flat and len(sizes.before) == 1 and a[1:2] == (n,):
        return _place(a, b, [(0, find_axis(0, a[0], b[0], 0, sizes))], sizes, samples=1)
    if a[0] % n or b[0] % n:
        return None
    rows = _split(a[0] // n, b[0] // n, sizes)
    if rows is None:
        return None
    axes = [(i + 1, axis) for i, (axis, _) in enumerate(rows)]
    before = (n, *(axis.size for axis, _ in rows), *a[1:])
    after = (n, *(size for _, size in rows), *b[1:])
    return _place(before, after, axes, sizes, samples=0)


def _by_sample(a: tuple[int, ...], b: tuple[int, ...], sizes: Sizes) -> Place | None:
    """Samples, or several heads of each, on axis 0, and positions on others."""
    if a[0] == 1 < sizes.samples:  # a table of positions is no sample's
        nothing = np.zeros((1,) * len(a), bool)
        return Place(a, b, nothing, nothing, True)
    if a[0] % sizes.samples:
        return None
    moving = [i for i in range(1, len(a)) if a[i] != b[i]]
    padded = len(sizes.before)
    axes: list[tuple[int, Axis | None]] = []
    if padded == 1:
        axes = [(i, find_axis(0, a[i], b[i], 0, sizes)) for i in moving]
    elif len(moving) == padded:
        axes = [(i, find_axis(e, a[i], b[i], e, sizes)) for e, i in enumerate(moving)]
    elif len(moving) == 1:
        [at] = moving
        rows = _split(a[at], b[at], sizes)
        if rows is None:
            return None
        before = (*a[:at], *(axis.size for axis, _ in rows), *a[at + 1 :])
        after = (*b[:at], *(size for _, size in rows), *b[at + 1 :])
        spread = [(at + e, axis) for e, (axis, _) in enumerate(rows)]
        return _place(before, after, spread, sizes, samples=0)
    else:
        exact = list(zip(sizes.before, sizes.after, strict=True))
        if any((a[i], b[i]) not in exact for i in moving):
            return None
        axes = [(i, find_axis(e, a[i], b[i], e, sizes)) for i in moving for e in
                [exact.index((a[i], b[i]))]]  # fmt: skip
    return _place(a, b, axes, sizes, samples=0)


def _split(n: int, m: int, sizes: Sizes) -> list[tuple[Axis, int]] | None:
    """Axes whose product is n in one run and m in the other, each in patches of the same size."""
    for patch in range(1, min(sizes.before) + 1):
        before = tuple(size // patch for size in sizes.before)
        after = tuple(size // patch for size in sizes.after)
        if math.prod(before) < n and math.prod(after) < m:
            break
        if (math.prod(before), math.prod(after)) == (n, m):
            found = []
            for e, (size, longer) in enumerate(zip(before, after, strict=True)):
                exact = size * patch == sizes.before[e]
                found.append((Axis(e, size, float(patch), exact), longer))
            return found
    if len(sizes.before) > 1:
        return None
    axis = find_axis(0, n, m, 0, sizes)
    return None if axis is None else [(axis, m)]


def _place(
    before: tuple[int, ...],
    after: tuple[int, ...],
    axes: Sequence[tuple[int, Axis | None]],
    sizes: Sizes,
    samples: int,
) -> Place | None:
    """All axes together.

    Args:
        before, after: shapes of the two runs.
        axes: axes of the array, each with what is known of it.
        sizes: of the two runs.
        samples: the axis that holds samples.
    """
    rank = len(before)
    known = [(i, axis) for i, axis in axes if axis is not None]
    if len(known) < len(axes) or not known:
        return None
    repeats = len({axis.number for _, axis in known}) < len(known)
    groups = [[pair] for pair in known] if repeats else [known]
    real = np.ones((1,) * rank, bool)
    perhaps, ends = real, None
    for group in groups:
        chosen = {axis.number: axis for _, axis in group}
        judged, given, far = project(sizes, chosen)
        order = [samples, *(i for i, _ in sorted(group, key=lambda pair: pair[1].number))]
        real = real & _spread(judged, order, rank)
        perhaps = perhaps & _spread(given, order, rank)
        ends = _spread(far, order, rank) if ends is None else ends
    heads = before[samples] // sizes.samples
    if heads > 1:
        real, perhaps, ends = (_per_head(x, samples, heads) for x in (real, perhaps, ends))
    # A coarser position of a shorter sample may be real in part.
    exact = all(axis.exact and axis.stride <= 1 for _, axis in known)
    return Place(before, after, real, perhaps, exact, ends)


def _spread(mask: Any, order: Sequence[int], rank: int) -> Any:
    """The axes of a mask at their places among those of an array."""
    sizes = [1] * rank
    for at, size in zip(order, mask.shape, strict=True):
        sizes[at] = size
    return mask.transpose(np.argsort(order)).reshape(sizes)


def _per_head(mask: Any, samples: int, heads: int) -> Any:
    """Samples repeated for each head, whichever of the two comes first on the axis."""
    n = mask.shape[samples]
    rows = np.arange(n * heads)
    first, second = mask.take(rows // heads, samples), mask.take(rows % n, samples)
    return np.minimum(first, second)
