"""Keras models, merged on each backend (S22)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization
from batchnorm.tools import merge
from batchnorm.tools.merging.files import merge_checkpoints
from batchnorm.tools.models import find_layers


def net(seed: int) -> Any:
    """Two kinds of batch norms, whose names Keras numbers; random weights."""
    inputs = keras.Input((2,))
    x = keras.layers.Dense(3)(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = BatchNormalization(renorm=True, epsilon=0.25)(keras.layers.Dropout(0.5)(x))
    model = keras.Model(inputs, Scale()(x))
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.5, 2.0, w.shape) for w in model.weights])
    return model


class Scale(keras.layers.Layer):
    """A layer of the user's that is not registered."""

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(1,), initializer="ones")

    def call(self, x: Any) -> Any:
        return x * self.scale


def values(model: Any) -> list[np.ndarray]:
    return [np.array(array) for array in model.get_weights()]


def test_models_that_were_built_one_after_the_other_merge_by_order() -> None:
    models = [net(0), net(1)]
    models[0].layers[-2].trainable = False
    assert models[0].layers[2].name != models[1].layers[2].name
    before = [values(model) for model in models]
    merged = merge(models, [5, 15])
    assert type(merged) is type(models[0])
    assert [layer.name for layer in merged.layers] == [layer.name for layer in models[0].layers]
    assert not merged.layers[-2].trainable
    states = [[found.state for found in find_layers(model)] for model in models]
    wanted = merge([states[0], states[1]], [5, 15])
    for found, state in zip(find_layers(merged), wanted, strict=True):
        assert (found.state.eps, found.state.decay) == (state.eps, state.decay)
        for role in ("mean", "var", "gamma", "beta"):
            np.testing.assert_array_equal(getattr(found.state, role), getattr(state, role))
        if state.renorm is not None:
            for role, array in vars(state.renorm).items():
                np.testing.assert_array_equal(getattr(found.state.renorm, role), array)
    np.testing.assert_array_equal(values(merged)[0], before[0][0])
    whole = merge(models, [5, 15], everything=True)
    np.testing.assert_allclose(values(whole)[0], (before[0][0] + 3 * before[1][0]) / 4, rtol=1e-6)
    for model, old in zip(models, before, strict=True):
        for array, kept in zip(values(model), old, strict=True):
            np.testing.assert_array_equal(array, kept)
    x = np.ones((2, 2), "float32")
    assert np.isfinite(keras.ops.convert_to_numpy(merged(x))).all()


@pytest.mark.parametrize("layer", [keras.layers.BatchNormalization, BatchNormalization])
def test_layers_by_themselves(layer: type) -> None:
    layers = [layer(), layer()]
    for one, mean in zip(layers, (0.0, 4.0), strict=True):
        one.build((None, 3))
        one.moving_mean.assign(np.full(3, mean, "float32"))
    merged = merge(layers)
    assert type(merged) is layer
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(merged.moving_variance), [5.0] * 3)


class Unserializable(keras.Model):
    """A model that Keras cannot make again from its config."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = BatchNormalization(name="norm")
        self.build((None, width))

    def build(self, shape: Any) -> None:
        self.norm.build(shape)
        self.built = True

    def call(self, x: Any) -> Any:
        return self.norm(x)


def test_model_that_cannot_be_copied_is_refused_with_the_remedy() -> None:
    models = [Unserializable(3), Unserializable(3)]
    with pytest.raises(ValueError, match=r"cannot be copied.*Give the class get_config"):
        merge(models)
    states = [[copy.copy(found.state) for found in find_layers(model)] for model in models]
    assert merge(states)[0].channels == 3


def test_other_layers_are_refused() -> None:
    other = keras.Sequential([keras.Input((3,)), BatchNormalization(name="norm")])
    with pytest.raises(ValueError, match=r"^merge: all models must have the same batch norms; mod"):
        merge([net(0), other])


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
def test_files_of_whole_models_merge_as_models_do(suffix: str, tmp_path: Path) -> None:
    models, paths = [], [tmp_path / f"{name}{suffix}" for name in "ab"]
    for seed, path in enumerate(paths):
        keras.utils.clear_session()  # the same names, as in a process of its own
        inputs = keras.Input((2,))
        x = keras.layers.BatchNormalization(epsilon=0.25)(keras.layers.Dense(3)(inputs))
        model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dropout(0.5)(x)))
        rng = np.random.default_rng(seed)
        model.set_weights([rng.uniform(0.5, 2.0, w.shape) for w in model.weights])
        model.compile("adam")
        model.optimizer.build(model.trainable_variables)
        (model.save_weights if suffix == ".weights.h5" else model.save)(path)
        models.append(model)
    target = tmp_path / f"c{suffix}"
    done = merge_checkpoints(paths, target, counts=[1, 3], everything=True)
    wanted = merge(models, [1, 3], everything=True)
    if suffix == ".h5":
        merged = keras.models.load_model(target)  # its config is kept
        assert merged.layers[2].epsilon == 0.25
        assert any("'@training_config'" in note for note in done.written.notes)
    else:
        merged = merge(models)  # not compiled, so that it asks for no optimizer
        merged.load_weights(target)
    for ours, theirs in zip(values(merged), values(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (done.others, done.written.left_out) == (4, 14)
    assert "14 arrays of optimizers or callbacks are left out" in done.written.notes[0]
    other = tmp_path / ("d.h5" if suffix == ".weights.h5" else "d.weights.h5")
    with pytest.raises(ValueError, match=f"a file like {suffix}; only batch norms are converted"):
        merge_checkpoints(paths, other, everything=True)
