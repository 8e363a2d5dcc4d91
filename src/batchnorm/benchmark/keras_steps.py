"""Steps of Keras layers as `fit` runs them: a graph, jitted, or eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from batchnorm.benchmark.problem import Problem

__all__ = ["EPS", "make_step", "make_steps"]

EPS = 1e-3


def make_steps(problem: Problem) -> dict[str, Callable[[], Any]]:
    """This library's step and Keras's, each returning y and, in training, dx."""
    from batchnorm.keras import BatchNormalization

    layers = {
        "batchnorm": BatchNormalization(epsilon=EPS),
        "keras.layers.BatchNormalization": keras.layers.BatchNormalization(epsilon=EPS),
    }
    arrays = [
        None if a is None else keras.ops.convert_to_tensor(a)
        for a in (problem.x, problem.dy, problem.mask)
    ]
    steps = {}
    for name, layer in layers.items():
        layer.build(problem.x.shape)
        steps[name] = _take(make_step(layer, *arrays, inference=problem.inference), problem)
    return steps


def make_step(layer: Any, x: Any, dy: Any, mask: Any, *, inference: bool) -> Callable[[], Any]:
    """A step that returns y, dx and the weights' gradients if at hand; in inference y alone.

    Args:
        layer: built.
        x: its input, a tensor of the backend.
        dy: gradient with respect to its output.
        mask: what it takes as one, or None.
        inference: whether to do a forward pass only.
    """
    return _STEPS[keras.backend.backend()](layer, x, dy, mask, inference)


def _tensorflow(layer: Any, x: Any, dy: Any, mask: Any, inference: bool) -> Callable[[], Any]:
    import tensorflow as tf

    def step(x: Any, dy: Any) -> Any:
        if inference:
            return (layer(x, training=False),)
        weights = [w.value for w in layer.trainable_weights]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
        return y, *tape.gradient(y, [x, *weights], dy)

    graph = tf.function(step)
    return lambda: graph(x, dy)


def _jax(layer: Any, x: Any, dy: Any, mask: Any, inference: bool) -> Callable[[], Any]:
    import jax

    values = [[w.value for w in a] for a in (layer.trainable_weights, layer.non_trainable_weights)]

    @jax.jit
    def step(values: Any, x: Any, dy: Any, mask: Any) -> Any:
        trained, kept = values

        def forward(x: Any, trained: Any) -> Any:
            call = layer.stateless_call
            return call(trained, kept, x, mask=mask, training=not inference)

        if inference:
            return (forward(x, trained)[0],)
        y, pull, moved = jax.vjp(forward, x, trained, has_aux=True)
        return y, *pull(dy), moved

    return lambda: jax.block_until_ready(step(values, x, dy, mask))


def _torch(layer: Any, x: Any, dy: Any, mask: Any, inference: bool) -> Callable[[], Any]:
    import torch

    weights = [w.value for w in layer.trainable_weights]
    leaves = [x.detach().requires_grad_(not inference), *weights]

    def step() -> Any:
        if inference:
            with torch.no_grad():
                return (layer(leaves[0], training=False),)
        for leaf in leaves:
            leaf.grad = None
        y = layer(leaves[0], training=True, mask=mask)
        y.backward(dy)
        return y.detach(), leaves[0].grad

    return step


_STEPS = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}


def _take(step: Callable[[], Any], problem: Problem) -> Callable[[], Any]:
    return step if problem.inference else lambda: step()[:2]
