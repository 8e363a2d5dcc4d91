"""Padded rows of y: normalized, or zero (S4)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from batchnorm.jax import (
    BatchNorm,
    RenormStatistics,
    batch_norm,
    batch_norm_inference,
    convert_batchnorm,
    downsample_mask,
    sequence_mask,
)
from batchnorm.tools import fold

EVERY = pytest.mark.parametrize("fused", [None, True, False])
LENGTHS = np.array([7, 0, 3, 5])
MASK = sequence_mask(LENGTHS, 7)
PADDED = ~np.asarray(MASK)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ghost": {"virtual_batch_size": 2},
    "renorm": {"renorm": RenormStatistics(jnp.full(3, 0.1), jnp.full(3, 1.5))},
}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def sequences(dtype: Any = jnp.float32) -> jax.Array:
    return jnp.where(MASK[..., None], normal(4, 7, 3), jnp.nan).astype(dtype)


@pytest.mark.sample(4)
@EVERY
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_training(options: Any, dtype: str, fused: bool | None) -> None:
    x, scale, bias, dy = sequences(dtype), normal(3), normal(3, seed=1), normal(4, 7, 3, seed=2)
    found = {}
    for padded_output in ("normalize", "zero"):

        def step(x: Any, scale: Any, bias: Any, padded_output: str = padded_output) -> Any:
            given = {"mask": MASK, "padded_output": padded_output, "fused": fused, **options}
            return batch_norm(x, scale, bias, **given)

        y, transpose, moments = jax.vjp(step, x, scale, bias, has_aux=True)
        found[padded_output] = y, transpose(dy.astype(y.dtype)), moments
    (y, gradients, moments), (zeroed, *rest) = found["normalize"], found["zero"]
    assert zeroed.dtype == x.dtype
    np.testing.assert_array_equal(zeroed[PADDED], 0.0)
    np.testing.assert_array_equal(zeroed[~PADDED], y[~PADDED])
    for a, b in zip(jax.tree.leaves((gradients, moments)), jax.tree.leaves(rest), strict=True):
        np.testing.assert_array_equal(a, b)  # dy at padded rows counts in neither
    np.testing.assert_array_equal(rest[0][0][PADDED], 0.0)
    assert np.abs(rest[0][0][~PADDED]).max() > 0


@EVERY
@pytest.mark.parametrize("frozen", [False, True])
def test_evaluation_and_a_frozen_layer(frozen: bool, fused: bool | None) -> None:
    layer = BatchNorm(3, padded_output="zero", fused=fused, rngs=nnx.Rngs(0))
    layer(sequences(), mask=MASK)
    before = np.asarray(layer.var[...])
    layer = layer.freeze() if frozen else layer.eval()
    y, transpose = jax.vjp(lambda x: layer(x, mask=MASK), sequences())
    rest = (layer.mean[...], layer.var[...], layer.scale[...], layer.bias[...])
    expected = batch_norm_inference(sequences(), *rest)
    np.testing.assert_array_equal(y[PADDED], 0.0)
    np.testing.assert_allclose(y[~PADDED], expected[~PADDED], rtol=1e-5, atol=1e-6)
    dx = transpose(normal(4, 7, 3, seed=1))[0]
    np.testing.assert_array_equal(dx[PADDED], 0.0)
    assert np.isfinite(dx).all()
    np.testing.assert_array_equal(layer.var[...], before)
    found = batch_norm_inference(sequences(), *rest, mask=MASK, padded_output="zero")
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6)


@EVERY
def test_a_call_without_a_mask_is_as_before(fused: bool | None) -> None:
    x = normal(8, 3)
    zero = batch_norm(x, padded_output="zero", fused=fused)[0]
    np.testing.assert_array_equal(zero, batch_norm(x, fused=fused)[0])


def test_a_mask_that_varies_along_channels() -> None:
    x = normal(8, 3)
    mask = np.random.default_rng(0).random((8, 3)) < 0.5
    y = batch_norm(jnp.where(mask, x, jnp.inf), mask=mask, padded_output="zero")[0]
    expected = batch_norm(x, mask=mask)[0]
    np.testing.assert_array_equal(y, jnp.where(mask, expected, 0))


@EVERY
def test_nothing_but_padding(fused: bool | None) -> None:
    x = jnp.full((4, 3), jnp.inf)
    mask = jnp.zeros(4, bool)
    y, transpose = jax.vjp(
        lambda x: batch_norm(x, bias=jnp.ones(3), mask=mask, padded_output="zero", fused=fused)[0],
        x,
    )
    np.testing.assert_array_equal(y, 0.0)
    np.testing.assert_array_equal(transpose(jnp.ones((4, 3)))[0], 0.0)


@pytest.mark.sample(2)
@pytest.mark.parametrize("fused", [None, False])
def test_transformations(fused: bool | None) -> None:
    xs, masks = normal(2, 5, 3), np.random.default_rng(1).random((2, 5)) < 0.6

    def step(x: Any, mask: Any) -> Any:
        return batch_norm(x, mask=mask, padded_output="zero", fused=fused)[0]

    expected = jnp.stack([step(x, mask) for x, mask in zip(xs, masks, strict=True)])
    np.testing.assert_allclose(jax.vmap(step)(xs, masks), expected, rtol=1e-5, atol=1e-6)
    mapped = jax.pmap(step)(xs[:1], masks[:1])
    np.testing.assert_allclose(mapped, expected[:1], rtol=1e-5, atol=1e-6)
    y, tangent = jax.jvp(lambda x: step(x, masks[0]), (xs[0],), (xs[1],))
    for rows in (y, tangent):
        np.testing.assert_array_equal(rows[~masks[0]], 0.0)
    shapes = (jax.ShapeDtypeStruct((5, 3), jnp.float32), jax.ShapeDtypeStruct((5,), jnp.bool_))
    program = export.export(jax.jit(step))(*shapes)
    np.testing.assert_allclose(program.call(xs[0], masks[0]), expected[0], rtol=1e-5, atol=1e-6)


class Network(nnx.Module):
    """Three convolutions, the second one strided, each with a batch norm behind it."""

    def __init__(self, padded_output: str) -> None:
        rngs = nnx.Rngs(0)
        self.strides = (1, 2, 1)
        self.convs = nnx.List([nnx.Conv(3, 3, (3,), s, padding=1, rngs=rngs) for s in self.strides])
        self.norms = nnx.List([nnx.BatchNorm(3, rngs=rngs) for _ in self.strides])
        convert_batchnorm(self, momentum=0.0, padded_output=padded_output)

    def __call__(self, x: Any, mask: Any) -> tuple[Any, Any]:
        x = jnp.where(mask[..., None], x, 0)
        for conv, norm, stride in zip(self.convs, self.norms, self.strides, strict=True):
            mask = downsample_mask(mask, 3, stride, 1)
            x = nnx.relu(norm(conv(x), mask=mask))
        return x, mask


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_between_the_layers_read_no_padding(training: bool) -> None:
    x, lengths = normal(3, 11, 3) + 1, [11, 6, 3]
    wide = jnp.pad(x, ((0, 0), (0, 20), (0, 0)), constant_values=np.nan)
    far = {}
    for padded_output in ("normalize", "zero"):
        found = []
        for given in (x, wide):
            network = Network(padded_output)
            network(x, sequence_mask(lengths, 11))  # statistics for evaluation
            network.train() if training else network.eval()
            y, mask = network(given, sequence_mask(lengths, given.shape[1]))
            found.append(y[mask])
        far[padded_output] = np.abs(found[0] - found[1]).max()
    assert far["zero"] < 1e-5
    assert far["normalize"] > 0.01


def test_no_linear_map_takes_it_over() -> None:
    norm = BatchNorm(3, padded_output="zero", rngs=nnx.Rngs(0))
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), norm)
    assert "padded_output='zero', which no linear map" in str(fold(model, jnp.ones((2, 4)))[1])


@pytest.mark.parametrize("value", [None, True, "zeros", 0])
def test_other_values(value: Any) -> None:
    message = 'padded_output must be "normalize" or "zero"; got'
    with pytest.raises(ValueError, match=f"^batch_norm: {message}"):
        batch_norm(normal(4, 3), padded_output=value)
    with pytest.raises(ValueError, match=f"^BatchNorm: {message}"):
        BatchNorm(3, padded_output=value)
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"^convert_batchnorm: {message}"):
        convert_batchnorm(model, padded_output=value)
