"""Population statistics of Keras models: exact, and all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from batchnorm.keras import BatchNormalization
from batchnorm.tools import recalibrate
from batchnorm.tools.models import find_layers
from batchnorm.tools.observe import observe

# Moments are summed in float64 and rounded once to float32.
STORED = {"rtol": 2.0**-23, "atol": 1e-7}


def batches_of(*sizes: int) -> list[Any]:
    random = np.random.default_rng(0)
    return [
        random.normal(i, i + 1, (n, 4, 3)).astype(np.float32) for i, n in enumerate(sizes)
    ]  # fmt: skip


@pytest.mark.parametrize("norm", [layers.BatchNormalization, BatchNormalization])
def test_rows_count_the_same_and_dropout_is_off(norm: Any) -> None:
    model = keras.Sequential(
        [keras.Input((4, 3)), norm(name="a"), layers.Dropout(0.9), norm(name="b")]
    )
    batches = batches_of(2, 30)
    report = recalibrate(model, batches)
    rows = np.concatenate(batches).astype(np.float64)
    first, second = model.get_layer("a"), model.get_layer("b")
    np.testing.assert_allclose(np.asarray(first.moving_mean), rows.mean((0, 1)), **STORED)
    np.testing.assert_allclose(np.asarray(first.moving_variance), rows.var((0, 1)), **STORED)
    # The second one's input has mean 0 and variance 1 in every batch.
    np.testing.assert_allclose(np.asarray(second.moving_mean), 0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(second.moving_variance), 1, atol=2e-3)
    assert [layer.rows for layer in report.changed] == [128, 128]
    assert "call" not in vars(first)


def test_propagated_masks() -> None:
    tokens = keras.Input((None,), dtype="int32")
    embedding = layers.Embedding(9, 2, mask_zero=True)
    model = keras.Model(tokens, BatchNormalization(name="bn")(embedding(tokens)))
    ids = np.array([[1, 2, 0, 0], [3, 4, 5, 0]], np.int32)
    recalibrate(model, [ids])
    rows = np.asarray(embedding.get_weights()[0], np.float64)[[1, 2, 3, 4, 5]]
    found = np.asarray(model.get_layer("bn").moving_mean)
    np.testing.assert_allclose(found, rows.mean(0), **STORED)


def test_a_mapping_is_one_input() -> None:
    left, right = keras.Input((3,), name="left"), keras.Input((3,), name="right")
    norm = layers.BatchNormalization(name="bn")
    model = keras.Model({"left": left, "right": right}, norm(left + right))
    rows = batches_of(4)[0][:, 0]
    recalibrate(model, [{"left": rows, "right": 2 * rows}])
    expected = 3 * rows.astype(np.float64).mean(0)
    np.testing.assert_allclose(np.asarray(norm.moving_mean), expected, rtol=1e-6)


def test_interrupted_half_way_the_model_is_unchanged() -> None:
    model = keras.Sequential([keras.Input((4, 3)), layers.BatchNormalization()])
    before = [np.array(a) for a in model.get_weights()]

    def batches() -> Iterator[Any]:
        yield from batches_of(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches())
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.array_equal(old, new)
    assert "call" not in vars(model.layers[0])


def test_frozen_layers_are_left_alone() -> None:
    model = keras.Sequential(
        [keras.Input((4, 3)), BatchNormalization(name="a"), BatchNormalization(name="b")]
    )
    model.get_layer("a").trainable = False
    report = recalibrate(model, batches_of(5))
    assert [layer.name for layer in report.changed] == ["b"]
    assert "trainable=True" in report.kept[0].reason
    assert np.all(np.asarray(model.get_layer("a").moving_mean) == 0)


def test_compiled_functions_say_what_to_do() -> None:
    if keras.backend.backend() == "torch":
        pytest.skip("Keras on torch runs predict() eagerly")
    model = keras.Sequential([keras.Input((4, 3)), layers.BatchNormalization()])
    with (
        observe(find_layers(model), lambda seen: None),
        pytest.raises(ValueError, match="must run eagerly to be watched"),
    ):
        model.predict(batches_of(5)[0], verbose=0)
