"""flax's tools for modules work on our layer as on flax's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from batchnorm.jax import BatchNorm, Momentum

CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # flax's variance is E[x²] - E[x]²
X, DY = (np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32) for seed in range(2))
Layer = Any


def make(kind: Any = BatchNorm, rngs: Any = 0) -> Layer:
    return kind(3, momentum=0.5, rngs=nnx.Rngs(rngs))


def several(kind: Any) -> Layer:
    """Two layers in one, along a leading axis of every array."""
    return nnx.vmap(lambda key: make(kind, key))(jax.random.split(jax.random.key(0), 2))


def call(layer: Layer, x: Any) -> Any:
    return layer(x)


def evaluate(layer: Layer, x: Any) -> Any:
    return layer(x, use_running_average=True)


def loss(layer: Layer, x: Any) -> Any:
    return jnp.vdot(layer(x), DY)


def through_capture(layer: Layer) -> Any:
    return nnx.capture(call, nnx.Intermediate)(layer, X)[0]


def through_shard_map(layer: Layer) -> Any:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (jax.P(), jax.P("d")), "out_specs": jax.P("d")}
    return nnx.shard_map(evaluate, mesh=mesh, **specs)(layer, X)


def through_while(layer: Layer) -> Any:
    def body(carry: Any) -> Any:
        step, layer, x = carry
        return step + 1, layer, layer(x)

    return nnx.while_loop(lambda carry: carry[0] < 2, body, (jnp.int32(0), layer, X))[2]


def through_pure_dict(layer: Layer) -> Any:
    graph, state = nnx.split(layer)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(state))
    return nnx.merge(graph, state)(X)


def through_linen(layer: Layer) -> Any:
    module = nnx.bridge.to_linen(type(layer), 3, momentum=0.5)
    return module.init_with_output(jax.random.key(0), jnp.asarray(X))[0]


def through_custom_vjp(layer: Layer) -> Any:
    twice = nnx.custom_vjp(call)
    twice.defvjp(lambda layer, x: (layer(x), ()), lambda _, g: (g[0], 2.0 * g[1]))
    return twice(layer, X)


GRAPH, TREE = {"graph_updates": False}, {"graph": False}
# Each gives y, or another value to compare; the layer's statistics are compared afterwards.
WAYS: dict[str, Callable[[Layer], Any]] = {
    "jit": lambda layer: nnx.jit(call)(layer, X),
    "jit, tree": lambda layer: nnx.jit(evaluate, **TREE)(layer, X),
    "jit_partial": lambda layer: nnx.jit_partial(evaluate, layer, **GRAPH)(X),
    "lowered": lambda layer: nnx.jit(call).lower(layer, X).compile()(layer, X),
    "cached_partial": lambda layer: nnx.cached_partial(nnx.jit(call), layer)(X),
    "grad": lambda layer: nnx.grad(loss)(layer, X),
    "grad of x": lambda layer: nnx.grad(loss, argnums=1)(layer, X),
    "value_and_grad": lambda layer: nnx.value_and_grad(loss)(layer, X)[1],
    "vjp": lambda layer: nnx.vjp(evaluate, layer, X, **GRAPH)[1](DY)[1],
    "jvp": lambda layer: nnx.jvp(lambda x: evaluate(layer, x), (X,), (DY,), **GRAPH)[1],
    "custom_vjp": through_custom_vjp,
    "remat": lambda layer: nnx.grad(lambda a, x: jnp.vdot(nnx.remat(call)(a, x), DY))(layer, X),
    "cond": lambda layer: nnx.cond(True, call, evaluate, layer, X),
    "switch": lambda layer: nnx.switch(1, [evaluate, call], layer, X),
    "while_loop": through_while,
    "fori_loop": lambda layer: nnx.fori_loop(0, 2, lambda _, c: (c[0], c[0](c[1])), (layer, X))[1],
    "scan": lambda layer: nnx.scan(
        lambda a, x: (a, a(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
    )(layer, np.stack([X, DY]))[1],
    "scan over layers": lambda layer: nnx.scan(
        lambda x, a: a(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
    )(X, several(type(layer))),
    "vmap": lambda layer: nnx.vmap(evaluate, in_axes=(None, 0))(layer, np.stack([X, DY])),
    "vmap over layers": lambda layer: nnx.vmap(call, in_axes=(0, None))(several(type(layer)), X),
    "pmap": lambda layer: nnx.pmap(evaluate, in_axes=(None, 0))(layer, X[None]),
    "shard_map": through_shard_map,
    "checkify": lambda layer: nnx.checkify(call)(layer, X)[1],
    "eval_shape": lambda layer: np.zeros(nnx.eval_shape(call, layer, X).shape),
    "capture": through_capture,
    "call": lambda layer: nnx.call(nnx.split(layer))(X)[0],
    "clone": lambda layer: nnx.clone(layer)(X),
    "split and merge": lambda layer: nnx.merge(*nnx.split(layer, nnx.Param, ...))(X),
    "flatten": lambda layer: nnx.unflatten(*nnx.flatten(layer))(X),
    "to_tree": lambda layer: nnx.from_tree(nnx.to_tree(layer))(X),
    "pure dict": through_pure_dict,
    "recursive_map": lambda layer: nnx.recursive_map(lambda _, node: node, layer)(X),
    "tree.map": lambda layer: jax.tree.map(lambda a: a, layer)(X),
    "view": lambda layer: nnx.view(layer, use_running_average=True)(X),
    "set_attributes": lambda layer: (layer.set_attributes(use_running_average=True), layer(X))[1],
    "Sequential": lambda layer: nnx.Sequential(layer, nnx.relu)(X),
    "to_linen": through_linen,
    "parameters": lambda layer: nnx.state(layer, nnx.Param),
    "statistics": lambda layer: nnx.state(layer, nnx.BatchStat),
    "filter_state": lambda layer: nnx.filter_state(nnx.state(layer), nnx.BatchStat),
    "map_state": lambda layer: nnx.map_state(
        lambda _, a: a, nnx.filter_state(nnx.state(layer), nnx.BatchStat)
    ),
    "partition spec": lambda layer: jax.tree.map(
        len, nnx.get_partition_spec(nnx.state(layer, nnx.Param)), is_leaf=_is_spec
    ),
}


def _is_spec(a: Any) -> bool:
    return isinstance(a, jax.P)


@pytest.mark.sample(2)
@pytest.mark.parametrize("way", WAYS)
def test_a_way_to_a_layer_gives_what_it_gives_with_flaxs(way: str) -> None:
    ours, flaxs = make(), make(nnx.BatchNorm)
    with jax.numpy_dtype_promotion("standard"):  # flax mixes types
        found, expected = WAYS[way](ours), WAYS[way](flaxs)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, **CLOSE)
    for name in ("mean", "var"):
        np.testing.assert_allclose(getattr(ours, name)[...], getattr(flaxs, name)[...], **CLOSE)


def test_view_info_describes_the_argument() -> None:
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), make())
    for module in (make(), BatchNorm(), model):
        name, argument, *text = nnx.view_info(module).splitlines()
        assert name == "BatchNorm:"
        assert argument == "  use_running_average: bool | None = None"
        assert text[0].startswith("    use the running statistics")
        assert len(text) == 1


@pytest.mark.parametrize("layer", [make(), BatchNorm()], ids=["initialized", "lazy"])
def test_display_and_repr_show_the_variables(layer: Any, capsys: Any) -> None:
    nnx.display(layer)
    for text in (capsys.readouterr().out, repr(layer), str(layer)):
        assert "BatchNorm(" in text
        assert "momentum=Momentum(" in text


@pytest.mark.parametrize("costs", [{}, {"compute_flops": True, "compute_vjp_flops": True}])
def test_tabulate_counts_what_a_layer_holds(costs: Any) -> None:
    table = nnx.tabulate(make(), X, console_kwargs={"width": 250}, **costs)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", table)
    for held in ("float32[8,3]", "momentum: float32[]", "Total Parameters: 13 (52 B)"):
        assert held in plain


def test_abstract_layers_have_the_shapes_of_real_ones() -> None:
    layer = nnx.eval_shape(make)
    for abstract in (nnx.state(layer), nnx.state(nnx.as_abstract(make()))):
        same = jax.tree.map(lambda a, b: a.shape == b.shape, abstract, nnx.state(make()))
        assert all(jax.tree.leaves(same))
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    graph, state = nnx.get_abstract_model(make, mesh)
    assert graph == nnx.graphdef(make())
    assert len(jax.tree.leaves(state)) == 5


def test_a_layer_is_a_sound_tree() -> None:
    for layer in (make(), BatchNorm()):
        nnx.check_pytree(layer)
        assert nnx.find_duplicates(layer) == []
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(layer)]
        assert paths == sorted(paths)
    assert [type(m) for _, m in nnx.iter_modules(make())] == [BatchNorm]
    pure = nnx.as_pure(make())
    assert isinstance(pure.mean, jax.Array)
    jaxpr = nnx.make_jaxpr(evaluate, **GRAPH)(make(), X)
    assert "sqrt" in str(jaxpr)


def test_variables_take_metadata_and_leave() -> None:
    layer = make()
    nnx.set_metadata(layer, origin="here", only=Momentum)
    assert layer.momentum.get_metadata("origin") == "here"
    layer.seen = nnx.Intermediate(jnp.asarray(X))
    assert len(jax.tree.leaves(nnx.pop(layer, nnx.Intermediate))) == 1
    layer(X)
    assert len(jax.tree.leaves(nnx.state(layer))) == 5


def test_optimizers_take_the_parameters_alone() -> None:
    layers = make(), make(nnx.BatchNorm)
    for layer in layers:
        optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            optimizer.update(layer, nnx.grad(loss)(layer, X))
    for name in ("scale", "bias"):
        np.testing.assert_allclose(*(getattr(a, name)[...] for a in layers), **CLOSE)
    assert float(layers[0].momentum[...]) == 0.5
