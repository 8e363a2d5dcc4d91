"""Plain jit with sharded arrays: statistics are global, and x stays where it is."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from batchnorm.jax import BatchNorm, batch_norm

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums of a few dozen terms
MASK = np.arange(32) < 19  # two full devices, one in part, one without a real row
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": MASK},
        {"mask": MASK, "padded_output": "zero"},
        {"virtual_batch_size": 8},
        {"virtual_batch_size": 4, "mask": MASK},
    ],
    ids=["plain", "mask", "zero", "ghost", "ghost-mask"],
)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4,), ("rows",), axis_types=(kind,))


def assert_close(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **CLOSE)


def step(x: Any, scale: Any, mask: Any, dy: Any, **options: Any) -> Any:
    def loss(x: Any, scale: Any) -> Any:
        y, moments = batch_norm(x, scale, mask=mask, **options)
        return jnp.sum(y * dy) + jnp.sum(moments.var), (y, moments)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, scale)


@pytest.mark.sample(5)
@OPTIONS
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_statistics_are_global(kind: AxisType, options: dict[str, Any]) -> None:
    mesh = mesh_of(kind)
    rows, everywhere = (NamedSharding(mesh, s) for s in (PartitionSpec("rows"), PartitionSpec()))
    x, scale, dy = normal(32, 3), normal(3, seed=1), normal(32, 3, seed=2)
    options = dict(options)
    mask = options.pop("mask", None)
    expected = step(x, scale, None if mask is None else jnp.asarray(mask), dy, **options)
    sharded = None if mask is None else jax.device_put(mask, rows)
    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(x, rows),
            jax.device_put(scale, everywhere),
            sharded,
            jax.device_put(dy, rows),
        )
        found = jax.jit(lambda *a: step(*a, **options))(*placed)
    assert_close(found, expected)


@pytest.mark.sample(3)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_x_is_gathered_nowhere(kind: AxisType, masked: bool) -> None:
    mesh = mesh_of(kind)
    rows = NamedSharding(mesh, PartitionSpec("rows"))
    x, dy = (jax.device_put(normal(4096, 3, seed=s), rows) for s in range(2))
    mask = jax.device_put(np.arange(4096) % 3 != 0, rows) if masked else None
    scale = jax.device_put(jnp.ones(3), NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(x, scale, mask, dy).compile().as_text()
    assert "all-reduce" in text  # it does compute over all devices
    assert "batchnorm_" not in text
    gathered = [line for line in text.splitlines() if re.search(r"all-gather|all-to-all", line)]
    assert not [line for line in gathered if "4096" in line], gathered


def test_an_array_on_one_device_of_many_takes_the_kernels() -> None:
    text = jax.jit(lambda x: batch_norm(x)[0]).lower(normal(8, 3)).as_text()
    assert "batchnorm_forward" in text


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_demanded_kernel_refuses_sharded_arrays(kind: AxisType) -> None:
    rows = NamedSharding(mesh_of(kind), PartitionSpec("rows"))
    x = jax.device_put(normal(32, 3), rows)
    with pytest.raises(ValueError, match=r"fused=True demands a kernel.*sharded over devices"):
        jax.jit(lambda x: batch_norm(x, fused=True)[0])(x)


def test_a_layer_over_sharded_arrays() -> None:
    rows = NamedSharding(mesh_of(AxisType.Auto), PartitionSpec("rows"))
    sharded, single = (BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0)) for _ in range(2))
    x = normal(32, 3)
    call = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))
    mask = jnp.asarray(MASK)
    y = call(sharded, jax.device_put(x, rows), jax.device_put(mask, rows))
    assert_close(y, single(x, mask=mask))
    assert_close((sharded.mean[...], sharded.var[...]), (single.mean[...], single.var[...]))


def test_ghost_batches_that_explicit_sharding_cannot_split() -> None:
    mesh = mesh_of(AxisType.Explicit)
    rows = PartitionSpec("rows")
    x = jax.device_put(normal(32, 3), NamedSharding(mesh, rows))

    def step(x: Any) -> Any:
        return batch_norm(x, virtual_batch_size=2)[0]

    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=r"multiple of the 4 parts.*auto_axes"):
            jax.jit(step)(x)
        found = jax.jit(jax.sharding.auto_axes(step, out_sharding=rows))(x)
    assert_close(found, step(normal(32, 3)))
