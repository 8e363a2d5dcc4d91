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

__all__ = [
    "ITEM_SIZES",
    "Catalog",
    "Checkpoint",
    "Contents",
    "Details",
    "Entry",
    "Keys",
    "LayerConfig",
    "Omitted",
    "Source",
    "Texts",
    "from_bytes",
    "loaded_type",
]

T = TypeVar("T")
Keys = tuple[str | int, ...]  # of nested maps, a number in a list
Texts = dict[tuple[str, str], str | list[str]]  # by the place that has it, and its name

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
class Contents:
    """All arrays of a file but those of optimizers and callbacks, and the texts beside them.

    Args:
        roles: for each layer its arrays' names, by field of its state; "packed" for mean and
            variance in one array.
        others: arrays that are in no layer's state, by name; bfloat16 as float32.
        paths: keys of the nested maps that lead to an array, where the format nests.
        texts: attributes of HDF5 groups and datasets; metadata of safetensors, at the place "".
    """

    roles: list[dict[str, str]]
    others: dict[str, NDArray[Any]]
    paths: dict[str, tuple[str, ...]]
    texts: Texts


class Omitted:
    """Values of a file that are no arrays, and no texts that the format keeps beside them."""

    def __init__(self) -> None:
        self._count, self._names = 0, list[str]()

    def add(self, name: str) -> None:
        """Count a value, and keep its name if it is among the first."""
        self._count += 1
        if self._count <= 3:
            self._names.append(shown(name))

    def notes(self) -> list[str]:
        """A note on them, if there are any."""
        if not self._count:
            return []
        what = "value that is no array is" if self._count == 1 else "values that are no arrays are"
        return [f"{self._count:,} {what} left out: {', '.join(self._names)}."]


@dataclass(frozen=True)
class Details:
    """Values of a file beside its arrays.

    Args:
        texts: as in `Contents`.
        omitted: the other values.
    """

    texts: Texts = field(default_factory=dict)
    omitted: Omitted = field(default_factory=Omitted)


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
        contents: all arrays, where they were asked for.
    """

    path: Path
    format: str
    entries: dict[str, Entry]
    layers: list[BatchNormState]
    notes: list[str]
    others: int = 0
    contents: Contents | None = None


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
        paths: as in `Contents`; numbers are keys or places in lists.
        details: function that reads what else the file holds.
    """

    format: str
    entries: Mapping[str, Entry]
    load: Callable[[str], NDArray[Any]]
    configs: tuple[LayerConfig, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    paths: Mapping[str, Keys] = field(default_factory=dict)
    details: Callable[[], Details] = Details


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
        self.paths: dict[str, Keys] = {}
        self._doubles: list[str] = []

    def add(self, name: str, entry: Entry, place: T, path: Keys = ()) -> None:
        """Add an array, the place that it is loaded from, and the keys that lead to it."""
        self._count(name)
        if name in self.entries:
            self._doubles.append(name)
        else:
            self.entries[name], self.places[name] = entry, place
            self._keep(name, path)

    def skip(self, name: str, what: str, path: Keys = ()) -> None:
        """Add an array of a type or class that no batch norm can be read from."""
        self._count(name)
        self.skipped[name] = what
        self._keep(name, path)

    def notes(self) -> list[str]:
        """Notes on arrays that could not be added."""
        if not self._doubles:
            return []
        some = ", ".join(map(shown, self._doubles[:3]))
        return [f"{len(self._doubles)} arrays have the name of another and are left out: {some}."]

    def _keep(self, name: str, path: Keys) -> None:
        if path:
            self.paths[name] = path

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


def loaded_type(dtype: str) -> np.dtype[Any]:
    """The type in memory of an array that a file stores as `dtype`."""
    return np.dtype("float32" if dtype == "bfloat16" else dtype)
