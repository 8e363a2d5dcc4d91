"""Evaluation by TensorFlow's own fused operation, in one pass over x."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from batchnorm.core.normalize import rstd_of_running
from batchnorm.core.running import Running
from batchnorm.keras.backends.tensorflow.array_code import evaluate_with_gradient
from batchnorm.keras.backends.tensorflow.arrays import XP, sizes_of
from batchnorm.keras.backends.tensorflow.devices import find_accelerator, is_compiled
from batchnorm.keras.backends.tensorflow.step import Step

NAME = "one operation of TensorFlow"


def refuse(step: Step) -> str | None:
    """The reason why the operation does not compute the same, or None."""
    x = step.x
    if x.dtype not in (tf.float32, tf.float16, tf.bfloat16):
        return f"it does not take {x.dtype.name}"
    if step.call.axes != (x.shape.rank - 1,):
        return "it takes channels on the last axis"
    if not step.has_channels:
        return "it takes no input without channels"
    if accelerator := find_accelerator():
        return f"it serves the CPU, and the graph may run on {accelerator}"
    if is_compiled():
        return "XLA makes x·a + b of it, which cancels at offsets"  # (S3)
    return None


def run(step: Step) -> tuple[tf.Tensor, Running]:
    """y by the operation; its gradients are those of array code."""

    def evaluate(x: Any, gamma: Any, beta: Any) -> tf.Tensor:
        """(x - mean)·scale + offset over the last axis."""
        channels = x.shape[-1]
        mean, var = (tf.cast(a, tf.float32) for a in step.running[:2])
        scale = rstd_of_running(var, eps=step.call.options.eps, xp=XP)
        found = tf.raw_ops.FusedBatchNormV3(
            x=tf.reshape(x, (1, 1, -1, channels)),
            scale=scale if gamma is None else scale * tf.cast(gamma, tf.float32),
            offset=tf.zeros(channels) if beta is None else tf.cast(beta, tf.float32),
            mean=mean,
            variance=tf.ones(channels),  # `scale` has divided already
            epsilon=0.0,
            is_training=False,
        )
        return tf.reshape(found.y, sizes_of(x))

    return evaluate_with_gradient(step, evaluate), step.running
