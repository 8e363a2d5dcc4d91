"""jax.numpy as the core's `xp`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from batchnorm.core.namespace import Namespace


class _JaxNamespace:
    """The functions that `batchnorm.core.namespace.Namespace` lists."""

    abs = staticmethod(jnp.abs)
    sqrt = staticmethod(jnp.sqrt)
    square = staticmethod(jnp.square)
    log = staticmethod(jnp.log)
    expm1 = staticmethod(jnp.expm1)
    isfinite = staticmethod(jnp.isfinite)
    where = staticmethod(jnp.where)
    reshape = staticmethod(jnp.reshape)
    zeros_like = staticmethod(jnp.zeros_like)
    ones_like = staticmethod(jnp.ones_like)
    stop_gradient = staticmethod(lax.stop_gradient)

    @staticmethod
    def sum(a: Array, *, axis: Sequence[int], keepdims: bool) -> Array:
        return jnp.sum(a, axis=tuple(axis), keepdims=keepdims)

    @staticmethod
    def max(a: Array, *, axis: int) -> Array:
        return jnp.max(a, axis=axis)

    @staticmethod
    def broadcast_like(a: Array, x: Array) -> Array:
        return a  # operators broadcast, and their gradients sum

    @staticmethod
    def materialize(a: Array) -> Array:
        return a

    @staticmethod
    def cast(a: Any, dtype: Any) -> Array:
        return jax.numpy.asarray(a).astype(dtype)


XP = cast(Namespace, _JaxNamespace)
