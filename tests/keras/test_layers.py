"""The layer within Keras: masks, training flags, types, config."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import keras_backend
from batchnorm.keras import BatchNormalization, MaskedBatchNormalization, SyncBatchNormalization

EPS = 1e-3
CLASSES = [BatchNormalization, MaskedBatchNormalization, SyncBatchNormalization]


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(a))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2.0, 3.0, shape).astype("float32")


def normalized(x: np.ndarray, real: np.ndarray | None = None) -> np.ndarray:
    """x of shape (..., C) by the moments of its real rows."""
    wide = x.astype("float64")
    rows = wide.reshape(-1, x.shape[-1]) if real is None else wide[real]
    return (wide - rows.mean(0)) / np.sqrt(rows.var(0) + EPS)


def values(layer: Any) -> list[list[Any]]:
    """Values of the trainable weights, and of the others."""
    kinds = (layer.trainable_weights, layer.non_trainable_weights)
    return [[w.value for w in weights] for weights in kinds]


# Masks.


@pytest.mark.parametrize("way", ["pair", "argument"])
def test_mask_as_pair_and_as_argument(way: str) -> None:
    x, mask = draw(4, 6, 3), np.random.default_rng(1).random((4, 6)) < 0.5
    layer = BatchNormalization(momentum=0.0)
    y = layer((x, mask), training=True) if way == "pair" else layer(x, mask=mask, training=True)
    np.testing.assert_allclose(array(y), normalized(x, mask), atol=1e-5)
    np.testing.assert_allclose(array(layer.moving_mean), x[mask].mean(0), rtol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_mask_of_a_masking_layer_is_used_and_carried_on(cls: Any) -> None:
    x = draw(4, 6, 3)
    x[:, 4:] = 0.0
    y = cls()(keras.layers.Masking()(x), training=True)
    mask = np.broadcast_to(np.arange(6) < 4, (4, 6))
    np.testing.assert_allclose(array(y), normalized(x, mask), atol=1e-5)
    np.testing.assert_array_equal(array(y._keras_mask), mask)


def test_mask_of_an_embedding_is_used() -> None:
    tokens = np.array([[1, 2, 3, 0], [4, 0, 0, 0]])
    embedding = keras.layers.Embedding(5, 3, mask_zero=True)
    x = array(embedding(tokens))
    y = BatchNormalization()(embedding(tokens), training=True)
    np.testing.assert_allclose(array(y), normalized(x, tokens != 0), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "carried"),
    [((4, 6), (4, 6)), ((4,), (4, 6)), ((4, 6, 1), (4, 6)), ((4, 6, 3), None)],
)
def test_mask_that_the_output_carries_on(
    shape: tuple[int, ...], carried: tuple[int, ...] | None
) -> None:
    mask = np.random.default_rng(2).random(shape) < 0.5
    y = BatchNormalization()((draw(4, 6, 3), mask.astype("int32")))
    found = getattr(y, "_keras_mask", None)
    if carried is None:
        assert found is None
        return
    assert array(found).dtype == bool
    expected = mask.reshape(*shape, *(1,) * (2 - len(shape))) if len(shape) < 3 else mask[..., 0]
    np.testing.assert_array_equal(array(found), np.broadcast_to(expected, carried))


def test_layers_behind_see_the_mask() -> None:
    x, mask = draw(4, 6, 3), np.arange(6) < np.array([[1], [3], [6], [2]])
    pool = keras.layers.GlobalAveragePooling1D()
    y = pool(BatchNormalization()((x, mask), training=True))
    expected = (normalized(x, mask) * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(array(y), expected, atol=1e-5)


def test_functional_model_with_a_boolean_input() -> None:
    x, mask = draw(4, 6, 3), np.random.default_rng(3).random((4, 6)) < 0.5
    inputs = keras.Input((6, 3)), keras.Input((6,), dtype="bool")
    for outputs in (
        BatchNormalization()(inputs),
        BatchNormalization()(inputs[0], mask=inputs[1]),
    ):
        model = keras.Model(inputs, outputs)
        assert outputs.shape == (None, 6, 3)
        y = array(model([x, mask], training=True))
        np.testing.assert_allclose(y, normalized(x, mask), atol=1e-5)


def test_mask_with_channels_first() -> None:
    x, mask = draw(4, 3, 6), np.random.default_rng(4).random((4, 6)) < 0.5
    y = array(BatchNormalization(axis=1)(x, mask=mask, training=True))
    expected = np.moveaxis(normalized(np.moveaxis(x, 1, -1), mask), -1, 1)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_mask_with_a_single_channel() -> None:
    x, mask = draw(8, 1), np.arange(8) < 5
    y = array(BatchNormalization()(x, mask=mask, training=True))
    np.testing.assert_allclose(y, normalized(x, mask), atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_nan_in_padding_stays_there(cls: Any) -> None:
    x, mask = draw(16, 3), np.arange(16) < 9
    x[~mask] = np.nan
    layer = cls()
    y = array(layer((x, mask), training=True))
    np.testing.assert_allclose(y[mask], normalized(x, mask)[mask], atol=1e-5)
    assert np.isfinite(np.concatenate([array(w).ravel() for w in layer.weights])).all()


def test_empty_batch_leaves_the_statistics() -> None:
    layer = BatchNormalization()
    y = layer(np.zeros((0, 3), "float32"), training=True)
    assert tuple(y.shape) == (0, 3)
    np.testing.assert_array_equal(array(layer.moving_mean), 0.0)
    np.testing.assert_array_equal(array(layer.moving_variance), 1.0)


def test_single_value_gives_beta() -> None:
    layer = BatchNormalization(beta_initializer=keras.initializers.Constant(3.0))
    np.testing.assert_allclose(array(layer(np.full((1, 2), 7.0, "float32"), training=True)), 3.0)


# Training flags.


@pytest.mark.parametrize("flag", [True, 1, False, 0, None])
def test_training_flag(flag: Any) -> None:
    x = draw(8, 3)
    y = array(BatchNormalization()(x, training=flag))
    expected = normalized(x) if flag else x / np.sqrt(1 + EPS)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("traced", [True, False])
def test_training_flag_as_a_tensor(value: bool, traced: bool) -> None:
    x = draw(8, 3)
    layer = BatchNormalization()
    layer.build(x.shape)

    def call(x: Any, flag: Any) -> Any:
        if keras_backend.NAME != "jax":
            return layer(x, training=flag)
        return layer.stateless_call(*values(layer), x, training=flag)[0]

    run = keras_backend.trace(call) if traced else call
    y = array(run(ops.convert_to_tensor(x), ops.convert_to_tensor(value)))
    expected = normalized(x) if value else x / np.sqrt(1 + EPS)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_context_gives_the_training_flag() -> None:
    x = draw(8, 3)
    model = keras.Sequential([keras.Input((3,)), BatchNormalization()])
    np.testing.assert_allclose(array(model(x, training=True)), normalized(x), atol=1e-5)


def test_freezing_a_model_reaches_every_layer_and_back() -> None:
    x, layer = draw(8, 3), BatchNormalization(momentum=0.5)
    inner = keras.Sequential([keras.Input((3,)), layer])
    model = keras.Sequential([keras.Input((3,)), inner])
    model.trainable = False
    assert model.trainable_weights == []
    np.testing.assert_allclose(
        array(model(x, training=True)), x / np.sqrt(1 + EPS), rtol=1e-5, atol=1e-6
    )
    model.trainable = True
    np.testing.assert_allclose(array(model(x, training=True)), normalized(x), atol=1e-5)
    np.testing.assert_allclose(array(layer.moving_mean), 0.5 * x.mean(0), rtol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_trainable_is_taken_up_at_the_next_compile(cls: Any) -> None:
    x, layer = draw(32, 3), cls(momentum=0.5)
    model = keras.Sequential([keras.Input((3,)), layer, keras.layers.Dense(1)])

    def fit() -> None:
        model.compile("sgd", "mse")
        model.fit(x, np.zeros((32, 1)), batch_size=32, verbose=0)

    layer.trainable = False
    fit()
    np.testing.assert_array_equal(array(layer.moving_mean), 0.0)
    np.testing.assert_array_equal(array(layer.gamma), 1.0)
    layer.trainable = True
    fit()
    np.testing.assert_allclose(array(layer.moving_mean), 0.5 * x.mean(0), rtol=1e-5)
    assert (array(layer.gamma) != 1.0).all()
    layer.trainable = False
    before = array(layer.moving_mean)
    fit()
    np.testing.assert_array_equal(array(layer.moving_mean), before)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("eagerly", [True, False])
def test_fit_with_masks(cls: Any, eagerly: bool) -> None:
    x, mask = draw(20, 4, 3), np.random.default_rng(5).random((20, 4)) < 0.5
    inputs = keras.Input((4, 3)), keras.Input((4,), dtype="bool")
    layer = cls(momentum=0.0)
    model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
    model.compile("sgd", "mse", run_eagerly=eagerly)
    model.fit([x, mask], np.zeros((20, 4, 1)), batch_size=20, epochs=2, verbose=0, shuffle=False)
    np.testing.assert_allclose(array(layer.moving_mean), x[mask].mean(0), rtol=1e-4)
    np.testing.assert_allclose(array(layer.moving_variance), x[mask].var(0), rtol=1e-4)


def test_stateless_call_changes_nothing_in_place() -> None:
    layer, x = BatchNormalization(momentum=0.0, renorm=True), draw(8, 3)
    layer.build(x.shape)
    before = [array(w) for w in layer.weights]
    _, moved = layer.stateless_call(*values(layer), ops.convert_to_tensor(x), training=True)
    np.testing.assert_allclose(array(moved[0]), x.mean(0), rtol=1e-5)
    for w, old in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(array(w), old)


# Types.

POLICIES = ["float32", "mixed_float16", "mixed_bfloat16", "float16", "bfloat16"]
TYPES = ["float32", "float16", "bfloat16", "int32"]
if keras_backend.has_float64():
    POLICIES.append("float64")
    TYPES.append("float64")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", TYPES)
def test_types_are_those_of_the_stock_layer(policy: str, dtype: str) -> None:
    ours, stock = BatchNormalization(dtype=policy), keras.layers.BatchNormalization(dtype=policy)
    x = ops.cast(ops.convert_to_tensor(draw(16, 3)), dtype)
    for training in (True, False):
        y, expected = (layer(x, training=training) for layer in (ours, stock))
        assert y.dtype == expected.dtype
        difference = array(ops.cast(y, "float32")) - array(ops.cast(expected, "float32"))
        # Half inputs to a float16 policy: the stock layer keeps float16 statistics.
        exact = {"float32": 1e-4, "float64": 1e-4}
        assert np.abs(difference).max() < exact.get(policy, 0.05)
    kept = "float64" if policy == "float64" else "float32"
    assert {keras.backend.standardize_dtype(w.dtype) for w in ours.weights} == {kept}
    symbolic = ours.compute_output_spec(keras.KerasTensor((2, 3), dtype))
    assert symbolic.dtype == keras.backend.standardize_dtype(y.dtype)


def test_half_precision_statistics_do_not_stall() -> None:
    layer = BatchNormalization(dtype="bfloat16", momentum=0.9)
    x = ops.cast(ops.full((16, 2), 100.0), "bfloat16")
    for _ in range(80):  # bfloat16 ones would stay at 97.5, where the step is half an ulp
        layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), 100.0, rtol=1e-2)


# Config.


def test_config_is_loadable_by_the_stock_layer() -> None:
    layer = BatchNormalization(axis=1, momentum=0.8, scale=False, fused=False, name="norm")
    config = layer.get_config()
    assert not {"fused", "adjustment", "renorm", "virtual_batch_size", "axis_name"} & set(config)
    stock = keras.layers.BatchNormalization.from_config(config)
    assert stock.momentum == 0.8
    renorm = {"renorm", "renorm_clipping", "renorm_momentum"}
    assert set(config) == set(stock.get_config()) - renorm


@pytest.mark.parametrize("axis", [-1, 1, [1, 3], (3, 1), [-2]])
def test_config_keeps_axis_as_given(axis: Any) -> None:
    layer = BatchNormalization(axis=axis)
    assert layer.get_config()["axis"] == axis
    assert type(layer.get_config()["axis"]) is type(axis)
    assert BatchNormalization.from_config(layer.get_config()).get_config() == layer.get_config()


def test_config_has_options_that_are_set() -> None:
    options = {
        "renorm": True,
        "renorm_clipping": {"rmax": 2.0},
        "renorm_momentum": 0.5,
        "virtual_batch_size": 4,
        "synchronized": True,
    }
    config = BatchNormalization(**options).get_config()
    assert {k: config[k] for k in options} == options
    assert BatchNormalization.from_config(config).get_config() == config


def test_adjustment_is_left_out_of_the_config_with_a_warning() -> None:
    layer = BatchNormalization(adjustment=lambda shape: (1.0, 0.0))
    with pytest.warns(UserWarning, match="adjustment is a function and left out"):
        assert "adjustment" not in layer.get_config()


def test_synchronized_layer_round_trips() -> None:
    layer = SyncBatchNormalization(momentum=0.5)
    assert layer.synchronized
    again = SyncBatchNormalization.from_config(layer.get_config())
    assert again.synchronized
    with pytest.raises(ValueError, match="synchronized must be True; got False"):
        SyncBatchNormalization(synchronized=False)


# As a drop-in.

OPTIONS = {
    "renorm": False,
    "renorm_clipping": None,
    "renorm_momentum": 0.99,
    "fused": None,
    "trainable": True,
    "virtual_batch_size": None,
    "adjustment": None,
    "synchronized": False,
    "name": None,
}


def defaults(function: Any) -> dict[str, Any]:
    """Arguments that have a name and a default, in their order."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.kind is p.POSITIONAL_OR_KEYWORD}


def test_arguments_are_those_of_the_stock_layer_and_more() -> None:
    stock = list(defaults(keras.layers.BatchNormalization).items())[:13]
    assert stock[-1] == ("gamma_constraint", None)
    assert list(defaults(MaskedBatchNormalization).items()) == stock
    assert list(defaults(BatchNormalization).items()) == [*stock, *OPTIONS.items()]


@pytest.mark.parametrize("cls", CLASSES)
def test_is_a_stock_layer(cls: Any) -> None:
    assert issubclass(cls, keras.layers.BatchNormalization)
    assert cls().supports_masking


def test_input_spec_and_names_are_those_of_the_stock_layer() -> None:
    ours = BatchNormalization(axis=1, name="n")
    stock = keras.layers.BatchNormalization(axis=1, name="n")
    for layer in (ours, stock):
        layer.build((None, 3, 5))
    assert [w.path for w in ours.weights] == [w.path for w in stock.weights]
    assert (ours.input_spec.ndim, ours.input_spec.axes) == (3, {1: 3})
    with pytest.raises(ValueError, match="incompatible with the layer"):
        ours(np.ones((2, 4, 5), "float32"))


def test_regularizers_and_constraints_act() -> None:
    layer = BatchNormalization(
        gamma_regularizer=keras.regularizers.L2(0.5), beta_constraint=keras.constraints.NonNeg()
    )
    model = keras.Sequential([keras.Input((3,)), layer])
    assert [float(array(loss)) for loss in layer.losses] == [pytest.approx(0.5 * 3)]
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(draw(8, 3), np.full((8, 3), -50.0), verbose=0)
    assert (array(layer.beta) >= 0).all()


def test_time_distributed_and_nested_models() -> None:
    x = draw(4, 5, 3)
    layer = keras.layers.TimeDistributed(BatchNormalization())
    assert tuple(layer(x, training=True).shape) == (4, 5, 3)


def test_layer_clones_and_quantization_answer_like_the_stock_layer() -> None:
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(momentum=0.7)])
    clone = keras.models.clone_model(model)
    assert clone.layers[0].get_config() == model.layers[0].get_config()
    stock = keras.layers.BatchNormalization()
    stock.build((None, 3))
    for layer in (model.layers[0], stock):
        with pytest.raises(NotImplementedError):
            layer.quantize("int8")


def test_higher_derivatives_of_fused_steps() -> None:
    x, mask = draw(12, 2) / 10, np.arange(12) < 9
    found = [
        keras_backend.second_gradient(BatchNormalization(fused=fused), x, mask)
        for fused in (None, False)
    ]
    assert np.abs(found[0]).max() > 0.1
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert (found[0][~mask] == 0).all()


def test_offsets_do_not_lose_digits() -> None:
    x = draw(4096, 8).astype("float64") / 3 + 1e6
    x = x.astype("float32")
    y = array(BatchNormalization(epsilon=1e-5)(x, training=True))
    wide = x.astype("float64")
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    assert np.abs(y - expected).max() < 2e-5


def test_overflowing_batch_does_not_poison_the_statistics() -> None:
    x, layer = draw(8, 2), BatchNormalization(momentum=0.5)
    x[0, 0] = np.inf
    y = array(layer(x, training=True))
    assert np.isnan(y[:, 0]).any()
    np.testing.assert_allclose(array(layer.moving_mean), [0.0, 0.5 * x[:, 1].mean()], rtol=1e-5)


def test_example_of_the_readme_runs() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    examples = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(next(e for e in examples if "batchnorm.keras" in e), names)
    assert names["model"].output_shape == (None, None, 3)
