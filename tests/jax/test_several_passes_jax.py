"""`accumulate_statistics`: the passes of an nnx model in a block are one step (S21)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from batchnorm.jax import BatchNorm, accumulate_statistics

CLOSE = {"rtol": 5e-6, "atol": 1e-6}
PASSES, ROWS = 3, 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(PASSES, ROWS, 4)) + 3, jnp.float32)
MASK = jnp.asarray(np.random.default_rng(1).random((PASSES, ROWS)) < 0.6)
FIELDS = ("mean", "var", "stddev", "renorm_mean", "renorm_stddev", "steps")


def make(**options: Any) -> BatchNorm:
    return BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0), **options)


def state_of(layer: Any) -> dict[str, Any]:
    return {f: getattr(layer, f)[...] for f in FIELDS if hasattr(layer, f)}


def assert_same(found: Any, expected: Any, **tolerance: float) -> None:
    assert state_of(found).keys() == state_of(expected).keys()
    for name, value in state_of(expected).items():
        np.testing.assert_allclose(
            getattr(found, name)[...], value, **(tolerance or CLOSE), err_msg=name
        )


@nnx.jit
def run(model: Any, x: Any, mask: Any) -> Any:
    return model(x, mask=mask)


def in_a_loop(layer: Any) -> Any:
    with accumulate_statistics(layer):
        return jnp.stack([layer(x, mask=mask) for x, mask in zip(X, MASK, strict=True)])


def around_compiled_steps(layer: Any) -> Any:
    with accumulate_statistics(layer):
        return jnp.stack([run(layer, x, mask) for x, mask in zip(X, MASK, strict=True)])


@nnx.jit
def in_a_compiled_step(layer: Any) -> Any:
    return in_a_loop(layer)


@nnx.jit
def around_a_scan(layer: Any) -> Any:
    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
    def scan(layer: Any, x: Any, mask: Any) -> Any:
        return layer, layer(x, mask=mask)

    with accumulate_statistics(layer):
        _, y = scan(layer, X, MASK)
    return y


@nnx.jit
def with_gradients(layer: Any) -> Any:
    @nnx.remat
    def loss(layer: Any, x: Any, mask: Any) -> Any:
        y = layer(x, mask=mask)
        return jnp.sum(y**3), y

    found = []
    with accumulate_statistics(layer):
        for x, mask in zip(X, MASK, strict=True):
            found.append(nnx.value_and_grad(loss, has_aux=True)(layer, x, mask)[0][1])
    return jnp.stack(found)


WAYS = [in_a_loop, around_compiled_steps, in_a_compiled_step, around_a_scan, with_gradients]


RICH = {"renorm": True, "debias": True}


@pytest.mark.parametrize(
    ("way", "options"),
    [(in_a_compiled_step, {}), *((way, RICH) for way in WAYS)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_passes_move_statistics_once_as_one_batch(
    way: Callable[[Any], Any], options: dict[str, Any]
) -> None:
    layer, whole = make(**options), make(**options)
    for one in (layer, whole):
        one(X[0] - 1)  # renormalization compares with something
    alone = [nnx.clone(layer)(x, mask=mask) for x, mask in zip(X, MASK, strict=True)]
    y = way(layer)
    whole(X.reshape(-1, 4), mask=MASK.reshape(-1))
    assert_same(layer, whole)
    # Every pass is normalized, and renormalized, as if it had been the first.
    np.testing.assert_allclose(y, jnp.stack(alone), rtol=1e-5, atol=1e-5)
    assert nnx.graphdef(layer) == nnx.graphdef(whole)


def test_offsets_cost_no_digits() -> None:
    layer, x = make(), X + 1e6
    with accumulate_statistics(layer):
        for part in x:
            layer(part)
    rows = np.asarray(x, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(layer.var[...], 0.5 + 0.5 * rows.var(0), rtol=5e-6)


def test_stacked_layers_move_once_each() -> None:
    sizes = (2, 3)

    def build(key: Any) -> Any:
        return BatchNorm(4, momentum=0.5, debias=True, rngs=nnx.Rngs(key))

    def step(layer: Any, x: Any) -> Any:
        return layer(x)

    for _ in sizes:
        build, step = nnx.vmap(build), nnx.vmap(step, in_axes=(0, None))
    keys = jax.random.split(jax.random.key(0), sizes)
    layers, step = nnx.jit(build)(keys), nnx.jit(step)
    once = nnx.clone(layers)
    with accumulate_statistics(layers):
        for x in X[:2]:
            step(layers, x)
    step(once, X[:2].reshape(-1, 4))
    assert_same(layers, once)
    np.testing.assert_array_equal(layers.steps[...], np.ones(sizes))


def test_ghost_batches_are_averaged_over_all_passes() -> None:
    layer, whole = make(virtual_batch_size=4), make(virtual_batch_size=4)
    with accumulate_statistics(layer):
        for x in X:
            layer(x)
    # Groups of the whole batch are other rows: sample i is in group i mod 6.
    order = np.arange(PASSES * ROWS).reshape(6, 4)
    order = order.reshape(PASSES, 4, 2).transpose(0, 2, 1).reshape(6, 4).T.reshape(-1)
    whole(X.reshape(-1, 4)[order])
    assert_same(layer, whole)


def test_named_axes_merge_each_pass() -> None:
    layer, whole = make(axis_name="device"), make()
    step = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), axis_name="device")
    step = nnx.jit(step)
    with accumulate_statistics(layer):
        step(layer, X[:, :4])
        step(layer, X[:, 4:])
    whole(X.reshape(-1, 4))
    assert_same(layer, whole)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_moves_where_nothing_counts(fails: bool) -> None:
    layer, before = make(debias=True), make(debias=True)
    graph = nnx.graphdef(layer)
    frozen = make().freeze()
    model = nnx.List([layer, frozen])
    try:
        with accumulate_statistics(nnx.Sequential(*model)):
            frozen(X[0])
            layer(X[0], mask=jnp.zeros(ROWS, bool))
            layer(X[0], update_statistics=False)
            layer(X[0], use_running_average=True)
            if fails:
                layer(X[0])
                raise KeyError
    except KeyError:
        pass
    assert_same(layer, before, rtol=0, atol=0)
    assert_same(frozen, make(), rtol=0, atol=0)
    assert nnx.graphdef(layer) == graph
    layer(X[0])
    assert int(layer.steps[...]) == 1


def test_a_loop_of_blocks_compiles_one_step() -> None:
    traces = []

    @nnx.jit
    def step(layer: Any, x: Any) -> Any:
        traces.append(None)
        return layer(x)

    layer = make()
    for _ in range(3):
        with accumulate_statistics(layer):
            for x in X:
                step(layer, x)
    assert len(traces) == 1


def nested() -> None:
    layer = make()
    with accumulate_statistics(layer), accumulate_statistics(layer):
        pass


def stacked_elsewhere() -> Any:
    layer = make()
    layer.mean = nnx.BatchStat(jnp.zeros((4, 2)))
    return layer


def enter(model: Any) -> None:
    with accumulate_statistics(model):
        pass


WRONG: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "no module": (TypeError, "model must be a flax.nnx.Module; got int", lambda: enter(3)),
    "none": (
        ValueError,
        "must hold a batchnorm.jax.BatchNorm; got none",
        lambda: enter(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
    ),
    "uninitialized": (
        ValueError,
        "must be initialized; layers.0 is not",
        lambda: enter(nnx.Sequential(BatchNorm(3))),
    ),
    "nested": (RuntimeError, "cannot be nested; the model accumulates already", nested),
    "stacked": (
        ValueError,
        "stacked along leading axes; the model has num_features=4",
        lambda: enter(stacked_elsewhere()),
    ),
}


@pytest.mark.parametrize(("kind", "message", "call"), WRONG.values(), ids=WRONG)
def test_what_cannot_accumulate_is_refused(
    kind: type[Exception], message: str, call: Callable[[], Any]
) -> None:
    with pytest.raises(kind, match=f"^accumulate_statistics: .*{message}"):
        call()


def test_layers_of_flax_in_the_model_are_named() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(BatchNorm(2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
    match = r"1 of flax's own layers \(layers\.1\) move in each pass"
    with pytest.warns(UserWarning, match=match), accumulate_statistics(model):
        model(jnp.ones((4, 2)))
