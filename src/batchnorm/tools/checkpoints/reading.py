"""From a file to states, in this process."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from batchnorm.tools.checkpoints import archives, hdf5, msgpack, orbax, safetensors, torch_pickle
from batchnorm.tools.checkpoints.limits import Budget, CheckpointError
from batchnorm.tools.checkpoints.naming import find_groups
from batchnorm.tools.checkpoints.source import Entry, Source
from batchnorm.tools.checkpoints.states import make_state
from batchnorm.tools.state import BatchNormState

__all__ = ["Checkpoint", "Format", "detect", "read_here"]

Format = Literal["safetensors", "torch", "msgpack", "hdf5", "keras", "orbax"]

_HDF5 = b"\x89HDF\r\n\x1a\n"
_DAMAGE = (
    *archives.DAMAGED,
    *(KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError),
    *(struct.error, RecursionError, MemoryError, OSError),
)


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Args:
        path: of the file or folder.
        format: how it is written.
        entries: shape and type of every array, by its name in the file.
        layers: the batch norms, recognized by name.
        notes: what looked like a batch norm but could not be read.
        others: how many of the entries belong to none of the layers.
    """

    path: Path
    format: str
    entries: dict[str, Entry]
    layers: list[BatchNormState]
    notes: list[str]
    others: int = 0


def detect(path: Path, budget: Budget) -> Format:
    """The format, by the file's first bytes rather than by its name."""
    try:
        if path.is_dir():
            if orbax.find_folder(path) is None:
                raise budget.error(
                    "the folder is no orbax checkpoint: it has no _METADATA. Of a "
                    "CheckpointManager give the folder of one step."
                )
            return "orbax"
        with path.open("rb") as file:
            start = file.read(16)
            if start[:2] == b"PK":
                names = archives.open_archive(file, budget).namelist()
                return "keras" if "config.json" in names else "torch"
    except OSError as error:
        raise budget.error(f"it cannot be read: {error.strerror or error}.") from error
    if start.startswith(_HDF5):
        return "hdf5"
    if torch_pickle.is_old(start):
        return "torch"
    if start[8:9] == b"{":
        return "safetensors"
    if start[:1] and (0x80 < start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return "msgpack"
    raise budget.error(
        "it is in no known format. Known are safetensors, torch.save, .keras, .h5, flax's msgpack "
        f"and orbax folders; the file starts with {start[:8]!r}."
    )


def read_here(path: Path, kind: Format, budget: Budget) -> Checkpoint:
    """Read in this process, whatever the format's parser may do to it."""
    try:
        with _open(path, kind, budget) as source:
            groups, notes = find_groups(source)
            layers = [make_state(group, source) for group in groups]
            used = {name for group in groups for name in group.roles.values()}
            others = len(source.entries) - len(used)
            return Checkpoint(path, kind, dict(source.entries), layers, notes, others)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        what = str(error).partition("\n")[0]
        raise budget.error(f"the file is damaged ({type(error).__name__}: {what:.160}).") from error


@contextmanager
def _open(path: Path, kind: Format, budget: Budget) -> Iterator[Source]:
    if kind == "orbax":
        folder = orbax.find_folder(path)
        assert folder is not None
        yield orbax.read(folder, budget)
        return
    readers: dict[str, Any] = {
        "safetensors": safetensors.read,
        "torch": torch_pickle.read,
        "msgpack": msgpack.read,
        "hdf5": hdf5.read,
        "keras": hdf5.read_keras,
    }
    with path.open("rb") as file:
        yield readers[kind](file, budget)
