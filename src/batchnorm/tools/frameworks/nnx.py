"""flax nnx's batch norm, and this library's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from batchnorm.tools.arrays import flatten, odd_shape
from batchnorm.tools.fitting import check_finite_casts, fit
from batchnorm.tools.state import BatchNormState, RenormState

_NAMES = {"gamma": "scale", "beta": "bias", "mean": "mean", "var": "var"}
_RENORM = ("stddev", "renorm_mean", "renorm_stddev")


def owns(model: Any) -> bool:
    """Whether it is an nnx module."""
    return isinstance(model, nnx.Module)


def is_batch_norm(layer: Any) -> bool:
    """Whether `take_state` reads it."""
    return isinstance(layer, nnx.BatchNorm) or _is_ours(layer)


def find(model: Any) -> list[tuple[str, Any]]:
    """Names and batch norms, each once, in the order of definition.

    flax's own iteration sorts attributes by name, which mixes up the layers of a model.
    """
    return [(name, layer) for name, layer in _walk(model, "", set()) if is_batch_norm(layer)]


def take_state(layer: Any, name: str = "") -> BatchNormState:
    """The layer's state, copied."""
    if _is_ours(layer) and not layer.initialized:
        raise ValueError(
            f"layer {name!r} ({_kind(layer)}) is not initialized; call layer.init(key, x) first."
        )
    mean = np.asarray(layer.mean[...])
    renorm = None
    if getattr(layer, "renorm", None) is not None:
        renorm = RenormState(*(flatten(getattr(layer, n)[...]) for n in _RENORM))  # type: ignore[arg-type]
    return BatchNormState(
        name=name,
        kind=_kind(layer),
        mean=flatten(mean),
        var=flatten(layer.var[...]),
        gamma=_read(layer.scale),
        beta=_read(layer.bias),
        variance="biased",
        eps=float(layer.epsilon),
        decay=_momentum(layer),
        renorm=renorm,
        shape=odd_shape(mean.shape),
        stored=mean.dtype.name,
    )


def put_state(layer: Any, state: BatchNormState) -> None:
    """Write the state into the layer, in place, after checking all of it."""
    current = take_state(layer, state.name)
    state = fit(state, current)
    pairs = [(name, getattr(layer, ours), getattr(state, name)) for name, ours in _NAMES.items()]
    if state.renorm is not None:
        kept = (state.renorm.moving_stddev, state.renorm.renorm_mean, state.renorm.renorm_stddev)
        pairs += [(n, getattr(layer, n), a) for n, a in zip(_RENORM, kept, strict=True)]
    writes = [
        (name, variable, array, jnp.asarray(array, variable[...].dtype))
        for name, variable, array in pairs
        if variable is not None and array is not None
    ]
    owner = f"layer {state.name!r} ({current.kind})"
    check_finite_casts(owner, [(name, array, cast) for name, _, array, cast in writes])
    for _, variable, _, cast in writes:
        variable[...] = cast
    if state.eps is not None:
        layer.epsilon = state.eps
    if state.decay is not None:
        layer.momentum = state.decay


def _walk(node: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(node, nnx.Pytree):
        children: Any = [(k, v) for k, v in vars(node).items() if not k.startswith("_pytree")]
    elif isinstance(node, dict):
        children = node.items()
    elif isinstance(node, (list, tuple)):
        children = enumerate(node)
    else:
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, nnx.Module):
        yield path, node
    for key, child in children:
        yield from _walk(child, f"{path}.{key}" if path else str(key), seen)


def _momentum(layer: Any) -> float:
    momentum = layer.momentum
    if not isinstance(momentum, nnx.Variable):
        return float(momentum)
    # A float32 leaf: the shortest decimal that gives the same float32 is the number once typed.
    return float(str(np.float32(momentum[...])))


def _read(variable: Any) -> Any:
    return None if variable is None else flatten(variable[...])


def _is_ours(layer: Any) -> bool:
    ours = sys.modules.get("batchnorm.jax.layers")
    return ours is not None and isinstance(layer, ours.BatchNorm)


def _kind(layer: Any) -> str:
    cls = type(layer)
    module = cls.__module__.removesuffix(".nn.normalization").removesuffix(".layers")
    return f"{module}.{cls.__name__}"
