"""Private names of torch that the tools use, each with what takes over where it is gone.

As in `batchnorm.torch.private`, for models of any torch, without this library's front end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def _find(path: str) -> Any:
    """The object of this name inside torch, or None."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# The class that torch's batch norms share.
BatchNormBase: Any = nn.BatchNorm1d.__base__

_has_address = _find("UntypedStorage._cdata") is not None


def find_address(storage: torch.UntypedStorage) -> int:
    """A number that tells storages apart. Lost: storages of size 0 then count as one."""
    found: int = storage._cdata if _has_address else storage.data_ptr()
    return found


# A mode that sees operators. Lost: `fold` of models that torch.fx does not trace, whose report says
# so.
_MODE = _find("utils._python_dispatch.TorchDispatchMode")


class _NoMode:
    def __enter__(self) -> None:
        raise RuntimeError(
            f"fold cannot watch a model's operators with torch {torch.__version__}, which has no "
            "TorchDispatchMode where it used to be; install a version that docs/versions.md lists"
        )

    def __exit__(self, *error: Any) -> None: ...


OperatorMode: Any = _MODE or _NoMode


# Trees of arguments


class _Tree:
    """Lists, tuples, named tuples and dicts, with anything else as leaves."""

    def __init__(self, value: Any) -> None:
        self.kind = type(value)
        self.keys = list(value) if self.kind is dict else None
        parts = list(value.values()) if self.kind is dict else value
        inside = isinstance(parts, (list, tuple))
        self.parts = [_Tree(part) for part in parts] if inside else None
        self.value = None if inside else value

    def leaves(self) -> list[Any]:
        if self.parts is None:
            return [self.value]
        return [leaf for part in self.parts for leaf in part.leaves()]

    def fill(self, leaves: Iterator[Any]) -> Any:
        if self.parts is None:
            return next(leaves)
        parts = [part.fill(leaves) for part in self.parts]
        if self.keys is not None:
            return dict(zip(self.keys, parts, strict=True))
        return self.kind(*parts) if hasattr(self.kind, "_fields") else self.kind(parts)


def _flatten(value: Any) -> tuple[list[Any], Any]:
    tree = _Tree(value)
    return tree.leaves(), tree


# Lost: other containers, as outputs of transformers, in which `fold` and `inspect` then see no
# tensors.
_known_trees = _find("utils._pytree")
flatten_tree: Callable[[Any], tuple[list[Any], Any]] = (
    _known_trees.tree_flatten if _known_trees else _flatten
)
list_leaves: Callable[[Any], list[Any]] = (
    _known_trees.tree_leaves if _known_trees else lambda value: _Tree(value).leaves()
)
fill_tree: Callable[[list[Any], Any], Any] = (
    _known_trees.tree_unflatten if _known_trees else lambda leaves, tree: tree.fill(iter(leaves))
)
