"""Standard output and error with any encoding, open or closed."""

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
    """Make the streams accept every character.

    Returns:
        False if standard output is closed, as by a shell's `>&-`: the next file that is opened
        would take its number.
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
    """Write one line to standard error, without line breaks or control characters."""
    from batchnorm.tools.text import printable

    write_error(f"batchnorm: {printable(' '.join(message.split()), 2000)}\n")


def write_error(text: str) -> None:
    """Write to standard error; a failure cannot be reported."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        _abandon(sys.stderr)


def flush() -> OSError | None:
    """Flush the output here, so that the interpreter does not fail to at its end.

    Returns:
        The error, or None.
    """
    write_error("")
    try:
        sys.stdout.flush()
    except OSError as error:
        _abandon(sys.stdout)
        return error
    return None


def _abandon(stream: Any) -> None:
    """Redirect a stream to the null device: the interpreter flushes it once more at its end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # a stream without a file, as in tests
        pass


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Write characters that an encoding lacks as ASCII, like 3*10^-8, or as their code."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    text = re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: f"^{found[0].translate(_RAISED)}", text)
    spelled = (_PLAIN.get(c, c if c.isascii() else ascii(c)[1:-1]) for c in text)
    return "".join(spelled), error.end
