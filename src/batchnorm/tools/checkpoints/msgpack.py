"""flax's msgpack files: nested maps with arrays as extension types."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.limits import Budget
from batchnorm.tools.checkpoints.source import ITEM_SIZES, Entry, Source, from_bytes

__all__ = ["encode", "read"]

_ARRAY = 1  # flax.serialization's number for its extension type
_DEEPEST = 64

# First byte: struct format of a number that follows, and what it is.
_FIXED = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_STRINGS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_BINARY = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_LISTS = {0xDC: ">H", 0xDD: ">I"}
_MAPS = {0xDE: ">H", 0xDF: ">I"}
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


def read(file: BinaryIO, budget: Budget) -> Source:
    """The arrays of an open file; names are paths, joined by slashes."""
    end = file.seek(0, 2)
    budget.spend(end, "the file")
    file.seek(0)
    parser = _Parser(memoryview(file.read(end)), budget)
    root = parser.value(0)
    if parser.at != end:
        raise budget.error(f"{end - parser.at} bytes follow the end of the msgpack data.")
    if not isinstance(root, dict):
        raise budget.error("the msgpack data is not a map.")
    arrays: dict[str, _Array] = {}
    _flatten(root, "", arrays)
    entries = {name: array.entry for name, array in arrays.items()}

    def load(name: str) -> NDArray[Any]:
        budget.spend(entries[name].size, repr(name))
        return from_bytes(arrays[name].data, entries[name])

    return Source("msgpack", entries, load)


def encode(tree: Mapping[str, Any]) -> bytes:
    """Nested maps of arrays, as `flax.serialization.msgpack_restore` reads them."""
    parts: list[bytes] = []
    _encode(tree, parts)
    return b"".join(parts)


class _Array:
    def __init__(self, entry: Entry, data: memoryview) -> None:
        self.entry, self.data = entry, data


class _Parser:
    """What it makes of n bytes is at most a constant times n: nothing is made in advance."""

    def __init__(self, data: memoryview, budget: Budget) -> None:
        self.data, self.at, self.budget, self.values = data, 0, budget, 0

    def value(self, depth: int) -> Any:
        self.values += 1
        if depth > _DEEPEST:
            raise self.budget.error(f"the msgpack data is nested deeper than {_DEEPEST}.")
        self.budget.check_header(self.values, "the structure of the msgpack data")
        head = self.take(1)[0]
        if head <= 0x7F or head >= 0xE0:
            return head if head <= 0x7F else head - 256
        if head in _CONSTANTS:
            return _CONSTANTS[head]
        if head in _FIXED:
            return self.number(_FIXED[head])
        if head <= 0x8F or head in _MAPS:
            return self.map(head & 15 if head <= 0x8F else self.number(_MAPS[head]), depth)
        if head <= 0x9F or head in _LISTS:
            count = head & 15 if head <= 0x9F else self.number(_LISTS[head])
            return [self.value(depth + 1) for _ in range(count)]
        if head <= 0xBF or head in _STRINGS:
            return self.text(head & 31 if head <= 0xBF else self.number(_STRINGS[head]))
        if head in _BINARY:
            return self.take(self.number(_BINARY[head]))
        return self.extension(head, depth)

    def take(self, size: int) -> memoryview:
        if self.at + size > len(self.data):
            raise self.budget.error(f"the msgpack data is cut off at byte {len(self.data)}.")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, size: int) -> str:
        try:
            return bytes(self.take(size)).decode()
        except UnicodeDecodeError as error:
            raise self.budget.error(f"text before byte {self.at} is not UTF-8.") from error

    def map(self, count: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, (str, int)):
                raise self.budget.error(f"a key before byte {self.at} is no text.")
            if str(key) in found:
                raise self.budget.error(f"key {key!r:.80} appears twice.")
            found[str(key)] = self.value(depth + 1)
        return found

    def extension(self, head: int, depth: int) -> Any:
        if head in _FIXED_EXTENSIONS:
            size = _FIXED_EXTENSIONS[head]
        elif head in _EXTENSIONS:
            size = self.number(_EXTENSIONS[head])
        else:
            raise self.budget.error(f"byte {self.at - 1}, {head:#x}, is no msgpack.")
        kind = self.number(">b")
        data = self.take(size)
        return self.array(data, depth) if kind == _ARRAY else None

    def array(self, data: memoryview, depth: int) -> _Array | None:
        inner = _Parser(data, self.budget)
        inner.values = self.values
        parts = inner.value(depth + 1)
        self.values = inner.values
        if not isinstance(parts, list) or len(parts) != 3 or not isinstance(parts[2], memoryview):
            raise self.budget.error(f"the array that ends at byte {self.at} is damaged.")
        shape = self.budget.check_shape(parts[0], f"the array that ends at byte {self.at}")
        dtype = parts[1]
        if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
            return None
        entry = Entry(shape, dtype)
        if len(parts[2]) != entry.size:
            raise self.budget.error(
                f"the array that ends at byte {self.at} has {len(parts[2])} bytes; shape {shape} "
                f"and type {dtype} need {entry.size}."
            )
        return _Array(entry, parts[2])


def _flatten(tree: Any, path: str, found: dict[str, _Array]) -> None:
    if isinstance(tree, _Array):
        found[path] = tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            _flatten(value, f"{path}/{key}" if path else key, found)


def _encode(value: Any, parts: list[bytes]) -> None:
    if isinstance(value, Mapping):
        parts.append(struct.pack(">BI", 0xDF, len(value)))
        for key, item in value.items():
            _encode(key, parts)
            _encode(item, parts)
    elif isinstance(value, str):
        data = value.encode()
        parts += [struct.pack(">BI", 0xDB, len(data)), data]
    else:
        array = np.ascontiguousarray(value)
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        inner = [struct.pack(">BI", 0xDD, 3), struct.pack(">BI", 0xDD, value.ndim)]
        inner += [struct.pack(">BQ", 0xCF, n) for n in value.shape]
        _encode(array.dtype.name, inner)
        inner += [struct.pack(">BI", 0xC6, len(data)), data]
        body = b"".join(inner)
        parts += [struct.pack(">BIb", 0xC9, len(body), _ARRAY), body]
