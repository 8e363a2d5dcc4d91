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


def move_statistics(running: Running, moments: Moments, options: Options) -> Running:
    """Running statistics after a step with these moments (S9-S12)."""
    grouped = moments.mean.ndim > running.mean.ndim
    centred = centred_from(*moments[:2], jnp.zeros_like(moments.mean), moments.var, XP)
    average = average_groups(centred.map(jax.lax.stop_gradient), 0 if grouped else None, XP)
    dtype = moments.mean.dtype
    axes = tuple(range(moments.mean.ndim))
    after = update_running(
        constant_in(dtype, running), average, arrays_in(dtype, options), axes, XP
    )
    return stored_like(running, after)


def constant_in(dtype: Any, running: Running) -> Running:
    """The statistics in the working type, constant to differentiation."""
    return running.map(lambda a: jax.lax.stop_gradient(jnp.asarray(a).astype(dtype)))


def arrays_in(dtype: Any, options: Options) -> Options:
    """The options, with those that are arrays in the working type."""

    def cast(value: Any) -> Any:
        return value.astype(dtype) if isinstance(value, Array) else value

    if (renorm := options.renorm) is not None:
        limits = {name: cast(getattr(renorm, name)) for name in ("rmin", "rmax", "dmax")}
        renorm = replace(renorm, **limits)
    return replace(options, decay=cast(options.decay), renorm=renorm)


def stored_like(old: Running, new: Running) -> Running:
    """`new` in the types and shapes of `old`."""
    pairs = zip(old, new, strict=True)
    found = (None if a is None else b.astype(a.dtype).reshape(a.shape) for a, b in pairs)
    return Running(*found)
