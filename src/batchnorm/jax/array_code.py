"""A step over one array in array code, which the primitives become where no kernel serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from batchnorm.core.forward import (
    Outcome,
    channel_affine,
    expand_running,
    forward_batch,
    forward_running,
)
from batchnorm.core.gradient import gradient
from batchnorm.core.moments import centre
from batchnorm.core.normalize import Affine, rstd_of_running
from batchnorm.core.running import Running
from batchnorm.jax.checks import working_type
from batchnorm.jax.namespace import XP
from batchnorm.jax.operands import Operands, Static
from batchnorm.kernels.kept import STATISTICS


def step(operands: Operands, static: Static) -> tuple[Array, ...]:
    """y, rows of statistics as in `STATISTICS`, count of each group.

    If the step moves them, the running mean and variance after it too.
    """
    layout = static.layout
    if not static.batch:
        y = _forward_running(operands, static)
        return y.astype(operands.x.dtype), *_running_statistics(operands, static)
    outcome = _forward(operands, static)
    centred = outcome.centred
    real = centred.count > 0
    running = expand_running(_running(operands, static), layout, XP)
    affine = outcome.affine
    rows = _rows(
        static,
        mean=jnp.where(real, centred.mean, running.mean),
        low=jnp.where(real, centred.low, 0.0),
        var=centred.var,
        rstd=jnp.where(real, outcome.rstd, rstd_of_running(running.var, eps=static.eps, xp=XP)),
        affine=affine._replace(
            r=1.0 if affine.r is None else jnp.where(real, affine.r, 1.0),
            d=0.0 if affine.d is None else jnp.where(real, affine.d, 0.0),
        ),
    )
    groups = (1 if layout.groups is None else layout.groups,)
    # The kernels' masks do not vary along channels: all of a group's counts are alike.
    counts = jnp.reshape(centred.count, (*groups, -1))
    count = counts[:, 0] if counts.shape[1] else jnp.zeros(groups, counts.dtype)
    moved: tuple[Array, ...] = ()
    if static.update:
        assert outcome.running is not None
        moved = tuple(jax.lax.stop_gradient(a) for a in outcome.running[:2])
    return outcome.y.astype(operands.x.dtype), rows, count, *moved


def gradients(
    dy: Array, statistics: Array, count: Array, operands: Operands, static: Static
) -> tuple[Array, Array | None, Array | None]:
    """dx, dgamma and dbeta in closed form, from what `step` returned (S8)."""
    layout = static.layout
    work = working_type(operands.x)
    named: dict[str, Array] = {
        name: jnp.reshape(statistics[row], layout.statistics) for name, row in STATISTICS.items()
    }
    kept = layout.kept if layout.groups is None else layout.kept[1:]
    shape = tuple(
        n if layout.groups is not None and a == 1 else 1 for a, n in enumerate(layout.working)
    )
    x: Any = layout.split(operands.inputs().x, XP)
    mask = layout.mask(operands.inputs().mask, XP)
    found = gradient(
        layout.split(dy.astype(work), XP),
        ((x - named["mean"]) - named["low"]) * named["rstd"],
        named["rstd"],
        jnp.reshape(count, shape) if static.batch else None,
        mask,
        Affine(gamma=layout.expand(operands.gamma, XP), r=named["r"], d=named["d"]),
        layout.reduced,
        tuple(a for a in range(len(layout.working)) if a not in kept),
        correction=0,
        xp=XP,
    )
    return (
        layout.merge(found.dx, XP).astype(operands.x.dtype),
        jnp.reshape(found.dgamma, layout.channels),
        jnp.reshape(found.dbeta, layout.channels),
    )


def as_function(
    operands: Operands, static: Static, names: Sequence[str]
) -> Callable[..., tuple[Array, Array, Array]]:
    """y, mean and var as a differentiable function of some operands."""

    def function(*arrays: Array) -> tuple[Array, Array, Array]:
        given = operands._replace(**dict(zip(names, arrays, strict=True)))
        work = working_type(given.x)
        if not static.batch:
            y = _forward_running(given, static)
            nothing = jnp.zeros(static.layout.moments, work)
            return y.astype(given.x.dtype), nothing, nothing
        outcome = _forward(given, static)
        moments = outcome.moments(static.layout, XP)
        return outcome.y.astype(given.x.dtype), moments.mean, moments.var

    return function


def moment_gradient(operands: Operands, static: Static, dmean: Array, dvar: Array) -> Array:
    """The part of dx that comes from gradients of the moments."""
    layout = static.layout
    if not static.batch:
        return jnp.zeros_like(operands.x)

    def moments(x: Array) -> tuple[Array, Array]:
        split = layout.split(x.astype(working_type(x)), XP)
        mask = layout.mask(operands.inputs().mask, XP)
        centred = centre(split, mask, layout.reduced, eps=static.eps, xp=XP)
        return jnp.reshape(centred.mean, layout.moments), jnp.reshape(centred.var, layout.moments)

    _, transpose = jax.vjp(moments, operands.x)
    return transpose((dmean, dvar))[0]


def _forward(operands: Operands, static: Static) -> Outcome:
    running = _running(operands, static)
    options = static.options(operands.limits, operands.decay)
    return forward_batch(
        operands.inputs(), running, static.layout, options, update=static.update, xp=XP
    )


def _forward_running(operands: Operands, static: Static) -> Array:
    running = _running(operands, static)
    options = static.options(operands.limits)
    return forward_running(operands.inputs(), running, static.layout, options, xp=XP)


def _running(operands: Operands, static: Static) -> Running:
    work = working_type(operands.x)
    mean = jnp.zeros(static.layout.channels, work) if operands.mean is None else operands.mean
    var = jnp.ones(static.layout.channels, work) if operands.var is None else operands.var
    return Running(
        mean, var, renorm_mean=operands.renorm_mean, renorm_stddev=operands.renorm_stddev
    )


def _running_statistics(operands: Operands, static: Static) -> tuple[Array, Array]:
    layout = static.layout
    running = expand_running(_running(operands, static), layout, XP)
    rows = _rows(
        static,
        mean=running.mean,
        low=jnp.zeros_like(running.mean),
        var=jnp.zeros_like(running.mean),
        rstd=rstd_of_running(running.var, eps=static.eps, xp=XP),
        affine=channel_affine(operands.inputs(), layout, XP)._replace(r=1.0, d=0.0),
    )
    return rows, jnp.zeros((1,), rows.dtype)


def _rows(static: Static, *, mean: Any, low: Any, var: Any, rstd: Any, affine: Affine) -> Array:
    r, d = affine.r, affine.d
    gamma = 1.0 if affine.gamma is None else affine.gamma
    beta = 0.0 if affine.beta is None else affine.beta
    assert r is not None
    assert d is not None
    named = {
        "mean": mean,
        "low": low,
        "var": var,
        "rstd": rstd,
        "scale": rstd * gamma * r,
        "offset": beta + d * gamma,
        "r": r,
        "d": d,
    }
    shape = static.layout.statistics
    rows = [jnp.broadcast_to(jnp.asarray(named[n], mean.dtype), shape) for n in STATISTICS]
    return jnp.stack([jnp.reshape(row, static.layout.moments) for row in rows])
