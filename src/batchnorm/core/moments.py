"""Masked moments in two centring steps (S2, S3), and their merging (S14)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from batchnorm.core.namespace import Array, Namespace, select, smallest_normal

_ROUNDING = 2.0**-22  # a few times what float32 may be off by, relative to 1
_SMALLEST_SCALE = 2.0**-60


class Moments(NamedTuple):
    """Number of real rows, their mean and their biased variance; 0 where there are none."""

    count: Array
    mean: Array
    var: Array

    def map(self, function: Callable[[Array], Array]) -> Moments:
        """The same with `function` applied to every array."""
        return Moments(*map(function, self))


class Centred(NamedTuple):
    """x after centring, with all that later passes need.

    The mean of float32 data at a large offset does not fit in one float32, so it stays the sum
    of two (S3). Deviations are scaled before they are squared: for finite x neither the squares
    nor the powers of rstd in derivatives overflow or underflow.
    """

    count: Array  # real rows
    anchor: Array  # first mean, a constant
    shift: Array  # mean of x - anchor
    scale: Array  # a constant of the size of the deviations from the mean
    power: Array  # mean of ((x - mean) / scale)²
    unit: Array  # a constant; that of `deviation`
    deviation: Array  # (x - anchor) / unit, 0 at padded rows

    @property
    def mean(self) -> Array:
        """The mean, rounded to x's working precision."""
        return self.anchor + self.shift

    @property
    def low(self) -> Array:
        """The part of the mean that rounding took from `mean`."""
        return (self.anchor - self.mean) + self.shift

    @property
    def var(self) -> Array:
        """The biased variance."""
        return (self.power * self.scale) * self.scale

    @property
    def moments(self) -> Moments:
        """The same as plain moments."""
        return Moments(self.count, self.mean, self.var)

    def map(self, function: Callable[[Array], Array]) -> Centred:
        """The same with `function` applied to every array."""
        return Centred(*map(function, self))


def centre(
    x: Array, mask: Array | None, axes: Sequence[int], *, eps: float, xp: Namespace
) -> Centred:
    """Centre x over `axes` at real rows.

    Two rounds of sums, the second of which needs the first. Sums of the same round do not need
    each other, so that compilers make one pass over x of them. A third pass is the caller's.

    Args:
        x: working view, float32 or float64.
        mask: boolean, broadcastable to x, or None.
        axes: the axes to reduce over; they are kept with size 1.
        eps: as in rstd; bounds the scale from below.
        xp: array namespace.

    Source: S2, S3.
    """
    count, weight = _count(x, mask, axes, xp)
    # Weighted before the sum: a compiler that made one fused operation of `x - total * weight` in
    # one loop and not in another would centre the two loops differently.
    weighted = xp.stop_gradient(select(mask, x, 0.0, xp)) * weight
    anchor = _sum(weighted, axes, xp)  # constant: x - mean does not depend on it
    size = _sum(xp.abs(weighted), axes, xp) + math.sqrt(eps)
    unit = xp.materialize(xp.where(size >= smallest_normal(size), size, 1.0))
    deviation = select(mask, x - anchor, 0.0, xp)
    shift = _sum(deviation, axes, xp) * weight
    deviation = deviation * xp.broadcast_like(1.0 / unit, deviation)
    power = _sum(xp.square(deviation), axes, xp) * weight
    scale, power = _around_mean(power, shift / unit, unit, eps, xp)
    count = xp.zeros_like(power) + count
    return Centred(count, anchor, shift, scale, power, unit, deviation)


def centre_once(x: Array, mask: Array | None, axes: Sequence[int], xp: Namespace) -> Array:
    """The mean as one sum finds it, a constant; 0 without real rows."""
    _, weight = _count(x, mask, axes, xp)
    return _sum(xp.stop_gradient(select(mask, x, 0.0, xp)) * weight, axes, xp)


def _around_mean(
    power: Array, shift: Array, unit: Array, eps: float, xp: Namespace
) -> tuple[Array, Array]:
    """The scale of the deviations, and their power in it, from moments around the anchor.

    Subtracting costs digits only where the anchor is more than a deviation away from the mean.
    The anchor has the rounding errors of one sum, some 1e-7 of the mean's size if sums are trees
    or wider than x: less than a deviation for |mean|/std up to 1e6 and beyond. A constant float32
    channel gets a variance of at most shift²·2^-22 rather than 0.
    """
    moved = xp.square(shift)
    power = power - moved
    # Where no digit is left, x is constant up to the rounding of x - anchor, and its power is set
    # to `least`. By adding a constant, so that derivatives are the difference's.
    least = moved * _ROUNDING
    power = xp.materialize(power + xp.stop_gradient(xp.where(power < least, least - power, 0.0)))
    # Bounded from below, so that ratio² is finite for a constant x too, whatever its size.
    relative = xp.stop_gradient(xp.sqrt(power)) + _SMALLEST_SCALE
    scale = relative * unit + math.sqrt(eps)
    scale = xp.materialize(xp.where(scale >= smallest_normal(scale), scale, unit))
    ratio = unit / scale
    return scale, (power * ratio) * ratio


def centred_from(count: Array, mean: Array, low: Array, var: Array, xp: Namespace) -> Centred:
    """Known moments in the form that `centre` gives, without deviations.

    `mean + low` is the mean; arrays of one shape.
    """
    one, nothing = xp.ones_like(var), xp.zeros_like(var)
    return Centred(count, mean, low, scale=one, power=var, unit=one, deviation=nothing)


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


def unbiased_factor(count: Array, correction: int, xp: Namespace) -> Array:
    """count / (count - correction), which makes a biased variance unbiased at correction 1 (S10).

    1 at counts up to `correction`.
    """
    enough = count > correction
    divisor = xp.where(enough, count - float(correction), 1.0)
    return xp.where(enough, count / divisor, 1.0)


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
    return Moments(count, mean, var).map(lambda a: xp.reshape(a, shape))


def _sum(a: Array, axes: Sequence[int], xp: Namespace) -> Array:
    return xp.sum(a, axis=axes, keepdims=True)
