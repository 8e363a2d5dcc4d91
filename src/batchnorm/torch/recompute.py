"""Forward passes that are run again in a backward pass (activation checkpointing, S9)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.core.errors import ArgumentRuntimeError, naming
from batchnorm.core.moments import Moments
from batchnorm.core.running import Running
from batchnorm.torch.keeping import keeps_statistics
from batchnorm.torch.private import find_backward
from batchnorm.torch.tracing import define_operator, uncaptured

_late = threading.local()  # a backward pass may run in any thread


@contextmanager
def as_first_pass() -> Iterator[None]:
    """Take passes inside the block for first ones, which move statistics, also in a backward pass.

    Nothing recomputes them, so that they are not remembered.
    """
    _late.active = True
    try:
        yield
    finally:
        _late.active = False


def _is_late() -> bool:
    return getattr(_late, "active", False)


def recomputation_flag(x: Tensor) -> Tensor | Literal[True] | None:
    """A flag of a forward pass that a backward pass runs again (activation checkpointing).

    Returns:
        True or None (no) in eager code. Under a compiler that is known only when the graph
        runs: a 0-d boolean tensor on x's device, True inside `keep_statistics` too.

    Source: S9, S20; pytorch#96136.
    """
    if not torch.compiler.is_compiling():
        return True if in_backward() and not _is_late() else None
    if torch.compiler.is_exporting():
        return None
    return torch.ops.batchnorm.leaves_statistics.default(x.detach())


def in_backward() -> bool:
    """True if a backward pass is running in this thread."""
    return find_backward() != -1


def snapshot(running: Running) -> Running:
    """The statistics as they are before this step moves them: copies in compiled code.

    A compiled backward pass recomputes cheap values from buffers, which the forward pass has
    overwritten by then. It does not recompute the outputs of an opaque operator.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return running
    return _unpacked(running, _snapshot(_packed(running)))


def before_step(running: Running, moments: Moments, again: Any) -> Running:
    """The statistics from before the step of a pass with these moments (S9, S11).

    A recomputed pass finds them by its moments, the first one remembers them; `again`: in eager
    code, if it is a recomputation.
    """
    if torch.compiler.is_exporting():
        return running
    if torch.compiler.is_compiling():
        found = _before_step(_packed(running), [a.detach() for a in moments])
        return _unpacked(running, found)
    if again:
        return recall_step(running.renorm_mean, moments)
    remember_step(running.renorm_mean, moments, running)
    return running


def _packed(running: Running) -> list[Tensor]:
    return [a for a in running._replace(batches=None) if a is not None]


def _unpacked(running: Running, values: list[Tensor]) -> Running:
    rest = iter(values)
    return running.map(lambda _: next(rest))


class PastSteps:
    """A layer's latest steps, remembered for recomputation.

    When a step is recomputed, the statistics have moved, and other ranks are elsewhere. It is
    recognized by the moments of its input, which are the same to the bit.
    """

    def __init__(self, most: int = 16) -> None:  # forward passes between a step and its backward
        self.most = most
        self._steps: deque[tuple[tuple[Tensor, ...], Any]] = deque(maxlen=most)

    def record(self, moments: Iterable[Tensor], kept: Any) -> None:
        """Remember `kept` of a step whose input has these moments."""
        self._steps.append((tuple(moments), kept))

    def recall(self, moments: Sequence[Tensor]) -> Any | None:
        """`kept` of the latest step with these moments, or None."""
        for found, kept in reversed(self._steps):
            if all(
                a.shape == b.shape and torch.equal(a, b)
                for a, b in zip(found, moments, strict=True)
            ):
                return kept
        return None


_past: Any = WeakTensorKeyDictionary()


def remember_step(key: Tensor | None, moments: Moments, before: Running) -> None:
    """Remember a step with renormalization of the layer whose statistics include `key`."""
    if _is_late():
        return
    kept = Running(*(None if a is None else a.clone() for a in before))
    # Clones: a compiled graph uses the memory of an operator's arguments again.
    _past.setdefault(key, PastSteps()).record((a.detach().clone() for a in moments), kept)


def recall_step(key: Tensor | None, moments: Moments) -> Running:
    """The statistics before the step that had these moments."""
    steps = _past.get(key) or PastSteps()
    before: Running | None = steps.recall(moments)
    if before is None:
        raise ArgumentRuntimeError(
            f"a recomputed forward pass (activation checkpointing) with renormalization "
            f"is none of the layer's latest {steps.most}; call backward sooner."
        )
    return before


@uncaptured("batchnorm::snapshot")
def _snapshot(statistics: list[Tensor]) -> list[Tensor]:
    return [a.clone() for a in statistics]


@_snapshot.register_fake
def _(statistics: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(a) for a in statistics]


@uncaptured("batchnorm::before_step")
def _before_step(statistics: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
    mean, var, stddev, renorm_mean, renorm_stddev = statistics
    running = Running(mean, var, None, stddev, renorm_mean, renorm_stddev)
    with naming("BatchNorm"):
        found = before_step(running, Moments(*moments), in_backward())
    return [a.clone() for a in _packed(found)]


@_before_step.register_fake
def _(statistics: list[Tensor], moments: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(a) for a in statistics]


def _leaves_statistics(x: Tensor) -> Tensor:
    stays = in_backward() or keeps_statistics()
    return torch.full((), stays, dtype=torch.bool, device=x.device)


def _shape_flag(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.bool)


# At every compiled call: by the cheaper way.
define_operator("leaves_statistics", _leaves_statistics, _shape_flag, captured=False)
