"""The recipes of docs/recipes-jax.md, run from the page itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from pages import PAGES, python_blocks, run

from batchnorm.jax import (
    BatchNorm,
    RunningStatistics,
    batch_norm,
    init_running,
    sequence_mask,
    update_running,
)

RECIPES = {b.heading: b for b in python_blocks(PAGES["docs/recipes-jax.md"], keras=False)}
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32, sums of a few dozen terms
MASK = jnp.arange(8) < 5
BEHIND = "{}, behind a strided convolution"
LENGTHS = np.array([11, 6, 3])


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


def sequences() -> tuple[jax.Array, jax.Array]:
    """Padded sequences, with NaN as padding, and their mask."""
    mask = sequence_mask(LENGTHS, 11)
    return jnp.where(mask[..., None], normal(3, 11, 2), jnp.nan), mask


def check_alone(y: Any, mask: Any, alone: Any) -> None:
    """The real outputs of evaluated sequences, with channels last, are those of each alone."""
    for i, n in enumerate(LENGTHS):
        one = np.asarray(alone(i, n))
        assert np.asarray(mask[i]).sum() == len(one)
        np.testing.assert_allclose(y[i][: len(one)], one, **CLOSE)


def test_recipes_are_short() -> None:
    assert len(RECIPES) == 12
    for title, block in RECIPES.items():
        assert len([line for line in block.code.splitlines() if line.strip()]) <= 20, title


def test_linen() -> None:
    x = normal(8, 3)
    module = run([RECIPES["flax linen"]])["MaskedBatchNorm"]()
    variables = module.init(jax.random.key(0), x)
    y, moved = jax.jit(lambda v, x: module.apply(v, x, MASK, mutable=["batch_stats"]))(variables, x)
    check(y, module.apply(variables | moved, x, training=False), x)


def test_linen_behind_a_strided_convolution() -> None:
    blocks = [RECIPES["flax linen"], RECIPES[BEHIND.format("flax linen")]]
    stem = run(blocks)["MaskedStem"](3)
    x, mask = sequences()
    variables = stem.init(jax.random.key(0), x, mask)
    (y, real), moved = stem.apply(variables, x, mask, mutable=["batch_stats"])
    rows = y[real]  # of all samples together: mean 0 and deviation 1 by their own statistics
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(rows.std(axis=0), 1, rtol=1e-3)
    evaluate = jax.jit(lambda x, mask: stem.apply(variables | moved, x, mask, training=False))
    y, real = evaluate(x, mask)
    check_alone(y, real, lambda i, n: evaluate(x[i : i + 1, :n], mask[i : i + 1, :n])[0][0])


def test_equinox() -> None:
    equinox = pytest.importorskip("equinox")
    x = normal(8, 3)
    module, state = equinox.nn.make_with_state(run([RECIPES["Equinox"]])["MaskedBatchNorm"])(3)
    y, state = equinox.filter_jit(module)(x, state, MASK)
    check(y, module(x, state, training=False)[0], x)


def test_equinox_behind_a_strided_convolution() -> None:
    equinox = pytest.importorskip("equinox")
    kind = run([RECIPES["Equinox"], RECIPES[BEHIND.format("Equinox")]])["MaskedStem"]
    stem, state = equinox.nn.make_with_state(kind)(2, 3, jax.random.key(0))
    x, mask = sequences()
    x = jnp.moveaxis(x, -1, 1)
    y, real, state = equinox.filter_jit(stem)(x, state, mask)
    rows = jnp.moveaxis(y, 1, -1)[real]
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(rows.std(axis=0), 1, rtol=1e-3)

    def evaluate(x: Any, mask: Any) -> Any:
        y, real, _ = stem(x, state, mask, training=False)
        return jnp.moveaxis(y, 1, -1), real

    y, real = evaluate(x, mask)
    check_alone(y, real, lambda i, n: evaluate(x[i : i + 1, :, :n], mask[i : i + 1, :n])[0][0])


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


BATCHES = normal(4, 8, 3, seed=3) + 1
ACCUMULATING = "Accumulating gradients"


def check_one_step(running: RunningStatistics, gradient: Any) -> None:
    """The statistics are those of one batch, and the gradient that of the passes."""
    whole = update_running(init_running(3), batch_norm(BATCHES.reshape(-1, 3))[1])
    np.testing.assert_allclose(running.mean, whole.mean, **CLOSE)
    np.testing.assert_allclose(running.var, whole.var, **CLOSE)
    # Of mean((scale·x̂ + bias)³) over a pass, 3 channels: mean(x̂³) and mean(x̂²) over its rows.
    xhat = jnp.stack([batch_norm(x)[0] for x in BATCHES])
    np.testing.assert_allclose(gradient[0], (xhat**3).mean(1).sum(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient[1], (xhat**2).mean(1).sum(0), rtol=1e-4, atol=1e-5)


def test_accumulating_with_linen() -> None:
    names = run([RECIPES[ACCUMULATING], RECIPES[f"{ACCUMULATING} with flax linen"]])
    model = names["BatchNormOfPasses"]()
    variables = model.init(jax.random.key(0), BATCHES[0])
    variables = {name: variables[name] for name in ("params", "batch_stats")}
    step = jax.jit(names["train_step"], static_argnums=0)
    gradient, statistics = step(model, variables, BATCHES)
    check_one_step(statistics["running"], [gradient["scale"], gradient["bias"]])


def test_accumulating_with_equinox() -> None:
    pytest.importorskip("equinox")
    names = run([RECIPES[ACCUMULATING], RECIPES[f"{ACCUMULATING} with Equinox"]])
    model = names["BatchNormOfPasses"](jnp.ones(3), jnp.zeros(3))
    gradient, running = names["train_step"](model, init_running(3), BATCHES)
    check_one_step(running, [gradient.scale, gradient.bias])


def test_accumulating_with_nnx() -> None:
    step = run([RECIPES[f"{ACCUMULATING} with flax nnx"]])["train_step"]
    model = BatchNorm(3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    step(model, optimizer, BATCHES, jnp.zeros_like(BATCHES))
    # Of mean(y²) over all of y: 2·mean(x̂²) / 3 by scale, where x̂ is of each pass.
    xhat = jnp.stack([batch_norm(x)[0] for x in BATCHES])
    expected = 1 - 2 * (xhat**2).mean((0, 1)) / 3
    np.testing.assert_allclose(model.scale[...], expected, **CLOSE)
    whole = BatchNorm(3, rngs=nnx.Rngs(0))
    whole(BATCHES.reshape(-1, 3))
    np.testing.assert_allclose(model.var[...], whole.var[...], **CLOSE)


def test_schedule_of_renormalization() -> None:
    names = run([RECIPES["A schedule for renormalization"]])
    model, limits = names["model"], {}
    for step in (0.0, 5e3, 25e3, 40e3, 1e6):
        names["train_step"](model, step, normal(8, 3))
        limits[step] = [float(getattr(model.renorm, n)[...]) for n in ("rmax", "rmin", "dmax")]
    assert limits[0.0] == limits[5e3] == [1, 1, 0]
    np.testing.assert_allclose(limits[25e3], [1 + 40 / 35, 35 / 75, 5], rtol=1e-6)
    np.testing.assert_allclose([limits[40e3], limits[1e6]], [[3, 1 / 3, 5]] * 2, rtol=1e-6)


def test_crossq() -> None:
    names = run([RECIPES["CrossQ's critic"]])
    rngs = nnx.Rngs(0)
    norm = names["make_norm"](5, rngs)
    critic = nnx.Sequential(norm, nnx.Linear(5, 1, rngs=rngs))
    now, following, reward = normal(8, 5), normal(8, 5, seed=1) + 1, normal(8, 1, seed=2)
    step = nnx.jit(nnx.value_and_grad(names["critic_loss"]))
    value, gradient = step(critic, 0, now, following, reward, 0.9)
    kernel, bias = critic.layers[1].kernel[...], critic.layers[1].bias[...]
    joint = batch_norm(jnp.concatenate([now, following]), epsilon=1e-3)[0] @ kernel + bias
    expected = jnp.mean((joint[:8] - reward - 0.9 * joint[8:]) ** 2)
    np.testing.assert_allclose(value, expected, rtol=1e-5)  # ordinary batch norm until it is warm
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(gradient))
    step(critic, 100_000, now, following, reward, 0.9)
    found = [float(getattr(norm.renorm, n)[...]) for n in ("rmax", "rmin", "dmax")]
    np.testing.assert_allclose(found, [3, 1 / 3, 5], rtol=1e-6)
