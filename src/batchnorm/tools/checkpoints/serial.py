"""States as arrays and text, and back: what crosses from one process to another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from numpy.typing import NDArray

from batchnorm.tools.state import BatchNormState, RenormState

__all__ = ["pack", "unpack"]

_ARRAYS = ("mean", "var", "gamma", "beta")
_RENORM = tuple(f.name for f in fields(RenormState))
_PLAIN = tuple(f.name for f in fields(BatchNormState) if f.name not in (*_ARRAYS, "renorm"))


def pack(states: Sequence[BatchNormState]) -> tuple[dict[str, NDArray[Any]], str]:
    """Arrays by name, and the rest as JSON."""
    arrays: dict[str, NDArray[Any]] = {}
    plain = []
    for i, state in enumerate(states):
        plain.append({name: getattr(state, name) for name in _PLAIN})
        found = {name: getattr(state, name) for name in _ARRAYS}
        if state.renorm is not None:
            found |= asdict(state.renorm)
        arrays |= {f"{i}.{name}": a for name, a in found.items() if a is not None}
    return arrays, json.dumps(plain)


def unpack(arrays: Mapping[str, NDArray[Any]], text: str) -> list[BatchNormState]:
    """The inverse of `pack`."""
    states = []
    for i, plain in enumerate(json.loads(text)):
        if plain["shape"] is not None:
            plain["shape"] = tuple(plain["shape"])
        found: dict[str, Any] = {name: arrays.get(f"{i}.{name}") for name in _ARRAYS}
        if f"{i}.{_RENORM[0]}" in arrays:
            found["renorm"] = RenormState(**{n: arrays[f"{i}.{n}"] for n in _RENORM})
        states.append(BatchNormState(**plain, **found))
    return states
