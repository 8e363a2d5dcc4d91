"""What reading an untrusted file may cost, and the one error that it may raise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

__all__ = ["DEFAULT_LIMIT", "DEFAULT_SECONDS", "Budget", "CheckpointError", "GuardedFile"]

DEFAULT_LIMIT = 1 << 30
DEFAULT_SECONDS = 120.0

_SMALLEST_HEADER = 1 << 16
_MOST_AXES = 32

# A parsed byte of JSON or pickle takes up to some 30 bytes of Python objects.
_OBJECTS_PER_BYTE = 32


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names the file and says why."""


class Budget:
    """Counts what is taken from one file, and says no in time.

    Args:
        path: of the file, for messages.
        limit: bytes of arrays that may be loaded; headers may take a share of it.
    """

    def __init__(self, path: Path, limit: int) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit <= 0:
            raise ValueError(
                f"read_checkpoint: limit must be a positive number of bytes; got {limit!r}."
            )
        self.path, self.limit, self.spent = path, limit, 0

    @property
    def header(self) -> int:
        """Bytes of a header, directory or other structure that becomes Python objects."""
        return max(self.limit // _OBJECTS_PER_BYTE, _SMALLEST_HEADER)

    def error(self, what: str) -> CheckpointError:
        """The error that names the file."""
        return CheckpointError(f"{self.path}: {what}")

    def check_header(self, size: int, what: str) -> None:
        """Raise if a structure is larger than headers may be."""
        if size > self.header:
            raise self.error(
                f"{what} has {size} bytes, more than the {self.header} that a limit of "
                f"{self.limit} allows. Raise the limit if you trust the file."
            )

    def spend(self, size: int, what: str) -> None:
        """Count bytes of an array before they are loaded."""
        self.spent += size
        if size < 0 or self.spent > self.limit:
            raise self.error(
                f"{what} needs {size} bytes, which exceeds the limit of {self.limit}. Raise the "
                "limit if you trust the file."
            )

    def check_shape(self, shape: object, what: str) -> tuple[int, ...]:
        """`shape` as a tuple of sizes, or an error."""
        if not isinstance(shape, (list, tuple)) or len(shape) > _MOST_AXES:
            raise self.error(f"{what} has no valid shape.")
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
            raise self.error(f"{what} has no valid shape: {shape!r:.80}.")
        if math.prod(shape) >= 1 << 62:
            raise self.error(f"{what} has an impossible shape: {shape!r:.80}.")
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
        """As of any file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of any file."""
        return self._file.tell()

    def seekable(self) -> bool:
        """Always."""
        return True

    def _rest(self) -> int:
        here = self._file.tell()
        end = self._file.seek(0, 2)
        self._file.seek(here)
        return end - here
