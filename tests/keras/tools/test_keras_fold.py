"""Folding the batch norms of Keras models."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from batchnorm.keras import BatchNormalization, MaskedBatchNormalization
from batchnorm.tools import fold


@pytest.fixture(autouse=True)
def _seed() -> None:
    keras.utils.set_random_seed(0)


def trained(model: Any) -> Any:
    """The model with random weights and statistics everywhere."""
    random = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 2.0, a.shape) for a in layer.get_weights()])
    return model


def report_of(model: Any, example: Any = None) -> tuple[Any, dict[str, str], dict[str, str]]:
    before = [np.array(a) for a in model.get_weights()]
    new, report = fold(model, example)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert 0 <= report.difference <= report.tolerance
    return (
        new,
        {layer.name: layer.into for layer in report.folded},
        {layer.name: layer.reason for layer in report.kept},
    )


MAPS = {
    "dense": (layers.Dense(4), (3,)),
    "dense_over_time": (layers.Dense(4, use_bias=False), (5, 3)),
    "conv1d": (layers.Conv1D(4, 3, padding="same"), (7, 3)),
    "conv2d_grouped": (layers.Conv2D(4, 3, groups=2, use_bias=False), (7, 6, 6)),
    "conv3d": (layers.Conv3D(4, 2), (4, 4, 4, 2)),
    "transposed": (layers.Conv2DTranspose(4, 3, strides=2, padding="same"), (5, 5, 3)),
    "depthwise": (layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same"), (6, 6, 3)),
    "separable": (layers.SeparableConv2D(4, 3, depth_multiplier=2), (6, 6, 3)),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", MAPS)
def test_folding_into_the_map_before(name: str) -> None:
    kind, shape = MAPS[name]
    if name == "conv2d_grouped" and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow's CPU kernels have no grouped convolution outside of XLA")
    linear = type(kind).from_config({**kind.get_config(), "name": "linear"})
    model = trained(
        keras.Sequential([keras.Input(shape), linear, BatchNormalization(name="bn"), layers.ReLU()])
    )
    new, folded, kept = report_of(model)
    assert folded == {"bn": "linear"}
    assert not kept
    assert isinstance(new, keras.Sequential)
    assert [type(layer) for layer in new.layers] == [type(kind), layers.ReLU]


def residual() -> Any:
    """A residual block, a pre-activation, and a map with a batch norm in front of it."""
    x = inputs = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="conv1")(x)
    x = layers.BatchNormalization(name="bn1")(x)
    shortcut = x = layers.ReLU()(x)
    x = layers.Conv2D(4, 3, padding="same", name="conv2", use_bias=False)(x)
    x = layers.Dropout(0.5)(x)
    x = BatchNormalization(name="bn2")(x)
    x = layers.BatchNormalization(name="bn3")(layers.ReLU()(layers.Add()([x, shortcut])))
    x = layers.Conv2D(5, 2, name="conv3")(x)
    y = layers.BatchNormalization(name="bn4")(layers.GlobalAveragePooling2D()(x * 2.0))
    shared = layers.Dense(5, name="shared")
    y = layers.BatchNormalization(name="bn5")(shared(y)) + shared(y)
    y = layers.Dense(4, activation="relu", name="active")(y)
    y = layers.BatchNormalization(name="bn6")(y)
    return keras.Model(inputs, layers.Softmax()(y))


def test_functional_model_with_everything() -> None:
    new, folded, kept = report_of(trained(residual()))
    assert folded == {"bn1": "conv1", "bn2": "conv2", "bn3": "conv3"}
    assert list(kept) == ["bn4", "bn5", "bn6"]
    assert "global_average" in kept["bn4"]
    assert "shared, but it is used in 2 places" in kept["bn5"]
    assert "active, but it applies relu" in kept["bn6"]
    names = [layer.name for layer in new.layers]
    assert not {"bn1", "bn2", "bn3"} & set(names)
    assert {"image", "conv1", "conv2", "conv3", "bn4"} <= set(names)


def test_zero_padding_behind_an_offset_keeps_the_layer() -> None:
    padded = layers.Conv1D(2, 3, padding="same")
    norm = layers.BatchNormalization(name="bn")
    model = keras.Sequential([keras.Input((6, 3)), norm, padded])
    _, folded, kept = report_of(trained(model))
    assert not folded
    assert "pads with zeros" in kept["bn"]
    gamma, beta, mean, var = model.layers[0].get_weights()
    model.layers[0].set_weights([gamma, 0 * beta, 0 * mean, var])
    _, folded, _ = report_of(model)
    assert list(folded) == ["bn"]


def test_model_in_a_model() -> None:
    inner = keras.Sequential(
        [keras.Input((3,)), layers.Dense(4, name="dense"), layers.BatchNormalization(name="bn")],
        name="inner",
    )
    x = inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.BatchNormalization(name="outer")(inner(x)))
    new, folded, kept = report_of(trained(model))
    assert folded == {"inner/bn": "inner/dense"}
    assert list(kept) == ["outer"]
    assert len(new.get_layer("inner").layers) == 1


def test_a_pair_with_a_mask_is_one_input() -> None:
    x, mask = keras.Input((3,)), keras.Input((), dtype="bool")
    norm = MaskedBatchNormalization(name="bn")
    model = trained(keras.Model([x, mask], norm((layers.Dense(4, name="dense")(x), mask))))
    example = [np.ones((5, 3), np.float32), np.arange(5) < 3]
    _, folded, _ = report_of(model, example)
    assert folded == {"bn": "dense"}


def test_half_precision() -> None:
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, dtype="mixed_float16"),
            layers.BatchNormalization(name="bn", dtype="mixed_float16"),
        ]
    )
    _, folded, _ = report_of(trained(model))
    assert list(folded) == ["bn"]


def test_refusals() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.bn = layers.BatchNormalization()

        def call(self, x: Any) -> Any:
            return self.bn(x)

    model = Own()
    model(np.ones((2, 3), np.float32))
    with pytest.raises(TypeError, match="functional or sequential"):
        fold(model)
    sequential = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match="pairs are for flax nnx"):
        fold(sequential, pairs=[("a", "b")])


def test_digits_that_folding_changes_are_refused() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.BatchNormalization()])
    kernel, bias = model.layers[0].get_weights()
    model.layers[0].set_weights([kernel, bias + 1e6])
    gamma, beta, mean, var = model.layers[1].get_weights()
    model.layers[1].set_weights([gamma, beta, mean + 1e6, var])
    with pytest.raises(ValueError, match="must agree with the original within"):
        fold(model)
    _, report = fold(model, tolerance=0.1)
    assert report.tolerance == 0.1
    assert 1e-4 < report.difference < 0.1
