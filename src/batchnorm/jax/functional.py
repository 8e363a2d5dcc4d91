"""Batch normalization as pure functions of arrays, for any JAX library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, export

from batchnorm.core.errors import names_errors
from batchnorm.core.layout import make_layout
from batchnorm.core.running import Running
from batchnorm.jax.call import Arrays, check_settings
from batchnorm.jax.moments import Moments
from batchnorm.jax.running import move_statistics
from batchnorm.jax.steps import normalize_batch, normalize_running
from batchnorm.jax.synchronize import Groups

__all__ = [
    "RenormStatistics",
    "RunningStatistics",
    "batch_norm",
    "batch_norm_inference",
    "init_running",
    "update_running",
]


class RenormStatistics(NamedTuple):
    """Statistics that batch renormalization compares with, each per channel (S11)."""

    mean: Array
    stddev: Array


class RunningStatistics(NamedTuple):
    """Statistics of a layer, each per channel (S9); read them by name, since options add fields.

    Args:
        mean: running mean.
        var: running variance.
        stddev: moving standard deviation, with renormalization (S11).
        renorm_mean: statistic that renormalization compares with.
        renorm_stddev: the same.
        steps: int32 scalar, the number of steps that moved something; with it `update_running`
            debiases (S23). 2**30 for statistics whose steps nobody has counted.
    """

    mean: Array
    var: Array
    stddev: Array | None = None
    renorm_mean: Array | None = None
    renorm_stddev: Array | None = None
    steps: Array | None = None


for _fields in (RenormStatistics, RunningStatistics):
    # Exported programs may take and return them.
    export.register_namedtuple_serialization(
        _fields, serialized_name=f"batchnorm.{_fields.__name__}"
    )


@names_errors("batch_norm")
def batch_norm(
    x: Any,
    scale: Any = None,
    bias: Any = None,
    *,
    mask: Any = None,
    axis: int | tuple[int, ...] = -1,
    epsilon: float = 1e-5,
    axis_name: Any = None,
    axis_index_groups: Groups = None,
    virtual_batch_size: int | None = None,
    running_mean: Any = None,
    running_var: Any = None,
    renorm: RenormStatistics | None = None,
    renorm_clipping: Mapping[str, Any] | None = None,
    padded_output: str = "normalize",
    fused: bool | None = None,
) -> tuple[Array, Moments]:
    """Normalize x by its own statistics, those of real rows only (training).

    Args:
        x: float16, bfloat16, float32 or float64, of any shape with `axis`; `(N, ..., C)` by
            default. Of shape `(C,)` it is one row, as inside `jax.vmap` over examples.
        scale: gamma, `(C,)` (several axes: their sizes in increasing order of axis, like
            `(A, B)`), or None for 1.
        bias: beta, like scale, or None for 0.
        mask: boolean, or integers of 1 and 0, for real rows and padding: x's shape without its
            channel axes, a prefix of that such as `(N,)`, or x's rank with sizes of x or 1, such
            as `(N, L, 1)` (S1). Traced integers count as real where they are not 0.
        axis: channel axis or axes, in any order.
        epsilon: added to the variance, at least 0.
        axis_name: named axis (of shard_map, pmap or vmap), or tuple of them, over whose devices
            statistics are merged by count (S14). Under plain jit with sharded arrays statistics
            are global without it.
        axis_index_groups: lists of indices along `axis_name`, each index in one of them;
            statistics stay within a group.
        virtual_batch_size: samples of one ghost batch, which must divide N (S12).
        running_mean: `(C,)`; serves channels without real rows only (S6). None: 0.
        running_var: the same; None: 1.
        renorm: statistics that renormalization compares with; asks for it (S11).
        renorm_clipping: any of "rmin", "rmax", "dmax"; missing ones are 0, ∞, ∞. Scalar arrays,
            traced ones too, are data: a schedule compiles once.
        padded_output: "normalize" padded rows of y like real ones, or "zero" them (S4).
        fused: None takes the compiled kernels where they apply (one CPU device, no vmap, no
            named axis, no forward mode), True demands them, False is plain array code.

    Returns:
        y: x's shape and type; padded rows are constants to differentiation, normalized or 0.
        Moments: count, mean and biased variance, each `(C,)`, float32 (float64 for a float64
            x); with ghost batches each has a leading axis of groups, those of all devices of a
            named axis (which are constants to differentiation). `update_running` takes them, and
            `merge_moments` those of several passes.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or options that do not fit, fused=True where no kernel serves.
        NameError: `axis_name` is not bound.

    Source: S1-S8, S11, S12, S14, S16; Ioffe and Szegedy 2015, algorithm 1.

    >>> x = jnp.array([[1.0], [3.0], [99.0]])
    >>> y, moments = batch_norm(x, mask=jnp.array([True, True, False]), epsilon=0.0)
    >>> y.ravel().tolist(), moments.mean.tolist()
    ([-1.0, 1.0, 97.0], [2.0])
    """
    given = locals() | {"renorm": renorm is not None, "renorm_momentum": 1.0}
    settings = check_settings("batch_norm", given, training=True)
    running = None
    if running_mean is not None or running_var is not None or renorm is not None:
        running = _running_of(x, axis, running_mean, running_var, renorm)
    arrays = Arrays(x, mask, scale, bias, running)
    y, moments, _ = normalize_batch(arrays, settings, update=False)
    return y, moments


@names_errors("batch_norm_inference")
def batch_norm_inference(
    x: Any,
    mean: Any,
    var: Any,
    scale: Any = None,
    bias: Any = None,
    *,
    mask: Any = None,
    axis: int | tuple[int, ...] = -1,
    epsilon: float = 1e-5,
    padded_output: str = "normalize",
) -> Array:
    """Normalize x by given statistics (evaluation).

    Array code always: XLA fuses it with its neighbours.

    Args:
        x: as in `batch_norm`.
        mean: `(C,)`.
        var: `(C,)`.
        scale: gamma, `(C,)`, or None for 1.
        bias: beta, `(C,)`, or None for 0.
        mask: as in `batch_norm`; it matters to gradients, and where padded rows are zeroed.
        axis: channel axis or axes.
        epsilon: added to the variance, at least 0.
        padded_output: as in `batch_norm`.

    Returns:
        y, of x's shape and type.

    Raises:
        TypeError, ValueError: as `batch_norm`.

    Source: S3, S4, S8, S15.
    """
    settings = check_settings("batch_norm_inference", locals(), training=False)
    running = Running(jnp.asarray(mean), jnp.asarray(var))
    return normalize_running(Arrays(x, mask, scale, bias, running), settings)


def init_running(
    shape: int | tuple[int, ...],
    *,
    dtype: Any = jnp.float32,
    renorm: bool = False,
    debias: bool = False,
) -> RunningStatistics:
    """Running statistics before the first step: mean 0, variance and deviations 1.

    Args:
        shape: C, or the sizes of several channel axes.
        dtype: float32 or float64 (S16).
        renorm: True to keep renormalization's three as well.
        debias: True to count the steps, so that the start is forgotten at once (S23).
    """
    zeros, ones = jnp.zeros(shape, dtype), jnp.ones(shape, dtype)
    found = RunningStatistics(zeros, ones)
    if renorm:
        found = found._replace(stddev=ones, renorm_mean=zeros, renorm_stddev=ones)
    return found._replace(steps=jnp.zeros((), jnp.int32)) if debias else found


@names_errors("update_running")
def update_running(
    running: RunningStatistics,
    moments: Moments,
    *,
    momentum: Any = 0.99,
    epsilon: float = 1e-5,
    renorm_momentum: float = 0.99,
) -> RunningStatistics:
    """Running statistics after a training step.

    Args:
        running: before it. With renormalization's three fields it moves these too, and keeps the
            variance through a moving standard deviation (S11). With `steps` it counts a step that
            moves a channel, and weighs the batch as `debias` says: after the first one the
            statistics are that batch's (S23).
        moments: what `batch_norm` or `merge_moments` returned; of groups, their average counts
            (S12).
        momentum: weight of the *old* value, between 0 and 1, a number or an array.
        epsilon: that of the step; renormalization only.
        renorm_momentum: weight of the old value in renorm_mean and renorm_stddev.

    Returns:
        RunningStatistics. Channels without real rows, or with moments that are not finite, keep
        their values (S9); gradients do not flow through.

    Source: S9-S12, S21, S23. The biased variance is kept, as everywhere in JAX (S10).
    """
    given: dict[str, Any] = {"epsilon": epsilon, "debias": running.steps is not None}
    if running.stddev is not None:
        given |= {"renorm": True, "renorm_momentum": renorm_momentum}
    as_array = isinstance(momentum, jax.Array)
    if not as_array:
        given["momentum"] = momentum
    options = check_settings("update_running", given, training=True).options
    if as_array:
        options = replace(options, decay=momentum)
    before = Running(running.mean, running.var, running.steps, *running[2:5])
    found = move_statistics(before, moments, options)
    return RunningStatistics(found.mean, found.var, *found[3:], found.batches)


def _running_of(x: Any, axis: Any, mean: Any, var: Any, renorm: RenormStatistics | None) -> Running:
    layout = make_layout(jnp.shape(x), axis, least_rows=0)
    mean = jnp.zeros(layout.channels, jnp.float32) if mean is None else jnp.asarray(mean)
    var = jnp.ones(layout.channels, jnp.float32) if var is None else jnp.asarray(var)
    if renorm is None:
        return Running(mean, var)
    return Running(
        mean,
        var,
        None,
        jnp.asarray(renorm.stddev),
        jnp.asarray(renorm.mean),
        jnp.asarray(renorm.stddev),
    )
