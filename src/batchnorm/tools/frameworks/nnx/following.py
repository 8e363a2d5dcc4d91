"""Every layer of an nnx model, followed through the classes.

A transformation such as `nnx.jit` runs its layers on tracers, which have no values: what it
computes is part of the layer around it.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from batchnorm.tools.frameworks.adapter import Follower
from batchnorm.tools.frameworks.nnx.states import is_batch_norm, walk
from batchnorm.tools.frameworks.nnx.watching import replace_call
from batchnorm.tools.frameworks.records import Called, Values

_lock = threading.RLock()  # classes belong to all threads


@contextmanager
def follow(model: nnx.Module, follower: Follower, seed: int) -> Iterator[None]:
    """As `Following.follow`; a model of nnx keeps its random state itself."""
    layers = {
        id(module): (module, Called(name, type(module).__name__, is_batch_norm(module)))
        for name, module in walk(model)
    }
    running: set[int] = set()
    with _lock, ExitStack() as stack:
        for cls in {type(module) for module, _ in layers.values()}:
            if "__call__" in dir(cls):
                stack.enter_context(_patch(cls, layers, running, follower))
        yield


@contextmanager
def _patch(
    cls: Any, layers: dict[int, tuple[Any, Called]], running: set[int], follower: Follower
) -> Iterator[None]:
    """Subclasses that call their parent's method are seen once, by the outer one."""
    original = cls.__call__
    thread = threading.get_ident()

    @functools.wraps(original)
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        _, called = layers.get(id(layer), (None, None))
        if called is None or threading.get_ident() != thread or id(layer) in running:
            return original(layer, *args, **kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_leaf)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return original(layer, *args, **kwargs)
        running.add(id(layer))
        try:
            args, kwargs = jax.tree.unflatten(tree, follower.enter(called, leaves))
            result = original(layer, *args, **kwargs)
        finally:
            running.discard(id(layer))
        leaves, tree = jax.tree.flatten(result, is_leaf=_is_leaf)
        return jax.tree.unflatten(tree, follower.leave(called, leaves))

    with replace_call(cls, call):
        yield


def _is_leaf(node: Any) -> bool:
    return node is None or isinstance(node, nnx.Pytree)


def read(array: Any) -> Values | None:
    """As `Following.read`."""
    if not isinstance(array, (np.ndarray, jax.Array)) or isinstance(array, jax.core.Tracer):
        return None
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return None
    dtype, values = array.dtype.name, np.array(array)
    half = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return Values(values.astype(np.float32) if half else values, dtype)


def write(values: Any, like: Any) -> Any:
    """As `Following.write`."""
    if isinstance(like, np.ndarray):
        return np.asarray(values, like.dtype)
    return jax.device_put(jnp.asarray(values, like.dtype), like.sharding)


def run(model: Any, batch: Any, mask: Any) -> None:
    """As `Following.run`."""
    takes = "mask" in inspect.signature(type(model).__call__).parameters
    given = {"mask": mask} if takes else {}
    if isinstance(batch, dict):
        model(**{**given, **batch})
    else:
        model(batch, **given)
