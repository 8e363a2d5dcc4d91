"""The recipes of docs/recipes-jax.md, run from the page itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pages import PAGES, python_blocks, run

from batchnorm.jax import BatchNorm

RECIPES = {b.heading: b for b in python_blocks(PAGES["docs/recipes-jax.md"], keras=False)}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32, sums of a few dozen terms
MASK = jnp.arange(8) < 5


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax and the other libraries need it
        yield


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def check(y: Any, evaluated: Any, x: Any) -> None:
    """y of a masked training step, and another call in evaluation, are those of the layer."""
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(y, layer(x, mask=MASK), **CLOSE)
    np.testing.assert_allclose(evaluated, layer.eval()(x), **CLOSE)


def test_recipes_are_short() -> None:
    assert len(RECIPES) == 4
    for title, block in RECIPES.items():
        assert len([line for line in block.code.splitlines() if line.strip()]) <= 20, title


def test_linen() -> None:
    x = normal(8, 3)
    module = run([RECIPES["flax linen"]])["MaskedBatchNorm"]()
    variables = module.init(jax.random.key(0), x)
    y, moved = jax.jit(lambda v, x: module.apply(v, x, MASK, mutable=["batch_stats"]))(variables, x)
    check(y, module.apply(variables | moved, x, training=False), x)


def test_equinox() -> None:
    equinox = pytest.importorskip("equinox")
    x = normal(8, 3)
    module, state = equinox.nn.make_with_state(run([RECIPES["Equinox"]])["MaskedBatchNorm"])(3)
    y, state = equinox.filter_jit(module)(x, state, MASK)
    check(y, module(x, state, training=False)[0], x)


def test_haiku() -> None:
    haiku = pytest.importorskip("haiku")
    x = normal(8, 3)
    kind = run([RECIPES["Haiku"]])["MaskedBatchNorm"]
    model = haiku.transform_with_state(lambda x, **options: kind()(x, **options))
    parameters, state = model.init(None, x, training=False)
    y, state = jax.jit(lambda p, s, x: model.apply(p, s, None, x, mask=MASK))(parameters, state, x)
    check(y, model.apply(parameters, state, None, x, training=False)[0], x)


def test_optax() -> None:
    names = run([RECIPES["Training a flax nnx layer with optax"]])
    x, target = normal(8, 4, 3), normal(8, 4, 3, seed=1)
    mask = jnp.asarray(np.random.default_rng(2).random((8, 4)) < 0.7)
    x = jnp.where(mask[..., None], x, jnp.nan)
    model = names["model"]
    losses = [names["train_step"](model, names["optimizer"], x, mask, target) for _ in range(5)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert np.isfinite(model.mean[...]).all()
    assert float(model.momentum[...]) == pytest.approx(0.99)
