"""A `Checkpoint` as bytes, and back: the answer of the reading process to its parent.

Eight bytes of length, JSON, and the arrays in the order in which the JSON names them: those of the
layers, then the others, where all were asked for.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.contents import ROLES
from batchnorm.tools.checkpoints.limits import LONGEST_MESSAGE, Budget
from batchnorm.tools.checkpoints.source import (
    ITEM_SIZES,
    Checkpoint,
    Contents,
    Entry,
    loaded_type,
)
from batchnorm.tools.state import BatchNormState, RenormState

__all__ = ["READ", "REFUSED", "Part", "decode", "encode", "most_bytes", "refusal"]

Part = bytes | memoryview

READ, REFUSED = b"+", b"-"  # first byte of an answer

_ARRAYS = ("mean", "var", "gamma", "beta")
_RENORM = tuple(f.name for f in fields(RenormState))
_PLAIN = tuple(f.name for f in fields(BatchNormState) if f.name not in (*_ARRAYS, "renorm"))
_TYPES = ("float32", "float64")
_NONSENSE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
_TEXT = 16  # bound of the JSON in headers: it adds escapes, shapes and types


def refusal(message: str) -> bytes:
    """The answer about a file that was refused."""
    return REFUSED + message.encode(errors="backslashreplace")


def most_bytes(budget: Budget) -> int:
    """Bytes that an answer may have: half types double when they become float32."""
    return 2 * budget.limit + _TEXT * budget.header + LONGEST_MESSAGE


def encode(checkpoint: Checkpoint) -> list[Part]:
    """The answer with the contents of a file, in parts; large arrays are not copied."""
    layers: list[dict[str, Any]] = []
    parts: list[Part] = []
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
        parts += map(_bytes_of, arrays.values())
    found = {
        "format": checkpoint.format,
        "entries": [[name, e.shape, e.dtype] for name, e in checkpoint.entries.items()],
        "layers": layers,
        "notes": checkpoint.notes,
        "others": checkpoint.others,
    }
    if (contents := checkpoint.contents) is not None:
        found["contents"] = {
            "roles": contents.roles,
            "others": list(contents.others),
            "paths": contents.paths,
            "texts": [[*key, text] for key, text in contents.texts.items()],
        }
        parts += map(_bytes_of, contents.others.values())
    text = json.dumps(found).encode()
    return [READ, struct.pack("<Q", len(text)), text, *parts]


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


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
        contents = None
        if "contents" in found:
            contents, data = _contents(found["contents"], entries, layers, data)
        if len(data) or {type(t) for t in texts} - {str} or {type(n) for n in numbers} - {int}:
            raise ValueError("more bytes or other types than there should be")
        notes, others = found["notes"], found["others"]
        return Checkpoint(
            Path(budget.path), found["format"], entries, layers, notes, others, contents
        )
    except (*_NONSENSE, struct.error) as error:
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


def _contents(
    found: dict[str, Any],
    entries: dict[str, Entry],
    layers: list[BatchNormState],
    data: memoryview,
) -> tuple[Contents, memoryview]:
    """All arrays: every one is an entry, once, with as many values as its shape says."""
    used = [name for roles in found["roles"] for name in roles.values()]
    for roles, state in zip(found["roles"], layers, strict=True):
        for role, name in roles.items():
            count = {"steps": 1, "packed": 2 * state.channels}.get(role, state.channels)
            if role not in ROLES or math.prod(entries[name].shape) != count:
                raise ValueError("a layer and its arrays disagree")
    others: dict[str, NDArray[Any]] = {}
    for name in found["others"]:
        entry = entries[name]
        if entry.dtype not in ITEM_SIZES or any(n < 0 for n in entry.shape):
            raise ValueError("an array of unknown type or impossible shape")
        dtype = loaded_type(entry.dtype)
        end = math.prod(entry.shape) * dtype.itemsize
        others[name] = np.frombuffer(data[:end], dtype).copy().reshape(entry.shape)
        data = data[end:]
    if len({*used, *others}) != len(used) + len(found["others"]):
        raise ValueError("an array has two roles")
    paths = {name: tuple(path) for name, path in found["paths"].items()}
    texts = {(place, name): text for place, name, text in found["texts"]}
    values = [v for text in texts.values() for v in (text if isinstance(text, list) else [text])]
    parts = [part for path in paths.values() for part in path]
    places = [part for key in texts for part in key]
    if {type(t) for t in (*values, *parts, *places)} - {str}:
        raise ValueError("other types than texts")
    return Contents(found["roles"], others, paths, texts), data
