"""Jagged nested tensors: all their packed values are real rows (S5), so no padding is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.layout import normalize_axis
from batchnorm.torch import checks
from batchnorm.torch.call import Settings, Tensors
from batchnorm.torch.rollback import unmoved_on_failure


class _Packed(NamedTuple):
    """Values with no holes between the samples, and where each sample begins."""

    values: Tensor
    offsets: Tensor


def normalize_values(
    normalize: Callable[..., Tensor],
    tensors: Tensors,
    settings: Settings,
    training: bool,
    update: bool,
) -> Tensor:
    """Apply `normalize`, of dense tensors, to the values of x, and wrap the result like x.

    x is jagged, with one ragged axis; a mask too, like x without its channel axes, or `(N,)` for
    whole samples; a residual too, like x.

    Raises:
        ValueError: an axis, mask, residual or option that has no meaning on packed values.
    """
    x, mask, weight, bias, residual, running = tensors
    ghost = settings.options.virtual_batch_size is not None
    if training and (ghost or settings.adjustment is not None):
        raise ArgumentValueError(
            "a jagged x takes neither virtual_batch_size nor adjustment in training, "
            "whose shapes need a padded batch; pad x and pass mask instead."
        )
    axes = normalize_axis(settings.axis, x.dim())
    check_axes(axes, x)
    packed, ragged = _pack(x), x._ragged_idx  # type: ignore[attr-defined]
    if residual is not None:
        residual = _values_like("residual", residual, packed)
    written = running if update and not torch.compiler.is_compiling() else None
    with unmoved_on_failure(written):  # wrapping y may fail too
        mask = _mask_values(mask, packed, ragged)
        y = normalize(
            Tensors(packed.values, mask, weight, bias, residual, running),
            settings._replace(axis=tuple(a - 1 for a in axes), adjustment=None),
            training=training,
            update=update,
        )
        return torch.nested.nested_tensor_from_jagged(y, packed.offsets, jagged_dim=ragged)


def real_values(x: Any, mask: Any) -> tuple[Tensor, Any]:
    """The packed values of x, whose channel axes lie one earlier than in x, and their mask."""
    packed = _pack(x)
    return packed.values, _mask_values(mask, packed, x._ragged_idx)


def check_axes(axes: tuple[int, ...], x: Any) -> None:
    """Raise if a channel axis of a jagged x is its batch axis or its ragged one."""
    if 0 in axes or x._ragged_idx in axes:
        raise ArgumentValueError(
            f"the channel axes of a jagged x must be neither the batch axis 0 nor the "
            f"ragged axis {x._ragged_idx}; got axis={axes if len(axes) > 1 else axes[0]}. For "
            "(N, ragged, C) use axis=-1."
        )


def _pack(x: Any) -> _Packed:
    """The values of x; a view may have holes between its samples, which are left out.

    `contiguous` would do it too, but its backward pass fails on such views (torch 2.13).
    """
    offsets, lengths = x.offsets(), x.lengths()
    if lengths is None:
        return _Packed(x.values(), offsets)
    ends = lengths.cumsum(0)
    begins = offsets[: len(lengths)] - (ends - lengths)
    position = torch.arange(int(ends[-1]) if len(ends) else 0, device=ends.device)
    kept = position + torch.repeat_interleave(begins, lengths)
    packed = torch.cat([ends.new_zeros(1), ends])
    return _Packed(x.values().index_select(x._ragged_idx - 1, kept), packed)


def _mask_values(mask: Any, x: _Packed, ragged: int) -> Any:
    if not isinstance(mask, Tensor):
        return mask
    if mask.layout is torch.jagged:
        return _values_like("mask", mask, x)
    samples = x.offsets.numel() - 1
    if tuple(mask.shape) != (samples,):
        raise ArgumentValueError(
            f"the mask of a jagged x must be jagged like x without its channel axes, or "
            f"have shape ({samples},) for whole samples; got {tuple(mask.shape)}."
        )
    mask = checks.check_mask(mask, x.values.device)
    rows = torch.repeat_interleave(mask, x.offsets.diff(), output_size=x.values.shape[ragged - 1])
    return rows.reshape([-1 if a == ragged - 1 else 1 for a in range(x.values.dim())])


def _values_like(name: str, a: Any, x: _Packed) -> Tensor:
    if not isinstance(a, Tensor) or a.layout is not torch.jagged:
        shape = f" of shape {tuple(a.shape)}" if isinstance(a, Tensor) else ""
        raise ArgumentValueError(f"{name} must be jagged like x; got {type(a).__name__}{shape}.")
    packed = _pack(a)
    if packed.offsets is not x.offsets and not torch.equal(packed.offsets, x.offsets):
        raise ArgumentValueError(
            f"{name} must be ragged like x, sample by sample; got other lengths."
        )
    return packed.values
