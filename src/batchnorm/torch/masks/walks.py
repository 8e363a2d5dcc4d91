"""Masks through the windows and resamplings of an axis (S5)."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.core.resolution import Anchors


def walk_axis(mask: Tensor, axis: int, goal: int, anchors: Anchors) -> Tensor:
    """The mask of `goal` outputs along one axis, by the input positions that decide about them."""
    size = mask.shape[axis]
    if anchors.keeps(size, goal):
        return mask
    if size == 0 or goal == 0:
        return mask.new_zeros([*mask.shape[:axis], goal, *mask.shape[axis + 1 :]])
    o = torch.arange(goal, device=mask.device)
    first, last = anchors.positions(o)
    every = first <= last if anchors.every else torch.zeros_like(o, dtype=torch.bool)
    low = torch.minimum(first, last).clamp(0, size)
    end = torch.maximum(first, last).clamp(-1, size - 1) + 1
    before = torch.nn.functional.pad(
        mask.movedim(axis, -1).cumsum(-1, dtype=torch.int32), (1, 0)
    )  # (..., size + 1), real positions before each
    real = before[..., end] - before[..., low]
    found = (real > 0) & (~every | (real == end - low))
    return found.movedim(-1, axis).contiguous()
