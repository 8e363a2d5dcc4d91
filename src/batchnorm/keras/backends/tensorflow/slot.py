"""Variables of a layer that compiled functions merge the moments of their passes into (S21)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from batchnorm.core.merge import Parts

_EMPTY = Parts(count=0.0, anchor=0.0, shift=0.0, scale=1.0, power=0.0)


class Slot:
    """The merged moments of a layer, between the calls of compiled functions.

    Args:
        merge: of two passes as one.
    """

    def __init__(self, merge: Callable[[Parts, Parts], Parts]) -> None:
        self._merge = merge
        self._held: dict[tf.DType, Parts] = {}

    def add(self, measure: Callable[[], Parts], adds: Any) -> None:
        """Take in a pass, which `measure` measures, if `adds`: in a graph, when it runs."""

        def merge() -> tf.Tensor:
            parts = measure()
            held = self.hold(parts.power.shape, parts.power.dtype)
            for variable, value in zip(held, self._merge(held, parts), strict=True):
                variable.assign(value)
            return tf.constant(True)

        tf.cond(adds, merge, lambda: tf.constant(False))

    def take(self) -> Parts | None:
        """All moments since the last time; None without any."""
        found = None
        for held in self._held.values():
            parts = Parts(*(tf.identity(variable) for variable in held))
            for variable, value in zip(held, _EMPTY, strict=True):
                variable.assign(tf.fill(variable.shape, tf.cast(value, variable.dtype)))
            found = parts if found is None else self._merge(found, parts)
        return found

    def hold(self, shape: Sequence[int], dtype: Any) -> Parts:
        """The variables for moments of a type; a function that makes its own is traced twice."""
        dtype = tf.as_dtype(dtype)
        if dtype not in self._held:
            with tf.init_scope():
                self._held[dtype] = Parts(
                    *(tf.Variable(tf.fill(shape, tf.cast(a, dtype)), False) for a in _EMPTY)
                )
        return self._held[dtype]
