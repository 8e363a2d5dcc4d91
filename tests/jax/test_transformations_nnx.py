"""The rows on JAX of the table in docs/transformations.md: what moves the statistics."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from batchnorm.jax import BatchNorm, batch_norm, init_running, update_running


def rows(*shape: int) -> Any:
    return jax.random.normal(jax.random.key(0), shape) + 3


def make() -> BatchNorm:
    return BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0))


def test_statistics_move_once_under_nnx_remat() -> None:
    layer, x = make(), rows(8, 4)
    remat = nnx.remat(lambda layer, x: layer(x))
    nnx.grad(lambda layer: (remat(layer, x) ** 3).sum())(layer)
    np.testing.assert_allclose(layer.mean[...], 0.5 * x.mean(0), rtol=1e-5)


def test_pure_statistics_under_jax_checkpoint_are_those_of_one_pass() -> None:
    x = rows(8, 4)

    @jax.checkpoint
    def block(x: Any, running: Any) -> Any:
        y, moments = batch_norm(x)
        return y, update_running(running, moments, momentum=0.5)

    def loss(x: Any) -> Any:
        y, running = block(x, init_running(4))
        return (y**3).sum(), running

    _, running = jax.grad(loss, has_aux=True)(x)
    np.testing.assert_allclose(running.mean, 0.5 * x.mean(0), rtol=1e-5)


def test_nnx_scan_over_a_carried_layer_moves_them_once_for_each_step() -> None:
    layer, x = make(), rows(3, 8, 4)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(layer: Any, x: Any) -> Any:
        return layer, layer(x)

    layer, _ = run(layer, x)
    expected = jnp.zeros(4)
    for part in x:
        expected = 0.5 * expected + 0.5 * part.mean(0)
    np.testing.assert_allclose(layer.mean[...], expected, rtol=1e-5)


def test_nnx_vmap_over_stacked_layers_moves_each_by_its_own_rows() -> None:
    x = rows(3, 8, 4)
    layers = nnx.vmap(lambda key: BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 3)
    )
    nnx.vmap(lambda layer, x: layer(x))(layers, x)
    np.testing.assert_allclose(layers.mean[...], 0.5 * x.mean(1), rtol=1e-5)


def test_nnx_vmap_with_a_named_axis_moves_a_shared_layer_once() -> None:
    x = rows(3, 8, 4)
    layer = BatchNorm(4, momentum=0.5, axis_name="parts", rngs=nnx.Rngs(0))
    nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="parts")(layer, x)
    np.testing.assert_allclose(layer.mean[...], 0.5 * x.mean((0, 1)), rtol=1e-5)
