"""Sources and targets of states: models, trees of arrays, files, plain states."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from batchnorm.core.errors import naming
from batchnorm.tools.checkpoints import Checkpoint, read_checkpoint
from batchnorm.tools.frameworks.adapter import Adapter, ArrayTree
from batchnorm.tools.frameworks.switch import adapter_of, tree_of
from batchnorm.tools.models import find_layers, put_states
from batchnorm.tools.state import BatchNormState

__all__ = ["Side", "is_states", "open_side", "read_source"]

NamedArrays = Sequence[tuple[str, NDArray[Any]]]


class Side(Protocol):
    """A model or tree that holds batch norms.

    Attributes:
        states: of the batch norms.
        notes: remarks on what looks like a batch norm, but is none.
        has_options: eps and decay can be written.
        can_average: running statistics can be the plain average of all batches.
    """

    states: list[BatchNormState]
    notes: Sequence[str]
    has_options: bool
    can_average: bool

    def write(self, changes: Mapping[str, BatchNormState]) -> Any:
        """The model or tree with other states for the layers of these names."""

    def others(self) -> NamedArrays:
        """Names and arrays that belong to no batch norm; half types as float32; no seeds."""

    def copied(self, changes: Mapping[str, BatchNormState], others: NamedArrays) -> Any:
        """A new model or tree with other states for the layers of these names; this one stays.

        Args:
            changes: new states.
            others: what `others` gives, with new values; empty to keep them.
        """


class _Model:
    """Layers that are written in place."""

    has_options: bool = True
    notes: Sequence[str] = ()

    def __init__(self, model: Any, adapter: Adapter) -> None:
        self._model, self._adapter, self._layers = model, adapter, find_layers(model)
        self.states = [found.state for found in self._layers]
        self.can_average = all(adapter.can_average(found.layer) for found in self._layers)

    def write(self, changes: Mapping[str, BatchNormState]) -> Any:
        put_states([(f, changes[f.name]) for f in self._layers if f.name in changes])
        return self._model

    def others(self) -> NamedArrays:
        return [(slot.name, slot.read()) for slot in self._adapter.others(self._model)]

    def copied(self, changes: Mapping[str, BatchNormState], others: NamedArrays) -> Any:
        new = self._adapter.copy(self._model)
        _Model(new, self._adapter).write(changes)
        if others:
            for slot, (_, values) in zip(self._adapter.others(new), others, strict=True):
                slot.write(values)
        return new


class _Tree:
    """Arrays of which a changed copy is made."""

    can_average: bool = False

    def __init__(self, tree: ArrayTree) -> None:
        self._tree, self.has_options = tree, tree.has_options
        self.states, self.notes = tree.states, tree.notes

    def write(self, changes: Mapping[str, BatchNormState]) -> Any:
        return self._tree.replaced(changes)

    def others(self) -> NamedArrays:
        return list(self._tree.others().items())

    def copied(self, changes: Mapping[str, BatchNormState], others: NamedArrays) -> Any:
        return self._tree.replaced(changes, dict(others))


def open_side(owner: str, model: Any) -> Side:
    """The batch norms of a model or tree, to be read and written.

    Args:
        owner: of the messages.
        model: a model, layer or tree.

    Raises:
        TypeError: it is none of these.
    """
    adapter = adapter_of(model)
    if adapter is not None:
        return _Model(model, adapter)
    with naming(owner):
        tree = tree_of(model)
    if tree is not None:
        return _Tree(tree)
    raise TypeError(
        f"{owner}: batch norms can be in models and layers of torch, flax nnx and Keras, in "
        "torch's state dicts, nnx's states, linen's variables and pairs of Haiku or Equinox; they "
        "are read from checkpoints, their paths and BatchNormStates as well; got "
        f"{type(model).__name__}."
    )


def is_states(source: Any) -> bool:
    """True for a list of states, which are read, but not written into."""
    return isinstance(source, list) and all(isinstance(s, BatchNormState) for s in source)


def read_source(
    owner: str, source: Any, limit: int, seconds: float
) -> tuple[list[BatchNormState], list[str]]:
    """The source's layers, and notes on what looks like one, but is none.

    Args:
        owner: of the messages.
        source: as in `transfer`.
        limit: as in `transfer`.
        seconds: as in `transfer`.
    """
    if isinstance(source, (str, os.PathLike)):
        source = read_checkpoint(source, limit=limit, seconds=seconds)
    if isinstance(source, Checkpoint):
        return source.layers, source.notes
    if isinstance(source, BatchNormState):
        return [source], []
    if is_states(source):
        return source, []
    side = open_side(owner, source)
    return side.states, list(side.notes)
