"""What comes into the JAX front end, checked while it is traced."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from batchnorm.core.layout import Layout, check_per_channel

FLOATING = ("float16", "bfloat16", "float32", "float64")


def check_input(owner: str, x: Any) -> Array:
    """`x` as an array of a type that can be normalized."""
    array = jnp.asarray(x)
    if array.dtype.name not in FLOATING:
        raise TypeError(
            f"{owner}: x must be float16, bfloat16, float32 or float64; got {array.dtype}. "
            "Cast it first."
        )
    return array


def check_mask(owner: str, mask: Any) -> Array | None:
    """`mask` as a boolean or integer array, or None."""
    if mask is None:
        return None
    array = jnp.asarray(mask)
    if array.dtype != jnp.bool_ and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{owner}: mask must be boolean or integer, non-zero for real rows; got "
            f"{array.dtype}. Compare it, for instance mask != 0."
        )
    return array


def check_channels(owner: str, name: str, value: Any, layout: Layout, dtype: Any) -> Array | None:
    """A per-channel array in the working type, or None."""
    if value is None:
        return None
    array = jnp.asarray(value)
    if array.dtype.name not in FLOATING:
        raise TypeError(f"{owner}: {name} must be floating; got {array.dtype}. Cast it first.")
    check_per_channel(owner, name, array, layout)
    return array.astype(dtype)


def working_type(x: Array) -> Any:
    """The type of statistics and arithmetic for x (S16)."""
    return x.dtype if x.dtype == jnp.float64 else jnp.dtype(jnp.float32)
