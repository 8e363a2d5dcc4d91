"""`convert_batchnorm`: Keras's batch norms become ours, wherever they are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization, Conversion, convert_batchnorm

Stock = keras.layers.BatchNormalization


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """A composite layer: norms as an attribute and in a list."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = Stock(name="norm")
        self.more = [keras.layers.Dense(4), Stock(name="last")]

    def call(self, x: Any, training: Any = None) -> Any:
        x = self.norm(x, training=training)
        for layer in self.more:
            x = layer(x)
        return x


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.norm = Stock()

    def call(self, x: Any, training: Any = None) -> Any:
        return self.norm(self.block(x), training=training)


def functional(block: bool = True) -> keras.Model:
    inputs = keras.Input((4,))
    shared = Stock(name="shared", momentum=0.5)
    inner = keras.Sequential([keras.Input((4,)), Stock(name="deep")], name="inner")
    x = shared(inner(shared(inputs)))
    if block:
        x = Block(name="block")(x)
    return keras.Model(inputs, keras.layers.Dense(1)(x))


def rows(n: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(3.0, 2.0, (n, 4)).astype("float32")


def evaluate(model: Any, x: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(x, training=False))


def step(model: Any) -> None:
    model.fit(rows(), rows()[:, :1], batch_size=8, epochs=1, verbose=0)


def test_nested_shared_and_composite_norms_are_converted_in_place() -> None:
    model = functional()
    shared, weights, x = model.get_layer("shared"), list(model.weights), rows()
    before, report = evaluate(model, x), []
    assert convert_batchnorm(model, report=report) is model
    assert sorted(one.name for one in report) == [
        "block/last", "block/norm", "inner/deep", "shared",
    ]  # fmt: skip
    assert all(one[1:] == (Stock, BatchNormalization, "") for one in report)
    assert model.get_layer("shared") is shared
    assert shared.momentum == 0.5
    assert all(a is b for a, b in zip(model.weights, weights, strict=True))
    np.testing.assert_allclose(evaluate(model, x), before, rtol=1e-5, atol=1e-5)


def test_a_training_step_moves_the_same_statistics() -> None:
    keras.utils.set_random_seed(0)
    theirs = functional()
    ours = keras.models.clone_model(theirs)
    ours.set_weights(theirs.get_weights())
    convert_batchnorm(ours)
    for model in (theirs, ours):
        model.compile("sgd", "mse")
        step(model)
    for a, b in zip(theirs.get_weights(), ours.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_compiled_model_keeps_its_optimizer_and_takes_new_steps() -> None:
    model = functional()
    model.compile("adam", "mse")
    step(model)
    optimizer = model.optimizer
    convert_batchnorm(model, renorm=True)
    step(model)
    assert model.optimizer is optimizer
    assert int(optimizer.iterations) == 2


def test_a_subclassed_model_that_was_not_built_yet() -> None:
    model = convert_batchnorm(Subclassed())
    model(rows())
    assert type(model.norm) is BatchNormalization
    assert model.norm._channels == (4,)
    assert type(model.block.more[1]) is BatchNormalization


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 4}])
def test_a_converted_model_saves_and_loads(tmp_path: Path, options: dict[str, Any]) -> None:
    model = functional(block=False)
    model.compile("adam", "mse")
    convert_batchnorm(model, **options)
    step(model)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again.get_layer("shared")) is BatchNormalization
    np.testing.assert_allclose(evaluate(again, rows()), evaluate(model, rows()), rtol=1e-6)
    step(again)


def test_renormalization_starts_from_the_moving_statistics() -> None:
    layer = Stock()
    layer.build((None, 2))
    layer.set_weights([np.full(2, v, "float32") for v in (1.0, 0.0, 3.0, 4.0)])
    convert_batchnorm(layer, renorm=True)
    found = [float(w[0]) for w in map(keras.ops.convert_to_numpy, layer.weights)]
    assert found == pytest.approx([1, 0, 3, 4, 2.00025, 3, 2.00025])


def test_names_choose_layers() -> None:
    model, report = functional(), []
    convert_batchnorm(model, only=["block/*", "inner/*"], skip="*/last", report=report)
    chosen = {one.name for one in report if one.after is BatchNormalization}
    assert chosen == {"block/norm", "inner/deep"}
    reasons = {one.reason for one in report if one.after is None}
    assert reasons <= {"only= does not name it", "skip= names it"}


def test_trainable_and_names_are_kept() -> None:
    layer = Stock(name="frozen", trainable=False)
    convert_batchnorm(layer)
    assert layer.name == "frozen"
    assert not layer.trainable


def test_what_cannot_be_exchanged_is_listed() -> None:
    class Own(Stock):
        pass

    half = Stock(dtype="float16", name="half")
    model = keras.Sequential([keras.Input((4,)), Own(name="own"), half])
    report: list[Conversion] = []
    with pytest.warns(UserWarning, match=r"own \(a subclass .*half \(.*float32"):
        convert_batchnorm(model, report=report)
    assert [one.after for one in report] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axis": 1}, "options must be among .*got axis"),
        ({"only": 3}, "only must be a pattern"),
        ({"momentum": 2.0}, "momentum"),
    ],
)
def test_errors_leave_the_model_alone(arguments: dict[str, Any], message: str) -> None:
    layer = Stock()
    with pytest.raises((TypeError, ValueError), match=f"convert_batchnorm: .*{message}"):
        convert_batchnorm(layer, **arguments)
    assert type(layer) is Stock
