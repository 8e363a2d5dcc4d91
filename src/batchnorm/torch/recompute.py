"""Forward passes that are run again in a backward pass (activation checkpointing, S9)."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.core.moments import Moments
from batchnorm.core.running import Running


def recomputation_flag(x: Tensor) -> Tensor | bool | None:
    """Whether this forward pass repeats one, inside a backward pass (activation checkpointing).

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
    """Whether a backward pass is running in this thread."""
    return torch._C._current_graph_task_id() != -1


def snapshot(statistics: list[Tensor], *, repeatable: bool) -> list[Tensor]:
    """The statistics as they are before this step moves them.

    Not `repeatable` is a step that needs them as they were, which only eager code remembers
    (`StepHistory`): repeated by a checkpoint around compiled code it raises RuntimeError.

    A compiled backward pass recomputes cheap values, and would do so from the very buffers that
    the forward pass has overwritten by then; it does not recompute what an opaque operator made.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return statistics
    return _snapshot(statistics, repeatable)


class StepHistory:
    """What renormalization compared with in the latest steps, for when one is recomputed.

    A recomputed step finds statistics that have moved since, and would get another r and d. It
    is recognized by its moments, which are the same to the bit.
    """

    _STEPS = 16  # forward passes of one layer between a step and its backward pass

    def __init__(self) -> None:
        self._steps: Any = WeakTensorKeyDictionary()

    def record(self, key: Tensor | None, moments: Moments, before: Running) -> None:
        """Remember a step of the layer whose statistics include the tensor `key`."""
        steps = self._steps.setdefault(key, deque(maxlen=self._STEPS))
        kept = Running(*(None if a is None else a.clone() for a in before))
        steps.append((Moments(*(a.detach() for a in moments)), kept))

    def recall(self, owner: str, key: Tensor | None, moments: Moments) -> Running:
        """The statistics before the step that had these moments."""
        for found, before in reversed(self._steps.get(key, ())):
            if all(
                a.shape == b.shape and torch.equal(a, b)
                for a, b in zip(found, moments, strict=True)
            ):
                return before
        raise RuntimeError(
            f"{owner}: a recomputed forward pass (activation checkpointing) with renormalization "
            f"is none of the layer's latest {self._STEPS}; call backward sooner."
        )


HISTORY = StepHistory()


@torch.library.custom_op("batchnorm::snapshot", mutates_args=())
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


@torch.library.custom_op("batchnorm::is_recomputation", mutates_args=())
def _is_recomputation(x: Tensor) -> Tensor:
    return torch.full((), in_backward(), dtype=torch.bool, device=x.device)


@_is_recomputation.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.bool)
