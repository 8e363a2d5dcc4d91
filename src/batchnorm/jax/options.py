"""What the nnx layer demands of its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError
from batchnorm.jax.checks import FLOATING
from batchnorm.jax.synchronize import Groups


def check_features(
    num_features: Any, features_in: Any, axes: Sequence[int]
) -> int | tuple[int, ...] | None:
    """The size of each channel axis, or None where an input will tell."""
    if num_features is not None and features_in is not None:
        raise ArgumentValueError(
            f"features_in is an alias of num_features; got {num_features!r} and "
            f"{features_in!r}. Give one of them."
        )
    value = features_in if num_features is None else num_features
    if value is None:
        return None
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes):
        raise ArgumentTypeError(
            f"num_features must be an int of at least 0, or a tuple of them with several "
            f"axes; got {value!r}."
        )
    if len(sizes) != len(axes):
        raise ArgumentValueError(
            f"num_features must have one size for each channel axis; got {value!r} for "
            f"axis {tuple(axes) if len(axes) > 1 else axes[0]}."
        )
    return sizes if len(sizes) > 1 else sizes[0]


def check_dtype(name: str, value: Any) -> Any:
    """`value` as a floating dtype, or None."""
    if value is None:
        return None
    dtype = jnp.dtype(value)
    if dtype.name not in FLOATING:
        raise ArgumentTypeError(
            f"{name} must be float16, bfloat16, float32 or float64; got {value!r}."
        )
    return dtype


def freeze_groups(groups: Groups) -> tuple[tuple[int, ...], ...] | None:
    """Groups as a hashable value."""
    return None if groups is None else tuple(tuple(int(i) for i in group) for group in groups)


def make_keys(rngs: Any) -> Callable[[], Any]:
    """A source of keys: flax's stream of parameters, or splits of a key or seed."""
    if isinstance(rngs, nnx.Rngs):
        return rngs.params
    if isinstance(rngs, int):
        rngs = jax.random.key(rngs)
    return nnx.Rngs(rngs).params
