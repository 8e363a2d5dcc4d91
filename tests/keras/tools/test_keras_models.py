"""Finding the batch norms of Keras models, and reading and writing one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization, MaskedBatchNormalization
from batchnorm.tools.models import find_layers, put_state, take_state


class Block(keras.layers.Layer):
    """A layer with two sublayers of the same name, and one that its model also uses elsewhere."""

    def __init__(self, shared: Any) -> None:
        super().__init__(name="block")
        self.first = keras.layers.BatchNormalization(name="bn")
        self.second = BatchNormalization(name="bn")
        self.shared = shared

    def call(self, x: Any) -> Any:
        return self.shared(self.second(self.first(x)))


def build(layer: Any, shape: tuple[int | None, ...] = (None, 3)) -> Any:
    layer.build(shape)
    return layer


def randomize(layer: Any) -> Any:
    rng = np.random.default_rng(0)
    layer.set_weights([rng.uniform(0.5, 2.0, w.shape).astype(w.dtype) for w in layer.weights])
    return layer


def test_layers_of_nested_models_are_found_once_with_their_paths() -> None:
    shared = keras.layers.BatchNormalization(name="shared")
    inner = keras.Sequential([keras.Input((3,)), MaskedBatchNormalization(name="m")], name="inner")
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Block(shared)(inner(shared(inputs))))
    found = find_layers(model)
    names = [f.name for f in found]
    assert sorted(names) == ["block/bn", "block/bn_2", "inner/m", "shared"]
    assert {f.framework for f in found} == {"keras"}
    by_name = {f.name: f for f in found}
    assert by_name["shared"].layer is shared
    assert by_name["inner/m"].state.kind == "batchnorm.keras.MaskedBatchNormalization"
    assert by_name["block/bn"].state.kind == "keras.BatchNormalization"


def test_state_in_the_specifications_terms() -> None:
    state = take_state(randomize(build(keras.layers.BatchNormalization(momentum=0.9))), "bn")
    assert (state.variance, state.eps, state.decay) == ("biased", 1e-3, 0.9)
    assert (state.channels, state.steps, state.stored) == (3, None, "float32")
    ghost = build(BatchNormalization(virtual_batch_size=2, axis=[1, 2]), (None, 2, 3))
    assert take_state(ghost).shape == (1, 2, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: build(keras.layers.BatchNormalization(scale=False)),
        lambda: build(keras.layers.BatchNormalization(renorm=True)),
        lambda: build(BatchNormalization(renorm=True, virtual_batch_size=2)),
        lambda: build(BatchNormalization(dtype="mixed_bfloat16")),
        pytest.param(
            lambda: build(BatchNormalization(dtype="float64")),
            marks=pytest.mark.skipif(
                keras.backend.backend() == "jax", reason="JAX has no float64 by default"
            ),
        ),
        lambda: build(MaskedBatchNormalization()),
    ],
)
def test_state_written_into_a_fresh_layer_is_the_same_to_the_bit(make: Any) -> None:
    source, target = randomize(make()), make()
    put_state(target, replace(take_state(source), eps=0.5, decay=0.25))
    for a, b in zip(source.get_weights(), target.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (target.epsilon, target.momentum) == (0.5, 0.25)
    x = np.float32([[1, 2, 3], [4, 5, 6]])
    state = take_state(target)
    gamma = 1.0 if state.gamma is None else state.gamma
    wanted = (x - state.mean) / np.sqrt(state.var + 0.5) * gamma + state.beta
    half = "16" in target.compute_dtype
    y = keras.ops.convert_to_numpy(keras.ops.cast(target(x), "float32"))
    tolerance = 1e-2 if half else 1e-5
    np.testing.assert_allclose(y, wanted, rtol=tolerance, atol=tolerance)


def test_layer_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="build the model"):
        find_layers(keras.Sequential([keras.layers.BatchNormalization()]))
