"""Axes, ghost groups and masks: the shapes in which per-channel arrays and masks meet x."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError
from batchnorm.core.namespace import Array, Namespace

Shape = tuple[int, ...]


def normalize_axis(axis: Any, rank: int, *, least_rows: int = 1) -> tuple[int, ...]:
    """Channel axes of an array of this rank: non-negative, sorted, without duplicates.

    At least `least_rows` other axes, 1 or 0, must be left to reduce over.
    """
    wanted = check_axis(axis)
    if rank == 0:
        least = "2 axes" if least_rows else "1 axis"
        raise ArgumentValueError(
            f"x must have at least {least}, one of them {axis!r}; got a scalar."
        )
    for a in wanted:
        if not -rank <= a < rank:
            raise ArgumentValueError(
                f"axis {a} is out of range for an input of rank {rank}; use {-rank} to {rank - 1}."
            )
    axes = tuple(sorted(a % rank for a in wanted))
    if len(set(axes)) != len(axes):
        raise ArgumentValueError(
            f"axis names the same channel axis twice: {axis!r} for an input of rank "
            f"{rank}; name each one once."
        )
    if rank - len(axes) < least_rows:
        raise ArgumentValueError(
            f"axis={axis!r} leaves no axis to reduce over for an input of rank {rank}; "
            "at least one axis must not be a channel axis."
        )
    return axes


def check_axis(axis: Any) -> tuple[int, ...]:
    """`axis` as a tuple of ints, in the order given."""
    wanted = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    if not all(isinstance(a, numbers.Integral) and not isinstance(a, bool) for a in wanted):
        raise ArgumentTypeError(f"axis must be an int or a tuple of ints; got {axis!r}.")
    if not wanted:
        raise ArgumentValueError(f"axis must name at least one channel axis; got {axis!r}.")
    return tuple(int(a) for a in wanted)


@dataclass(frozen=True)
class Layout:
    """The working view of x: x itself, or with ghost batches axis 0 split into (v, groups).

    Sample i belongs to group i mod G (S12), so row-major splitting puts the group on axis 1.
    Statistics keep reduced axes with size 1; they broadcast against the working view.
    """

    shape: Shape
    channel_axes: tuple[int, ...]
    groups: int | None = None

    @property
    def channels(self) -> Shape:
        """Sizes of the channel axes, in increasing order of axis."""
        return tuple(self.shape[a] for a in self.channel_axes)

    @property
    def working(self) -> Shape:
        """Shape of the working view."""
        return self._split(self.shape)

    @property
    def reduced(self) -> tuple[int, ...]:
        """Axes of the working view that statistics reduce over."""
        kept = self.kept
        return tuple(a for a in range(len(self.working)) if a not in kept)

    @property
    def kept(self) -> tuple[int, ...]:
        """Axes of the working view that statistics keep: the group, then the channels."""
        if self.groups is None:
            return self.channel_axes
        return (1, *(a + 1 for a in self.channel_axes))

    @property
    def per_channel(self) -> Shape:
        """Shape in which gamma, beta and running statistics meet the working view."""
        kept = self.kept if self.groups is None else self.kept[1:]
        return tuple(n if a in kept else 1 for a, n in enumerate(self.working))

    @property
    def statistics(self) -> Shape:
        """Shape of batch statistics on the working view."""
        kept = self.kept
        return tuple(n if a in kept else 1 for a, n in enumerate(self.working))

    @property
    def moments(self) -> Shape:
        """Shape of batch statistics as they are returned: groups first, then channels."""
        return self.channels if self.groups is None else (self.groups, *self.channels)

    def split(self, a: Array | None, xp: Namespace) -> Array | None:
        """An array of x's rank, each size x's or 1, on the working view."""
        if a is None or self.groups is None:
            return a
        return xp.reshape(a, self._split(tuple(a.shape)))

    def merge(self, a: Array, xp: Namespace) -> Array:
        """An array on the working view, in x's own shape."""
        return a if self.groups is None else xp.reshape(a, self.shape)

    def expand(self, a: Array | None, xp: Namespace) -> Array | None:
        """A per-channel array, shaped to broadcast against the working view."""
        return None if a is None else xp.reshape(a, self.per_channel)

    def mask(self, mask: Array | None, xp: Namespace) -> Array | None:
        """A boolean mask of any shape of S1, shaped to broadcast against the working view."""
        if mask is None:
            return None
        shape = self.mask_shape(tuple(mask.shape))
        return self.split(xp.reshape(mask, shape), xp)

    def mask_shape(self, shape: Shape) -> Shape:
        """The shape, of x's rank, as which a mask of this shape is read (S1)."""
        rows = tuple(n for a, n in enumerate(self.shape) if a not in self.channel_axes)
        if shape == rows or (shape and shape == rows[: len(shape)]):
            sizes = iter((*shape, *(1,) * (len(rows) - len(shape))))
            return tuple(
                1 if a in self.channel_axes else next(sizes) for a in range(len(self.shape))
            )
        if len(shape) == len(self.shape) and all(
            m in (1, n) for m, n in zip(shape, self.shape, strict=True)
        ):
            return shape
        raise ArgumentValueError(
            f"mask must have shape {rows}, like x without its channel axes, a non-empty "
            f"prefix of it, or x's own rank with sizes of {self.shape} or 1; got {shape} for x of "
            f"shape {self.shape}."
        )

    def varies_along_channels(self, mask: Shape) -> bool:
        """True if a mask of this shape, of x's rank, may differ between channels (S1 c)."""
        return any(mask[a] != 1 for a in self.channel_axes)

    @property
    def channels_are_neighbours(self) -> bool:
        """True if no other axis lies between the channel axes."""
        first = self.channel_axes[0]
        return self.channel_axes == tuple(range(first, first + len(self.channel_axes)))

    def _split(self, shape: Shape) -> Shape:
        if self.groups is None:
            return shape
        if shape[0] == 1 and self.shape[0] != 1:
            return (1, 1, *shape[1:])
        return (self.shape[0] // self.groups if self.groups else 1, self.groups, *shape[1:])


def make_layout(
    shape: Sequence[int],
    axis: Any,
    virtual_batch_size: int | None = None,
    *,
    least_rows: int = 1,
) -> Layout:
    """The layout of an input of this shape.

    `virtual_batch_size` is for training only (S12); `least_rows` as in `normalize_axis`.
    """
    axes = normalize_axis(axis, len(shape), least_rows=least_rows)
    if virtual_batch_size is None:
        return Layout(tuple(shape), axes)
    if 0 in axes:
        raise ArgumentValueError(
            f"virtual_batch_size splits axis 0, which must not be a channel axis; "
            f"got axis={axis!r}."
        )
    samples = shape[0]
    if samples % virtual_batch_size != 0:
        raise ArgumentValueError(
            f"virtual_batch_size={virtual_batch_size} must divide the batch size in "
            f"training; got a batch of {samples}. Drop the last batch (drop_last=True) or choose "
            "a divisor."
        )
    return Layout(tuple(shape), axes, samples // virtual_batch_size)


def count_values(layout: Layout) -> int:
    """The number of values that each statistic reduces over, padding included."""
    return math.prod([layout.working[a] for a in layout.reduced])


def check_per_channel(name: str, array: Array | None, layout: Layout) -> None:
    """Raise unless `array` is None or has one value per channel."""
    if array is not None and tuple(array.shape) != layout.channels:
        raise ArgumentValueError(
            f"{name} must have shape {layout.channels}, the channel sizes of x of shape "
            f"{layout.shape} along axis {layout.channel_axes}; got {tuple(array.shape)}."
        )


def check_mask_values(mask: Any) -> None:
    """Raise if a NumPy array of integers holds a value other than 0 and 1 (S1)."""
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.size:
        raise mask_value_error(wrong[0])


def mask_value_error(value: Any) -> ValueError:
    """The error for an integer mask that holds `value`, neither 0 nor 1 (S1)."""
    return ArgumentValueError(
        f"an integer mask must hold 1 for real rows and 0 for padding; got the value "
        f"{int(value)}. Pass mask != 0 for token numbers, sequence_mask(lengths, size) for lengths."
    )


def check_length_values(lengths: Any, size: int) -> None:
    """Raise if a NumPy array holds a length that is not between 0 and `size`."""
    wrong = lengths[(lengths < 0) | (lengths > size)]
    if wrong.size:
        raise length_value_error(wrong[0], size)


def length_value_error(value: Any, size: int) -> ValueError:
    """The error for a length that is not between 0 and `size`."""
    return ArgumentValueError(
        f"lengths must lie between 0 and size={size}; got {int(value)}. Give the size "
        "that sequences are padded to, and clip longer ones."
    )
