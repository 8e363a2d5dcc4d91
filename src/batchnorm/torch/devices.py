"""Devices without float64, on which two float32 take its place (S3)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["has_float64", "widen_on_host"]

# Apple's GPUs have none. Some of Intel's compute it in software, some not at all.
_NARROW = {"mps", "xpu"}


def has_float64(device: torch.device) -> bool:
    """True if code of this library may ask for float64 there where x has another type."""
    return device.type not in _NARROW


def widen_on_host(a: Tensor) -> Tensor:
    """`a` in float64: on its device, or on the host where the device has none."""
    return a.double() if has_float64(a.device) else a.cpu().double()
