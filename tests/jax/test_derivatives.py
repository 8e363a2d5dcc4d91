"""Derivatives of every order and kind in JAX, in float64 (S8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchnorm.core.config import Options
from batchnorm.core.running import Running
from batchnorm.jax import RenormStatistics, batch_norm
from batchnorm.jax.call import Arrays, Settings
from batchnorm.jax.steps import normalize_running

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}  # float64, sums of a few dozen terms, three derivatives
EPS = 1e-2
MASK = np.array([True, False, True, True, False, True])
Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def plain(x: Any, scale: Any, bias: Any, fused: bool | None) -> Any:
    return batch_norm(x, scale, bias, epsilon=EPS, fused=fused)[0]


def masked(x: Any, scale: Any, bias: Any, fused: bool | None) -> Any:
    y, _ = batch_norm(x, scale, bias, epsilon=EPS, mask=MASK, fused=fused)
    return y[MASK]  # padded outputs are constants by contract, whatever finite differences say


def zeroed(x: Any, scale: Any, bias: Any, fused: bool | None) -> Any:
    given = {"mask": MASK, "padded_output": "zero", "fused": fused}
    return batch_norm(x, scale, bias, epsilon=EPS, **given)[0]  # padded outputs are constants


def one_real_row(x: Any, scale: Any, bias: Any, fused: bool | None) -> Any:
    mask = np.arange(6) == 2
    return batch_norm(x, scale, bias, epsilon=EPS, mask=mask, fused=fused)[0][mask]


def ghost(x: Any, scale: Any, bias: Any, fused: bool | None) -> Any:
    return batch_norm(x, scale, bias, epsilon=EPS, virtual_batch_size=3, fused=fused)[0]


def moments_too(x: Any, scale: Any, bias: Any, fused: bool | None) -> Any:
    y, moments = batch_norm(x, scale, bias, epsilon=EPS, mask=MASK, fused=fused)
    return jnp.concatenate([y[MASK], moments.mean[None], jnp.log(moments.var)[None]])


def moments_alone(x: Any, scale: Any, bias: Any, fused: bool | None) -> Any:
    _, moments = batch_norm(x, scale, bias, epsilon=EPS, virtual_batch_size=2, fused=fused)
    return jnp.stack([moments.mean, jnp.sqrt(moments.var)]) * (scale + bias)


def evaluation(x: Any, scale: Any, bias: Any, fused: bool | None) -> Any:
    running = Running(jnp.full(3, 0.1), jnp.full(3, 2.0))
    settings = Settings("test", -1, Options(eps=EPS), fused)
    return normalize_running(Arrays(x, None, scale, bias, running), settings)


FUNCTIONS = [plain, masked, zeroed, one_real_row, ghost, moments_too, moments_alone, evaluation]
EVERY = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def arguments() -> tuple[jax.Array, ...]:
    return normal(6, 3), normal(3, seed=1) + 1.5, normal(3, seed=2)


def scalar(function: Function, fused: bool | None) -> Function:
    """A loss with derivatives of every order and a random cotangent."""

    def value(*args: Any) -> Any:
        out = function(*args, fused)
        return jnp.sum(jnp.sin(out) * normal(*out.shape, seed=7))

    return value


def differences(function: Function, args: tuple[Any, ...], direction: tuple[Any, ...]) -> Any:
    """A directional derivative, central differences of fourth order."""
    step = 1e-3

    def at(t: float) -> Any:
        return function(*(a + t * step * d for a, d in zip(args, direction, strict=True)))

    return jax.tree.map(
        lambda a, b, c, d: (8 * (b - c) - (a - d)) / (12 * step), at(2), at(1), at(-1), at(-2)
    )


def contract(gradients: Any, direction: Any) -> Any:
    return sum(jnp.vdot(g, d) for g, d in zip(gradients, direction, strict=True))


def assert_close(found: Any, expected: Any, **tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **(tolerance or TOLERANCE))


def directions(seed: int) -> tuple[jax.Array, ...]:
    return normal(6, 3, seed=seed), normal(3, seed=seed + 1), normal(3, seed=seed + 2)


@pytest.mark.sample(2)
@EVERY
def test_gradients_agree_with_finite_differences(function: Function) -> None:
    args, direction = arguments(), directions(10)
    expected = differences(scalar(function, False), args, direction)
    for fused in (None, False, True):
        found = jax.jit(jax.grad(scalar(function, fused), argnums=(0, 1, 2)))(*args)
        assert_close(contract(found, direction), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.sample(8)
@EVERY
def test_second_derivatives(function: Function) -> None:
    args, direction = arguments(), directions(10)

    def first(fused: bool | None) -> Function:
        gradient = jax.grad(scalar(function, fused), argnums=(0, 1, 2))
        return lambda *a: contract(gradient(*a), direction)

    expected = contract(directions(20), jax.grad(first(False), argnums=(0, 1, 2))(*args))
    assert_close(expected, differences(first(False), args, directions(20)), rtol=1e-6, atol=1e-7)
    for fused in (None, True):
        found = jax.jit(jax.grad(first(fused), argnums=(0, 1, 2)))(*args)
        assert_close(contract(directions(20), found), expected)


@pytest.mark.sample(3)
@pytest.mark.parametrize("function", [plain, masked, moments_too], ids=lambda f: f.__name__)
def test_third_derivatives(function: Function) -> None:
    args = arguments()

    def second(fused: bool | None) -> Function:
        gradient = jax.grad(scalar(function, fused), argnums=(0, 1, 2))
        first = jax.grad(lambda *a: contract(gradient(*a), directions(10)), argnums=(0, 1, 2))
        return lambda *a: contract(first(*a), directions(20))

    found = jax.jit(jax.grad(second(None), argnums=(0, 1, 2)))(*args)
    assert_close(found, jax.jit(jax.grad(second(False), argnums=(0, 1, 2)))(*args))
    expected = differences(jax.jit(second(False)), args, directions(30))
    assert_close(contract(found, directions(30)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.sample(3)
@EVERY
def test_forward_mode_agrees_with_reverse_mode(function: Function) -> None:
    args, direction = arguments(), directions(10)
    out, forward = jax.jit(lambda *a: jax.jvp(lambda *b: function(*b, None), a, direction))(*args)
    cotangent = normal(*out.shape, seed=7)
    _, transpose = jax.vjp(lambda *a: function(*a, True), *args)
    assert_close(jnp.vdot(forward, cotangent), contract(transpose(cotangent), direction))


@pytest.mark.sample(3)
@pytest.mark.parametrize("function", [plain, masked, moments_too], ids=lambda f: f.__name__)
def test_jacobians_of_both_modes_and_the_hessian(function: Function) -> None:
    _, scale, bias = arguments()
    x = normal(6, 3)

    def of_x(x: Any, fused: bool | None = None) -> Any:
        return function(x, scale, bias, fused)

    expected = jax.jacrev(partial(of_x, fused=False))(x)
    assert_close(jax.jacrev(of_x)(x), expected)
    assert_close(jax.jacfwd(of_x)(x), expected)
    value = scalar(function, None)
    plainly = scalar(function, False)
    assert_close(
        jax.jit(jax.hessian(lambda x: value(x, scale, bias)))(x),
        jax.jit(jax.hessian(lambda x: plainly(x, scale, bias)))(x),
    )


@pytest.mark.sample(2)
@pytest.mark.parametrize("fused", [None, True, False])
def test_padding_gets_no_gradient_of_any_order(fused: bool | None) -> None:
    x, scale, bias = arguments()
    x = jnp.where(MASK[:, None], x, jnp.nan)

    def value(*args: Any) -> Any:
        y, moments = batch_norm(*args, mask=MASK, fused=fused)
        return jnp.sum(jnp.where(MASK[:, None], jnp.sin(y), y)) + jnp.sum(moments.var)

    gradient = jax.grad(value, argnums=(0, 1, 2))
    found = gradient(x, scale, bias)
    second = jax.grad(lambda *a: contract(gradient(*a), directions(10)), argnums=(0, 1, 2))
    for gradients in (found, second(x, scale, bias)):
        assert all(bool(jnp.isfinite(g).all()) for g in gradients)
        np.testing.assert_array_equal(np.asarray(gradients[0])[~MASK], 0.0)
        assert np.abs(np.asarray(gradients[0])[MASK]).max() > 0


@pytest.mark.parametrize("fused", [None, False])
def test_renormalized_derivatives_treat_r_and_d_as_constants(fused: bool | None) -> None:
    args, direction = arguments(), directions(10)
    statistics = RenormStatistics(jnp.full(3, 0.2), jnp.full(3, 1.3))
    clipping = {"rmax": 1.1, "rmin": 0.9, "dmax": 0.1}

    def value(*a: Any) -> Any:
        y, _ = batch_norm(*a, renorm=statistics, renorm_clipping=clipping, fused=fused)
        return jnp.sum(jnp.sin(y) * normal(6, 3, seed=7))

    def by_hand(x: Any, scale: Any, bias: Any) -> Any:
        y, moments = batch_norm(x, fused=False)
        stddev = jnp.sqrt(jax.lax.stop_gradient(moments.var) + 1e-5)
        r = jnp.clip(stddev / 1.3, 0.9, 1.1)
        d = jnp.clip((jax.lax.stop_gradient(moments.mean) - 0.2) / 1.3, -0.1, 0.1)
        return jnp.sum(jnp.sin((y * r + d) * scale + bias) * normal(6, 3, seed=7))

    gradient, expected = (jax.grad(f, argnums=(0, 1, 2)) for f in (value, by_hand))
    assert_close(gradient(*args), expected(*args))
    second, by_hand_too = (
        jax.grad(lambda *a, g=g: contract(g(*a), direction), argnums=(0, 1, 2))
        for g in (gradient, expected)
    )
    assert_close(second(*args), by_hand_too(*args))
