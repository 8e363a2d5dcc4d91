"""The layer that gives a tensor its mask back, behind windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops
from keras.src.backend import get_keras_mask

import keras_backend
from batchnorm.keras import BatchNormalization, Remask

LENGTHS = (12, 7, 3, 1, 0)

pytestmark = pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")


def prefixes(size: int = 12) -> np.ndarray:
    return np.arange(size) < np.array(LENGTHS)[:, None]


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(a))


def mask_of(a: Any) -> np.ndarray:
    return array(get_keras_mask(a))


def data(mask: np.ndarray, channels: int = 3) -> np.ndarray:
    x = np.random.default_rng(0).normal(5.0, 2.0, (*mask.shape, channels)).astype("float32")
    x[~mask] = 0.0
    return x


WINDOWS = [
    (3, 1, "valid", 1),
    (3, 1, "same", 1),
    (3, 1, "causal", 1),
    (4, 2, "valid", 1),
    (4, 2, "same", 1),
    (3, 3, "causal", 1),
    (3, 1, "valid", 2),
    (3, 1, "same", 2),
    (1, 2, "valid", 1),
    (1, 5, "same", 1),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), WINDOWS)
def test_lengths_are_those_that_the_convolution_gives_samples_alone(
    kernel: int, stride: int, padding: str, dilation: int
) -> None:
    conv = layers.Conv1D(2, kernel, strides=stride, padding=padding, dilation_rate=dilation)
    y = conv(data(prefixes()))
    layer = Remask(kernel, strides=stride, padding=padding, dilation_rate=dilation)
    found = mask_of(layer((y, prefixes())))
    assert found.shape == tuple(y.shape[:2])
    for length, marks in zip(LENGTHS, found, strict=True):
        fits = length > dilation * (kernel - 1) if padding == "valid" else length > 0
        alone = conv.compute_output_shape((1, length, 3))[1] if fits else 0
        assert marks.tolist() == [True] * alone + [False] * (len(marks) - alone)
        if padding == "valid":
            rule = max(0, (length - dilation * (kernel - 1) - 1) // stride + 1)
        else:
            rule = -(-length // stride)
        assert rule == alone


def test_a_mask_with_gaps() -> None:
    mask = np.random.default_rng(3).random((20, 9)) < 0.7
    found = mask_of(Remask(3, strides=2, padding="same")((ops.zeros((20, 5, 4)), mask)))
    np.testing.assert_array_equal(found, mask[:, ::2])
    found = mask_of(Remask(2, strides=2, dilation_rate=2)((ops.zeros((20, 4, 4)), mask)))
    whole = [mask[:, o : o + 3].all(axis=1) for o in (0, 2, 4, 6)]
    np.testing.assert_array_equal(found, np.stack(whole, axis=1))


def test_axes_may_have_sizes_of_their_own() -> None:
    mask = np.random.default_rng(4).random((2, 9, 8)) < 0.8
    conv = layers.Conv2D(5, (3, 2), strides=(2, 1), padding="valid", dilation_rate=1)
    y = Remask((3, 2), strides=(2, 1))((conv(ops.ones((2, 9, 8, 3))), mask))
    whole = [[mask[:, o : o + 3, p : p + 2].all((1, 2)) for p in range(7)] for o in (0, 2, 4, 6)]
    np.testing.assert_array_equal(mask_of(y), np.moveaxis(whole, 2, 0))


def test_channels_may_come_first() -> None:
    y = Remask(3)((ops.zeros((5, 4, 10)), prefixes()))
    np.testing.assert_array_equal(mask_of(y), prefixes()[:, 2:])


@pytest.mark.parametrize("way", ["pair", "source", "keyword", "own"])
def test_masks_come_in_four_ways(way: str) -> None:
    source = layers.Masking()(ops.convert_to_tensor(data(prefixes())))
    x = ops.ones((5, 6, 4))
    layer = Remask(1, strides=2)
    if way == "pair":
        y = layer((x, ops.convert_to_tensor(prefixes())))
    elif way == "source":
        y = layer([x, source])
    elif way == "keyword":
        y = layer(x, mask=prefixes())
    else:
        y, layer = Remask()(source), Remask(1)
        np.testing.assert_array_equal(mask_of(y), prefixes())
        return
    np.testing.assert_array_equal(mask_of(y), prefixes()[:, ::2])


@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32"])
def test_any_number_but_0_is_real(dtype: str) -> None:
    y = Remask()((ops.zeros((5, 12, 2)), (prefixes() * 3).astype(dtype)))
    np.testing.assert_array_equal(mask_of(y), prefixes())


def test_the_mask_wins_over_the_one_that_x_carries_and_x_keeps_its_own() -> None:
    x = layers.Masking()(ops.convert_to_tensor(data(prefixes())))
    other = prefixes()[::-1].copy()
    y = Remask()((x, other))
    np.testing.assert_array_equal(mask_of(y), other)
    np.testing.assert_array_equal(mask_of(x), prefixes())
    np.testing.assert_array_equal(array(y), array(x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_x_keeps_its_type(dtype: str) -> None:
    y = Remask()((ops.cast(ops.zeros((5, 12, 2)), dtype), prefixes()))
    assert keras.backend.standardize_dtype(y.dtype) == dtype


def functional(seed: int = 0) -> keras.Model:
    """Two convolutions, and a batch norm behind each."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((None, 3))
    x = masked = layers.Masking()(inputs)
    x = layers.Conv1D(4, 3, strides=2, padding="same")(x)
    x = Remask(3, strides=2, padding="same")([x, masked])
    x = same = BatchNormalization(name="first", momentum=0.0)(x)
    x = layers.Conv1D(4, 2, dilation_rate=2)(x)
    x = Remask(2, dilation_rate=2)([x, same])
    x = BatchNormalization(name="second", momentum=0.0)(x)
    return keras.Model(inputs, x)


def real_rows(model: keras.Model, x: np.ndarray) -> list[np.ndarray]:
    """The inputs of the two norms at real positions, of each sample."""
    first, second = [], []
    convs = [a for a in model.layers if isinstance(a, layers.Conv1D)]
    y = array(convs[0](x))
    for row, length in zip(y, LENGTHS, strict=True):
        first.append(row[: -(-length // 2)])
    every = np.concatenate(first)
    normed = (y - every.mean(0)) / np.sqrt(every.var(0) + 1e-3)
    z = array(convs[1](normed))
    for row, length in zip(z, LENGTHS, strict=True):
        second.append(row[: max(0, -(-length // 2) - 2)])
    return [every, np.concatenate(second)]


@pytest.mark.parametrize("way", ["call", "fit"])
def test_norms_behind_convolutions_count_no_padding(way: str) -> None:
    model, x = functional(), data(prefixes())
    expected = real_rows(model, x)
    if way == "call":
        model(x, training=True)
    else:
        model.compile("sgd", "mse")
        model.optimizer.learning_rate = 0.0
        model.fit(x, np.zeros((5, 4, 4), "float32"), batch_size=5, verbose=0)
    for name, rows in zip(("first", "second"), expected, strict=True):
        layer = model.get_layer(name)
        np.testing.assert_allclose(array(layer.moving_mean), rows.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(array(layer.moving_variance), rows.var(0), rtol=1e-4)


def test_a_subclassed_model_may_use_it() -> None:
    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.masking = layers.Masking()
            self.conv = layers.Conv1D(4, 3)
            self.remask = Remask(3)
            self.norm = BatchNormalization(momentum=0.0)

        def call(self, x: Any) -> Any:
            x = self.masking(x)
            return self.norm(self.remask([self.conv(x), x]))

    model, x = Model(), data(prefixes())
    model(x, training=True)
    y, real = array(model.conv(x)), prefixes()[:, 2:]
    np.testing.assert_allclose(array(model.norm.moving_mean), y[real].mean(0), rtol=1e-4)
    model.compile()
    assert model.predict(x, verbose=0).shape == (5, 10, 4)


def test_a_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = functional(), data(prefixes())
    model(x, training=True)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(array(again(x)), array(model(x)))
    for model_ in (again, model):
        model_(data(prefixes()) * 2.0, training=True)
    for name in ("first", "second"):
        np.testing.assert_array_equal(
            array(again.get_layer(name).moving_mean), array(model.get_layer(name).moving_mean)
        )


@pytest.mark.sample(3)
def test_a_layer_of_keras_behind_it_is_saved_too(tmp_path: Path) -> None:
    inputs = keras.Input((None, 3))
    x = layers.Masking()(inputs)
    y = Remask(3, strides=2)([layers.Conv1D(4, 3, strides=2)(x), x])
    model = keras.Model(inputs, layers.LSTM(5)(y))  # its mask is part of Keras's graph
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    x = data(np.arange(12) < np.array([12, 7, 5])[:, None])
    np.testing.assert_allclose(array(again(x)), array(model(x)), rtol=1e-5, atol=1e-6)
    alone = model(x[1:2, :7])
    np.testing.assert_allclose(array(model(x))[1:2], array(alone), rtol=1e-4, atol=1e-5)


OPTIONS = {"kernel_size": (3, 2), "strides": 2, "padding": "same", "dilation_rate": (1, 2)}


def test_the_config_makes_the_same_layer() -> None:
    layer = Remask(**OPTIONS, name="back")
    again = keras.layers.deserialize(keras.layers.serialize(layer))
    assert again.get_config() == layer.get_config()
    assert {name: getattr(again, name) for name in OPTIONS} == OPTIONS
    assert again.name == "back"


def test_sizes_may_be_unknown_when_the_code_is_traced() -> None:
    layer = Remask(3, strides=2)
    norm = BatchNormalization(momentum=0.0)
    norm.build((None, None, 3))

    def step(x: Any, mask: Any) -> Any:
        y = layer((x[:, 2::2], mask))
        return norm(y), get_keras_mask(y)

    traced = keras_backend.trace(step)
    for size in (12, 9):
        mask = prefixes(size)
        _, found = traced(ops.convert_to_tensor(data(mask)), ops.convert_to_tensor(mask))
        np.testing.assert_array_equal(array(found), mask[:, 2::2])


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1; got 0"),
        ({"strides": 1.5}, TypeError, "strides must be an int"),
        ({"dilation_rate": (1, True)}, TypeError, "dilation_rate must be an int"),
        ({"padding": "full"}, ValueError, "padding must be"),
    ],
)
def test_options_are_checked(given: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"Remask: {text}"):
        Remask(**given)


def test_calls_are_checked() -> None:
    x = ops.zeros((5, 12, 2))
    with pytest.raises(ValueError, match="Remask: there is no mask"):
        Remask()(x)
    with pytest.raises(ValueError, match="Remask: source carries no mask"):
        Remask()((x, x))
    with pytest.raises(ValueError, match="Remask: inputs must be x or a pair"):
        Remask()((x, x, x))
    with pytest.raises(ValueError, match=r"\(5, 10\), which does not fit x of .*\(5, 12, 2\)"):
        Remask(3)((x, prefixes()))
    with pytest.raises(
        ValueError, match="kernel_size must be an int or have one for each of the 1 axes"
    ):
        Remask((3, 3))((x, prefixes()))
    with pytest.raises(ValueError, match="Remask: behind the windows"):
        Remask(3)((keras.Input((12, 2)), keras.Input((12,), dtype="bool")))
