"""Statistics over a named axis of devices: shard_map and pmap."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from batchnorm.jax import BatchNorm, RenormStatistics, batch_norm, init_running, update_running

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums of a few dozen terms
ROWS, EVERYWHERE = PartitionSpec("rows"), PartitionSpec()
MASKS = {
    "none": None,
    "unequal": np.array([1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 0], bool),
    "empty device": np.arange(16) < 11,
    "all empty": np.zeros(16, bool),
}
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
CHECKED = pytest.mark.parametrize("checked", [True, False])


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def assert_close(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **CLOSE)


def on_mesh(function: Any, kind: AxisType, in_specs: Any, out_specs: Any, checked: bool) -> Any:
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=checked
    )

    def call(*args: Any) -> Any:
        placed = [
            None if a is None else jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))
            for a, spec in zip(args, in_specs, strict=True)
        ]
        with jax.set_mesh(mesh):
            return jax.jit(mapped)(*placed)

    return call


def value(x: Any, scale: Any, mask: Any, dy: Any, **options: Any) -> Any:
    y, moments = batch_norm(x, scale, mask=mask, **options)
    return jnp.sum(y * dy), (y, moments)


@pytest.mark.sample(5)
@KINDS
@CHECKED
@pytest.mark.parametrize("name", MASKS)
def test_shard_map_equals_one_device(name: str, checked: bool, kind: AxisType) -> None:
    x, scale, dy = normal(16, 3) + 100.0, normal(3, seed=1), normal(16, 3, seed=2)
    mask = None if MASKS[name] is None else jnp.asarray(MASKS[name])

    def local(x: Any, scale: Any, mask: Any, dy: Any) -> Any:
        _, transpose, (y, moments) = jax.vjp(
            lambda *a: value(*a, mask, dy, axis_name="rows"), x, scale, has_aux=True
        )
        one = jnp.ones((), x.dtype)
        if checked:
            one = jax.lax.pcast(one, "rows", to="varying")
        dx, dscale = transpose(one)
        return y, moments, dx, dscale if checked else jax.lax.psum(dscale, "rows")

    specs = (ROWS, EVERYWHERE, ROWS if mask is not None else EVERYWHERE, ROWS)
    call = on_mesh(local, kind, specs, (ROWS, EVERYWHERE, ROWS, EVERYWHERE), checked)
    (dx, dscale), (y, moments) = jax.grad(value, argnums=(0, 1), has_aux=True)(x, scale, mask, dy)
    assert_close(call(x, scale, mask, dy), (y, moments, dx, dscale))


@pytest.mark.sample(3)
@KINDS
@CHECKED
def test_gradients_through_shard_map_equal_those_of_one_device(
    checked: bool, kind: AxisType
) -> None:
    x, scale, dy = normal(16, 3) + 100.0, normal(3, seed=1), normal(16, 3, seed=2)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(kind,))
    mapped = jax.shard_map(
        lambda x, scale: batch_norm(x, scale, axis_name="rows"),
        mesh=mesh,
        in_specs=(ROWS, EVERYWHERE),
        out_specs=(ROWS, EVERYWHERE),
        check_vma=checked,
    )

    def loss(x: Any, scale: Any, dy: Any, function: Any) -> Any:
        y, moments = function(x, scale)
        return jnp.sum(y * dy) + jnp.sum(jnp.log(moments.var) + moments.mean)

    expected = jax.grad(loss, argnums=(0, 1))(x, scale, dy, batch_norm)
    placed = [
        jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))
        for a, spec in ((x, ROWS), (scale, EVERYWHERE), (dy, ROWS))
    ]
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=3)(*placed, mapped)
    assert_close(found, expected)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", MASKS)
def test_pmap_equals_one_device(name: str) -> None:
    x = normal(16, 3) + 100.0
    mask = jnp.ones(16, bool) if MASKS[name] is None else jnp.asarray(MASKS[name])
    y, moments = jax.pmap(
        lambda x, mask: batch_norm(x, mask=mask, axis_name="rows"), axis_name="rows"
    )(x.reshape(4, 4, 3), mask.reshape(4, 4))
    expected = batch_norm(x, mask=mask)
    assert_close(y.reshape(16, 3), expected[0])
    for found, whole in zip(moments, expected[1], strict=True):
        assert_close(found, jnp.broadcast_to(whole, found.shape))


@pytest.mark.sample(6)
@pytest.mark.parametrize("fused", [None, True, False])
@CHECKED
def test_without_a_name_devices_are_on_their_own(checked: bool, fused: bool | None) -> None:
    x, dy = normal(16, 3), normal(16, 3, seed=1)

    def local(x: Any, dy: Any) -> Any:
        y, transpose = jax.vjp(lambda a: batch_norm(a, fused=fused)[0], x)
        return y, transpose(dy)[0]

    call = on_mesh(local, AxisType.Auto, (ROWS, ROWS), (ROWS, ROWS), checked)
    parts = [local(x[i : i + 4], dy[i : i + 4]) for i in range(0, 16, 4)]
    assert_close(call(x, dy), jax.tree.map(lambda *a: jnp.concatenate(a), *parts))


def test_groups_of_devices_keep_to_themselves() -> None:
    x = normal(16, 3)
    mask = jnp.asarray(MASKS["unequal"])

    def local(x: Any, mask: Any) -> Any:
        y, moments = batch_norm(x, mask=mask, axis_name="rows", axis_index_groups=[[0, 3], [1, 2]])
        return y, jax.tree.map(lambda a: a[None], moments)

    y, moments = on_mesh(local, AxisType.Auto, (ROWS, ROWS), (ROWS, ROWS), True)(x, mask)
    for members in ([0, 3], [1, 2]):
        rows = np.concatenate([np.arange(4 * i, 4 * i + 4) for i in members])
        expected = batch_norm(x[rows], mask=mask[rows])
        assert_close(y[rows], expected[0])
        for i in members:
            assert_close([m[i] for m in moments], list(expected[1]))


@pytest.mark.parametrize("groups", [[[0, 1], [2]], [[0, 1], [1, 2, 3]], [[0, 1, 2, 3, 4]]])
def test_groups_must_be_a_partition(groups: Any) -> None:
    with pytest.raises(ValueError, match="axis_index_groups must hold each of the 4 indices"):
        jax.vmap(
            lambda x: batch_norm(x, axis_name="rows", axis_index_groups=groups)[0],
            axis_name="rows",
        )(normal(4, 4, 3))


def test_ghost_batches_are_local_and_their_average_is_shared() -> None:
    x = normal(16, 3)
    mask = jnp.asarray([1] * 4 + [0] * 4 + [1, 0, 1, 0] + [1] * 4, bool)

    def local(x: Any, mask: Any) -> Any:
        y, moments = batch_norm(x, mask=mask, axis_name="rows", virtual_batch_size=2)
        return y, update_running(init_running(3), moments, momentum=0.5)

    call = on_mesh(local, AxisType.Auto, (ROWS, ROWS), (ROWS, EVERYWHERE), True)
    y, running = call(x, mask)
    means, variances = [], []
    for start in range(0, 16, 4):
        for rows in (start + np.array([0, 2]), start + np.array([1, 3])):  # group i mod 2
            real = mask[rows]
            expected = batch_norm(x[rows], mask=real)
            assert_close(y[rows], expected[0])
            if bool(real.any()):
                means.append(expected[1].mean)
                variances.append(expected[1].var)
    assert_close(running.mean, 0.5 * jnp.stack(means).mean(axis=0))
    assert_close(running.var, 0.5 + 0.5 * jnp.stack(variances).mean(axis=0))


def test_renormalization_uses_the_moments_of_all() -> None:
    x = normal(16, 3) * 2.0 + 1.0
    mask = jnp.asarray(MASKS["unequal"])
    statistics = RenormStatistics(normal(3, seed=1), jnp.full(3, 1.5))

    def step(x: Any, mask: Any, axis_name: str | None) -> Any:
        return batch_norm(
            x, mask=mask, renorm=statistics, renorm_clipping={"dmax": 0.5}, axis_name=axis_name
        )[0]

    call = on_mesh(lambda x, mask: step(x, mask, "rows"), AxisType.Auto, (ROWS, ROWS), ROWS, True)
    assert_close(call(x, mask), step(x, mask, None))


def test_padded_rows_of_every_device_are_zeroed() -> None:
    x, dy = normal(16, 3), normal(16, 3, seed=1)
    mask = jnp.asarray(MASKS["empty device"])
    x = jnp.where(mask[:, None], x, jnp.nan)

    def step(x: Any, mask: Any, dy: Any, axis_name: str | None) -> Any:
        def function(x: Any) -> Any:
            return batch_norm(x, mask=mask, padded_output="zero", axis_name=axis_name)[0]

        y, transpose = jax.vjp(function, x)
        return y, transpose(dy)[0]

    call = on_mesh(
        lambda *a: step(*a, "rows"), AxisType.Auto, (ROWS, ROWS, ROWS), (ROWS, ROWS), True
    )
    found = call(x, mask, dy)
    assert_close(found, step(x, mask, dy, None))
    for a in found:
        np.testing.assert_array_equal(np.asarray(a)[11:], 0.0)


def test_a_large_offset_survives_the_exchange() -> None:
    x = (normal(4096, 3) + jnp.float32(1e6)).astype(jnp.float32)
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(axis=0)) / np.sqrt(exact.var(axis=0) + 1e-5)
    call = on_mesh(lambda x: batch_norm(x, axis_name="rows")[0], AxisType.Auto, (ROWS,), ROWS, True)
    error = np.abs(np.asarray(call(x)) - expected) / (1 + np.abs(expected))
    assert error.max() < 5e-5  # S3, the plain path


def test_a_layer_inside_shard_map_moves_its_statistics_as_one_device_would() -> None:
    x = normal(16, 3)
    mask = jnp.asarray(MASKS["empty device"])
    layer = BatchNorm(3, momentum=0.5, axis_name="rows", rngs=nnx.Rngs(0))
    single = BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))

    def local(layer: BatchNorm, x: Any, mask: Any) -> Any:
        y = layer(x, mask=mask)
        return layer, y

    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(EVERYWHERE, ROWS, ROWS), out_specs=(EVERYWHERE, ROWS)
    )
    after, y = jax.jit(mapped)(layer, x, mask)
    assert_close(y, single(x, mask=mask))
    assert_close(after.mean[...], single.mean[...])
    assert_close(after.var[...], single.var[...])
