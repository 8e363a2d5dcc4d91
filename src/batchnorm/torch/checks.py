"""What the torch front end demands of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_input(owner: str, x: Any, name: str = "x") -> Tensor:
    """`x` if it is a dense or nested tensor of a floating type."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{owner}: {name} must be a torch.Tensor; got {type(x).__name__}.")
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{owner}: {name} must be float16, bfloat16, float32 or float64; got {x.dtype}. "
            "Convert it first, for instance with .float()."
        )
    if x.is_nested and x.layout is not torch.jagged:
        raise TypeError(
            f"{owner}: a nested {name} must have the jagged layout; got {x.layout}. Make it with "
            "torch.nested.nested_tensor(..., layout=torch.jagged)."
        )
    if x.layout not in (torch.strided, torch.jagged):
        raise TypeError(
            f"{owner}: {name} must be a strided or jagged tensor; got layout {x.layout}. "
            "Convert it first, for instance with .to_dense()."
        )
    return x


def check_mask(owner: str, mask: Any, device: torch.device | None) -> Tensor | None:
    """`mask` if it is boolean or integer, and on `device` if one is given; or None (S1)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{owner}: mask must be a torch.Tensor; got {type(mask).__name__}.")
    if mask.dtype not in _MASKS:
        raise TypeError(
            f"{owner}: mask must be boolean or integer; got {mask.dtype}. "
            "Compare it with 0 first: mask != 0."
        )
    if device is not None and mask.device != device:
        raise ValueError(
            f"{owner}: mask must be on x's device {device}; got {mask.device}. "
            "Move it with mask.to(x.device)."
        )
    return mask


def to_boolean(mask: Tensor | None) -> Tensor | None:
    """`mask` as a boolean tensor."""
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def check_statistic(owner: str, name: str, statistic: Tensor | None) -> None:
    """Raise unless a running statistic can be updated in place."""
    if statistic is None:
        return
    if statistic.dtype not in FLOATING:
        raise TypeError(f"{owner}: {name} must be floating; got {statistic.dtype}.")
    if statistic.requires_grad and statistic.is_leaf:
        raise ValueError(
            f"{owner}: {name} is updated in place and must not require a gradient; got "
            "requires_grad=True. Pass it detached."
        )


def check_residual(owner: str, residual: Any, x: Tensor) -> None:
    """Raise unless `residual` is None or like x (S18)."""
    if residual is None:
        return
    check_input(owner, residual, "residual")
    if residual.shape != x.shape:
        raise ValueError(
            f"{owner}: residual must have x's shape {tuple(x.shape)}; got {tuple(residual.shape)}."
        )


def check_adjusted(owner: str, name: str, a: Any, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A tensor of the adjustment that broadcasts against x, or None (S13)."""
    if a is None:
        return None
    tensor = torch.as_tensor(a, device=x.device).to(dtype)
    sizes = (1,) * (x.dim() - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) != x.dim() or any(m not in (1, n) for m, n in zip(sizes, x.shape, strict=True)):
        raise ValueError(
            f"{owner}: the adjustment's {name} must broadcast against x of shape "
            f"{tuple(x.shape)}; got shape {tuple(tensor.shape)}."
        )
    return tensor.reshape(sizes)
