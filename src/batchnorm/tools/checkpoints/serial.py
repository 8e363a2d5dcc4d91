"""A `Checkpoint` as bytes, and back: the answer of the reading process to its parent.

Eight bytes of length, JSON, and the arrays in the order in which the JSON names them.
"""

from __future__ import annotations

import json
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.limits import LONGEST_MESSAGE, Budget
from batchnorm.tools.checkpoints.source import Checkpoint, Entry
from batchnorm.tools.state import BatchNormState, RenormState

__all__ = ["READ", "REFUSED", "decode", "encode", "most_bytes", "refusal"]

READ, REFUSED = b"+", b"-"  # first byte of an answer

_ARRAYS = ("mean", "var", "gamma", "beta")
_RENORM = tuple(f.name for f in fields(RenormState))
_PLAIN = tuple(f.name for f in fields(BatchNormState) if f.name not in (*_ARRAYS, "renorm"))
_TYPES = ("float32", "float64")
_TEXT = 16  # bound of the JSON in headers: it adds escapes, shapes and types


def refusal(message: str) -> bytes:
    """The answer about a file that was refused."""
    return REFUSED + message.encode(errors="backslashreplace")


def most_bytes(budget: Budget) -> int:
    """Bytes that an answer may have: half types double when they become float32."""
    return 2 * budget.limit + _TEXT * budget.header + LONGEST_MESSAGE


def encode(checkpoint: Checkpoint) -> bytes:
    """The answer with the contents of a file."""
    layers, parts = [], []
    for state in checkpoint.layers:
        found = {name: getattr(state, name) for name in _ARRAYS}
        if state.renorm is not None:
            found |= {name: getattr(state.renorm, name) for name in _RENORM}
        arrays = {name: array for name, array in found.items() if array is not None}
        layers.append(
            {
                "plain": {name: getattr(state, name) for name in _PLAIN},
                "arrays": [[name, a.dtype.name, a.size] for name, a in arrays.items()],
            }
        )
        parts += [array.tobytes() for array in arrays.values()]
    text = json.dumps(
        {
            "format": checkpoint.format,
            "entries": [[name, e.shape, e.dtype] for name, e in checkpoint.entries.items()],
            "layers": layers,
            "notes": checkpoint.notes,
            "others": checkpoint.others,
        }
    ).encode()
    return b"".join([READ, struct.pack("<Q", len(text)), text, *parts])


def decode(answer: memoryview, budget: Budget) -> Checkpoint:
    """The inverse of `encode`, of an answer without its first byte."""
    try:
        (length,) = struct.unpack("<Q", answer[:8])
        found = json.loads(bytes(answer[8 : 8 + length]))
        data = answer[8 + length :]
        layers = []
        for layer in found["layers"]:
            arrays, data = _take(layer["arrays"], data)
            layers.append(_state(layer["plain"], arrays))
        entries = {name: Entry(tuple(shape), dtype) for name, shape, dtype in found["entries"]}
        texts = [found["format"], *found["notes"], *entries, *(e.dtype for e in entries.values())]
        numbers = [found["others"], *(n for entry in entries.values() for n in entry.shape)]
        if len(data) or {type(t) for t in texts} - {str} or {type(n) for n in numbers} - {int}:
            raise ValueError("more bytes or other types than there should be")
        plain = (found[name] for name in ("notes", "others"))
        return Checkpoint(Path(budget.path), found["format"], entries, layers, *plain)
    except (ValueError, TypeError, KeyError, RecursionError, struct.error) as error:
        raise budget.error(f"the process that read it answered nonsense: {error}") from error


def _take(named: Any, data: memoryview) -> tuple[dict[str, NDArray[Any]], memoryview]:
    arrays = {}
    for name, dtype, size in named:
        if name not in (*_ARRAYS, *_RENORM) or dtype not in _TYPES:
            raise ValueError("an array of unknown role or type")
        end = size * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(data[:end], dtype).copy()
        if len(arrays[name]) != size:
            raise ValueError("an array is cut off")
        data = data[end:]
    return arrays, data


def _state(plain: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> BatchNormState:
    if plain["shape"] is not None:
        plain["shape"] = tuple(plain["shape"])
    renorm = None
    if _RENORM[0] in arrays:
        renorm = RenormState(**{name: arrays.pop(name) for name in _RENORM})
    found: dict[str, Any] = {name: arrays.get(name) for name in _ARRAYS}
    return BatchNormState(**plain, **found, renorm=renorm)
