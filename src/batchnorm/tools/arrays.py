"""Arrays of any framework, in NumPy's types."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchnorm.tools.state import FloatArray

_WIDE = ("float32", "float64")


def flatten(a: Any) -> FloatArray | None:
    """A copy of `a` of rank 1, in C order; half types as float32. None stays None."""
    if a is None:
        return None
    array = np.asarray(a)
    wide = array.dtype if array.dtype.name in _WIDE else np.float32
    return np.array(array, wide, order="C").reshape(-1)


def odd_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """`BatchNormState.shape`: the shape, unless it is (C,)."""
    return None if len(shape) == 1 else tuple(int(n) for n in shape)


def complement(weight: float) -> float:
    """1 - weight without the rounding error of the subtraction: 0.1 for 0.9.

    Subtracting the result from 1 gives `weight` again, to the bit.
    """
    typed = round(1.0 - weight, 12)
    return typed if 1.0 - typed == weight else 1.0 - weight
