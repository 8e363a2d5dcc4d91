"""Few cases in which every two settings meet that meet in many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def choose(pairs: Mapping[str, set[Any]]) -> set[str]:
    """A greedy choice of few names whose `pairs` hold those of all."""
    missing = set().union(*pairs.values())
    chosen: set[str] = set()
    while missing:
        best = max(pairs, key=lambda name: len(pairs[name] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen
