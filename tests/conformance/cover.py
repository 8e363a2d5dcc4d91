"""A pairwise cover of the table, for paths that trace or compile each case for seconds.

Every two settings that occur together in a case of the table also occur together in a case of the
cover. Tracers see no numbers, so hard data is paired only with the settings that choose the
formula or the type of its sums: the mode, a mask or none, float64. `make mutants` compares the
faults that cover and table find.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from batchnorm.verification.pairwise import choose
from cases import Case

_CHANNELS = 64  # that kernels work on at a time
# What these settings are paired with, since they choose no formula themselves.
_MEETS = {
    "data": {"mode", "masked", "float64"},
    "many channels": {"mode"},
    "one row": {"mode", "masked"},
    "decay": {"mode", "masked"},
    "debias": {"mode", "masked"},
    "update": {"mode", "masked"},
    "late_limits": {"mode", "masked"},
    "single_value": {"mode"},
    "passes": {"mode", "masked", "float64"},
}


def _settings(case: Case) -> dict[str, Any]:
    return {
        "rank and axes": (len(case.shape), case.axes),
        "sizes": (0 in case.shape, 1 in case.shape, max(case.shape) > 1000),
        "many channels": max(case.channels) > _CHANNELS,
        "one row": _rows(case) == 1,
        "mask": case.mask,
        "masked": case.mask != "none",
        "mask_dtype": case.mask_dtype,
        "dtype": case.dtype,
        "float64": case.dtype == "float64",
        "mode": case.mode,
        "data": case.data,
        "parameters": (case.gamma, case.beta),
        "decay": case.decay,
        "ghost": None if case.ghost is None else min(case.ghost, 2),
        "renorm": None if case.renorm is None else tuple(sorted(case.renorm)),
        "adjusted": case.adjusted,
        "residual": case.residual,
        "activation": case.activation,
        "padded_output": case.padded_output,
        "debias": (case.debias, case.steps == 0),
        "update": case.update,
        "passes": case.passes > 1,
        "late_limits": case.late_limits,
        "single_value": case.single_value,
    }


def _rows(case: Case) -> int:
    """Rows of a group, padded ones included."""
    rows = math.prod(n for a, n in enumerate(case.shape) if a not in case.axes)
    return rows if case.ghost is None else rows // max(case.shape[0] // case.ghost, 1)


def _pairs(case: Case) -> set[Any]:
    return {
        (a, b)
        for a, b in combinations(_settings(case).items(), 2)
        if _may_matter(a[0], b[0]) and _may_matter(b[0], a[0])
    }


def _may_matter(setting: str, other: str) -> bool:
    return setting not in _MEETS or other in _MEETS[setting]


def cover(cases: Sequence[Case]) -> list[Case]:
    """A greedy choice of few `cases` that hold all pairs, in the order of the table."""
    chosen = choose({case.name: _pairs(case) for case in cases})
    return [case for case in cases if case.name in chosen]
