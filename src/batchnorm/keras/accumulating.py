"""Several passes as one step of the statistics."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import keras

from batchnorm.core.conversion import describe_foreign
from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.keras.functional import BACKEND
from batchnorm.keras.layers import BatchNormalization
from batchnorm.keras.ledger import Ledger, is_pooled, merge, slots
from batchnorm.keras.moving import find_rule, open_block
from batchnorm.keras.walking import walk_layers

__all__ = ["accumulate_statistics"]

_OWNER = "accumulate_statistics"
_lock = threading.Lock()
_collecting: WeakSet[Any] = WeakSet()


@contextmanager
def accumulate_statistics(model: keras.layers.Layer) -> Iterator[None]:
    """Count all training passes of `model` inside the `with` block as one step (S21).

    Each pass is normalized by its own moments. At the end of the block the moving statistics move
    once, by the moments of all passes together, as if their real rows had been one batch; with
    ghost batches by the average of all groups that are not empty. Passes without real rows
    contribute nothing. After an exception nothing moves. Of each layer the moments are held, which
    takes as much memory as its statistics.

    Args:
        model: a layer of this library, or a model or layer that holds some.

    On TensorFlow the block may stand around compiled functions, or inside of one. Models that were
    compiled before are compiled once more when the first block is opened around them. On torch the
    passes are eager.

    Raises:
        TypeError: not a model or layer.
        ValueError: a model without layers of this library; a layer that is inside another such
            block; the JAX backend; from a layer: several replicas or ranks.
        RuntimeError: a `tf.function` that was compiled before the first block around the model; a
            pass in a loop or branch of the graph in which the block was opened.

    Warns:
        UserWarning: Keras's own batch normalization layers inside, which move at each pass.

    Source: S21; Chan, Golub and LeVeque 1983, equation 2.1b.

    >>> import keras
    >>> from batchnorm.keras import BatchNormalization
    >>> layer = BatchNormalization(momentum=0.0)
    >>> if keras.backend.backend() != "jax":
    ...     with accumulate_statistics(layer):
    ...         for batch in [[1.0], [3.0]], [[5.0], [7.0]]:
    ...             y = layer(keras.ops.array(batch), training=True)
    ...     assert float(keras.ops.convert_to_numpy(layer.moving_mean)[0]) == 4.0
    """
    layers = _find_layers(model)
    trace = BACKEND.find_trace()
    _claim(layers)
    try:
        opened = zip(layers, _open_slots(model, layers, trace), strict=True)
        ledgers = {a: Ledger(a, trace, slot) for a, slot in opened}
        with open_block(_OWNER, ledgers):
            yield
        # All of them first: one that fails leaves the others as they were.
        moved = [(a, ledger.close()) for a, ledger in ledgers.items()]
        for layer, running in moved:
            if running is not None:
                rule = find_rule(layer, collects=False)
                layer._store_if(rule.moves, running, layer._running())
    finally:
        with _lock:
            _collecting.difference_update(layers)


@names_errors(_OWNER)
def _find_layers(model: Any) -> list[Any]:
    """The layers of this library inside a model."""
    if not BACKEND.ACCUMULATES:
        raise ArgumentValueError(
            "the JAX backend has no place for moments between stateless calls. Use "
            "batchnorm.jax there: merge_moments(parts) of the moments that batch_norm returns, "
            "and update_running."
        )
    if not isinstance(model, keras.layers.Layer):
        raise ArgumentTypeError(f"model must be a Keras model or layer; got {model!r}.")
    found = dict(walk_layers(model))
    layers = [a for a in found.values() if isinstance(a, BatchNormalization)]
    if not layers:
        raise ArgumentValueError(
            f"model must hold layers of batchnorm.keras; got {model.name!r} without any. Call a "
            "model once that builds its layers late, or convert it with convert_batchnorm."
        )
    stock = [
        name
        for name, a in found.items()
        if isinstance(a, keras.layers.BatchNormalization) and not isinstance(a, BatchNormalization)
    ]
    if stock:
        warnings.warn(
            f"{_OWNER}: {describe_foreign(stock, 'Keras')}",
            stacklevel=5,
        )
    return layers


@names_errors(_OWNER)
def _claim(layers: list[Any]) -> None:
    """Mark layers as inside a block, or raise if one is already."""
    with _lock:
        taken = next((a for a in layers if a in _collecting), None)
        if taken is not None:
            raise ArgumentValueError(
                f"layer {taken.name!r} is inside another accumulate_statistics block. Open one "
                "block around all passes."
            )
        _collecting.update(layers)


def _open_slots(model: Any, layers: list[Any], trace: Any) -> list[Any]:
    """The layers' collections of passes of compiled functions, emptied; None without graphs."""
    if BACKEND.RETRACES or trace is not None:
        return [None] * len(layers)
    new = [a for a in layers if a not in slots]
    slots.update((a, BACKEND.Slot(partial(merge, is_pooled(a)))) for a in new)
    if new:
        _compile_again(model)
    for layer in layers:
        slots[layer].take()
        if layer.built:
            wide = layer.compute_dtype == "float64"
            slots[layer].hold((1, *layer._channels), "float64" if wide else "float32")
    return [slots[a] for a in layers]


def _compile_again(model: Any) -> None:
    """Let compiled models trace training steps that collect."""
    for _, layer in walk_layers(model):
        if isinstance(layer, keras.Model) and layer.train_function is not None:
            layer.make_train_function(force=True)
