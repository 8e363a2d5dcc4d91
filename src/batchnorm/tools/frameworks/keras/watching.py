"""Keras's batch normalization, and this library's, watched through their `call`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np

from batchnorm.core.errors import naming
from batchnorm.core.layout import make_layout, normalize_axis
from batchnorm.core.moments import Moments
from batchnorm.keras.layers import BatchNormalization
from batchnorm.keras.masking import find_mask
from batchnorm.keras.masks import find_axes, split_pair
from batchnorm.keras.private import get_mask
from batchnorm.tools.frameworks.records import FoundLayer, Observation
from batchnorm.tools.measure import measure


@contextmanager
def watch(layers: Sequence[FoundLayer], see: Callable[[Observation], None]) -> Iterator[None]:
    """As `Adapter.watch`."""

    def watched(found: FoundLayer) -> Callable[[Any], None]:
        return lambda given: see(_observation(found, given))

    with ExitStack() as stack:
        for found in layers:
            stack.enter_context(intercept(found.layer, watched(found)))
        yield


@contextmanager
def intercept(layer: Any, before: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Show `before` the arguments of each call of a layer, by name; it may change them."""
    original = layer.call
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        before(given.arguments)
        return original(*given.args, **given.kwargs)

    with replace_call(layer, call):
        yield


@contextmanager
def replace_call(layer: Any, call: Any) -> Iterator[None]:
    """Put a function in the place of a layer's `call`."""
    # Not by setattr: Keras would track the function, and refuse to change a built layer.
    own = layer.__dict__.get("call")
    layer.__dict__["call"] = call
    try:
        yield
    finally:
        del layer.__dict__["call"]
        if own is not None:
            layer.__dict__["call"] = own


def _observation(found: FoundLayer, given: dict[str, Any]) -> Observation:
    with naming(type(found.layer).__name__):
        x, mask = split_pair(given["inputs"], given.get("mask"))
    if is_traced(x):
        raise ValueError(
            f"observe: layer {found.name!r} must run eagerly to be watched; it ran in a compiled "
            "function. Call the model itself, not predict(), evaluate() or a tf.function."
        )
    axis = found.layer.axis
    with naming(type(found.layer).__name__):
        axes = normalize_axis(axis if isinstance(axis, int) else tuple(axis), len(x.shape))
        if isinstance(found.layer, BatchNormalization):
            mask = get_mask(x) if mask is None else mask
            mask = find_mask(found.layer, x, axes, mask).mask
        along = () if mask is None else find_axes(tuple(mask.shape), make_layout(x.shape, axes))
    if mask is not None:
        sizes = [1] * len(x.shape)
        for a, size in zip(along, mask.shape, strict=True):
            sizes[a] = size
        mask = keras.ops.reshape(keras.ops.not_equal(mask, 0), sizes)
    return Observation(found, x, mask, axes, _measure)


def is_traced(x: Any) -> bool:
    """True for a tensor that has no values yet."""
    if isinstance(x, keras.KerasTensor):
        return True
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return isinstance(x, jax.core.Tracer)
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    return False


def _measure(x: Any, mask: Any, axes: tuple[int, ...]) -> Moments:
    if keras.backend.standardize_dtype(x.dtype) == "bfloat16":
        x = keras.ops.cast(x, "float32")  # not every backend hands it to NumPy
    real = None if mask is None else np.asarray(keras.ops.convert_to_numpy(mask))
    return measure(np.asarray(keras.ops.convert_to_numpy(x)), real, axes)
