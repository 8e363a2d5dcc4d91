"""Statistics of several participants as those of one (S14)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

from batchnorm.core.moments import Centred, Moments
from batchnorm.core.namespace import Array, Namespace, select
from batchnorm.core.running import BatchAverage, average_groups


class Merge(Protocol):
    """A front end's merging over its participants, in types precise enough for S3."""

    def moments(self, centred: Centred) -> Centred:
        """All participants' moments; `deviation` is ignored, the argument's and the result's."""
        ...

    def average(self, average: BatchAverage, unbiased: bool) -> BatchAverage:
        """The average over all participants' ghost groups; `unbiased`: of unbiased variances."""
        ...


def recentre(x: Array, mask: Array | None, merged: Centred, xp: Namespace) -> Centred:
    """`merged`, the moments of all participants, with the deviations of x from their anchor."""
    deviation = select(mask, (x - merged.anchor) * (1.0 / merged.scale), 0.0, xp)
    return merged._replace(unit=merged.scale, deviation=deviation)


def merge_averages(parts: Moments, axis: int, xp: Namespace) -> Moments:
    """The average over all ghost groups, of averages stacked along `axis`; the axis is dropped.

    Counts are numbers of groups that are not empty. Each group is normalized by its own moments,
    so that variances are averaged without the spread of the groups' means (S12, S14).
    """
    averages = (average_by_count(a, parts.count, axis, xp) for a in parts[1:])
    return Moments(xp.sum(parts.count, axis=(axis,), keepdims=False), *averages)


def average_by_count(a: Array, count: Array, axis: int, xp: Namespace) -> Array:
    """The average of arrays stacked along `axis`, weighted by their counts; the axis is dropped."""
    total = xp.sum(count, axis=(axis,), keepdims=True)
    weight = count / xp.where(total > 0, total, 1.0)
    return xp.sum(weight * a, axis=(axis,), keepdims=False)


class Parts(NamedTuple):
    """Moments that participants send each other in x's working type, stacked on a new first axis.

    The mean is sent as two numbers and the power with its scale, so that float32 is precise
    enough for S3. A participant outside of the receiver's group has count 0.
    """

    count: Array
    anchor: Array
    shift: Array
    scale: Array
    power: Array

    @classmethod
    def of(cls, centred: Centred) -> Parts:
        """One participant's own, not yet stacked."""
        return cls(centred.count, centred.anchor, centred.shift, centred.scale, centred.power)


Gather = Callable[[Parts], Parts]
"""Stacks the parts of all participants on a new first axis, in the same order everywhere."""


class GatherMerge:
    """A `Merge` for front ends whose collectives hand out every participant's parts."""

    def __init__(self, gather: Gather, xp: Namespace) -> None:
        self._gather, self._xp = gather, xp

    def moments(self, centred: Centred) -> Centred:
        """All participants' moments."""
        return merge_parts(self._gather(Parts.of(centred)), self._xp)

    def average(self, average: BatchAverage, unbiased: bool) -> BatchAverage:
        """The average over all participants' ghost groups, which follow each other."""
        xp = self._xp

        def joined(a: Array) -> Array:
            every, one, groups, *rest = a.shape
            # A graph may not know the number of groups before it runs.
            return xp.reshape(a, (one, -1 if groups is None else every * groups, *rest))

        parts = Parts(*(joined(a) for a in self._gather(Parts.of(average.centred))))
        count, anchor, shift, scale, power = parts
        every = Centred(count, anchor, shift, scale, power, scale, xp.zeros_like(power))
        return average_groups(every, 1, xp)


def merge_parts(parts: Parts, xp: Namespace, *, spread: bool = True) -> Centred:
    """The moments of all participants, as if their rows were in one array; no deviations.

    `spread`: the distances of their means count; False: their variances are averaged.

    Source: S14; Chan, Golub and LeVeque 1983, equation 2.1b.
    """
    real = parts.count > 0
    count = xp.sum(parts.count, axis=(0,), keepdims=False)
    weight = parts.count / xp.where(count > 0, count, 1.0)
    # Maxima are exact, so that every loop that subtracts them sees the same numbers.
    anchor = xp.stop_gradient(xp.max(xp.where(real, parts.anchor, -math.inf), axis=0))
    anchor = xp.where(count > 0, anchor, 0.0)
    scale = xp.stop_gradient(xp.max(xp.where(real, parts.scale, 0.0), axis=0))
    scale = xp.where(scale > 0, scale, 1.0)
    shifts = xp.where(real, ((parts.anchor - anchor) + parts.shift) / scale, 0.0)
    shift = xp.sum(weight * shifts, axis=(0,), keepdims=False)
    powers = parts.power * xp.square(parts.scale / scale)
    if spread:
        powers = powers + xp.square(shifts - shift)
    power = xp.sum(weight * xp.where(real, powers, 0.0), axis=(0,), keepdims=False)
    return Centred(count, anchor, shift * scale, scale, power, scale, xp.zeros_like(power))
