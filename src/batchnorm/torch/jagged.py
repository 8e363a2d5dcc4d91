"""Jagged nested tensors: their packed values are real rows all (S5), so no padding is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.core.layout import normalize_axis


def normalize_values(
    normalize: Any,
    x: Any,
    mask: Any,
    residual: Any,
    *,
    axis: int | tuple[int, ...],
    options: Any,
    adjustment: Any,
    owner: str,
    **rest: Any,
) -> Tensor:
    """Apply `normalize` to the values of x, and wrap the result like x.

    Args:
        normalize: the dense function.
        x: jagged, with one ragged axis.
        mask: None, jagged like x without its channel axes, or `(N,)` for whole samples.
        residual: None, or jagged like x.
        axis: of x; not the batch axis nor the ragged one.
        options: without ghost batches.
        adjustment: None.
        owner: whose name error messages carry.
        **rest: handed on.

    Raises:
        ValueError: an axis, mask, residual or option that has no meaning on packed values.
    """
    if options.virtual_batch_size is not None or adjustment is not None:
        raise ValueError(
            f"{owner}: a jagged x takes neither virtual_batch_size nor adjustment, whose shapes "
            "need a padded batch; pad x and pass mask instead."
        )
    x = _packed(x)
    ragged = x._ragged_idx
    axes = normalize_axis(owner, axis, x.dim())
    if 0 in axes or ragged in axes:
        raise ValueError(
            f"{owner}: the channel axes of a jagged x must be neither the batch axis 0 nor the "
            f"ragged axis {ragged}; got axis={axis!r}. For (N, ragged, C) use axis=-1."
        )
    y = normalize(
        x.values(),
        _mask_values(owner, mask, x),
        residual=_values_like(owner, "residual", residual, x),
        axis=tuple(a - 1 for a in axes),
        options=options,
        adjustment=None,
        owner=owner,
        **rest,
    )
    return torch.nested.nested_tensor_from_jagged(y, x.offsets(), jagged_dim=ragged)


def _mask_values(owner: str, mask: Any, x: Any) -> Any:
    if not isinstance(mask, Tensor):
        return mask
    if mask.layout is torch.jagged:
        return _values_like(owner, "mask", mask, x)
    samples = x.offsets().numel() - 1
    if tuple(mask.shape) != (samples,):
        raise ValueError(
            f"{owner}: the mask of a jagged x must be jagged like x without its channel axes, or "
            f"have shape ({samples},) for whole samples; got {tuple(mask.shape)}."
        )
    values = x.values()
    rows = torch.repeat_interleave(
        mask, x.offsets().diff(), output_size=values.shape[x._ragged_idx - 1]
    )
    return rows.reshape([-1 if a == x._ragged_idx - 1 else 1 for a in range(values.dim())])


def _values_like(owner: str, name: str, a: Any, x: Any) -> Any:
    if a is None:
        return None
    if not isinstance(a, Tensor) or a.layout is not torch.jagged:
        raise ValueError(
            f"{owner}: {name} must be jagged like x; got {type(a).__name__}"
            f"{f' of shape {tuple(a.shape)}' if isinstance(a, Tensor) else ''}."
        )
    a = _packed(a)
    if a.offsets() is not x.offsets() and not torch.equal(a.offsets(), x.offsets()):
        raise ValueError(
            f"{owner}: {name} must be ragged like x, row by row; got other row lengths."
        )
    return a.values()


def _packed(x: Any) -> Any:
    """x without the holes that a view may have between its rows."""
    return x if x.lengths() is None else x.contiguous()
