"""Reading the batch norms of checkpoints that may be damaged or hostile."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from batchnorm.tools.checkpoints.limits import (
    DEFAULT_LIMIT,
    DEFAULT_SECONDS,
    Budget,
    CheckpointError,
)
from batchnorm.tools.checkpoints.reading import Checkpoint, detect, read_here
from batchnorm.tools.checkpoints.source import Entry

__all__ = [
    "DEFAULT_LIMIT",
    "DEFAULT_SECONDS",
    "Checkpoint",
    "CheckpointError",
    "Entry",
    "read_checkpoint",
]


def read_checkpoint(
    path: str | os.PathLike[str], *, limit: int = DEFAULT_LIMIT, seconds: float = DEFAULT_SECONDS
) -> Checkpoint:
    """The batch norms of a file, whichever library wrote it.

    Only they are loaded; of other arrays names, shapes and types are read. Nothing in the file is
    executed: pickles run on a machine that calls nothing, archives are never extracted, HDF5 and
    orbax are read in a process of its own with bounded memory.

    Args:
        path: a `.safetensors`; a `.pt` or `.pth` of `torch.save` with weights; a `.keras`,
            `.weights.h5` or `.h5` of Keras 2 or 3; a msgpack file of `flax.serialization`; or an
            orbax folder. The content decides, not the name. "-" is standard input.
        limit: bytes of arrays that reading may take. Headers may have a thirty-second of it.
        seconds: how long reading may take.

    Returns:
        A `Checkpoint`: its `layers` are `BatchNormState`s, its `entries` every array's shape and
        type.

    Raises:
        CheckpointError: the file is missing, damaged, larger than the limit, or of no known
            format.
    """
    if path == "-":
        with tempfile.NamedTemporaryFile() as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.flush()
            return read_checkpoint(copy.name, limit=limit, seconds=seconds)
    path = Path(path)
    budget = Budget(path, limit)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise budget.error("it is not a regular file.")
    kind = detect(path, budget)
    if kind in ("hdf5", "keras", "orbax"):
        from batchnorm.tools.checkpoints.isolated import read_isolated

        return read_isolated(path, kind, budget, seconds)
    return read_here(path, kind, budget)
