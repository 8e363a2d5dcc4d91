"""Conversion between biased and unbiased variances (S10)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from batchnorm.tools.state import BatchNormState, FloatArray, Variance

__all__ = ["Count", "convert_variance", "count_of"]

Count = int | Mapping[str, int] | Callable[[BatchNormState], "int | None"] | None


def convert_variance(
    state: BatchNormState, kind: Variance | None, count: float | None
) -> BatchNormState:
    """The state with the variance of that kind, where that is possible.

    Args:
        state: its `variance` names its kind.
        kind: the kind that is wanted; None for any.
        count: values per channel in a training batch; None if it is not known, and the variance
            stays as it is then.

    Returns:
        The state; its `variance` names its new kind.

    Source: S10: unbiased = biased · count / (count - 1), and the same at count 1.
    """
    if state.var is None or count is None or None in (kind, state.variance):
        return state
    if state.variance == kind:
        return state
    factor = count / (count - 1) if count > 1 else 1.0
    var = _scale(state.var, factor if kind == "unbiased" else 1.0 / factor)
    return replace(state, var=var, variance=kind)


def count_of(state: BatchNormState, count: Count) -> int | None:
    """The count that the user gave for this layer.

    Raises:
        ValueError: not a positive integer.
    """
    if isinstance(count, Mapping):
        value = count.get(state.name)
    elif callable(count):
        value = count(state)
    else:
        value = count
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(
            "transfer: count must be a positive int, the values per channel in a training batch, "
            f"or a map or function that gives one for each layer; got {value!r}."
        )
    return value


def _scale(var: FloatArray, factor: float) -> FloatArray:
    """The product, rounded once."""
    return (var.astype(np.float64) * factor).astype(var.dtype)
