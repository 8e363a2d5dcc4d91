"""What goes wrong by the user's doing, and what was found wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ProblemFound", "UserError", "needs"]


class UserError(Exception):
    """A mistake of the user's, in one sentence with its remedy; the command line exits with 2."""


class ProblemFound(SystemExit):
    """The end of an inspection that found something wrong; no other exit has status 1."""

    def __init__(self) -> None:
        super().__init__(1)


# KERAS_BACKEND and JAX_PLATFORMS may name what there is not.
_BACKEND = ("Unable to import backend", "Unable to initialize backend", "Unknown backend")


@contextmanager
def needs(what: str, extras: str) -> Iterator[None]:
    """Turn a missing package into the command that installs it, a missing backend into a sentence.

    Args:
        what: wants it, like "the demo".
        extras: of this package, like "cli,torch".
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
