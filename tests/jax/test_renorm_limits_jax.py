"""Limits of renormalization are data: a schedule changes them and compiles once (S11)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from batchnorm import explain
from batchnorm.jax import BatchNorm, RenormLimit, RenormStatistics, batch_norm
from batchnorm.kernels import extension

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)) * 4 + 3, jnp.float32)
STATISTICS = RenormStatistics(jnp.ones(3), jnp.full(3, 2.0))
CLIPPING = {"rmax": 1.5, "rmin": 0.5, "dmax": 0.25}
KERNELS = pytest.mark.skipif(
    extension.missing_reason() is not None, reason=f"no kernels: {extension.missing_reason()}"
)


def make(**clipping: float) -> BatchNorm:
    given = {"renorm_clipping": clipping} if clipping else {}
    return BatchNorm(3, renorm=True, rngs=nnx.Rngs(0), **given)  # type: ignore[arg-type]


def limits_of(layer: BatchNorm) -> dict[str, float]:
    assert layer.renorm is not None
    return {name: float(getattr(layer.renorm, name)[...]) for name in ("rmin", "rmax", "dmax")}


def test_limits_set_later_are_those_of_the_constructor() -> None:
    late, early = make(), make(**CLIPPING)
    assert late.set_renorm_clipping(**CLIPPING) is late
    np.testing.assert_array_equal(late(X), early(X))
    assert (late(X) != make()(X)).any()
    assert limits_of(late) == CLIPPING
    assert nnx.graphdef(late) == nnx.graphdef(early) == nnx.graphdef(make())
    assert "rmax=RenormLimit(" in repr(late)
    assert limits_of(copy.deepcopy(late)) == limits_of(nnx.clone(late)) == CLIPPING


def test_none_leaves_a_limit_and_infinity_lifts_it() -> None:
    layer = make(**CLIPPING)
    layer.set_renorm_clipping(dmax=math.inf)
    assert limits_of(layer) == {**CLIPPING, "dmax": math.inf}
    layer.set_renorm_clipping(rmax=np.float32(4), rmin=jnp.float32(3))
    assert limits_of(layer) == {"rmin": 3, "rmax": 4, "dmax": math.inf}
    layer = make(rmax=0.9).set_renorm_clipping(rmin=0.9)  # which no float32 is


def test_nothing_else_changes() -> None:
    layer = make()
    layer(X)
    before = [v for v in jax.tree.leaves(nnx.state(layer)) if v.shape]
    layer.set_renorm_clipping(**CLIPPING)
    after = [v for v in jax.tree.leaves(nnx.state(layer)) if v.shape]
    assert [id(a) for a in before] == [id(b) for b in after]
    limits = nnx.state(layer, RenormLimit)
    assert len(jax.tree.leaves(limits)) == 3
    kept = nnx.state(layer, nnx.BatchStat, nnx.Param)
    assert sum(len(jax.tree.leaves(state)) for state in kept) == 7
    fresh = make(rmax=3.0)
    nnx.update(fresh, *kept)
    assert limits_of(fresh)["rmax"] == 3


@pytest.mark.parametrize("inside", [False, True])
def test_a_schedule_compiles_once(inside: bool) -> None:
    traces = []

    @nnx.jit
    def step(layer: Any, x: Any, rmax: Any) -> Any:
        traces.append(None)
        if inside:
            layer.set_renorm_clipping(rmax=rmax, dmax=rmax)
        return layer(x, update_statistics=False)

    layer = make()
    for rmax in (1.0, 1.25, 1.5, math.inf):
        if not inside:
            layer.set_renorm_clipping(rmax=rmax, dmax=rmax)
        expected = BatchNorm(3, renorm=True, fused=False, rngs=nnx.Rngs(0))
        expected.set_renorm_clipping(rmax=rmax, dmax=rmax)
        np.testing.assert_allclose(step(layer, X, rmax), expected(X), rtol=1e-5, atol=1e-5)
        assert limits_of(layer)["rmax"] == rmax
    assert len(traces) == 1


def test_stacked_layers_have_their_own() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    layers = nnx.vmap(lambda key: BatchNorm(3, renorm=True, rngs=nnx.Rngs(key)))(keys)
    layers.set_renorm_clipping(rmax=2.0)
    nnx.vmap(lambda layer, dmax: layer.set_renorm_clipping(dmax=dmax) and None)(
        layers, jnp.asarray([0.0, 1.0])
    )
    np.testing.assert_array_equal(layers.renorm.rmax[...], [2, 2])
    np.testing.assert_array_equal(layers.renorm.dmax[...], [0, 1])
    y = nnx.jit(nnx.vmap(lambda layer: layer(X)))(layers)
    for i, dmax in enumerate((0.0, 1.0)):
        alone = make(rmax=2.0, dmax=dmax)(X)
        np.testing.assert_allclose(y[i], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [None, False])
def test_the_function_takes_traced_limits(fused: bool | None) -> None:
    @jax.jit
    def step(x: Any, rmax: Any, dmax: Any) -> Any:
        clipping = {"rmax": rmax, "rmin": 0.5, "dmax": dmax}
        return batch_norm(x, renorm=STATISTICS, renorm_clipping=clipping, fused=fused)[0]

    expected = batch_norm(X, renorm=STATISTICS, renorm_clipping=CLIPPING, fused=False)[0]
    np.testing.assert_allclose(step(X, 1.5, 0.25), expected, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(step, in_axes=(None, 0, None))(X, jnp.asarray([1.5, 1.0]), 0.25)
    np.testing.assert_allclose(mapped[0], expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda r: step(X, r, 0.25).sum())(1.5)
    assert gradient == 0, "r and d are constants to differentiation"


@KERNELS
def test_kernels_take_them_as_data() -> None:
    layer = make(**CLIPPING)
    assert explain(layer, X).way == "kernels"
    programs = [
        jax.jit(
            lambda x, rmax=rmax: batch_norm(x, renorm=STATISTICS, renorm_clipping={"rmax": rmax})
        )
        .lower(X)
        .as_text()
        for rmax in (1.5, 2.5)
    ]
    calls = [[line for line in text.splitlines() if "custom_call" in line] for text in programs]
    assert calls[0] == calls[1] != []


WRONG: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "no renorm": (
        ValueError,
        "BatchNorm: the layer has renorm=False",
        lambda: BatchNorm(3).set_renorm_clipping(rmax=1.0),
    ),
    "order": (
        ValueError,
        "BatchNorm: limits of renormalization need rmax >= rmin; got rmax=1 and rmin=2",
        lambda: make(rmin=2.0).set_renorm_clipping(rmax=1.0),
    ),
    "negative": (
        ValueError,
        "BatchNorm: dmax must be finite and at least 0",
        lambda: make().set_renorm_clipping(dmax=-1.0),
    ),
    "type": (
        TypeError,
        "BatchNorm: rmax must be a real number; got '3'",
        lambda: make().set_renorm_clipping(rmax="3"),
    ),
    "shape": (
        TypeError,
        r"BatchNorm: limits .* got rmax of type float32 and shape \(2,\)",
        lambda: make().set_renorm_clipping(rmax=jnp.ones(2)),
    ),
    "function, integer": (
        TypeError,
        "batch_norm: limits .* got dmax of type int32",
        lambda: batch_norm(X, renorm=STATISTICS, renorm_clipping={"dmax": jnp.int32(1)}),
    ),
    "function, name": (
        ValueError,
        "batch_norm: renorm_clipping takes the keys",
        lambda: batch_norm(X, renorm=STATISTICS, renorm_clipping={"max": jnp.float32(1)}),
    ),
    "function, order": (
        ValueError,
        "batch_norm: renorm_clipping needs rmax >= rmin",
        lambda: batch_norm(
            X, renorm=STATISTICS, renorm_clipping={"rmax": jnp.float32(1), "rmin": 2.0}
        ),
    ),
    "function, no renorm": (
        ValueError,
        "batch_norm: renorm_clipping needs renorm=True",
        lambda: batch_norm(X, renorm_clipping={"rmax": jnp.float32(1)}),
    ),
}


@pytest.mark.parametrize(("kind", "message", "call"), WRONG.values(), ids=WRONG)
def test_bad_limits_are_refused(kind: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        call()


def test_an_error_leaves_all_limits() -> None:
    layer = make(**CLIPPING)
    with pytest.raises(ValueError, match="dmax"):
        layer.set_renorm_clipping(rmax=2.0, dmax=-1.0)
    assert limits_of(layer) == CLIPPING
