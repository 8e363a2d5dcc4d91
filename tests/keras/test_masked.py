"""The layer for padded sparse-convolution batches: the behaviours its users rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import keras_backend
from batchnorm.keras import MaskedBatchNormalization

EPS = 1e-3


def rows(n: int = 64, channels: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2.0, 3.0, (n, channels)).astype("float32")


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(a))


def call(layer: Any, x: Any, mask: Any = None, training: bool | None = True) -> np.ndarray:
    inputs = x if mask is None else (x, mask)
    return array(layer(inputs, training=training))


def normalized(x: np.ndarray) -> np.ndarray:
    wide = x.astype("float64")
    return (wide - wide.mean(axis=0)) / np.sqrt(wide.var(axis=0) + EPS)


def test_without_mask_it_equals_the_stock_layer() -> None:
    x, ours, stock = rows(), MaskedBatchNormalization(), keras.layers.BatchNormalization()
    for training in (True, True, False):
        np.testing.assert_allclose(
            call(ours, x, training=training), call(stock, x, training=training), atol=2e-5
        )
    np.testing.assert_allclose(array(ours.moving_mean), array(stock.moving_mean), rtol=1e-5)
    np.testing.assert_allclose(array(ours.moving_variance), array(stock.moving_variance), rtol=1e-5)


@pytest.mark.parametrize("lone", [True, False])
def test_all_true_mask_equals_no_mask(lone: bool) -> None:
    x, plain, masked = rows(), MaskedBatchNormalization(), MaskedBatchNormalization()
    y = call(plain, x) if lone else array(plain((x, None), training=True))
    np.testing.assert_allclose(call(masked, x, np.ones(64, bool)), y, atol=1e-6)
    np.testing.assert_allclose(array(masked.moving_stats), array(plain.moving_stats), rtol=1e-6)


def test_half_masked_equals_the_real_half_alone() -> None:
    x, mask = rows(), np.random.default_rng(1).random(64) < 0.5
    x[~mask] = 1e3
    masked, packed = MaskedBatchNormalization(), MaskedBatchNormalization()
    y = call(masked, x, mask)
    np.testing.assert_allclose(y[mask], call(packed, x[mask]), atol=1e-5)
    np.testing.assert_allclose(y[mask], normalized(x[mask]), atol=1e-5)
    np.testing.assert_allclose(array(masked.moving_stats), array(packed.moving_stats), rtol=1e-6)


def test_single_real_row_is_its_own_mean() -> None:
    x, mask = rows(), np.arange(64) == 7
    layer = MaskedBatchNormalization(momentum=0.0, beta_initializer=keras.initializers.Constant(2))
    y = call(layer, x, mask)
    np.testing.assert_allclose(array(layer.moving_mean), x[7], rtol=1e-6)
    np.testing.assert_array_equal(array(layer.moving_variance), 0.0)
    np.testing.assert_allclose(y[7], 2.0)


def test_momentum_0_recovers_the_distribution_among_padding() -> None:
    rng = np.random.default_rng(2)
    real, mask = rng.normal(5.0, 2.0, (8192, 3)), np.arange(65536) % 8 == 0
    x = np.zeros((65536, 3), "float32")
    x[mask] = real
    layer = MaskedBatchNormalization(momentum=0.0)
    call(layer, x, mask)
    np.testing.assert_allclose(array(layer.moving_mean), 5.0, atol=0.1)
    np.testing.assert_allclose(array(layer.moving_variance), 4.0, rtol=0.06)
    fresh = rng.normal(5.0, 2.0, (8192, 3)).astype("float32")
    y = call(layer, fresh, training=False)
    np.testing.assert_allclose(y.mean(axis=0), 0.0, atol=0.06)
    np.testing.assert_allclose(y.var(axis=0), 1.0, rtol=0.08)


@pytest.mark.parametrize("training", [True, False])
def test_padded_rows_are_normalized_and_finite(training: bool) -> None:
    x, mask = rows(), np.arange(64) < 20
    x[~mask] = 0.0
    y = call(MaskedBatchNormalization(), x, mask, training)
    assert y.shape == x.shape
    assert np.isfinite(y).all()
    mean, var = (x[mask].mean(0), x[mask].var(0)) if training else (0.0, 1.0)
    expected = (x - mean) / np.sqrt(var + EPS)
    np.testing.assert_allclose(y[~mask], expected[~mask], atol=1e-5)


def test_statistics_follow_the_exponential_rule() -> None:
    layer, mean, var = MaskedBatchNormalization(momentum=0.8), np.zeros(5), np.ones(5)
    for step in range(6):
        x, mask = rows(seed=step), np.random.default_rng(step).random(64) < 0.4
        call(layer, x, mask)
        real = x[mask].astype("float64")
        mean, var = 0.8 * mean + 0.2 * real.mean(0), 0.8 * var + 0.2 * real.var(0)
    np.testing.assert_allclose(array(layer.moving_mean), mean, rtol=1e-5)
    np.testing.assert_allclose(array(layer.moving_variance), var, rtol=1e-5)


@pytest.mark.parametrize("training", [False, None])
def test_evaluation_uses_statistics_and_leaves_them(training: bool | None) -> None:
    layer, x = MaskedBatchNormalization(), rows()
    layer.build(x.shape)
    mean, var = rows(1, 5, 3)[0], np.abs(rows(1, 5, 4)[0]) + 0.5
    layer.moving_mean.assign(mean)
    layer.moving_variance.assign(var)
    before = array(layer.moving_stats)
    y = call(layer, x, np.arange(64) < 9, training)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + EPS), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(array(layer.moving_stats), before)


def test_empty_mask_changes_nothing() -> None:
    layer, x = MaskedBatchNormalization(), rows()
    call(layer, x)
    before = array(layer.moving_stats)
    y = call(layer, x, np.zeros(64, bool))
    assert y.shape == x.shape
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(array(layer.moving_stats), before)


def test_huge_values_do_not_overflow() -> None:
    x, mask = rows() * 1e17, np.arange(64) % 2 == 0
    y = call(MaskedBatchNormalization(), x, mask)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[mask], normalized(x[mask]), atol=1e-4)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-15])
def test_tiny_values_do_not_divide_by_zero(size: float) -> None:
    x, mask = rows() * np.float32(size), np.arange(64) % 2 == 0
    y = call(MaskedBatchNormalization(), x, mask)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, 0.0, atol=1e-5)


@pytest.mark.parametrize(("center", "scale"), [(False, False), (False, True), (True, False)])
def test_center_and_scale_off_remove_weight_and_term(center: bool, scale: bool) -> None:
    layer, x = MaskedBatchNormalization(center=center, scale=scale), rows()
    y = call(layer, x, np.ones(64, bool))
    assert (layer.beta is None, layer.gamma is None) == (not center, not scale)
    assert len(layer.weights) == 1 + center + scale
    np.testing.assert_allclose(y, normalized(x), atol=1e-5)


FIELDS = {
    "momentum": 0.7,
    "epsilon": 1e-2,
    "center": False,
    "scale": True,
    "gamma_initializer": keras.initializers.Constant(2.0),
    "beta_initializer": keras.initializers.Constant(1.0),
    "moving_mean_initializer": keras.initializers.Constant(0.5),
    "moving_variance_initializer": keras.initializers.Constant(4.0),
    "gamma_regularizer": keras.regularizers.L2(0.1),
    "beta_regularizer": keras.regularizers.L1(0.2),
    "gamma_constraint": keras.constraints.NonNeg(),
    "beta_constraint": keras.constraints.MaxNorm(3.0),
    "name": "padded",
    "trainable": False,
}


def test_every_field_survives_serialization() -> None:
    layer = MaskedBatchNormalization(axis=-1, **FIELDS)
    config = layer.get_config()
    assert set(config) >= {*FIELDS, "axis"}
    again = MaskedBatchNormalization.from_config(config)
    assert again.get_config() == config
    assert keras.layers.deserialize(keras.layers.serialize(layer)).get_config() == config
    x = rows()
    np.testing.assert_allclose(call(again, x, training=False), call(layer, x, training=False))


def test_model_file_round_trip_needs_no_custom_objects(tmp_path: Path) -> None:
    x, mask = rows(), np.arange(64) < 40
    inputs = keras.Input((5,)), keras.Input((), dtype="bool")
    model = keras.Model(inputs, MaskedBatchNormalization(name="norm")(inputs))
    model([x, mask], training=True)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        array(again.get_layer("norm").moving_stats), array(model.get_layer("norm").moving_stats)
    )
    np.testing.assert_array_equal(array(again([x, mask])), array(model([x, mask])))


def test_gradients_come_from_real_rows_only() -> None:
    x, mask = rows(), np.arange(64) % 3 == 0
    layer = MaskedBatchNormalization()
    layer.build(x.shape)
    dy = np.random.default_rng(5).normal(size=x.shape).astype("float32")
    x[~mask] = np.nan  # and no gradient may show it
    _, dx, (dgamma, dbeta) = keras_backend.differentiate(
        layer,
        lambda a: layer((a, ops.convert_to_tensor(mask)), training=True),
        keras_backend.tensor(x, "float32"),
        keras_backend.tensor(dy, "float32"),
        [layer.gamma, layer.beta],
    )
    assert (array(dx)[~mask] == 0).all()
    assert np.isfinite(array(dx)).all()
    np.testing.assert_allclose(array(dbeta), dy[mask].sum(axis=0), rtol=1e-4)
    expected = (dy[mask] * normalized(x[mask])).sum(axis=0)
    np.testing.assert_allclose(array(dgamma), expected, rtol=1e-4, atol=1e-4)
    assert (array(dgamma) != 0).all()
    assert (array(dbeta) != 0).all()


@pytest.mark.parametrize("dtype", ["int32", "int8", "int64", "uint8", "float32"])
def test_bool_and_other_masks_agree(dtype: str) -> None:
    x, mask = rows(), np.random.default_rng(6).random(64) < 0.5
    first, second = MaskedBatchNormalization(), MaskedBatchNormalization()
    np.testing.assert_array_equal(call(first, x, mask), call(second, x, mask.astype(dtype) * 3))
    np.testing.assert_array_equal(array(first.moving_stats), array(second.moving_stats))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float16"])
def test_half_inputs_keep_float32_statistics(dtype: str, policy: str) -> None:
    x = keras_backend.tensor(rows() * 40 + 300, dtype)  # squares overflow float16
    layer = MaskedBatchNormalization(dtype=policy, momentum=0.0)
    mask = ops.convert_to_tensor(np.arange(64) < 50)
    y = layer((x, mask), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    assert keras.backend.standardize_dtype(layer.moving_stats.dtype) == "float32"
    real = array(ops.cast(x, "float32"))[:50].astype("float64")
    np.testing.assert_allclose(array(layer.moving_mean), real.mean(0), rtol=1e-5)
    np.testing.assert_allclose(array(layer.moving_variance), real.var(0), rtol=1e-4)
    tolerance = 2e-3 if dtype == "float16" else 2e-2
    found = array(ops.cast(y, "float32"))
    np.testing.assert_allclose(found[:50], normalized(real), atol=2 * tolerance)


def test_float64_policy_keeps_float64_statistics() -> None:
    if keras_backend.NAME == "jax" and not keras_backend.has_float64():
        pytest.skip("JAX has no float64 unless jax_enable_x64 is set")
    layer, x = MaskedBatchNormalization(dtype="float64"), rows().astype("float64")
    y = call(layer, x, np.arange(64) < 30)
    assert y.dtype == np.float64
    assert keras.backend.standardize_dtype(layer.moving_stats.dtype) == "float64"
    np.testing.assert_allclose(y[:30], normalized(x[:30]), atol=1e-12)


# Beyond the seventeen.


def test_statistics_are_one_packed_weight() -> None:
    layer = MaskedBatchNormalization(
        moving_mean_initializer=keras.initializers.Constant(0.5),
        moving_variance_initializer=keras.initializers.Constant(4.0),
    )
    layer.build((None, 3))
    assert [w.name for w in layer.weights] == ["gamma", "beta", "moving_stats"]
    assert [w.name for w in layer.non_trainable_weights] == ["moving_stats"]
    np.testing.assert_array_equal(array(layer.moving_stats), [[0.5] * 3, [4.0] * 3])


def test_rows_are_assignable_and_usable() -> None:
    layer = MaskedBatchNormalization()
    assert layer.moving_mean is None
    layer.build((None, 3))
    layer.moving_mean.assign(np.array([1.0, 2.0, 3.0], "float32"))
    layer.moving_variance.assign(ops.convert_to_tensor([4.0, 9.0, 16.0]))
    np.testing.assert_array_equal(array(layer.moving_stats), [[1, 2, 3], [4, 9, 16]])
    np.testing.assert_array_equal(np.asarray(layer.moving_mean), [1, 2, 3])
    np.testing.assert_array_equal(array(ops.sqrt(layer.moving_variance)), [2, 3, 4])
    np.testing.assert_array_equal(array(layer.moving_mean + layer.moving_variance), [5, 11, 19])
    np.testing.assert_array_equal(array(2.0 * layer.moving_mean), [2, 4, 6])
    np.testing.assert_array_equal(layer.moving_mean.numpy(), [1, 2, 3])
    assert tuple(layer.moving_mean.shape) == (3,)
    with pytest.raises(ValueError, match=r"must have shape \(3,\); got \(2,\)"):
        layer.moving_mean.assign(np.zeros(2, "float32"))


def test_rows_are_usable_in_traced_code() -> None:
    layer = MaskedBatchNormalization()
    layer.build((None, 2))

    def read() -> Any:
        return ops.add(layer.moving_mean, layer.moving_variance * 2.0)

    np.testing.assert_array_equal(array(keras_backend.trace(read)()), [2.0, 2.0])


def test_rows_are_assignable_in_traced_code() -> None:
    layer = MaskedBatchNormalization()
    layer.build((None, 2))

    def write(value: Any) -> Any:
        with keras_backend.pure(layer.moving_stats) as read:
            layer.moving_variance.assign(value)
            layer.moving_mean.assign(layer.moving_variance * 2.0)
            return read(layer.moving_stats)

    found = keras_backend.trace(write)(ops.convert_to_tensor([1.0, 3.0]))
    np.testing.assert_array_equal(array(found), [[2.0, 6.0], [1.0, 3.0]])


def test_symbolic_output_has_the_type_of_the_input() -> None:
    for policy, dtype, expected in [
        ("float32", "float16", "float16"),
        ("mixed_bfloat16", "float32", "float32"),
        ("mixed_bfloat16", "int32", "bfloat16"),
    ]:
        layer = MaskedBatchNormalization(dtype=policy)
        x, mask = keras.KerasTensor((4, 3), dtype), keras.KerasTensor((4,), "bool")
        found = layer.compute_output_spec((x, mask))
        assert (found.shape, found.dtype) == ((4, 3), expected)
        assert keras.backend.standardize_dtype(layer(ops.ones((4, 3), dtype)).dtype) == expected


@pytest.mark.parametrize("option", [{"renorm": True}, {"virtual_batch_size": 2}])
def test_options_with_other_statistics_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="does not go with one weight of shape"):
        MaskedBatchNormalization(**option)


def test_synchronized_layer_round_trips() -> None:
    layer = MaskedBatchNormalization(synchronized=True)
    assert MaskedBatchNormalization.from_config(layer.get_config()).synchronized
    assert "synchronized" not in MaskedBatchNormalization().get_config()


@pytest.mark.parametrize("pair", [tuple, list])
def test_pair_may_be_a_tuple_or_a_list(pair: Any) -> None:
    x, mask = (ops.convert_to_tensor(a) for a in (rows(), np.arange(64) < 30))
    layer = MaskedBatchNormalization(momentum=0.0)
    layer(pair((x, mask)), training=True)
    np.testing.assert_allclose(array(layer.moving_mean), rows()[:30].mean(0), rtol=1e-5)


@pytest.mark.parametrize("shape", [(None, 3), ((None, 3), (None,)), ((None, 3), None)])
def test_build_and_output_shape_take_one_shape_or_a_pair(shape: Any) -> None:
    layer = MaskedBatchNormalization()
    assert layer.compute_output_shape(shape) == (None, 3)
    layer.build(shape)
    assert tuple(layer.moving_stats.shape) == (2, 3)


@pytest.mark.parametrize("axis", [0, 1, -2, [-1]])
def test_other_axes_are_refused(axis: Any) -> None:
    with pytest.raises(ValueError, match="axis must be the last one"):
        MaskedBatchNormalization(axis=axis).build((None, 4, 3))


def test_last_axis_may_be_counted_from_the_front() -> None:
    x = rows()
    np.testing.assert_array_equal(
        call(MaskedBatchNormalization(axis=1), x), call(MaskedBatchNormalization(), x)
    )


def test_two_masks_are_refused() -> None:
    x, mask = rows(), np.ones(64, bool)
    with pytest.raises(ValueError, match="mask must come once"):
        MaskedBatchNormalization()((x, mask), mask=mask)
    propagated = keras.layers.Masking()(np.ones((4, 6, 3), "float32"))
    with pytest.raises(ValueError, match="mask must come once"):
        MaskedBatchNormalization()((propagated, np.ones((4, 6), bool)))


def test_three_inputs_are_refused() -> None:
    x = ops.convert_to_tensor(rows())
    with pytest.raises(ValueError, match="got 3 inputs"):
        MaskedBatchNormalization()((x, x, x))


def test_frozen_layer_uses_its_statistics_in_training() -> None:
    layer, x = MaskedBatchNormalization(), rows()
    layer.build(x.shape)
    layer.trainable = False
    np.testing.assert_allclose(call(layer, x), x / np.sqrt(1 + EPS), rtol=1e-5)
    np.testing.assert_array_equal(array(layer.moving_mean), 0.0)
    layer.trainable = True
    np.testing.assert_allclose(call(layer, x), normalized(x), atol=1e-5)


@pytest.mark.parametrize("mask_shape", [(4,), (4, 6), (4, 6, 1), (1, 6, 1), (4, 6, 3)])
def test_any_rank_and_every_mask(mask_shape: tuple[int, ...]) -> None:
    x = rows(24, 3).reshape(4, 6, 3)
    mask = np.random.default_rng(8).random(mask_shape) < 0.6
    layer = MaskedBatchNormalization(momentum=0.0)
    call(layer, x, mask)
    aligned = mask.reshape(*mask_shape, *(1,) * (3 - mask.ndim))
    real = np.where(aligned, x.astype("float64"), np.nan)
    np.testing.assert_allclose(array(layer.moving_mean), np.nanmean(real, (0, 1)), rtol=1e-5)
    np.testing.assert_allclose(array(layer.moving_variance), np.nanvar(real, (0, 1)), rtol=1e-5)


def test_changing_mask_values_do_not_retrace() -> None:
    layer, x, traces = MaskedBatchNormalization(), rows(), []
    layer.build(x.shape)

    def step(x: Any, mask: Any) -> Any:
        traces.append(1)
        return layer((x, mask), training=False)

    traced = keras_backend.trace(step)
    for seed in range(4):
        mask = np.random.default_rng(seed).random(64) < 0.5
        traced(ops.convert_to_tensor(x), ops.convert_to_tensor(mask))
    if keras_backend.NAME != "torch":  # torch runs Python every time
        assert len(traces) == 1
