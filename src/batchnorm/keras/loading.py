"""Weights from other layers: Keras's own, the packed layout, Keras 2's ghost batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.running import LONG_RUNNING, derive_renorm

_NUMPY: Any = np  # has all functions that are called here


def fit_weights(layer: Any, weights: Sequence[Any]) -> list[np.ndarray]:
    """The layer's weights, in its own layout.

    Args:
        layer: built, of this package.
        weights: gamma, beta where there are such; then moving_mean and moving_variance, and with
            renormalization three more; or both of them packed, of shape (2, C). At the end the
            number of steps, where the layer counts them; without it they were many (S23).

    Raises:
        ValueError: a number of weights or a shape that fits none of these.
    """
    wanted = layer.weights
    parameters = sum(bool(flag) for flag in (layer.scale, layer.center))
    values = [np.asarray(a) for a in weights]
    statistics = _unpack(values[parameters:], layer)
    if statistics is None:
        raise ArgumentValueError(
            f"expected {len(wanted)} weights, "
            f"{[w.name for w in wanted]}; got {len(values)} of shapes "
            f"{[a.shape for a in values]}."
        )
    values[parameters:] = layer._pack(statistics)
    return [_fit(value, weight) for value, weight in zip(values, wanted, strict=True)]


def _unpack(found: list[np.ndarray], layer: Any) -> list[np.ndarray] | None:
    """Moving mean and variance, and renormalization's three and the steps where there are such."""
    steps = []
    if layer.debias:
        counted = bool(found) and found[-1].ndim == 0
        steps = [found[-1] if counted else np.asarray(LONG_RUNNING)]
        found = found[:-1] if counted else found
    if len(found) == 1 and found[0].ndim == 2 and found[0].shape[0] == 2:
        found = [found[0][0], found[0][1]]
    if len(found) == 2 and layer.renorm:  # S11
        mean, stddev = derive_renorm(*found[:2], eps=layer.epsilon, xp=_NUMPY)
        found = [*found, stddev, mean, stddev]
    return [*found, *steps] if len(found) == (5 if layer.renorm else 2) else None


def _fit(value: np.ndarray, weight: Any) -> np.ndarray:
    """`value` in the weight's shape, which may differ in axes of size 1."""
    shape = tuple(weight.shape)
    if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        raise ArgumentValueError(
            f"{weight.name} must have shape {shape}, but for axes of size 1; got {value.shape}."
        )
    return value.reshape(shape)
