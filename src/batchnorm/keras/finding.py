"""Looking for batch norms that get no mask, inside all parts of a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import keras

from batchnorm.core.errors import (
    ArgumentRuntimeError,
    ArgumentTypeError,
    ArgumentValueError,
    names_errors,
)
from batchnorm.keras.dropped import count_rows, find_droppers, is_composite, unmasked_inputs
from batchnorm.keras.private import (
    attach_mask,
    get_mask,
    list_calls,
    shows_graph,
    unchanged_graph,
)
from batchnorm.keras.walking import is_functional, walk_layers

__all__ = ["DroppedMask", "find_dropped_masks"]


class DroppedMask(NamedTuple):
    """A batch norm that gets no mask although one was on its way.

    Attributes:
        norm: its path of names in the model.
        by: the path of the layer before it that does not pass the mask on, or the name of an
            operation.
    """

    norm: str
    by: str


@names_errors("find_dropped_masks")
def find_dropped_masks(model: keras.layers.Layer, inputs: Any = None) -> list[DroppedMask]:
    """The batch norms in `model` whose mask a layer or operation before them drops.

    A mask starts at `Masking`, at `Embedding(mask_zero=True)`, at any layer that is called with
    one and passes it on, and at inputs that carry one. Only shapes are computed, and nothing in
    the model changes. Nested models and subclassed ones are looked into, as far as they consist
    of Keras layers and operations.

    Args:
        model: a built model. Its batch norms may be this library's or Keras's.
        inputs: arrays or symbolic tensors like those that the model is called with, of which
            shapes, types and masks count. A functional or sequential model knows them.

    Returns:
        One entry for each batch norm and each layer before it that drops its mask, in the order
        of calls. A layer that ends a mask by its own rule, such as the last state of an LSTM, or
        that leaves no positions, such as pooling over all of them, drops nothing.

    Raises:
        TypeError: not a Keras layer.
        ValueError: a model that is not built, that needs `inputs`, or that cannot be called on
            symbolic tensors.

    Warns:
        UserWarning: parts that cannot be looked into, with the reasons.

    Source: S1, S5.

    >>> inputs = keras.Input((None, 4))
    >>> x = keras.ops.tanh(keras.layers.Masking()(inputs))
    >>> model = keras.Model(inputs, keras.layers.BatchNormalization(name="norm")(x))
    >>> [found.norm for found in find_dropped_masks(model)]
    ['norm']
    """
    if not isinstance(model, keras.layers.Layer):
        raise ArgumentTypeError(f"model must be a Keras layer or model; got {type(model)}.")
    if not model.built:
        raise ArgumentValueError("the model is not built; build it first, or call it once.")
    if not shows_graph(model):
        raise ArgumentRuntimeError(
            f"Keras {keras.__version__} does not show which layer made a tensor. Keras's own "
            "warnings, while a model is built, name layers that drop a mask."
        )
    names = {id(layer): name for name, layer in walk_layers(model)}
    layers = [layer for _, layer in walk_layers(model)]
    norms = [a for a in layers if isinstance(a, keras.layers.BatchNormalization)]
    tensors = _make_inputs(model, inputs)
    found: list[DroppedMask] = []
    unseen: list[str] = []
    with unchanged_graph(_list_operations(layers)), _open_parts(model, layers) as parts:
        starts = [len(list_calls(norm)) for norm in norms]
        _run(model, tensors)
        for norm, start in zip(norms, starts, strict=True):
            for x in unmasked_inputs(norm, start):
                droppers = find_droppers(x, count_rows(norm, x), parts.origins).droppers
                found += [DroppedMask(names[id(norm)], names.get(id(a), a.name)) for a in droppers]
            if len(list_calls(norm)) == start:
                unseen.append(names[id(norm)])
    failures = {names[key]: text for key, text in parts.failures.items() if key in names}
    for name in unseen:
        if not any(name.startswith(f"{part}/") for part in failures):
            failures[name] = "it was not called on a symbolic tensor"
    if failures:
        listed = "; ".join(f"{name!r} ({text})" for name, text in failures.items())
        warnings.warn(f"find_dropped_masks: could not look into {listed}.", stacklevel=3)
    return list(dict.fromkeys(found))


class _Parts(NamedTuple):
    """Findings while composite layers were looked into.

    Attributes:
        origins: for tensors that a composite layer gave, by id, those that it computed.
        kept: tensors, so that ids stay theirs.
        failures: by id of a layer, the reason why it was not looked into.
    """

    origins: dict[int, Any]
    kept: list[Any]
    failures: dict[int, str]


@contextmanager
def _open_parts(model: Any, layers: list[Any]) -> Iterator[_Parts]:
    """Let the composite layers of a model run on symbolic tensors, rather than guess shapes."""
    parts = _Parts({}, [], {})
    opened = [a for a in layers if a is not model and is_composite(a)]
    for layer in opened:
        object.__setattr__(layer, "symbolic_call", _open(layer, parts))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras's own, of masks that layers drop
            yield parts
    finally:
        for layer in opened:
            object.__delattr__(layer, "symbolic_call")


def _open(layer: Any, parts: _Parts) -> Any:
    closed = layer.symbolic_call

    def symbolic_call(*args: Any, **kwargs: Any) -> Any:
        try:
            outputs = layer.call(*args, **kwargs)
        except Exception as error:
            parts.failures[id(layer)] = _shorten(error)
            return closed(*args, **kwargs)
        return keras.tree.map_structure(lambda a: _renew(a, parts), outputs)

    return symbolic_call


def _renew(a: Any, parts: _Parts) -> Any:
    """A tensor to which Keras may attach the composite layer as its origin."""
    if not isinstance(a, keras.KerasTensor):
        return a
    new = keras.KerasTensor(a.shape, a.dtype)
    if get_mask(a) is not None:
        new = attach_mask(new, get_mask(a))
    parts.origins[id(new)] = a
    parts.kept.extend((a, new))
    return new


def _run(model: Any, inputs: Any) -> Any:
    """The outputs for symbolic inputs, by the calls of the layers inside."""
    if not (is_functional(model) or isinstance(model, keras.Sequential)):
        return model.call(inputs)
    masks = [get_mask(a) for a in keras.tree.flatten(inputs)]
    return model.call(inputs, mask=masks if any(a is not None for a in masks) else None)


def _list_operations(layers: list[Any]) -> list[Any]:
    """Layers, and the operations of the functional models among them."""
    every = {id(a): a for a in layers}
    for layer in layers:
        every |= {id(a): a for a in getattr(layer, "operations", ())}
    return list(every.values())


def _make_inputs(model: Any, inputs: Any) -> Any:
    """Symbolic tensors like the inputs of a model."""
    if inputs is None:
        if is_functional(model):
            inputs = model.input
        elif isinstance(model, keras.Sequential):
            inputs = next(iter(getattr(model, "inputs", None) or ()), None)
    if inputs is None:
        raise ArgumentValueError(
            f"inputs must be given for a {type(model).__name__}, which does not know them; pass "
            "arrays or keras.KerasTensor of the shapes that the model takes."
        )
    return keras.tree.map_structure(_symbolic, inputs)


def _symbolic(a: Any) -> Any:
    if not hasattr(a, "shape") or not hasattr(a, "dtype"):
        return a
    new = keras.KerasTensor(tuple(a.shape), keras.backend.standardize_dtype(a.dtype))
    mask = get_mask(a)
    if mask is not None:
        new = attach_mask(new, keras.KerasTensor(tuple(mask.shape), "bool"))
    return new


def _shorten(error: Exception) -> str:
    """The first line of an error."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:200]
