"""`update_statistics=False`: batch statistics, and every running value as it was (S20)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from batchnorm import explain
from batchnorm.jax import BatchNorm

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)) + 3, jnp.float32)
MASK = jnp.arange(8) < 6


def make(**options: Any) -> BatchNorm:
    return BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0), **options)


def assert_unmoved(layer: BatchNorm, like: BatchNorm) -> None:
    found, expected = (jax.tree.leaves(nnx.state(one)) for one in (layer, like))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


OPTIONS = {
    "plain": {},
    "array code": {"fused": False},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.5}},
    "ghost": {"virtual_batch_size": 4},
    "debias": {"debias": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_everything_else_is_as_in_training(options: dict[str, Any]) -> None:
    layer, moving, before = make(**options), make(**options), make(**options)
    y = layer(X, mask=MASK, update_statistics=False)
    assert_unmoved(layer, before)
    np.testing.assert_array_equal(y, moving(X, mask=MASK))
    assert (moving.mean[...] != before.mean[...]).any()


def test_participants_still_merge() -> None:
    layer, before = make(axis_name="device"), make(axis_name="device")

    def step(layer: Any, x: Any) -> Any:
        return layer(x, update_statistics=False)

    mapped = nnx.jit(nnx.vmap(step, in_axes=(None, 0), axis_name="device"))
    y = mapped(layer, X.reshape(2, 4, 3))
    assert_unmoved(layer, before)
    np.testing.assert_allclose(y.reshape(8, 3), make()(X), rtol=1e-5, atol=1e-5)


def test_compiled_recomputed_and_differentiated() -> None:
    layer, moving, before = make(debias=True), make(debias=True), make(debias=True)

    def loss(layer: Any, x: Any, update: bool) -> Any:
        return jnp.sum(layer(x, update_statistics=update) ** 3)

    step = nnx.jit(nnx.grad(nnx.remat(loss, static_argnums=2)), static_argnums=2)
    gradient = step(layer, X, False)
    assert_unmoved(layer, before)
    expected = step(moving, X, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), gradient, expected)
    assert int(moving.steps[...]) == 1


@pytest.mark.parametrize("mode", ["eval", "freeze"])
def test_without_batch_statistics_it_changes_nothing(mode: str) -> None:
    layer = getattr(make(), mode)()
    np.testing.assert_array_equal(layer(X, update_statistics=False), layer(X))
    assert_unmoved(layer, getattr(make(), mode)())


def test_explanations_take_it() -> None:
    assert explain(make(), X, update_statistics=False) == explain(make(), X)


def test_other_values_are_refused() -> None:
    layer = make()
    with pytest.raises(TypeError, match=r"BatchNorm: update_statistics must be True or False"):
        layer(X, update_statistics=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got a traced value\. Make it static \(static_argnames\)"):
        nnx.jit(lambda layer, update: layer(X, update_statistics=update))(layer, True)
