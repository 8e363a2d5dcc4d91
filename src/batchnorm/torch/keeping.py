"""Passes that leave the running statistics alone (S20)."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch

from batchnorm.torch.private import constant_in_graphs

__all__ = ["keep_statistics"]


class _Block:
    """One `with` block; `active` is False from its end on, for tasks that outlive it."""

    def __init__(self, outer: _Block | None) -> None:
        self.outer, self.active = outer, True

    def keeps(self) -> bool:
        return self.active or (self.outer is not None and self.outer.keeps())


_current: ContextVar[_Block | None] = ContextVar("batchnorm_keep_statistics", default=None)


class _Traced:
    """Blocks that a compiler has traced into: it knows of their effect when it traces a layer."""

    def __init__(self) -> None:
        self.depth = 0


_traced = _Traced()  # Dynamo 2.12 follows attributes of objects, and none of classes


class keep_statistics:  # noqa: N801 (named as torch.no_grad is)
    """Leave all running statistics as they are, `num_batches_tracked` included, inside the block.

    Everything else is as in training: layers normalize by the batch's own statistics. For a second
    pass over the same data (sharpness-aware steps, adversarial examples), a teacher's pass, or a
    generator's step through the discriminator.

    Holds for layers of this library and for `batch_norm`, in the thread (or asyncio task) that made
    it; ends with the block even on an exception, and nests. Compiled layers read it when they run:
    it recompiles nothing. A pass that activation checkpointing repeats is not counted either. Ranks
    merge their statistics as usual.

    Source: S20.

    >>> from batchnorm.torch import BatchNorm
    >>> layer, x = BatchNorm(2), torch.randn(8, 2)
    >>> with keep_statistics():
    ...     y = layer(x)
    >>> layer.num_batches_tracked.item(), layer.running_mean.tolist()
    (0, [0.0, 0.0])
    """

    def __init__(self) -> None:
        self._entered: list[_Block] = []

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            _traced.depth += 1
        else:
            block = _Block(_current.get())
            self._entered.append(block)
            _current.set(block)

    def __exit__(self, *error: Any) -> None:
        if torch.compiler.is_compiling():
            _traced.depth -= 1
        else:
            self._entered.pop().active = False
            # Blocks of generators may end in another order than they began.
            inner = _current.get()
            while inner is not None and not inner.active:
                inner = inner.outer
            _current.set(inner)


def keeps_statistics() -> bool:
    """True if statistics stay; in traced code, as far as the tracer can know."""
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() and in_block():
            return True
        return _traced.depth > 0
    return in_block()


# Run while torch.export traces: a program has no block around it.
@constant_in_graphs
def in_block() -> bool:
    """True if eager code of this thread runs in a block."""
    block = _current.get()
    return block is not None and block.keeps()
