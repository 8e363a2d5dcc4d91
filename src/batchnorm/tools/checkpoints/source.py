"""What every reader gives: names, shapes and types of arrays, and a way to load one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ITEM_SIZES", "Entry", "LayerConfig", "Source", "from_bytes"]

# Types that a checkpoint may hold, and the size of an element.
ITEM_SIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "bool": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
}


@dataclass(frozen=True)
class Entry:
    """Shape and type of an array that has not been loaded."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class LayerConfig:
    """What a Keras file says about a batch norm beside its weights."""

    name: str
    eps: float | None = None
    decay: float | None = None
    scale: bool = True
    center: bool = True


@dataclass(frozen=True)
class Source:
    """An open checkpoint.

    Args:
        format: like "safetensors".
        entries: by flat name, in the order of the file.
        load: the array of a name; it is counted against the limit.
        configs: of a Keras file's batch norms, in the order of the model.
        labels: names of the layers that Keras keeps beside a group of weights.
    """

    format: str
    entries: Mapping[str, Entry]
    load: Callable[[str], NDArray[Any]]
    configs: tuple[LayerConfig, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


def from_bytes(data: bytes | memoryview, entry: Entry) -> NDArray[Any]:
    """A little-endian array; bfloat16 as the float32 of the same value."""
    if entry.dtype == "bfloat16":
        high = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
        return high.view(np.float32).reshape(entry.shape)
    dtype = np.dtype(entry.dtype).newbyteorder("<")
    return np.frombuffer(data, dtype).astype(dtype.newbyteorder("=")).reshape(entry.shape)
