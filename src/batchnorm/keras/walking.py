"""The layers inside a model, with their names."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import keras

from batchnorm.keras.private import list_children


def walk_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """A model and the layers inside, each once, with the path of names below the model."""
    return _walk(model, "", set())


def _walk(layer: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    yield path, layer
    # A Sequential model holds its layers, and a functional model of the same ones.
    for child in getattr(layer, "layers", None) or []:
        yield from _walk(child, f"{path}/{child.name}" if path else child.name, seen)
    for child in list_children(layer):
        yield from _walk(child, f"{path}/{child.name}" if path else child.name, seen)


def is_functional(model: Any) -> bool:
    """True for functional models, which know their graph."""
    return isinstance(model, functional_class())


@lru_cache(maxsize=1)
def functional_class() -> Any:
    """The class of functional models, which has no public name."""
    inputs = keras.Input((1,), name="batchnorm_input")
    return type(keras.Model(inputs, inputs, name="batchnorm_model"))
