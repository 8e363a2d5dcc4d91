"""Inputs that are a pair (x, mask), and the shapes of masks (S1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.layout import Layout
from batchnorm.keras.private import get_mask


def to_boolean(mask: Any) -> Any:
    """`mask` as booleans, True where it is not 0; None stays None.

    A symbolic mask is returned unchanged: its values come through here when the model runs.
    """
    if mask is None or isinstance(mask, keras.KerasTensor):
        return mask
    if isinstance(mask, np.ndarray) or not hasattr(mask, "dtype"):
        return np.asarray(mask) != 0  # before a backend cuts 64 bits to 32
    if keras.backend.standardize_dtype(mask.dtype) == "bool":
        return mask
    return keras.ops.cast(mask, "bool")


def split_pair(inputs: Any, mask: Any) -> tuple[Any, Any]:
    """x and its mask, out of a tensor or a pair, and the mask that was given beside it.

    Raises:
        ValueError: not a pair, or two masks.
    """
    if isinstance(mask, (list, tuple)):  # Keras answers nested inputs with nested masks
        mask = next((m for m in mask if m is not None), None)
    if not isinstance(inputs, (list, tuple)):
        return inputs, mask
    if len(inputs) != 2:
        raise ArgumentValueError(
            f"inputs must be a tensor or a pair (x, mask); got {len(inputs)} inputs."
        )
    x, paired = inputs
    other = get_mask(x) if mask is None else mask
    if paired is not None and other is not None:
        raise ArgumentValueError(
            "a mask must come once; got one in the pair (x, mask) and another one as "
            "mask=, or attached to x by an earlier layer. Leave one out."
        )
    return x, other if paired is None else paired


def is_pair_of_shapes(shape: Any) -> bool:
    """True for the shapes of a pair (x, mask)."""
    return (
        isinstance(shape, (list, tuple)) and len(shape) == 2 and isinstance(shape[0], (list, tuple))
    )


def find_axes(shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """The axis of x for each axis of a mask of this shape.

    Two kinds of masks go beyond S1: one of one dimension less than x may have sizes of 1, and one
    that Keras propagates has x's shape without its last axis, whichever axes are channels.

    Raises:
        ValueError: the shape is none of these.
    """
    x = layout.shape
    rows = tuple(a for a in range(len(x)) if a not in layout.channel_axes)
    if len(shape) == len(rows) and all(m in (1, x[a]) for m, a in zip(shape, rows, strict=True)):
        return rows
    if tuple(shape) == x[:-1]:
        return tuple(range(len(x) - 1))
    layout.mask_shape(tuple(shape))
    return tuple(range(len(x))) if len(shape) == len(x) else rows[: len(shape)]


def propagate_mask(mask: Any, x: Any, axes: tuple[int, ...]) -> Any:
    """A boolean mask of one dimension less than x for the layers behind, or None."""
    rank, found = len(x.shape), len(mask.shape)
    if found == rank and len(axes) == 1 and mask.shape[axes[0]] == 1:
        mask = keras.ops.squeeze(mask, axes[0])
    elif 0 < found < rank - 1 and len(axes) == 1:
        sizes = keras.ops.shape(x)
        rows = [sizes[a] for a in range(rank) if a not in axes]
        mask = keras.ops.reshape(mask, (*rows[:found], *(1,) * (len(rows) - found)))
        mask = keras.ops.broadcast_to(mask, rows)
    elif found != rank - 1:
        return None
    if keras.backend.standardize_dtype(mask.dtype) == "bool":
        return mask
    return keras.ops.not_equal(mask, 0)
