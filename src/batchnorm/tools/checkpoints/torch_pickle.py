"""Files of `torch.save`, today's archives and those from before torch 1.6; torch is not needed."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.archives import open_archive, read_member, read_part
from batchnorm.tools.checkpoints.limits import Budget
from batchnorm.tools.checkpoints.pickles import Made, Named, PickleError, run
from batchnorm.tools.checkpoints.source import ITEM_SIZES, Entry, Source, from_bytes

__all__ = ["is_old", "read"]

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
_OLD = 0x1950A86A20F9469CFC6C
_OLD_START = b"\x80\x02\x8a\x0a" + _OLD.to_bytes(10, "little")
_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_DICTS = ("collections.OrderedDict", "collections.defaultdict")
_MOST_VALUES = 300_000
_DEEPEST = 64


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str | None
    length: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_old(start: bytes) -> bool:
    """Whether a file that starts like this is of the form from before torch 1.6."""
    return start.startswith(_OLD_START)


def read(file: BinaryIO, budget: Budget) -> Source:
    """The tensors of an open file."""
    try:
        read_any = _read_old if is_old(_start_of(file)) else _read_archive
        root, read_storage = read_any(file, budget)
    except PickleError as error:
        raise budget.error(f"the pickle inside is {error}.") from error
    tensors = dict(_find_tensors(root, budget))
    if not tensors and (made := _first_object(root)):
        raise budget.error(
            f"it holds a pickled {made}, not weights. Save model.state_dict() instead."
        )
    entries = {n: Entry(t.shape, str(t.storage.dtype)) for n, t in tensors.items()}

    def load(name: str) -> NDArray[Any]:
        budget.spend(entries[name].size, repr(name))
        return _load(tensors[name], entries[name], read_storage, budget, name)

    return Source("torch", entries, load)


Reader = Callable[[_Storage, int, int], bytes]


def _read_archive(file: BinaryIO, budget: Budget) -> tuple[Any, Reader]:
    archive = open_archive(file, budget)
    members = archive.namelist()
    prefix = next((n[: -len("data.pkl")] for n in members if n.endswith("/data.pkl")), None)
    if prefix is None:
        constants = any(n.endswith("constants.pkl") for n in members)
        raise budget.error(
            "it is a TorchScript archive; save model.state_dict() instead."
            if constants
            else "it is an archive without data.pkl, and not of torch.save."
        )
    order = f"{prefix}byteorder"
    if order in members and read_member(archive, order, budget, header=True) != b"little":
        raise budget.error("its arrays are big-endian, which no current machine writes.")
    root, _ = run(read_member(archive, f"{prefix}data.pkl", budget, header=True), 0, _storage)

    def read_storage(storage: _Storage, begin: int, size: int) -> bytes:
        return read_part(archive, f"{prefix}data/{storage.key}", begin, size, budget)

    return root, read_storage


def _read_old(file: BinaryIO, budget: Budget) -> tuple[Any, Reader]:
    """Pickles one after another, then each storage: its length, and its elements."""
    end = file.seek(0, 2)
    file.seek(0)
    data = file.read(min(end, budget.header))
    at, root = 0, None
    for turn in range(4):  # magic number, protocol, machine, the object
        root, at = run(data, at, _storage)
        if turn == 1 and root != 1001:
            raise budget.error(f"its protocol must be 1001; got {root!r:.40}.")
    keys, at = run(data, at, _storage)
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise budget.error("it has no list of storages.")
    known = {t.storage.key: t.storage for _, t in _find_tensors(root, budget)}
    places = _locate(file, at, keys, known)

    def read_storage(storage: _Storage, begin: int, size: int) -> bytes:
        if storage.key not in places:
            raise budget.error(f"storage {storage.key!r:.40} is missing; the file is truncated.")
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
    return _Storage(key, _TYPES.get(kind.name.rpartition(".")[2]), length)


def _find_tensors(root: Any, budget: Budget) -> Iterator[tuple[str, _Tensor]]:
    """Names and tensors of nested dictionaries; keys are joined by dots, as in a state_dict."""
    pending: list[tuple[str, Any, int]] = [("", root, 0)]
    seen = 0
    while pending:
        name, value, depth = pending.pop()
        seen += 1
        if seen > _MOST_VALUES or depth > _DEEPEST:
            raise budget.error("its objects refer to each other without an end.")
        tensor = _as_tensor(value)
        if tensor is not None:
            yield name, tensor
            continue
        items = _as_dict(value)
        for key, item in reversed(items.items()):
            if isinstance(key, str):
                pending.append((f"{name}.{key}" if name else key, item, depth + 1))


def _as_dict(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, Made) and isinstance(value.maker, Named) and value.maker.name in _DICTS:
        return value.items
    return {}


def _as_tensor(value: Any) -> _Tensor | None:
    """The tensor, if it is one of a type that batch norms have."""
    if not isinstance(value, Made) or not isinstance(value.maker, Named):
        return None
    arguments = value.arguments
    if not isinstance(arguments, tuple) or not arguments:
        return None
    if value.maker.name in _PARAMETER:
        inner = arguments[0]
        is_parameter = isinstance(inner, Made) and isinstance(inner.maker, Named)
        return _as_tensor(inner) if is_parameter and inner.maker.name in _TENSOR else None
    if value.maker.name not in _TENSOR or len(arguments) < 4:
        return None
    storage, offset, shape, strides = arguments[:4]
    numbers = all(isinstance(a, tuple) and all(type(n) is int for n in a) for a in (shape, strides))
    if not isinstance(storage, _Storage) or type(offset) is not int or not numbers:
        return None
    known = storage.dtype is not None and len(shape) == len(strides)
    return _Tensor(storage, offset, shape, strides) if known else None


def _load(
    tensor: _Tensor, entry: Entry, read_storage: Reader, budget: Budget, name: str
) -> NDArray[Any]:
    size = ITEM_SIZES[entry.dtype]
    budget.check_shape(tensor.shape, repr(name))
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, np.float32)
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if (
        tensor.offset < 0
        or min(tensor.strides, default=0) < 0
        or (tensor.offset + last >= tensor.storage.length)
    ):
        raise budget.error(f"{name!r:.80} reaches beyond its storage.")
    budget.spend((last + 1) * size, repr(name))
    data = read_storage(tensor.storage, tensor.offset * size, (last + 1) * size)
    if len(data) != (last + 1) * size:
        raise budget.error(f"{name!r:.80} is cut off; the file is truncated.")
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


def _first_object(root: Any) -> str | None:
    if isinstance(root, Made) and isinstance(root.maker, Named) and root.maker.name not in _DICTS:
        made = root.arguments[0] if root.maker.name == "copyreg._reconstructor" else root.maker
        return made.name if isinstance(made, Named) else root.maker.name
    return None


def _start_of(file: BinaryIO) -> bytes:
    file.seek(0)
    start = file.read(len(_OLD_START))
    file.seek(0)
    return start
