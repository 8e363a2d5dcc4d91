"""The ordered list of ways through a call, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from batchnorm.core.config import Options, Renorm
from batchnorm.core.declaration import refuse_options
from batchnorm.core.forward import forward_batch, forward_running
from batchnorm.core.layout import count_values
from batchnorm.core.running import Running
from batchnorm.jax import custom_calls
from batchnorm.jax.call import Call
from batchnorm.jax.checks import split_axes
from batchnorm.jax.moments import APART, Moments
from batchnorm.jax.namespace import XP
from batchnorm.jax.operands import Operands, Static
from batchnorm.jax.options import OPTIONS
from batchnorm.jax.primitives import Stepped, run_step
from batchnorm.jax.running import arrays_in, constant_in, move_statistics, stored_like
from batchnorm.kernels import explanation
from batchnorm.kernels.kept import STATISTICS
from batchnorm.kernels.select import find_way


class Step(NamedTuple):
    """y, the batch's moments, and running statistics after the step if any came in."""

    y: Array
    moments: Moments
    running: Running | None


class Way(NamedTuple):
    """A way through a call.

    Attributes:
        name: as people read it.
        refuse: the reason for not serving a call, or None.
        train: the step of a training call that it does not refuse.
        evaluate: y of an evaluation call that it does not refuse.
        note: what may change the way when a program is lowered, or nothing.
    """

    name: str
    refuse: Callable[[Call], str | None]
    train: Callable[[Call], Step]
    evaluate: Callable[[Call], Array]
    note: str = ""


def refuse(way: Way, call: Call) -> str | None:
    """The reason of a way for not serving a call, or None: its own, or what `fused` says."""
    if way is ARRAY_CODE:
        return "fused=True demands a kernel" if call.demanded else None
    return explanation.UNFUSED if call.settings.fused is False else way.refuse(call)


def choose(call: Call) -> Way:
    """The first way that serves the call.

    Raises:
        ValueError: fused=True, and no kernel serves the call.
    """
    way, refused = find_way(WAYS, lambda way: refuse(way, call))
    explanation.report(call.owner, way.name, refused, way.note)
    return way


def _refuse_kernels(call: Call) -> str | None:
    layout, (x, mask, *_) = call.layout, call.operands
    if not call.training and not call.demanded:
        return "the compiler fuses evaluation with what surrounds it"
    if call.merge is not None:
        return "none synchronizes over a named axis"
    if call.adjusted:
        return "none takes an adjustment"
    if any(axis is not None for axis in split_axes(x)):
        return "x is sharded over devices"
    shape = None if mask is None else layout.mask_shape(tuple(mask.shape))
    return refuse_options(OPTIONS, call.options) or custom_calls.refuse(layout, x.dtype, shape)


def _train_by_kernels(call: Call) -> Step:
    options, after = call.options, call.arrays.running
    operands = _for_kernels(call)
    if options.renorm is None:
        operands = operands._replace(renorm_mean=None, renorm_stddev=None)
    else:
        operands = operands._replace(limits=_limits(options.renorm, call.working_type))
    before = after if call.update else None
    inside = before is not None and _moves_inside(options, before)
    if inside:
        decay = jnp.asarray(options.decay).astype(call.working_type)
        operands = operands._replace(decay=jax.lax.stop_gradient(decay))
    found = run_step(operands, _static(call)._replace(update=inside))
    moments = _moments_of(call, found)
    if inside and before is not None:
        after = stored_like(before, before._replace(mean=found.mean, var=found.var))
    elif before is not None:
        after = move_statistics(before, moments, options)
    return Step(call.returned(found.y), moments, after)


def _moves_inside(options: Options, running: Running) -> bool:
    """True if the running statistics are mean and variance, and nothing counts the steps.

    The kernel then moves them in the call that normalizes. Two programs of XLA's less: where it has
    a thousand operations of its own, it hands the whole program to another thread, which takes
    longer than a small step.
    """
    return options.renorm is None and running.batches is None


def _moments_of(call: Call, found: Stepped) -> Moments:
    layout = call.layout
    high, low, var = (found.statistics[STATISTICS[name]] for name in ("mean", "low", "var"))
    groups = () if layout.groups is None else (layout.groups,)
    rows = count_values(layout)
    if call.operands.mask is None and rows > 0:
        counts = jnp.full(layout.moments, rows, call.working_type)  # a constant to the compiler
    else:
        counts = found.counts.reshape((*groups, *(1,) * len(layout.channels)))
        # Empty groups were normalized by other statistics, which are not their moments (S6).
        high, low = (jnp.where(counts > 0, a, 0.0) for a in (high, low))
        counts = jnp.broadcast_to(counts, layout.moments)
    return Moments(counts, high, var, jax.lax.stop_gradient(low), _kind(call))


def _evaluate_by_kernels(call: Call) -> Array:
    return call.returned(run_step(_for_kernels(call), _static(call)).y)


def _static(call: Call) -> Static:
    options = call.options
    return Static(
        call.layout,
        options.eps,
        call.training,
        call.training and options.renorm is not None,
        options.padded_output,
        call.demanded,
        call.owner,
    )


def _for_kernels(call: Call) -> Operands:
    """Operands whose masks the kernels can walk, with constant statistics."""
    operands = call.operands
    return operands._replace(
        mask=custom_calls.readable_mask(call.layout, operands.mask),
        mean=_constant(operands.mean),
        var=_constant(operands.var),
        renorm_mean=_constant(operands.renorm_mean),
        renorm_stddev=_constant(operands.renorm_stddev),
    )


def _limits(renorm: Renorm, dtype: Any) -> Array:
    """Renormalization's limits as an operand."""
    limits = (renorm.rmin, renorm.rmax, renorm.dmax)
    return jax.lax.stop_gradient(jnp.stack([jnp.asarray(a).astype(dtype) for a in limits]))


def _kind(call: Call) -> str | None:
    return None if call.layout.groups is None else APART


def _constant(a: Array | None) -> Array | None:
    return None if a is None else jax.lax.stop_gradient(a)


def _train_by_arrays(call: Call) -> Step:
    arrays, work, before = call.arrays, call.working_type, call.arrays.running
    outcome = forward_batch(
        call.operands.inputs(s=_cast(arrays.s, work), t=_cast(arrays.t, work)),
        None if before is None else constant_in(work, before),
        call.layout,
        arrays_in(work, call.options),
        merge=call.merge,
        update=call.update,
        xp=XP,
    )
    after = before
    if call.update and before is not None and outcome.running is not None:
        after = stored_like(before, outcome.running)
    moments = outcome.moments(call.layout, XP)
    low = jax.lax.stop_gradient(jnp.reshape(outcome.found.low, moments.mean.shape))
    return Step(call.returned(outcome.y), Moments(*moments, low, _kind(call)), after)


def _evaluate_by_arrays(call: Call) -> Array:
    operands = call.operands
    statistics = Running(operands.mean, operands.var)
    y = forward_running(operands.inputs(), statistics, call.layout, call.options, xp=XP)
    return call.returned(y)


def _cast(a: Any, dtype: Any) -> Array | None:
    return None if a is None else jnp.asarray(a).astype(dtype)


KERNELS = Way(
    explanation.KERNELS,
    _refuse_kernels,
    _train_by_kernels,
    _evaluate_by_kernels,
    note=custom_calls.NOTE,
)
ARRAY_CODE = Way(explanation.ARRAY_CODE, lambda call: None, _train_by_arrays, _evaluate_by_arrays)
WAYS = (KERNELS, ARRAY_CODE)
