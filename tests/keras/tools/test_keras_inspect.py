"""Keras models, inspected on each backend."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization, padding_mask
from batchnorm.tools import inspect, recalibrate


def test_the_mask_of_a_block_is_seen() -> None:
    model = keras.Sequential([keras.Input((10, 3)), BatchNormalization(name="bn")])
    x = np.random.default_rng(0).normal(2.0, 1.5, (16, 10, 3)).astype("float32")
    real = np.arange(10) < 6
    with padding_mask(np.tile(real, (16, 1))):
        (found,) = inspect(model, [x]).layers
        recalibrate(model, [x])
    assert found.observed is not None
    assert found.observed.padded == pytest.approx(0.4)
    mean = np.asarray(model.get_layer("bn").moving_mean)
    np.testing.assert_allclose(mean, x[:, real].mean((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("layer", [keras.layers.BatchNormalization, BatchNormalization])
def test_model_is_inspected_with_its_masks_and_left_alone(layer: type) -> None:
    inputs = keras.Input((10, 3))
    masked = keras.layers.Masking()(inputs)
    model = keras.Model(inputs, layer(momentum=0.0, name="bn")(masked))
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 1.5, (16, 10, 3)).astype("float32")
    x[:, 6:] = 0.0
    model(x, training=True)
    before = [np.array(keras.ops.convert_to_numpy(w)) for w in model.weights]
    report = inspect(model, [x])
    (found,) = report.layers
    assert found.name == "bn"
    assert found.observed is not None
    assert found.observed.padded == pytest.approx(0.4)
    np.testing.assert_allclose(found.observed.real.mean, x[:, :6].mean((0, 1)), rtol=1e-5)
    assert [finding.code for finding in found.findings] == ["padding"]
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), value)
