"""The variables of the nnx layer: made, checked against an input, and read for a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.layout import normalize_axis
from batchnorm.core.running import Running
from batchnorm.jax.call import Arrays
from batchnorm.jax.checks import wide_type
from batchnorm.jax.moments import AVERAGED, Moments, merge_moments

RENORM = ("stddev", "renorm_mean", "renorm_stddev")


def make_variables(layer: Any, shape: tuple[int, ...], rngs: Any) -> dict[str, Any]:
    """Statistics and parameters by name; parameters that the layer does not learn are None."""
    keys, wide = _make_keys(rngs), wide_type(layer.param_dtype)
    found: dict[str, Any] = {
        "mean": nnx.BatchStat(jnp.zeros(shape, wide)),
        "var": nnx.BatchStat(jnp.ones(shape, wide)),
    }
    for name in ("scale", "bias"):
        found[name] = nnx.data(None)
        if getattr(layer, f"use_{name}"):
            value = getattr(layer, f"{name}_init")(keys(), shape, layer.param_dtype)
            found[name] = nnx.Param(value, **dict(getattr(layer, f"{name}_metadata")))
    if layer.renorm is not None:
        for name in RENORM:
            start = jnp.zeros if name == "renorm_mean" else jnp.ones
            found[name] = nnx.BatchStat(start(shape, wide))
    if layer.debias:
        found["steps"] = nnx.BatchStat(jnp.zeros((), jnp.int32))
    return found


def _make_keys(rngs: Any) -> Callable[[], Any]:
    """A source of keys: flax's stream of parameters, or splits of a key or seed."""
    if isinstance(rngs, nnx.Rngs):
        return rngs.params
    if isinstance(rngs, int):
        rngs = jax.random.key(rngs)
    return nnx.Rngs(rngs).params


def sizes_of(axis: int | tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of an input's channel axes."""
    return tuple(shape[a] for a in normalize_axis(axis, len(shape), least_rows=0))


def check_sizes(layer: Any, x: Array) -> None:
    """Raise if x has other channels than the layer."""
    found = sizes_of(layer.axis, x.shape)
    if found != layer.mean[...].shape:
        raise ArgumentValueError(
            f"x must have num_features={layer.num_features} along axis {layer.axis}; "
            f"got {found if len(found) > 1 else found[0]} in shape {tuple(x.shape)}."
        )


def read_arrays(layer: Any, x: Array, mask: Any, training: bool) -> tuple[Arrays, Any]:
    """The arrays of a call, and the type of y."""
    mean, var = layer.mean[...], layer.var[...]
    scale = None if layer.scale is None else layer.scale[...]
    bias = None if layer.bias is None else layer.bias[...]
    dtype = x.dtype if layer.dtype is None else layer.dtype
    if layer.promote_dtype is not None:
        x, _, _, scale, bias = layer.promote_dtype((x, mean, var, scale, bias), dtype=layer.dtype)
        dtype = x.dtype
    elif dtype != x.dtype:
        x = x.astype(wide_type(x.dtype, dtype))
    running = read_running(layer) if training else Running(mean, var)
    return Arrays(x, mask, scale, bias, running), dtype


def read_running(layer: Any) -> Running:
    """The statistics that a training step moves."""
    return Running(**{field: variable[...] for field, variable in _held(layer).items()})


def write_running(layer: Any, running: Running | None) -> None:
    """The statistics after a step."""
    for field, variable in _held(layer).items():
        variable[...] = getattr(running, field)


def _held(layer: Any) -> dict[str, nnx.BatchStat]:
    """The variables that a training step moves, by the core's names."""
    names = {"mean": "mean", "var": "var"}
    if layer.debias:
        names["batches"] = "steps"
    if layer.renorm is not None:
        names |= {name: name for name in RENORM}
    return {field: getattr(layer, name) for field, name in names.items()}


def add_pass(passes: nnx.BatchStat, moments: Moments) -> None:
    """Merge a pass into those of its step so far (S21)."""
    passes[...] = _merge(passes[...], moments)


@jax.jit  # one call instead of dozens where nothing else compiles the model
def _merge(passes: Array, moments: Moments) -> Array:
    before = Moments(*passes)._replace(groups=moments.groups and AVERAGED)
    found = merge_moments([before, moments]).map(jax.lax.stop_gradient)
    return jnp.stack([*found, found.low]).astype(passes.dtype)
