"""flax's msgpack files: nested maps with arrays as extension types."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, BinaryIO

import msgpack
import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.limits import Budget, CheckpointError, shown
from batchnorm.tools.checkpoints.source import (
    ITEM_SIZES,
    Catalog,
    Details,
    Entry,
    Keys,
    Omitted,
    Source,
    from_bytes,
)

__all__ = ["read"]

_ARRAY = 1  # flax.serialization's number for its extension type
_CHUNKED = "__msgpack_chunked_array__"  # of arrays above 1 GiB


@dataclass(frozen=True)
class _Array:
    shape: tuple[int, ...]
    dtype: str
    data: bytes


class _Number(str):
    """A key that is a number, as text."""


def read(file: BinaryIO, budget: Budget) -> Source:
    """The arrays of an open file; names are paths, joined by slashes."""
    size = os.fstat(file.fileno()).st_size
    budget.spend(size, "the file")
    root = _unpack(file.read(size), budget, lambda code, data: _make_array(code, data, budget))
    if not isinstance(root, dict):
        raise budget.error("the msgpack data is not a map.")
    catalog: Catalog[list[_Array]] = Catalog(budget)
    omitted = Omitted()
    for name, path, shape, parts in _find_arrays(root, budget, omitted):
        dtype = parts[0].dtype if parts else ""
        if dtype in ITEM_SIZES:
            catalog.add(name, Entry(shape, dtype), parts, path)
        else:
            catalog.skip(name, f"of type {dtype}", path)

    def load(name: str) -> NDArray[Any]:
        entry, parts = catalog.entries[name], catalog.places[name]
        budget.spend(entry.size, shown(name))
        flat = [from_bytes(p.data, Entry((math.prod(p.shape),), entry.dtype)) for p in parts]
        return np.concatenate(flat).reshape(entry.shape)

    return Source(
        "msgpack",
        catalog.entries,
        load,
        skipped=catalog.skipped,
        notes=catalog.notes(),
        paths=catalog.paths,
        details=lambda: Details(omitted=omitted),
    )


def _unpack(data: bytes, budget: Budget, ext_hook: Any = msgpack.ExtType) -> Any:
    def make_map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        found = {
            key if isinstance(key, str) else _Number(key): value
            for key, value in pairs
            if isinstance(key, (str, int))
        }
        if len(found) != len(pairs):
            raise budget.error("a key of the msgpack data appears twice, or is no text.")
        return found

    try:
        return msgpack.unpackb(
            data, ext_hook=ext_hook, object_pairs_hook=make_map, strict_map_key=False
        )
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        raise budget.error("text in the msgpack data is not UTF-8.") from error
    except msgpack.ExtraData as error:
        raise budget.error(
            f"{len(error.extra)} bytes follow the end of the msgpack data."
        ) from error
    except msgpack.StackError as error:
        raise budget.error("the msgpack data is nested deeper than weights are.") from error
    except ValueError as error:
        reason = str(error) or type(error).__name__
        raise budget.error(f"the msgpack data is cut off or damaged: {reason}.") from error


def _make_array(code: int, data: bytes, budget: Budget) -> _Array | None:
    """An extension type's array; None where it is something else."""
    if code != _ARRAY:
        return None
    parts = _unpack(data, budget)
    if not isinstance(parts, list) or len(parts) != 3 or not isinstance(parts[2], bytes):
        raise budget.error("an array of the msgpack data is damaged.")
    shape, dtype = budget.check_shape(parts[0], "an array of the msgpack data"), str(parts[1])
    array = _Array(shape, dtype, parts[2])
    if dtype in ITEM_SIZES and len(parts[2]) != Entry(shape, dtype).size:
        raise budget.error(
            f"an array of the msgpack data has {len(parts[2])} bytes; shape {shape} and type "
            f"{dtype} need {Entry(shape, dtype).size}."
        )
    return array


def _find_arrays(
    root: dict[str, Any], budget: Budget, omitted: Omitted
) -> Iterator[tuple[str, Keys, tuple[int, ...], list[_Array]]]:
    """Names, keys, shapes and parts of the arrays, in the order of the file.

    `omitted` gets the keys of values that are no arrays.
    """
    seen = count()

    def find(name: str, path: Keys, value: Any) -> Iterator[Any]:
        budget.check_values(next(seen), len(path))
        if isinstance(value, _Array):
            yield name, path, value.shape, [value]
        elif _CHUNKED in value:
            yield name, path, *_join(value, name, budget)
        else:
            for key, item in value.items():
                if isinstance(item, (_Array, dict)):
                    child = budget.check_name(f"{name}/{key}" if name else key)
                    part = int(key) if isinstance(key, _Number) else key
                    yield from find(child, (*path, part), item)
                else:
                    omitted.add(f"{name}/{key}" if name else key)

    yield from find("", (), root)


def _join(value: dict[str, Any], name: str, budget: Budget) -> tuple[tuple[int, ...], list[_Array]]:
    """Shape and parts of an array that flax has cut: maps from numbers to sizes and to arrays."""
    sizes, chunks = value.get("shape"), value.get("chunks")
    if not isinstance(sizes, dict) or not isinstance(chunks, dict):
        raise budget.error(f"the chunked array {shown(name)} is damaged.")
    shape = budget.check_shape([sizes.get(str(i)) for i in range(len(sizes))], shown(name))
    parts = [chunks.get(str(i)) for i in range(len(chunks))]
    arrays = [part for part in parts if isinstance(part, _Array)]
    types = {array.dtype for array in arrays}
    held = sum(math.prod(array.shape) for array in arrays)
    if len(arrays) != len(parts) or len(types) != 1 or held != math.prod(shape):
        raise budget.error(f"the chunks of array {shown(name)} do not make up its shape.")
    return shape, arrays
