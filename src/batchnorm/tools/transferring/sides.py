"""The two sides of a transfer: models, trees of arrays, files and plain states."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from batchnorm.tools.checkpoints import Checkpoint, read_checkpoint
from batchnorm.tools.frameworks.adapter import ArrayTree
from batchnorm.tools.frameworks.switch import adapter_of, tree_of
from batchnorm.tools.models import find_layers, put_states
from batchnorm.tools.state import BatchNormState

__all__ = ["Side", "open_side", "read_source"]


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


class _Model:
    """Layers that are written in place."""

    has_options: bool = True
    notes: Sequence[str] = ()

    def __init__(self, model: Any) -> None:
        adapter = adapter_of(model)
        assert adapter is not None
        self._model, self._layers = model, find_layers(model)
        self.states = [found.state for found in self._layers]
        self.can_average = all(adapter.can_average(found.layer) for found in self._layers)

    def write(self, changes: Mapping[str, BatchNormState]) -> Any:
        put_states([(f, changes[f.name]) for f in self._layers if f.name in changes])
        return self._model


class _Tree:
    """Arrays of which a changed copy is made."""

    can_average: bool = False

    def __init__(self, tree: ArrayTree) -> None:
        self._tree, self.has_options = tree, tree.has_options
        self.states, self.notes = tree.states, tree.notes

    def write(self, changes: Mapping[str, BatchNormState]) -> Any:
        return self._tree.replaced(changes)


def open_side(model: Any) -> Side:
    """The batch norms of a model or tree, to be read and written.

    Raises:
        TypeError: it is neither.
    """
    if adapter_of(model) is not None:
        return _Model(model)
    tree = tree_of(model)
    if tree is not None:
        return _Tree(tree)
    raise TypeError(
        "transfer: source and target must be models or layers of torch, flax nnx or Keras, "
        "variables of linen, or a pair of Haiku or Equinox; a source may also be a checkpoint, its "
        f"path, or states; got {type(model).__name__}."
    )


def read_source(source: Any, limit: int, seconds: float) -> tuple[list[BatchNormState], list[str]]:
    """The source's layers, and notes on what looks like one, but is none.

    Args:
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
    if isinstance(source, list) and all(isinstance(s, BatchNormState) for s in source):
        return source, []
    side = open_side(source)
    return side.states, list(side.notes)
