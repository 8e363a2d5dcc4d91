"""Masks that are not boolean mean != 0 (S1), whatever the layer's type, and masks from lengths."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import keras_backend
from batchnorm.keras import BatchNormalization, MaskedBatchNormalization, sequence_mask

LAYERS = pytest.mark.parametrize("kind", [BatchNormalization, MaskedBatchNormalization])
MODES = {"tensorflow": (None, "graph", "xla"), "jax": (None, "graph"), "torch": (None,)}[
    keras_backend.NAME
]
REAL = np.array([True, False, True, True, False, True])
# Values at real rows: some become 0 in the type in which layers compute, others do not.
SMALL = {"float64": 1e-200, "float32": 1e-30, "float16": 6e-8}


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(a, "float32")))


def x_and(kind: Any, policy: str) -> tuple[Any, Any]:
    x = np.random.default_rng(0).normal(2.0, 3.0, (6, 3)).astype("float32")
    layer = kind(dtype=policy, momentum=0.0)
    layer.build((6, 3))
    return x, layer


def assert_real_rows_count(layer: Any, x: np.ndarray, y: Any) -> None:
    """The moving mean, which is the batch's mean, is the mean of the real rows."""
    wide = x[REAL].astype("float64")
    tolerance = 1e-2 if "16" in layer.compute_dtype else 1e-4
    np.testing.assert_allclose(array(layer.moving_mean), wide.mean(axis=0), rtol=tolerance)
    expected = (wide - wide.mean(axis=0)) / np.sqrt(wide.var(axis=0) + 1e-3)
    np.testing.assert_allclose(array(y)[REAL], expected, atol=3 * tolerance)


@LAYERS
@pytest.mark.parametrize("way", ["pair", "argument", "attached"])
@pytest.mark.parametrize("policy", ["float32", "float16", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("given", ["numpy", "tensor"])
def test_small_values_are_compared_before_they_are_cast(
    kind: Any, way: str, policy: str, dtype: str, given: str
) -> None:
    if given == "tensor" and dtype == "float64" and not keras_backend.has_float64():
        pytest.skip("a tensor of JAX is no float64 unless jax_enable_x64 is set")
    x, layer = x_and(kind, policy)
    mask = (REAL * SMALL[dtype]).astype(dtype)
    if given == "tensor" or way == "attached":
        mask = keras_backend.native(mask if given == "tensor" else mask != 0)
    y = call(layer, way, x, mask)
    assert_real_rows_count(layer, x, y)


def call(layer: Any, way: str, x: Any, mask: Any) -> Any:
    if way == "pair":
        return layer((x, mask), training=True)
    if way == "argument":
        return layer(x, mask=mask, training=True)
    x = ops.convert_to_tensor(x)
    x._keras_mask = mask
    return layer(x, training=True)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("compiled", MODES)
def test_small_values_in_compiled_code(policy: str, compiled: str | None) -> None:
    x, layer = x_and(BatchNormalization, policy)
    mask = keras_backend.native((REAL * 1e-30).astype("float32"))
    x = keras_backend.tensor(x, "float32")
    dy = ops.ones(x.shape, layer.compute_dtype)
    y, *_ = keras_backend.differentiate(
        layer, lambda x: layer(x, mask=mask, training=True), x, dy, [], compiled
    )
    assert_real_rows_count(layer, array(x), y)


@LAYERS
def test_masks_of_functional_models_are_compared_before_they_are_cast(kind: Any) -> None:
    x, layer = x_and(kind, "mixed_float16")
    inputs = keras.Input((3,)), keras.Input((), dtype="float32")
    model = keras.Model(inputs, layer(inputs))
    y = model([x, (REAL * 1e-30).astype("float32")], training=True)
    assert_real_rows_count(layer, x, y)


@pytest.mark.sample(3)
@LAYERS
@pytest.mark.parametrize("compiled", MODES)
@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
)
def test_integers_mean_not_zero(kind: Any, compiled: str | None, dtype: str) -> None:
    # Tokens of which 0 is padding: no error, as in Keras.
    x, layer = x_and(kind, "float32")
    mask = keras_backend.native((REAL * np.array([1, 5, 7, 100, 3, 2])).astype(dtype))
    x = keras_backend.tensor(x, "float32")
    y, *_ = keras_backend.differentiate(
        layer, lambda x: layer((x, mask), training=True), x, ops.ones_like(x), [], compiled
    )
    assert_real_rows_count(layer, array(x), y)


@LAYERS
@pytest.mark.parametrize("tokens", [np.int64(2**32), np.uint64(2**63), -1, 256, np.nan, 0.5])
def test_values_of_which_a_cast_would_cut_something(kind: Any, tokens: Any) -> None:
    x, layer = x_and(kind, "float32")
    dtype = getattr(tokens, "dtype", np.asarray(tokens).dtype)
    y = layer((x, np.where(REAL, tokens, 0).astype(dtype)), training=True)
    assert_real_rows_count(layer, x, y)


def test_a_mask_that_is_carried_on_is_boolean() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    mask = np.array([[1e-30, 0, 2], [0, 0, 1]], "float32")
    y = BatchNormalization(dtype="mixed_float16")(x, mask=mask)
    found = y._keras_mask
    assert keras.backend.standardize_dtype(found.dtype) == "bool"
    np.testing.assert_array_equal(array(found), mask != 0)


# ------------------------------------------------------------------ masks from lengths


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
)
@pytest.mark.parametrize("given", ["numpy", "tensor"])
@pytest.mark.parametrize("shape", [(4,), (2, 2), ()])
def test_positions_below_the_length_are_real(dtype: str, given: str, shape: Any) -> None:
    lengths = np.resize([3, 0, 200, 127][: 2 if dtype == "int8" else 4], shape).astype(dtype)
    found = sequence_mask(lengths if given == "numpy" else keras_backend.native(lengths), 200)
    assert keras.backend.standardize_dtype(found.dtype) == "bool"
    np.testing.assert_array_equal(array(found), np.arange(200) < lengths[..., None].astype(int))


@pytest.mark.parametrize(("lengths", "size"), [([], 3), ([0, 0], 0)])
def test_nothing_to_mark(lengths: Any, size: int) -> None:
    found = sequence_mask(np.array(lengths, "int32"), size)
    assert tuple(found.shape) == (len(lengths), size)


def test_lengths_in_compiled_code_make_a_layers_mask() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 2)).astype("float32")
    lengths = np.array([5, 1, 0], "int32")
    layer = BatchNormalization(momentum=0.0)
    layer.build((3, 5, 2))

    def run(x: Any, lengths: Any) -> Any:
        with keras_backend.pure(*layer.variables) as read:
            layer(x, mask=sequence_mask(lengths, 5), training=True)
            return read(layer.moving_mean)

    found = keras_backend.trace(run)(ops.convert_to_tensor(x), ops.convert_to_tensor(lengths))
    expected = x[np.arange(5) < lengths[:, None]].mean(axis=0)
    np.testing.assert_allclose(array(found), expected, rtol=1e-5)
    if keras_backend.NAME == "torch":
        return  # which traces nothing here
    marks = keras_backend.trace(lambda a: sequence_mask(a, 5))
    outside = array(marks(ops.convert_to_tensor([9, -2])))  # not known while it is traced
    np.testing.assert_array_equal(outside, [[1] * 5, [0] * 5])


def test_lengths_as_an_input_of_a_model() -> None:
    x, lengths = keras.Input((5, 2)), keras.Input((), dtype="int32")
    layer = BatchNormalization(momentum=0.0)
    model = keras.Model([x, lengths], layer(x, mask=sequence_mask(lengths, 5)))
    values = np.random.default_rng(0).normal(size=(3, 5, 2)).astype("float32")
    given = np.array([5, 1, 0], "int32")
    model([values, given], training=True)
    expected = values[np.arange(5) < given[:, None]].mean(axis=0)
    np.testing.assert_allclose(array(layer.moving_mean), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "size", "kind", "message"),
    [
        ([1, 6], 5, ValueError, "lengths must lie between 0 and size=5; got 6"),
        ([1, -2], 5, ValueError, "lengths must lie between 0 and size=5; got -2"),
        ([1.0], 5, TypeError, "lengths must be integers; got float"),
        ([True], 5, TypeError, "lengths must be integers; got bool"),
        ([1], -1, ValueError, "size must be at least 0; got -1"),
        ([1], 5.0, TypeError, "size must be an int; got 5.0"),
        ([1], True, TypeError, "size must be an int; got True"),
    ],
)
@pytest.mark.parametrize("given", ["list", "tensor"])
def test_lengths_and_sizes_that_are_none(
    lengths: Any, size: Any, kind: Any, message: str, given: str
) -> None:
    with pytest.raises(kind, match=f"sequence_mask: {message}"):
        sequence_mask(lengths if given == "list" else ops.convert_to_tensor(lengths), size)
