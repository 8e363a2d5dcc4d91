"""The arguments of a call, as tensors, and its mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from batchnorm.core.running import Running
from batchnorm.keras.backends.tensorflow import choice
from batchnorm.keras.backends.tensorflow.arrays import check_divisible, fit_mask
from batchnorm.keras.backends.tensorflow.step import Step
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
    step = Step(x, mask, gamma, beta, running.map(tf.convert_to_tensor), call)

    def train() -> tuple[tf.Tensor, Running]:
        return choice.run(replace(step, x=check_divisible(x, call)), choice.TRAINING)

    def evaluate() -> tuple[tf.Tensor, Running]:
        return choice.run(step, choice.EVALUATION)

    if tf.is_tensor(call.training):
        return tf.cond(tf.cast(call.training, tf.bool), train, evaluate)
    return train() if call.training else (evaluate()[0], None)
