"""Arrays of JAX and NumPy in a tree, and nnx's variables around them."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray


def is_array(leaf: Any) -> bool:
    """True for a leaf with a type and a shape."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def is_seed(leaf: Any) -> bool:
    """True for a key of random numbers, and for nnx's keys and their counts."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(leaf, nnx.RngState):
        return True
    return bool(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def type_of(leaf: Any) -> str:
    """The name of its type, like "float32"."""
    return str(leaf.dtype) if is_seed(leaf) else str(np.dtype(leaf.dtype).name)


def read(leaf: Any) -> NDArray[Any]:
    """The values; half types as float32."""
    array = np.asarray(leaf[...] if _is_variable(leaf) else leaf)
    return array.astype(np.float32) if array.dtype.name in ("bfloat16", "float16") else array


def copy(leaf: Any) -> Any:
    """The same leaf, or a copy of one that can be changed in place."""
    return leaf.copy() if isinstance(leaf, np.ndarray) or _is_variable(leaf) else leaf


def make(values: Any, like: Any) -> Any:
    """Values as a leaf of the type and shape of another."""
    if isinstance(like, np.ndarray):  # float64 stays, which JAX may not have
        with np.errstate(over="ignore"):
            return np.asarray(values).astype(like.dtype).reshape(like.shape)
    new = jnp.asarray(values, like.dtype).reshape(like.shape)
    return like.replace(new) if _is_variable(like) else new


def _is_variable(leaf: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(leaf, nnx.Variable)
