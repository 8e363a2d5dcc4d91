"""The process that reads one file: its own limits, and the answer on its standard output."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from pathlib import Path

from batchnorm.tools.checkpoints import serial
from batchnorm.tools.checkpoints.limits import (
    COPIES,
    MEMORY_PER_BYTE,
    RAISE_LIMIT,
    SLACK,
    Budget,
    CheckpointError,
)
from batchnorm.tools.checkpoints.reading import detect, prepare, read_here

__all__ = ["main"]

_LIBRARIES = 2 << 30  # address space for the import of the format's library
_PIECE = 1 << 20
_COMPRESSED = ("hdf5", "keras", "orbax", "torch")  # arrays may be larger than the file


def main(arguments: list[str]) -> int:
    """Read a file, and answer with its contents or with the reason for refusing it.

    Args:
        arguments: the path; "path" or "stream", if the file is the standard input; bytes of
            arrays and seconds that reading may take; "everything" to load all arrays.
    """
    path, source, limit, seconds, *more = arguments
    budget = Budget(Path(path), int(limit))
    answer = os.dup(1)
    os.dup2(2, 1)  # a library that prints does not spoil the answer
    try:
        parts = _read(budget, source, float(seconds), *more)
    except ImportError as error:
        remedy = "install it with: pip install 'batchnorm[files]'"
        parts = [serial.refusal(f"reading it needs a package: {error}; {remedy}")]
    except MemoryError:
        parts = [
            serial.refusal(
                f"reading it takes more memory than a limit of {limit} allows; {RAISE_LIMIT}"
            )
        ]
    except OSError as error:  # of a standard input that cannot be read
        parts = [serial.refusal(f"it cannot be read: {error.strerror or error}.")]
    except CheckpointError as error:
        parts = [serial.refusal(str(error).removeprefix(str(budget.error(""))))]
    with os.fdopen(answer, "wb") as file:
        file.writelines(parts)
    return 0


def _read(budget: Budget, source: str, seconds: float, what: str = "") -> list[serial.Part]:
    _bound_memory(_LIBRARIES + COPIES * budget.limit)
    _bound("RLIMIT_CPU", math.ceil(seconds) + 1)
    _bound("RLIMIT_CORE", 0)
    path = budget.path if source == "path" else _spool(budget)
    kind = detect(path, budget)
    prepare(kind)
    loaded = COPIES * budget.limit
    if kind not in _COMPRESSED:
        loaded = min(loaded, MEMORY_PER_BYTE * path.stat().st_size)
    _bound_memory(SLACK + loaded + path.stat().st_size)  # the file itself may be mapped
    return serial.encode(read_here(path, kind, budget, everything=what == "everything"))


def _spool(budget: Budget) -> Path:
    """Standard input as a file, if it is no larger than the limit."""
    size = 0
    with tempfile.NamedTemporaryFile(delete=False) as file:
        while piece := sys.stdin.buffer.read(_PIECE):
            size += len(piece)
            if size > budget.limit:
                raise budget.error(
                    f"standard input has more bytes than the limit of {budget.limit}; {RAISE_LIMIT}"
                )
            file.write(piece)
    return Path(file.name)


def _bound_memory(more: int) -> None:
    """Bound the address space to what is taken already, and `more` bytes."""
    statm = Path("/proc/self/statm")
    if statm.exists():  # other systems than Linux ignore or refuse such a bound
        taken = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _bound("RLIMIT_AS", taken + more)


def _bound(name: str, value: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has none
        return
    kind = getattr(resource, name)
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, hard))
