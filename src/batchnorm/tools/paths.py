"""Paths of files, compared."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["is_inside", "is_same_file"]


def is_same_file(source: str | os.PathLike[str], target: Path) -> bool:
    """True if writing the target would replace the source, however the two are spelled or linked.

    Args:
        source: a path, or "-" for standard input, which a shell may have opened from the target.
        target: a path; a file that does not exist is no source.
    """
    try:
        ours = os.fstat(sys.stdin.fileno()) if source == "-" else Path(source).stat()
        return os.path.samestat(ours, target.stat())
    except (OSError, ValueError, AttributeError):  # missing, or a standard input without a file
        return False


def is_inside(target: Path, folder: Path) -> bool:
    """True if a path leads into a folder, through links too."""
    # As resolve(), but a loop of links is no error.
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(target)).parents
