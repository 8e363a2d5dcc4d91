"""Forward passes that are run again in a backward pass (activation checkpointing, S9)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.core.errors import ArgumentRuntimeError
from batchnorm.core.moments import Moments
from batchnorm.core.running import Running
from batchnorm.torch.tracing import uncaptured


def recomputation_flag(x: Tensor) -> Tensor | Literal[True] | None:
    """A flag of a forward pass that a backward pass runs again (activation checkpointing).

    Returns:
        True or None (no) in eager code. Under a compiler that is known only when the graph
        runs: a 0-d boolean tensor on x's device.

    Source: S9; pytorch#96136.
    """
    if not torch.compiler.is_compiling():
        return True if in_backward() else None
    if torch.compiler.is_exporting():
        return None
    return _is_recomputation(x.detach())


def in_backward() -> bool:
    """True if a backward pass is running in this thread."""
    return torch._C._current_graph_task_id() != -1


def snapshot(statistics: list[Tensor], *, repeatable: bool) -> list[Tensor]:
    """The statistics as they are before this step moves them: copies in compiled code.

    A step that is not `repeatable` cannot be recomputed from statistics that have moved. Eager
    code remembers the old ones (`PastSteps`); in compiled code, such a step raises RuntimeError
    when a checkpoint repeats it.

    A compiled backward pass recomputes cheap values from buffers, which the forward pass has
    overwritten by then. It does not recompute the outputs of an opaque operator.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return statistics
    return _snapshot(statistics, repeatable)


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
    kept = Running(*(None if a is None else a.clone() for a in before))
    _past.setdefault(key, PastSteps()).record((a.detach() for a in moments), kept)


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
def _snapshot(statistics: list[Tensor], repeatable: bool) -> list[Tensor]:
    if not repeatable and in_backward():
        raise RuntimeError(
            "BatchNorm: a compiled layer with renormalization cannot be recomputed (activation "
            "checkpointing), since its statistics have moved; leave it out of the checkpoint, or "
            "out of the compiled region."
        )
    return [a.clone() for a in statistics]


@_snapshot.register_fake
def _(statistics: list[Tensor], repeatable: bool) -> list[Tensor]:
    return [torch.empty_like(a) for a in statistics]


@uncaptured("batchnorm::is_recomputation")
def _is_recomputation(x: Tensor) -> Tensor:
    return torch.full((), in_backward(), dtype=torch.bool, device=x.device)


@_is_recomputation.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.bool)
