"""Errors of the user, and problems that a command has found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["FRAMEWORKS", "ProblemFound", "UserError", "check_framework", "needs"]

FRAMEWORKS = ("torch", "jax", "keras")


class UserError(Exception):
    """A mistake of the user's, in one sentence with its remedy; the command line exits with 2."""


class ProblemFound(SystemExit):
    """Raised where `inspect` or `verify` finds a problem; no other exit has status 1."""

    def __init__(self) -> None:
        super().__init__(1)


def check_framework(name: str) -> None:
    """Refuse a framework that is none of `FRAMEWORKS`, without importing any."""
    if name not in FRAMEWORKS:
        raise UserError(f"--framework must be {' or '.join(FRAMEWORKS)}; got {name}")


# Messages for a KERAS_BACKEND or JAX_PLATFORMS that is not installed.
_BACKEND = ("Unable to import backend", "Unable to initialize backend", "Unknown backend")


@contextmanager
def needs(what: str, extras: str) -> Iterator[None]:
    """Turn errors of missing packages and backends into messages with the remedy.

    Args:
        what: subject of the message, like "the demo".
        extras: extras of this package that install it, like "cli,torch".
    """
    try:
        yield
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        install = f"pip install 'batchnorm[{extras}]'"
        raise UserError(f"{what} needs {missing}; install it with: {install}") from error
    except (ValueError, RuntimeError) as error:
        if not str(error).startswith(_BACKEND):
            raise
        raise UserError(f"{what} needs another backend: {error}") from error
