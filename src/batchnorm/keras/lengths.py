"""Masks out of lengths."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from batchnorm.core import config
from batchnorm.core.errors import ArgumentTypeError, names_errors
from batchnorm.core.layout import check_length_values
from batchnorm.keras.functional import BACKEND

__all__ = ["sequence_mask"]


@names_errors("sequence_mask")
def sequence_mask(lengths: Any, size: int) -> Any:
    """Mark the first `lengths` of `size` positions, as masks of samples padded at the end do.

    Args:
        lengths: of any integer type and any shape `(...)`, each between 0 and `size`; `(N,)` for
            a batch of sequences. An input of a functional model will do.
        size: number of positions, at least 0.

    Returns:
        bool of shape `(..., size)`, True at positions below the length.

    Raises:
        TypeError: lengths that are no integers, or a size that is no int.
        ValueError: a negative size; a length that is not between 0 and `size`, where values can
            be read at once: not in traced code, nor on an accelerator.

    Source: S1.

    >>> mask = sequence_mask(keras.ops.array([1, 3]), 3)
    >>> np.asarray(keras.ops.cast(mask, "int32")).tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    size = config.check_size(size)
    lengths = lengths if hasattr(lengths, "dtype") else np.asarray(lengths)
    dtype = keras.backend.standardize_dtype(lengths.dtype)
    if not keras.backend.is_int_dtype(dtype):
        raise ArgumentTypeError(
            f"lengths must be integers; got {dtype}. Count them, for instance "
            'keras.ops.sum(keras.ops.cast(mask, "int32"), -1), or cast them first.'
        )
    known = _read(lengths)
    if known is not None:
        check_length_values(known, size)
        lengths = known.astype("int32")
    # JAX has 64 bits only where it is told so.
    wide = dtype in ("uint32", "int64", "uint64") and keras.backend.backend() != "jax"
    wide = wide and known is None
    position = keras.ops.arange(size, dtype="int64" if wide else "int32")
    length = keras.ops.cast(lengths, "int64" if wide else "int32")
    return keras.ops.less(position, keras.ops.expand_dims(length, -1))


def _read(lengths: Any) -> np.ndarray | None:
    if isinstance(lengths, keras.KerasTensor):
        return None
    return lengths if isinstance(lengths, np.ndarray) else BACKEND.read_values(lengths)
