"""Which batch norms of a whole model are converted, and the report of what became of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from batchnorm.core.errors import ArgumentTypeError


class Conversion(NamedTuple):
    """One batch norm of a model.

    Attributes:
        name: its path in the model, "" for the model itself.
        before: its class.
        after: the class that has taken its place; None if it was left alone.
        reason: why it was left alone; "" otherwise.
    """

    name: str
    before: type[Any]
    after: type[Any] | None = None
    reason: str = ""


class Choice(NamedTuple):
    """Patterns of the names to convert, as the shell's: `*`, `?`, `[abc]`; `*` matches dots too.

    Attributes:
        only: one of these must match; all names do if there are none.
        skip: none of these may match.
    """

    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def refuse(self, name: str) -> str | None:
        """The reason to leave a layer of this name alone, or None."""
        if self.only and not any(fnmatchcase(name, pattern) for pattern in self.only):
            return "only= does not name it"
        if any(fnmatchcase(name, pattern) for pattern in self.skip):
            return "skip= names it"
        return None


def check_choice(only: Any, skip: Any) -> Choice:
    """A choice by `only` and `skip`: a pattern, several, or None."""
    return Choice(_check_patterns("only", only), _check_patterns("skip", skip))


def _check_patterns(argument: str, given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise ArgumentTypeError(
            f"{argument} must be a pattern of names like 'encoder.*', or a sequence of them; got "
            f"{given!r}."
        )
    if not patterns:
        raise ArgumentTypeError(f"{argument} must hold a pattern; got {given!r}. Leave it out.")
    return tuple(patterns)


def check_report(report: Any) -> list[Conversion]:
    """The list that conversions are appended to; a new one for None."""
    if report is not None and not isinstance(report, list):
        raise ArgumentTypeError(
            f"report must be a list, which conversions are appended to; got {report!r}."
        )
    return [] if report is None else report


def describe_foreign(names: Sequence[str], framework: str, most: int = 3) -> str:
    """Layers of the framework's own in a block whose passes are one step, for a warning (S21)."""
    shown = ", ".join(names[:most]) + ", ..." * (len(names) > most)
    return (
        f"{len(names)} of {framework}'s own layers ({shown}) move in each pass. "
        "convert_batchnorm(model) changes them over."
    )


def describe_left(report: Iterable[Conversion], most: int = 5) -> str:
    """Layers that were left alone, with their reasons, for a warning; "" if there are none."""
    reasons: dict[str, list[str]] = {}
    for layer in report:
        if layer.after is None:
            reasons.setdefault(layer.reason, []).append(layer.name or "the model itself")
    return "; ".join(
        f"{', '.join(names[:most])}{f' and {len(names) - most} more' * (len(names) > most)} "
        f"({reason})"
        for reason, names in reasons.items()
    )
