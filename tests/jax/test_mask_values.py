"""Integer masks: 0 and 1 where values can be read, else 0 or not 0; masks from lengths (S1)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from batchnorm.jax import BatchNorm, batch_norm, batch_norm_inference, sequence_mask

PATHS = pytest.mark.parametrize("fused", [None, False])
INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums of a few terms
REAL = np.array([True, False, True, True, False, True])


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.sample(5)
@PATHS
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_of_every_width(dtype: str, x64: bool, traced: bool, fused: bool | None) -> None:
    x = normal(6, 3)
    expected = batch_norm(x, mask=REAL, fused=False)[0]
    with jax.enable_x64(x64):
        call = jax.jit(batch_norm, static_argnames="fused") if traced else batch_norm
        y, moments = call(x, mask=REAL.astype(dtype), fused=fused)
    np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_array_equal(moments.count, [4.0] * 3)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("given", [np.asarray, jnp.asarray, np.ndarray.tolist], ids=str)
def test_other_integers_are_refused_with_both_remedies(dtype: str, given: Any) -> None:
    lengths = given(np.array([1, 0, 5, 0, 1, 7]).astype(dtype))
    message = r"must hold 1 .*got the value 5\. Pass mask != 0.*sequence_mask\(lengths, size\)"
    x, layer = normal(6, 3), BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"batch_norm: .*{message}"):
        batch_norm(x, mask=lengths)
    with pytest.raises(ValueError, match=f"batch_norm_inference: .*{message}"):
        batch_norm_inference(x, jnp.zeros(3), jnp.ones(3), mask=lengths)
    before = np.asarray(layer.mean[...])
    with pytest.raises(ValueError, match=f"BatchNorm: .*{message}"):
        layer(x, mask=lengths)
    np.testing.assert_array_equal(layer.mean[...], before)
    with pytest.raises(ValueError, match=message):  # known while it is traced
        jax.eval_shape(lambda x: batch_norm(x, mask=lengths), x)


@pytest.mark.parametrize("value", [-1, 2**31, 2**32, 2**63])
def test_the_value_is_shown_as_it_is(value: int) -> None:
    kind = np.int64 if value < 2**63 else np.uint64
    mask = np.where(REAL, kind(value), kind(0))
    with pytest.raises(ValueError, match=f"got the value {value}\\."):
        batch_norm(normal(6, 3), mask=mask)


@PATHS
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_traced_integers_count_where_they_are_not_0(dtype: str, fused: bool | None) -> None:
    x = normal(6, 3)
    tokens = jnp.asarray((REAL * np.array([1, 5, 7, 100, 3, 128])).astype(dtype))
    y = jax.jit(lambda mask: batch_norm(x, mask=mask, fused=fused)[0])(tokens)
    np.testing.assert_allclose(y, batch_norm(x, mask=REAL, fused=fused)[0], **CLOSE)


# ------------------------------------------------------------------ masks from lengths


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(4,), (2, 2), ()], ids=str)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("x64", [False, True])
def test_positions_below_the_length_are_real(
    dtype: str, shape: Any, traced: bool, x64: bool
) -> None:
    lengths = np.resize([3, 0, 127, 127 if dtype == "int8" else 200], shape).astype(dtype)
    with jax.enable_x64(x64):
        call = jax.jit(sequence_mask, static_argnums=1) if traced else sequence_mask
        found = call(lengths, 200)
    assert found.dtype == jnp.bool_
    np.testing.assert_array_equal(found, np.arange(200) < lengths[..., None].astype(int))


@pytest.mark.parametrize(("lengths", "size"), [([], 3), ([0, 0], 0)])
def test_nothing_to_mark(lengths: Any, size: int) -> None:
    assert sequence_mask(np.array(lengths, np.int32), size).shape == (len(lengths), size)


def test_a_mask_from_lengths_is_one_of_a_layer() -> None:
    x, lengths = normal(3, 5, 2), np.array([5, 1, 0])
    layer = BatchNorm(2, momentum=0.0, rngs=nnx.Rngs(0))
    layer(x, mask=sequence_mask(lengths, 5))
    expected = np.asarray(x)[np.arange(5) < lengths[:, None]].mean(axis=0)
    np.testing.assert_allclose(layer.mean[...], expected, **CLOSE)
    one_by_one = jax.vmap(lambda n: sequence_mask(n, 5))(jnp.asarray(lengths, jnp.int32))
    np.testing.assert_array_equal(one_by_one, sequence_mask(lengths, 5))


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
def test_traced_lengths_outside_count_as_none_or_all(dtype: str) -> None:
    lengths = jnp.asarray([9, 2**32 - 2 if dtype == "uint32" else -2], dtype)
    found = jax.jit(sequence_mask, static_argnums=1)(lengths, 5)
    np.testing.assert_array_equal(found, [[True] * 5, [dtype == "uint32"] * 5])


def test_a_size_that_an_exported_program_learns() -> None:
    (size,) = export.symbolic_shape("L")
    program = export.export(jax.jit(lambda x, n: sequence_mask(n, x.shape[1])))(
        jax.ShapeDtypeStruct((2, size), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    )
    found = program.call(jnp.zeros((2, 4)), jnp.array([1, 3], jnp.int32))
    np.testing.assert_array_equal(found, sequence_mask([1, 3], 4))


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
@pytest.mark.parametrize("given", [list, np.asarray, jnp.asarray])
def test_lengths_and_sizes_that_are_none(
    lengths: Any, size: Any, kind: Any, message: str, given: Any
) -> None:
    with pytest.raises(kind, match=f"sequence_mask: {message}"):
        sequence_mask(given(lengths), size)
