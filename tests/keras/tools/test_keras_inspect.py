"""Keras models, inspected on each backend."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization
from batchnorm.tools import inspect


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
