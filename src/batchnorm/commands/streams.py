"""Standard output and error, whatever their encoding, and whatever they lead to."""

from __future__ import annotations

import codecs
import os
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["complain", "flush", "prepare", "write_error"]

_HANDLER = "batchnorm.plain"
_PLAIN = {
    "−": "-",
    "·": "*",
    "±": "+-",
    "×": "x",
    "…": "...",
    "≤": "<=",
    "≥": ">=",
    "→": "->",
    "√": "sqrt",
    "\u0302": "^",  # of x̂
    "σ": "sigma",
    "μ": "mu",
    "²": "^2",
    "°": " degrees",
}
_RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def prepare() -> bool:
    """Make the streams write every character.

    Returns:
        Whether there is a standard output: a shell's `>&-` closes it, and the next file that is
        opened would take its number.
    """
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (as long as the process)
    if sys.stdout is None:
        complain("standard output is closed")
        return False
    codecs.register_error(_HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_HANDLER)
    return True


def complain(message: str) -> None:
    """One line on standard error, even if a name in it has several, or steers the terminal."""
    from batchnorm.tools.text import printable

    write_error(f"batchnorm: {printable(' '.join(message.split()), 2000)}\n")


def write_error(text: str) -> None:
    """Write to standard error; if that fails, nobody can be told."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _abandon(sys.stderr)


def flush() -> OSError | None:
    """Write what is left of the output, so that the interpreter finds nothing to fail at.

    Returns:
        What went wrong, or None.
    """
    write_error("")
    try:
        sys.stdout.flush()
    except OSError as error:
        _abandon(sys.stdout)
        return error
    return None


def _abandon(stream: Any) -> None:
    """Lead a stream to nowhere: the interpreter flushes it once more at its end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # a stream without a file, as in tests
        pass


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Spell what an encoding lacks, like 3*10^-8, or write its code."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    text = re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: f"^{found[0].translate(_RAISED)}", text)
    spelled = (_PLAIN.get(c, c if c.isascii() else ascii(c)[1:-1]) for c in text)
    return "".join(spelled), error.end
