"""safetensors files, by the format's own library."""

from __future__ import annotations

import os
from typing import Any, BinaryIO

import ml_dtypes  # noqa: F401  (tells NumPy what bfloat16 is)
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from batchnorm.tools.checkpoints.limits import Budget, shown
from batchnorm.tools.checkpoints.source import Catalog, Details, Entry, Source

__all__ = ["read"]

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


def read(file: BinaryIO, budget: Budget) -> Source:
    """Check the header of an open file, all of it, and give access to the arrays."""
    length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if length > size - 8:
        raise budget.error(
            f"the safetensors header claims {length} bytes, but the file has {size}. It is "
            "truncated, or no safetensors file."
        )
    budget.check_header(length, "the safetensors header")
    try:
        opened = safe_open(file.name, "numpy")
        catalog: Catalog[None] = Catalog(budget)
        for name in opened.offset_keys():
            part = opened.get_slice(name)
            dtype = _TYPES.get(part.get_dtype())
            if dtype is None:
                catalog.skip(name, f"of type {part.get_dtype()}")
            else:
                shape = budget.check_shape(part.get_shape(), f"array {shown(name)}")
                catalog.add(name, Entry(shape, dtype), None)
    except SafetensorError as error:
        raise budget.error(f"it is no intact safetensors file: {error}.") from error

    def load(name: str) -> NDArray[Any]:
        budget.spend(catalog.entries[name].size, shown(name))
        array = np.asarray(opened.get_tensor(name))
        return array.astype(np.float32) if catalog.entries[name].dtype == "bfloat16" else array

    def details() -> Details:
        return Details({("", key): text for key, text in (opened.metadata() or {}).items()})

    return Source("safetensors", catalog.entries, load, skipped=catalog.skipped, details=details)
