"""A reader's result: names, shapes and types of arrays, and a way to load one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.limits import Budget, shown
from batchnorm.tools.state import BatchNormState

__all__ = ["ITEM_SIZES", "Catalog", "Checkpoint", "Entry", "LayerConfig", "Source", "from_bytes"]

T = TypeVar("T")

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
        """Number of bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a file.

    Args:
        path: of the file or folder.
        format: like "safetensors".
        entries: shape and type of every array, by its name in the file.
        layers: the batch norms, recognized by name.
        notes: remarks on arrays that look like a batch norm but cannot be read as one.
        others: number of entries that belong to none of the layers.
    """

    path: Path
    format: str
    entries: dict[str, Entry]
    layers: list[BatchNormState]
    notes: list[str]
    others: int = 0


@dataclass(frozen=True)
class LayerConfig:
    """Options of a batch norm from the config of a Keras file."""

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
        load: function that loads the array of a name, and counts it against the limit.
        configs: options of a Keras file's batch norms, in the order of the model.
        labels: names of the layers that Keras keeps beside a group of weights.
        skipped: kinds of the arrays that cannot be read, by name.
        notes: remarks on other omissions.
    """

    format: str
    entries: Mapping[str, Entry]
    load: Callable[[str], NDArray[Any]]
    configs: tuple[LayerConfig, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Catalog(Generic[T]):
    """The arrays that a reader finds, by names within limits.

    Args:
        budget: of the file.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.entries: dict[str, Entry] = {}
        self.places: dict[str, T] = {}
        self.skipped: dict[str, str] = {}
        self._doubles: list[str] = []

    def add(self, name: str, entry: Entry, place: T) -> None:
        """Add an array, and the place that it is loaded from."""
        self._count(name)
        if name in self.entries:
            self._doubles.append(name)
        else:
            self.entries[name], self.places[name] = entry, place

    def skip(self, name: str, what: str) -> None:
        """Add an array of a type or class that no batch norm can be read from."""
        self._count(name)
        self.skipped[name] = what

    def notes(self) -> list[str]:
        """Notes on arrays that could not be added."""
        if not self._doubles:
            return []
        some = ", ".join(map(shown, self._doubles[:3]))
        return [f"{len(self._doubles)} arrays have the name of another and are left out: {some}."]

    def _count(self, name: str) -> None:
        self._budget.take_name(name)
        self._budget.check_values(len(self.entries) + len(self.skipped) + len(self._doubles))


def from_bytes(data: bytes | bytearray | memoryview, entry: Entry) -> NDArray[Any]:
    """A little-endian array; bfloat16 as the float32 of the same value."""
    if entry.dtype == "bfloat16":
        high = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
        return high.view(np.float32).reshape(entry.shape)
    dtype = np.dtype(entry.dtype).newbyteorder("<")
    return np.frombuffer(data, dtype).astype(dtype.newbyteorder("=")).reshape(entry.shape)
