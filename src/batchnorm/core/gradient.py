"""The closed-form gradient (S8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from batchnorm.core.namespace import Array, Namespace, select
from batchnorm.core.normalize import Affine


class Gradients(NamedTuple):
    """Gradients of the loss; `ds` and `dt` still have x's shape, for the caller to sum."""

    dx: Array
    dgamma: Array
    dbeta: Array
    ds: Array
    dt: Array


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
    gamma, _, r, d, s, t = (
        _or(a, default) for a, default in zip(affine, (1, 0, 1, 0, 1, 0), strict=True)
    )
    dy = select(mask, dy, 0.0, xp)
    xhat = select(mask, xhat, 0.0, xp)
    # All per-channel values follow from two sums over dy and x: one pass over both.
    ds = dy if affine.s is None else dy * s
    total = xp.sum(ds, axis=axes, keepdims=True)
    along = xp.sum(ds * xhat, axis=axes, keepdims=True)
    dgamma = xp.sum(along * r + total * d, axis=parameter_axes, keepdims=True)
    dbeta = total if affine.s is None else xp.sum(dy, axis=axes, keepdims=True)
    dbeta = xp.sum(dbeta, axis=parameter_axes, keepdims=True)
    if affine.t is not None:
        dgamma = dgamma + xp.sum(dy * t, axis=parameter_axes, keepdims=True)
    weight = gamma * r
    g = ds * weight
    if count is not None:
        g = _project(g, xhat, total * weight, along * weight, count, correction, xp)
    dx = select(mask, xp.broadcast_like(rstd, g) * g, 0.0, xp)
    return Gradients(dx, dgamma, dbeta, dy * gamma * (xhat * r + d), dy * gamma)


def _project(
    g: Array, xhat: Array, total: Array, along: Array, count: Array, correction: int, xp: Namespace
) -> Array:
    """g less its mean and its part along x̂, since the statistics depend on x."""
    mean = total / xp.where(count > 0, count, 1.0)
    divisor = count - float(correction)
    slope = along / xp.where(divisor > 0, divisor, 1.0)
    return g - xp.broadcast_like(mean, g) - xhat * xp.broadcast_like(slope, g)


def _or(a: Array | None, default: int) -> Array:
    return float(default) if a is None else a
