"""Choice and report of the layers that `convert_batchnorm` exchanges, in all front ends."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from batchnorm.core.errors import ArgumentTypeError

__all__ = ["Conversion", "check_patterns", "choose", "summarize"]


class Conversion(NamedTuple):
    """One batch norm that `convert_batchnorm` met.

    Attributes:
        name: the path in the model, empty for the model itself.
        before: the class that it had.
        after: the class that it has now; None where it was left alone.
        reason: empty for a converted layer, else the reason to leave it.
    """

    name: str
    before: type[Any]
    after: type[Any] | None
    reason: str


def check_patterns(argument: str, patterns: Any) -> None:
    """Raise unless `patterns` is None, a pattern, or a sequence of them."""
    if patterns is None or isinstance(patterns, str):
        return
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise ArgumentTypeError(
            f"{argument} must be a pattern for names, like '*.norm1', or a sequence of patterns; "
            f"got {patterns!r}."
        )


def choose(name: str, only: str | Sequence[str] | None, skip: str | Sequence[str] | None) -> bool:
    """True for a name that fits one of `only`, unless that is None, and none of `skip`."""
    return (only is None or _fits(name, only)) and (skip is None or not _fits(name, skip))


def summarize(left: Sequence[Conversion]) -> str:
    """The layers that were left alone, with their reasons, at most five of them."""
    shown = ", ".join(
        f"{one.name or '(the model itself)'} ({one.before.__name__}: {one.reason})"
        for one in left[:5]
    )
    return shown + (f" and {len(left) - 5} more" if len(left) > 5 else "")


def _fits(name: str, patterns: str | Sequence[str]) -> bool:
    every = (patterns,) if isinstance(patterns, str) else patterns
    return any(fnmatchcase(name, pattern) for pattern in every)
