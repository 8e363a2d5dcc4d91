"""A step with everything around it: checks, the choice of a path, running statistics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchnorm.core.config import Options
from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.forward import forward_batch, forward_running
from batchnorm.core.layout import Layout, make_layout
from batchnorm.core.moments import Moments, centred_from
from batchnorm.core.running import Running, average_groups, update_running
from batchnorm.jax import custom_calls
from batchnorm.jax.call import Call, Operands
from batchnorm.jax.checks import check_channels, check_input, check_mask, working_type
from batchnorm.jax.namespace import XP
from batchnorm.jax.primitives import run_step
from batchnorm.jax.synchronize import Groups, make_merge
from batchnorm.kernels import explanation
from batchnorm.kernels.kept import STATISTICS
from batchnorm.kernels.select import refuse_fused


class Step(NamedTuple):
    """y, the batch's moments, and running statistics after the step if any came in."""

    y: Array
    moments: Moments
    running: Running | None


def normalize_batch(
    x: Any,
    mask: Any,
    scale: Any,
    bias: Any,
    running: Running | None,
    *,
    axis: int | tuple[int, ...],
    options: Options,
    s: Any = None,
    t: Any = None,
    axis_name: Any = None,
    axis_index_groups: Groups = None,
    update: bool = True,
    fused: bool | None = None,
    owner: str,
) -> Step:
    """`batch_norm` with options already validated, for the layers.

    Args:
        running: serves empty channels and renormalization, and is what `Step.running` starts
            from.
        s, t: the adjustment's scale and bias, broadcastable against x, or None (S13).
        update: compute `Step.running`.
    """
    given = _prepare(x, mask, scale, bias, running, axis, options.virtual_batch_size)
    x, layout, operands, _ = given
    merge = make_merge(axis_name, axis_index_groups)
    reason: str | None = explanation.UNFUSED
    if fused is not False:
        reason = _refuse(given)
        if s is not None or t is not None:
            reason = "none takes an adjustment"
        if merge is not None:
            reason = "none synchronizes over a named axis"
        if reason is None:
            explanation.report(owner, explanation.KERNELS, note=custom_calls.NOTE)
            return _by_kernel(given, running, options, update, fused is True, owner)
        if fused:
            raise refuse_fused(reason)
    explanation.report(owner, explanation.ARRAY_CODE, ((explanation.KERNELS, str(reason)),))
    work = working_type(x)
    outcome = forward_batch(
        operands.inputs(s=_cast(s, work), t=_cast(t, work)),
        _before(running, work),
        layout,
        _with_decay_in(work, options),
        merge=merge,
        update=update,
        xp=XP,
    )
    after = running
    if update and running is not None and outcome.running is not None:
        after = _in_type_of(running, outcome.running)
    return Step(_returned(outcome.y, given), outcome.moments, after)


def normalize_running(
    x: Any,
    mask: Any,
    scale: Any,
    bias: Any,
    running: Running,
    *,
    axis: int | tuple[int, ...],
    options: Options,
    fused: bool | None = None,
    owner: str,
) -> Array:
    """`batch_norm_inference` with options already validated, for the layers.

    XLA fuses array code with what is around it, so that kernels are used on demand only.
    """
    given = _prepare(x, mask, scale, bias, running, axis, None)
    layout, operands = given.layout, given.operands
    if fused:
        reason = _refuse(given)
        if reason is not None:
            raise refuse_fused(reason)
        explanation.report(owner, explanation.KERNELS, note=custom_calls.NOTE)
        call = Call(layout, options.eps, False, None, True, owner, ())
        return _returned(run_step(_for_kernel(given), call).y, given)
    reason = "the compiler fuses evaluation with what surrounds it"
    if fused is False:
        reason = explanation.UNFUSED
    explanation.report(owner, explanation.ARRAY_CODE, ((explanation.KERNELS, reason),))
    statistics = Running(operands.mean, operands.var)
    y = forward_running(operands.inputs(), statistics, layout, options, xp=XP)
    return _returned(y, given)


class _Given(NamedTuple):
    """Checked arguments; per-channel arrays are in the working type.

    An x of channel axes alone has got an axis of one row in front, which `shape` lacks.
    """

    x: Array
    layout: Layout
    operands: Operands
    shape: tuple[int, ...]


def _prepare(
    x: Any,
    mask: Any,
    scale: Any,
    bias: Any,
    running: Running | None,
    axis: int | tuple[int, ...],
    size: int | None,
) -> _Given:
    x = check_input(x)
    shape = tuple(x.shape)
    layout = make_layout(shape, axis, size, least_rows=0)
    _check_groups(x, layout)
    work = working_type(x)
    mask = check_mask(mask)
    if mask is not None:
        fitted = layout.mask_shape(tuple(mask.shape))
    if len(layout.channel_axes) == len(shape):
        x = jnp.expand_dims(x, 0)
        layout = Layout((1, *shape), tuple(a + 1 for a in layout.channel_axes))
        mask = None if mask is None else mask.reshape((1, *fitted))

    def channels(name: str, value: Any) -> Array | None:
        return check_channels(name, value, layout, work)

    kept = running or Running(None, None)
    operands = Operands(
        x,
        mask,
        gamma=channels("scale", scale),
        beta=channels("bias", bias),
        mean=channels("running_mean", kept.mean),
        var=channels("running_var", kept.var),
        renorm_mean=channels("renorm_mean", kept.renorm_mean),
        renorm_stddev=channels("renorm_stddev", kept.renorm_stddev),
    )
    return _Given(x, layout, operands, shape)


def _returned(y: Array, given: _Given) -> Array:
    """y in x's own type and shape."""
    y = y.astype(given.x.dtype)
    return y if y.ndim == len(given.shape) else jnp.squeeze(y, 0)


def _explicit_sharding(x: Array) -> tuple[Any, ...]:
    """For each axis of x the mesh axes it is split over, where types tell; else nothing."""
    return tuple(getattr(getattr(jax.typeof(x), "sharding", None), "spec", ()))


def _check_groups(x: Array, layout: Layout) -> None:
    """Raise where jax could not split an explicitly sharded axis 0 into (v, groups) (S12)."""
    names = (*_explicit_sharding(x), None)[0]
    if layout.groups is None or names is None:
        return
    mesh = jax.typeof(x).sharding.mesh
    parts = math.prod(mesh.shape[name] for name in np.atleast_1d(names).tolist())
    size = layout.working[0]
    if size % parts != 0:
        raise ArgumentValueError(
            f"virtual_batch_size must be a multiple of the {parts} parts in which axis 0 "
            f"of x is sharded explicitly over {names!r}; got {size}. Call this inside "
            "jax.sharding.auto_axes, or inside jax.shard_map for groups that are local."
        )


def _refuse(given: _Given) -> str | None:
    """Why no kernel serves these arrays, or None."""
    x, layout, operands, _ = given
    if any(axis is not None for axis in _explicit_sharding(x)):
        return "x is sharded over devices"
    mask = operands.mask
    shape = None if mask is None else layout.mask_shape(tuple(mask.shape))
    return custom_calls.refuse(layout, x.dtype, shape)


def _for_kernel(given: _Given) -> Operands:
    """Operands whose masks the kernels can walk, with constant statistics."""
    layout, operands = given.layout, given.operands
    return operands._replace(
        mask=custom_calls.readable_mask(layout, operands.mask),
        mean=_constant(operands.mean),
        var=_constant(operands.var),
        renorm_mean=_constant(operands.renorm_mean),
        renorm_stddev=_constant(operands.renorm_stddev),
    )


def _by_kernel(
    given: _Given,
    running: Running | None,
    options: Options,
    update: bool,
    demanded: bool,
    owner: str,
) -> Step:
    layout = given.layout
    operands = _for_kernel(given)
    if options.renorm is None:
        operands = operands._replace(renorm_mean=None, renorm_stddev=None)
    call = Call(layout, options.eps, True, options.renorm, demanded, owner, ())
    y, rows, counts = run_step(operands, call)
    high, low, var = (rows[STATISTICS[name]] for name in ("mean", "low", "var"))
    groups = () if layout.groups is None else (layout.groups,)
    counts = counts.reshape((*groups, *(1,) * len(layout.channels)))
    # Empty groups were normalized by other statistics, which are not their moments (S6).
    high, low = (jnp.where(counts > 0, a, 0.0) for a in (high, low))
    moments = Moments(jnp.broadcast_to(counts, layout.moments), high + low, var)
    after = running
    if update and running is not None:
        after = move_statistics(running, moments, options, mean=(high, low))
    return Step(_returned(y, given), moments, after)


def move_statistics(
    running: Running,
    moments: Moments,
    options: Options,
    mean: tuple[Array, Array] | None = None,
) -> Running:
    """Running statistics after a step with these moments (S9-S12).

    `mean` is their mean as a sum of two, which holds more digits.
    """
    grouped = moments.mean.ndim > running.mean.ndim
    high, low = (moments.mean, jnp.zeros_like(moments.mean)) if mean is None else mean
    centred = centred_from(moments.count, high, low, moments.var, XP)
    average = average_groups(centred.map(jax.lax.stop_gradient), 0 if grouped else None, XP)
    before = _before(running, moments.mean.dtype)
    assert before is not None
    axes = tuple(range(moments.mean.ndim))
    options = _with_decay_in(moments.mean.dtype, options)
    return _in_type_of(running, update_running(before, average, options, axes, XP))


def _constant(a: Array | None) -> Array | None:
    return None if a is None else jax.lax.stop_gradient(a)


def _cast(a: Any, dtype: Any) -> Array | None:
    return None if a is None else jnp.asarray(a).astype(dtype)


def _with_decay_in(dtype: Any, options: Options) -> Options:
    """The options, with a decay that is an array in the working type."""
    if not isinstance(options.decay, jax.Array):
        return options
    return replace(options, decay=options.decay.astype(dtype))


def _before(running: Running | None, dtype: Any) -> Running | None:
    """The statistics in the working type, constant to differentiation."""
    if running is None:
        return None
    return running.map(lambda a: jax.lax.stop_gradient(jnp.asarray(a).astype(dtype)))


def _in_type_of(old: Running, new: Running) -> Running:
    """`new` as it is stored."""
    pairs = zip(old, new, strict=True)
    found = (None if a is None else b.astype(a.dtype).reshape(a.shape) for a, b in pairs)
    return Running(*found)
