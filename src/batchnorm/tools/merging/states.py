"""The states of one batch norm in several models, as one (S22)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.merge import average_by_count
from batchnorm.core.moments import Moments, merge_moments
from batchnorm.numpy_namespace import XP
from batchnorm.tools.conventions import convert_variance
from batchnorm.tools.merging.layers import owner_of
from batchnorm.tools.state import BatchNormState, FloatArray, RenormState
from batchnorm.tools.text import printable

__all__ = ["MergedLayer", "merge_states"]

_MOST_STEPS = 2**62  # sums of sums, as in rounds of federated training, stay here


@dataclass(frozen=True)
class MergedLayer:
    """A batch norm that was merged from several.

    Args:
        name: its path in the first model.
        channels: number of its channels.
        apart: the largest distance of a model's mean from the merged one, in merged standard
            deviations; over models that weigh something, and all channels.
        missed: the largest share of a channel's merged variance that is the distance of the
            means, from 0 to 1. An average of the variances misses it.
    """

    name: str
    channels: int
    apart: float
    missed: float

    def __str__(self) -> str:
        """One line."""
        name = printable(self.name, 60) or "the layer"
        return (
            f"{name}: means up to {self.apart:.2g} deviations apart; an average of variances would "
            f"miss up to {100 * self.missed:.2g}%"
        )


def merge_states(
    states: Sequence[BatchNormState], counts: FloatArray | None
) -> tuple[BatchNormState, MergedLayer]:
    """One layer's states, checked to belong together, as one of the first one's kind.

    Args:
        states: one for each model.
        counts: rows behind each, float64; None weighs all the same, and leaves the variances of
            the kind that they are.

    Raises:
        ArgumentValueError: counts below 2 where variances are unbiased.

    Source: S22. Deviations of renormalization merge as their squares, which are variances plus
    eps; eps is a constant, so it need not be known.
    """
    first = states[0]
    weighing = list(range(len(states))) if counts is None else np.flatnonzero(counts).tolist()
    used = [states[i] for i in weighing]  # the others' values take no part, whatever they are
    count = np.ones(len(used)) if counts is None else counts[weighing]
    if counts is not None:
        _check_rows(used, count, owner_of(first))
        pairs = zip(used, count, strict=True)
        used = [convert_variance(_wide(state), "biased", rows) for state, rows in pairs]
    mean, var, report = first.mean, first.var, (0.0, 0.0)
    if mean is not None and var is not None:
        means, variances = _stack(used, "mean"), _stack(used, "var")
        with np.errstate(over="ignore"):  # _narrow reports it
            moments = _merge(count, means, variances)
        report = _distances(moments, means, _average(count, variances))
        mean, var = moments.mean, moments.var
    merged = replace(
        first,
        mean=mean,
        var=var,
        gamma=None if first.gamma is None else _average(count, _stack(used, "gamma")),
        beta=None if first.beta is None else _average(count, _stack(used, "beta")),
        variance=first.variance if counts is None else used[0].variance,
        steps=_sum_steps(used, first),
        renorm=_merge_renorm(count, used),
    )
    if counts is not None:
        merged = convert_variance(merged, first.variance, float(count.sum()))
    return _narrow(merged, first), MergedLayer(first.name, first.channels, *report)


def _check_rows(used: Sequence[BatchNormState], count: FloatArray, owner: str) -> None:
    """Raise for weights in the place of rows, which unbiased variances cannot take (S10)."""
    for state, rows in zip(used, count, strict=True):
        if state.variance == "unbiased" and state.var is not None and rows < 2 and state.var.any():
            raise ArgumentValueError(
                f"{owner}: counts must be numbers of rows, at least 2 behind an unbiased variance "
                f"that is not 0 (S10); got {rows:g}. Multiply weights by the rows behind them."
            )


def _merge(count: FloatArray, means: FloatArray, variances: FloatArray) -> Moments:
    rows = np.broadcast_to(count[:, None], means.shape)
    return merge_moments(Moments(rows, means, variances), 0, XP)


def _average(count: FloatArray, arrays: FloatArray) -> FloatArray:
    return average_by_count(arrays, count[:, None], 0, XP)


def _merge_renorm(count: FloatArray, states: Sequence[BatchNormState]) -> RenormState | None:
    kept = [state.renorm for state in states if state.renorm is not None]
    if not kept:
        return None

    def merge(means: FloatArray, deviations: Sequence[FloatArray]) -> Moments:
        squares = np.square(np.asarray(deviations, np.float64))
        moments = _merge(count, means, squares)
        return moments._replace(var=np.sqrt(moments.var))

    moving = merge(_stack(states, "mean"), [r.moving_stddev for r in kept])
    renorm_means = np.asarray([r.renorm_mean for r in kept], np.float64)
    renorm = merge(renorm_means, [r.renorm_stddev for r in kept])
    return RenormState(moving.var, renorm.mean, renorm.var)


def _distances(moments: Moments, means: FloatArray, average: FloatArray) -> tuple[float, float]:
    """`apart` and `missed` of a `MergedLayer`; a constant channel has no distances."""
    var = np.asarray(moments.var)
    some = np.where(var > 0, var, 1.0)
    with np.errstate(invalid="ignore"):  # an overflow, which _narrow reports
        apart = np.where(var > 0, np.abs(means - moments.mean) / np.sqrt(some), 0.0)
        missed = np.where(var > 0, (var - average) / some, 0.0)
    return float(apart.max(initial=0.0)), float(missed.max(initial=0.0))


def _sum_steps(states: Sequence[BatchNormState], first: BatchNormState) -> int | None:
    steps = [state.steps for state in states if state.steps is not None]
    if first.steps is None or not steps:
        return first.steps
    return min(sum(steps), _MOST_STEPS)


def _stack(states: Sequence[BatchNormState], name: str) -> FloatArray:
    return np.asarray([getattr(state, name) for state in states], np.float64)


def _wide(state: BatchNormState) -> BatchNormState:
    """The state with its variance in float64, so that conversions round nothing."""
    return state if state.var is None else replace(state, var=state.var.astype(np.float64))


def _narrow(state: BatchNormState, first: BatchNormState) -> BatchNormState:
    """The state with arrays of the first one's types; what overflows them is an error."""

    def cast(name: str, new: FloatArray | None, old: FloatArray | None) -> FloatArray | None:
        if new is None or old is None:
            return None
        with np.errstate(over="ignore"):
            narrow = new.astype(old.dtype)
        if not np.isfinite(narrow).all():
            raise ArgumentValueError(f"{owner_of(first)}: the merged {name} overflows {old.dtype}.")
        return narrow

    arrays = ("mean", "var", "gamma", "beta")
    changes: dict[str, Any] = {a: cast(a, getattr(state, a), getattr(first, a)) for a in arrays}
    if state.renorm is not None and first.renorm is not None:
        ours, theirs = vars(state.renorm), vars(first.renorm)
        changes["renorm"] = RenormState(**{a: cast(a, ours[a], theirs[a]) for a in ours})  # type: ignore[arg-type]
    return replace(state, **changes)
