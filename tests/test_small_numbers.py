"""Subnormal numbers, deviations without a reciprocal, more rows than float32 counts: every path.

Expected values are worked out by hand or by NumPy in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import batchnorm.jax
import batchnorm.torch
from batchnorm.core.moments import centre
from batchnorm.jax.namespace import XP as JAX
from batchnorm.torch.namespace import XP as TORCH
from batchnorm.verification import tolerances

pytestmark = pytest.mark.sample(2)

Gradient = tuple[np.ndarray, np.ndarray, np.ndarray]


def run_torch(fused: bool | None, compiled: bool = False) -> Callable[..., Gradient]:
    def run(x: Any, dy: Any, eps: float, mask: Any = None) -> Gradient:
        x = torch.tensor(np.asarray(x, np.float32)).to(getattr(torch, np.dtype(x.dtype).name))
        x.requires_grad_()
        gamma = torch.ones(x.shape[1], requires_grad=True)
        real = None if mask is None else torch.tensor(mask)

        def normalize(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
            return batchnorm.torch.batch_norm(
                x, None, None, gamma, training=True, eps=eps, mask=real, fused=fused
            )

        if compiled:
            normalize = torch.compile(normalize, backend="aot_eager")
        y = normalize(x, gamma)
        y.backward(torch.tensor(np.asarray(dy, np.float32)).to(x.dtype))
        return tuple(a.detach().float().numpy() for a in (y, x.grad, gamma.grad))

    return run


def run_jax(fused: bool | None, jit: bool) -> Callable[..., Gradient]:
    def run(x: Any, dy: Any, eps: float, mask: Any = None) -> Gradient:
        def normalize(x: Any, gamma: Any) -> Any:
            return batchnorm.jax.batch_norm(x, gamma, epsilon=eps, mask=mask, fused=fused)[0]

        def step(x: Any, gamma: Any, dy: Any) -> Any:
            y, pull = jax.vjp(normalize, x, gamma)
            return y, *pull(dy)

        step = jax.jit(step) if jit else step
        found = step(jnp.asarray(x), jnp.ones(x.shape[1]), jnp.asarray(dy))
        return tuple(np.asarray(a, np.float32) for a in found)

    return run


PATHS: dict[str, Callable[..., Gradient]] = {
    "torch kernels": run_torch(None),
    "torch arrays": run_torch(False),
    "torch graph": run_torch(True, compiled=True),
    "jax kernels": run_jax(None, jit=True),
    "jax arrays": run_jax(False, jit=True),
    "jax arrays, eager": run_jax(False, jit=False),
}


@pytest.fixture(params=[False, True], ids=["keeping", "flushing"])
def flushing(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Make this thread flush subnormals; XLA's threads flush them in any case."""
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(False)


def step_by_hand(x: np.ndarray, dy: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """y and dx in float64 (S4, S8)."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    rstd = 1 / np.sqrt(x.var(axis=0) + eps)
    xhat = (x - x.mean(axis=0)) * rstd
    dx = rstd * (dy - dy.mean(axis=0) - xhat * (dy * xhat).mean(axis=0))
    return xhat, dx


def assert_rounded_once(found: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """Assert one rounding to the half type, after arithmetic in float32 (S3, S16)."""
    bound = tolerances.output_rounding(dtype, expected)
    off = np.abs(found - expected) - (bound + tolerances.FLOAT32 * np.abs(expected).max())
    assert off.max() <= 0, off.max()


@pytest.mark.parametrize("path", PATHS)
def test_subnormal_float16_inputs_count_at_their_value(path: str, flushing: bool) -> None:
    x = np.array([[6e-5], [3e-5], [1e-5], [2e-5]], np.float16)
    y, _, _ = PATHS[path](x, x, 1e-12)
    np.testing.assert_allclose(y.ravel(), [1.602, -0.002, -1.067, -0.533], atol=2e-3)


@pytest.mark.sample(3)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(3, 1), (5, 3), (9, 7), (16, 8), (31, 33), (7, 70)], ids=str)
def test_subnormal_float16_gradients_count_at_their_value(
    path: str, shape: tuple[int, ...], flushing: bool
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1e-2, shape).astype(np.float16)
    dy = rng.normal(0, 1e-5, shape).astype(np.float16)
    expected = step_by_hand(x, dy, 1e-5)[1]
    found = PATHS[path](x, dy, 1e-5)[1]
    assert_rounded_once(found, expected, "float16")


@pytest.mark.parametrize("path", [name for name in PATHS if "arrays" not in name])
def test_subnormal_bfloat16_gradients_count_at_their_value(path: str, flushing: bool) -> None:
    """Kernels only: these are float32's own subnormals, which array code's threads may flush."""
    x = np.random.default_rng(0).normal(0, 1e-3, (11, 5)).astype(jnp.bfloat16)
    dy = (np.random.default_rng(1).normal(0, 1, x.shape) * 5e-39).astype(jnp.bfloat16)
    expected = step_by_hand(x, dy, 1e-5)[1]
    found = PATHS[path](x, dy, 1e-5)[1]
    assert_rounded_once(found, expected, "bfloat16")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("deviation", [0.0, 1e-45, 1e-39, 1e-38])
def test_a_deviation_without_reciprocal_counts_as_none(
    path: str, deviation: float, flushing: bool
) -> None:
    """eps = 0, deviation below the smallest normal float32: x̂ = 0, dx = 0, as for one row (S7)."""
    signs = np.array([[1.0], [-1.0], [-1.0], [1.0]])
    x = (signs * deviation).astype(np.float32)
    y, dx, dgamma = PATHS[path](x, signs.astype(np.float32), 0.0)
    assert (y.tolist(), dx.tolist(), dgamma.tolist()) == ([[0.0]] * 4, [[0.0]] * 4, [0.0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("deviation", [1e-37, 1e-30, 1e-19])
def test_a_small_deviation_is_normalized_without_eps(path: str, deviation: float) -> None:
    x = (np.array([[1.0], [-1.0], [-1.0], [1.0]]) * deviation).astype(np.float32)
    y, _, _ = PATHS[path](x, np.zeros_like(x), 0.0)
    np.testing.assert_allclose(y.ravel(), [1, -1, -1, 1], rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_an_empty_batch_without_eps_has_zero_gradients(path: str) -> None:
    x = np.ones((3, 2), np.float32)
    _, dx, dgamma = PATHS[path](x, x, 0.0, np.zeros(3, bool))
    assert (dx.tolist(), dgamma.tolist()) == ([[0.0] * 2] * 3, [0.0] * 2)


@pytest.mark.parametrize("path", PATHS)
def test_a_single_real_row_has_no_gradient_to_the_bit(path: str) -> None:
    """dx is 0 although rstd is 1/sqrt(eps) and x̂ at padded rows is not 0 (S7)."""
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(1e3, 1, (7, 3)).astype(np.float32) for _ in range(2))
    y, dx, dgamma = PATHS[path](x, dy, 1e-5, np.arange(7) == 4)
    assert (dx == 0).all()
    assert (dgamma == 0).all()
    assert (y[4] == 0).all()
    np.testing.assert_allclose(y[0], (x[0].astype(float) - x[4]) / np.sqrt(1e-5), rtol=1e-5)


@pytest.mark.parametrize("fused", [None, False])
def test_a_running_variance_of_zero_without_eps_gives_beta(fused: bool | None) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mean, var, beta = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0]), torch.tensor([7.0, 0.0])
    y = batchnorm.torch.batch_norm(x, mean, var, None, beta, eps=0.0, fused=fused)
    assert y.tolist() == [[7.0, 1.0], [7.0, 2.0]]
    x, mean, var, beta = (jnp.asarray(a.numpy()) for a in (x, mean, var, beta))
    y = batchnorm.jax.batch_norm_inference(x, mean, var, bias=beta, epsilon=0.0)
    assert y.tolist() == [[7.0, 1.0], [7.0, 2.0]]


ROWS = 2**24 + 4099  # float32 counts no further than 2^24 one by one


@pytest.fixture(scope="module")
def many_rows() -> tuple[np.ndarray, np.ndarray]:
    """Two columns of 1, 3, 1, 3, ..., the second one higher by 1; five padded rows in front."""
    x = np.ones((ROWS + 5, 2), np.float32)
    x[1::2] += 2  # five rows are padded: three of 1 and two of 3
    x[:, 1] += 1
    mask = np.ones(x.shape, bool)
    mask[:5] = False
    return x, mask


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", ["torch", "torch compiled", "jax", "jax compiled"])
def test_counts_beyond_float32_are_rounded_once(
    way: str, many_rows: tuple[np.ndarray, np.ndarray]
) -> None:
    xp = TORCH if "torch" in way else JAX

    def find(x: Any, mask: Any) -> Any:
        return tuple(centre(x, mask, (0,), eps=1e-5, xp=xp).moments)

    x, mask = (torch.tensor(a) if "torch" in way else jnp.asarray(a) for a in many_rows)
    if "compiled" in way:
        find = torch.compile(find) if "torch" in way else jax.jit(find)
    count, mean, var = (np.ravel(np.asarray(a)).astype(np.float64) for a in find(x, mask))
    np.testing.assert_allclose(count, ROWS, rtol=2**-24)
    np.testing.assert_allclose(mean, [2 + 1 / ROWS, 3 + 1 / ROWS], rtol=2e-7)
    np.testing.assert_allclose(var, 1, rtol=2e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("fused", [None, False])
def test_torch_stores_the_mean_of_more_rows_than_float32_counts(
    fused: bool | None, many_rows: tuple[np.ndarray, np.ndarray]
) -> None:
    x, mask = (torch.tensor(a) for a in many_rows)
    mean, var = torch.zeros(2), torch.ones(2)
    batchnorm.torch.batch_norm(
        x, mean, var, training=True, momentum=1.0, mask=mask[:, 0], fused=fused
    )
    np.testing.assert_allclose(mean, [2, 3], rtol=2e-7)
    np.testing.assert_allclose(var, 1, rtol=2e-6)
