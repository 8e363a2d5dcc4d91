"""Checks of what comes into the JAX front end, made while it is traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchnorm.core.errors import ArgumentTypeError
from batchnorm.core.layout import Layout, check_mask_values, check_per_channel

FLOATING = ("float16", "bfloat16", "float32", "float64")


def check_input(x: Any) -> Array:
    """`x` as an array of a type that can be normalized."""
    array = jnp.asarray(x)
    if array.dtype.name not in FLOATING:
        raise ArgumentTypeError(
            f"x must be float16, bfloat16, float32 or float64; got {array.dtype}. Cast it first."
        )
    return array


def check_mask(mask: Any) -> Array | None:
    """`mask` as a boolean or integer array, or None."""
    if mask is None:
        return None
    values = mask if hasattr(mask, "dtype") else np.asarray(mask)
    if values.dtype == np.bool_:
        return jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ArgumentTypeError(
            f"mask must be boolean or integer, 1 for real rows; got {values.dtype}. "
            "Compare it, for instance mask != 0."
        )
    known = read_values(values)
    if known is not None:  # before a conversion can cut 64 bits to 32
        check_mask_values(known)
    return jnp.asarray(values)


def read_values(a: Any) -> np.ndarray | None:
    """The values of an array where no device but the CPU has to be asked for them, or None."""
    if isinstance(a, jax.core.Tracer):
        return None
    if isinstance(a, Array):
        near = a.is_fully_addressable and all(d.platform == "cpu" for d in a.devices())
        return np.asarray(a) if near else None
    return np.asarray(a)


def check_channels(name: str, value: Any, layout: Layout, dtype: Any) -> Array | None:
    """A per-channel array in the working type, or None."""
    if value is None:
        return None
    array = jnp.asarray(value)
    if array.dtype.name not in FLOATING:
        raise ArgumentTypeError(f"{name} must be floating; got {array.dtype}. Cast it first.")
    check_per_channel(name, array, layout)
    return array.astype(dtype)


def working_type(x: Array) -> Any:
    """The type of statistics and arithmetic for x (S16)."""
    return wide_type(x.dtype)


def wide_type(*dtypes: Any) -> Any:
    """float64 if one of them is, else float32; jax's own promotion may be set to refuse."""
    return jnp.dtype(jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32)


def split_axes(x: Array) -> tuple[Any, ...]:
    """For each axis of x the mesh axes it is split over, where types tell; else nothing."""
    return tuple(getattr(getattr(jax.typeof(x), "sharding", None), "spec", ()))
