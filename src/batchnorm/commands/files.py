"""Files that a command is to write."""

from __future__ import annotations

from pathlib import Path

from batchnorm.commands.errors import UserError

__all__ = ["check_writable"]


def check_writable(option: str, path: Path, suffix: str) -> None:
    """Fail before the work rather than after.

    Args:
        option: that gave the path.
        path: where something is to be written.
        suffix: that its name must have.

    Raises:
        UserError: it cannot be written.
    """
    if path.suffix.lower() != suffix:
        raise UserError(f"{option}: the name must end in {suffix}; got {path}")
    try:
        existed = path.exists() or path.is_symlink()  # a dangling link is not ours to remove
        with path.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"{option}: cannot write {path}: {error.strerror}") from error
    if not existed:
        path.unlink()
