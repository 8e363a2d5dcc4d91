"""Reading a file in this process, which a damaged file may crash (`child.py` runs it)."""

from __future__ import annotations

import importlib
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from batchnorm.tools.checkpoints.archives import DAMAGED, Archive
from batchnorm.tools.checkpoints.contents import load_contents
from batchnorm.tools.checkpoints.folders import Folder
from batchnorm.tools.checkpoints.limits import Budget, CheckpointError, one_line
from batchnorm.tools.checkpoints.naming import find_groups
from batchnorm.tools.checkpoints.source import Checkpoint, Source
from batchnorm.tools.checkpoints.states import make_state

__all__ = ["Format", "detect", "prepare", "read_here"]

Format = Literal["safetensors", "torch", "msgpack", "hdf5", "keras", "orbax"]

# Module and function; a module imports its format's library, so it is imported when needed.
_READERS: dict[Format, tuple[str, str]] = {
    "safetensors": ("safetensors", "read"),
    "torch": ("torch_pickle", "read"),
    "msgpack": ("msgpack", "read"),
    "hdf5": ("hdf5", "read"),
    "keras": ("hdf5", "read_keras"),
    "orbax": ("orbax", "read"),
}
_HDF5 = b"\x89HDF\r\n\x1a\n"
_OLD_TORCH = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_DAMAGE = (
    *DAMAGED,
    *(KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError),
    *(struct.error, RecursionError, OSError),
)


def detect(path: Path, budget: Budget) -> Format:
    """The format, by the file's first bytes rather than by its name."""
    if path.is_dir():
        return "orbax"
    with _open_file(path, budget) as file:
        start = file.read(16)
        if start[:2] == b"PK":
            return "keras" if "config.json" in Archive(file, budget).names else "torch"
    if start.startswith(_HDF5):
        return "hdf5"
    if start.startswith(_OLD_TORCH):
        return "torch"
    if start[8:9] == b"{":
        return "safetensors"
    if start[:1] and (0x80 < start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):
        return "msgpack"
    raise budget.error(
        "it is in no known format. Known are safetensors, torch.save, .keras, .h5, flax's msgpack "
        f"and orbax folders; the file starts with {start[:8]!r}."
    )


def prepare(kind: Format) -> Any:
    """Import the reader of a format.

    Raises:
        ImportError: a package is missing.
    """
    module, name = _READERS[kind]
    return getattr(importlib.import_module(f"batchnorm.tools.checkpoints.{module}"), name)


def read_here(path: Path, kind: Format, budget: Budget, *, everything: bool = False) -> Checkpoint:
    """Read a file in this process, without protection from the format's parser."""
    try:
        with _open(path, kind, budget) as source:
            groups, notes = find_groups(source)
            layers = [make_state(group, source) for group in groups]
            used = {name for group in groups for name in group.roles.values()}
            others = len(source.entries) - len(used)
            entries, contents = dict(source.entries), None
            if everything:
                contents, left = load_contents(source, groups, layers, budget)
                notes += map(one_line, left)
            return Checkpoint(budget.path, kind, entries, layers, notes, others, contents)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        what = str(error).partition("\n")[0]
        raise budget.error(f"the file is damaged ({type(error).__name__}: {what:.160}).") from error


@contextmanager
def _open(path: Path, kind: Format, budget: Budget) -> Iterator[Source]:
    read = prepare(kind)
    if kind == "orbax":
        with Folder(path, budget) as folder:
            yield read(folder, budget)
    else:
        with _open_file(path, budget) as file:
            yield read(file, budget)


def _open_file(path: Path, budget: Budget) -> BinaryIO:
    """Open a regular file, and do not wait if it has become a pipe."""
    try:
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115
    except OSError as error:
        raise budget.error(f"it cannot be read: {error.strerror or error}.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise budget.error("it is no file any more.")
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
