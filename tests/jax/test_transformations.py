"""Every transformation of JAX, over the kernels and over array code."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from batchnorm.jax import BatchNorm, batch_norm, batch_norm_inference
from batchnorm.jax.functional import RenormStatistics

PATHS = pytest.mark.parametrize("fused", [None, False])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums of a few dozen terms


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def assert_close(found: Any, expected: Any, **tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **(tolerance or CLOSE))


def loss(x: Any, scale: Any, bias: Any, *, fused: bool | None, **options: Any) -> jax.Array:
    """A function of y and of the moments with no derivative that vanishes."""
    y, moments = batch_norm(x, scale, bias, fused=fused, **options)
    mask = options.get("mask")
    if mask is not None:  # padded outputs are constants, whatever finite differences say
        y = jnp.where(mask.reshape(-1, 1), y, 0.0)
    weights = normal(*y.shape, seed=1, dtype=y.dtype)
    return jnp.sum(jnp.sin(y) * weights) + jnp.sum(moments.mean * moments.var)


@PATHS
def test_jit_compiles_once_for_all_values(fused: bool | None) -> None:
    traces = []

    @jax.jit
    def step(x: Any, mask: Any) -> Any:
        traces.append(None)
        return batch_norm(x, mask=mask, fused=fused)[0]

    for seed in range(3):
        x = normal(8, 3, seed=seed)
        mask = jnp.arange(8) > seed
        assert_close(step(x, mask), batch_norm(x, mask=mask, fused=fused)[0])
    assert len(traces) == 1


@pytest.mark.sample(4)
@PATHS
def test_disable_jit_changes_nothing(fused: bool | None) -> None:
    x, dy = normal(8, 3), normal(8, 3, seed=1)

    def step(x: Any) -> Any:
        return jnp.vdot(batch_norm(x, fused=fused)[0], dy)

    expected = jax.value_and_grad(step)(x)
    with jax.disable_jit():
        assert_close(jax.value_and_grad(step)(x), expected)


@pytest.mark.sample(4)
@PATHS
def test_vmap_is_a_loop(fused: bool | None) -> None:
    x, scale = normal(5, 8, 3), normal(5, 3, seed=2)
    mask = jnp.asarray(np.random.default_rng(3).random((5, 8)) < 0.7)

    def step(x: Any, scale: Any, mask: Any) -> Any:
        return batch_norm(x, scale, mask=mask, fused=fused)

    expected = [step(*parts) for parts in zip(x, scale, mask, strict=True)]
    expected = jax.tree.map(lambda *a: jnp.stack(a), *expected)
    assert_close(jax.vmap(step)(x, scale, mask), expected)
    assert_close(jax.jit(jax.vmap(step))(x, scale, mask), expected)


@pytest.mark.sample(6)
@PATHS
@pytest.mark.parametrize("batched", [(0, None, None), (None, 0, None), (None, None, 0)])
def test_gradients_under_vmap_over_any_argument(fused: bool | None, batched: Any) -> None:
    arguments = [normal(8, 3), normal(3, seed=2), normal(3, seed=3)]
    at = batched.index(0)
    arguments[at] = jnp.stack([arguments[at], arguments[at] * 2.0 + 1.0])
    gradient = jax.grad(partial(loss, fused=fused), argnums=(0, 1, 2))
    expected = [
        gradient(*(a[i] if n == at else a for n, a in enumerate(arguments))) for i in range(2)
    ]
    found = jax.vmap(gradient, in_axes=batched)(*arguments)
    assert_close(found, jax.tree.map(lambda *a: jnp.stack(a), *expected))


@pytest.mark.sample(4)
@PATHS
def test_vmap_over_cotangents_alone(fused: bool | None) -> None:
    x, scale, bias = normal(8, 3), normal(3, seed=2), normal(3, seed=3)
    _, transpose = jax.vjp(lambda *a: batch_norm(*a, fused=fused)[0], x, scale, bias)
    cotangents = normal(4, 8, 3, seed=4)
    expected = [transpose(dy) for dy in cotangents]
    found = jax.vmap(transpose)(cotangents)
    assert_close(found, jax.tree.map(lambda *a: jnp.stack(a), *expected))


@pytest.mark.exhaustive
@PATHS
def test_gradient_of_a_jacobian_penalty(fused: bool | None) -> None:
    def penalty(x: Any, fused: bool | None) -> Any:
        y, transpose = jax.vjp(lambda a: batch_norm(a, fused=fused)[0], x)
        rows = jax.vmap(lambda dy: transpose(dy)[0])(normal(4, *y.shape, seed=4))
        return jnp.sum(jnp.square(rows))

    x = normal(6, 2)
    expected = jax.grad(lambda a: penalty(a, False))(x)
    assert_close(jax.grad(lambda a: penalty(a, fused))(x), expected, rtol=1e-4, atol=1e-4)
    assert_close(
        jax.jit(jax.grad(partial(penalty, fused=fused)))(x), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.sample(4)
@PATHS
def test_a_named_vmap_axis_synchronizes(fused: bool | None) -> None:
    x = normal(12, 3)
    mask = jnp.arange(12) < 7  # three, three and one real rows; and an empty participant
    expected = batch_norm(x, mask=mask, fused=fused)
    y, moments = jax.vmap(
        lambda x, mask: batch_norm(x, mask=mask, axis_name="batch", fused=fused), axis_name="batch"
    )(x.reshape(4, 3, 3), mask.reshape(4, 3))
    assert_close(y.reshape(12, 3), expected[0])
    for field, whole in zip(moments, expected[1], strict=True):
        assert_close(field, jnp.broadcast_to(whole, field.shape))


@pytest.mark.sample(9)
@PATHS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3), (4, 0), (0,)], ids=str)
def test_nothing_under_a_named_axis(shape: Any, masked: bool, fused: bool | None) -> None:
    def step(x: Any) -> Any:
        mask = jnp.ones(x.shape[:-1], bool) if masked else None
        return batch_norm(x, mask=mask, axis_name="batch", fused=fused)

    (y, moments), transpose = jax.vjp(jax.vmap(step, axis_name="batch"), jnp.ones((2, *shape)))
    assert_close(moments.count, np.full((2, *shape[-1:]), 2.0 * np.prod(shape[:-1])))
    assert y.shape == transpose((y, moments))[0].shape == (2, *shape)


def test_two_named_vmap_axes_synchronize() -> None:
    x = normal(12, 3)

    def step(x: Any) -> Any:
        return batch_norm(x, axis_name=("outer", "inner"))[0]

    inner = jax.vmap(step, axis_name="inner")
    found = jax.vmap(inner, axis_name="outer")(x.reshape(2, 2, 3, 3))
    assert_close(found.reshape(12, 3), batch_norm(x)[0])


@PATHS
def test_pmap_over_one_device(fused: bool | None) -> None:
    x = normal(1, 8, 3)
    step = jax.pmap(lambda x: batch_norm(x, axis_name="devices", fused=fused)[0], "devices")
    assert_close(step(x)[0], batch_norm(x[0])[0])
    local = jax.pmap(lambda x: batch_norm(x, fused=fused)[0])
    assert_close(local(x)[0], batch_norm(x[0])[0])


@pytest.mark.sample(4)
@PATHS
def test_scan_carries_statistics_and_differentiates(fused: bool | None) -> None:
    xs = normal(4, 8, 3)

    def chained(xs: Any, steps: Any) -> Any:
        def body(carry: Any, x: Any) -> Any:
            y, moments = batch_norm(x * carry, fused=fused)
            return carry * 0.5 + moments.var.mean(), jnp.tanh(y)

        return steps(body, jnp.float32(1.0), xs)

    def unrolled(body: Any, carry: Any, xs: Any) -> Any:
        ys = []
        for x in xs:
            carry, y = body(carry, x)
            ys.append(y)
        return carry, jnp.stack(ys)

    dy = normal(4, 8, 3, seed=2)

    def value(xs: Any, steps: Any) -> Any:
        carry, ys = chained(xs, steps)
        return carry + jnp.vdot(ys, dy)

    found = jax.jit(jax.grad(lambda xs: value(xs, jax.lax.scan)))(xs)
    assert_close(found, jax.grad(lambda xs: value(xs, unrolled))(xs))


@PATHS
def test_checkpoint_gives_the_same_gradients(fused: bool | None) -> None:
    x, scale, bias = normal(8, 3), normal(3, seed=2), normal(3, seed=3)
    function = partial(loss, fused=fused)
    expected = jax.grad(function, argnums=(0, 1, 2))(x, scale, bias)
    remade = jax.jit(jax.grad(jax.checkpoint(function), argnums=(0, 1, 2)))
    assert_close(remade(x, scale, bias), expected)


@pytest.mark.sample(4)
@PATHS
def test_remat_moves_statistics_once(fused: bool | None) -> None:
    x = normal(8, 3)
    layer = BatchNorm(3, momentum=0.5, fused=fused, rngs=nnx.Rngs(0))

    @nnx.remat
    def block(layer: BatchNorm, x: Any) -> Any:
        return jnp.tanh(layer(x))

    gradient = nnx.grad(lambda layer, x: jnp.sum(block(layer, x) * normal(8, 3, seed=1)))(layer, x)
    assert_close(layer.mean[...], 0.5 * x.mean(axis=0))
    assert_close(layer.var[...], 0.5 + 0.5 * x.var(axis=0))
    plain = BatchNorm(3, rngs=nnx.Rngs(0))
    expected = nnx.grad(lambda layer: jnp.sum(jnp.tanh(layer(x)) * normal(8, 3, seed=1)))(plain)
    assert_close(gradient, expected)


@PATHS
def test_eval_shape_computes_nothing(fused: bool | None) -> None:
    x = jax.ShapeDtypeStruct((8, 5, 3), jnp.bfloat16)
    y, moments = jax.eval_shape(partial(batch_norm, virtual_batch_size=2, fused=fused), x)
    assert (y.shape, y.dtype) == ((8, 5, 3), jnp.bfloat16)
    assert all((m.shape, m.dtype) == ((4, 3), jnp.float32) for m in moments)


@PATHS
def test_ensemble_by_nnx_vmap_keeps_statistics_apart(fused: bool | None) -> None:
    @nnx.vmap(in_axes=0)
    def make(rngs: nnx.Rngs) -> BatchNorm:
        return BatchNorm(3, momentum=0.5, fused=fused, rngs=rngs)

    members = make(nnx.Rngs(0).split(4))
    x = normal(4, 8, 3)
    y = nnx.vmap(lambda layer, x: layer(x))(members, x)
    assert_close(y, jnp.stack([batch_norm(a)[0] for a in x]))
    assert_close(members.mean[...], 0.5 * x.mean(axis=1))
    assert members.momentum[...].shape == (4,)


@PATHS
def test_donated_buffers_give_the_same_result(fused: bool | None) -> None:
    expected = batch_norm(normal(64, 3) * 2.0)[0]
    step = jax.jit(lambda x: batch_norm(x, fused=fused)[0], donate_argnums=0)
    x = normal(64, 3) * 2.0
    assert_close(step(x), expected)
    assert x.is_deleted()


@pytest.mark.parametrize("size", [8, "n"])
def test_exported_programs_run_without_the_kernels(size: Any) -> None:
    (size,) = export.symbolic_shape(size) if size == "n" else (size,)
    arguments = (
        jax.ShapeDtypeStruct((size, 3), jnp.float32),
        jax.ShapeDtypeStruct((size,), jnp.bool_),
    )
    program = export.export(jax.jit(lambda x, mask: batch_norm(x, mask=mask)))(*arguments)
    restored = export.deserialize(program.serialize())
    # Locations, for debuggers, may name what the code was lowered from.
    operations = [a for a in restored.mlir_module().splitlines() if not a.startswith("#loc")]
    assert not [a for a in operations if "batchnorm_" in a]
    x, mask = normal(8, 3), jnp.arange(8) % 3 != 0
    assert_close(restored.call(x, mask), batch_norm(x, mask=mask))


def test_exported_gradients_run_without_the_kernels() -> None:
    x = normal(8, 3)
    gradient = jax.jit(jax.grad(lambda x: loss(x, None, None, fused=None)))
    program = export.export(gradient)(jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert_close(export.deserialize(program.serialize()).call(x), gradient(x))


@pytest.mark.parametrize("training", [True, False])
def test_compiled_programs_call_the_kernels_where_they_should(training: bool) -> None:
    def step(x: Any) -> Any:
        if training:
            return batch_norm(x)[0]
        return batch_norm_inference(x, jnp.zeros(3), jnp.ones(3))

    text = jax.jit(step).lower(normal(8, 3)).as_text()
    assert ("batchnorm_forward" in text) == training


@pytest.mark.parametrize(
    ("transformed", "reason"),
    [
        (lambda f, x: jax.vmap(f)(x), "under vmap"),
        (lambda f, x: jax.vmap(jax.grad(lambda a: f(a).sum()))(x), "under vmap"),
        (lambda f, x: jax.jvp(f, (x,), (x,)), "forward-mode"),
        (lambda f, x: jax.linearize(f, x)[1](x), "forward-mode"),
        (
            lambda f, x: export.export(jax.jit(f))(jax.ShapeDtypeStruct(x.shape, x.dtype)),
            "exported program",
        ),
    ],
)
def test_a_demanded_kernel_says_why_there_is_none(transformed: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"batch_norm: fused=True demands a kernel.*{reason}"):
        transformed(lambda a: batch_norm(a, fused=True)[0], normal(4, 8, 3))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"axis_name": "rows"}, "named axis"),
        ({"axis": (0, 2)}, "apart in memory"),
        ({"mask": np.ones((8, 5, 3), bool)}, "differs between channels"),
    ],
)
def test_a_demanded_kernel_refuses_options(options: Any, reason: str) -> None:
    def step(x: Any) -> Any:
        return batch_norm(x, fused=True, **options)[0]

    with pytest.raises(ValueError, match=f"fused=True demands a kernel.*{reason}"):
        jax.vmap(step, axis_name="rows")(normal(2, 8, 5, 3))


def test_renormalized_statistics_are_constants() -> None:
    x = normal(8, 3)

    def value(mean: Any, stddev: Any) -> Any:
        y, _ = batch_norm(x, renorm=RenormStatistics(mean, stddev))
        return jnp.vdot(y, normal(8, 3, seed=1))

    found = jax.grad(value, argnums=(0, 1))(jnp.zeros(3), jnp.ones(3))
    assert_close(found, (jnp.zeros(3), jnp.zeros(3)))
