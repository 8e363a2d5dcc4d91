"""Which kernel serves a call, or why none does."""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """The kernel's name, or None and the reason."""

    kernel: str | None
    reason: str


def extension_status() -> Choice:
    """Whether this installation holds compiled kernels."""
    return Choice(None, "this version of batchnorm ships no compiled kernels")


def select_kernel(device: str, dtype: str) -> Choice:
    """The kernel for inputs of this device type and dtype, both by name ("cpu", "float32")."""
    status = extension_status()
    return Choice(None, f"{status.reason} (asked for device {device}, dtype {dtype})")


def resolve_fused(owner: str, fused: bool | None, device: str, dtype: str) -> str | None:
    """The kernel to use, None for the plain path.

    Args:
        owner: whose name the error carries.
        fused: None takes the fastest path, True demands a kernel, False the plain path.
        device: device type.
        dtype: input type.

    Raises:
        ValueError: a kernel was demanded and there is none.
    """
    if fused is False:
        return None
    choice = select_kernel(device, dtype)
    if fused and choice.kernel is None:
        raise ValueError(
            f"{owner}: fused=True demands a kernel, but {choice.reason}. "
            "Use fused=None for the fastest path there is."
        )
    return choice.kernel
