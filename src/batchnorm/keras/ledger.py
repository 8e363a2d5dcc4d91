"""Moments that a layer's passes leave until their step ends (S21)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import keras

from batchnorm.core.accumulate import average_of_step, merge_passes
from batchnorm.core.errors import ArgumentRuntimeError
from batchnorm.core.forward import move_by_average
from batchnorm.core.layout import Layout
from batchnorm.core.merge import Parts
from batchnorm.core.running import Running
from batchnorm.keras.functional import BACKEND


class Ledger:
    """The moments of a layer's passes in a block, merged; as few as those of one pass.

    Args:
        layer: built or not.
        trace: the backend's trace that the block was opened in.
        slot: takes the passes of compiled functions, or None.
    """

    def __init__(self, layer: Any, trace: Any, slot: Any = None) -> None:
        self._layer, self._trace, self._slot = layer, trace, slot
        self._parts: Parts | None = None

    def add(self, measure: Callable[[], Parts], adds: Any) -> None:
        """Take in a pass, which `measure` measures, if `adds`."""
        if BACKEND.find_trace() != self._trace:
            raise ArgumentRuntimeError(
                "accumulate_statistics was opened outside of the loop or branch of the graph that "
                "runs this layer, and gets no moments out of it. Open it outside of the compiled "
                "function, or let Python unroll the loop."
            )
        parts = measure()
        if adds is not True:
            count = keras.ops.where(adds, parts.count, keras.ops.zeros_like(parts.count))
            parts = parts._replace(count=count)
        self._parts = self._merge(self._parts, parts)

    def close(self) -> Running | None:
        """The statistics after the step of all passes; None without any."""
        parts, slot = self._parts, None if self._slot is None else self._slot.take()
        if slot is not None:
            parts = self._merge(parts, slot)
        return None if parts is None else move_by_parts(self._layer, parts)

    def _merge(self, held: Parts | None, parts: Parts) -> Parts:
        return parts if held is None else merge(is_pooled(self._layer), held, parts)


def merge(pooled: bool, *parts: Parts) -> Parts:
    """The moments of passes of a layer as one; `pooled`: averages of ghost batches."""
    dtype = max((keras.backend.standardize_dtype(a.count.dtype) for a in parts), key=len_of)
    columns = zip(*parts, strict=True)
    stacked = Parts(*(keras.ops.stack([keras.ops.cast(a, dtype) for a in c]) for c in columns))
    return merge_passes(stacked, pooled, BACKEND.XP)


def len_of(dtype: str) -> int:
    """The width of float32 or float64."""
    return int(dtype.removeprefix("float"))


def is_pooled(layer: Any) -> bool:
    """True if the averages of ghost batches are merged (S12)."""
    return layer.virtual_batch_size is not None


def move_by_parts(layer: Any, parts: Parts) -> Running:
    """A layer's statistics after a step with these moments, each of shape (1, *channels)."""
    running, dtype = layer._running(), parts.power.dtype
    running = running.map(lambda a: keras.ops.cast(a, dtype))
    shape = tuple(parts.power.shape)
    layout = Layout(shape, tuple(range(1, len(shape))))
    average = average_of_step(parts, is_pooled(layer), BACKEND.XP)
    return move_by_average(running, average, layout, layer._options, BACKEND.XP)


# Of TensorFlow's layers around which a block was ever opened in eager code.
slots: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
