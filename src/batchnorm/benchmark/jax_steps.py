"""Steps of JAX, jitted: this library's layer and function, and flax's two layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from batchnorm.benchmark.case import Case
from batchnorm.benchmark.problem import Problem
from batchnorm.benchmark.variant import Variant, make_copy
from batchnorm.jax import (
    BatchNorm,
    RunningStatistics,
    batch_norm,
    batch_norm_inference,
    update_running,
)

__all__ = ["make_variants", "name_rival"]

_RESULTS = ("y", "dx", "dgamma", "dbeta")


def make_variants(problem: Problem, only: tuple[str, ...] = ()) -> dict[str, Variant]:
    """The variants of a problem, by name.

    A step returns y, dx, dgamma, dbeta and the statistics that follow; in inference y alone.

    Args:
        problem: to solve; channels along the last axis.
        only: names of those to make; none for all.
    """
    case = problem.case
    x, dy, mask, wide = (
        None if a is None else jnp.asarray(a)
        for a in (problem.x, problem.dy, problem.mask, problem.real)
    )
    arrays = theirs = (x, dy, mask)
    if mask is not None:  # flax takes no other shape, and does not ignore dy at padded rows
        theirs = (x, jnp.asarray(problem.dy_at_real_rows), wide)
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "ours": lambda: _module_step(problem, BatchNorm, *arrays),
        "ours, plain": lambda: _module_step(problem, BatchNorm, *arrays, fused=False),
        "flax nnx": lambda: _module_step(problem, nnx.BatchNorm, *theirs),
        "ours, function": lambda: _function_step(problem, *arrays),
        "flax linen": lambda: _linen_step(problem, *theirs),
    }
    if mask is not None:
        makers["ours, no mask"] = lambda: _module_step(problem, BatchNorm, x, dy, None)
    results = ("y",) if case.inference else _RESULTS
    found = {
        name: Variant(make(), results, name.startswith("ours"), name == "ours, no mask")
        for name, make in makers.items()
        if not only or name in only
    }
    if not only or "copy" in only:
        found["copy"] = make_copy(problem)
    return found


def name_rival(case: Case) -> tuple[str, str]:
    """The variant that flax offers for the job: its name, and its name for readers."""
    return "flax nnx", "flax.nnx.BatchNorm"


def _module_step(
    problem: Problem, kind: Any, x: Any, dy: Any, mask: Any, **settings: Any
) -> Callable[[], Any]:
    """A step of an nnx module."""
    case = problem.case
    layer = kind(case.channels, epsilon=case.eps, rngs=nnx.Rngs(0), **settings)
    layer.scale[...], layer.bias[...] = jnp.asarray(problem.gamma), jnp.asarray(problem.beta)
    layer.mean[...], layer.var[...] = jnp.asarray(problem.mean), jnp.asarray(problem.var)
    layer.set_attributes(use_running_average=case.inference)
    graph, *states = nnx.split(layer, nnx.Param, ...)
    parameters, rest = states
    if case.inference:
        forward = jax.jit(lambda p, r, x: nnx.merge(graph, p, r)(x))
        return lambda: jax.block_until_ready((forward(parameters, rest, x),))

    @jax.jit
    def step(parameters: Any, rest: Any, x: Any, dy: Any, mask: Any) -> Any:
        def forward(parameters: Any, x: Any) -> Any:
            module = nnx.merge(graph, parameters, rest, copy=True)
            y = module(x, mask=mask)
            return y, nnx.state(module, nnx.BatchStat)

        y, transpose, statistics = jax.vjp(forward, parameters, x, has_aux=True)
        gradients, dx = transpose(dy)
        return y, dx, gradients["scale"][...], gradients["bias"][...], statistics

    return lambda: jax.block_until_ready(step(parameters, rest, x, dy, mask))


def _function_step(problem: Problem, x: Any, dy: Any, mask: Any) -> Callable[[], Any]:
    """A step of this library's functions."""
    eps = problem.case.eps
    scale, bias = jnp.asarray(problem.gamma), jnp.asarray(problem.beta)
    running = RunningStatistics(jnp.asarray(problem.mean), jnp.asarray(problem.var))
    if problem.case.inference:
        forward = jax.jit(
            lambda r, g, b, x: batch_norm_inference(x, r.mean, r.var, g, b, epsilon=eps)
        )
        return lambda: jax.block_until_ready((forward(running, scale, bias, x),))

    @jax.jit
    def step(running: Any, scale: Any, bias: Any, x: Any, dy: Any, mask: Any) -> Any:
        def forward(scale: Any, bias: Any, x: Any) -> Any:
            past = {"running_mean": running.mean, "running_var": running.var}
            y, moments = batch_norm(x, scale, bias, mask=mask, epsilon=eps, **past)
            return y, update_running(running, moments)

        y, transpose, after = jax.vjp(forward, scale, bias, x, has_aux=True)
        dscale, dbias, dx = transpose(dy)
        return y, dx, dscale, dbias, after

    return lambda: jax.block_until_ready(step(running, scale, bias, x, dy, mask))


def _linen_step(problem: Problem, x: Any, dy: Any, mask: Any) -> Callable[[], Any]:
    """A step of flax's older layer."""
    layer = linen.BatchNorm(use_running_average=problem.case.inference, epsilon=problem.case.eps)
    parameters = {"scale": jnp.asarray(problem.gamma), "bias": jnp.asarray(problem.beta)}
    statistics = {"mean": jnp.asarray(problem.mean), "var": jnp.asarray(problem.var)}
    if problem.case.inference:
        forward = jax.jit(lambda p, s, x: layer.apply({"params": p, "batch_stats": s}, x))
        return lambda: jax.block_until_ready((forward(parameters, statistics, x),))

    @jax.jit
    def step(parameters: Any, statistics: Any, x: Any, dy: Any, mask: Any) -> Any:
        def forward(parameters: Any, x: Any) -> Any:
            variables = {"params": parameters, "batch_stats": statistics}
            y, after = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
            return y, after

        y, transpose, after = jax.vjp(forward, parameters, x, has_aux=True)
        gradients, dx = transpose(dy)
        return y, dx, gradients["scale"], gradients["bias"], after

    return lambda: jax.block_until_ready(step(parameters, statistics, x, dy, mask))
