"""Which kernel serves a call, or why none does."""

from __future__ import annotations

from typing import NamedTuple

from batchnorm.kernels import cpu


class Choice(NamedTuple):
    """The kernel's name, or None and the reason."""

    kernel: str | None
    reason: str = ""


def extension_status() -> Choice:
    """Whether this installation holds compiled kernels."""
    missing = cpu.missing_reason()
    if missing is not None:
        return Choice(None, missing)
    return Choice("cpu", f"compiled, {cpu.instructions()} instructions")


def select_kernel(device: str, dtype: str, *, adjusted: bool, per_channel_mask: bool) -> Choice:
    """The kernel for a call.

    Args:
        device: of the input, by name ("cpu").
        dtype: of the input, by name ("float32").
        adjusted: whether an adjustment applies (S13).
        per_channel_mask: whether the mask differs between channels (S1 c).
    """
    status = extension_status()
    if status.kernel is None:
        return status
    if device != "cpu":
        return Choice(None, f"there is none for device {device}")
    if dtype not in cpu.TYPES:
        return Choice(None, f"there is none for {dtype}")
    if adjusted:
        return Choice(None, "none takes an adjustment")
    if per_channel_mask:
        return Choice(None, "none takes a mask that differs between channels")
    return Choice("cpu")


def refuse_fused(owner: str, reason: str) -> ValueError:
    """The error for fused=True where no kernel serves the call."""
    return ValueError(
        f"{owner}: fused=True demands a kernel, but {reason}. "
        "Use fused=None for the fastest path there is."
    )
