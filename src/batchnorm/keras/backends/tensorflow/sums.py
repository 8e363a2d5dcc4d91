"""Sums that round like a tree's, where TensorFlow adds one row after another.

On a CPU TensorFlow's sum of a million float32 rows may miss by a thousandth of its size, with and
without XLA. The core needs a mean that misses by less than a deviation (S3). Where there is a GPU
or TPU TensorFlow's sums are used as they are, for threads add in parallel there; operations on the
CPU beside a GPU then add row after row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from batchnorm.keras.backends.tensorflow.devices import find_accelerator, is_compiled

_BLOCK = 64  # rows added one after another: fast, and 64 roundings are few
_ROUNDS = 3  # where the number of rows is unknown: enough for 64⁴ rows


def sum_axes(a: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """The sum of a over `axes`, which are kept with size 1."""
    rows = [a.shape[axis] for axis in axes]
    few = None not in rows and math.prod(rows) <= 2 * _BLOCK
    if few or a.dtype != tf.float32 or find_accelerator():
        return tf.reduce_sum(a, axis=list(axes), keepdims=True)
    if is_compiled():  # XLA would make one sum of several
        total = tf.reduce_sum(tf.cast(a, tf.float64), axis=list(axes), keepdims=True)
        return tf.cast(total, a.dtype)

    # The gradient of slices would be as many arrays of a's size.
    @tf.custom_gradient
    def add(a: tf.Tensor) -> Any:
        total = a
        for axis in sorted(axes, reverse=True):
            total = _sum_axis(total, axis)
        return total, lambda dy: tf.broadcast_to(dy, tf.shape(a))

    return add(a)


def _sum_axis(a: tf.Tensor, axis: int) -> tf.Tensor:
    for _ in range(_ROUNDS):
        size = a.shape[axis]
        if size is not None and size <= 2 * _BLOCK:
            break
        sizes = [tf.shape(a)[i] if n is None else n for i, n in enumerate(a.shape)]
        blocks = sizes[axis] // _BLOCK
        end = blocks * _BLOCK
        whole, rest = tf.split(a, [end, sizes[axis] - end], axis)
        whole = tf.reshape(whole, [*sizes[:axis], blocks, _BLOCK, *sizes[axis + 1 :]])
        parts = (tf.reduce_sum(whole, axis + 1), tf.reduce_sum(rest, axis, keepdims=True))
        a = tf.concat(parts, axis)
    return tf.reduce_sum(a, axis, keepdims=True)
