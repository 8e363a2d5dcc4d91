"""Steps of flax nnx layers, jitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from batchnorm.benchmark.problem import Problem

__all__ = ["EPS", "make_step", "make_steps"]

EPS = 1e-5


def make_steps(problem: Problem) -> dict[str, Callable[[], Any]]:
    """This library's step and flax's, each returning y and, in training, dx."""
    from batchnorm.jax import BatchNorm

    layers = {
        "batchnorm": BatchNorm(problem.channels, epsilon=EPS, rngs=nnx.Rngs(0)),
        "flax.nnx.BatchNorm": nnx.BatchNorm(problem.channels, epsilon=EPS, rngs=nnx.Rngs(0)),
    }
    x, dy = jnp.asarray(problem.x), jnp.asarray(problem.dy)
    masks = dict.fromkeys(layers, problem.mask)
    masks["flax.nnx.BatchNorm"] = problem.real  # it takes no other shape
    steps = {}
    for name, layer in layers.items():
        layer.set_attributes(use_running_average=problem.inference)
        mask = None if masks[name] is None else jnp.asarray(masks[name])
        steps[name] = make_step(layer, x, dy, mask, inference=problem.inference)
    if problem.inference:
        return steps
    return {name: _take_two(step) for name, step in steps.items()}


def make_step(layer: Any, x: Any, dy: Any, mask: Any, *, inference: bool) -> Callable[[], Any]:
    """A step that returns y, dx, dgamma, dbeta and the statistics; in inference y alone.

    Args:
        layer: an nnx module with scale and bias.
        x: its input.
        dy: gradient with respect to its output.
        mask: what it takes as one, or None.
        inference: whether to do a forward pass only.
    """
    graph, *states = nnx.split(layer, nnx.Param, ...)
    parameters, rest = states
    if inference:
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


def _take_two(step: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: step()[:2]
