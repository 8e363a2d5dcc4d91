"""The graph that code is traced into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import ref

import tensorflow as tf

from batchnorm.core.errors import ArgumentRuntimeError, naming

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
    return any(graph is trace() for graph in _list_graphs())


def repeats(trace: Any) -> bool:
    """As `batchnorm.keras.functional.Backend` says; eager recomputation cannot be told."""
    return trace is not False and trace is not None and follows(trace)


def mark_block(trace: Any) -> AbstractContextManager[Any]:
    """As `batchnorm.keras.functional.Backend` says: nothing can be marked."""
    return nullcontext()


def loses_context() -> bool:
    """As `batchnorm.keras.functional.Backend` says: each eager replica has a thread."""
    context = tf.distribute.get_replica_context()
    return tf.executing_eagerly() and context is not None and context.num_replicas_in_sync > 1


def obeys(block: Any) -> bool:
    """As `batchnorm.keras.functional.Backend` says: graphs ask at each call for eager blocks."""
    return block.trace is None or tf.executing_eagerly() or follows(block.trace)


class LateGraph:
    """As `batchnorm.keras.functional.Graph` says, of a `tf.function`."""

    def __init__(self, graph: Any) -> None:
        self.marked: Any = None
        self.notes: dict[str, Any] = {}
        self._graph = graph
        self._keys: dict[Any, _Key] = {}

    def read(self, name: Any, function: Callable[[], Any], default: Any) -> tf.Tensor:
        """As `batchnorm.keras.functional.Graph` says."""
        key = self._keys.setdefault(name, _Key(self))
        with tf.init_scope():
            value = tf.constant(default, tf.bool if isinstance(default, bool) else tf.float64)

        def read() -> tf.Tensor:
            found = function()
            return value if found is default else tf.constant(found, value.dtype)

        if not hasattr(self._graph, "capture_call_time_value"):
            return tf.constant(function(), value.dtype)  # a graph that no function calls
        spec = tf.TensorSpec(value.shape, value.dtype)
        found: tf.Tensor = self._graph.capture_call_time_value(read, spec, key, value)
        return found

    def refuse(self, block: Any) -> None:
        """Raise for a block opened in a graph that calls this one, which cannot follow it."""
        calls = self.notes.get("calls")
        if calls is not None and any(map(block.concerns, calls.layers)):
            with naming(block.owner):
                raise ArgumentRuntimeError(
                    "a tf.function cannot follow a block that the function around it has opened. "
                    "Open the block inside the tf.function that runs the layers."
                )


class _Key:
    """A key of what a graph reads; a graph around it looks the key up where it calls the graph."""

    def __init__(self, home: LateGraph) -> None:
        self._home = home

    def __hash__(self) -> int:
        around = None if tf.executing_eagerly() else find_graph()
        if around is not None and around is not self._home and around.marked is not None:
            self._home.refuse(around.marked)
        return id(self)


def find_graph() -> LateGraph | None:
    """As `batchnorm.keras.functional.Backend` says."""
    if tf.executing_eagerly():
        return None
    *_, graph = _list_graphs()
    found: LateGraph | None = getattr(graph, "_batchnorm", None)
    if found is None:
        graph._batchnorm = found = LateGraph(graph)
    return found


@contextmanager
def mark_rule(block: Any) -> Iterator[None]:
    """As `batchnorm.keras.functional.Backend` says: replicas trace one graph in their threads."""
    graph = find_graph()
    if graph is None:
        yield
        return
    before, graph.marked = graph.marked, block
    try:
        yield
    finally:
        graph.marked = before


def _list_graphs() -> Iterator[Any]:
    """The graph that code is traced into, and those that it is a branch or loop of."""
    graph = tf.compat.v1.get_default_graph()
    yield graph
    while type(graph).__name__ in _PARTS:
        graph = graph.outer_graph
        yield graph
