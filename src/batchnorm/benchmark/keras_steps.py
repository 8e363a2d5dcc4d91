"""Steps of Keras layers as `fit` runs them: a graph, jitted, or eager."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import keras

from batchnorm.benchmark.case import Case
from batchnorm.benchmark.problem import Problem
from batchnorm.benchmark.variant import Variant, make_copy
from batchnorm.keras import BatchNormalization

__all__ = ["make_variants", "name_rival"]

_LAYERS: dict[str, Any] = {
    "ours": BatchNormalization,
    "keras": keras.layers.BatchNormalization,
    "ours, kernels": partial(BatchNormalization, fused=True),
}
_SMALL = 1 << 18  # elements, up to which it is worth asking whether kernels are the fastest way


def make_variants(problem: Problem, only: tuple[str, ...] = ()) -> dict[str, Variant]:
    """The variants of a problem on the current backend, by name.

    A step returns y, dx and the weights' gradients if at hand; in inference y alone.

    Args:
        problem: to solve; channels along the last axis.
        only: names of those to make; none for all.
    """
    x, dy, mask = (
        None if a is None else keras.ops.convert_to_tensor(a)
        for a in (problem.x, problem.dy, problem.mask)
    )
    dys = dict.fromkeys(_LAYERS, dy)
    if mask is not None:  # Keras does not ignore dy at padded rows
        dys["keras"] = keras.ops.convert_to_tensor(problem.dy_at_real_rows)
    case, make_step = problem.case, _STEPS[keras.backend.backend()]
    found = {}
    for name, kind in _LAYERS.items():
        if only and name not in only:
            continue
        if name == "ours, kernels" and math.prod(case.shape) > _SMALL:
            continue
        layer = kind(epsilon=case.eps)
        layer.build(case.shape)
        layer.gamma.assign(problem.gamma)
        layer.beta.assign(problem.beta)
        layer.moving_mean.assign(problem.mean)
        layer.moving_variance.assign(problem.var)
        step = make_step(layer, x, dys[name], mask, case.inference)
        results = ("y",) if case.inference else ("y", "dx")
        found[name] = Variant(step, results, name != "keras")
    if not only or "copy" in only:
        found["copy"] = make_copy(problem)
    return found


def name_rival(case: Case) -> tuple[str, str]:
    """The variant that Keras offers for the job: its name, and its name for readers."""
    return "keras", "keras.layers.BatchNormalization"


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
