"""The choice of the kernel for a call, with the reason where none serves it.

On a GPU the kernels are this library's own; torch's (ATen, cuDNN) are never chosen. In training
torch's kernels subtract a mean that is one float32, and miss S3 as soon as the mean exceeds some
hundred deviations; the mean is unknown before the data has been read. They take no masks and no
groups. In evaluation they would read and write the same bytes as ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple, Protocol, TypeVar

from batchnorm.core.errors import ArgumentValueError
from batchnorm.kernels import extension
from batchnorm.kernels.kept import TYPES


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Way = TypeVar("_Way", bound=_Named)
_TRITON = (3, 7)  # 3.7 takes named tuples of arguments, and double-precision numbers


class Choice(NamedTuple):
    """The kernel's name, or None and the reason."""

    kernel: str | None
    reason: str = ""


def extension_status() -> Choice:
    """The CPU kernels of this installation, or the reason why there are none."""
    missing = extension.missing_reason()
    if missing is not None:
        return Choice(None, missing)
    return Choice("cpu", f"compiled, {extension.instructions()} instructions")


@lru_cache(maxsize=1)
def triton_status() -> Choice:
    """The GPU kernels that this installation can compile, or the reason; imports nothing."""
    needs = f"triton {_TRITON[0]}.{_TRITON[1]} or newer"
    if find_spec("triton") is None:
        return Choice(None, f"{needs} is not installed (pip install 'batchnorm[gpu]')")
    try:
        found = version("triton")
    except PackageNotFoundError:
        return Choice(None, f"the version of triton is unknown, and {needs} is needed")
    if tuple(int(part) for part in found.split(".")[:2]) < _TRITON:
        return Choice(None, f"{needs} is needed, and {found} is installed")
    return Choice("triton", f"triton {found}")


def is_interpreting() -> bool:
    """True if Triton runs kernels in its interpreter, on any device: for tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def select_kernel(
    device: str, dtype: str, *, adjusted: bool, per_channel_mask: bool, demanded: bool = False
) -> Choice:
    """The kernel for a call.

    Args:
        device: of the input, by name: "cpu", "cuda", or "hip" where torch is built for AMD and
            calls the device "cuda".
        dtype: of the input, by name ("float32").
        adjusted: whether an adjustment applies (S13).
        per_channel_mask: whether the mask differs between channels (S1 c).
        demanded: whether the caller accepts no other path (fused=True). On the CPU this selects
            the GPU's kernels where Triton interprets them.

    Returns:
        Choice: "cpu" (compiled), "triton", or None and the reason.
    """
    if device not in ("cpu", "cuda", "hip"):
        return Choice(None, f"there is none for device {device}")
    interpreted = device == "cpu" and demanded and is_interpreting()
    status = triton_status() if device != "cpu" or interpreted else extension_status()
    if status.kernel is None:
        return status
    if dtype not in TYPES:
        return Choice(None, f"there is none for {dtype}")
    if adjusted:
        return Choice(None, "none takes an adjustment")
    if per_channel_mask:
        return Choice(None, "none takes a mask that differs between channels")
    if device == "hip" and not demanded:
        return Choice(None, "no test compiles them for AMD's GPUs; use fused=True to run them")
    return Choice(status.kernel)


def find_way(
    ways: Iterable[_Way], refuse: Callable[[_Way], str | None]
) -> tuple[_Way, tuple[tuple[str, str], ...]]:
    """The first way that `refuse` has no reason against, and the names and reasons before it.

    Raises:
        ValueError: fused=True refused array code, and no kernel serves the call.
    """
    refused: list[tuple[str, str]] = []
    for way in ways:
        reason = refuse(way)
        if reason is None:
            return way, tuple(refused)
        refused.append((way.name, reason))
    raise refuse_fused(refused[0][1])


def refuse_fused(reason: str) -> ArgumentValueError:
    """The error for fused=True where no kernel serves the call."""
    return ArgumentValueError(
        f"fused=True demands a kernel, but {reason}. Use fused=None for the fastest path there is."
    )
