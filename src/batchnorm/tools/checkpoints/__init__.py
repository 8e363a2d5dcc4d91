"""Reading the batch norms, or all arrays, of checkpoints that may be damaged or hostile."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Any

from batchnorm.tools.checkpoints.isolated import read_isolated
from batchnorm.tools.checkpoints.limits import (
    DEFAULT_LIMIT,
    DEFAULT_SECONDS,
    Budget,
    CheckpointError,
    check_bounds,
)
from batchnorm.tools.checkpoints.source import Checkpoint, Contents, Entry

__all__ = [
    "DEFAULT_LIMIT",
    "DEFAULT_SECONDS",
    "Checkpoint",
    "CheckpointError",
    "Contents",
    "Entry",
    "read_checkpoint",
]

_STANDARD_INPUT = "-"
_KINDS = {
    stat.S_IFIFO: "a pipe; name it '-' and pass it as standard input",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    limit: int = DEFAULT_LIMIT,
    seconds: float = DEFAULT_SECONDS,
    everything: bool = False,
) -> Checkpoint:
    """Read the batch norms of a file, whichever library wrote it.

    Only batch norms are loaded, if not asked otherwise; of other arrays names, shapes and types
    are read. Nothing in the file is executed, and nothing outside it, or outside its folder, is
    opened. A separate process reads it, with bounded memory and time.

    Args:
        path: a `.safetensors`; a `.pt` or `.pth` of `torch.save` with weights; a `.keras`,
            `.weights.h5` or `.h5` of Keras 2 or 3; a msgpack file of `flax.serialization`; or an
            orbax folder. The content decides, not the name. "-" is the standard input, which
            holds any of them but a folder.
        limit: most bytes of arrays to read, and of standard input; 1 GiB unless given. Headers
            may have a thirty-second of it.
        seconds: most seconds to read for; 120 unless given.
        everything: load all other arrays as well, within the same bounds, but not those of
            optimizers and callbacks.

    Returns:
        A `Checkpoint`, whose `layers` are `BatchNormState`s and whose `entries` are every array's
        shape and type. With `everything` its `contents` are a `Contents`.

    Raises:
        CheckpointError: the file is missing, no regular file, damaged, beyond `limit` or
            `seconds`, or of no known format; or the package that reads it is missing. With
            `everything`: an array whose type or place cannot be kept.
        ValueError: `limit` or `seconds` is not positive.
    """
    check_bounds(limit, seconds)
    name = os.fspath(path)
    budget = Budget(Path(name), limit)
    if name == _STANDARD_INPUT:
        stream = _standard_input(budget)
        return read_isolated(budget, seconds, stream, everything=everything)
    _check_kind(name, budget)
    return read_isolated(budget, seconds, everything=everything)


def _check_kind(name: str, budget: Budget) -> None:
    """Raise unless it is a regular file or a folder: opening other kinds may never return."""
    if not name:
        raise CheckpointError("read_checkpoint: path is empty; name a file or a folder.")
    try:
        mode = stat.S_IFMT(Path(name).stat().st_mode)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise budget.error(f"it cannot be read: {reason}.") from error
    if mode not in (stat.S_IFREG, stat.S_IFDIR):
        raise budget.error(f"it is {_KINDS.get(mode, 'something else')}, not a file.")


def _standard_input(budget: Budget) -> Any:
    """Standard input as a file that a process can inherit, or as bytes."""
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    if stream is None or stream.closed:
        raise budget.error("standard input is closed.")
    if stream.isatty():
        raise budget.error("standard input is a terminal; pipe a checkpoint into it.")
    try:
        stream.fileno()
    except OSError:  # replaced by an object in memory
        return stream.read(budget.limit + 1)
    return stream
