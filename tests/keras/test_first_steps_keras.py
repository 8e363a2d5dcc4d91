"""`debias`: moving statistics that forget their start (S23)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import keras_backend
from batchnorm.core.running import LONG_RUNNING
from batchnorm.keras import (
    BatchNormalization,
    MaskedBatchNormalization,
    convert_batchnorm,
    load_weights,
)
from batchnorm.tools.frameworks.keras.states import put_state, take_state

KINDS = (BatchNormalization, MaskedBatchNormalization)
X = np.random.default_rng(0).normal(5.0, 2.0, (5, 16, 3)).astype("float32")


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(a))


def layer_of(cls: type = BatchNormalization, **options: Any) -> Any:
    layer = cls(**options)
    layer.build((None, 3))
    return layer


def statistics(layer: Any) -> list[np.ndarray]:
    return [array(layer.moving_mean), array(layer.moving_variance)]


def check(found: list[np.ndarray], expected: list[np.ndarray], tol: float = 2e-6) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


@pytest.mark.sample(3)
@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("fused", [None, False])
def test_statistics_are_the_ordinary_average_over_its_weights(cls: type, fused: Any) -> None:
    layer = layer_of(cls, momentum=0.9, debias=True, fused=fused)
    sums = [np.zeros(3), np.zeros(3)]
    for step, x in enumerate(X, 1):
        layer(x, training=True)
        batch = [x.mean(0), x.var(0)]
        sums = [0.9 * a + 0.1 * b for a, b in zip(sums, batch, strict=True)]
        check(statistics(layer), [a / (1 - 0.9**step) for a in sums], 1e-5)
        assert array(layer.steps) == step
    assert layer.weights[-1] is layer.steps


def test_renormalization_starts_with_the_first_batch() -> None:
    layer = layer_of(renorm=True, debias=True)
    layer(X[0], training=True)
    expected = [X[0].mean(0), np.sqrt(X[0].var(0) + 1e-3)]
    check([array(layer.renorm_mean), array(layer.renorm_stddev)], expected)


@pytest.mark.parametrize("cls", KINDS)
def test_steps_that_move_nothing_are_not_counted(cls: type) -> None:
    layer = layer_of(cls, debias=True)
    layer(X[0], training=False)
    layer(X[0], mask=np.zeros(16, bool), training=True)
    layer(np.full_like(X[0], np.nan), training=True)
    assert array(layer.steps) == 0
    check(statistics(layer), [np.zeros(3), np.ones(3)], 0.0)
    x = X[0].copy()
    x[0, :2] = np.nan  # one channel moves
    layer(x, training=True)
    assert array(layer.steps) == 1


def test_the_counter_is_there_with_the_option_alone() -> None:
    plain, counting = layer_of(), layer_of(debias=True, dtype="mixed_float16")
    assert plain.steps is None
    assert len(plain.weights) == 4
    assert [w.name for w in counting.weights][-1] == "steps"
    assert not counting.steps.trainable
    assert "int" in counting.steps.dtype
    counting(X[0], training=True)
    assert array(counting.steps) == 1
    assert "debias" not in plain.get_config()
    assert type(counting).from_config(counting.get_config()).debias is True


def test_other_values_are_refused() -> None:
    with pytest.raises(TypeError, match="BatchNormalization: debias must be True or False; got 1"):
        BatchNormalization(debias=1)


def test_keras_steps_count() -> None:
    model = keras.Sequential([keras.Input((3,)), layer_of(momentum=0.9, debias=True)])
    model.compile("sgd", "mse")
    layer = layer_of(momentum=0.9, debias=True)
    for x in X[:3]:
        model.train_on_batch(x, x)
        layer(x, training=True)
    check(statistics(model.layers[0]), statistics(layer))
    assert array(model.layers[0].steps) == 3


def model_of(norm: Any) -> Any:
    return keras.Sequential([keras.Input((3,)), norm, keras.layers.Dense(2)])


@pytest.mark.parametrize("cls", KINDS)
def test_files_hold_the_counter(cls: type, tmp_path: Path) -> None:
    model = model_of(cls(debias=True))
    model.layers[0](X[0], training=True)
    model.save(tmp_path / "a.keras")
    model.save_weights(tmp_path / "a.weights.h5")
    assert array(keras.models.load_model(tmp_path / "a.keras").layers[0].steps) == 1
    for load in (keras.Model.load_weights, load_weights):
        found = model_of(cls(debias=True))
        load(found, tmp_path / "a.weights.h5")
        assert array(found.layers[0].steps) == 1
        check(statistics(found.layers[0]), statistics(model.layers[0]), 0.0)


@pytest.mark.parametrize("renorm", [False, True])
def test_states_without_the_counter_have_run_for_long(renorm: bool, tmp_path: Path) -> None:
    old = model_of(BatchNormalization(renorm=renorm))
    old.layers[0](X[0], training=True)
    old.save_weights(tmp_path / "a.weights.h5")
    for norm in (
        BatchNormalization(renorm=renorm, debias=True),
        *(() if renorm else (MaskedBatchNormalization(debias=True),)),
    ):
        found = model_of(norm)
        load_weights(found, tmp_path / "a.weights.h5")
        assert array(norm.steps) == LONG_RUNNING
        norm(X[1], training=True)
        assert array(norm.steps) == LONG_RUNNING + 1
    old.layers[0](X[1], training=True)
    check(statistics(found.layers[0]), statistics(old.layers[0]))
    layer = layer_of(renorm=renorm, debias=True)
    layer.set_weights(old.layers[0].get_weights())
    assert array(layer.steps) == LONG_RUNNING
    layer.set_weights(layer_of(renorm=renorm, debias=True).get_weights())
    assert array(layer.steps) == 0
    with pytest.raises(ValueError, match=r"expected \d weights"):
        layer_of(renorm=renorm).set_weights(layer.get_weights())


def test_old_files_hold_the_counter(tmp_path: Path) -> None:
    model = model_of(BatchNormalization(debias=True))
    model.layers[0](X[0], training=True)
    keras.src.legacy.saving.legacy_h5_format.save_model_to_hdf5(model, tmp_path / "a.h5")
    found = model_of(BatchNormalization(debias=True))
    load_weights(found, tmp_path / "a.h5")
    assert array(found.layers[0].steps) == 1
    old = model_of(BatchNormalization())
    keras.src.legacy.saving.legacy_h5_format.save_model_to_hdf5(old, tmp_path / "b.h5")
    load_weights(found, tmp_path / "b.h5")
    assert array(found.layers[0].steps) == LONG_RUNNING


@pytest.mark.parametrize("options", [{}, {"renorm": True}])
def test_conversion_counts_from_0_where_nothing_has_moved(options: dict[str, Any]) -> None:
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.BatchNormalization()]
    )
    trained = model.layers[1]
    trained(X[0], training=True)
    before = statistics(trained)
    convert_batchnorm(model, debias=True, **options)
    assert [int(array(layer.steps)) for layer in model.layers] == [0, LONG_RUNNING]
    check(statistics(trained), before, 0.0)
    model.compile("sgd", "mse")
    model.train_on_batch(X[0], X[0])
    assert [int(array(layer.steps)) for layer in model.layers] == [1, LONG_RUNNING + 1]
    check(statistics(model.layers[0]), [X[0].mean(0), X[0].var(0)])


def test_conversion_of_a_layer_without_weights() -> None:
    layer = convert_batchnorm(keras.layers.BatchNormalization(), debias=True)
    layer(X[0], training=True)
    assert array(layer.steps) == 1


def test_states_of_tools_hold_the_counter() -> None:
    layer = layer_of(debias=True)
    layer(X[0], training=True)
    state = take_state(layer)
    assert state.steps == 1
    assert take_state(layer_of()).steps is None
    other = layer_of(debias=True)
    put_state(other, state)
    assert array(other.steps) == 1
    put_state(other, take_state(layer_of()))
    assert array(other.steps) == LONG_RUNNING
    put_state(layer_of(), state)


@pytest.mark.skipif(keras_backend.NAME != "torch", reason="needs torch")
def test_transfer_carries_the_counter_to_torch_and_back() -> None:
    import torch

    from batchnorm.tools import transfer
    from batchnorm.torch import BatchNorm

    source, target = layer_of(debias=True), BatchNorm(3, debias=True)
    source(X[0], training=True)
    source(X[1], training=True)
    transfer(source, target)
    assert target.num_batches_tracked.item() == 2
    target(torch.tensor(X[2]))
    transfer(target, source)
    assert array(source.steps) == 3
