"""The memory that front ends keep for later outputs; asks only those that are in use."""

from __future__ import annotations

import numbers
import sys
from typing import Any

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors

__all__ = ["describe_memory", "limit_memory", "release_memory"]

_HOME = "batchnorm.torch.kernels.recycling"


def release_memory() -> int:
    """Give the memory back to the system that is kept for later outputs.

    Outputs of 1 MiB and more of the PyTorch layers lie in memory that is used again once their
    tensors are freed, which saves the system the work of mapping fresh pages. What is idle is given
    back here, or by itself: the system may take it when it is short of memory.

    Returns:
        Its number of bytes.
    """
    return 0 if (recycler := _find_recycler()) is None else int(recycler.release())


@names_errors("limit_memory")
def limit_memory(limit: int | None) -> None:
    """Bound the memory that is kept for later outputs, in use or idle.

    Args:
        limit: bytes, 0 for none. None, the default: the most that was in use at once, and never
            above a quarter of the memory that is available. The variable BATCHNORM_MEMORY of the
            environment sets it from the start.

    Raises:
        TypeError: not an int.
        ValueError: negative.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, numbers.Integral)):
        raise ArgumentTypeError(f"limit must be a number of bytes or None; got {limit!r}.")
    if limit is not None and limit < 0:
        raise ArgumentValueError(f"limit must be at least 0; got {limit}.")
    from batchnorm.torch.kernels.recycling import RECYCLER

    RECYCLER.set_limit(None if limit is None else int(limit))


def describe_memory() -> str:
    """The state of recycling, for people to read."""
    recycler = _find_recycler()
    if recycler is None:
        return "recycled on Linux once batchnorm.torch is imported"
    return str(recycler)


def _find_recycler() -> Any:
    module = sys.modules.get(_HOME)
    return None if module is None else module.RECYCLER
