"""The nnx layer as a pytree: lazily sized, with its own flags and an adjustable momentum."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from batchnorm.jax import BatchNorm, Momentum, RenormLimit

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums of a few dozen terms


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def make(**options: Any) -> BatchNorm:
    return BatchNorm(3, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("source", [0, jax.random.key(0), nnx.Rngs(0), nnx.Rngs(params=3)])
def test_init_learns_the_size_from_an_input(source: Any) -> None:
    layer = BatchNorm()
    assert not layer.initialized
    assert layer.init(source, normal(8, 5)) is layer
    assert layer.initialized
    assert layer.num_features == 5
    np.testing.assert_array_equal(layer.mean[...], np.zeros(5))
    np.testing.assert_array_equal(layer.var[...], np.ones(5))
    np.testing.assert_array_equal(layer.scale[...], np.ones(5))


def test_init_needs_no_input_where_the_size_is_known() -> None:
    assert BatchNorm(4).init(0).scale[...].shape == (4,)
    assert BatchNorm(features_in=4).init(0).scale[...].shape == (4,)
    with pytest.raises(ValueError, match="init needs x to learn the number of features"):
        BatchNorm().init(0)
    with pytest.raises(ValueError, match="features_in is an alias"):
        BatchNorm(4, features_in=4)


def test_init_moves_statistics_only_when_asked() -> None:
    x = normal(8, 3)
    layer = BatchNorm(momentum=0.5).init(0, x, use_running_average=False)
    np.testing.assert_allclose(layer.mean[...], 0.5 * x.mean(axis=0), **CLOSE)


def test_random_initializers_follow_the_key() -> None:
    options: Any = {"scale_init": jax.nn.initializers.normal()}
    scales = [np.asarray(BatchNorm(3, **options).init(key).scale[...]) for key in (0, 0, 1)]
    np.testing.assert_array_equal(scales[0], scales[1])
    assert (scales[0] != scales[2]).any()


def test_calls_chain() -> None:
    layer = BatchNorm()
    assert layer.init(0, normal(8, 3)).eval().train().freeze().unfreeze() is layer


def test_a_first_eager_call_in_training_is_an_ordinary_step() -> None:
    x = normal(8, 3)
    lazy, ready = BatchNorm(momentum=0.5), make(momentum=0.5)
    np.testing.assert_array_equal(lazy(x), ready(x))
    np.testing.assert_array_equal(lazy.mean[...], ready.mean[...])


def test_an_uninitialized_layer_refuses_evaluation_and_traces() -> None:
    x = normal(8, 3)
    with pytest.raises(ValueError, match=r"not initialized, which evaluation.*layer\.init"):
        BatchNorm().eval()(x)
    with pytest.raises(ValueError, match="not initialized, which evaluation"):
        BatchNorm()(x, use_running_average=True)
    layer = BatchNorm()
    with pytest.raises(ValueError, match=r"not initialized, which a trace.*layer\.init"):
        jax.jit(lambda x: layer(x))(x)
    assert not layer.initialized


@pytest.mark.parametrize(
    ("options", "leaves"),
    [
        ({}, 5),
        ({"use_bias": False}, 4),
        ({"use_scale": False}, 4),
        ({"use_bias": False, "use_scale": False}, 3),
        ({"renorm": True}, 11),
        ({"debias": True}, 6),
    ],
)
def test_number_of_leaves(options: Any, leaves: int) -> None:
    layer = make(**options)
    assert len(jax.tree.leaves(layer)) == leaves
    limits = len(jax.tree.leaves(nnx.state(layer, RenormLimit)))
    assert limits == (3 if "renorm" in options else 0)
    parameters = 2 - sum(v is False for v in options.values())
    assert len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == parameters
    statistics = leaves - parameters - limits - 1
    assert len(jax.tree.leaves(nnx.state(layer, nnx.BatchStat))) == statistics
    assert len(jax.tree.leaves(nnx.state(layer, Momentum))) == 1
    assert len(jax.tree.leaves(BatchNorm(3, **options))) == 1 + limits  # the momentum, and these


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"use_bias": False}], ids=str)
def test_layers_that_differ_in_momentum_are_one_kind_of_tree(options: Any) -> None:
    one, other = make(momentum=0.9, **options), make(momentum=0.5, **options)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert nnx.graphdef(one) == nnx.graphdef(other)
    lazy = BatchNorm(momentum=0.9, **options), BatchNorm(momentum=0.5, **options)
    assert jax.tree.structure(lazy[0]) == jax.tree.structure(lazy[1])
    middle = jax.tree.map(lambda a, b: (a + b) / 2, one, other)
    assert float(middle.momentum[...]) == pytest.approx(0.7)
    states = [nnx.split(layer)[1] for layer in (one, other)]
    state = jax.tree.map(lambda a, b: jnp.maximum(a, b), *states)
    assert float(state["momentum"][...]) == pytest.approx(0.9)
    traces = []

    @jax.jit
    def step(layer: BatchNorm, x: Any) -> BatchNorm:
        traces.append(None)
        layer(x)
        return layer

    x = normal(8, 3)
    for layer, momentum in ((one, 0.9), (other, 0.5)):
        mean = step(layer, x).mean[...]
        np.testing.assert_allclose(mean, (1 - momentum) * x.mean(axis=0), **CLOSE)
    assert len(traces) == 1


def test_a_momentum_set_before_init_is_kept() -> None:
    layer = BatchNorm(momentum=0.9)
    layer.momentum = 0.5
    assert isinstance(layer.momentum, Momentum)
    assert float(layer.init(0, normal(8, 3)).momentum[...]) == 0.5
    layer(normal(8, 3))
    assert float(layer.init(0).momentum[...]) == 0.5


def test_a_module_goes_in_and_out_of_jit() -> None:
    x = normal(8, 3)
    traces = []

    @jax.jit
    def step(layer: BatchNorm, x: Any) -> Any:
        traces.append(None)
        y = layer(x)
        return layer, y

    layer, reference = make(momentum=0.5), make(momentum=0.5)
    for momentum in (0.5, 0.5, 0.9, 0.0):
        layer.momentum = reference.momentum = momentum
        layer, y = step(layer, x)
        np.testing.assert_allclose(y, reference(x), **CLOSE)
        np.testing.assert_allclose(layer.mean[...], reference.mean[...], **CLOSE)
    assert len(traces) == 1
    np.testing.assert_allclose(layer.mean[...], x.mean(axis=0), **CLOSE)
    step(layer.eval(), x)
    assert len(traces) == 2  # flags are static
    m, y = jax.jit(lambda m, x: (m, m(x)))(layer, x)
    assert len(jax.tree.leaves(m)) == 5
    assert y.shape == x.shape


def test_flags_are_independent() -> None:
    x = normal(8, 3)
    layer = make(momentum=0.5).freeze()
    for mode in (layer.train, layer.eval, layer.train):
        mode()
        assert layer.frozen
        assert layer.use_running_average
        layer(x)
        np.testing.assert_array_equal(layer.mean[...], np.zeros(3))
    layer(x, use_running_average=False)  # an explicit value wins
    np.testing.assert_allclose(layer.mean[...], 0.5 * x.mean(axis=0), **CLOSE)
    moved = np.asarray(layer.mean[...])
    layer.unfreeze()(x, use_running_average=True)
    np.testing.assert_array_equal(layer.mean[...], moved)
    assert not layer.use_running_average


def test_frozen_statistics_leave_gradients_alone() -> None:
    layer = make().freeze()
    x, dy = normal(8, 3), normal(8, 3, seed=1)
    found = nnx.grad(lambda layer, x: jnp.vdot(layer(x), dy), argnums=(0, 1))(layer, x)
    rstd = 1 / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(found[1], dy * rstd, **CLOSE)
    np.testing.assert_allclose(found[0]["scale"][...], (dy * x).sum(axis=0) * rstd, **CLOSE)
    np.testing.assert_allclose(found[0]["bias"][...], dy.sum(axis=0), **CLOSE)


def test_parameters_train_and_statistics_move_apart() -> None:
    layer = make(momentum=0.5)
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
    x, dy = normal(8, 3), normal(8, 3, seed=1)

    @nnx.jit
    def step(layer: BatchNorm, optimizer: Any, x: Any) -> Any:
        loss, gradients = nnx.value_and_grad(lambda layer: jnp.vdot(layer(x), dy))(layer)
        optimizer.update(layer, gradients)
        return loss, gradients

    loss, gradients = step(layer, optimizer, x)
    assert len(jax.tree.leaves(gradients)) == 2
    np.testing.assert_allclose(layer.bias[...], -0.1 * dy.sum(axis=0), **CLOSE)
    np.testing.assert_allclose(layer.mean[...], 0.5 * x.mean(axis=0), **CLOSE)
    assert step(layer, optimizer, x)[0] < loss
    assert float(layer.momentum[...]) == 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("asked", [None, "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("training", [True, False])
def test_output_dtype(dtype: str, asked: str | None, training: bool) -> None:
    layer = make(dtype=asked).train(training)
    x = normal(8, 3).astype(dtype)
    y = layer(x)
    assert y.dtype == (asked or dtype)
    assert layer.mean[...].dtype == layer.var[...].dtype == jnp.float32
    exact = make().train(training)(x.astype(jnp.float32))
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=1e-2, atol=1e-6)


def test_a_float64_input_without_x64_is_float32() -> None:
    x = np.random.default_rng(0).normal(size=(8, 3))
    y = make()(x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, make()(x.astype(np.float32)))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("fused", [None, False])
def test_x64_keeps_float64(param_dtype: Any, fused: bool | None) -> None:
    with jax.enable_x64(True):
        x = 1e6 + np.random.default_rng(0).normal(size=(64, 3))
        layer = make(param_dtype=param_dtype, fused=fused, momentum=0.0)
        y = layer(x)
        assert y.dtype == jnp.float64
        assert layer.mean[...].dtype == param_dtype
        expected = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
        np.testing.assert_allclose(y, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("axis", [(1, 2), (2, 1), (-1, 1)])
def test_several_axes(axis: Any) -> None:
    x = normal(8, 4, 3)
    layer = BatchNorm((4, 3), axis=axis, rngs=nnx.Rngs(0))
    expected = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    np.testing.assert_allclose(layer(x), expected, **CLOSE)


def test_a_wrong_number_of_features_is_named() -> None:
    layer = make()
    with pytest.raises(ValueError, match=r"x must have num_features=3 along axis -1; got 4"):
        layer(normal(8, 4))
    with pytest.raises(ValueError, match="num_features must have one size for each channel axis"):
        BatchNorm(3, axis=(1, 2))
    with pytest.raises(TypeError, match="num_features must be an int"):
        BatchNorm(2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, nnx.clone, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_copies_are_whole_and_apart(duplicate: Any) -> None:
    layer = make(momentum=0.7, renorm=True, renorm_clipping={"rmax": 2.0}).freeze()
    other = duplicate(layer)
    assert other.frozen
    assert float(other.momentum[...]) == pytest.approx(0.7)
    other.unfreeze()(normal(8, 3))
    np.testing.assert_array_equal(layer.mean[...], np.zeros(3))
    assert (other.mean[...] != 0).all()
