"""Reasons against kernels that are known before a call."""

from __future__ import annotations

from batchnorm.keras.call import Call
from batchnorm.keras.options import refuse_options
from batchnorm.kernels.select import extension_status

__all__ = ["refuse_apart", "refuse_calls"]


def refuse_calls(call: Call) -> str | None:
    """The reason why no kernel serves calls with these options here, or None."""
    status = extension_status()
    return status.reason if status.kernel is None else refuse_options(call)


def refuse_apart(axes: tuple[int, ...], rank: int | None) -> str | None:
    """The reason against channel axes, which a known rank has made final, or None."""
    if rank is not None and axes[-1] - axes[0] != len(axes) - 1:
        return f"channel axes {axes} are apart in memory"
    return None
