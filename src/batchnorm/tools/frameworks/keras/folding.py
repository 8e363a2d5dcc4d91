"""Folding of functional and sequential Keras models."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from batchnorm.keras.layers import BatchNormalization, SyncBatchNormalization
from batchnorm.keras.masked import MaskedBatchNormalization
from batchnorm.keras.private import record_graph
from batchnorm.keras.walking import functional_class, is_functional, walk_layers
from batchnorm.tools.frameworks.affine import Affine, affine_of, refuse_zeroing
from batchnorm.tools.frameworks.keras import linear_maps as maps
from batchnorm.tools.frameworks.keras.states import is_batch_norm, take_state
from batchnorm.tools.frameworks.records import Folded, FoldedModel, FoundLayer, Kept

_NORMS = (
    *(keras.layers.BatchNormalization, BatchNormalization),
    *(SyncBatchNormalization, MaskedBatchNormalization),
)
_PRECISION = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
_UNKNOWN_SIZE = 32  # for axes of a made batch that the model leaves open


def fold_model(model: Any, layers: list[FoundLayer], example: Any) -> FoldedModel:
    """As `Adapter.fold`."""
    if not _has_graph(model):
        raise TypeError(
            f"fold: a Keras model must be functional or sequential, so that its graph is "
            f"known; got {type(model).__name__}. Rebuild it with keras.Model(inputs, outputs)."
        )
    given = _make_example(model) if example is None else example
    before = _run(model, given)
    folder = _Folder()
    new = folder.fold(model, "")
    names = {layer.name for layer in folder.folded} | {layer.name for layer in folder.kept}
    folder.kept += [
        Kept(found.name, "it is inside a layer whose graph is not known")
        for found in layers
        if found.name not in names
    ]
    return FoldedModel(
        new,
        folder.folded,
        folder.kept,
        method="Keras graph",
        depth=folder.depth,
        before=before,
        after=_run(new, given),
        precision=max(_PRECISION.get(layer.compute_dtype, 0.0) for layer in model.layers),
    )


class _Folder:
    """Folds a model and the models in it."""

    def __init__(self) -> None:
        self.folded: list[Folded] = []
        self.kept: list[Kept] = []
        self.depth = 0
        self._inner: dict[int, Any] = {}

    def fold(self, model: Any, prefix: str) -> Any:
        """A folded copy of one model; names in the report start with `prefix`."""
        graph = _Graph(model)
        for node in graph.nodes:
            layer = node.operation
            self.depth += maps.is_map(layer) or is_batch_norm(layer)
            if not is_batch_norm(layer) or layer in graph.removed:
                continue
            name = f"{prefix}{layer.name}"
            into, reason = graph.fold(node)
            if into is not None:
                self.folded.append(Folded(name, f"{prefix}{into.name}"))
            elif name not in {kept.name for kept in self.kept}:
                self.kept.append(Kept(name, reason))
        return self._rebuild(model, graph, prefix)

    def _rebuild(self, model: Any, graph: _Graph, prefix: str) -> Any:
        copies: dict[int, Any] = {}

        def copy(layer: Any) -> Any:
            if id(layer) not in copies:
                copies[id(layer)] = self._copy(layer, graph, prefix)
            return copies[id(layer)]

        if isinstance(model, keras.Sequential):
            new = keras.Sequential(
                [
                    *(_input_like(tensor) for tensor in model.inputs),
                    *(copy(layer) for layer in model.layers if layer not in graph.removed),
                ],
                name=model.name,
            )
        else:
            new = keras.models.clone_model(
                model,
                clone_function=copy,
                call_function=lambda layer, *args, **kwargs: (
                    args[0] if isinstance(layer, _Removed) else layer(*args, **kwargs)
                ),
            )
        for operation in graph.operations:
            if id(operation) in copies and isinstance(operation, keras.layers.Layer):
                _copy_weights(operation, copies[id(operation)], graph.weights)
        return new

    def _copy(self, layer: Any, graph: _Graph, prefix: str) -> Any:
        if layer in graph.removed:
            return _Removed(name=layer.name)
        if _has_graph(layer):
            if id(layer) not in self._inner:
                self._inner[id(layer)] = self.fold(layer, f"{prefix}{layer.name}/")
            return self._inner[id(layer)]
        config = layer.get_config()
        if layer in graph.weights:
            config["use_bias"] = True
        return type(layer).from_config(config)


class _Removed(keras.layers.Layer):
    """A placeholder for a folded batch norm while a model is copied; never called."""


class _Graph:
    """The graph of one model, and the batch norms folded in it."""

    def __init__(self, model: Any) -> None:
        function = keras.Model(model.inputs, model.outputs)
        recorded = record_graph(function)
        self.nodes = recorded.nodes
        self.operations = function.operations
        self.removed: set[Any] = set()
        self.weights: dict[Any, list[Any]] = {}
        self._outputs = {id(tensor) for tensor in recorded.outputs}
        self._names = {id(tensor): "the model's input" for tensor in recorded.inputs}

    def fold(self, node: Any) -> tuple[Any, str]:
        """The layer that a batch norm was folded into, or None with the reasons against it."""
        norm = node.operation
        refusal = self._refuse_norm(norm)
        if refusal is not None:
            return None, refusal
        affine = affine_of(take_state(norm))
        before, why_before = self._before(node)
        if before is not None:
            self.weights[before] = maps.with_previous(before, self._weights(before), affine)
        else:
            behind, why_behind = self._behind(node, affine)
            if behind is None:
                return None, f"before it: {why_before}; behind it: {why_behind}"
            before = behind
            self.weights[behind] = maps.with_next(behind, self._weights(behind), affine)
        self.removed.add(norm)
        return before, ""

    def _refuse_norm(self, norm: Any) -> str | None:
        if type(norm) not in _NORMS:
            return f"it is a {type(norm).__name__}, which may compute something else"
        if self._uses(norm) > 1:
            return f"it is used in {self._uses(norm)} places"
        if not isinstance(norm.axis, int) and len(norm.axis) != 1:
            return "it normalizes several channel axes"
        reason = refuse_zeroing(norm)
        return None if reason is None else f"it {reason}"

    def _before(self, node: Any) -> tuple[Any, str]:
        """The linear map before a batch norm that can take it, or None with the reason."""
        tensor = _first_input(node)
        while True:
            if id(tensor) in self._names:
                return None, self._names[id(tensor)]
            layer = self._node_of(tensor).operation
            readers = len(self._readers(tensor))
            if not self._passes(layer) or readers != 1:
                break
            tensor = _first_input(self._node_of(tensor))
        if not maps.is_map(layer):
            return None, layer.name
        reason = self._refuse_map(layer, node) or maps.refuse_activation(layer)
        if reason is None and readers != 1:
            reason = f"its output is used in {readers} places"
        return (layer, "") if reason is None else (None, f"{layer.name}, but {reason}")

    def _behind(self, node: Any, affine: Affine) -> tuple[Any, str]:
        """As `_before`, for the map that follows."""
        while True:
            readers = self._readers(node.outputs[0])
            if len(readers) != 1:
                return None, f"{len(readers)} uses of its output"
            if readers[0] is None:
                return None, "the model's output"
            following = readers[0].operation
            if not self._passes(following):
                break
            node = readers[0]
        if not maps.is_map(following):
            return None, following.name
        reason = self._refuse_map(following, node) or maps.refuse_next(following, affine)
        return (following, "") if reason is None else (None, f"{following.name}, {reason}")

    def _refuse_map(self, layer: Any, node: Any) -> str | None:
        if self._uses(layer) > 1:
            return f"it is used in {self._uses(layer)} places"
        norm, rank = node.operation, len(node.outputs[0].shape)
        if is_batch_norm(norm):
            axis = norm.axis if isinstance(norm.axis, int) else norm.axis[0]
            if axis % rank != maps.channel_axis(layer, rank):
                return f"its channels do not lie on axis {axis}"
        return maps.refuse_map(layer)

    def _passes(self, layer: Any) -> bool:
        """True for a layer that returns its input."""
        return maps.does_nothing(layer) or layer in self.removed

    def _readers(self, tensor: Any) -> list[Any]:
        """Nodes that take a tensor, and None for the model's outputs."""
        nodes: list[Any] = [
            node for node in self.nodes if any(a is tensor for a in node.input_tensors)
        ]
        return [*nodes, *([None] if id(tensor) in self._outputs else [])]

    def _node_of(self, tensor: Any) -> Any:
        return next(node for node in self.nodes if any(a is tensor for a in node.outputs))

    def _uses(self, layer: Any) -> int:
        return sum(node.operation is layer for node in self.nodes)

    def _weights(self, layer: Any) -> list[Any]:
        return self.weights.get(layer) or layer.get_weights()


def _has_graph(model: Any) -> bool:
    """True for a functional or sequential model without a `call` of its own."""
    if isinstance(model, keras.Sequential):
        return type(model).call is keras.Sequential.call and model.built
    return is_functional(model) and type(model).call is functional_class().call


def _first_input(node: Any) -> Any:
    return node.input_tensors[0]


def _input_like(tensor: Any) -> Any:
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)


def _copy_weights(old: Any, new: Any, folded: dict[Any, list[Any]]) -> None:
    if isinstance(new, _Removed) or _has_graph(old):  # inner models have theirs
        return
    new.set_weights(folded.get(old) or old.get_weights())
    for _, layer in walk_layers(new):
        if hasattr(layer, "finalize_state"):  # Normalization derives values from its weights
            layer.finalize_state()


def _run(model: Any, example: Any) -> list[Any]:
    """All arrays in the model's output."""
    outputs = keras.tree.flatten(model(example, training=False))
    return [
        np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(a, "float32")))
        if keras.backend.standardize_dtype(a.dtype) in ("float16", "bfloat16")
        else np.asarray(keras.ops.convert_to_numpy(a))
        for a in outputs
    ]


def _make_example(model: Any) -> Any:
    """A random batch of the inputs' shapes."""
    random = np.random.default_rng(0)

    def make(tensor: Any) -> Any:
        batch, *rest = tensor.shape
        shape = (batch or 2, *(size or _UNKNOWN_SIZE for size in rest))
        if keras.backend.is_float_dtype(tensor.dtype):
            return keras.ops.convert_to_tensor(random.normal(size=shape), dtype=tensor.dtype)
        return keras.ops.ones(shape, dtype=tensor.dtype)

    if isinstance(model, keras.Sequential):
        return make(model.inputs[0])
    return keras.tree.map_structure(make, model.input)
