"""Blocks in which the statistics do not move with every pass, and what they say to a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet, ref

import keras

from batchnorm.core.errors import ArgumentRuntimeError, naming
from batchnorm.keras.blocks import OpenBlocks
from batchnorm.keras.functional import BACKEND, Graph
from batchnorm.keras.ledger import Ledger, slots
from batchnorm.keras.private import in_symbolic_scope

__all__ = ["keep_statistics"]


@dataclass(eq=False)
class Block:
    """One `with` block.

    Attributes:
        owner: the public name, for errors.
        ledgers: of the layers whose passes are collected; None where nothing moves.
        trace: the backend's trace that the block was opened in; None for eager code.
        outer: the block around it, or None.
        active: False from its end on, for tasks that outlive it.
    """

    owner: str
    ledgers: Mapping[Any, Ledger] | None
    trace: Any
    outer: Block | None
    active: bool = True

    def concerns(self, layer: Any) -> bool:
        """True if the block says something to the layer."""
        return self.ledgers is None or layer in self.ledgers


class Rule(NamedTuple):
    """The fate of the statistics after a pass; a flag may be a 0-d tensor of a graph.

    Attributes:
        moves: they move by this pass.
        ledger: collects the pass's moments, or None.
        adds: it does so; matters where there is a ledger.
    """

    moves: Any = True
    ledger: Ledger | None = None
    adds: Any = False


USUAL, KEPT = Rule(), Rule(moves=False)
_current: ContextVar[Block | None] = ContextVar("batchnorm_keras_moving", default=None)


_usage = OpenBlocks()


@contextmanager
def keep_statistics() -> Iterator[None]:
    """Leave all statistics as they are in training calls inside the `with` block.

    Everything else is as in training: layers normalize by the batch's own statistics, and have
    their gradients. For second passes over the same data: sharpness-aware steps, adversarial or
    teacher passes, a generator's step through its discriminator.

    The setting belongs to the thread (or asyncio task) that made it, ends with the block even on
    an exception, and nests. Compiled functions that are called in the block follow it, and so do
    `fit` and `train_on_batch`: on JAX they are compiled once more, on TensorFlow the same graph
    reads at each call whether a block is open. Of a block that is opened inside a compiled
    function, that function keeps it.

    Raises:
        RuntimeError: from a layer: on torch, code that `torch.compile` compiles in a block opened
            outside of it; on TensorFlow, a `tf.function` inside of another one that opened the
            block. Open the block inside the function that runs the layer.

    Source: S9, S20.

    >>> import keras
    >>> from batchnorm.keras import BatchNormalization
    >>> layer = BatchNormalization(momentum=0.0)
    >>> with keep_statistics():
    ...     y = layer(keras.ops.array([[1.0], [3.0]]), training=True)
    >>> float(keras.ops.convert_to_numpy(layer.moving_mean)[0])
    0.0
    """
    with open_block(keep_statistics.__name__, None):
        yield


@contextmanager
def open_block(owner: str, ledgers: Mapping[Any, Ledger] | None) -> Iterator[Block]:
    """A block of this context, until its end."""
    block = Block(owner, ledgers, BACKEND.find_trace(), _current.get())
    token = _current.set(block)
    _usage.count(1)
    try:
        with BACKEND.mark_rule(block):
            yield block
    finally:
        block.active = False
        _usage.count(-1)
        _current.reset(token)


def find_rule(layer: Any, *, collects: bool = True) -> Rule:
    """The rule for a layer in this training pass.

    `collects`: its moments may be collected; if not, they are the end of a collection.
    """
    if in_symbolic_scope():  # Keras asks for shapes only
        return USUAL
    graph = BACKEND.find_graph()
    if _usage.in_use:
        _check_traces(layer)
    elif graph is None:
        return USUAL
    if graph is None:
        return rule_of(_current.get(), layer)
    return _rule_in_graph(graph, layer, collects)


def rule_of(block: Block | None, layer: Any) -> Rule:
    """The rule of a block and those around it for a layer: keeping wins."""
    found = USUAL
    while block is not None:
        if block.active and block.ledgers is None:
            return KEPT
        if block.active and block.ledgers is not None and layer in block.ledgers:
            found = Rule(False, block.ledgers[layer], True)
        block = block.outer
    return found


def _check_traces(layer: Any) -> None:
    """Raise for a block whose trace this code does not belong to, and which it would outlive."""
    block = _current.get()
    if block is None and BACKEND.loses_context():
        with naming(type(layer).__name__):
            raise ArgumentRuntimeError(
                "a block of keep_statistics or accumulate_statistics is open, and replicas that "
                "run eagerly, in threads of their own, cannot tell whether it is around them. Call "
                "strategy.run in a tf.function."
            )
    while block is not None:
        if block.active and block.concerns(layer) and not BACKEND.obeys(block):
            with naming(type(layer).__name__):
                raise ArgumentRuntimeError(
                    f"{block.owner} was opened outside of the compiled function that runs this "
                    "layer, which would follow it in all later calls. Open it inside."
                )
        block = block.outer


def _rule_in_graph(graph: Graph, layer: Any, collects: bool) -> Rule:
    """The rule in a graph that reads at each call which blocks are open around it."""
    static = rule_of(graph.marked, layer)
    if static is not USUAL:
        return static
    calls = graph.notes.setdefault("calls", _Calls())
    calls.layers.add(layer)
    moves = graph.read("moves", calls.read_moves, True)
    slot = slots.get(layer) if collects else None
    if slot is None:
        calls.closed.add(layer)
        return Rule(moves)
    known = ref(layer)  # graphs outlive layers
    adds = graph.read(known, lambda: rule_of(_current.get(), known()).adds, False)
    return Rule(keras.ops.logical_and(moves, keras.ops.logical_not(adds)), slot, adds)


class _Calls:
    """The layers of a graph, and what blocks say to them when it is called.

    `closed`: those that cannot collect.
    """

    def __init__(self) -> None:
        self.layers: WeakSet[Any] = WeakSet()
        self.closed: WeakSet[Any] = WeakSet()

    def read_moves(self) -> bool:
        """True if the statistics move by passes of a call in this thread."""
        block = _current.get()
        while block is not None:
            if block.active and block.ledgers is None:
                return False
            if block.active:
                self._refuse(block)
            block = block.outer
        return True

    def _refuse(self, block: Block) -> None:
        layer = next((a for a in self.closed if block.concerns(a)), None)
        if layer is not None:
            with naming(block.owner):
                raise ArgumentRuntimeError(
                    f"the function that is called was compiled without a collection of the "
                    f"moments of layer {layer.name!r}. Compile it once more, after a block for "
                    "this model was first opened: make a new tf.function."
                )
