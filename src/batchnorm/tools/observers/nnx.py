"""flax nnx's batch norm, and this library's, watched through their class."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np

from batchnorm.core.layout import make_layout, normalize_axis
from batchnorm.core.moments import Moments
from batchnorm.tools.measure import measure
from batchnorm.tools.models import FoundLayer
from batchnorm.tools.observe import Observation

_lock = threading.RLock()  # classes belong to all threads


@contextmanager
def watch(layers: Sequence[FoundLayer], see: Callable[[Observation], None]) -> Iterator[None]:
    """As `observe`. Python looks `__call__` up in the class, so that is where it is watched."""
    wanted = {id(found.layer): found for found in layers}
    with _lock, ExitStack() as stack:
        # Subclasses that call their parent's method are seen once, by the outer one.
        running: set[int] = set()
        for cls in {type(found.layer) for found in layers}:
            stack.enter_context(_watch_class(cls, wanted, running, see))
        yield


@contextmanager
def _watch_class(
    cls: Any, wanted: dict[int, FoundLayer], running: set[int], see: Callable[[Observation], None]
) -> Iterator[None]:
    original, own = cls.__call__, cls.__dict__.get("__call__")
    thread = threading.get_ident()

    @functools.wraps(original)
    def call(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        found = wanted.get(id(layer))
        if threading.get_ident() == thread and isinstance(x, jax.core.Tracer):
            raise _not_eager(found)  # transformations make other objects of the same layers
        if found is None or id(layer) in running:
            return original(layer, x, *args, **kwargs)
        running.add(id(layer))
        try:
            see(_observation(found, x, kwargs.get("mask")))
            return original(layer, x, *args, **kwargs)
        finally:
            running.discard(id(layer))

    cls.__call__ = call
    try:
        yield
    finally:
        if own is None:
            del cls.__call__
        else:
            cls.__call__ = own


def _observation(found: FoundLayer, x: Any, mask: Any) -> Observation:
    x, owner = jax.numpy.asarray(x), type(found.layer).__name__
    axes = normalize_axis(owner, found.layer.axis, x.ndim)
    if mask is not None:
        mask = jax.numpy.asarray(mask) != 0
        mask = mask.reshape(make_layout(owner, x.shape, axes).mask_shape(mask.shape, owner))
    return Observation(found, x, mask, axes, _measure)


def _not_eager(found: FoundLayer | None) -> ValueError:
    which = "a batch norm" if found is None else f"layer {found.name!r}"
    return ValueError(
        f"observe: {which} must run eagerly to be watched; it ran under a JAX transformation "
        "such as jit, scan or remat. Call the model itself, without them."
    )


def _measure(x: Any, mask: Any, axes: tuple[int, ...]) -> Moments:
    return measure(np.asarray(x), None if mask is None else np.asarray(mask), axes)
