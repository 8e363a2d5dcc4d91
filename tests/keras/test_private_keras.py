"""Names that Keras keeps to itself, each taken away: the public way gives the same."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from batchnorm.keras import (
    BatchNormalization,
    Remask,
    convert_batchnorm,
    find_dropped_masks,
    padding_mask,
    private,
)
from batchnorm.keras.walking import walk_layers
from batchnorm.tools import fold

BACKEND = keras.backend.backend()
X = np.random.default_rng(0).normal(size=(6, 5, 4)).astype("float32") * 3 + 2
MASK = np.arange(5) < np.array([[5], [3], [2], [4], [1], [5]])

pytestmark = pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")


def array(a: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(a))


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that takes a name of Keras away from this library."""

    def hide(name: str) -> None:
        constant = f"_{name.upper()}"
        if hasattr(private, constant):
            monkeypatch.setattr(private, constant, None)
            return

        def getattr_without(owner: Any, wanted: str, *default: Any) -> Any:
            if wanted != name:
                return builtins.getattr(owner, wanted, *default)
            if default:
                return default[0]
            raise AttributeError(name)

        monkeypatch.setattr(private, "getattr", getattr_without, raising=False)

    return hide


def a_functional_model(**options: Any) -> keras.Model:
    """Masks of `Masking`, a convolution that drops them, and `Remask` that gives them back."""
    inputs = keras.Input((5, 4))
    x = layers.Masking()(inputs)
    y = layers.Conv1D(4, 3, padding="same")(x)
    y = Remask(3, padding="same")((y, x))
    y = BatchNormalization(momentum=0.0, **options)(y)
    return keras.Model(inputs, layers.Dense(2)(layers.LayerNormalization()(y)))


def a_nested_model() -> keras.Model:
    class Block(layers.Layer):
        def __init__(self) -> None:
            super().__init__(name="block")
            self.parts = {"norms": [layers.BatchNormalization(name="a"), [layers.Dense(3)]]}
            self._own = layers.BatchNormalization(name="b")

        def call(self, x: Any) -> Any:
            return self._own(self.parts["norms"][1][0](self.parts["norms"][0](x)))

    model = keras.Sequential([keras.Input((4,)), Block(), layers.BatchNormalization(name="c")])
    model(np.ones((2, 4), "float32"))
    return model


def trained_statistics(model: keras.Model) -> list[np.ndarray]:
    x = np.where(MASK[..., None], X, 0.0)
    model(keras.ops.convert_to_tensor(x), training=True)
    return [array(a) for a in model.weights]


@pytest.mark.parametrize("name", ["get_mask", "set_mask"])
def test_masks_travel(name: str, hide: Any) -> None:
    model = a_functional_model()
    weights, x = model.get_weights(), np.where(MASK[..., None], X, 0.0)
    expected = trained_statistics(model)
    hide(name)
    again = a_functional_model()
    again.set_weights(weights)
    found = trained_statistics(again)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    eager = private.attach_mask(keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(MASK))
    assert np.array_equal(array(private.get_mask(eager)), MASK)
    symbolic = private.attach_mask(keras.KerasTensor((6, 5, 4)), keras.KerasTensor((6, 5), "bool"))
    assert tuple(private.get_mask(symbolic).shape) == (6, 5)
    bare = keras.ops.convert_to_tensor(x)
    assert private.get_mask(bare) is None
    assert private.get_mask(keras.KerasTensor((6, 5, 4))) is None
    assert private.get_mask(3) is None


def test_masks_travel_in_compiled_steps(hide: Any) -> None:
    hide("get_mask")
    model = a_functional_model()
    weights, x = model.get_weights(), np.where(MASK[..., None], X, 0.0)
    expected = trained_statistics(model)
    model.set_weights(weights)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.train_on_batch(x, np.zeros((6, 5, 2), "float32"))
    found = [array(a) for a in model.weights]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_shapes_are_told_from_values(hide: Any) -> None:
    hide("in_symbolic_scope")
    assert not private.in_symbolic_scope()
    with keras.SymbolicScope():
        assert private.in_symbolic_scope()
    assert not private.in_symbolic_scope()
    with padding_mask(MASK):  # a model is built in it, and asks for shapes only
        model = keras.Sequential([keras.Input((5, 4)), BatchNormalization(momentum=0.0)])
        model(X, training=True)
    np.testing.assert_allclose(array(model.layers[0].moving_mean), X[MASK].mean(0), rtol=1e-5)


def test_state_is_told_from_arguments(hide: Any) -> None:
    hide("in_stateless_scope")
    assert not private.in_stateless_scope()
    layer = BatchNormalization(momentum=0.0)
    layer.build(X.shape)
    trainable = [v.value for v in layer.trainable_variables]
    rest = [v.value for v in layer.non_trainable_variables]
    with keras.StatelessScope():
        assert private.in_stateless_scope()
    _, moved = layer.stateless_call(trainable, rest, keras.ops.convert_to_tensor(X), training=True)
    assert array(layer.moving_mean).tolist() == [0.0] * 4
    np.testing.assert_allclose(array(moved[0]), X.mean((0, 1)), rtol=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a name of TensorFlow's")
def test_programs_of_xla_are_right(hide: Any) -> None:
    import tensorflow as tf

    layer = BatchNormalization(momentum=0.0)
    layer.build(X.shape)
    expected = array(layer(X, training=True))
    hide("in_xla_graph")
    for xla in (False, True):
        step = tf.function(lambda x: layer(x, training=True), jit_compile=xla)
        np.testing.assert_allclose(array(step(tf.constant(X))), expected, rtol=1e-5, atol=1e-5)


def test_layers_are_found(hide: Any) -> None:
    model = a_nested_model()
    every = {name for name, a in walk_layers(model) if not isinstance(a, layers.InputLayer)}
    hide("_layers")
    found = [name for name, _ in walk_layers(model)]
    assert set(found) == every
    assert len(found) == len(every)
    report: list[Any] = []
    convert_batchnorm(model, report=report)
    assert sorted(one.name for one in report) == ["block/a", "block/b", "c"]


@pytest.mark.parametrize("name", ["_inbound_nodes", "_outbound_nodes", "_keras_history"])
def test_without_a_graph_nothing_is_said_to_be_found(name: str, hide: Any) -> None:
    hide(name)
    inputs = keras.Input((5, 4))
    x = layers.Conv1D(4, 3, padding="same")(layers.Masking()(inputs))
    if name == "_outbound_nodes":  # the search itself does not need it
        with pytest.warns(UserWarning, match="gets no mask"):
            model = keras.Model(inputs, BatchNormalization()(x))
    else:
        model = keras.Model(inputs, BatchNormalization()(x))
    with pytest.raises(RuntimeError, match=r"^find_dropped_masks: Keras 3\.\d+\.\d+ does not show"):
        find_dropped_masks(model)
    assert model(X).shape == (6, 5, 4)


def test_models_fold(hide: Any) -> None:
    inputs = keras.Input((4,))
    dense = layers.Dense(4, name="dense")
    x = layers.BatchNormalization(name="norm")(dense(keras.ops.tanh(inputs)))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3), BatchNormalization()])
    model = keras.Model(inputs, [inner(x), layers.BatchNormalization(name="kept")(inputs)])
    model(X[:, 0], training=True)
    expected = fold(model).report
    hide("_nodes_by_depth")
    folded, found = fold(model)
    assert found.folded == expected.folded
    assert found.kept == expected.kept
    assert (len(found.folded), [a.name for a in found.kept]) == (2, ["kept"])
    for a, b in zip(folded(X[:, 0]), model(X[:, 0]), strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-4, atol=1e-5)


def test_built_layers_take_no_weights_then(hide: Any) -> None:
    hide("_tracker")
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    with pytest.raises(RuntimeError, match=r"is built, and Keras .* Convert the model before"):
        convert_batchnorm(model, renorm=True)
    layer = convert_batchnorm(layers.BatchNormalization(), renorm=True)
    layer(X, training=True)
    assert len(layer.weights) == 7


def test_weights_have_the_name_of_their_layer(hide: Any) -> None:
    hide("_open_name_scope")
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="norm")])
    convert_batchnorm(model, renorm=True)
    added = [w.path.split("/")[-2:] for w in model.weights[-3:]]
    assert added == [["norm", a] for a in ("moving_stddev", "renorm_mean", "renorm_stddev")]


def test_build_is_replaced() -> None:
    layer = layers.BatchNormalization(name="norm")
    plain = layers.BatchNormalization.build

    def build(shape: Any) -> None:
        plain(layer, shape)

    object.__setattr__(layer, "build", build)  # no wrapper that is known
    convert_batchnorm(layer, renorm=True, virtual_batch_size=3)
    layer(X, training=True)
    assert layer.built
    assert len(layer.weights) == 7
    assert all(w.path.startswith("norm/") for w in layer.weights)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's fit holds the state")
def test_state_that_fit_holds_is_seen(hide: Any) -> None:
    hide("_value")
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(renorm=True)])
    model.layers[0].set_renorm_clipping(rmax=2.0)
    model.compile("sgd", "mse")

    class Sets(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            held.set_renorm_clipping(rmax=3.0)

    held = model.layers[0]
    with pytest.raises(RuntimeError, match=r"model\.jax_state_sync\(\)"):
        model.fit(X[:, 0, :3], X[:, 0, :3], callbacks=[Sets()], verbose=0)


def test_each_private_name_is_taken_away_here() -> None:
    source = ast.parse(Path(str(private.__file__)).read_text())
    constants = {a.value for a in ast.walk(source) if isinstance(a, ast.Constant)}
    names = {a for a in constants if isinstance(a, str) and re.fullmatch("_[a-z]+(_[a-z]+)*", a)}
    names |= {a[1:].lower() for a in vars(private) if a.startswith("_") and a.isupper()}
    tests = ast.parse(Path(__file__).read_text())
    hidden = {a.value for a in ast.walk(tests) if isinstance(a, ast.Constant)}
    assert names >= {"_layers", "_inbound_nodes", "get_mask"}
    assert names <= hidden
