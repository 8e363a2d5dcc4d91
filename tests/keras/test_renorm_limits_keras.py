"""`set_renorm_clipping`: limits that move, as data of compiled steps (S11)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import keras_backend
from batchnorm.keras import BatchNormalization, convert_batchnorm

TENSORFLOW, JAX = (name == keras_backend.NAME for name in ("tensorflow", "jax"))
X = np.random.default_rng(0).normal(5.0, 2.0, (16, 3)).astype("float32")
NONE = {"rmax": 1.0, "rmin": 1.0, "dmax": 0.0}  # plain batch normalization
WIDE = {"rmax": math.inf, "rmin": 0.0, "dmax": math.inf}


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(a))


def layer_of(**options: Any) -> Any:
    layer = BatchNormalization(**({"renorm": True} | options))
    layer.build((None, 3))
    return layer


def output(limits: dict[str, float], **options: Any) -> np.ndarray:
    """y of a layer that has had these limits from the start."""
    finite = {name: a for name, a in limits.items() if math.isfinite(a)}
    return array(layer_of(renorm_clipping=finite, **options)(X, training=True))


@pytest.mark.sample(2)
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("limits", [NONE, WIDE, {"rmax": 1.5, "rmin": 0.5, "dmax": 0.3}])
def test_the_next_step_has_them(fused: bool | None, limits: dict[str, float]) -> None:
    layer = layer_of(renorm_clipping={"rmax": 1.2, "dmax": 0.1}, fused=fused)
    before = [array(w).copy() for w in layer.weights]
    weights, config = list(layer.weights), layer.get_config()
    layer.set_renorm_clipping(**limits)
    assert all((array(w) == a).all() for w, a in zip(layer.weights, before, strict=True))
    assert all(a is b for a, b in zip(layer.weights, weights, strict=True))
    assert layer.get_config() == config
    np.testing.assert_allclose(array(layer(X, training=True)), output(limits), rtol=1e-5, atol=1e-5)


def test_limits_that_are_left_out_stay() -> None:
    layer = layer_of(renorm_clipping={"rmax": 1.5, "rmin": 0.5})
    layer.set_renorm_clipping(dmax=0.3)
    layer.set_renorm_clipping(rmax=2.0)
    expected = output({"rmax": 2.0, "rmin": 0.5, "dmax": 0.3})
    np.testing.assert_allclose(array(layer(X, training=True)), expected, rtol=1e-5, atol=1e-5)


def test_before_the_layer_is_built() -> None:
    layer = BatchNormalization(renorm=True)
    layer.set_renorm_clipping(**NONE)
    np.testing.assert_allclose(array(layer(X, training=True)), output(NONE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "message", "limits"),
    [
        (ValueError, "dmax must be finite and at least 0; got -1", {"dmax": -1.0}),
        (ValueError, "need rmax >= rmin; got rmax=0.1 and rmin=0.5", {"rmax": 0.1, "rmin": 0.5}),
        (ValueError, "rmin must be finite", {"rmin": math.inf}),
        (TypeError, "rmax must be a real number; got '3'", {"rmax": "3"}),
        (TypeError, "save must be True or False", {"save": 1}),
    ],
)
def test_limits_that_break_a_rule_change_nothing(
    error: type[Exception], message: str, limits: dict[str, Any]
) -> None:
    layer = layer_of(renorm_clipping={"rmin": 0.2, "rmax": 1.5, "dmax": 0.3})
    with pytest.raises(error, match=f"BatchNormalization: .*{message}"):
        layer.set_renorm_clipping(**limits)
    expected = output({"rmin": 0.2, "rmax": 1.5, "dmax": 0.3})
    np.testing.assert_allclose(array(layer(X, training=True)), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_without_renormalization_has_none() -> None:
    with pytest.raises(ValueError, match="BatchNormalization: the layer has renorm=False"):
        layer_of(renorm=False).set_renorm_clipping(rmax=3.0)


def test_compiled_steps_read_them_as_data() -> None:
    layer, traces = layer_of(), []

    def forward(*state_and_x: Any) -> Any:
        traces.append(state_and_x)
        if not JAX:
            return layer(*state_and_x, training=True)
        return layer.stateless_call(*state_and_x, training=True)[0]

    compiled = keras_backend.trace(forward)

    def call() -> np.ndarray:
        state = []
        if JAX:
            both = (layer.trainable_variables, layer.non_trainable_variables)
            state = [[v.value for v in variables] for variables in both]
        for name, value in initial.items():
            getattr(layer, name).assign(value)
        return array(compiled(*state, ops.convert_to_tensor(X)))

    names = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
    initial = {name: array(getattr(layer, name)).copy() for name in names}
    for limits in (NONE, WIDE, {"rmax": 1.5, "rmin": 0.5, "dmax": 0.3}):
        layer.set_renorm_clipping(**limits)
        np.testing.assert_allclose(call(), output(limits), rtol=1e-5, atol=1e-5)
    assert len(traces) == (1 if TENSORFLOW or JAX else 3)


class Schedule(keras.callbacks.Callback):
    """Limits that grow with each batch; of `layer`, or the model's first one."""

    def __init__(self, layer: Any = None) -> None:
        super().__init__()
        self.layer, self.step = layer, 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        layer = self.layer or self.model.layers[0]
        layer.set_renorm_clipping(rmax=1.0 + self.step, dmax=0.5 * self.step)
        self.step += 1


def test_fit_follows_a_schedule_and_compiles_once() -> None:
    traces = []

    class Norm(BatchNormalization):
        def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
            traces.append(self)
            return super().call(inputs, training=training, mask=mask)

    def model_of(cls: type) -> Any:
        model = keras.Sequential([keras.Input((3,)), cls(renorm=True)])
        model.layers[0].set_renorm_clipping(**NONE)
        model.compile("sgd", "mse")
        return model

    found, expected = model_of(Norm), model_of(BatchNormalization)
    x = np.concatenate([X, X + 1.0, X * 2.0])
    options = {"batch_size": 16, "shuffle": False, "verbose": 0}
    found.fit(x[:16], x[:16], **options)
    expected.train_on_batch(x[:16], x[:16])
    count = len(traces)
    found.fit(x, x, callbacks=[Schedule()], **options)
    if TENSORFLOW or JAX:
        assert len(traces) == count
    for step, part in enumerate(np.split(x, 3)):
        expected.layers[0].set_renorm_clipping(rmax=1.0 + step, dmax=0.5 * step)
        expected.train_on_batch(part, part)
    pairs = zip(found.weights, expected.weights, strict=True)
    assert all(np.allclose(array(a), array(b), rtol=1e-5, atol=1e-6) for a, b in pairs)


@pytest.mark.skipif(not JAX, reason="JAX's fit holds the state")
def test_limits_that_fit_would_lose_are_refused() -> None:
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(renorm=True)])
    model.compile("sgd", "mse")
    x = np.concatenate([X, X])
    with pytest.raises(RuntimeError, match=r"BatchNormalization: .*model\.jax_state_sync\(\)"):
        model.fit(x, x, batch_size=16, callbacks=[Schedule(model.layers[0])], verbose=0)


def test_limits_that_are_set_late_reach_compiled_steps() -> None:
    found = []
    for limits, again in ((NONE, False), (NONE, True), ({}, False)):
        model = keras.Sequential([keras.Input((3,)), BatchNormalization(renorm=True)])
        model.compile("sgd", "mse")
        model.train_on_batch(X, X)
        if limits:
            model.layers[0].set_renorm_clipping(**limits)
        if again:
            model.compile("sgd", "mse")
        model.train_on_batch(X * 3.0, X)
        found.append(array(model.layers[0].gamma))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    assert (abs(found[0] - found[2]) > 1e-3).all()


def test_files_hold_them_if_asked(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(renorm=True)])
    plain = len(model.layers[0].get_weights())
    for save in (False, True):
        model.layers[0].set_renorm_clipping(rmax=1.5, dmax=math.inf, save=save)
        model.save(tmp_path / "a.keras")
        model.save_weights(tmp_path / "a.weights.h5")
        found = keras.models.load_model(tmp_path / "a.keras").layers[0]
        assert found.renorm_clipping == ({"rmax": 1.5, "rmin": 0.0} if save else None)
        assert found._options.renorm.rmax == (1.5 if save else math.inf)
        assert len(model.layers[0].get_weights()) == plain
        other = keras.Sequential([keras.Input((3,)), BatchNormalization(renorm=True)])
        other.load_weights(tmp_path / "a.weights.h5")
        assert other.layers[0]._options.renorm.rmax == math.inf


def test_tools_that_read_options_again_leave_them() -> None:
    layer = layer_of(renorm_clipping={"rmax": 1.5})
    layer.set_renorm_clipping(rmax=1.1)
    layer.epsilon, layer.renorm_momentum = 0.25, 0.5
    layer._read_options()
    assert (layer._options.eps, layer._options.renorm.rmax) == (0.25, 1.1)
    assert layer._options.renorm.decay == 0.5


def test_converted_layers_take_them() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    convert_batchnorm(model, renorm=True)
    model.layers[0].set_renorm_clipping(**NONE)
    found = array(model(X, training=True))
    np.testing.assert_allclose(found, output(NONE), rtol=1e-5, atol=1e-5)
