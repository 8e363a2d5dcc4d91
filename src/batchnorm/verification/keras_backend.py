"""Operations of the active Keras backend: tensors and gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np

NAME = keras.backend.backend()
Found = tuple[Any, Any, list[Any]]


def tensor(a: Any, dtype: str) -> Any:
    """An array on the backend, in exactly that type."""
    wide = "float64" if dtype == "float64" else "float32"
    return keras.ops.cast(keras.ops.convert_to_tensor(np.asarray(a).astype(wide)), dtype)


def native(a: np.ndarray) -> Any:
    """A tensor of the array's own type, for which Keras may have no name."""
    if NAME == "torch":
        import torch

        return torch.from_numpy(a)
    return keras.ops.convert_to_tensor(a)


def numpy(a: Any) -> np.ndarray:
    """A float64 array."""
    if keras.backend.standardize_dtype(a.dtype) == "bfloat16":
        a = keras.ops.cast(a, "float32")
    return np.asarray(keras.ops.convert_to_numpy(a)).astype(np.float64)


def differentiate(
    layer: Any,
    call: Callable[[Any], Any],
    x: Any,
    dy: Any,
    weights: list[Any],
    compiled: str | None = None,
) -> Found:
    """y, and the gradients of Σ dy·y with respect to x and to Keras variables.

    Args:
        layer: whose call it is; updates of its variables take effect.
        call: of x.
        x: input.
        dy: cotangent of y.
        weights: trainable Keras variables.
        compiled: None for eager code, "graph" or "xla".
    """
    return _DIFFERENTIATE[NAME](layer, call, x, dy, weights, compiled)


def _tensorflow(
    layer: Any, call: Any, x: Any, dy: Any, weights: list[Any], compiled: str | None
) -> Found:
    import tensorflow as tf

    def step(x: Any, dy: Any) -> Found:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
        values = [w.value for w in weights]
        dx, *rest = tape.gradient(y, [x, *values], dy, unconnected_gradients="zero")
        return y, dx, rest

    if tf.distribute.has_strategy():
        replicated = partial(tf.distribute.get_strategy().run, step)
        return tf.function(lambda x, dy: replicated((x, dy)))(x, dy)
    if compiled is not None:
        step = tf.function(step, jit_compile=compiled == "xla")
    return step(x, dy)


def _torch(
    layer: Any, call: Any, x: Any, dy: Any, weights: list[Any], compiled: str | None
) -> Found:
    assert compiled is None, "torch runs eagerly under Keras"
    x = x.detach().requires_grad_()
    values = [w.value for w in weights]
    for a in values:
        a.grad = None
        a.requires_grad_()  # Keras does so in `fit`
    y = call(x)
    y.backward(dy)
    return y.detach(), x.grad, [a.grad for a in values]


def _jax(layer: Any, call: Any, x: Any, dy: Any, weights: list[Any], compiled: str | None) -> Found:
    import jax

    layer_weights = [w for w in layer.variables if all(w is not v for v in weights)]

    def step(values: list[Any], kept: list[Any], x: Any, dy: Any) -> Any:
        def forward(values: list[Any], x: Any) -> Any:
            mapping = [*zip(weights, values, strict=True), *zip(layer_weights, kept, strict=True)]
            with keras.StatelessScope(state_mapping=mapping) as scope:
                y = call(x)
            return y, [scope.get_current_value(w) for w in layer_weights]

        y, pull, moved = jax.vjp(forward, values, x, has_aux=True)
        gradients, dx = pull(dy)
        return y, dx, gradients, moved

    if compiled is not None:
        step = jax.jit(step)
    y, dx, gradients, moved = step(
        [w.value for w in weights], [w.value for w in layer_weights], x, dy
    )
    for w, value in zip(layer_weights, moved, strict=True):
        w.assign(value)
    return y, dx, gradients


_DIFFERENTIATE = {"tensorflow": _tensorflow, "torch": _torch, "jax": _jax}


def has_float64() -> bool:
    """True if float64 stays float64."""
    if NAME != "jax":
        return True
    import jax

    return bool(jax.config.read("jax_enable_x64"))


def has_gpu() -> bool:
    """True if the backend finds a GPU, on which Keras then puts its tensors."""
    if NAME == "torch":
        import torch

        return torch.cuda.is_available()
    if NAME == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_physical_devices("GPU"))
    import jax

    return any(device.platform == "gpu" for device in jax.devices())
