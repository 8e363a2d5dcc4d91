"""Nested collections that a pickle holds, walked in bounded time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from batchnorm.tools.checkpoints.limits import MOST_VISITS, Budget
from batchnorm.tools.checkpoints.pickles import Made, Named
from batchnorm.tools.checkpoints.source import Keys, Omitted

__all__ = ["named", "object_name", "walk"]

_DICTS = ("collections.OrderedDict", "collections.defaultdict")
_MOST_LISTED = 1000  # longer lists hold numbers, not models


def walk(
    root: Any, budget: Budget, omitted: Omitted | None = None
) -> Iterator[tuple[str, Keys, Made]]:
    """Names, keys and objects in nested dictionaries and lists; names are keys joined by dots.

    Args:
        root: of the pickle.
        budget: of the file.
        omitted: counts values that are neither objects nor collections.
    """
    seen = count()

    def visit(name: str, path: Keys, value: Any) -> Iterator[tuple[str, Keys, Made]]:
        budget.check_values(next(seen), len(path), MOST_VISITS)
        items = _items(value)
        if items is None:
            yield name, path, value
        elif omitted is not None:
            _count_others(name, value, len(items), omitted)
        for key, item in items or ():
            if isinstance(item, (dict, list, tuple, Made)):
                child = budget.check_name(f"{name}.{key}" if name else str(key))
                yield from visit(child, (*path, key), item)
            elif omitted is not None:
                omitted.add(f"{name}.{key}" if name else str(key))

    yield from visit("", (), root)


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """Keys and values of a collection; None for any other object."""
    if isinstance(value, Made):
        if named(value.maker) not in _DICTS:
            return None
        value = value.items or {}
    if isinstance(value, dict):
        return [(key, item) for key, item in value.items() if isinstance(key, (str, int))]
    return list(enumerate(value)) if len(value) <= _MOST_LISTED else []


def _count_others(name: str, value: Any, walked: int, omitted: Omitted) -> None:
    """Count what `_items` has left out of a collection."""
    held = (value.items or {}) if isinstance(value, Made) else value
    if len(held) > walked:  # a long list, or keys that are neither texts nor numbers
        omitted.add(name)
    if isinstance(value, Made) and value.state:
        omitted.add(f"{name}._metadata" if name else "_metadata")  # torch's versions of modules


def object_name(value: Any) -> str | None:
    """The class or function that makes a pickled object; None for a collection."""
    if not isinstance(value, Made) or named(value.maker) in _DICTS:
        return None
    first = value.arguments[0] if isinstance(value.arguments, tuple) and value.arguments else None
    rebuilt = named(value.maker) == "copyreg._reconstructor"
    return named(first if rebuilt else value.maker)


def named(value: Any) -> str | None:
    """The name of a class or function; None for anything else."""
    return value.name if isinstance(value, Named) else None
