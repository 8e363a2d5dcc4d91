"""Operations of the active Keras backend for tests: tensors, gradients, compiled functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from batchnorm.verification.keras_backend import (
    NAME,
    differentiate,
    has_float64,
    native,
    numpy,
    tensor,
)

__all__ = [
    "NAME",
    "differentiate",
    "has_float64",
    "native",
    "numpy",
    "pure",
    "second_gradient",
    "tensor",
    "trace",
]


def trace(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as the backend compiles it; torch runs it as it is."""
    if NAME == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    if NAME == "jax":
        import jax

        return jax.jit(function)
    return function


@contextmanager
def pure(*variables: Any) -> Iterator[Callable[[Any], Any]]:
    """A scope for traced code that assigns variables; gives a function that reads a variable."""
    if NAME != "jax":  # JAX's traced functions may change nothing
        yield lambda variable: variable.value
        return
    with keras.StatelessScope([(v, v.value) for v in variables]) as scope:
        yield scope.get_current_value


def second_gradient(layer: Any, x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The gradient with respect to x of Σ c·dx², dx being that of Σ dy·y in training."""
    rng = np.random.default_rng(0)
    dy, weight = (rng.normal(size=x.shape).astype("float32") for _ in range(2))
    layer.build(x.shape)
    return np.asarray(_SECOND[NAME](layer, x, mask, dy, weight))


def _second_tensorflow(layer: Any, x: Any, mask: Any, dy: Any, weight: Any) -> Any:
    import tensorflow as tf

    x = tf.constant(x)
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = layer(x, mask=mask, training=True)
        dx = inner.gradient(y, x, dy)
        total = tf.reduce_sum(weight * tf.square(dx))
    return outer.gradient(total, x)


def _second_torch(layer: Any, x: Any, mask: Any, dy: Any, weight: Any) -> Any:
    import torch

    x, dy, weight = (torch.tensor(a) for a in (x, dy, weight))
    x.requires_grad_()
    y = layer(x, mask=mask, training=True)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    return torch.autograd.grad((weight * dx**2).sum(), x)[0]


def _second_jax(layer: Any, x: Any, mask: Any, dy: Any, weight: Any) -> Any:
    import jax

    values = [[w.value for w in a] for a in (layer.trainable_weights, layer.non_trainable_weights)]

    def forward(x: Any) -> Any:
        return layer.stateless_call(*values, x, mask=mask, training=True)[0]

    def total(x: Any) -> Any:
        return (weight * jax.vjp(forward, x)[1](dy)[0] ** 2).sum()

    return jax.jit(jax.grad(total))(x)


_SECOND = {"tensorflow": _second_tensorflow, "torch": _second_torch, "jax": _second_jax}
