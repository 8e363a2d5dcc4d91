"""`debias`: running statistics that forget their start at once (S23)."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.core.running import LONG_RUNNING
from batchnorm.jax import (
    BatchNorm,
    Moments,
    RunningStatistics,
    batch_norm,
    convert_batchnorm,
    init_running,
    load_state,
    update_running,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 3)) * 2 + 5, jnp.float32)
RENORMED = pytest.mark.parametrize("renorm", [False, True])
update = jax.jit(update_running)


def make(**options: Any) -> BatchNorm:
    return BatchNorm(3, **{"debias": True, "rngs": nnx.Rngs(0), **options})


@nnx.jit
def run(layer: Any, x: Any) -> Any:
    return layer(x)


@RENORMED
def test_after_one_step_statistics_are_that_batchs(renorm: bool) -> None:
    layer = make(renorm=renorm)
    run(layer, X[0])
    np.testing.assert_allclose(layer.mean[...], X[0].mean(0), **CLOSE)
    np.testing.assert_allclose(layer.var[...], X[0].var(0), **CLOSE)
    if renorm:
        deviation = jnp.sqrt(X[0].var(0) + 1e-5)
        np.testing.assert_allclose(layer.renorm_mean[...], X[0].mean(0), **CLOSE)
        np.testing.assert_allclose(layer.renorm_stddev[...], deviation, **CLOSE)
        np.testing.assert_allclose(layer.stddev[...], deviation, **CLOSE)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.0, 0.9999), st.integers(1, len(X)))
def test_after_some_steps_they_are_the_average_without_its_start(momentum: float, t: int) -> None:
    """The ordinary average that starts at 0, divided by 1 - decay^t."""
    running, decay = init_running(3, debias=True), jnp.float32(momentum)
    average, momentum = np.zeros(3), float(decay)
    for x in X[:t]:
        moments = Moments(*(jnp.full(3, n) for n in (8.0, 0.0, 1.0)))._replace(mean=x[0])
        running = update(running, moments, momentum=decay)
        average = momentum * average + (1 - momentum) * np.asarray(x[0], np.float64)
    np.testing.assert_allclose(running.mean, average / (1 - momentum**t), rtol=1e-4, atol=1e-4)
    assert (int(running.steps), running.steps.dtype) == (t, jnp.int32)


@RENORMED
def test_functions_do_what_the_layer_does(renorm: bool) -> None:
    layer, running = make(renorm=renorm, momentum=0.9), init_running(3, renorm=renorm, debias=True)
    for x in X:
        run(layer, x)
        running = update(running, batch_norm(x)[1], momentum=jnp.float32(0.9))
    for name, value in running._asdict().items():
        if value is not None:
            np.testing.assert_allclose(getattr(layer, name)[...], value, **CLOSE, err_msg=name)


def test_running_statistics_are_as_before_without_it() -> None:
    mean, var = jnp.zeros(3), jnp.ones(3)
    running = RunningStatistics(mean, var)
    assert running == init_running(3)._replace(mean=mean, var=var)
    assert len(jax.tree.leaves(running)) == 2
    assert update(running, batch_norm(X[0])[1]).steps is None
    assert RunningStatistics(mean, var, var, mean, var)._fields[-1] == "steps"


def test_steps_that_move_nothing_do_not_count() -> None:
    layer = make()
    layer(X[0], mask=jnp.zeros(8, bool))
    layer(jnp.full((8, 3), jnp.nan))
    layer.freeze()(X[0])
    layer.unfreeze().eval()(X[0])
    assert int(layer.steps[...]) == 0
    layer.train()(X[0].at[0, 1].set(jnp.nan))
    assert int(layer.steps[...]) == 1
    assert [float(v) for v in layer.var[...] != 1] == [1, 0, 1]


def test_the_counter_is_part_of_the_statistics() -> None:
    assert not hasattr(make(debias=False), "steps")
    layer = make()
    assert "debias=True" in repr(layer)
    assert isinstance(layer.steps, nnx.BatchStat)
    run(layer, X[0])
    for other in (copy.deepcopy(layer), nnx.clone(layer), nnx.merge(*nnx.split(layer))):
        assert int(other.steps[...]) == 1
    assert nnx.graphdef(layer) == nnx.graphdef(make())
    fresh = make()
    load_state(fresh, nnx.state(layer, nnx.BatchStat))
    assert int(fresh.steps[...]) == 1


@pytest.mark.parametrize("kind", [BatchNorm, nnx.BatchNorm])
def test_a_state_without_the_counter_has_run_for_long(kind: Any) -> None:
    theirs = kind(3, rngs=nnx.Rngs(0))
    theirs(X[0])
    layer, plain = make(), make(debias=False)
    for one in (layer, plain):
        load_state(one, nnx.state(theirs))
    assert int(layer.steps[...]) == LONG_RUNNING
    run(layer, X[1]), run(plain, X[1])
    np.testing.assert_allclose(layer.mean[...], plain.mean[...], rtol=1e-6)


def test_scans_and_stacked_layers_count_for_themselves() -> None:
    layer = make(momentum=0.5)

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def scan(layer: Any, x: Any) -> Any:
        return layer, layer(x)

    scan(layer, X)
    assert int(layer.steps[...]) == len(X)
    keys = jax.random.split(jax.random.key(0), 2)
    layers = nnx.vmap(lambda key: make(rngs=nnx.Rngs(key)))(keys)
    masks = jnp.stack([jnp.ones(8, bool), jnp.zeros(8, bool)])
    nnx.jit(nnx.vmap(lambda layer, mask: layer(X[0], mask=mask)))(layers, masks)
    np.testing.assert_array_equal(layers.steps[...], [1, 0])
    np.testing.assert_allclose(layers.mean[0], X[0].mean(0), **CLOSE)


def test_conversion_counts_from_the_start_or_not_at_all() -> None:
    new = convert_batchnorm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), debias=True)
    assert int(new.steps[...]) == 0
    run(new, X[0])
    np.testing.assert_allclose(new.mean[...], X[0].mean(0), **CLOSE)
    old = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    old(X[0])
    assert int(convert_batchnorm(old, debias=True).steps[...]) == LONG_RUNNING
    keys = jax.random.split(jax.random.key(0), 2)
    stacked = nnx.vmap(lambda key: nnx.BatchNorm(3, rngs=nnx.Rngs(key)))(keys)
    stacked.mean[...] = stacked.mean[...].at[1].set(0.5)
    steps = convert_batchnorm(stacked, debias=True).steps[...]
    np.testing.assert_array_equal(steps, [0, LONG_RUNNING])


def test_a_flag_is_demanded() -> None:
    with pytest.raises(TypeError, match="BatchNorm: debias must be True or False"):
        BatchNorm(3, debias=1)  # type: ignore[arg-type]
