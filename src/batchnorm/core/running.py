"""Running statistics and batch renormalization (S9-S12)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from batchnorm.core.config import Options, Renorm
from batchnorm.core.moments import Centred, unbiased_factor
from batchnorm.core.namespace import Array, Namespace

_LEAST_REFERENCE = 2.0**-126  # without eps; a normal number of every type
LONG_RUNNING = 2**30  # steps of a state that has not counted them: as many as forget any start


class Running(NamedTuple):
    """A layer's running statistics, per channel; the last three with renormalization only (S11).

    `batches` counts the training steps that updated something; only the cumulative average
    needs it.
    """

    mean: Array
    var: Array
    batches: Array | None = None
    stddev: Array | None = None
    renorm_mean: Array | None = None
    renorm_stddev: Array | None = None

    def map(self, function: Callable[[Array], Array]) -> Running:
        """The same with `function` applied to every per-channel array; `batches` as it is."""
        arrays = (None if a is None else function(a) for a in self._replace(batches=None))
        return Running(*arrays)._replace(batches=self.batches)


def derive_renorm(mean: Array, var: Array, *, eps: float, xp: Namespace) -> tuple[Array, Array]:
    """Mean and deviation that renormalization starts from, after steps without it (S11).

    The deviation serves as both `stddev` and `renorm_stddev`.
    """
    return mean, xp.sqrt(var + eps)


class BatchAverage(NamedTuple):
    """One step's moments as the running statistics see them: ghost groups averaged (S12)."""

    usable: Array  # boolean: there are real rows, and all moments are finite (S9)
    count: Array  # its weight among other averages: real rows, or groups that are not empty
    centred: Centred
    weight: Array  # of a group in the average
    axis: int | None  # of the groups

    def of(self, a: Array, xp: Namespace) -> Array:
        """The average of a per-group statistic over the groups that are not empty."""
        if self.axis is None:
            return a
        return xp.sum(a * self.weight, axis=(self.axis,), keepdims=True)


def average_groups(centred: Centred, axis: int | None, xp: Namespace) -> BatchAverage:
    """Average the groups along `axis` (None: a single group), and find which may be used."""
    present = centred.count > 0
    finite = xp.isfinite(centred.mean) & xp.isfinite(centred.var)
    if axis is None:
        one = xp.ones_like(centred.var)
        return BatchAverage(present & finite, centred.count, centred, one, None)
    one, zero = xp.ones_like(centred.var), xp.zeros_like(centred.var)
    groups = xp.sum(xp.where(present, one, zero), axis=(axis,), keepdims=True)
    poisoned = xp.sum(xp.where(finite, zero, one), axis=(axis,), keepdims=True)
    weight = xp.where(present, one, zero) / xp.where(groups > 0, groups, 1.0)
    return BatchAverage((groups > 0) & (poisoned == 0), groups, centred, weight, axis)


def renorm_correction(
    average: BatchAverage, running: Running, renorm: Renorm, *, eps: float, xp: Namespace
) -> tuple[Array, Array]:
    """r and d, constants that map batch-normalized values to the moving statistics (S11)."""
    assert running.renorm_stddev is not None
    floor = max(math.sqrt(eps), _LEAST_REFERENCE)
    reference = xp.where(running.renorm_stddev < floor, floor, running.renorm_stddev)
    centred = average.centred
    stddev = xp.sqrt(average.of(centred.var, xp) + eps)
    # Anchor first: at a large offset the difference of the rounded means would be mostly noise.
    offset = average.of((centred.anchor - running.renorm_mean) + centred.shift, xp)
    r = _clip(stddev / reference, renorm.rmin, renorm.rmax, xp)
    d = _clip(offset / reference, -renorm.dmax, renorm.dmax, xp)
    return xp.stop_gradient(r), xp.stop_gradient(d)


def update_running(
    running: Running, average: BatchAverage, options: Options, axes: Sequence[int], xp: Namespace
) -> Running:
    """The running statistics after a training step.

    Args:
        running: before the step, each array broadcastable to the batch's statistics.
        average: the step's moments.
        options: decay, eps, unbiased, renorm.
        axes: every axis of the per-channel arrays, to ask whether any channel was updated.
        xp: array namespace.

    Source: S9, S10, S11, S12.
    """
    usable, centred = average.usable, average.centred
    unbiased = options.unbiased and options.renorm is None
    mean = average.of(centred.mean, xp)
    var = average.of(unbiased_variance(centred, xp) if unbiased else centred.var, xp)
    batches = _count_batch(running.batches, usable, axes, xp)

    def decay_of(decay: Any) -> Array:
        return _decay(decay, batches, options.debias, mean.dtype, xp)

    decay = decay_of(options.decay)

    def move(old: Array, new: Array, decay: Array = decay) -> Array:
        return xp.where(usable, decay * old + (1.0 - decay) * new, old)

    if options.renorm is None:
        return running._replace(
            mean=move(running.mean, mean), var=move(running.var, var), batches=batches
        )
    deviation = xp.sqrt(var + options.eps)
    renorm_decay = decay_of(options.renorm.decay)
    stddev = move(running.stddev, deviation)
    variance = xp.square(stddev) - options.eps
    return Running(
        mean=move(running.mean, mean),
        var=xp.where(usable, xp.where(variance > 0, variance, 0.0), running.var),
        batches=batches,
        stddev=stddev,
        renorm_mean=move(running.renorm_mean, mean, renorm_decay),
        renorm_stddev=move(running.renorm_stddev, deviation, renorm_decay),
    )


def _count_batch(
    batches: Array | None, usable: Array, axes: Sequence[int], xp: Namespace
) -> Array | None:
    """One batch more, if at least one channel was updated."""
    if batches is None:
        return None
    one, zero = xp.ones_like(batches), xp.zeros_like(batches)
    updated = xp.sum(xp.where(usable, one, zero), axis=axes, keepdims=False)
    return batches + xp.where(updated > 0, one, zero)


def _decay(decay: Any, batches: Array | None, debias: bool, dtype: Any, xp: Namespace) -> Array:
    """The weight of the old value at a step, the `batches`-th that updates something (S9, S23).

    In the cumulative average it is 1 - 1/t.
    """
    if decay is not None and not debias:
        return decay
    steps = xp.cast(batches, dtype)
    steps = xp.where(steps > 0, steps, 1.0)
    if decay is None:
        return 1.0 - 1.0 / steps
    return debiased_decay(decay, steps, xp)


class Scalars:
    """Python's numbers as the `xp` of `debiased_decay`."""

    log = staticmethod(math.log)
    expm1 = staticmethod(math.expm1)

    @staticmethod
    def where(condition: bool, a: float, b: float) -> float:
        """a or b."""
        return a if condition else b


def debiased_decay(decay: Any, steps: Any, xp: Any) -> Any:
    """The weight of the old value at step number `steps`, from 1 (S23).

    1 - (1 - decay) / (1 - decay^t), to the last digits also where decay is close to 1. A decay of
    1 stays, since nothing was ever to move.
    """
    if isinstance(decay, numbers.Real):
        if decay in (0.0, 1.0):
            return decay
        log = math.log(decay)
    else:
        log = xp.log(decay)
    forgotten = -xp.expm1(steps * log)  # 1 - decay^t; 0 for an array of 1
    weight = xp.where(forgotten > 0, (1.0 - decay) / xp.where(forgotten > 0, forgotten, 1.0), 0.0)
    return xp.where((steps > 1) | (weight == 0), 1.0 - weight, 0.0)


def unbiased_variance(centred: Centred, xp: Namespace) -> Array:
    """The unbiased variance of each group; biased at count 1 (S10)."""
    return centred.var * unbiased_factor(centred.count, 1, xp)


def _clip(a: Array, low: float, high: float, xp: Namespace) -> Array:
    """`a` within [low, high]; NaN stays NaN."""
    return xp.where(a < low, low, xp.where(a > high, high, a))
