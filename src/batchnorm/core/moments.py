"""Masked moments in two centring steps (S2, S3), and their merging (S14)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from batchnorm.core.namespace import Array, Namespace, select


class Moments(NamedTuple):
    """Number of real rows, their mean and their biased variance; 0 where there are none."""

    count: Array
    mean: Array
    var: Array


class Centred(NamedTuple):
    """x after centring, with what the passes behind it need.

    The mean of float32 data at a large offset does not fit in one float32, so it stays the sum
    of two (S3). Squares are taken of scaled deviations: they overflow and underflow for no
    finite x, nor do the powers of rstd that differentiation makes of them.
    """

    count: Array  # real rows
    anchor: Array  # first mean, a constant
    shift: Array  # mean of x - anchor
    scale: Array  # a constant of the size of the deviations
    deviation: Array  # (x - mean) / scale, 0 at padded rows
    power: Array  # mean of deviation²

    @property
    def mean(self) -> Array:
        """The mean, rounded to x's working precision."""
        return self.anchor + self.shift

    @property
    def var(self) -> Array:
        """The biased variance."""
        return (self.power * self.scale) * self.scale

    @property
    def moments(self) -> Moments:
        """The same as plain moments."""
        return Moments(self.count, self.mean, self.var)


def centre(
    x: Array, mask: Array | None, axes: Sequence[int], *, eps: float, xp: Namespace
) -> Centred:
    """Centre x over `axes` at real rows.

    Args:
        x: working view, float32 or float64.
        mask: boolean, broadcastable to x, or None.
        axes: the axes to reduce over; they are kept with size 1.
        eps: as in rstd; bounds the scale from below.
        xp: array namespace.

    Source: S2, S3.
    """
    count, weight = _count(x, mask, axes, xp)
    # The mean comes out of the sum itself: a compiler that contracts `x - total * weight` into a
    # fused operation in one loop and not in another would centre the two loops differently.
    anchor = _sum(select(mask, x, 0.0, xp) * weight, axes, xp)
    anchor = xp.stop_gradient(anchor)  # x - mean does not depend on it
    deviation = select(mask, x - anchor, 0.0, xp)
    shift = _sum(deviation, axes, xp) * weight
    deviation = select(mask, deviation - xp.broadcast_like(shift, x), 0.0, xp)
    spread = _sum(xp.abs(xp.stop_gradient(deviation)), axes, xp) * weight + math.sqrt(eps)
    scale = xp.where(spread > 0, spread, 1.0)
    deviation = deviation * (1.0 / scale)
    power = _sum(xp.square(deviation), axes, xp) * weight
    return Centred(xp.zeros_like(power) + count, anchor, shift, scale, deviation, power)


def _count(
    x: Array, mask: Array | None, axes: Sequence[int], xp: Namespace
) -> tuple[Array | float, Array | float]:
    """Real rows behind each statistic, and the weight of one of them in a mean."""
    sizes = tuple(x.shape)
    if mask is None:
        rows = math.prod([sizes[a] for a in axes])
        return rows * 1.0, 1.0 / max(rows, 1)  # float(rows) would fix a traced size
    repeats = math.prod([sizes[a] for a in axes if mask.shape[a] != sizes[a]])
    count = _sum(xp.cast(mask, x.dtype), axes, xp) * (repeats * 1.0)
    return count, 1.0 / xp.where(count > 0, count, 1.0)


def merge_moments(parts: Moments, axis: int, xp: Namespace) -> Moments:
    """Moments of the union of parts stacked along `axis`; that axis is dropped.

    Source: S14; Chan, Golub and LeVeque 1983, equation 2.1b, for any number of parts at once.
    """
    count = xp.sum(parts.count, axis=(axis,), keepdims=True)
    weight = parts.count / xp.where(count > 0, count, 1.0)
    mean = xp.sum(weight * parts.mean, axis=(axis,), keepdims=True)
    spread = parts.var + xp.square(parts.mean - mean)
    var = xp.sum(weight * spread, axis=(axis,), keepdims=True)
    shape = tuple(n for a, n in enumerate(count.shape) if a != axis % len(count.shape))
    return Moments(*(xp.reshape(a, shape) for a in (count, mean, var)))


class Parts(NamedTuple):
    """What participants of a synchronized step tell each other, stacked on a new first axis.

    The mean travels as two numbers and the power with its scale, so that float32 carries S3.
    A participant of another group has count 0.
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


def merge_centred(own: Centred, parts: Parts, mask: Array | None, xp: Namespace) -> Centred:
    """`own` around the mean of all participants, as if their rows were in one array.

    Args:
        own: of this participant.
        parts: of all of them, in the same order everywhere: every one finds the same bits.
        mask: this participant's, broadcastable to x, or None.
        xp: array namespace.

    Source: S14; Chan, Golub and LeVeque 1983, equation 2.1b.
    """
    real = parts.count > 0
    count = xp.sum(parts.count, axis=(0,), keepdims=False)
    weight = parts.count / xp.where(count > 0, count, 1.0)
    # Maxima, because they round nothing: every loop that subtracts them sees the same numbers.
    anchor = xp.stop_gradient(xp.max(xp.where(real, parts.anchor, -math.inf), axis=0))
    anchor = xp.where(count > 0, anchor, 0.0)
    scale = xp.stop_gradient(xp.max(xp.where(real, parts.scale, 0.0), axis=0))
    scale = xp.where(scale > 0, scale, 1.0)
    shifts = xp.where(real, ((parts.anchor - anchor) + parts.shift) / scale, 0.0)
    shift = xp.sum(weight * shifts, axis=(0,), keepdims=False)
    powers = parts.power * xp.square(parts.scale / scale) + xp.square(shifts - shift)
    power = xp.sum(weight * xp.where(real, powers, 0.0), axis=(0,), keepdims=False)
    moved = ((own.anchor - anchor) + own.shift) / scale - shift
    deviation = own.deviation * (own.scale / scale) + xp.broadcast_like(moved, own.deviation)
    deviation = select(mask, deviation, 0.0, xp)
    return Centred(count, anchor, shift * scale, scale, deviation, power)


def join_groups(parts: Parts, axis: int, xp: Namespace) -> Centred:
    """The groups of all participants along `axis`, for their average (S12, S14)."""

    def joined(a: Array) -> Array:
        sizes = list(a.shape[1:])
        sizes[axis] *= a.shape[0]
        return xp.reshape(a, sizes)

    assert axis == 1
    return Centred(
        joined(parts.count),
        joined(parts.anchor),
        joined(parts.shift),
        joined(parts.scale),
        xp.zeros_like(joined(parts.power)),
        joined(parts.power),
    )


def _sum(a: Array, axes: Sequence[int], xp: Namespace) -> Array:
    return xp.sum(a, axis=axes, keepdims=True)
