"""The weights that models have in a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError
from batchnorm.tools.state import FloatArray
from batchnorm.tools.text import list_names

__all__ = ["Counts", "check_counts", "check_one_for_all"]

Counts = Sequence[float] | Mapping[str, Sequence[float]] | None

_RULE = "one finite number for each model, not negative and not all zero"


def check_counts(counts: Any, models: int, names: Sequence[str]) -> dict[str, FloatArray] | None:
    """The counts of all models, float64, for each layer; None where none are given.

    Args:
        counts: one for each model, or a map of the layers' names to such sequences.
        models: number of them.
        names: of the layers.
    """
    if counts is None:
        return None
    if not isinstance(counts, Mapping):
        return dict.fromkeys(names, _check("counts", counts, models))
    missing = [name for name in names if name not in counts]
    unknown = [str(name) for name in counts if name not in names]
    if missing or unknown:
        what = "lacks" if missing else "has, beside them,"
        raise ArgumentValueError(
            f"counts must name every batch norm and nothing else; it {what} "
            f"{list_names(missing or unknown)}."
        )
    return {name: _check(f"counts[{name!r}]", counts[name], models) for name in names}


def check_one_for_all(counts: Any, models: int) -> FloatArray:
    """The models' counts, the same for all their arrays; 1 for each where none are given."""
    if counts is None:
        return np.ones(models)
    if isinstance(counts, Mapping):
        raise ArgumentValueError(
            "everything=True needs one count for each model, since other arrays have no counts by "
            "layer; got a map of layers."
        )
    return _check("counts", counts, models)


def _check(argument: str, given: Any, models: int) -> FloatArray:
    listed = given.tolist() if hasattr(given, "tolist") else given  # arrays of any library
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise ArgumentTypeError(f"{argument} must be {_RULE}; got {type(given).__name__}.")
    if any(isinstance(n, bool) or not isinstance(n, Real) for n in listed):
        raise ArgumentTypeError(f"{argument} must be {_RULE}; got {listed!r:.200}.")
    if len(listed) != models:
        raise ArgumentValueError(
            f"{argument} must be {_RULE}; got {len(listed)} for {models} models."
        )
    if not all(math.isfinite(n) and n >= 0 for n in listed) or not any(listed):
        raise ArgumentValueError(f"{argument} must be {_RULE}; got {listed!r:.200}.")
    return np.asarray(listed, np.float64)
