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
from batchnorm.tools.frameworks.nnx.stacked import (
    OPTIONS,
    RENORM,
    Slice,
    module_of,
    slices_of,
    stack_of,
)
from batchnorm.tools.state import BatchNormState, RenormState

_NAMES = {"gamma": "scale", "beta": "bias", "mean": "mean", "var": "var"}


def owns(model: Any) -> bool:
    """True for an nnx module, or one of the layers stacked in one."""
    return isinstance(model, (nnx.Module, Slice))


def is_batch_norm(layer: Any) -> bool:
    """True for a layer that `take_state` reads."""
    return isinstance(layer, (nnx.BatchNorm, Slice)) or _is_ours(layer)


def find(model: Any) -> list[tuple[str, Any]]:
    """Names and batch norms, each once, in the order of definition; stacked ones slice by slice.

    flax's own iteration sorts attributes by name, which mixes up the layers of a model.
    """
    if isinstance(model, Slice):
        return [("", model)]
    return [pair for name, module in find_modules(model) for pair in slices_of(name, module)]


def find_modules(model: Any) -> list[tuple[str, Any]]:
    """As `find`, but layers stacked in a module are that module, once."""
    return [(name, module) for name, module in walk(model) if is_batch_norm(module)]


def take_state(layer: Any, name: str = "") -> BatchNormState:
    """The layer's state, copied."""
    module, index = module_of(layer), _index_of(layer)
    _check_whole(layer, name)
    mean = np.asarray(module.mean[index])
    renorm = None
    if getattr(module, "renorm", None) is not None:
        renorm = RenormState(*(_read(getattr(module, n), index) for n in RENORM))
    options: dict[str, Any] = {
        field: _number(getattr(module, name), index) for name, field in OPTIONS.items()
    }
    return BatchNormState(
        name=name,
        kind=_kind(module),
        mean=flatten(mean),
        var=_read(module.var, index),
        gamma=_read(module.scale, index),
        beta=_read(module.bias, index),
        variance="biased",
        **options,
        steps=None if (steps := _steps_of(module)) is None else int(steps[index]),
        renorm=renorm,
        shape=odd_shape(mean.shape),
        stored=mean.dtype.name,
    )


def put_state(layer: Any, state: BatchNormState) -> None:
    """Write the state into the layer, in place, after checking all of it.

    Options that stacked layers share (`check_shared`) are written for all of them.
    """
    module, index = module_of(layer), _index_of(layer)
    current = take_state(layer, state.name)
    state = fit(state, current)
    pairs = [(name, getattr(module, ours), getattr(state, name)) for name, ours in _NAMES.items()]
    if state.renorm is not None:
        kept = (state.renorm.moving_stddev, state.renorm.renorm_mean, state.renorm.renorm_stddev)
        pairs += [(n, getattr(module, n), a) for n, a in zip(RENORM, kept, strict=True)]
    writes = [
        (name, variable, array, jnp.asarray(array, variable[...].dtype))
        for name, variable, array in pairs
        if variable is not None and array is not None
    ]
    owner = f"layer {state.name!r} ({current.kind})"
    check_finite_casts(owner, [(name, array, cast) for name, _, array, cast in writes])
    for _, variable, _, cast in writes:
        _write(variable, index, cast)
    if (steps := _steps_of(module)) is not None:
        _write(steps, index, jnp.asarray(state.debiasing, steps[...].dtype))
    for name, field in OPTIONS.items():
        value, held = getattr(state, field), getattr(module, name)
        if value is None:
            continue
        if isinstance(held, nnx.Variable):
            _write(held, index, jnp.asarray(value, held[...].dtype))
        else:
            setattr(module, name, value)


def _check_whole(layer: Any, name: str) -> None:
    """Raise if a layer has no weights yet, or is several."""
    module = module_of(layer)
    owner = f"layer {name!r} ({_kind(module)})"
    if _is_ours(module) and not module.initialized:
        raise ValueError(f"{owner} is not initialized; call layer.init(key, x) first.")
    if not isinstance(layer, Slice) and (stack := stack_of(module)):
        raise ValueError(
            f"{owner} is several, stacked as {' x '.join(map(str, stack))}; find_layers(model) "
            "gives each of them."
        )


def _write(variable: Any, index: Any, value: Any) -> None:
    whole = index is ... or variable[...].ndim == 0
    variable[...] = value if whole else jnp.asarray(variable[...]).at[index].set(value)


def _steps_of(module: Any) -> Any:
    """The counter of a layer that debiases, or None."""
    return getattr(module, "steps", None) if _is_ours(module) else None


def _index_of(layer: Any) -> Any:
    return layer.index if isinstance(layer, Slice) else ...


def walk(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and modules of a model, each once, in the order of definition; itself first."""
    return _walk(model, "", set())


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


def _number(value: Any, index: Any) -> float:
    if not isinstance(value, nnx.Variable):
        return float(value)
    # The shortest decimal with the same float32 is most likely the number that was typed.
    return float(str(np.float32(value[index])))


def _read(variable: Any, index: Any) -> Any:
    return None if variable is None else flatten(variable[index])


def _is_ours(layer: Any) -> bool:
    ours = sys.modules.get("batchnorm.jax.layers")
    return ours is not None and isinstance(layer, ours.BatchNorm)


def _kind(layer: Any) -> str:
    cls = type(layer)
    module = cls.__module__.removesuffix(".nn.normalization").removesuffix(".layers")
    return f"{module}.{cls.__name__}"
