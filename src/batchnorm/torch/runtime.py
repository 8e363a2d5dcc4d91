"""Facts that only hold while a graph runs, for eager and compiled code alike."""

from __future__ import annotations

import torch
from torch import Tensor


def recomputation_flag(x: Tensor) -> Tensor | bool | None:
    """Whether this forward pass repeats one, inside a backward pass (activation checkpointing).

    Returns:
        True or None (no) in eager code. Under a compiler that is known only when the graph
        runs: a 0-d boolean tensor on x's device.

    Source: S9; pytorch#96136.
    """
    if not torch.compiler.is_compiling():
        return True if _in_backward() else None
    if torch.compiler.is_exporting():
        return None
    return _is_recomputation(x.detach())


def snapshot(statistics: list[Tensor]) -> list[Tensor]:
    """The statistics as they are before this step moves them.

    A compiled backward pass recomputes cheap values, and would do so from the very buffers that
    the forward pass has overwritten by then; it does not recompute what an opaque operator made.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return statistics
    return _snapshot(statistics)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("batchnorm::snapshot", mutates_args=())
def _snapshot(statistics: list[Tensor]) -> list[Tensor]:
    return [a.clone() for a in statistics]


@_snapshot.register_fake
def _(statistics: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(a) for a in statistics]


@torch.library.custom_op("batchnorm::is_recomputation", mutates_args=())
def _is_recomputation(x: Tensor) -> Tensor:
    return torch.full((), _in_backward(), dtype=torch.bool, device=x.device)


@_is_recomputation.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.bool)
