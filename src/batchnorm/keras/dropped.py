"""Masks that Keras has propagated and an operation before a batch norm has dropped."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import keras

from batchnorm.keras.private import find_maker, get_mask, list_calls, list_children

_REMEDY = (
    "Padding counts as data there. Put batchnorm.keras.Remask before the batch norm, pass mask= "
    "to it, or run the model inside batchnorm.keras.padding_mask."
)
# Keras drops the mask of a merged tensor where one of the inputs has none.
_MERGES = (
    keras.layers.Add,
    keras.layers.Average,
    keras.layers.Concatenate,
    keras.layers.Maximum,
    keras.layers.Minimum,
    keras.layers.Multiply,
    keras.layers.Subtract,
)


class Search(NamedTuple):
    """Operations before a tensor: those that dropped a mask, and those that may have."""

    droppers: list[Any]
    unknown: list[Any]


def warn_dropped(layer: Any, x: Any) -> None:
    """Warn while a functional model is built: x comes without a mask that an operation dropped."""
    if not isinstance(x, keras.KerasTensor) or get_mask(x) is not None:
        return
    droppers = find_droppers(x, count_rows(layer, x)).droppers
    if droppers:
        # As seen from `__call__`, which is decorated.
        warnings.warn(
            f"{type(layer).__name__}: layer {layer.name!r} gets no mask, since "
            f"{_describe(droppers)} does not pass it on. {_REMEDY}",
            stacklevel=4,
        )


def warn_converted(named: Iterable[tuple[str, Any]]) -> None:
    """Warn of converted layers whose functional models drop the mask before them."""
    found = []
    for name, layer in named:
        droppers = [op for x in unmasked_inputs(layer) for op in find_layer_droppers(layer, x)]
        if droppers:
            found.append(f"{name!r} gets no mask, since {_describe(droppers)} does not pass it on")
    if found:
        warnings.warn(f"convert_batchnorm: {'; '.join(found)}. {_REMEDY}", stacklevel=4)


def find_layer_droppers(layer: Any, x: Any) -> list[Any]:
    """The operations that dropped the mask of a batch norm's input."""
    return find_droppers(x, count_rows(layer, x)).droppers


def unmasked_inputs(layer: Any, start: int = 0) -> list[Any]:
    """The symbolic inputs without a mask in a batch norm's calls, from the call `start` on."""
    found = []
    for node in list_calls(layer)[start:]:
        x, mask = node.input_tensors[0], node.arguments.kwargs.get("mask")
        if mask is None and len(node.arguments.args) > 1:
            mask = next((a for a in node.arguments.args[1:] if _is_mask(a)), None)
        if mask is None and get_mask(x) is None:
            found.append(x)
    return found


def count_rows(layer: Any, x: Any) -> int:
    """The number of axes of x that a batch norm reduces."""
    return len(x.shape) - (1 if isinstance(layer.axis, int) else len(layer.axis))


def find_droppers(x: Any, rows: int, origins: Mapping[int, Any] | None = None) -> Search:
    """The operations before x, an unmasked symbolic tensor, that got a mask and gave none.

    What leaves a tensor with fewer row axes than the mask has, such as pooling over all
    positions, or ends a mask by its own rule, such as the last state of an LSTM, drops nothing.

    Args:
        x: symbolic.
        rows: number of row axes of the layer behind x.
        origins: of tensors that a composite layer gave, by id: those that it computed.
    """
    search, blamed = Search([], []), []
    limits: dict[int, int] = {}
    seen: list[Any] = []
    masks, waiting = False, [(x, rows)]
    while waiting:
        tensor, limit = waiting.pop()
        while origins and id(tensor) in origins:
            tensor = origins[id(tensor)]
        limit = min(limit, len(tensor.shape) - 1)
        known = getattr(tensor, "_batchnorm_never_masked", False)
        if known or limits.get(id(tensor), -1) >= limit:
            continue
        limits[id(tensor)] = limit
        seen.append(tensor)
        operation, inputs = _made_by(tensor)
        masked = [a for a in inputs if get_mask(a) is not None]
        bare = [a for a in inputs if get_mask(a) is None]
        masks = masks or bool(masked)
        if not any(len(get_mask(a).shape) <= limit for a in masked):
            waiting += [(a, limit) for a in bare]
        elif getattr(operation, "supports_masking", False):
            if bare and isinstance(operation, _MERGES):
                blamed.append(operation)
                waiting += [(a, limit) for a in bare]
        else:
            kind = search.unknown if is_composite(operation) else search.droppers
            kind.append(operation)
    if not search.droppers:
        search.droppers.extend(blamed)
    if not masks and not search.unknown:
        for tensor in seen:  # so that the search of a deep model is linear
            tensor._batchnorm_never_masked = True
    return search


def is_composite(operation: Any) -> bool:
    """True for a model, or a layer with layers of its own, which are not Keras's own wrappers.

    While a model is built, Keras does not look inside; when it runs, masks travel through.
    """
    if not isinstance(operation, keras.layers.Layer) or not list_children(operation):
        return False
    return getattr(keras.layers, type(operation).__name__, None) is not type(operation)


def _made_by(tensor: Any) -> tuple[Any, list[Any]]:
    """The operation that gave a tensor, and its inputs that may be data."""
    history = find_maker(tensor)
    if history is None or history.operation is None:
        return None, []
    nodes = list_calls(history.operation)
    if history.node_index >= len(nodes):  # of a call that is forgotten
        return None, []
    node = nodes[history.node_index]
    return history.operation, [a for a in node.input_tensors if not _is_mask(a)]


def _is_mask(a: Any) -> bool:
    """True for symbolic tensors that are no data: masks, tokens, lengths."""
    return isinstance(a, keras.KerasTensor) and not keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(a.dtype)
    )


def _describe(operations: list[Any]) -> str:
    every = dict.fromkeys(f"{op.name!r} ({type(op).__name__})" for op in operations)
    return " or ".join(every)
