"""Checks and options for the files that commands read and write."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.commands.errors import UserError, needs

__all__ = [
    "Checkpoint",
    "Limit",
    "Seconds",
    "check_new",
    "check_writable",
    "reading",
    "writing",
]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int) -> int:
    """A number of bytes, which may be written like 512M or 4G, in powers of 1024.

    Raises:
        typer.BadParameter: it is no positive number of bytes.
    """
    if isinstance(text, int):  # the default
        return text
    number, unit = text.rstrip("KMGTkmgt"), text.lstrip("0123456789").upper()
    if not (number.isascii() and number.isdigit() and unit in _UNITS and int(number)):
        raise typer.BadParameter(f"must be a number of bytes, like 1073741824 or 4G; got {text!r}.")
    return int(number) * _UNITS[unit]


Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A checkpoint: .safetensors, .pt, .keras, .weights.h5, .h5, .msgpack, or a folder of "
        "orbax; - reads a file from standard input.",
    ),
]
# The defaults are those of the reader; importing it would slow down the help.
Limit = Annotated[
    int,
    typer.Option(
        parser=parse_size,
        metavar="BYTES",
        help="Most bytes of arrays to read, like 4G. Raise it for a file that you trust.",
    ),
]
Seconds = Annotated[
    float,
    typer.Option(min=0.1, help="Most seconds to read for. Raise it for a file that you trust."),
]


@contextmanager
def reading(file: str, extras: str) -> Iterator[None]:
    """Turn errors of reading a checkpoint into one-line messages.

    Args:
        file: the argument of the command.
        extras: extras of this package that reading it may need.
    """
    name = "standard input" if file == "-" else Path(file).name
    with needs(f"reading {name}", extras):
        try:
            yield
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error


def check_writable(option: str, path: Path, suffix: str, source: str | None = None) -> None:
    """Check, before the work, that a file can be written.

    Args:
        option: option or argument that named the file.
        path: path of the file.
        suffix: suffix that the name must have.
        source: file that is read, which must not be the same one; "-" is standard input.

    Raises:
        UserError: it cannot be written.
    """
    from batchnorm.tools.paths import is_same_file

    if path.suffix.lower() != suffix:
        raise UserError(f"{option}: the name must end in {suffix}; got {path}")
    try:
        existed = path.exists() or path.is_symlink()  # keep a dangling link
        if path.exists() and not path.is_file():  # opening a pipe would wait for its reader
            raise UserError(f"{option}: cannot write {path}: it is not a regular file")
        if source is not None and is_same_file(source, path):
            raise UserError(f"{option}: {path} is the file that is read; give another name.")
        with path.open("ab"):
            pass
    except OSError as error:
        raise UserError(f"{option}: cannot write {path}: {error.strerror}") from error
    if not existed:
        path.unlink()


def check_new(option: str, path: Path, force: bool) -> None:
    """Ask before a file is replaced; where nobody can answer, refuse.

    Args:
        option: option or argument that named the file.
        path: path of the file.
        force: replace it unasked.

    Raises:
        UserError: it exists, and is not to be replaced.
    """
    if force or not path.exists():
        return
    asked = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    if not asked:
        raise UserError(f"{option}: {path} exists; give another name, or --force to replace it.")
    if not typer.confirm(f"{option}: {path} exists. Replace it?", err=True):
        raise UserError(f"{option}: {path} exists, and was not replaced.")


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turn a failure to write a file into a one-line message.

    Args:
        option: option or argument that named the file.
        path: path of the file.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{option}: cannot write {path}: {error.strerror or error}") from error
