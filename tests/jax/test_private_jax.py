"""Attributes of jax that its documentation does not promise, each taken away."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from batchnorm.jax import batch_norm, private
from batchnorm.kernels import extension

KERNELS = pytest.mark.skipif(
    extension.missing_reason() is not None, reason=f"no kernels: {extension.missing_reason()}"
)
OF_THE_PROGRAM = (
    *("module_context", "axis_context", "lowering_parameters", "for_export", "num_devices"),
)


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A function that takes an attribute of jax away from this library."""

    def hide(name: str) -> None:
        def getattr_without(owner: Any, wanted: str, *default: Any) -> Any:
            return builtins.getattr(owner, "hidden" if wanted == name else wanted, *default)

        monkeypatch.setattr(private, "getattr", getattr_without, raising=False)
        jax.clear_caches()  # programs that were compiled with it

    yield hide
    jax.clear_caches()


def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y and dx of a training step."""
    y, transpose = jax.vjp(lambda a: batch_norm(a)[0], x)
    return y, transpose(jnp.cos(x))[0]


@KERNELS
@pytest.mark.parametrize("name", OF_THE_PROGRAM)
def test_programs_take_array_code(name: str, hide: Callable[[str], None]) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(19, 3)).astype(np.float32))
    assert "batchnorm_forward" in jax.jit(step).lower(x).as_text()
    by_kernels = jax.jit(step)(x)
    hide(name)
    assert "batchnorm_forward" not in jax.jit(step).lower(x).as_text()
    by_arrays = jax.jit(step)(x)
    for a, b in zip(by_arrays, by_kernels, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="fused"):
        jax.jit(lambda a: batch_norm(a, fused=True)[0])(x)


@pytest.mark.parametrize("name", ["mat", "varying", "manual_axes"])
def test_axes_of_shard_map_are_known(name: str, hide: Callable[[str], None]) -> None:
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32))
    gamma = jnp.full(3, 1.5)
    seen = []

    def loss(x: jax.Array, gamma: jax.Array) -> jax.Array:
        seen.append((private.varying_axes(x), private.varying_axes(gamma)))
        y, _ = batch_norm(x, gamma, axis_name="rows")
        return jax.lax.psum(jnp.sum(jnp.cos(y) * x), "rows")

    rows, whole = PartitionSpec("rows"), PartitionSpec()
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(rows, whole), out_specs=whole)
    expected = jax.jit(jax.grad(sharded, (0, 1)))(x, gamma)
    hide(name)
    found = jax.jit(jax.grad(sharded, (0, 1)))(x, gamma)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert set(seen) == {(frozenset({"rows"}), frozenset())}
