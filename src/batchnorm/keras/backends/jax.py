"""Normalizing on the JAX backend."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from batchnorm.core import config
from batchnorm.core.config import Renorm
from batchnorm.core.layout import Layout
from batchnorm.core.running import Running
from batchnorm.jax.call import Arrays, Settings
from batchnorm.jax.checks import read_values, working_type
from batchnorm.jax.steps import normalize_batch, normalize_running
from batchnorm.keras.adjustment import missing_axes
from batchnorm.keras.backends.shared import refuse_apart, refuse_calls
from batchnorm.keras.call import Call
from batchnorm.keras.masks import find_axes

__all__ = [
    "ACCUMULATES",
    "LIMITS_ARE_STATE",
    "RETRACES",
    "find_graph",
    "find_trace",
    "follows",
    "loses_context",
    "mark_block",
    "mark_rule",
    "normalize",
    "obeys",
    "read_limits",
    "read_values",
    "refuse_kernel",
    "repeats",
    "resolve_training",
]

RETRACES = True
ACCUMULATES = False  # compiled steps hand out new state, and nothing beside it
LIMITS_ARE_STATE = True  # compiled steps take data as state alone
_block = jax.make_user_context(None)  # part of the key of each compiled function
_rule = jax.make_user_context(None)  # as well


def resolve_training(training: Any) -> Any:
    """A bool where `training` has a value now, rather than when a compiled function runs."""
    return training if isinstance(training, jax.core.Tracer) else bool(training)


def refuse_kernel(call: Call, rank: int | None) -> str | None:
    """As `batchnorm.keras.functional.Backend` says."""
    return refuse_calls(call) or refuse_apart(call.axes, rank)


def find_trace() -> Any:
    """As `batchnorm.keras.functional.Backend` says; traces are not told apart."""
    return True if isinstance(jnp.logical_not(False), jax.core.Tracer) else None


def follows(trace: Any) -> bool:
    """As `batchnorm.keras.functional.Backend` says."""
    return trace is not None or find_trace() is None


def repeats(trace: Any) -> bool:
    """False: what JAX repeats are traced programs, not Python."""
    return False


def mark_block(trace: Any) -> AbstractContextManager[Any]:
    """As `batchnorm.keras.functional.Backend` says.

    Functions inside a trace's block are its own, since they may hold its mask. All eager blocks
    share theirs: nothing that is compiled takes an eager block's mask.
    """
    marked: AbstractContextManager[Any] = _block("eager" if trace is None else object())
    return marked


def mark_rule(block: Any) -> AbstractContextManager[Any]:
    """As `batchnorm.keras.functional.Backend` says: functions are compiled for all blocks once."""
    marked: AbstractContextManager[Any] = _rule("keep")
    return marked


def find_graph() -> None:
    """None: functions are compiled again in a block."""
    return


def loses_context() -> bool:
    """As `batchnorm.keras.functional.Backend` says."""
    return False


def obeys(block: Any) -> bool:
    """True: functions that are compiled in a block serve in blocks alone."""
    return True


def read_limits(layer: Any) -> Array | None:
    """As `batchnorm.keras.functional.Backend` says: those that were ever set."""
    return None if layer._limits is None else layer._limits.value


def normalize(
    x: Array, mask: Any, gamma: Any, beta: Any, running: Running, call: Call
) -> tuple[Array, Running | None]:
    """As `batchnorm.keras.functional.Backend` says."""
    mask = None if mask is None else _fit_mask(jnp.asarray(mask), x, call.axes)
    options = call.options
    if options.renorm is not None and call.limits is not None:
        limits = call.limits.astype(working_type(x))
        options = replace(options, renorm=Renorm(options.renorm.decay, *limits))
    settings = Settings(call.owner, call.axes, options, call.fused, call.axis_name)
    arrays = Arrays(x, mask, gamma, beta, running)

    def train() -> tuple[Array, Running]:
        s, t = config.call_adjustment(call.adjustment, tuple(x.shape))
        adjusted = arrays._replace(s=_adjusted("scale", s, x), t=_adjusted("bias", t, x))
        found = normalize_batch(adjusted, settings, update=call.update)
        assert found.running is not None
        return found.y, found.running

    def evaluate() -> tuple[Array, Running]:
        return normalize_running(arrays, settings), running

    if isinstance(call.training, jax.core.Tracer):
        return jax.lax.cond(call.training.astype(bool), train, evaluate)
    return train() if call.training else (evaluate()[0], None)


def _fit_mask(mask: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """A mask of x's rank (S1)."""
    places = find_axes(tuple(mask.shape), Layout(tuple(x.shape), axes))
    sizes = dict(zip(places, mask.shape, strict=True))
    return mask.reshape([sizes.get(a, 1) for a in range(x.ndim)])


def _adjusted(name: str, a: Any, x: Array) -> Array | None:
    if a is None:
        return None
    array = jnp.asarray(a)
    return array.reshape((*(1,) * missing_axes(name, array.shape, x.shape), *array.shape))
