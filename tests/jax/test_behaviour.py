"""Cases where flax's layer fails and ours does not; errors for bad input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import batchnorm
from batchnorm.jax import (
    BatchNorm,
    batch_norm,
    batch_norm_inference,
    init_running,
    update_running,
)
from batchnorm.verification import tolerances

PATHS = pytest.mark.parametrize("fused", [None, False])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums of a few dozen terms


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def make(fused: bool | None = None, **options: Any) -> BatchNorm:
    return BatchNorm(3, fused=fused, rngs=nnx.Rngs(0), **options)


def statistics(layer: Any) -> np.ndarray:
    return np.stack([layer.mean[...], layer.var[...]])


@pytest.mark.sample(3)
@PATHS
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 5, 1), (4, 5, 3), (1, 5, 1)])
@pytest.mark.parametrize("dtype", ["bool", "int8", "int32", "uint8", "uint16", "uint32"])
def test_masks_of_every_shape_and_type(shape: Any, dtype: str, fused: bool | None) -> None:
    x = normal(4, 5, 3)
    mask = np.random.default_rng(3).random(shape) < 0.6
    mask.flat[0] = True
    given = mask.astype(dtype)
    layer = make(fused, momentum=0.5)
    y = layer(x, mask=given)
    expected, moments = batchnorm.batch_norm(np.asarray(x), mask=mask)
    np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_allclose(layer.mean[...], 0.5 * moments.mean, **CLOSE)
    np.testing.assert_allclose(layer.var[...], 0.5 + 0.5 * moments.var, **CLOSE)


def test_flax_takes_no_mask_of_samples() -> None:
    with pytest.raises(ValueError, match="broadcast"):
        nnx.BatchNorm(3, rngs=nnx.Rngs(0))(normal(4, 5, 3), mask=jnp.ones(4, bool))


@PATHS
def test_all_rows_masked_leaves_the_statistics_alone(fused: bool | None) -> None:
    x, mask = normal(4, 3), jnp.zeros(4, bool)
    layer, flaxs = make(fused), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    before = statistics(layer)
    y = layer(x, mask=mask)
    np.testing.assert_array_equal(statistics(layer), before)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
    flaxs(x, mask=mask[:, None])
    assert np.isnan(statistics(flaxs)).all()


@PATHS
def test_nan_in_padding_reaches_no_real_gradient(fused: bool | None) -> None:
    mask = jnp.arange(8) < 5
    x = jnp.where(mask[:, None], normal(8, 3), jnp.nan)
    dy = normal(8, 3, seed=1)

    def loss(layer: Any, x: Any, mask: Any) -> Any:
        y = layer(x, mask=mask)
        return jnp.sum(jnp.where(mask.reshape(-1, 1), y * dy, 0.0))

    found = nnx.grad(loss, argnums=(0, 1))(make(fused), x, mask)
    packed = nnx.grad(lambda layer, x: jnp.sum(layer(x) * dy[:5]), argnums=(0, 1))(make(), x[:5])
    np.testing.assert_allclose(found[1][:5], packed[1], **CLOSE)
    np.testing.assert_array_equal(found[1][5:], 0.0)
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(packed[0]), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    flaxs = nnx.grad(loss, argnums=1)(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), x, mask[:, None])
    assert np.isnan(flaxs[:5]).any()


@PATHS
@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)])
def test_an_empty_batch_leaves_the_statistics_alone(shape: Any, fused: bool | None) -> None:
    layer = make(fused)
    before = statistics(layer)
    y, transpose = jax.vjp(lambda x: batch_norm(x, fused=fused)[0], jnp.zeros(shape))
    assert transpose(y)[0].shape == layer(jnp.zeros(shape)).shape == shape
    np.testing.assert_array_equal(statistics(layer), before)


@pytest.mark.filterwarnings("ignore:.*divide")
def test_flax_loses_its_statistics_to_an_empty_batch() -> None:
    flaxs = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    flaxs(jnp.zeros((0, 3)))
    assert np.isnan(statistics(flaxs)).all()


@pytest.mark.parametrize("count", [2, 5])
def test_unequal_counts_are_merged_by_count(count: int) -> None:
    x, mask = normal(8, 3), jnp.arange(8) < 4 + count - 1

    def step(layer: Any, mask: Any) -> Any:
        def local(layer: Any, x: Any, mask: Any) -> Any:
            layer(x, mask=mask)
            return layer.mean[...]

        mapped = jax.vmap(local, in_axes=(None, 0, 0), axis_name="batch")
        return mapped(layer, x.reshape(2, 4, 3), mask.reshape(2, 4, *mask.shape[1:]))[0]

    true = 0.5 * np.asarray(x)[np.asarray(mask)].mean(axis=0)
    options: Any = {"momentum": 0.5, "axis_name": "batch", "rngs": nnx.Rngs(0)}
    np.testing.assert_allclose(step(BatchNorm(3, **options), mask), true, **CLOSE)
    if count == 2:  # at 5 all rows are real, and a mean of means is right
        flaxs = step(nnx.BatchNorm(3, **options), mask[:, None])
        assert np.abs(flaxs - true).max() > 1e-2


def test_frozen_survives_train() -> None:
    layer = make().freeze()
    before = statistics(layer)
    layer.train()
    layer(normal(8, 3))
    np.testing.assert_array_equal(statistics(layer), before)


@PATHS
@pytest.mark.parametrize("bad", [np.inf, np.nan, 1e30])
def test_an_overflowing_batch_is_forgotten(bad: float, fused: bool | None) -> None:
    layer = make(fused, momentum=0.5)
    x = normal(8, 3).at[2, 1].set(bad)
    y = layer(x)
    assert np.isfinite(bad) or np.isnan(np.asarray(y)[:, 1]).any()
    after = statistics(layer)
    assert np.isfinite(after).all()
    if not np.isfinite(bad) or bad > 1e19:
        np.testing.assert_array_equal(after[:, 1], [0.0, 1.0])
    np.testing.assert_allclose(after[0, 0], 0.5 * np.asarray(x)[:, 0].mean(), **CLOSE)


def test_bfloat16_evaluation_keeps_the_means_low_bits() -> None:
    x = (normal(256, 3) + 100.0).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    mean, var = exact.mean(axis=0), exact.var(axis=0)
    expected = (exact - mean) / np.sqrt(var + 1e-5)

    def error(layer: Any) -> Any:
        layer.mean[...], layer.var[...] = (jnp.asarray(a, jnp.float32) for a in (mean, var))
        y = layer(x, use_running_average=True)
        return np.abs(np.asarray(y, np.float64) - expected).max()

    assert error(make()) <= 2.0**-8 * np.abs(expected).max()
    assert error(nnx.BatchNorm(3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))) > 0.1


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
def test_accuracy_at_offsets(offset: float, fused: bool | None) -> None:
    x = (normal(4096, 8) + jnp.float32(offset)).astype(jnp.float32)
    dy = normal(4096, 8, seed=1)
    scale, bias = normal(8, seed=2) + 1.0, normal(8, seed=3)
    tol = tolerances.PLAIN_FLOAT32 if fused is False else tolerances.FLOAT32

    @jax.jit
    def step(x: Any, scale: Any, bias: Any, dy: Any) -> Any:
        y, transpose = jax.vjp(lambda *a: batch_norm(*a, fused=fused)[0], x, scale, bias)
        return y, *transpose(dy)

    exact = [np.asarray(a, np.float64) for a in (x, scale, bias, dy)]
    y, (mean, var) = (lambda y, m: (y, m[1:]))(*batchnorm.batch_norm(*exact[:3]))
    dx, dgamma, dbeta = batchnorm.batch_norm_gradient(exact[3], *exact[:2])
    found = step(x, scale, bias, dy)
    rstd = np.abs(exact[1]) / np.sqrt(var + 1e-5)
    size = 1 + np.abs(y) + np.abs(exact[2])
    total = np.abs(exact[3]).sum(axis=0)
    assert (np.abs(found[0] - y) <= tol * size).all()
    assert (np.abs(found[1] - dx) <= tol * rstd * np.abs(exact[3]).max() * (1 + size)).all()
    assert (np.abs(found[2] - dgamma) <= tol * total * 3).all()
    assert (np.abs(found[3] - dbeta) <= tol * total).all()
    moments = jax.jit(lambda x: batch_norm(x, fused=fused)[1])(x)
    assert (np.abs(moments.var - var) <= tol * var).all()
    half_ulp = tolerances.HALF_ULP["float32"] * np.abs(mean)
    assert (np.abs(moments.mean - mean) <= tol * np.sqrt(var) + half_ulp).all()


def test_flax_loses_its_digits_at_offsets() -> None:
    x = normal(4096, 8) + 1e4
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(axis=0)) / np.sqrt(exact.var(axis=0) + 1e-5)
    assert np.abs(nnx.BatchNorm(8, rngs=nnx.Rngs(0))(x) - expected).max() > 1.0


# ------------------------------------------------------------------ bad input

X = np.zeros((8, 5, 3), np.float32)
BAD = [
    ({"mask": np.ones(7, bool)}, ValueError, r"mask must have shape \(8, 5\).*got \(7,\)"),
    ({"mask": np.ones(5, bool)}, ValueError, r"mask must have shape \(8, 5\)"),
    ({"mask": np.array(True)}, ValueError, r"mask must have shape \(8, 5\)"),
    ({"mask": np.ones((8, 5), np.float32)}, TypeError, "mask must be boolean or integer.*!= 0"),
    ({"scale": np.ones(4, np.float32)}, ValueError, r"scale must have shape \(3,\).*got \(4,\)"),
    ({"bias": np.ones(1, np.float32)}, ValueError, r"bias must have shape \(3,\)"),
    ({"scale": np.ones(3, np.int32)}, TypeError, "scale must be floating.*Cast"),
    ({"axis": 3}, ValueError, "axis 3 is out of range.*use -3 to 2"),
    ({"axis": (1, -2)}, ValueError, "same channel axis twice"),
    ({"axis": 1.5}, TypeError, "axis must be an int"),
    ({"epsilon": -1.0}, ValueError, "epsilon must be finite and at least 0"),
    ({"virtual_batch_size": 3}, ValueError, "must divide the batch size.*got a batch of 8"),
    ({"axis_index_groups": [[0]]}, ValueError, "axis_index_groups needs axis_name"),
    ({"axis_name": "nowhere"}, NameError, "axis_name='nowhere' is not bound.*shard_map"),
    ({"fused": 1}, TypeError, "fused must be None"),
    ({"renorm_clipping": {"rmax": 2.0}}, ValueError, "renorm_clipping needs renorm"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_bad_arguments_are_named_at_trace_time(options: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=f"batch_norm: .*{message}"):
        jax.eval_shape(lambda x: batch_norm(x, **options), X)


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, bool])
def test_input_of_another_kind(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"x must be float16, bfloat16, float32 or float64.*Cast"):
        batch_norm(np.zeros((4, 3), dtype))
    with pytest.raises(TypeError, match="batch_norm_inference: x must be"):
        batch_norm_inference(np.zeros((4, 3), dtype), jnp.zeros(3), jnp.ones(3))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.9"])
def test_a_momentum_out_of_range(value: Any) -> None:
    _, moments = batch_norm(normal(4, 3))
    with pytest.raises((ValueError, TypeError), match="momentum must be"):
        update_running(init_running(3), moments, momentum=value)
    with pytest.raises((ValueError, TypeError), match="momentum must be"):
        BatchNorm(3, momentum=value)
