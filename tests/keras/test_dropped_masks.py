"""Masks that Keras propagates, layers that drop them, and the batch norms behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import batchnorm.keras.dropped
from batchnorm.keras import DroppedMask, convert_batchnorm, find_dropped_masks

# Keras's own warning, of each layer that drops a mask.
pytestmark = pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")


def norm(name: str = "norm", **options: Any) -> Any:
    """Keras's own layer, which does not warn while a model is built."""
    return layers.BatchNormalization(name=name, **options)


def model_of(*middle: Any, shape: tuple[int | None, ...] = (8, 4)) -> keras.Model:
    """Masking, and layers or functions behind it."""
    inputs = keras.Input(shape)
    x = layers.Masking()(inputs)
    for layer in middle:
        x = layer(x)
    return keras.Model(inputs, x)


def conv(name: str = "conv", **options: Any) -> Any:
    return layers.Conv1D(4, 3, padding="same", name=name, **options)


class Block(layers.Layer):
    """A layer of layers that Keras cannot look into."""

    def __init__(self, *, inner: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner = inner
        self.last = norm()

    def build(self, input_shape: Any) -> None:
        self.inner.build(input_shape)
        self.last.build(input_shape)

    def call(self, x: Any) -> Any:
        return self.last(self.inner(x))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


class Native(Block):
    """A block whose call needs values."""

    def call(self, x: Any) -> Any:
        return super().call(x if float(keras.ops.sum(x)) >= 0 else -x)


def a_subclassed_model(inner: Any) -> keras.Model:
    class Model(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.mask = layers.Masking()
            self.inner = inner
            self.norm = norm()

        def call(self, x: Any) -> Any:
            return self.norm(keras.ops.tanh(self.inner(self.mask(x))))

    model = Model()
    model(np.ones((2, 8, 4), "float32"))
    return model


def a_sum() -> keras.Model:
    one, other = keras.Input((8, 4)), keras.Input((8, 4))
    x = layers.Add(name="add")([layers.Masking()(one), other])
    return keras.Model([one, other], norm()(x))


DROPPED: dict[str, tuple[Callable[[], keras.Model], list[tuple[str, str]]]] = {
    "a convolution": (lambda: model_of(conv(), norm()), [("norm", "conv")]),
    "layers between": (
        lambda: model_of(conv(), layers.ReLU(), layers.Dropout(0.1), norm()),
        [("norm", "conv")],
    ),
    "each norm behind": (
        lambda: model_of(norm("first"), conv(), norm("second"), conv("conv2"), norm("third")),
        [("second", "conv"), ("third", "conv")],
    ),
    "pooling": (lambda: model_of(layers.MaxPooling1D(2, name="pool"), norm()), [("norm", "pool")]),
    "another convolution behind the pooling": (
        lambda: model_of(layers.MaxPooling1D(2, name="pool"), conv(), norm()),
        [("norm", "pool")],
    ),
    "a branch": (
        lambda: model_of(lambda x: layers.Add(name="add")([x, conv()(x)]), norm()),
        [("norm", "conv")],
    ),
    "a sum with what never had a mask": (a_sum, [("norm", "add")]),
    "a nested model": (
        lambda: model_of(
            keras.Sequential([keras.Input((8, 4)), layers.ReLU(), conv(), norm()], name="part")
        ),
        [("part/norm", "part/conv")],
    ),
    "behind a nested model": (
        lambda: model_of(keras.Sequential([keras.Input((8, 4)), conv()], name="part"), norm()),
        [("norm", "part/conv")],
    ),
    "a composite layer": (
        lambda: model_of(Block(inner=conv(), name="block")),
        [("block/norm", "block/conv")],
    ),
    "a subclassed model": (lambda: a_subclassed_model(conv()), [("norm", "conv")]),
}


@pytest.mark.parametrize("case", DROPPED)
def test_the_layer_that_drops_the_mask_is_named(case: str) -> None:
    make, expected = DROPPED[case]
    given = np.ones((2, 8, 4), "float32") if "subclassed" in case else None
    assert find_dropped_masks(make(), given) == [DroppedMask(*pair) for pair in expected]


def test_an_operation_is_named_as_keras_names_it() -> None:
    (found,) = find_dropped_masks(model_of(keras.ops.tanh, norm()))
    assert found.norm == "norm"
    assert found.by.startswith("tanh")


KEPT: dict[str, Callable[[], keras.Model]] = {
    "no mask at all": lambda: keras.Sequential([keras.Input((8, 4)), conv(), norm()]),
    "layers that pass it on": lambda: model_of(layers.Dense(4), layers.ReLU(), norm()),
    "a nested model that passes it on": lambda: model_of(
        keras.Sequential([keras.Input((8, 4)), layers.Dense(4), norm("inner")]), norm()
    ),
    "a composite layer that passes it on": lambda: model_of(Block(inner=layers.Dense(4))),
    "the last state of an LSTM": lambda: model_of(layers.LSTM(4), norm()),
    "pooling over all positions": lambda: model_of(layers.GlobalAveragePooling1D(), norm()),
    "other pooling over all positions": lambda: model_of(
        conv(), layers.GlobalMaxPooling1D(), layers.Dense(4), norm()
    ),
    "positions that became channels": lambda: model_of(layers.Flatten(), norm()),
    "an explicit mask": lambda: model_of(
        lambda x: norm()(conv()(x), mask=keras.ops.any(keras.ops.not_equal(x, 0), axis=-1))
    ),
    "a mask that came back": lambda: model_of(
        lambda x: norm()(batchnorm.keras.Remask(3, padding="same")([conv()(x), x]))
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_no_false_alarm(case: str) -> None:
    assert find_dropped_masks(KEPT[case]()) == []


def test_a_subclassed_model_is_looked_into_with_inputs() -> None:
    model = a_subclassed_model(layers.Dense(4))
    with pytest.raises(ValueError, match="inputs must be given"):
        find_dropped_masks(model)
    (found,) = find_dropped_masks(model, keras.KerasTensor((None, 8, 4)))
    assert found.by.startswith("tanh")


def test_inputs_may_carry_a_mask() -> None:
    model = keras.Sequential([keras.Input((8, 4)), conv(), norm()])
    x = layers.Masking()(keras.ops.ones((2, 8, 4)))
    assert find_dropped_masks(model, x) == [("norm", "conv")]


def test_nothing_in_the_model_changes() -> None:
    model = model_of(
        keras.Sequential([keras.Input((8, 4)), layers.Dense(4), norm("inner")], name="part"),
        keras.ops.tanh,
        Block(inner=conv(), name="block"),
    )
    every = [*model._flatten_layers(), *model.operations]
    before = [(len(a._inbound_nodes), len(a._outbound_nodes)) for a in every]
    weights = model.get_weights()
    assert find_dropped_masks(model)
    assert [(len(a._inbound_nodes), len(a._outbound_nodes)) for a in every] == before
    assert all("symbolic_call" not in vars(a) for a in every)
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    keras.models.clone_model(model.get_layer("part"))  # the graph is still whole


def test_what_cannot_be_looked_into_is_said() -> None:
    block = Native(inner=conv(), name="block")
    block.compute_output_spec = lambda x: keras.KerasTensor(x.shape, x.dtype)
    with pytest.warns(UserWarning, match=r"could not look into 'block' \(ValueError: "):
        assert find_dropped_masks(model_of(block)) == []


def test_models_that_are_not_built_are_refused() -> None:
    with pytest.raises(ValueError, match="not built"):
        find_dropped_masks(keras.Sequential([conv(), norm()]))
    with pytest.raises(TypeError, match="must be a Keras layer"):
        find_dropped_masks("model")


# Warnings while a model is built, and when it is converted.


def ours(name: str = "norm") -> Any:
    return batchnorm.keras.BatchNormalization(name=name)


def test_building_a_model_warns() -> None:
    with pytest.warns(UserWarning, match=r"'norm' gets no mask, since 'conv' \(Conv1D\) does not"):
        model_of(conv(), layers.ReLU(), ours())


def test_building_warns_once_for_each_norm() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = model_of(ours("first"), conv(), ours("second"), ours("third"))
        model(np.ones((2, 8, 4), "float32"), training=True)
    said = [str(w.message) for w in caught if "gets no mask" in str(w.message)]
    assert [text.split("'")[1] for text in said] == ["second", "third"]
    assert all(w.filename == __file__ for w in caught if "gets no mask" in str(w.message))


def test_a_sequential_model_warns() -> None:
    with pytest.warns(UserWarning, match="'norm' gets no mask"):
        keras.Sequential([keras.Input((8, 4)), layers.Masking(), conv(), ours()])


def test_models_in_between_give_no_false_alarm() -> None:
    # Keras says that the nested model drops the mask; when it runs, masks travel through.
    part = keras.Sequential([keras.Input((8, 4)), layers.Dense(4)])
    model = model_of(part, ours())
    assert find_dropped_masks(model) == []
    x = np.random.default_rng(0).normal(5.0, 1.0, (2, 8, 4)).astype("float32")
    x[:, 5:] = 0.0
    norm, rows = model.get_layer("norm"), keras.ops.convert_to_numpy(part(x))[:, :5]
    norm.momentum = 0.0
    norm._read_options()
    model(x, training=True)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(norm.moving_mean), rows.mean((0, 1)), rtol=1e-4
    )


@pytest.mark.parametrize("case", KEPT)
def test_conversion_gives_no_false_alarm(case: str) -> None:
    convert_batchnorm(KEPT[case]())


def test_conversion_warns() -> None:
    model = model_of(conv(), norm("one"), layers.ReLU(), norm("two"))
    with pytest.warns(UserWarning, match=r"'one' gets no mask.*'conv'.*'two' gets no mask"):
        convert_batchnorm(model)


def test_the_search_of_a_deep_model_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    found = batchnorm.keras.dropped._made_by
    monkeypatch.setattr(
        batchnorm.keras.dropped, "_made_by", lambda a: (asked.append(a), found(a))[1]
    )
    x = keras.Input((8, 4))
    for i in range(50):
        x = ours(f"norm{i}")(layers.Add()([x, layers.ReLU()(x)]))
    assert len(asked) < 50 * 5
