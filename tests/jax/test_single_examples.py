"""Inputs that have channel axes only, as inside jax.vmap over examples (S7, S14)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from batchnorm.jax import (
    BatchNorm,
    RenormStatistics,
    batch_norm,
    batch_norm_inference,
    init_running,
    update_running,
)

PATHS = pytest.mark.parametrize("fused", [None, False])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums of a few dozen terms
# Shape of an example, and channel axes that leave nothing to reduce over.
KINDS = pytest.mark.parametrize(
    ("shape", "axis"), [((3,), -1), ((3,), 0), ((2, 3), (0, 1)), ((2, 3), (-1, 0))], ids=str
)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def shifted(axis: Any) -> Any:
    """The same channel axes behind an axis of examples."""
    return tuple(a + 1 if a >= 0 else a for a in ((axis,) if isinstance(axis, int) else axis))


def parameters(shape: tuple[int, ...]) -> list[jax.Array]:
    return [normal(*shape, seed=1), normal(*shape, seed=2)]


@KINDS
def test_evaluation_is_that_of_a_row(shape: Any, axis: Any) -> None:
    x, (scale, bias) = normal(4, *shape), parameters(shape)
    mean, var = normal(*shape, seed=3), jnp.abs(normal(*shape, seed=4)) + 0.5

    def evaluate(x: Any, axis: Any) -> Any:
        return batch_norm_inference(x, mean, var, scale, bias, axis=axis)

    expected = evaluate(x, shifted(axis))
    found = jnp.stack([evaluate(row, axis) for row in x])
    np.testing.assert_allclose(found, expected, **CLOSE)
    np.testing.assert_allclose(jax.vmap(lambda row: evaluate(row, axis))(x), expected, **CLOSE)
    gradient = jax.grad(lambda row: jnp.sum(evaluate(row, axis) * scale))(x[0])
    np.testing.assert_allclose(gradient, scale * scale / jnp.sqrt(var + 1e-5), **CLOSE)


@pytest.mark.sample(5)
@KINDS
@PATHS
def test_training_without_an_axis_is_one_row(shape: Any, axis: Any, fused: bool | None) -> None:
    x, (scale, bias) = normal(*shape), parameters(shape)

    def train(x: Any) -> Any:
        return batch_norm(x, scale, bias, axis=axis, fused=fused)

    (y, moments), transpose = jax.vjp(train, x)
    np.testing.assert_array_equal(y, bias)  # S7
    np.testing.assert_array_equal(moments.count, np.ones(shape))
    np.testing.assert_allclose(moments.mean, x, rtol=1e-6)
    np.testing.assert_array_equal(moments.var, np.zeros(shape))
    dy, nothing = normal(*shape, seed=5), jax.tree.map(jnp.zeros_like, moments)
    rounding = 5e-7 * np.abs(scale * dy).max() / np.sqrt(1e-5)  # of a difference of equal terms
    np.testing.assert_allclose(transpose((dy, nothing))[0], np.zeros(shape), atol=rounding)
    moved = update_running(init_running(shape), moments, momentum=0.5)
    np.testing.assert_allclose(moved.mean, 0.5 * x, rtol=1e-6)
    batched = jax.vmap(lambda row: train(row)[0])(normal(4, *shape))
    np.testing.assert_array_equal(batched, jnp.broadcast_to(bias, (4, *shape)))


@pytest.mark.sample(9)
@KINDS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("renormed", [False, True])
def test_a_named_axis_is_the_batch(shape: Any, axis: Any, masked: bool, renormed: bool) -> None:
    x, dy, (scale, bias) = normal(6, *shape), normal(6, *shape, seed=5), parameters(shape)
    mask = jnp.array([1, 1, 0, 1, 0, 1], bool) if masked else None
    options: Any = {}
    if renormed:
        options["renorm"] = RenormStatistics(*parameters(shape))

    def together(x: Any) -> Any:
        return batch_norm(x, scale, bias, mask=mask, axis=shifted(axis), fused=False, **options)

    def apart(x: Any) -> Any:
        def one(x: Any, mask: Any) -> Any:
            named: Any = {"axis": axis, "axis_name": "examples", **options}
            return batch_norm(x, scale, bias, mask=mask, **named)

        return jax.vmap(one, (0, None if mask is None else 0), axis_name="examples")(x, mask)

    expected, moments = together(x)
    found, merged = apart(x)
    np.testing.assert_allclose(found, expected, **CLOSE)
    for a, b in zip(merged, moments, strict=True):
        np.testing.assert_allclose(a, jnp.broadcast_to(b, a.shape), **CLOSE)
    gradients = [jax.grad(lambda x, f=f: jnp.vdot(f(x)[0], dy))(x) for f in (apart, together)]
    np.testing.assert_allclose(*gradients, **CLOSE)


@PATHS
@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_masks_of_one_row(shape: Any, dtype: Any, fused: bool | None) -> None:
    # S1 (a): x's shape without its channel axes is (), and not a scalar for many rows.
    x, bias = normal(3), normal(3, seed=1)
    for real in (True, False):
        y, moments = batch_norm(x, bias=bias, mask=np.full(shape, real, dtype), fused=fused)
        # Without a real row the running statistics serve (S6), with one y is the bias (S7).
        expected = bias if real else x / np.sqrt(1 + 1e-5) + bias
        np.testing.assert_allclose(y, expected, rtol=1e-6)
        np.testing.assert_array_equal(moments.count, np.full(3, float(real)))


@PATHS
def test_a_mask_along_the_channels_of_one_row(fused: bool | None) -> None:
    x = normal(3)
    y, moments = batch_norm(x, mask=np.array([True, False, True]), fused=fused)
    np.testing.assert_array_equal(moments.count, [1.0, 0.0, 1.0])
    np.testing.assert_allclose(y, [0.0, x[1] / np.sqrt(1 + 1e-5), 0.0], rtol=1e-6)


def test_masks_of_one_row_that_do_not_fit() -> None:
    for shape in ((2,), (1, 1), (1, 3)):
        with pytest.raises(ValueError, match=r"mask must have shape \(\).*x of shape \(3,\)"):
            batch_norm(normal(3), mask=np.ones(shape, bool))
    with pytest.raises(ValueError, match=r"mask must have shape \(4,\)"):
        batch_norm(normal(4, 3), mask=np.array(True))  # not for many rows


def test_a_scalar_and_ghost_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="x must have at least 1 axis"):
        batch_norm(jnp.float32(1.0))
    with pytest.raises(ValueError, match="splits axis 0, which must not be a channel axis"):
        batch_norm(normal(3), virtual_batch_size=1)


@pytest.mark.parametrize("fused", [None, True, False])
def test_the_layer_takes_a_row_as_flaxs_does(fused: bool | None) -> None:
    x = normal(3)
    options: Any = {"momentum": 0.8, "bias_init": jax.nn.initializers.ones, "rngs": nnx.Rngs(0)}
    ours, flaxs = BatchNorm(3, fused=fused, **options), nnx.BatchNorm(3, **options)
    np.testing.assert_allclose(ours(x), flaxs(x), **CLOSE)
    for name in ("mean", "var"):
        np.testing.assert_allclose(getattr(ours, name)[...], getattr(flaxs, name)[...], **CLOSE)
    evaluated = [layer(x, use_running_average=True) for layer in (ours, flaxs)]
    np.testing.assert_allclose(*evaluated, **CLOSE)
    assert ours.freeze()(x).shape == (3,)
    assert BatchNorm().init(0, x).num_features == 3


@pytest.mark.parametrize("renorm", [False, True])
def test_layers_over_examples_are_a_layer_over_the_batch(renorm: bool) -> None:
    x, mask = normal(6, 3), jnp.array([1, 1, 0, 1, 0, 1], bool)

    def run(layer: BatchNorm, x: Any, mask: Any) -> Any:
        return layer(x, mask=mask), layer.mean[...], layer.var[...]

    def make(**options: Any) -> BatchNorm:
        return BatchNorm(3, momentum=0.5, renorm=renorm, rngs=nnx.Rngs(0), **options)

    expected = run(make(), x, mask)
    mapped = jax.vmap(run, (None, 0, 0), axis_name="examples")
    found = mapped(make(axis_name="examples"), x, mask)
    np.testing.assert_allclose(found[0], expected[0], **CLOSE)
    for a, b in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, jnp.broadcast_to(b, a.shape), **CLOSE)
    layer = make().eval()
    np.testing.assert_allclose(jax.vmap(layer)(x), layer(x), **CLOSE)
