"""The graph that code is traced into."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import tensorflow as tf

RETRACES = False


def find_trace() -> Any:
    """A weak reference to the graph that this code is traced into, or None in eager code."""
    return None if tf.executing_eagerly() else ref(tf.compat.v1.get_default_graph())


def follows(trace: Any) -> bool:
    """As `batchnorm.keras.functional.Backend` says."""
    if trace is None or tf.executing_eagerly():
        return trace is None and tf.executing_eagerly()
    graph, wanted = tf.compat.v1.get_default_graph(), trace()
    while graph is not None and graph is not wanted:
        graph = getattr(graph, "outer_graph", None)
    return graph is not None


def repeats(trace: Any) -> bool:
    """As `batchnorm.keras.functional.Backend` says; eager recomputation cannot be told."""
    return trace is not False and trace is not None and follows(trace)


def mark_block(trace: Any) -> AbstractContextManager[Any]:
    """As `batchnorm.keras.functional.Backend` says: nothing can be marked."""
    return nullcontext()
