"""Keras's batch normalization, and this library's, which are subclasses of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from batchnorm.core.running import LONG_RUNNING
from batchnorm.keras.private import list_children
from batchnorm.tools.arrays import flatten, odd_shape
from batchnorm.tools.fitting import check_finite_casts, fit
from batchnorm.tools.state import BatchNormState, RenormState

_NAMES = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "var": "moving_variance"}
_RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")


def owns(model: Any) -> bool:
    """True for a Keras layer or model."""
    return isinstance(model, keras.layers.Layer)


def is_batch_norm(layer: Any) -> bool:
    """True for a layer that `take_state` reads."""
    return isinstance(layer, keras.layers.BatchNormalization)


def find(model: Any) -> list[tuple[str, Any]]:
    """Names and batch norms, each once, in the order of definition.

    A name is the path of layer names below the model, like `block/bn`.
    """
    return _number(pair for pair in _walk(model, "", set()) if is_batch_norm(pair[1]))


def named_layers(model: Any) -> list[tuple[str, Any]]:
    """As `find`, but all layers of whatever kind; the model first, with an empty name."""
    return _number(_walk(model, "", set()))


def _number(layers: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The layers, each with a name of its own."""
    found: list[tuple[str, Any]] = []
    taken: set[str] = set()
    for path, layer in layers:
        name, copies = path, 1
        while name in taken:  # Keras lets siblings share a name outside of functional models
            copies += 1
            name = f"{path}_{copies}"
        taken.add(name)
        found.append((name, layer))
    return found


def take_state(layer: Any, name: str = "") -> BatchNormState:
    """The layer's state, copied."""
    if not layer.built:
        raise ValueError(
            f"layer {name!r} ({_kind(layer)}) has no weights yet; build the model, or call it once."
        )
    mean = read_variable(layer.moving_mean)
    renorm = None
    if getattr(layer, "renorm", False):
        renorm = RenormState(*(flatten(read_variable(getattr(layer, n))) for n in _RENORM))  # type: ignore[arg-type]
    return BatchNormState(
        name=name,
        kind=_kind(layer),
        mean=flatten(mean),
        var=flatten(read_variable(layer.moving_variance)),
        gamma=flatten(read_variable(layer.gamma)),
        beta=flatten(read_variable(layer.beta)),
        variance="biased",
        eps=float(layer.epsilon),
        decay=float(layer.momentum),
        steps=_count_steps(layer),
        renorm=renorm,
        shape=odd_shape(mean.shape),
        stored=keras.backend.standardize_dtype(layer.moving_mean.dtype),
    )


def put_state(layer: Any, state: BatchNormState) -> None:
    """Write the state into the layer, in place, after checking all of it."""
    current = take_state(layer, state.name)
    state = fit(state, current)
    pairs = [(name, getattr(layer, ours), getattr(state, name)) for name, ours in _NAMES.items()]
    if state.renorm is not None:
        kept = (state.renorm.moving_stddev, state.renorm.renorm_mean, state.renorm.renorm_stddev)
        pairs += [(n, getattr(layer, n), a) for n, a in zip(_RENORM, kept, strict=True)]
    if current.steps is not None:
        steps = LONG_RUNNING if state.steps is None else min(state.steps, LONG_RUNNING)
        pairs.append(("steps", layer.steps, np.asarray(steps)))
    writes = [
        (name, variable, array, keras.ops.convert_to_tensor(array, dtype=variable.dtype))
        for name, variable, array in pairs
        if variable is not None and array is not None
    ]
    owner = f"layer {state.name!r} ({current.kind})"
    check_finite_casts(
        owner,
        [(n, a, keras.ops.convert_to_numpy(keras.ops.cast(c, "float32"))) for n, _, a, c in writes],
    )
    for _, variable, _, cast in writes:
        variable.assign(cast)
    _put_options(layer, state)


def _count_steps(layer: Any) -> int | None:
    """The number of steps that a layer with `debias` has counted; others do not count."""
    steps = getattr(layer, "steps", None)
    return None if steps is None else int(read_variable(steps))


def _put_options(layer: Any, state: BatchNormState) -> None:
    """Set eps and momentum; a compiled model uses the old ones until it is compiled again."""
    if state.eps is not None:
        layer.epsilon = state.eps
    if state.decay is not None:
        layer.momentum = state.decay
    if hasattr(layer, "_read_options"):  # this library's layers compute by what they have read
        layer._read_options()


def _walk(layer: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield path, layer
    for child in list_children(layer):
        yield from _walk(child, f"{path}/{child.name}" if path else child.name, seen)


def read_variable(variable: Any) -> Any:
    """Its values in NumPy, half types as float32; None for None."""
    if variable is None:
        return None
    value = keras.ops.convert_to_tensor(variable)
    if keras.backend.standardize_dtype(value.dtype) in ("float16", "bfloat16"):
        value = keras.ops.cast(value, "float32")
    return np.array(keras.ops.convert_to_numpy(value))


def _kind(layer: Any) -> str:
    cls = type(layer)
    if cls.__module__.startswith("keras."):
        return f"keras.{cls.__name__}"
    module = cls.__module__.removesuffix(".layers").removesuffix(".masked")
    return f"{module}.{cls.__name__}"
