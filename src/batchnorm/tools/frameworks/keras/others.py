"""Copies of Keras models, and their weights that belong to no batch norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
from numpy.typing import NDArray

from batchnorm.tools.frameworks.keras import states
from batchnorm.tools.frameworks.records import OtherArray


def copy_model(model: Any) -> Any:
    """A model or layer of the same config and weights, not compiled."""
    kind, layers = type(model).__name__, _layers_of(model)
    classes = {type(layer).__name__: type(layer) for layer in layers}
    try:
        # clone_model would give the inputs other names.
        with keras.saving.custom_object_scope(classes):
            new = type(model).from_config(model.get_config())
        if not new.built:
            new.build_from_config(model.get_build_config())
        new.set_weights(model.get_weights())
    except (NotImplementedError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{model.name!r} ({kind}) cannot be copied, since Keras cannot make it again from its "
            f"config: {reason:.200}. Give the class get_config and from_config."
        ) from error
    for old, copied in zip(layers, _layers_of(new), strict=True):
        copied.trainable = old.trainable
    return new


def find_others(model: Any) -> list[OtherArray]:
    """Weights, each once, in the order of the model."""
    taken = {id(weight) for _, layer in states.find(model) for weight in layer.weights}
    return [
        OtherArray(weight.path, partial(states.read_variable, weight), partial(_write, weight))
        for weight in model.weights
        if id(weight) not in taken
    ]


def _layers_of(model: Any) -> list[Any]:
    return [layer for _, layer in states.named_layers(model)]


def _write(weight: Any, values: NDArray[Any]) -> None:
    weight.assign(keras.ops.convert_to_tensor(values, dtype=weight.dtype))
