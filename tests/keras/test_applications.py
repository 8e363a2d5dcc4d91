"""Models of `keras.applications` with our layer in the place of Keras's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization

MODELS: dict[str, Callable[[], keras.Model]] = {
    "mobilenet": lambda: keras.applications.MobileNet(
        input_shape=(64, 64, 3), alpha=0.25, weights=None, classes=5, dropout=0.0
    ),
    "resnet": lambda: resnet(),
}


def resnet() -> keras.Model:
    """The first stages of a ResNet50V2, which a CPU trains in seconds."""
    whole = keras.applications.ResNet50V2(
        include_top=False, weights=None, input_shape=(64, 64, 3), pooling=None
    )
    x = keras.layers.GlobalAveragePooling2D()(whole.get_layer("conv2_block3_out").output)
    outputs = keras.layers.Dense(5, activation="softmax")(x)
    return keras.Model(whole.input, outputs)


def swap(model: keras.Model) -> keras.Model:
    """The same model with our layers, and the same weights."""

    def replace(layer: Any) -> Any:
        stock = type(layer) is keras.layers.BatchNormalization
        return (BatchNormalization if stock else type(layer)).from_config(layer.get_config())

    found = keras.models.clone_model(model, clone_function=replace)
    found.set_weights(model.get_weights())
    return found


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(16, 64, 64, 3)).astype("float32"), rng.integers(0, 5, 16)


def fit(model: keras.Model) -> list[float]:
    model.compile(keras.optimizers.SGD(1e-5), "sparse_categorical_crossentropy")
    x, labels = data()
    history = model.fit(x, labels, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return history.history["loss"]


@pytest.mark.parametrize("name", MODELS)
def test_swapped_model_trains_evaluates_saves_and_loads_alike(name: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    stock = MODELS[name]()
    ours = swap(stock)
    norms = [layer for layer in ours.layers if isinstance(layer, BatchNormalization)]
    assert len(norms) == len(
        [a for a in stock.layers if isinstance(a, keras.layers.BatchNormalization)]
    )
    x, _ = data()
    np.testing.assert_allclose(predict(ours, x), predict(stock, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fit(ours), fit(stock), rtol=2e-3)
    np.testing.assert_allclose(predict(ours, x), predict(stock, x), rtol=2e-2, atol=2e-3)
    ours.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predict(again, x), predict(ours, x))
    stock.save_weights(tmp_path / "stock.weights.h5")
    ours.load_weights(tmp_path / "stock.weights.h5")
    np.testing.assert_allclose(predict(ours, x), predict(stock, x), rtol=1e-4, atol=1e-5)


def predict(model: keras.Model, x: np.ndarray) -> np.ndarray:
    return np.asarray(model.predict(x, verbose=0))


@pytest.mark.filterwarnings("ignore:.*native_serialization:DeprecationWarning")  # jax2tf's
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras exports torch models as ONNX")
def test_swapped_model_exports(tmp_path: Path) -> None:
    ours = swap(MODELS["mobilenet"]())
    fit(ours)
    x, _ = data()
    ours.export(tmp_path / "saved", verbose=False)
    tf = pytest.importorskip("tensorflow")
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.serve(x), predict(ours, x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the exporters warn about themselves
@pytest.mark.skipif(keras.backend.backend() == "jax", reason="needs jax2onnx by way of TensorFlow")
def test_swapped_model_exports_to_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    if keras.backend.backend() == "tensorflow":
        pytest.importorskip("tf2onnx")
    ours = swap(MODELS["mobilenet"]())
    x, _ = data()
    fit(ours)
    ours.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(found, predict(ours, x), rtol=1e-3, atol=1e-4)
