"""NumPy, torch and JAX, kernels and array code, in one process: the same numbers (S3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import batchnorm
import batchnorm.jax
import batchnorm.torch
from batchnorm.verification import tolerances

MOMENTUM = 0.75  # weight of the old value; exact in float32, in which JAX keeps it


class Results(NamedTuple):
    y: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    mean: np.ndarray
    var: np.ndarray


class Problem(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    mask: np.ndarray | None
    ghost: int | None


def make_problem(offset: float, mask: bool, ghost: int | None) -> Problem:
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(mean, 1.0, (24, 7, 5)).astype(np.float32) for mean in (offset, 0.0))
    gamma, beta = (rng.normal(1.0, 0.3, 5).astype(np.float32) for _ in range(2))
    return Problem(x, dy, gamma, beta, rng.random((24, 7)) < 0.6 if mask else None, ghost)


def by_numpy(p: Problem) -> Results:
    x, dy, gamma, beta = (a.astype(np.float64) for a in (p.x, p.dy, p.gamma, p.beta))
    options: Any = {"mask": p.mask, "virtual_batch_size": p.ghost}
    y, moments = batchnorm.batch_norm(x, gamma, beta, **options)
    gradients = batchnorm.batch_norm_gradient(dy, x, gamma, **options)
    axis = 0 if p.ghost else ()
    mean, var = moments.mean.mean(axis=axis), moments.var.mean(axis=axis)
    return Results(y, *gradients, (1 - MOMENTUM) * mean, MOMENTUM + (1 - MOMENTUM) * var)


def by_torch(p: Problem, fused: bool) -> Results:
    layer = batchnorm.torch.BatchNorm(
        5, axis=-1, momentum=1 - MOMENTUM, virtual_batch_size=p.ghost, fused=fused
    )
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(p.gamma))
        layer.bias.copy_(torch.tensor(p.beta))
    x = torch.tensor(p.x, requires_grad=True)
    mask = None if p.mask is None else torch.tensor(p.mask)
    y = layer(x, mask)
    y.backward(torch.tensor(p.dy))
    arrays = (y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean)
    return Results(*(a.detach().numpy() for a in arrays), biased(layer, p))


def biased(layer: Any, p: Problem) -> np.ndarray:
    """The biased variance from torch's unbiased one (S10): without each group's own factor."""
    rows = np.ones(p.x.shape[:2]) if p.mask is None else p.mask
    groups = 1 if p.ghost is None else len(rows) // p.ghost
    factors, variances = [], []
    for g in range(groups):
        real = p.x[g::groups][rows[g::groups].astype(bool)].astype(np.float64)
        factors.append(len(real) / (len(real) - 1))
        variances.append(real.var(axis=0))
    excess = np.mean([(f - 1) * v for f, v in zip(factors, variances, strict=True)], axis=0)
    return layer.running_var.numpy() - (1 - MOMENTUM) * excess


def by_jax(p: Problem, fused: bool) -> Results:
    layer = batchnorm.jax.BatchNorm(
        5, momentum=MOMENTUM, virtual_batch_size=p.ghost, fused=fused, rngs=nnx.Rngs(0)
    )
    layer.scale[...], layer.bias[...] = jnp.asarray(p.gamma), jnp.asarray(p.beta)

    @nnx.jit
    def step(layer: Any, x: Any, dy: Any, mask: Any) -> Any:
        def loss(layer: Any, x: Any) -> Any:
            y = layer(x, mask=mask)
            return jnp.vdot(y, dy), y

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    (gradients, dx), y = step(layer, p.x, p.dy, p.mask)
    arrays = (y, dx, gradients["scale"], gradients["bias"], layer.mean, layer.var)
    return Results(*(np.asarray(a[...]) for a in arrays))


@pytest.mark.sample(3)
@pytest.mark.parametrize("ghost", [None, 4])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_all_paths_agree(offset: float, mask: bool, ghost: int | None) -> None:
    problem = make_problem(offset, mask, ghost)
    expected = by_numpy(problem)
    found = {
        "torch kernels": by_torch(problem, True),
        "torch plain": by_torch(problem, False),
        "jax kernels": by_jax(problem, True),
        "jax plain": by_jax(problem, False),
    }
    tol, sums = tolerances.FLOAT32, np.abs(problem.dy).sum(axis=(0, 1)).max()
    size = 1 + np.abs(expected.y) + np.abs(problem.beta)
    bounds = Results(
        tol * size,
        tol * np.abs(problem.dy).max() * 4 * (1 + size),
        tol * sums * size.max() * np.ones(5),
        tol * sums * np.ones(5),
        tol + 4 * tolerances.HALF_ULP["float32"] * np.abs(expected.mean),
        2 * tol * expected.var,
    )
    for path, results in found.items():
        for name, a, b, bound in zip(Results._fields, results, expected, bounds, strict=True):
            worst = (np.abs(a - b) / bound).max()
            assert worst <= 1, f"{path}, {name}: {worst:.3g} times the bound"
