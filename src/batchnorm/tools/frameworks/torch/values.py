"""The tensors in what a model takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_DEPTH = 16


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested containers and in the attributes of other objects, each once."""
    found: list[Tensor] = []
    _collect(value, found, set(), _DEPTH)
    return found


def _collect(value: Any, found: list[Tensor], seen: set[int], depth: int) -> None:
    if value is None or isinstance(value, (bool, int, float, str, bytes, type, nn.Module)):
        return
    if id(value) in seen or depth == 0:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        found.append(value)
        return
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (tuple, list, set, frozenset)):
        inner = list(value)
    elif callable(value):
        return
    else:
        inner = list(getattr(value, "__dict__", {}).values())
        inner += [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
    for item in inner:
        _collect(item, found, seen, depth - 1)
