"""The one place that picks a framework; none is imported that is not in use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from batchnorm.tools.frameworks.adapter import Adapter, ArrayTree, Leaves
from batchnorm.tools.frameworks.records import Framework

__all__ = ["adapter_for", "adapter_of", "tree_of"]

# Keras first: on its torch backend a Keras layer is a torch.nn.Module too.
_MODULES: dict[Framework, str] = {"keras": "keras", "nnx": "flax.nnx", "torch": "torch"}


def adapter_of(model: Any) -> Adapter | None:
    """The adapter of a model's or layer's framework; None for what is neither."""
    for name, module in _MODULES.items():
        if module in sys.modules:
            adapter = adapter_for(name)
            if adapter.states.owns(model):
                return adapter
    return None


def adapter_for(name: Framework) -> Adapter:
    """The adapter of that name; imports its framework."""
    adapter: Adapter = importlib.import_module(f"batchnorm.tools.frameworks.{name}.adapter").ADAPTER
    return adapter


def tree_of(model: Any) -> ArrayTree | None:
    """The batch norms of nested maps, or of a pair of Equinox or Haiku; None for anything else."""
    if "equinox" in sys.modules:
        from batchnorm.tools.frameworks import equinox

        if equinox.owns(model):
            return equinox.Pair(model)
    if isinstance(model, (tuple, Mapping)):
        from batchnorm.tools.frameworks import trees

        if trees.owns(model):
            return trees.Tree(model, _leaves_of(model))
    return None


def _leaves_of(model: Any) -> Leaves:
    """The module for the arrays of a tree, which are all of one library."""
    if "torch" in sys.modules:
        from batchnorm.tools.frameworks import trees
        from batchnorm.tools.frameworks.torch import leaves

        if any(map(leaves.is_array, trees.leaves_in(model))):
            return leaves
    from batchnorm.tools.frameworks import array_leaves

    return array_leaves
