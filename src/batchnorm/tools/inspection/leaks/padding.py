"""A batch with little padding, and with more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError
from batchnorm.tools.frameworks.adapter import Following
from batchnorm.tools.inspection.leaks.resolution import Sizes

__all__ = ["Padded", "pad_batch"]

# Padding by whole blocks: a stride that divides it is known exactly. Long signals have strides
# such as 20 (spectrograms) or 320 (waveforms); more than one padded axis would grow too much.
_STEPS = ((1920, 960), (320, 480), (96, 96), (0, 32))
_SPREAD = 3.0  # deviations of the values that fill padding in the second probe


@dataclass(frozen=True, eq=False)
class Padded:
    """A batch and its mask, made to sizes.

    Args:
        make: function of the sizes of the padded axes, and of True for other values than the
            filling in the padding, that gives the batch and its mask.
        sizes: of the two runs.
    """

    make: Callable[[tuple[int, ...], bool], tuple[Any, Any]]
    sizes: Sizes


def pad_batch(
    following: Following,
    batch: Any,
    mask: Any,
    more: int | None,
    axes: Sequence[int] | None,
    multiple: int,
    fill: float | None,
) -> Padded:
    """The batch without columns that are padding in all samples, and a way to add columns.

    Args:
        following: of the framework of the arrays.
        batch: an array, or arrays in mappings, tuples and lists.
        mask: array of shape (N, *padded axes), or (rows,).
        more: positions that the second run has more along each padded axis.
        axes: padded axes of the batch's arrays, where sizes leave them open.
        multiple: sizes that the model takes are multiples of this.
        fill: value of the padding; None for the one that the batch's padding holds.
    """
    whole = _read_mask(following, mask)
    flat = whole.ndim == 1  # rows of no sample in particular
    real = (whole != 0).reshape(1, -1) if flat else _squeeze(whole != 0)
    before = tuple(_crop(real, axis, multiple) for axis in range(1, real.ndim))
    extra = [_extra(size, more, multiple, len(before)) for size in before]
    after = tuple(size + e for size, e in zip(before, extra, strict=True))
    cut = (slice(None), *(slice(0, size) for size in before))
    real = real[cut]
    full = tuple(whole.shape if flat else _squeeze(whole).shape[1:])
    found = _Arrays(following, whole, (full, before), axes, fill)
    found.check(batch)

    def make(sizes: tuple[int, ...], other: bool) -> tuple[Any, Any]:
        return found.resize(batch, sizes, other), found.resize(mask, sizes, False)

    return Padded(make, Sizes(real, before, after))


def _read_mask(following: Following, mask: Any) -> Any:
    seen = following.read(mask)
    if seen is None or seen.values.ndim == 0:
        raise ArgumentTypeError(
            "mask must be an array of shape (N, *padded axes) with values; got "
            f"{type(mask).__name__}."
        )
    if not (seen.values != 0).any():
        raise ArgumentValueError("mask must have a real position; all of it is padding.")
    return seen.values


def _squeeze(mask: Any) -> Any:
    """A mask (N, L, 1) or (N, 1, L) as (N, L)."""
    inner = tuple(a for a in range(1, mask.ndim) if mask.shape[a] == 1)
    return mask.squeeze(inner if len(inner) < mask.ndim - 1 else ())


def _crop(real: Any, axis: int, multiple: int) -> int:
    """The size up to the last position that is real in any sample, in whole multiples."""
    others = tuple(a for a in range(real.ndim) if a != axis)
    last = int(np.flatnonzero(real.any(others))[-1]) + 1
    size = max(multiple, last // multiple * multiple)
    if size > real.shape[axis]:
        raise ArgumentValueError(
            f"multiple must not exceed the padded size {real.shape[axis]}; got {multiple}."
        )
    return size


def _extra(size: int, more: int | None, multiple: int, axes: int) -> int:
    """By default half as much again, so that strides and averages over all positions show."""
    if more is not None:
        return math.ceil(more / multiple) * multiple
    step = next(step for least, step in _STEPS if size >= least)
    step = math.lcm(step if axes == 1 else _STEPS[-1][1], multiple)
    return max(1, math.ceil(size / 2 / step)) * step


class _Arrays:
    """The arrays of a batch, and which of their axes are padded."""

    def __init__(
        self,
        following: Following,
        mask: Any,
        sizes: tuple[tuple[int, ...], tuple[int, ...]],
        axes: Sequence[int] | None,
        fill: float | None,
    ) -> None:
        """`sizes`: those of the padded axes as they are, and cropped."""
        self._following, self._mask, self._fill = following, mask, fill
        self._full, self._cropped = sizes
        self._flat = mask.ndim == 1
        self._real = (mask != 0).reshape(self._full if self._flat else (len(mask), *self._full))
        self._axes = None if axes is None else tuple(axes)

    def check(self, batch: Any) -> None:
        """Raise unless an array beside the mask has padded axes."""
        shapes = [seen.values.shape for _, seen in self._arrays(batch)]
        if not any(self._find(shape) for shape in shapes):
            raise ArgumentValueError(
                f"mask must fit an array of the batch; got a mask of shape {self._mask.shape} and "
                f"arrays of {', '.join(map(str, shapes)) or 'no shape'}. Samples are on axis 0, "
                "and the sizes of the mask's other axes are those of padded axes; axes=(2,) says "
                "which."
            )

    def resize(self, batch: Any, sizes: tuple[int, ...], other: bool) -> Any:
        """A copy of a batch at these sizes; containers of kinds that are not known are kept."""
        if isinstance(batch, Mapping):
            return {key: self.resize(value, sizes, other) for key, value in batch.items()}
        if isinstance(batch, (tuple, list)):
            values = [self.resize(value, sizes, other) for value in batch]
            return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
        seen = self._following.read(batch)
        if seen is None:
            return batch
        is_mask = self._is_mask(seen.values)
        axes = self._find_in_mask() if is_mask else self._find(seen.values.shape)
        if not axes:
            return batch
        fill = 0 if is_mask else self._find_fill(seen.values, axes)
        values = self._fit(seen.values, axes, sizes, fill)
        if other and not is_mask:
            real = self._fit(self._real, range(self._real.ndim)[-len(sizes) :], sizes, False)
            values = _scatter(values, self._padding(real, axes, values.shape))
        return self._following.write(values, batch)

    def _fit(self, values: Any, axes: Sequence[int], sizes: Sequence[int], fill: Any) -> Any:
        """Values at these sizes; what was cropped does not come back."""
        return _resize(_resize(values, axes, self._cropped, fill), axes, sizes, fill)

    def _find_fill(self, values: Any, axes: Sequence[int]) -> Any:
        """The value that all padding of an array holds, else 0."""
        if self._fill is not None:
            return self._fill
        held = values[self._padding(self._real, axes, values.shape)]
        return held[0] if held.size and (held == held[0]).all() else 0

    def _padding(self, real: Any, axes: Sequence[int], shape: tuple[int, ...]) -> Any:
        """True where an array of this shape is padding, `real` being its mask (N, *padded axes)."""
        along = tuple(axes)
        if not self._flat:
            others = [a for a in range(len(shape)) if a not in axes and shape[a] == len(real)]
            if not others:
                return np.zeros(shape, bool)
            along = (others[0], *axes)
        spread = [1] * len(shape)
        for axis, size in zip(along, real.shape, strict=True):
            spread[axis] = size
        return np.broadcast_to(~real.transpose(np.argsort(along)).reshape(spread), shape)

    def _arrays(self, batch: Any) -> list[tuple[Any, Any]]:
        if isinstance(batch, Mapping):
            return [pair for value in batch.values() for pair in self._arrays(value)]
        if isinstance(batch, (tuple, list)):
            return [pair for value in batch for pair in self._arrays(value)]
        seen = self._following.read(batch)
        return [] if seen is None or self._is_mask(seen.values) else [(batch, seen)]

    def _is_mask(self, values: Any) -> bool:
        return values.shape == self._mask.shape and np.array_equal(values, self._mask != 0)

    def _find_in_mask(self) -> tuple[int, ...]:
        if self._flat:
            return (0,)
        shape = self._mask.shape
        inner = tuple(a for a in range(1, len(shape)) if shape[a] != 1)
        return inner or tuple(range(1, len(shape)))

    def _find(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The padded axes of an array; empty if it has none.

        Raises:
            ValueError: several choices fit.
        """
        if self._flat:
            return (0,) if shape[:1] == self._full else ()
        if self._axes is not None:
            axes = tuple(
                a % len(shape) if -len(shape) <= a < len(shape) else -1 for a in self._axes
            )
            fits = len(axes) == len(self._full) and min(axes, default=-1) >= 0
            return axes if fits and tuple(shape[a] for a in axes) == self._full else ()
        if not shape or shape[0] != self._mask.shape[0]:
            return ()
        chosen = [
            axes
            for axes in itertools.combinations(range(1, len(shape)), len(self._full))
            if tuple(shape[a] for a in axes) == self._full
        ]
        if len(chosen) > 1:
            raise ArgumentValueError(
                f"axes must say which axes of an array {shape} are padded, since the sizes "
                f"{self._full} of the mask fit several; for instance axes={chosen[-1]}."
            )
        return chosen[0] if chosen else ()


def _resize(values: Any, axes: Sequence[int], sizes: Sequence[int], fill: Any) -> Any:
    """The values cropped or padded at the end of each axis."""
    cut = [slice(None)] * values.ndim
    widths = [(0, 0)] * values.ndim
    for axis, size in zip(axes, sizes, strict=True):
        cut[axis] = slice(0, size)
        widths[axis] = (0, max(0, size - values.shape[axis]))
    return np.pad(values[tuple(cut)], widths, constant_values=values.dtype.type(fill))


def _scatter(values: Any, padding: Any) -> Any:
    """Random numbers at padding.

    Integers stay: models read from them, token numbers most often, where the padding is.
    """
    real = values[~padding]
    if not real.size or values.dtype.kind != "f":
        return values
    finite, random = real[np.isfinite(real)].astype(np.float64), np.random.default_rng(0)
    values = values.copy()
    values[padding] = random.normal(finite.mean(), _SPREAD * finite.std() + 1.0, padding.sum())
    return values
