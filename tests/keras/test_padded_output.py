"""Padded rows of the output that are 0 (S4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_backend
from batchnorm.keras import (
    BatchNormalization,
    MaskedBatchNormalization,
    convert_batchnorm,
    padding_mask,
)

MASK = np.arange(8) < np.array([8, 5, 2, 0])[:, None]
MODES = ["training", "evaluation", "frozen"]


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(a))


def data(padding: float = np.nan) -> np.ndarray:
    x = np.random.default_rng(0).normal(5.0, 2.0, (4, 8, 3)).astype("float32")
    x[~MASK] = padding
    return x


def layer_of(kind: type = BatchNormalization, mode: str = "training", **options: Any) -> Any:
    layer = kind(beta_initializer="ones", **options)
    layer.build((4, 8, 3))
    layer.moving_mean.assign([1.0, 2.0, 3.0])
    layer.trainable = mode != "frozen"
    return layer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [BatchNormalization, MaskedBatchNormalization])
def test_padded_rows_are_0_and_real_ones_as_without(kind: type, mode: str) -> None:
    training = mode != "evaluation"
    x = data()
    y = array(layer_of(kind, mode, padded_output="zero")(x, mask=MASK, training=training))
    other = array(layer_of(kind, mode)(data(0.0), mask=MASK, training=training))
    np.testing.assert_array_equal(y[~MASK], 0.0)
    assert not np.signbit(y[~MASK]).any()
    np.testing.assert_array_equal(y[MASK], other[MASK])
    assert (other[~MASK] != 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compiled", [None, "graph", "xla"])
def test_gradients_of_padded_rows_are_0(mode: str, compiled: str | None) -> None:
    if compiled is not None and keras_backend.NAME == "torch":
        pytest.skip("torch runs eagerly under Keras")
    dy = np.random.default_rng(1).normal(size=(4, 8, 3)).astype("float32")
    found = []
    for padded_output, padding in (("zero", np.nan), ("normalize", 0.0)):
        layer = layer_of(mode=mode, padded_output=padded_output)
        x, cotangent = data(padding), dy.copy()
        cotangent[~MASK] = padding
        found.append(
            keras_backend.differentiate(
                layer,
                lambda a, layer=layer: layer(a, mask=MASK, training=mode != "evaluation"),
                keras_backend.tensor(x, "float32"),
                keras_backend.tensor(cotangent, "float32"),
                [layer.gamma, layer.beta],
                compiled,
            )
        )
    (_, dx, parameters), (_, expected, others) = found
    np.testing.assert_array_equal(array(dx)[~MASK], 0.0)
    np.testing.assert_allclose(array(dx), array(expected), rtol=1e-5, atol=1e-6)
    for a, b in zip(parameters, others, strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (1, 8, 1), (4, 8, 3)])
def test_every_mask_zeroes(shape: tuple[int, ...]) -> None:
    mask = np.random.default_rng(2).random(shape) < 0.5
    x = data(0.0)
    whole = np.broadcast_to(mask.reshape(*shape, *(1,) * (3 - len(shape))), x.shape)
    for training in (True, False):
        y = array(layer_of(padded_output="zero")(x, mask=mask, training=training))
        np.testing.assert_array_equal(y[~whole], 0.0)
        assert (y[whole] != 0).all()


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
def test_a_convolution_behind_reads_zeros() -> None:
    keras.utils.set_random_seed(0)
    conv = layers.Conv1D(2, 3, padding="same")
    norm, x = layer_of(padded_output="zero"), data(0.0)
    y = array(conv(norm(x, mask=MASK)))
    for sample, length in ((1, 5), (2, 2)):
        alone = array(conv(norm(x[sample : sample + 1, :length])))
        np.testing.assert_allclose(y[sample, :length], alone[0], rtol=1e-5, atol=1e-6)


def test_without_a_mask_nothing_is_0() -> None:
    x = data(0.0)
    for training in (True, False):
        y, other = (
            array(layer_of(padded_output=value)(x, training=training))
            for value in ("zero", "normalize")
        )
        np.testing.assert_array_equal(y, other)


@pytest.mark.parametrize("kind", [BatchNormalization, MaskedBatchNormalization])
def test_the_config_holds_it_where_it_is_set(kind: type) -> None:
    layer = kind(padded_output="zero")
    config = layer.get_config()
    assert config["padded_output"] == "zero"
    assert kind.from_config(config).padded_output == "zero"
    assert "padded_output" not in kind().get_config()


def test_a_saved_model_keeps_it(tmp_path: Path) -> None:
    inputs = keras.Input((8, 3)), keras.Input((8,), dtype="bool")
    model = keras.Model(inputs, BatchNormalization(padded_output="zero")(inputs))
    y = array(model([data(), MASK]))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(array(again([data(), MASK])), y)
    np.testing.assert_array_equal(y[~MASK], 0.0)
    if keras_backend.NAME == "tensorflow":
        import tensorflow as tf

        model.export(tmp_path / "exported", verbose=False)
        loaded = tf.saved_model.load(str(tmp_path / "exported"))
        served = loaded.serve((ops.convert_to_tensor(data()), ops.convert_to_tensor(MASK)))
        np.testing.assert_allclose(array(served), y, rtol=1e-5, atol=1e-6)


def test_conversion_takes_it() -> None:
    model = keras.Sequential([keras.Input((8, 3)), layers.BatchNormalization()])
    convert_batchnorm(model, padded_output="zero")
    with padding_mask(MASK):
        y = array(model(data(), training=True))
    np.testing.assert_array_equal(y[~MASK], 0.0)


@pytest.mark.parametrize("value", ["zeros", True, None])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match='padded_output must be "normalize" or "zero"; got'):
        BatchNormalization(padded_output=value)


# A block's setting.


@pytest.mark.parametrize("explicit", [False, True])
def test_a_block_sets_it_for_all_layers_inside(explicit: bool) -> None:
    layer = layer_of()

    def zeros() -> bool:
        y = array(layer(data(0.0), mask=MASK if explicit else None, training=True))
        return bool((y[~MASK] == 0).all())

    with padding_mask(MASK, padded_output="zero"):
        assert zeros()
        with padding_mask(MASK):
            assert zeros()
        with padding_mask(MASK, padded_output="normalize"):
            assert not zeros()
    with padding_mask(MASK):
        assert not zeros()
    if explicit:
        with padding_mask(None, padded_output="zero"):
            assert zeros()
        assert not zeros()


def test_a_block_inside_compiled_code_sets_it() -> None:
    layer = layer_of()

    def step(x: Any, mask: Any) -> Any:
        before = layer(x, mask=mask)
        with padding_mask(mask, padded_output="zero"):
            return layer(x), before

    inside, before = keras_backend.trace(step)(
        ops.convert_to_tensor(data(0.0)), ops.convert_to_tensor(MASK)
    )
    np.testing.assert_array_equal(array(inside)[~MASK], 0.0)
    assert (array(before)[~MASK] != 0).all()


@pytest.mark.skipif(keras_backend.NAME == "torch", reason="torch runs Python every time")
@pytest.mark.parametrize("earlier", [False, True])
def test_a_block_outside_of_compiled_code_is_an_error(earlier: bool) -> None:
    layer = layer_of()
    traced = keras_backend.trace(lambda x, mask: layer(x, mask=mask))
    given = ops.convert_to_tensor(data(0.0)), ops.convert_to_tensor(MASK)
    if earlier:
        traced(*given)
    with (
        pytest.raises(RuntimeError, match="padding_mask"),
        padding_mask(None, padded_output="zero"),
    ):
        traced(*given)
