"""Running statistics around a step: as they come in, and as they are stored again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from batchnorm.core.config import Options
from batchnorm.core.moments import Moments, centred_from
from batchnorm.core.running import Running, average_groups, update_running
from batchnorm.jax.namespace import XP


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
    dtype = moments.mean.dtype
    axes = tuple(range(moments.mean.ndim))
    after = update_running(
        constant_in(dtype, running), average, with_decay_in(dtype, options), axes, XP
    )
    return stored_like(running, after)


def constant_in(dtype: Any, running: Running) -> Running:
    """The statistics in the working type, constant to differentiation."""
    return running.map(lambda a: jax.lax.stop_gradient(jnp.asarray(a).astype(dtype)))


def with_decay_in(dtype: Any, options: Options) -> Options:
    """The options, with a decay that is an array in the working type."""
    if not isinstance(options.decay, jax.Array):
        return options
    return replace(options, decay=options.decay.astype(dtype))


def stored_like(old: Running, new: Running) -> Running:
    """`new` in the types and shapes of `old`."""
    pairs = zip(old, new, strict=True)
    found = (None if a is None else b.astype(a.dtype).reshape(a.shape) for a, b in pairs)
    return Running(*found)
