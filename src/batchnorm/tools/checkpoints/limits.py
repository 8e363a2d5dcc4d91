"""Bounds on the cost of reading an untrusted file, and the one error that it may raise.

Every bound is here. `limit` and `seconds` may be raised by the caller, and headers, names and
memory grow with `limit`; the others hold for every file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "DEFAULT_LIMIT",
    "DEFAULT_SECONDS",
    "Budget",
    "CheckpointError",
    "GuardedFile",
    "check_bounds",
    "one_line",
    "shown",
]

DEFAULT_LIMIT = 1 << 30  # bytes of arrays
DEFAULT_SECONDS = 120.0  # of wall time, the start of the reading process included

LONGEST_NAME = 1024  # characters
LONGEST_MESSAGE = 300  # characters after the file's name
MOST_NOTES = 100
MOST_VALUES = 1_000_000  # arrays, or other values looked at in the search for arrays
MOST_VISITS = 300_000  # visits of a pickle's objects, which may be shared
MOST_AXES = 32
DEEPEST = 64  # levels of nested maps or groups

# A parsed byte of JSON or pickle takes up to some 30 bytes of Python objects.
OBJECTS_PER_BYTE = 32
SMALLEST_HEADER = 1 << 16

# Memory of the reading process beyond that of its libraries: threads and buffers, copies of the
# arrays, objects made of a file that is not compressed.
SLACK = 512 << 20
COPIES = 3
MEMORY_PER_BYTE = 128

RAISE_LIMIT = "raise limit= (--limit on the command line) if you trust the file."
RAISE_SECONDS = "raise seconds= (--seconds on the command line) if you trust the file."


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and says why."""


class Budget:
    """Counts the bytes and names taken from one file, and raises before there are too many.

    Args:
        path: of the file, for messages.
        limit: bytes of arrays that may be loaded; headers may take a share of it.
    """

    def __init__(self, path: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.path, self.limit, self.spent, self._names = path, limit, 0, 0

    @property
    def header(self) -> int:
        """Bytes of a header, directory or other structure that becomes Python objects."""
        return max(self.limit // OBJECTS_PER_BYTE, SMALLEST_HEADER)

    def error(self, what: str) -> CheckpointError:
        """The error that names the file, in one line."""
        return CheckpointError(f"{_printable(str(self.path))}: {one_line(what)}")

    def check_header(self, size: int, what: str) -> None:
        """Raise if a structure is larger than headers may be."""
        if size > self.header:
            raise self.error(
                f"{what} has {size} bytes, more than the {self.header} that a limit of "
                f"{self.limit} allows; {RAISE_LIMIT}"
            )

    def spend(self, size: int, what: str) -> None:
        """Count bytes of an array before they are loaded."""
        self.spent += size
        if size < 0 or self.spent > self.limit:
            raise self.error(
                f"{what} needs {size} bytes, which exceeds the limit of {self.limit}; {RAISE_LIMIT}"
            )

    def check_name(self, name: str) -> str:
        """`name`, if it is no longer than names may be."""
        if len(name) > LONGEST_NAME:
            raise self.error(
                f"the name {shown(name)} has {len(name)} characters, more than {LONGEST_NAME}."
            )
        return name

    def take_name(self, name: str) -> str:
        """`name` of an array, if all of them together are no longer than headers may be."""
        self._names += len(self.check_name(name))
        self.check_header(self._names, "the list of array names")
        return name

    def check_values(self, count: int, depth: int = 0, most: int = MOST_VALUES) -> None:
        """Raise if there are more values, or deeper ones, than a checkpoint may have."""
        if count > most:
            raise self.error(f"it has more than {most} objects, more than weights need.")
        if depth > DEEPEST:
            raise self.error(f"its objects are nested more than {DEEPEST} deep.")

    def check_shape(self, shape: object, what: str) -> tuple[int, ...]:
        """`shape` as a tuple of sizes, or an error."""
        if not isinstance(shape, (list, tuple)) or len(shape) > MOST_AXES:
            raise self.error(f"{what} has no valid shape.")
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
            raise self.error(f"{what} has no valid shape.")
        if math.prod(shape) >= 1 << 62:
            raise self.error(f"{what} has an impossible shape: {tuple(shape)}.")
        return tuple(shape)


class GuardedFile:
    """A binary file that refuses to read more at once than a header may have.

    `zipfile` reads the whole directory of an archive in one piece, whatever its declared size.
    """

    def __init__(self, file: BinaryIO, budget: Budget) -> None:
        self._file, self._budget = file, budget

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        self._budget.check_header(self._rest() if size is None or size < 0 else size, "a part")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a place in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The present place in the file."""
        return self._file.tell()

    def seekable(self) -> bool:
        """True: it is a regular file."""
        return True

    def _rest(self) -> int:
        here = self._file.tell()
        end = self._file.seek(0, 2)
        self._file.seek(here)
        return end - here


def check_bounds(limit: object, seconds: object) -> None:
    """Raise ValueError unless the caller's bounds are positive numbers."""
    if isinstance(limit, bool) or not isinstance(limit, int) or limit <= 0:
        raise ValueError(
            f"read_checkpoint: limit must be a positive number of bytes; got {limit!r}."
        )
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not 0 < seconds < 1 << 31:  # type: ignore[operator]
        raise ValueError(f"read_checkpoint: seconds must be a positive number; got {seconds!r}.")


def shown(name: str) -> str:
    """A name from a file for a message: quoted, and cut if it is long."""
    return repr(name) if len(name) <= 80 else f"{name[:60]!r}…"


def one_line(text: str) -> str:
    """Text from a file or its library in one line, and cut if it is long."""
    return _printable(text if len(text) <= LONGEST_MESSAGE else text[:LONGEST_MESSAGE] + "…")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
