"""Results that must hold: the zoo fails where one does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Real frames under more padding; and outputs of a whole model in float32, relative to the largest,
# since deep ones multiply roundings.
LARGEST, OUTPUTS = 1e-5, 1e-4
# Differences between two orders of summation may be so many times those of one rounding of the
# input, since every layer rounds; and this much where a model computes its attention's softmax in
# float32 whatever its type (LASR), in which a difference of 1e-16 may turn one rounding over.
ROUNDINGS, LEAST = 100, 1e-9


def _all_converted(value: Any, row: dict[str, Any]) -> bool:
    ours, _, norms = str(value).partition(" of ")
    return ours == norms


def _same(value: Any, row: dict[str, Any]) -> bool:
    return value is True


def _small(value: Any, row: dict[str, Any]) -> bool:
    return not isinstance(value, float) or value <= OUTPUTS * max(1.0, row["scale"])


def _like_rounding(value: Any, row: dict[str, Any]) -> bool:
    return bool(value <= ROUNDINGS * row["steps, stock moved"] + LEAST)


def _padding(value: Any, row: dict[str, Any]) -> bool:
    return bool(row["leaks"]) or not isinstance(value, float) or value <= LARGEST


LIMITS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    "converted": _all_converted,
    "evaluation": _small,
    "training": _small,
    "keys": _same,
    "groups": _same,
    "steps": _like_rounding,
    "checkpointing": _small,
    "saving": _small,
    "padding, training": _padding,
    "padding, evaluation": _padding,
}


def broken(row: dict[str, Any]) -> list[str]:
    """The checks of a row that raised an error, or whose result lies outside its limit."""
    return [
        check
        for check, value in row.items()
        if str(value).startswith("fails")
        or (check in LIMITS and "missing" not in row and not LIMITS[check](value, row))
    ]
