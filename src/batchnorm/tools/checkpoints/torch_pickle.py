"""Files of `torch.save`, today's archives and those from before torch 1.6; torch is not needed.

`torch.load(weights_only=True)` reads less: it refuses pickles of protocol 3 and later and classes
that it does not know, loads every array of an old or packed file, and hashes whatever is a key.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.archives import Archive, Bytes
from batchnorm.tools.checkpoints.limits import Budget, shown
from batchnorm.tools.checkpoints.pickles import Made, Named, PickleError, run
from batchnorm.tools.checkpoints.source import (
    ITEM_SIZES,
    Catalog,
    Details,
    Entry,
    Omitted,
    Source,
    from_bytes,
)
from batchnorm.tools.checkpoints.torch_tree import named, object_name, walk

__all__ = ["read"]

_TYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_PROTOCOL = 1001  # of the form from before torch 1.6
_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"


@dataclass(frozen=True)
class _Storage:
    key: str
    kind: str
    length: int

    @property
    def dtype(self) -> str | None:
        return _TYPES.get(self.kind)


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(file: BinaryIO, budget: Budget) -> Source:
    """The tensors of an open file."""
    start = file.read(2)
    file.seek(0)
    try:
        root, read_storage = (_read_archive if start == b"PK" else _read_old)(file, budget)
    except PickleError as error:
        raise budget.error(f"the pickle inside is {error}.") from error
    catalog, notes = _collect(root, budget)

    def details() -> Details:
        omitted = Omitted()
        for name, _, value in walk(root, budget, omitted):
            if name not in catalog.entries and name not in catalog.skipped:
                omitted.add(f"{name} ({object_name(value)})")
        return Details(omitted=omitted)

    if not catalog.entries and (made := object_name(root)):
        raise budget.error(
            f"it holds a pickled {made}, not weights. Save model.state_dict() instead."
        )

    def load(name: str) -> NDArray[Any]:
        return _load(catalog.places[name], catalog.entries[name], read_storage, budget, name)

    return Source(
        "torch",
        catalog.entries,
        load,
        skipped=catalog.skipped,
        notes=[*catalog.notes(), *notes],
        paths=catalog.paths,
        details=details,
    )


# Reads so many bytes of a storage from an offset on, and counts them against the limit.
Reader = Callable[[_Storage, int, int], Bytes]


def _read_archive(file: BinaryIO, budget: Budget) -> tuple[Any, Reader]:
    archive = Archive(file, budget)
    members = archive.names
    prefix = next((n[: -len("data.pkl")] for n in members if n.endswith("/data.pkl")), None)
    if prefix is None:
        constants = any(n.endswith("constants.pkl") for n in members)
        raise budget.error(
            "it is a TorchScript archive; save model.state_dict() instead."
            if constants
            else "it is an archive without data.pkl, and not of torch.save."
        )
    order = f"{prefix}byteorder"
    if order in members and archive.read(order, header=True) != b"little":
        raise budget.error("its arrays are big-endian, which no current machine writes.")
    root, _ = run(archive.read(f"{prefix}data.pkl", header=True), 0, _storage)

    def read_storage(storage: _Storage, begin: int, size: int) -> Bytes:
        return archive.part(f"{prefix}data/{storage.key}", begin, size)

    return root, read_storage


def _read_old(file: BinaryIO, budget: Budget) -> tuple[Any, Reader]:
    """The old form: pickles one after another, then each storage with its length."""
    data = file.read(min(os.fstat(file.fileno()).st_size, budget.header))
    at, root = 0, None
    for turn in range(4):  # magic number, protocol, machine, the object
        root, at = run(data, at, _storage)
        if turn == 1 and (type(root) is not int or root != _PROTOCOL):
            raise budget.error(f"its protocol is not {_PROTOCOL}.")
    keys, at = run(data, at, _storage)
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise budget.error("it has no list of storages.")
    known = {
        tensor.storage.key: tensor.storage for tensor in _collect(root, budget)[0].places.values()
    }
    places = _locate(file, at, keys, known)

    def read_storage(storage: _Storage, begin: int, size: int) -> Bytes:
        if storage.key not in places:
            raise budget.error(f"storage {shown(storage.key)} is missing; the file is truncated.")
        budget.spend(size, f"storage {shown(storage.key)}")
        file.seek(places[storage.key] + begin)
        return file.read(size)

    return root, read_storage


def _locate(file: BinaryIO, at: int, keys: list[str], known: dict[str, _Storage]) -> dict[str, int]:
    places: dict[str, int] = {}
    for key in keys:
        file.seek(at)
        length = file.read(8)
        storage = known.get(key)
        if len(length) < 8 or storage is None or storage.dtype is None:
            break  # storages behind one of unknown size cannot be found
        (count,) = struct.unpack("<q", length)
        if count != storage.length:
            break
        places[key] = at + 8
        at += 8 + count * ITEM_SIZES[storage.dtype]
    return places


def _storage(identity: Any) -> _Storage:
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise PickleError("referring to something that is no storage")
    _, kind, key, _, length = identity[:5]
    if not isinstance(kind, Named) or not isinstance(key, str) or type(length) is not int:
        raise PickleError("referring to a storage without a type")
    return _Storage(key, kind.name.rpartition(".")[2], length)


def _collect(root: Any, budget: Budget) -> tuple[Catalog[_Tensor], list[str]]:
    """Tensors by name, and notes about models that were pickled whole."""
    catalog: Catalog[_Tensor] = Catalog(budget)
    whole: list[str] = []
    for name, path, value in walk(root, budget):
        tensor = _as_tensor(value)
        if tensor is not None and tensor.storage.dtype is not None:
            catalog.add(name, Entry(tensor.shape, tensor.storage.dtype), tensor, path)
        elif tensor is not None:
            catalog.skip(name, f"of type {tensor.storage.kind}", path)
        elif "_rebuild" in (made := object_name(value) or ""):
            catalog.skip(name, f"a tensor of {made}", path)
        elif isinstance(value.state, dict) and "_modules" in value.state:
            whole.append(f"{shown(name)} ({made})")
    notes = []
    if whole:
        some = ", ".join(whole[:3])
        notes.append(
            f"{len(whole)} models were pickled whole and are not read, {some}; save their "
            "state_dict() instead."
        )
    return catalog, notes


def _as_tensor(value: Made) -> _Tensor | None:
    maker, arguments = value.maker, value.arguments
    if isinstance(maker, Named) and maker.name == _WITH_ATTRIBUTES:
        if not isinstance(arguments, tuple) or len(arguments) != 4:
            return None
        maker, _, arguments, _ = arguments
    if not isinstance(maker, Named) or not isinstance(arguments, tuple) or not arguments:
        return None
    if maker.name in _PARAMETER:
        inner = arguments[0]
        plain = isinstance(inner, Made) and named(inner.maker) in _TENSOR
        return _as_tensor(inner) if plain else None
    if maker.name not in _TENSOR or len(arguments) < 4:
        return None
    storage, offset, shape, strides = arguments[:4]
    numbers = all(isinstance(a, tuple) and all(type(n) is int for n in a) for a in (shape, strides))
    if not isinstance(storage, _Storage) or type(offset) is not int or not numbers:
        return None
    return _Tensor(storage, offset, shape, strides) if len(shape) == len(strides) else None


def _load(
    tensor: _Tensor, entry: Entry, read_storage: Reader, budget: Budget, name: str
) -> NDArray[Any]:
    size = ITEM_SIZES[entry.dtype]
    budget.check_shape(tensor.shape, shown(name))
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, np.float32)
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if (
        tensor.offset < 0
        or min(tensor.strides, default=0) < 0
        or (tensor.offset + last >= tensor.storage.length)
    ):
        raise budget.error(f"{shown(name)} reaches beyond its storage.")
    budget.spend(max(entry.size - (last + 1) * size, 0), shown(name))  # a value may be repeated
    data = read_storage(tensor.storage, tensor.offset * size, (last + 1) * size)
    if len(data) != (last + 1) * size:
        raise budget.error(f"{shown(name)} is cut off; the file is truncated.")
    flat = from_bytes(data, Entry((last + 1,), entry.dtype))
    if math.prod(tensor.shape) == last + 1 and _is_contiguous(tensor):
        return flat.reshape(tensor.shape)
    steps = tuple(s * flat.itemsize for s in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, steps).copy()


def _is_contiguous(tensor: _Tensor) -> bool:
    expected = 1
    for n, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True
