"""The graph that code is traced into."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import tensorflow as tf

RETRACES = False
_PARTS = ("CondBranchFuncGraph", "WhileBodyFuncGraph", "WhileCondFuncGraph")


def find_trace() -> Any:
    """A weak reference to the graph that this code is traced into, or None in eager code."""
    return None if tf.executing_eagerly() else ref(tf.compat.v1.get_default_graph())


def follows(trace: Any) -> bool:
    """As `batchnorm.keras.functional.Backend` says.

    A `tf.function` inside keeps the first tensors that it takes from outside; a branch and a loop
    are traced for each use.
    """
    if trace is None or tf.executing_eagerly():
        return trace is None and tf.executing_eagerly()
    graph, wanted = tf.compat.v1.get_default_graph(), trace()
    while graph is not wanted and type(graph).__name__ in _PARTS:
        graph = graph.outer_graph
    return graph is wanted


def repeats(trace: Any) -> bool:
    """As `batchnorm.keras.functional.Backend` says; eager recomputation cannot be told."""
    return trace is not False and trace is not None and follows(trace)


def mark_block(trace: Any) -> AbstractContextManager[Any]:
    """As `batchnorm.keras.functional.Backend` says: nothing can be marked."""
    return nullcontext()
