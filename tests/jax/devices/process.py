"""One of two processes with two devices each; run by tests/jax/test_synchronization.py."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from batchnorm.jax import batch_norm

ROWS = PartitionSpec("rows")


def main(address: str, rank: int) -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.distributed.initialize(address, num_processes=2, process_id=rank)
    assert jax.device_count() == 4
    assert len(jax.local_devices()) == 2
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(mean, 1.0, (32, 3)).astype(np.float32) for mean in (1e3, 0.0))
    mask = np.arange(32) < 19  # two full devices, one in part, one without a real row

    def shared(a: Any) -> jax.Array:
        return jax.make_array_from_callback(a.shape, NamedSharding(mesh, ROWS), lambda i: a[i])

    def loss(x: Any, mask: Any, dy: Any, axis_name: str | None) -> Any:
        y, moments = batch_norm(x, mask=mask, axis_name=axis_name)
        return jnp.vdot(y, dy), (y, moments)

    def gradient(axis_name: str | None) -> Any:
        return jax.grad(lambda *a: loss(*a, axis_name), has_aux=True)

    specs = (PartitionSpec("rows"),) * 3
    by_name = jax.shard_map(
        gradient("rows"),
        mesh=mesh,
        in_specs=specs,
        out_specs=(ROWS, (ROWS, PartitionSpec())),
    )
    dx, (y, moments) = gradient(None)(*map(jnp.asarray, (x, mask, dy)))
    for step in (jax.jit(by_name), jax.jit(gradient(None))):
        found = step(shared(x), shared(mask), shared(dy))
        _compare(found, (dx, (y, moments)))
    print("agrees")


def _compare(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        for shard in a.addressable_shards:
            np.testing.assert_allclose(shard.data, np.asarray(b)[shard.index], rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
