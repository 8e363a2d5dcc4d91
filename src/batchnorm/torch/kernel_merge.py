"""Merging over ranks between the halves of a kernel's step (S14)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.kernels import cpu
from batchnorm.torch.synchronize import Participation, find_by_key

__all__ = ["merge_kept", "moments_of_kernel", "total_of_kernel"]


def merge_kept(find: Callable[[], Any], part: Participation) -> Any:
    """What a kernel's first pass leaves, merged with what it leaves on other ranks."""
    synchronizer, channels = find_by_key(part.key), part.channels
    expected = synchronizer.expect(part.text, 2 * channels + 1, "forward")
    kept = find()
    local = moments_of_kernel(kept)
    merged = synchronizer.merge(local, part.text, channels, False, expected)
    count, mean, var = np.split(merged.numpy(), [1, 1 + channels])
    kept.count()[:] = count
    for name, value in {"mean": mean, "low": 0.0, "var": var}.items():
        kept.row(cpu.STATISTICS[name])[:] = value
    return kept


def total_of_kernel(reduce: Callable[[], Any], part: Participation) -> Any:
    """The sums of a kernel's gradient reduction, of all ranks."""
    synchronizer = find_by_key(part.key)
    expected = synchronizer.expect(part.text, 2 * part.channels, "backward")
    return synchronizer.total(torch.from_numpy(reduce()), part.text, expected).numpy()


def moments_of_kernel(kept: Any) -> Tensor:
    """The moments that a kernel keeps, as a vector."""
    count, mean, var = kept.count(), *(kept.row(cpu.STATISTICS[n]) for n in ("mean", "var"))
    return torch.from_numpy(np.concatenate([count, mean, var]))
