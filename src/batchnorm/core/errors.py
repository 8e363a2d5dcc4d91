"""Errors about arguments: raised where a rule is checked, named where the user called."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class ArgumentError(Exception):
    """An argument that breaks a rule, without the name of the layer or function it was given to."""

    kind: type[Exception]

    def named(self, owner: str) -> Exception:
        """The error that users see."""
        return self.kind(f"{owner}: {self}")


class ArgumentValueError(ArgumentError, ValueError):
    """A value or shape that breaks a rule."""

    kind = ValueError


class ArgumentTypeError(ArgumentError, TypeError):
    """A type that breaks a rule."""

    kind = TypeError


class ArgumentNameError(ArgumentError, NameError):
    """An unknown name."""

    kind = NameError


class ArgumentRuntimeError(ArgumentError, RuntimeError):
    """A call that the current state does not allow."""

    kind = RuntimeError


@contextlib.contextmanager
def naming(owner: str) -> Iterator[None]:
    """Errors about arguments, raised in the block, begin with `owner`."""
    try:
        yield
    except ArgumentError as error:
        raise error.named(owner) from None


def names_errors(owner: str | None = None) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """A decorator of public functions: errors about arguments begin with `owner`.

    Of methods too: None takes the name of the class of the first argument, `self`.
    """

    def decorate(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def named(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            try:
                return function(*args, **kwargs)
            except ArgumentError as error:
                raise error.named(owner or type(args[0]).__name__) from None

        return named

    return decorate
