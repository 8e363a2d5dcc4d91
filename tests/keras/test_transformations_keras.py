"""The rows on Keras of the table in docs/transformations.md."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(3.0, 1.0, shape).astype("float32")


def train_once(layer: Any, x: np.ndarray) -> None:
    inputs = keras.Input(x.shape[1:])
    model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((*x.shape[:-1], 1), "float32"), batch_size=len(x), verbose=0)


def moving_mean(layer: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(layer.moving_mean)


@pytest.mark.parametrize("mode", ["full", "activations"])
def test_statistics_move_once_in_a_remat_scope(mode: str) -> None:
    with keras.RematScope(mode=mode):
        layer = BatchNormalization(momentum=0.5)
    x = rows(8, 4)
    train_once(layer, x)
    np.testing.assert_allclose(moving_mean(layer), 0.5 * x.mean(0), rtol=1e-4)


def test_time_distributed_moves_them_once_for_each_time_step() -> None:
    layer = BatchNormalization(momentum=0.5)
    x = rows(8, 3, 4)
    train_once(keras.layers.TimeDistributed(layer), x)
    expected = np.zeros(4)
    for t in range(3):
        expected = 0.5 * expected + 0.5 * x[:, t].mean(0)
    np.testing.assert_allclose(moving_mean(layer), expected, rtol=1e-4)


class Block(keras.layers.Layer):
    """A composite layer, of which Keras recomputes the whole call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNormalization(momentum=0.5)

    def build(self, input_shape: Any) -> None:
        self.norm.build(input_shape)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.norm(x, training=training)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="what JAX does")
def test_a_composite_layer_in_a_remat_scope_leaks_with_jax() -> None:
    import jax

    with keras.RematScope(mode="full"):
        block = Block()
    with pytest.raises(jax.errors.UnexpectedTracerError):
        train_once(block, rows(8, 4))


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="what torch does")
def test_a_composite_layer_in_a_remat_scope_moves_them_once_with_torch() -> None:
    with keras.RematScope(mode="full"):
        block = Block()
    x = rows(8, 4)
    train_once(block, x)
    np.testing.assert_allclose(moving_mean(block.norm), 0.5 * x.mean(0), rtol=1e-4)
