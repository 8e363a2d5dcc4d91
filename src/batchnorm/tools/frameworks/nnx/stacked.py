"""Batch norms of flax nnx whose arrays are stacked, as `nnx.vmap` and `nnx.scan` make them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from batchnorm.tools.state import BatchNormState

__all__ = ["OPTIONS", "RENORM", "Slice", "check_shared", "module_of", "slices_of", "stack_of"]

# Options that are part of a state, by flax's names, which are this library's too.
OPTIONS = {"epsilon": "eps", "momentum": "decay"}
RENORM = ("stddev", "renorm_mean", "renorm_stddev")
_ARRAYS = ("var", "scale", "bias", *RENORM)


@dataclass(frozen=True, eq=False)
class Slice:
    """One of several layers that are a single module, with arrays that have leading axes.

    Args:
        module: the nnx module.
        index: which of its layers, along the leading axes.
    """

    module: Any
    index: tuple[int, ...]


def module_of(layer: Any) -> Any:
    """The nnx module of a layer, which may be one of its slices."""
    return layer.module if isinstance(layer, Slice) else layer


def stack_of(module: Any) -> tuple[int, ...]:
    """Sizes of the leading axes; () for a layer by itself, or without weights yet.

    Raises:
        ValueError: arrays that are stacked in different ways.
    """
    if getattr(module, "mean", None) is None:
        return ()
    features = module.num_features
    axes = len(features) if isinstance(features, tuple) else 1
    shape = module.mean[...].shape
    found = {"mean": shape}
    for name in _ARRAYS:
        variable = getattr(module, name, None)
        if isinstance(variable, nnx.Variable):
            found[name] = variable[...].shape
    if len(set(found.values())) > 1 or shape[len(shape) - axes :] != _tuple(features):
        shown = ", ".join(f"{name} {size}" for name, size in found.items())
        raise ValueError(
            f"{type(module).__name__}: arrays of stacked layers must all have the same leading "
            f"axes before num_features={features}; got {shown}."
        )
    return tuple(shape[: len(shape) - axes])


def slices_of(name: str, module: Any) -> Iterator[tuple[str, Any]]:
    """The layers that a module is, with names: itself, or each slice, like `blocks.norm[0]`."""
    stack = stack_of(module)
    if not stack:
        yield name, module
        return
    for index in itertools.product(*map(range, stack)):
        yield f"{name}[{','.join(map(str, index))}]", Slice(module, index)


def check_shared(pairs: Sequence[tuple[Any, BatchNormState]]) -> None:
    """Raise if slices of one module would get different values of an option that they share.

    Args:
        pairs: layers, and the states that they are to have.
    """
    groups: dict[int, tuple[Any, list[BatchNormState]]] = {}
    for layer, state in pairs:
        if isinstance(layer, Slice):
            groups.setdefault(id(layer.module), (layer.module, []))[1].append(state)
    for module, states in groups.values():
        kept = len(states) < math.prod(stack_of(module))
        for attribute, field in OPTIONS.items():
            current = getattr(module, attribute)
            if isinstance(current, nnx.Variable):
                continue
            given = {getattr(state, field) for state in states}
            values = {current if value is None else value for value in given}
            values |= {current} if kept else set()
            if len(values) > 1:
                shown = " and ".join(f"{value:g}" for value in sorted(values)[:2])
                raise ValueError(
                    f"layer {states[0].name!r} ({type(module).__name__}): stacked layers have one "
                    f"{attribute} together; got {shown}. Give all of them the same."
                )


def _tuple(features: Any) -> tuple[int, ...]:
    return features if isinstance(features, tuple) else (features,)
