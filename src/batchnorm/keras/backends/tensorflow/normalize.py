"""The arguments of a call, as tensors, and its mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import ref

import numpy as np
import tensorflow as tf

from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.merge import Parts
from batchnorm.core.running import Running
from batchnorm.keras.backends.shared import ONE_PARTICIPANT, list_limits, measure_parts
from batchnorm.keras.backends.tensorflow import choice
from batchnorm.keras.backends.tensorflow.arrays import (
    XP,
    DynamicLayout,
    check_divisible,
    fill_mask,
    fit_mask,
    make_merge,
    needs_mask,
)
from batchnorm.keras.backends.tensorflow.step import Step
from batchnorm.keras.backends.tensorflow.tracing import find_graph
from batchnorm.keras.call import Call


def resolve_training(training: Any) -> Any:
    """A bool where `training` has a value now, rather than when the graph runs."""
    value = tf.get_static_value(training) if tf.is_tensor(training) else training
    return training if value is None else bool(value)


def read_values(a: tf.Tensor) -> np.ndarray | None:
    """The values of a tensor where no device but the CPU has to be asked for them, or None."""
    if not tf.executing_eagerly() or not hasattr(a, "numpy"):
        return None
    return a.numpy() if "CPU" in a.device else None


def normalize(
    x: tf.Tensor, mask: Any, gamma: Any, beta: Any, running: Running, call: Call
) -> tuple[tf.Tensor, Running | None]:
    """As `batchnorm.keras.functional.Backend` says."""
    mask = None if mask is None else fit_mask(tf.convert_to_tensor(mask), x, call.axes)
    gamma, beta = (None if a is None else tf.convert_to_tensor(a) for a in (gamma, beta))
    running = Running(*(None if a is None else tf.convert_to_tensor(a) for a in running))
    step = Step(x, mask, gamma, beta, running, call, call.limits)

    def train() -> tuple[tf.Tensor, Running]:
        return choice.run(replace(step, x=check_divisible(x, call)), choice.TRAINING)

    def evaluate() -> tuple[tf.Tensor, Running]:
        return choice.run(step, choice.EVALUATION)

    if tf.is_tensor(call.training):
        return tf.cond(tf.cast(call.training, tf.bool), train, evaluate)
    return train() if call.training else (evaluate()[0], None)


def read_limits(layer: Any) -> tf.Tensor:
    """As `batchnorm.keras.functional.Backend` says: those of each call of a graph."""

    now, known = list_limits(layer._options), ref(layer)  # graphs outlive layers

    def read() -> list[float]:
        found = known()
        return now if found is None else list_limits(found._options)

    graph = find_graph()
    if graph is None:
        return tf.constant(now, tf.float64)
    return graph.read(("limits", known), read, now)


def measure(x: tf.Tensor, mask: Any, call: Call) -> Parts:
    """As `batchnorm.keras.functional.Backend` says."""
    if make_merge() is not None:
        raise ArgumentValueError(ONE_PARTICIPANT)
    step = Step(tf.stop_gradient(x), mask, None, None, Running(None, None), call)
    if not step.has_channels:
        nothing = tf.zeros([1, *(x.shape[a] for a in call.axes)], step.working_type)
        return Parts(*[nothing] * 5)
    mask = None if mask is None else fit_mask(tf.convert_to_tensor(mask), x, call.axes)
    layout = DynamicLayout.of(x, call.axes, call.options.virtual_batch_size)
    mask = fill_mask(mask, x, call.axes) if needs_mask(layout) else mask
    return measure_parts(tf.cast(step.x, step.working_type), mask, layout, call.options, XP)
