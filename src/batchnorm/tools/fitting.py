"""Fitting a state to a layer: shapes, and arrays that only one of the two has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchnorm.core.running import derive_renorm
from batchnorm.numpy_namespace import XP
from batchnorm.tools.state import BatchNormState, FloatArray, RenormState

_ABSENT = {"gamma": 1.0, "beta": 0.0}


def fit(state: BatchNormState, layer: BatchNormState) -> BatchNormState:
    """`state` with exactly the arrays that a layer has, in the layer's shapes.

    Args:
        state: the new state, with the layer's kind of variance.
        layer: the layer's present state.

    Returns:
        A state whose arrays have the layer's shape; eps, decay and steps as in `state`.

    Raises:
        ValueError: it does not fit.
    """
    owner = f"layer {layer.name!r} ({layer.kind})"
    _check_size(owner, state, layer)
    shape = layer.shape or (layer.channels,)
    arrays: dict[str, FloatArray | None] = {}
    for name in ("mean", "var"):
        old, new = getattr(layer, name), getattr(state, name)
        if (old is None) != (new is None):
            raise ValueError(
                f"{owner}: {name} must be there on both sides or on neither; it is missing in "
                f"{'the layer' if old is None else _source(state)}."
            )
        arrays[name] = None if new is None else new.reshape(shape)
    for name, neutral in _ABSENT.items():
        old, new = getattr(layer, name), getattr(state, name)
        if old is None and new is not None and np.any(new != neutral):
            raise ValueError(
                f"{owner}: the layer has no {name}, but {_source(state)} has one that is not "
                f"{neutral:g} everywhere. Use a layer with {name}."
            )
        if new is None:
            new = np.full(shape, neutral, np.float32)
        arrays[name] = None if old is None else new.reshape(shape)
    return replace(state, **arrays, renorm=_fit_renorm(state, layer, shape))  # type: ignore[arg-type]


def check_finite_casts(owner: str, pairs: Sequence[tuple[str, FloatArray, Any]]) -> None:
    """Raise if a value is finite before a cast to the layer's type, but not after.

    Args:
        owner: of the message.
        pairs: name, array, and the same cast.
    """
    for name, before, after in pairs:
        cast = np.asarray(after, np.float64)
        if np.any(np.isfinite(before) & ~np.isfinite(cast.reshape(before.shape))):
            raise ValueError(
                f"{owner}: {name} overflows the layer's type; the largest magnitude is "
                f"{np.max(np.abs(before)):g}. Use a layer of a wider type."
            )


def _start_renorm(mean: FloatArray, var: FloatArray, eps: float) -> RenormState:
    """Renormalization's statistics for a state that has none (S11)."""
    mean, stddev = derive_renorm(mean, var, eps=var.dtype.type(eps), xp=XP)
    return RenormState(stddev, mean.copy(), stddev.copy())


def _check_size(owner: str, state: BatchNormState, layer: BatchNormState) -> None:
    ours = [n for n in layer.shape or (layer.channels,) if n != 1]
    theirs = [n for n in state.shape or (state.channels,) if n != 1]
    if ours != theirs:
        shown = layer.shape or layer.channels, state.shape or state.channels
        raise ValueError(
            f"{owner}: the layer has {shown[0]} channels; {_source(state)} {shown[1]}."
        )
    for name in ("mean", "var", "gamma", "beta"):
        array = getattr(state, name)
        if array is not None and array.size != state.channels:
            raise ValueError(
                f"{owner}: {_source(state)} has {array.size} values of {name}, "
                f"{state.channels} of others."
            )


def _fit_renorm(
    state: BatchNormState, layer: BatchNormState, shape: tuple[int, ...]
) -> RenormState | None:
    if layer.renorm is None:
        return None
    given = state.renorm
    if given is None:
        if state.mean is None or state.var is None:
            return None
        eps = state.eps if state.eps is not None else layer.eps
        given = _start_renorm(state.mean, state.var, 0.0 if eps is None else eps)
    return RenormState(
        given.moving_stddev.reshape(shape),
        given.renorm_mean.reshape(shape),
        given.renorm_stddev.reshape(shape),
    )


def check_number(owner: str, name: str, value: float | None, high: float = math.inf) -> None:
    """Raise unless value is None or lies in [0, high]."""
    if value is not None and not 0.0 <= value <= high:
        raise ValueError(f"{owner}: {name} must lie in [0, {high:g}]; got {value!r}.")


def _source(state: BatchNormState) -> str:
    return f"{state.name!r} ({state.kind})"
