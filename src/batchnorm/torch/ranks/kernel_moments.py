"""Merging over ranks between the halves of a kernel's step (S14)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.torch.ranks.synchronizer import Participation, find_by_key

__all__ = ["merge_kept", "moments_of_kernel", "total_of_kernel"]


def merge_kept(
    passes: Any, find: Callable[[], Any], part: Participation, device: torch.device
) -> Any:
    """The record of a kernel's first pass, merged with those of other ranks."""
    synchronizer, channels = find_by_key(part.key), part.channels
    expected = None
    if device.type == "cpu":
        expected = synchronizer.expect(part.text, 2 * channels + 1, "forward")
    kept = find()
    local = moments_of_kernel(passes, kept)
    merged = synchronizer.merge(local, part.text, channels, False, expected)
    count, mean, var = torch.split(merged, [1, channels, channels])
    passes.count(kept).copy_(count)
    for name, value in (("mean", mean), ("low", torch.zeros_like(mean)), ("var", var)):
        passes.row(kept, name).copy_(value)
    return kept


def total_of_kernel(
    reduce: Callable[[], Tensor], part: Participation, device: torch.device
) -> Tensor:
    """The sums of a kernel's gradient reduction, of all ranks."""
    synchronizer, expected = find_by_key(part.key), None
    if device.type == "cpu":
        expected = synchronizer.expect(part.text, 2 * part.channels, "backward")
    return synchronizer.total(reduce(), part.text, expected)


def moments_of_kernel(passes: Any, kept: Any) -> Tensor:
    """The moments that a kernel keeps, as a vector."""
    return torch.cat([passes.count(kept), *(passes.row(kept, n) for n in ("mean", "var"))])
