"""Models of `keras.applications` with our layer instead of Keras's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization
from batchnorm.verification import tolerances

MODELS: dict[str, Callable[[], keras.Model]] = {
    "mobilenet": lambda: keras.applications.MobileNet(
        input_shape=(64, 64, 3), alpha=0.25, weights=None, classes=5, dropout=0.0
    ),
    "resnet": lambda: resnet(),
}

# `make test` trains one model on one backend, the one that does not compile it.
USUAL = {"mobilenet"} if keras.backend.backend() == "torch" else set()
CHOSEN = [
    pytest.param(name, marks=() if name in USUAL else (pytest.mark.exhaustive,)) for name in MODELS
]


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


def fit(model: keras.Model, order: Any = slice(None)) -> dict[str, np.ndarray]:
    """Losses of two epochs, and the predictions and weights afterwards."""
    x, labels = data()
    history = model.fit(x[order], labels[order], batch_size=8, epochs=2, shuffle=False, verbose=0)
    return {
        "losses": np.array(history.history["loss"]),
        "predictions": predict(model, x),
        "weights": flatten(model.trainable_weights),
        "statistics": flatten(model.non_trainable_weights),
    }


def flatten(weights: list[Any]) -> np.ndarray:
    return np.concatenate([keras.ops.convert_to_numpy(w).ravel() for w in weights])


def compile_model(model: keras.Model) -> None:
    model.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")


def predict(model: keras.Model, x: np.ndarray) -> np.ndarray:
    return np.asarray(model.predict(x, verbose=0))


def rounding(model: keras.Model) -> float:
    """The allowed difference of a prediction, which is at most 1: S3 for each normalization."""
    return tolerances.FLOAT32 * len(norms(model))


def norms(model: keras.Model) -> list[Any]:
    return [a for a in model.layers if isinstance(a, keras.layers.BatchNormalization)]


@pytest.mark.parametrize("name", CHOSEN)
def test_swapped_model_trains_evaluates_saves_and_loads_alike(name: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    stock = MODELS[name]()
    ours, start = swap(stock), stock.get_weights()
    assert {type(layer) for layer in norms(ours)} == {BatchNormalization}
    x, _ = data()
    np.testing.assert_allclose(predict(ours, x), predict(stock, x), atol=rounding(stock))
    for model in (stock, ours):
        compile_model(model)
    found, expected = fit(ours), fit(stock)
    # Training amplifies rounding errors. The stock model shows by how much: another order of the
    # samples within their batch changes only the rounding of its sums.
    stock.set_weights(start)
    shuffled = fit(stock, np.concatenate([np.arange(8)[::-1], 8 + np.arange(8)[::-1]]))
    for name, value in expected.items():
        spread = np.abs(shuffled[name] - value).max() + np.spacing(np.abs(value).max())
        assert np.abs(found[name] - value).max() <= 8 * spread, name
    stock.set_weights(ours.get_weights())
    np.testing.assert_allclose(predict(ours, x), predict(stock, x), atol=rounding(stock))
    ours.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(predict(again, x), predict(ours, x))
    stock.set_weights(start)
    stock.save_weights(tmp_path / "stock.weights.h5")
    ours.load_weights(tmp_path / "stock.weights.h5")
    np.testing.assert_allclose(predict(ours, x), predict(stock, x), atol=rounding(stock))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*native_serialization:DeprecationWarning")  # jax2tf's
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras exports torch models as ONNX")
def test_swapped_model_exports(tmp_path: Path) -> None:
    ours = swap(MODELS["mobilenet"]())
    compile_model(ours)
    fit(ours)
    x, _ = data()
    ours.export(tmp_path / "saved", verbose=False)
    tf = pytest.importorskip("tensorflow")
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_allclose(loaded.serve(x), predict(ours, x), atol=rounding(ours))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # the exporters warn about themselves
def test_swapped_model_exports_to_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    exporter = {"tensorflow": "tf2onnx", "jax": "jax2onnx", "torch": "onnxscript"}
    pytest.importorskip(exporter[keras.backend.backend()])
    ours = swap(MODELS["mobilenet"]())
    x, _ = data()
    compile_model(ours)
    fit(ours)
    ours.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(found, predict(ours, x), atol=rounding(ours))
