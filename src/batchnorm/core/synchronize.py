"""Statistics of several participants as those of one (S14)."""

from __future__ import annotations

from typing import Protocol

from batchnorm.core.moments import Centred, Moments
from batchnorm.core.namespace import Array, Namespace, select
from batchnorm.core.running import BatchAverage


class Merge(Protocol):
    """How a front end merges statistics over its participants, in a type that carries S3."""

    def moments(self, centred: Centred) -> Centred:
        """All participants' moments; `deviation` is not looked at."""
        ...

    def average(self, average: BatchAverage, unbiased: bool) -> BatchAverage:
        """All participants' average over their ghost groups, of the unbiased variance or not."""
        ...


def recentre(x: Array, mask: Array | None, merged: Centred, xp: Namespace) -> Centred:
    """`merged`, the moments of x and of other participants, with x's own deviations from it."""
    deviation = select(mask, x - merged.anchor, 0.0, xp)
    shift = xp.broadcast_like(merged.shift, x)
    deviation = select(mask, deviation - shift, 0.0, xp)
    return merged._replace(deviation=deviation * (1.0 / merged.scale))


def merge_averages(parts: Moments, axis: int, xp: Namespace) -> Moments:
    """Averages over ghost groups, stacked along `axis`, averaged again; the axis is dropped.

    The counts are of groups that are not empty. Groups are normalized each by its own moments,
    so that what is averaged is their variance, without the spread of their means (S12, S14).
    """
    count = xp.sum(parts.count, axis=(axis,), keepdims=True)
    weight = parts.count / xp.where(count > 0, count, 1.0)
    shape = tuple(n for a, n in enumerate(count.shape) if a != axis % len(count.shape))
    averages = (xp.sum(weight * a, axis=(axis,), keepdims=True) for a in parts[1:])
    return Moments(*(xp.reshape(a, shape) for a in (count, *averages)))
