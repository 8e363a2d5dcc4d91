"""Loading of states into nnx layers, and models that hold some."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from batchnorm.core.running import LONG_RUNNING, derive_renorm
from batchnorm.jax.layers import BatchNorm
from batchnorm.jax.namespace import XP

__all__ = ["load_state"]


def load_state(module: nnx.Module, state: Any) -> None:
    """Take over a state, flax's own too, in place.

    Args:
        module: a `BatchNorm`, or a model that holds some.
        state: an `nnx.State` or nested dict of variables or arrays. What it lacks, such as the
            momentum, keeps its value; renormalization's statistics are derived from mean and
            variance where it lacks them (S11), and statistics without a counter of steps count as
            long-running (S23).
    """
    state = state if isinstance(state, nnx.State) else nnx.State(state)
    nnx.update(module, state)
    given = {tuple(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    for path, layer in nnx.iter_modules(module):
        at = tuple(map(str, path))
        if not isinstance(layer, BatchNorm) or not layer.initialized or (*at, "var") not in given:
            continue
        if layer.renorm is not None and (*at, "stddev") not in given:
            mean, stddev = derive_renorm(layer.mean[...], layer.var[...], eps=layer.epsilon, xp=XP)
            layer.stddev[...] = layer.renorm_stddev[...] = stddev
            layer.renorm_mean[...] = mean
        if layer.debias and (*at, "steps") not in given:
            layer.steps[...] = jnp.full_like(layer.steps[...], LONG_RUNNING)
