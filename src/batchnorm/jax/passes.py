"""Several forward passes of an nnx model as one step of its statistics (S21)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from batchnorm.core.config import Options, Renorm
from batchnorm.core.conversion import describe_foreign
from batchnorm.core.errors import (
    ArgumentRuntimeError,
    ArgumentTypeError,
    ArgumentValueError,
    naming,
)
from batchnorm.core.running import Running
from batchnorm.jax.call import make_settings
from batchnorm.jax.layers import BatchNorm
from batchnorm.jax.moments import Moments
from batchnorm.jax.running import move_statistics
from batchnorm.jax.state import read_running, write_running
from batchnorm.jax.variables import PassStatistics

__all__ = ["accumulate_statistics"]


@contextmanager
def accumulate_statistics(model: nnx.Module) -> Iterator[None]:
    """The training passes of `model` in the block are one step of its running statistics (S21).

    For gradients that are accumulated over several passes. Each pass is normalized by its own
    moments; at the end of the block the running statistics move once, by the moments of all passes
    merged by count, as if their rows had been one batch. Renormalization compares every pass with
    the values from before the first.

    The block may stand inside of `nnx.jit`, or around calls of compiled functions that take the
    model: inside it, layers have one variable more, `passes`, so that these compile once for it.

    Args:
        model: a `BatchNorm`, or a model that holds some, the same object that runs in the block.

    Raises:
        TypeError: not a module.
        ValueError: no `BatchNorm` in it; one that is not initialized, or stacked along other than
            leading axes.
        RuntimeError: one is in such a block already.

    An exception in the block leaves the statistics as they were.

    >>> layer = BatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0))
    >>> with accumulate_statistics(layer):
    ...     for x in (jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])):
    ...         y = layer(x)
    >>> layer.mean[...].tolist(), layer.var[...].tolist()
    ([4.0], [5.0])
    """
    with naming("accumulate_statistics"):
        layers = _find_layers(model)
    for layer in layers:
        stack, sizes = _shape_of(layer)
        # As wide as jax has it: a float64 x may meet float32 statistics.
        zeros = jnp.zeros((*stack, 4, *sizes), jax.dtypes.canonicalize_dtype(jnp.float64))
        layer.passes = PassStatistics(zeros)
    try:
        yield
        moved = [_step(layer) for layer in layers]
    finally:
        for layer in layers:
            del layer.passes
    for layer, running in zip(layers, moved, strict=True):
        write_running(layer, running)


def _find_layers(model: Any) -> list[BatchNorm]:
    if not isinstance(model, nnx.Module):
        raise ArgumentTypeError(f"model must be a flax.nnx.Module; got {type(model).__name__}.")
    found, foreign = [], []
    for path, layer in nnx.iter_modules(model):
        name = ".".join(map(str, path)) or "the model"
        if not isinstance(layer, BatchNorm):
            foreign += [name] * isinstance(layer, nnx.BatchNorm)
            continue
        if not layer.initialized:
            raise ArgumentValueError(
                f"layers must be initialized; {name} is not. Call layer.init(key, x) first."
            )
        if layer.passes is not None:
            raise ArgumentRuntimeError(
                f"blocks cannot be nested; {name} accumulates already. Leave the outer block first."
            )
        stack, sizes = _shape_of(layer)
        if layer.mean[...].shape != (*stack, *sizes):
            raise ArgumentValueError(
                f"layers must be stacked along leading axes; {name} has "
                f"num_features={layer.num_features} and a mean of shape {layer.mean[...].shape}."
            )
        found.append(layer)
    if not found:
        raise ArgumentValueError(
            "model must hold a batchnorm.jax.BatchNorm; got none. convert_batchnorm(model) makes "
            "them of flax's."
        )
    if foreign:
        warnings.warn(
            f"accumulate_statistics: {describe_foreign(foreign, 'flax')}",
            stacklevel=4,  # the `with` statement
        )
    return found


def _shape_of(layer: BatchNorm) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The leading axes of stacked layers, and the sizes of channel axes."""
    sizes = layer.num_features
    sizes = sizes if isinstance(sizes, tuple) else (int(sizes or 0),)
    return layer.mean[...].shape[: -len(sizes)], sizes


def _step(layer: BatchNorm) -> Running:
    """The running statistics after a step of all passes."""
    options = make_settings(type(layer).__name__, layer._read, training=True).options
    renorm = None if layer.renorm is None else Renorm(layer.renorm.decay)
    assert layer.passes is not None
    return _move(
        layer.passes[...],
        read_running(layer),
        layer.momentum[...],
        options=replace(options, decay=None, renorm=renorm),
        stacked=len(_shape_of(layer)[0]),
    )


@partial(jax.jit, static_argnames=("options", "stacked"))
def _move(
    passes: Array, running: Running, decay: Array, *, options: Options, stacked: int
) -> Running:
    def move(passes: Array, running: Running, decay: Array) -> Running:
        return move_statistics(running, Moments(*passes), replace(options, decay=decay))

    for _ in range(stacked):
        move = jax.vmap(move)
    return move(passes, running, decay)
