"""Masks out of lengths."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, export

from batchnorm.core import config
from batchnorm.core.errors import ArgumentTypeError, names_errors
from batchnorm.core.layout import check_length_values
from batchnorm.jax.checks import read_values

__all__ = ["sequence_mask"]


@names_errors("sequence_mask")
def sequence_mask(lengths: Any, size: int) -> Array:
    """Mark the first `lengths` of `size` positions, as masks of samples padded at the end do.

    Args:
        lengths: of any integer type and any shape `(...)`, each between 0 and `size`; `(N,)` for
            a batch of sequences.
        size: number of positions, at least 0.

    Returns:
        bool of shape `(..., size)`, True at positions below the length.

    Raises:
        TypeError: lengths that are no integers, or a size that is no int.
        ValueError: a negative size; a length that is not between 0 and `size`, where values can
            be read at once: traced or on an accelerator such lengths count as 0 or `size`.

    Source: S1.

    >>> sequence_mask(jnp.array([1, 3]), 3).astype(int).tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    if not export.is_symbolic_dim(size):
        size = config.check_size(size)
    lengths = lengths if hasattr(lengths, "dtype") else np.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ArgumentTypeError(
            f"lengths must be integers; got {lengths.dtype}. Count them, for instance "
            "mask.sum(-1), or cast them first."
        )
    known = read_values(lengths)
    if known is not None and isinstance(size, int):  # before 64 bits are cut to 32
        check_length_values(known, size)
    array = jnp.asarray(lengths)
    if jnp.iinfo(array.dtype).max > jnp.iinfo(jnp.int32).max:  # no position is as far away
        array = jnp.minimum(array, jnp.asarray(jnp.iinfo(jnp.int32).max, array.dtype))
    positions = jnp.arange(size, dtype=jnp.int32)
    return positions < jnp.expand_dims(array.astype(jnp.int32), -1)
