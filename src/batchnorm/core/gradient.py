"""The closed-form gradient (S8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from batchnorm.core.namespace import Array, Namespace, plus, select, times
from batchnorm.core.normalize import Affine


class Gradients(NamedTuple):
    """Gradients of the loss."""

    dx: Array
    dgamma: Array
    dbeta: Array


def gradient(
    dy: Array,
    xhat: Array,
    rstd: Array,
    count: Array | None,
    mask: Array | None,
    affine: Affine,
    axes: Sequence[int],
    parameter_axes: Sequence[int],
    *,
    correction: int,
    xp: Namespace,
) -> Gradients:
    """The gradient of y = ((x̂·r + d)·s + t)·gamma + beta.

    Args:
        dy: gradient with respect to y; its padded rows are ignored.
        xhat: normalized input, finite at real rows; its padded rows are ignored.
        rstd: 1 / sqrt(var + eps), per channel and group.
        count: real rows behind each statistic; None if the statistics are not of this batch
            (evaluation, frozen) and are constants.
        mask: boolean, broadcastable to x, or None.
        affine: the operations after x̂.
        axes: reduced axes of the statistics.
        parameter_axes: reduced axes of gamma and beta: `axes`, and that of the groups (S12).
        correction: k, the normalizer's variance divides by count - k.
        xp: array namespace.

    Returns:
        Gradients, zero at padded rows; per-channel ones keep reduced axes with size 1.

    Source: S8; Ioffe and Szegedy 2015, section 3, in terms of x̂.
    """
    gamma, _, r, d, s, t = affine
    dy = select(mask, dy, 0.0, xp)
    xhat = select(mask, xhat, 0.0, xp)
    # All per-channel values follow from two sums over dy and x: one pass over both.
    g = times(dy, s)
    total = xp.sum(g, axis=axes, keepdims=True)
    along = xp.sum(g * xhat, axis=axes, keepdims=True)
    dgamma = plus(times(along, r), None if d is None else total * d)
    dbeta = total if s is None else xp.sum(dy, axis=axes, keepdims=True)
    if tuple(parameter_axes) != tuple(axes):
        dgamma = xp.sum(dgamma, axis=parameter_axes, keepdims=True)
        dbeta = xp.sum(dbeta, axis=parameter_axes, keepdims=True)
    if t is not None:
        dgamma = dgamma + xp.sum(dy * t, axis=parameter_axes, keepdims=True)
    weight = r if gamma is None else times(gamma, r)
    g = times(g, weight)
    if count is not None:
        total, along = times(total, weight), times(along, weight)
        g = _project(g, xhat, total, along, count, correction, xp)
    dx = select(mask, xp.broadcast_like(rstd, g) * g, 0.0, xp)
    return Gradients(dx, dgamma, dbeta)


def _project(
    g: Array, xhat: Array, total: Array, along: Array, count: Array, correction: int, xp: Namespace
) -> Array:
    """g less its mean and its part along x̂, since the statistics depend on x."""
    least = xp.where(count > 0, count, 1.0)
    mean = total / least
    if correction:
        divisor = count - float(correction)
        least = xp.where(divisor > 0, divisor, 1.0)
    slope = along / least
    return g - xp.broadcast_like(mean, g) - xhat * xp.broadcast_like(slope, g)
