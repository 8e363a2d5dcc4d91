"""The real positions of any layer's arrays, found from sizes alone.

Two runs differ in the amount of padding, so an axis whose size differs between them runs along
positions, at the input's resolution or another. A position counts as real here only if the mask
says so for all of the input that belongs to it: too few positions cost a little sharpness, one too
many would accuse a layer that is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Place", "Sizes", "locate"]

_MARGIN = 2  # positions at the edge of a coarser layer that are given back, but not judged


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


class Place(NamedTuple):
    """The part that both runs' arrays of one layer have in common.

    Attributes:
        before: shape for the array of the first run; axes of flattened rows are apart in it.
        after: the same for the second run.
        real: bool, of that rank with sizes of `before` or 1; True at real positions.
        same: the positions where the second run may be given the values of the first.
        ends: distance of each position to the end of its sample, in positions of the input;
            shape like `real`; None where no axis runs along positions.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    real: Any
    same: Any
    ends: Any = None


class _Axis(NamedTuple):
    """One axis of a layer that runs along a padded axis: its size, and the stride, if known."""

    number: int
    size: int
    stride: float
    exact: bool


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
    if len(a) != len(b):
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
    return Place(shape, shape, real, real)


def _unfold(a: tuple[int, ...], b: tuple[int, ...], sizes: Sizes) -> Place | None:
    """Positions on axis 0: flattened rows `(N·L, ...)`, or time first, `(L, N, ...)`."""
    n = sizes.samples
    if a[1:] != b[1:]:
        return None
    flat = (a[0], b[0]) == (n * math.prod(sizes.before), n * math.prod(sizes.after))
    if not flat and len(sizes.before) == 1 and a[1:2] == (n,):
        return _place(a, b, [(0, _axis(0, a[0], b[0], 0, sizes))], sizes, samples=1)
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
    if a[0] % sizes.samples:
        return None
    moving = [i for i in range(1, len(a)) if a[i] != b[i]]
    padded = len(sizes.before)
    axes: list[tuple[int, _Axis | None]] = []
    if padded == 1:
        axes = [(i, _axis(0, a[i], b[i], 0, sizes)) for i in moving]
    elif len(moving) == padded:
        axes = [(i, _axis(e, a[i], b[i], e, sizes)) for e, i in enumerate(moving)]
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
        axes = [(i, _axis(e, a[i], b[i], e, sizes)) for i in moving for e in
                [exact.index((a[i], b[i]))]]  # fmt: skip
    return _place(a, b, axes, sizes, samples=0)


def _axis(number: int, n: int, m: int, e: int, sizes: Sizes) -> _Axis | None:
    """The stride of an axis with sizes n and m in the two runs."""
    long, longer = sizes.before[e], sizes.after[e]
    if (n, m) == (long, longer):
        return _Axis(number, n, 1.0, True)
    if m <= n or n == 0:
        return None
    stride = (longer - long) / (m - n)
    whole = stride == round(stride) or 1 / stride == round(1 / stride)
    if not whole:
        # The true stride lies between two bounds; the greater gives fewer real positions.
        stride = (longer - long) / max(1, m - n - 1)
    return _Axis(number, n, stride, whole and n * stride == long)


def _split(n: int, m: int, sizes: Sizes) -> list[tuple[_Axis, int]] | None:
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
                found.append((_Axis(e, size, float(patch), exact), longer))
            return found
    if len(sizes.before) > 1:
        return None
    axis = _axis(0, n, m, 0, sizes)
    return None if axis is None else [(axis, m)]


def _place(
    before: tuple[int, ...],
    after: tuple[int, ...],
    axes: Sequence[tuple[int, _Axis | None]],
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
    same, ends = real, None
    for group in groups:
        chosen = {axis.number: axis for _, axis in group}
        judged, given, far = _project(sizes, chosen)
        order = [samples, *(i for i, _ in sorted(group, key=lambda pair: pair[1].number))]
        real = real & _spread(judged, order, rank)
        same = same & _spread(given, order, rank)
        ends = _spread(far, order, rank) if ends is None else ends
    heads = before[samples] // sizes.samples
    if heads > 1:
        real, same, ends = (_per_head(x, samples, heads) for x in (real, same, ends))
    return Place(before, after, real, same, ends)


def _project(sizes: Sizes, chosen: dict[int, _Axis]) -> tuple[Any, Any, Any]:
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
        real, given = _scale(real, e + 1, axis, 0), _scale(given, e + 1, axis, _MARGIN)
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


def _scale(real: Any, along: int, axis: _Axis, margin: int) -> Any:
    """A mask's axis at the resolution of a layer."""
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
        counts = np.where(lengths == long, size, np.where(lengths > 0, counts + margin, 0))
    counts = np.clip(counts, 0, size)[..., None]
    return np.moveaxis(np.arange(size) < counts, -1, along)


def _count(lengths: Any, long: int, axis: _Axis) -> Any:
    """The number of real positions of samples of these lengths."""
    stride = axis.stride
    if axis.size * stride > long:  # the last position is partly padding, or beyond the input
        counts = np.floor(lengths / stride + 1e-6)
    else:  # a map without padding: its last position is real if all of the input is
        counts = np.floor(axis.size - (long - lengths) / stride + 1e-6)
    whole = stride == round(stride) or 1 / stride == round(1 / stride)
    return np.where(lengths > 0, counts if whole else counts - 1, 0).astype(np.int64)


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
