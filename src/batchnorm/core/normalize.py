"""Normalizing, scaling, offsetting, activating (S4, S6, S7, S13, S18)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from batchnorm.core.config import NEGATIVE_SLOPE, Options
from batchnorm.core.moments import Centred, unbiased_factor
from batchnorm.core.namespace import Array, Namespace, plus, select, smallest_normal, times
from batchnorm.core.running import Running

_LEAST_DEVIATION = 2.0**-511  # its square is the smallest normal number of double


class Affine(NamedTuple):
    """The operations from x̂ to the output, each None where it is not used (S4).

    Per channel: gamma, beta, and renormalization's constants r and d (S11). Broadcastable
    against x: the adjustment's scale s and offset t (S13).
    """

    gamma: Array | None = None
    beta: Array | None = None
    r: Array | None = None
    d: Array | None = None
    s: Array | None = None
    t: Array | None = None

    def map(self, function: Callable[[Array], Array]) -> Affine:
        """The same with `function` applied to every array."""
        return Affine(*(None if a is None else function(a) for a in self))


def normalize_batch(
    x: Array,
    centred: Centred,
    rstd: Array,
    mask: Array | None,
    affine: Affine,
    running: Running | None,
    options: Options,
    *,
    xp: Namespace,
) -> Array:
    """Normalize x by its own moments: every row gets a value, padded ones as constants.

    Args:
        x: working view.
        centred: of the same x and mask.
        rstd: `rstd_of(centred)`.
        mask: boolean, broadcastable to x, or None.
        affine: the operations after x̂.
        running: for channels and groups without real rows (S6), shaped to broadcast; None: 0 and 1.
        options: eps, the correction, and whether padded rows are 0 instead.
        xp: array namespace.
    """
    # Of a single row x̂ is 0 whatever x is, so that dx is 0 to the bit (S7).
    own = xp.where(centred.count <= max(options.correction, 1), 0.0, rstd)
    y = _apply(centred.deviation, *_to_xhat(centred, own), affine, xp)
    if mask is None or options.zero_padding:
        return select(mask, y, 0.0, xp)
    # Padded rows are computed of constants only, so that no gradient reaches them (S8).
    rstd, centred, affine = (
        xp.stop_gradient(rstd),
        centred.map(xp.stop_gradient),
        affine.map(xp.stop_gradient),
    )
    if running is None:
        running = Running(xp.zeros_like(rstd), xp.ones_like(rstd))
    real = centred.count > 0
    anchor = xp.where(real, centred.anchor, running.mean)
    shift = xp.where(real, centred.shift, 0.0)
    rstd = xp.where(real, rstd, rstd_of_running(running.var, eps=options.eps, xp=xp))
    affine = affine._replace(
        r=None if affine.r is None else xp.where(real, affine.r, 1.0),
        d=None if affine.d is None else xp.where(real, affine.d, 0.0),
    )
    padded = _apply(xp.stop_gradient(x) - anchor, rstd, -(shift * rstd), affine, xp)
    return xp.where(mask, y, padded)


def normalize_running(
    x: Array,
    mean: Array,
    var: Array,
    mask: Array | None,
    affine: Affine,
    options: Options,
    *,
    xp: Namespace,
) -> Array:
    """Normalize x by statistics that are not its own; padded rows are constants (S3, S8)."""
    rstd = rstd_of_running(var, eps=options.eps, xp=xp)
    y = _apply(select(mask, x, 0.0, xp) - mean, rstd, None, affine, xp)
    if mask is None or options.zero_padding:
        return select(mask, y, 0.0, xp)
    padded = _apply(xp.stop_gradient(x) - mean, rstd, None, affine.map(xp.stop_gradient), xp)
    return xp.where(mask, y, padded)


def rstd_of(centred: Centred, *, eps: float, correction: int, xp: Namespace) -> Array:
    """1 / sqrt(var + eps), also where var itself overflows or underflows.

    Without eps a deviation may have no finite reciprocal, or a square that vanishes in double.
    Then the channel counts as constant on every path: rstd, and with it x̂ and dx, are 0 (S7).
    """
    power = centred.power
    if correction:
        power = power * unbiased_factor(centred.count, correction, xp)
    # (sqrt(eps) / scale)² instead of eps / scale²: scale² may overflow or underflow.
    power = power + xp.square(math.sqrt(eps) / centred.scale)
    least = max(smallest_normal(power), _LEAST_DEVIATION)
    constant = xp.sqrt(power) * centred.scale <= least
    rstd = (1.0 / xp.sqrt(xp.where(constant, 1.0, power))) / centred.scale
    return xp.materialize(xp.where(constant, 0.0, rstd))


def rstd_of_running(var: Array, *, eps: float, xp: Namespace) -> Array:
    """1 / sqrt(var + eps) of statistics that are not the batch's; 0 where both are 0 (S7)."""
    power = var + eps
    constant = (power >= 0) & (power <= 2.0**-1022)  # in float32 this is 0
    return xp.where(constant, 0.0, 1.0 / xp.sqrt(xp.where(constant, 1.0, power)))


def normalized(centred: Centred, rstd: Array) -> Array:
    """x̂ at real rows."""
    factor, offset = _to_xhat(centred, rstd)
    return centred.deviation * factor + offset


def _to_xhat(centred: Centred, rstd: Array) -> tuple[Array, Array]:
    """Factor and offset, per channel, that make x̂ of `centred.deviation`.

    The shift is a few deviations at most, so that subtracting it last loses no digits.
    """
    return rstd * centred.unit, -(centred.shift * rstd)


def activate(y: Array, residual: Array | None, activation: str | None, xp: Namespace) -> Array:
    """act(y + residual); at exactly 0 the derivative is the negative side's (S18)."""
    if residual is not None:
        y = y + residual
    if activation is None:
        return y
    # `y <= 0` rather than `y > 0`, so that NaN stays NaN.
    return xp.where(y <= 0, y * NEGATIVE_SLOPE if activation == "leaky_relu" else 0.0, y)


def activation_gradient(dy: Array, y: Array, activation: str | None, xp: Namespace) -> Array:
    """act'(·)·dy, from the activation's output y (S18)."""
    if activation is None:
        return dy
    return xp.where(y <= 0, dy * NEGATIVE_SLOPE if activation == "leaky_relu" else 0.0, dy)


def _apply(
    deviation: Array, factor: Array, offset: Array | None, affine: Affine, xp: Namespace
) -> Array:
    """(((deviation·factor + offset)·r + d)·s + t)·gamma + beta; without s, t in one pass over x."""
    gamma, beta, r, d, s, t = affine
    factor, d = times(factor, r), plus(times(offset, r), d)

    def across(a: Array | None) -> Array | None:
        return None if a is None else xp.broadcast_like(a, deviation)

    if s is None and t is None:
        offset = plus(times(d, gamma), beta)
        return plus(deviation * across(times(factor, gamma)), across(offset))
    z = plus(times(plus(deviation * across(factor), across(d)), across(s)), across(t))
    return plus(times(z, across(gamma)), across(beta))
