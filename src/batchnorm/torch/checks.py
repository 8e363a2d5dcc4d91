"""Checks of the torch front end's arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.errors import ArgumentRuntimeError, ArgumentTypeError, ArgumentValueError
from batchnorm.core.layout import length_value_error, mask_value_error
from batchnorm.torch.private import count_modes, find_trace, find_transformation

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Unsigned types for which torch has few operations, and the signed types that they are read as.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
_MASKS = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *_SIGNED,
)


def working_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which array code computes: float32 for half types."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_input(x: Any, name: str = "x") -> Tensor:
    """`x` if it is a dense or nested tensor of a floating type."""
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}.")
    if type(x) is not Tensor and _is_masked(x):
        raise ArgumentTypeError(
            f"{name} must be a torch.Tensor that holds its own values; got a "
            "MaskedTensor. Pass its get_data(), and its get_mask() as mask."
        )
    if x.is_quantized:
        raise ArgumentTypeError(
            f"{name} must be float16, bfloat16, float32 or float64; got quantized {x.dtype}. Put "
            "torch's layers back before the model is quantized: batchnorm.torch.revert_batchnorm."
        )
    if x.dtype not in FLOATING:
        raise ArgumentTypeError(
            f"{name} must be float16, bfloat16, float32 or float64; got {x.dtype}. "
            "Convert it first, for instance with .float()."
        )
    if x.is_nested and x.layout is not torch.jagged:
        raise ArgumentTypeError(
            f"a nested {name} must have the jagged layout; got {x.layout}. Make it with "
            "torch.nested.nested_tensor(..., layout=torch.jagged)."
        )
    if x.layout not in (torch.strided, torch.jagged):
        raise ArgumentTypeError(
            f"{name} must be a strided or jagged tensor; got layout {x.layout}. "
            "Convert it first, for instance with .to_dense()."
        )
    return x


def check_mask(mask: Any, device: torch.device | None) -> Tensor | None:
    """A mask that operations and kernels can read, on `device` if one is given; or None (S1)."""
    if mask is None:
        return None
    if (
        type(mask) is Tensor
        and mask.dtype is torch.bool
        and mask.layout is torch.strided
        and not mask.is_nested
    ):
        if device is not None and mask.device != device:
            raise _misplaced(mask, device)
        return mask
    return _check_other_mask(mask, device)


def _check_other_mask(mask: Any, device: torch.device | None) -> Tensor:
    """A mask that is not the ordinary boolean tensor."""
    if not isinstance(mask, Tensor):
        raise ArgumentTypeError(f"mask must be a torch.Tensor; got {type(mask).__name__}.")
    if not _is_dense(mask) and mask.layout is not torch.jagged:
        raise ArgumentTypeError(f"mask must be a dense or jagged tensor; got {_describe(mask)}.")
    if mask.dtype not in _MASKS:
        raise ArgumentTypeError(
            f"mask must be boolean or integer; got {mask.dtype}. "
            "Compare it with 0 first: mask != 0."
        )
    if device is not None and mask.device != device:
        raise _misplaced(mask, device)
    return mask if mask.dtype is torch.bool else _check_values(mask)


def _misplaced(mask: Tensor, device: torch.device) -> ValueError:
    return ArgumentValueError(
        f"mask must be on x's device {device}; got {mask.device}. Move it with mask.to(x.device)."
    )


def _check_values(mask: Tensor) -> Tensor:
    """An integer mask in a type that torch can read, if it holds nothing but 0 and 1 (S1)."""
    if mask.layout is torch.jagged:
        return mask  # its packed values are checked later, as a mask of their own
    signed = mask.view(_SIGNED[mask.dtype]) if mask.dtype in _SIGNED else mask
    if can_read(signed) and signed.numel() > 0:
        low, high = (a.item() for a in torch.aminmax(signed))
        if low < 0 or high > 1:
            value = low if low < 0 else high
            if value < 0 and mask.dtype in _SIGNED:
                value += 2 ** (8 * mask.element_size())
            raise mask_value_error(value)
    return signed


def check_size(size: Any) -> None:
    """Raise unless `size` is a number of positions."""
    if not isinstance(size, torch.SymInt):  # of an input that a graph does not know yet
        config.check_size(size)


def check_lengths(lengths: Any, size: int) -> Tensor:
    """`lengths` as int64, if they are integers between 0 and `size`."""
    if not isinstance(lengths, Tensor):
        raise ArgumentTypeError(f"lengths must be a torch.Tensor; got {type(lengths).__name__}.")
    if not _is_dense(lengths) or lengths.dtype not in _MASKS or lengths.dtype is torch.bool:
        raise ArgumentTypeError(
            f"lengths must be a dense tensor of integers; got {_describe(lengths)}."
        )
    wide = lengths.to(torch.int64)
    if can_read(wide) and wide.numel() > 0:
        low, high = (a.item() for a in torch.aminmax(wide))
        if low < 0 or high > size:
            value = low if low < 0 else high
            if value < 0 and lengths.dtype is torch.uint64:
                value += 2**64
            raise length_value_error(value, size)
    return wide


def can_read(a: Tensor) -> bool:
    """True if values can be read now: nothing is traced, and no device must be waited for."""
    return (
        a.is_cpu
        and type(a).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not torch.compiler.is_compiling()
        and count_modes() == 0
        and find_transformation() is None
        and find_trace() is None
    )


def to_boolean(mask: Tensor | None) -> Tensor | None:
    """`mask` as a boolean tensor."""
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def check_parameter(name: str, a: Tensor) -> None:
    """Raise unless weight or bias is a dense tensor of real numbers."""
    if not _is_dense(a) or a.is_complex() or a.is_quantized:
        raise ArgumentTypeError(
            f"{name} must be a dense tensor of real numbers; got {_describe(a)}."
        )


def check_statistic(name: str, statistic: Tensor) -> None:
    """Raise unless a running statistic is of a kind that can be updated in place."""
    if statistic.dtype not in FLOATING:
        raise ArgumentTypeError(f"{name} must be floating; got {statistic.dtype}.")
    if not _is_dense(statistic):
        raise ArgumentTypeError(f"{name} must be a dense tensor; got {_describe(statistic)}.")
    if statistic.requires_grad and statistic.is_leaf:
        raise ArgumentValueError(
            f"{name} is updated in place and must not require a gradient; got "
            "requires_grad=True. Pass it detached."
        )


def check_writable(name: str, a: Tensor) -> None:
    """Raise for an inference tensor outside of inference mode: torch writes first, then raises."""
    if a.is_inference() and not torch.is_inference_mode_enabled():
        raise ArgumentRuntimeError(
            f"{name} is updated in place, which an inference tensor cannot be outside "
            "of torch.inference_mode(). Replace it by its clone()."
        )


def check_residual(residual: Any, x: Tensor) -> None:
    """Raise unless `residual` is None or like x (S18)."""
    if residual is None:
        return
    check_input(residual, "residual")
    if residual.shape != x.shape:
        raise ArgumentValueError(
            f"residual must have x's shape {tuple(x.shape)}; got {tuple(residual.shape)}."
        )


def check_adjusted(name: str, a: Any, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A tensor of the adjustment that broadcasts against x, or None (S13)."""
    if a is None:
        return None
    tensor = torch.as_tensor(a).to(dtype).to(x.device)  # which may have no float64
    sizes = (1,) * (x.dim() - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) != x.dim() or any(m not in (1, n) for m, n in zip(sizes, x.shape, strict=True)):
        raise ArgumentValueError(
            f"the adjustment's {name} must broadcast against x of shape "
            f"{tuple(x.shape)}; got shape {tuple(tensor.shape)}."
        )
    return tensor.reshape(sizes)


def _is_dense(a: Tensor) -> bool:
    """True if `a` is strided, and neither nested nor masked."""
    return a.layout is torch.strided and not a.is_nested and not _is_masked(a)


def _is_masked(a: Tensor) -> bool:
    """True for a MaskedTensor, most of whose operations recurse without end."""
    return isinstance(a, torch.masked.MaskedTensor)


def _describe(a: Tensor) -> str:
    return f"{type(a).__name__} of type {a.dtype} and layout {a.layout}"
