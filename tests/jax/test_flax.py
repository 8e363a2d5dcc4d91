"""A replacement of flax.nnx.BatchNorm: same arguments, results, state and model surgery."""

from __future__ import annotations

import inspect
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from batchnorm.jax import BatchNorm, load_state

CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # flax's variance is E[x²] - E[x]²
AXES = pytest.mark.parametrize("axis", [-1, 1, 2, (1, 3)], ids=str)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def pair(features: Any = 3, **options: Any) -> tuple[Any, Any]:
    options = {"momentum": 0.8, "epsilon": 1e-3} | options
    return tuple(kind(features, rngs=nnx.Rngs(0), **options) for kind in (BatchNorm, nnx.BatchNorm))


def test_every_argument_of_flax_is_one_of_ours_with_its_default() -> None:
    ours, flaxs = (inspect.signature(k.__init__).parameters for k in (BatchNorm, nnx.BatchNorm))
    assert set(flaxs) <= set(ours)
    for name in set(flaxs) - {"self", "num_features", "rngs", "promote_dtype"}:
        assert name.endswith("_init") or ours[name].default == flaxs[name].default, name


@pytest.mark.sample(3)
@AXES
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_state_equal_those_of_nnx(axis: Any, masked: bool) -> None:
    x = normal(6, 4, 5, 3)
    axes = (axis,) if isinstance(axis, int) else axis
    sizes = tuple(x.shape[a] for a in axes)
    mask = None
    if masked:
        mask_shape = [1 if a in {b % 4 for b in axes} else n for a, n in enumerate(x.shape)]
        mask = np.random.default_rng(1).random(mask_shape) < 0.6
    ours = BatchNorm(sizes if len(sizes) > 1 else sizes[0], axis=axis, rngs=nnx.Rngs(0))
    # nnx makes parameters for one axis only: with several, linen is the second opinion.
    if len(sizes) > 1:
        theirs = flax.linen.BatchNorm(use_running_average=False, axis=axis, momentum=0.99)
        variables = theirs.init(jax.random.key(0), x)
        expected, moved = theirs.apply(variables, x, mask=mask, mutable=["batch_stats"])
        mean = moved["batch_stats"]["mean"]
        np.testing.assert_allclose(ours(x, mask=mask), expected, **CLOSE)
        np.testing.assert_allclose(ours.mean[...], mean, **CLOSE)
        return
    flaxs = nnx.BatchNorm(sizes[0], axis=axis, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(ours(x, mask=mask), flaxs(x, mask=mask), **CLOSE)
    for name in ("mean", "var"):
        np.testing.assert_allclose(getattr(ours, name)[...], getattr(flaxs, name)[...], **CLOSE)
    np.testing.assert_allclose(
        ours(x, use_running_average=True), flaxs(x, use_running_average=True), **CLOSE
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False},
        {"use_scale": False},
        {"scale_init": jax.nn.initializers.normal(1.0)},
        {"bias_init": jax.nn.initializers.ones},
        {"use_running_average": True},
        {"use_fast_variance": False},
        {"param_dtype": jnp.bfloat16},
        {"dtype": jnp.float32},
        {"momentum": 0.0},
    ],
    ids=lambda options: "-".join(options) or "none",
)
def test_options_mean_what_they_mean_in_flax(options: Any) -> None:
    ours, flaxs = pair(**options)
    x, dy = normal(8, 5, 3), normal(8, 5, 3, seed=1)
    with jax.numpy_dtype_promotion("standard"):  # flax mixes types
        results = [
            nnx.value_and_grad(lambda layer: jnp.vdot(layer(x), dy))(layer)
            for layer in (ours, flaxs)
        ]
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    for name in ("scale", "bias"):
        if getattr(flaxs, name) is None:
            assert getattr(ours, name) is None
            continue
        a, b = (np.asarray(r[1][name][...], np.float32) for r in results)
        bound = 1e-4 if ours.param_dtype == jnp.float32 else 2.0**-7 * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=bound)
        assert getattr(ours, name)[...].dtype == getattr(flaxs, name)[...].dtype
    for name in ("mean", "var"):
        np.testing.assert_allclose(getattr(ours, name)[...], getattr(flaxs, name)[...], **CLOSE)


def test_metadata_reaches_the_parameters() -> None:
    ours, flaxs = pair(scale_metadata={"origin": "here"}, bias_metadata={"origin": "there"})
    for layer in (ours, flaxs):
        assert layer.scale.get_metadata("origin") == "here"
        assert layer.bias.get_metadata("origin") == "there"


def test_promote_dtype_is_asked() -> None:
    calls = []

    def promote(arrays: Any, *, dtype: Any) -> Any:
        calls.append(dtype)
        return tuple(None if a is None else a.astype(jnp.float32) for a in arrays)

    y = BatchNorm(3, promote_dtype=promote, rngs=nnx.Rngs(0))(normal(8, 3).astype(jnp.bfloat16))
    assert y.dtype == jnp.float32
    assert calls == [None]


@pytest.mark.parametrize("load", [nnx.update, load_state], ids=["update", "load_state"])
@pytest.mark.parametrize("assigned", [False, True], ids=["constructor", "assigned"])
def test_a_state_saved_from_flax_loads(load: Any, assigned: bool) -> None:
    ours, flaxs = pair(momentum=0.7 if assigned else 0.6)
    flaxs(normal(8, 3) * 2 + 1)
    flaxs.scale[...] = normal(3, seed=2)
    if assigned:
        ours.momentum = 0.6
    load(ours, nnx.state(flaxs))
    x = normal(8, 3, seed=3)
    np.testing.assert_allclose(
        ours(x, use_running_average=True), flaxs(x, use_running_average=True), **CLOSE
    )
    assert float(ours.momentum[...]) == pytest.approx(0.6)


def test_a_flax_state_brings_renormalization_its_statistics() -> None:
    _, flaxs = pair()
    flaxs(normal(8, 3) * 2 + 1)
    ours = BatchNorm(3, epsilon=1e-3, renorm=True, rngs=nnx.Rngs(0))
    load_state(ours, nnx.state(flaxs))
    deviation = np.sqrt(np.asarray(flaxs.var[...]) + 1e-3)
    np.testing.assert_allclose(ours.stddev[...], deviation, rtol=1e-6)
    np.testing.assert_allclose(ours.renorm_stddev[...], deviation, rtol=1e-6)
    np.testing.assert_array_equal(ours.renorm_mean[...], flaxs.mean[...])


class Block(nnx.Module):
    def __init__(self, kind: Any, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.norm = kind(3, momentum=0.5, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.head(nnx.relu(self.norm(self.linear(x))))


def test_a_whole_model_changes_mode_splits_and_merges() -> None:
    model = Block(BatchNorm, nnx.Rngs(0))
    x = normal(8, 4)
    model.eval()
    assert not model.norm.training
    model.train()
    assert model.norm.training
    viewed = nnx.view(model, use_running_average=True)
    assert viewed.norm.use_running_average
    assert not model.norm.use_running_average
    viewed(x)
    np.testing.assert_array_equal(model.norm.mean[...], np.zeros(3))
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    merged = nnx.merge(graph, parameters, rest)
    np.testing.assert_array_equal(merged(x), model(x))


def test_a_model_trains_as_with_flax() -> None:
    x, target = normal(32, 4), normal(32, 1, seed=1)

    def train(kind: Any) -> list[float]:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            return losses(kind)

    def losses(kind: Any) -> list[float]:
        model = Block(kind, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

        @nnx.jit
        def step(model: Block, optimizer: Any) -> Any:
            def loss(model: Block) -> Any:
                return jnp.mean(jnp.square(model(x) - target))

            value, gradients = nnx.value_and_grad(loss)(model)
            optimizer.update(model, gradients)
            return value

        return [float(step(model, optimizer)) for _ in range(10)]

    ours = train(BatchNorm)
    assert ours[-1] < ours[0]
    np.testing.assert_allclose(ours, train(nnx.BatchNorm), rtol=1e-3)
