"""Weights in files and lists, of this package's layers, of Keras's own and of Keras 2."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from batchnorm.keras import (
    BatchNormalization,
    MaskedBatchNormalization,
    SyncBatchNormalization,
    load_weights,
)

EPS = 1e-3
DATA = Path(__file__).parent / "data"  # written by Keras 2: build_keras_2.py
CLASSES = [BatchNormalization, MaskedBatchNormalization, SyncBatchNormalization]


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(a))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2.0, 3.0, shape).astype("float32")


def model_of(make: Any, **options: Any) -> keras.Model:
    """Two normalizations in a row, and one in an inner model."""
    inner = keras.Sequential([keras.Input((4, 3)), keras.layers.Dense(3), make(**options)])
    layers = [make(**options), make(**options), inner]
    return keras.Sequential([keras.Input((4, 3)), *layers])


def norms(model: Any) -> list[Any]:
    inner = [norms(a) if isinstance(a, keras.Model) else [a] for a in model.layers]
    return [a for b in inner for a in b if isinstance(a, keras.layers.BatchNormalization)]


def trained(model: keras.Model) -> keras.Model:
    for seed, w in enumerate(model.trainable_weights):
        w.assign(draw(*w.shape, seed=seed))
    for seed in range(3):
        model(draw(8, 4, 3, seed=seed), training=True)
    return model


@pytest.mark.parametrize("cls", CLASSES)
def test_model_and_weights_files(cls: Any, tmp_path: Path) -> None:
    model, x = trained(model_of(cls, momentum=0.7)), draw(8, 4, 3, seed=9)
    expected = array(model(x))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert [type(a) for a in norms(again)] == [cls] * 3
    np.testing.assert_array_equal(array(again(x)), expected)
    other = model_of(cls, momentum=0.7)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(array(other(x)), expected)


SOURCES = {
    "stock": keras.layers.BatchNormalization,
    "ours": BatchNormalization,
    "synchronized": SyncBatchNormalization,
    "packed": MaskedBatchNormalization,
}
TARGETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ours": (BatchNormalization, {}),
    "synchronized": (SyncBatchNormalization, {}),
    "packed": (MaskedBatchNormalization, {}),
    "renorm": (BatchNormalization, {"renorm": True}),
    "several axes": (BatchNormalization, {"axis": [-1]}),
    "ghost": (BatchNormalization, {"virtual_batch_size": 2}),
}


def check_same(found: keras.Model, expected: keras.Model) -> None:
    """Both give the same output, and renormalization starts from the moving statistics (S11)."""
    x = draw(8, 4, 3, seed=9)
    np.testing.assert_allclose(array(found(x)), array(expected(x)), rtol=1e-5, atol=1e-5)
    for layer in (a for a in norms(found) if a.renorm):
        stddev = np.sqrt(array(layer.moving_variance) + EPS)
        np.testing.assert_allclose(array(layer.moving_stddev), stddev, rtol=1e-6)
        np.testing.assert_allclose(array(layer.renorm_stddev), stddev, rtol=1e-6)
        np.testing.assert_array_equal(array(layer.renorm_mean), array(layer.moving_mean))


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("source", "target", "scale"),
    [(source, target, True) for source in SOURCES for target in TARGETS]
    + [("stock", "packed", False), ("packed", "renorm", False)],
)
def test_weights_of_other_layers_load(
    source: str, target: str, scale: bool, tmp_path: Path
) -> None:
    model = trained(model_of(SOURCES[source], scale=scale))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    model.save(tmp_path / "model.h5")
    cls, options = TARGETS[target]
    for name in ("model.keras", "model.weights.h5", "model.h5"):
        found = model_of(cls, scale=scale, **options)
        load_weights(found, tmp_path / name)
        check_same(found, model)
    found = model_of(cls, scale=scale, **options)
    for a, b in zip(norms(found), norms(model), strict=True):
        a.set_weights(b.get_weights())
    found.layers[2].layers[0].set_weights(model.layers[2].layers[0].get_weights())
    check_same(found, model)


@pytest.mark.parametrize("target", ["ours", "renorm", "ghost"])
def test_stock_files_load_without_help(target: str, tmp_path: Path) -> None:
    model = trained(model_of(keras.layers.BatchNormalization))
    model.save_weights(tmp_path / "model.weights.h5")
    cls, options = TARGETS[target]
    found = model_of(cls, **options)
    found.load_weights(tmp_path / "model.weights.h5")
    check_same(found, model)


def test_files_of_other_classes_say_who_loads_them(tmp_path: Path) -> None:
    model_of(MaskedBatchNormalization).save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(
        ValueError, match=r"no weights for layer[^$]*batchnorm\.keras\.load_weights"
    ):
        model_of(BatchNormalization).load_weights(tmp_path / "model.weights.h5")


def test_frozen_layers_load_too(tmp_path: Path) -> None:
    model = trained(model_of(MaskedBatchNormalization))
    found = model_of(BatchNormalization)
    model.trainable = found.trainable = False
    model.save(tmp_path / "model.h5")
    load_weights(found, tmp_path / "model.h5")
    check_same(found, model)


def test_mixed_kinds_are_refused(tmp_path: Path) -> None:
    model_of(MaskedBatchNormalization).save_weights(tmp_path / "model.weights.h5")
    layers = [BatchNormalization(), MaskedBatchNormalization(), BatchNormalization()]
    mixed = keras.Sequential([keras.Input((4, 3)), *layers])
    with pytest.raises(ValueError, match="must have one kind of batch normalization"):
        load_weights(mixed, tmp_path / "model.weights.h5")


def test_weights_that_do_not_fit_are_refused() -> None:
    layer = BatchNormalization()
    layer.build((None, 3))
    with pytest.raises(ValueError, match=r"expected 4 weights, .*; got 5"):
        layer.set_weights([np.zeros(3)] * 5)
    with pytest.raises(ValueError, match=r"gamma must have shape \(3,\)"):
        layer.set_weights([np.zeros(4)] * 4)


def test_packed_weights_of_the_original_layer_load(tmp_path: Path) -> None:
    class Original(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.gamma = self.add_weight(shape=shape[-1:], name="gamma")
            self.beta = self.add_weight(shape=shape[-1:], name="beta")
            stats = (2, shape[-1])
            self.moving_stats = self.add_weight(shape=stats, name="moving_stats", trainable=False)

        def call(self, x: Any) -> Any:
            mean, var = self.moving_stats[0], self.moving_stats[1]
            return (x - mean) / ops.sqrt(var + EPS) * self.gamma + self.beta

    original = type("MaskedBatchNormalization", (Original,), {})
    model = keras.Sequential([keras.Input((3,)), original()])
    for seed, w in enumerate(model.weights):
        w.assign(np.abs(draw(*w.shape, seed=seed)))
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    packed = keras.Sequential([keras.Input((3,)), MaskedBatchNormalization()])
    packed.load_weights(tmp_path / "model.weights.h5")
    unpacked = keras.Sequential([keras.Input((3,)), BatchNormalization()])
    load_weights(unpacked, tmp_path / "model.weights.h5")
    custom = {"MaskedBatchNormalization": MaskedBatchNormalization}
    loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects=custom)
    assert type(loaded.layers[0]) is MaskedBatchNormalization
    x = draw(8, 3, seed=9)
    for found in (packed, unpacked, loaded):
        np.testing.assert_allclose(array(found(x)), array(model(x)), rtol=1e-5, atol=1e-5)


# Keras 2.


def like_keras_2(ghost: int | None) -> keras.Model:
    """The models of build_keras_2.py."""
    inputs, inner = keras.Input((4, 3)), keras.Input((4, 4))
    x = BatchNormalization(name="plain")(inputs)
    x = keras.layers.Dense(4, name="dense")(x)
    renorm = BatchNormalization(name="renorm", renorm=True, scale=False)
    if ghost:
        y = renorm(BatchNormalization(name="ghost", virtual_batch_size=ghost)(inner))
        x = keras.Model(inner, y, name="inner")(x)
    else:
        x = renorm(x)
    return keras.Model(inputs, BatchNormalization(name="axes", axis=[1, 2] if ghost else -1)(x))


def check_like_keras_2(model: keras.Model, answer: str) -> None:
    known = np.load(DATA / "keras_2.npz")
    x = [known["x"]] if isinstance(model.input, list) else known["x"]
    np.testing.assert_allclose(array(model(x)), known[answer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_name", [False, True])
def test_keras_2_weights_with_ghost_batches_load(by_name: bool) -> None:
    model = like_keras_2(2)
    load_weights(model, DATA / "keras_2_weights.h5", by_name=by_name)
    check_like_keras_2(model, "weights")
    assert tuple(norms(model)[1].gamma.shape) == (1, 1, 4)  # (1, 1, 1, 4) in the file


def test_keras_2_weights_in_the_newer_format_load_without_help() -> None:
    model = like_keras_2(2)
    model.load_weights(DATA / "keras_2.weights.h5")
    check_like_keras_2(model, "weights")


def test_keras_2_weights_without_ghost_batches_load_without_help() -> None:
    model = like_keras_2(None)
    model.load_weights(DATA / "keras_2_model.h5")
    check_like_keras_2(model, "model")


def test_keras_2_models_load() -> None:
    custom = {"BatchNormalization": BatchNormalization}
    model = keras.models.load_model(DATA / "keras_2_model.h5", custom_objects=custom)
    assert [type(a) for a in norms(model)] == [BatchNormalization] * 3
    check_like_keras_2(model, "model")


def test_names_match_layers_that_moved() -> None:
    inputs = keras.Input((4, 3))
    x = keras.layers.Dense(4, name="dense")(BatchNormalization(name="plain")(inputs))
    part = keras.Model(inputs, x)
    load_weights(part, DATA / "keras_2_weights.h5", by_name=True)
    whole = like_keras_2(2)
    load_weights(whole, DATA / "keras_2_weights.h5")
    for name in ("plain", "dense"):
        for a, b in zip(part.get_layer(name).weights, whole.get_layer(name).weights, strict=True):
            np.testing.assert_array_equal(array(a), array(b))


def test_other_numbers_of_layers_are_refused() -> None:
    model = keras.Sequential([keras.Input((4, 3)), BatchNormalization()])
    with pytest.raises(ValueError, match="Layer count mismatch"):
        load_weights(model, DATA / "keras_2_weights.h5")


def test_layers_without_weights_are_copied() -> None:
    layer = copy.deepcopy(BatchNormalization(renorm=True, momentum=0.5))
    assert (layer.built, layer.momentum) == (False, 0.5)
