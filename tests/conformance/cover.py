"""A pairwise cover of the table, for paths that trace or compile each case for seconds.

Every two settings that occur together in a case of the table also occur together in a case of the
cover. Tracers see no numbers, so hard data is paired only with the settings that choose the
formula: the mode, and a mask or none. `make mutants` compares the faults that cover and table find.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from cases import Case

_DATA_MEETS = ("mode", "masked")


def _settings(case: Case) -> dict[str, Any]:
    return {
        "rank and axes": (len(case.shape), case.axes),
        "sizes": (0 in case.shape, 1 in case.shape, max(case.shape) > 1000),
        "mask": case.mask,
        "masked": case.mask != "none",
        "mask_dtype": case.mask_dtype,
        "dtype": case.dtype,
        "mode": case.mode,
        "data": case.data,
        "parameters": (case.gamma, case.beta),
        "cumulative": case.decay is None,
        "ghost": None if case.ghost is None else min(case.ghost, 2),
        "renorm": None if case.renorm is None else tuple(sorted(case.renorm)),
        "adjusted": case.adjusted,
        "residual": case.residual,
        "activation": case.activation,
    }


def _pairs(case: Case) -> set[Any]:
    return {
        (a, b)
        for a, b in combinations(_settings(case).items(), 2)
        if "data" not in (a[0], b[0]) or {a[0], b[0]} & {*_DATA_MEETS}
    }


def cover(cases: Sequence[Case]) -> list[Case]:
    """A greedy choice of few `cases` that hold all pairs, in the order of the table."""
    pairs = {case.name: _pairs(case) for case in cases}
    missing = set().union(*pairs.values())
    chosen: set[str] = set()
    while missing:
        best = max(cases, key=lambda case: len(pairs[case.name] & missing))
        chosen.add(best.name)
        missing -= pairs[best.name]
    return [case for case in cases if case.name in chosen]
