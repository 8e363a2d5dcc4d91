"""safetensors files: eight bytes of length, a JSON header, the arrays without a gap."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.limits import Budget
from batchnorm.tools.checkpoints.source import ITEM_SIZES, Entry, Source, from_bytes

__all__ = ["encode", "read"]

_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "BOOL": "bool",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
}
_CODES = {name: code for code, name in _TYPES.items()}


def read(file: BinaryIO, budget: Budget) -> Source:
    """Check the header of an open file, all of it, and give access to the arrays."""
    header, start, end = _read_header(file, budget)
    metadata = header.pop("__metadata__", {})
    if not _is_text_map(metadata):
        raise budget.error("the safetensors header's __metadata__ is not a map of strings.")
    entries, places, spans = {}, {}, []
    for name, value in header.items():
        entry, (begin, stop) = _check_entry(name, value, budget)
        spans.append((begin, stop, name))
        if entry is not None:  # a type that no batch norm has
            entries[name], places[name] = entry, begin
    _check_spans(sorted(spans), end - start, budget)

    def load(name: str) -> NDArray[Any]:
        entry = entries[name]
        budget.spend(entry.size, repr(name))
        file.seek(start + places[name])
        return from_bytes(file.read(entry.size), entry)

    return Source("safetensors", entries, load)


def encode(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with these arrays and this metadata."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, at = [], 0
    for name, array in arrays.items():
        data = np.asarray(array, array.dtype.newbyteorder("<")).tobytes()
        header[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(data)],
        }
        parts.append(data)
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # arrays start at a multiple of 8
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def read_metadata(file: BinaryIO, budget: Budget) -> dict[str, str]:
    """The header's own map of strings."""
    metadata = _read_header(file, budget)[0].get("__metadata__", {})
    if not _is_text_map(metadata):
        raise budget.error("the safetensors header's __metadata__ is not a map of strings.")
    return metadata


def _read_header(file: BinaryIO, budget: Budget) -> tuple[dict[str, Any], int, int]:
    end = file.seek(0, 2)
    file.seek(0)
    if end < 8:
        raise budget.error(f"{end} bytes are too few for a safetensors file.")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > end - 8:
        raise budget.error(
            f"the safetensors header claims {length} bytes, but the file has {end}. It is "
            "truncated, or no safetensors file."
        )
    budget.check_header(length, "the safetensors header")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise budget.error(f"the safetensors header is no valid JSON: {error!s:.100}") from error
    if not isinstance(header, dict):
        raise budget.error("the safetensors header is not a JSON object.")
    return header, 8 + length, end


def _check_entry(name: str, value: Any, budget: Budget) -> tuple[Entry | None, tuple[int, int]]:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise budget.error(f"array {name!r:.80} must have dtype, shape and data_offsets.")
    shape = budget.check_shape(value["shape"], f"array {name!r:.80}")
    offsets = value["data_offsets"]
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise budget.error(f"array {name!r:.80} has no valid data_offsets.")
    begin, stop = offsets
    dtype = _TYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        return None, (begin, stop)
    entry = Entry(shape, dtype)
    if stop - begin != entry.size:
        raise budget.error(
            f"array {name!r:.80} of shape {shape} and type {dtype} needs {entry.size} bytes; its "
            f"data_offsets span {stop - begin}."
        )
    return entry, (begin, stop)


def _check_spans(spans: list[tuple[int, int, str]], size: int, budget: Budget) -> None:
    at = 0
    for begin, stop, name in spans:
        if begin != at or stop < begin:
            raise budget.error(
                f"array {name!r:.80} starts at {begin}; the one before ends at {at}."
            )
        at = stop
    if at != size:
        raise budget.error(
            f"the arrays end at byte {at} of the data, but the file has {size}. It is truncated or "
            "has something appended."
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


assert set(_CODES) == set(ITEM_SIZES)
