"""A mask at a layer's rows: exact, flattened or turned; or by the sizes alone (S1, S5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.resolution import guess_anchors
from batchnorm.torch.masks.blocks import keep_distinct
from batchnorm.torch.masks.walks import walk_axis


class Fit(NamedTuple):
    """A mask of a layer's rows, or of a prefix of them."""

    mask: Tensor
    rank: tuple[int, int]  # the best ones have the greatest
    turned: bool = False  # rows (L, N) of a mask (N, L)


def find_fits(masks: Sequence[Tensor], rows: tuple[int, ...]) -> list[Fit]:
    """The best fits of these masks without a change of resolution, which differ; or none."""
    fits = [found for mask in masks if (found := _fit(mask, rows)) is not None]
    best = [found for found in fits if found.rank == max(other.rank for other in fits)]
    kept = keep_distinct([found.mask for found in best])
    return [next(found for found in best if found.mask is mask) for mask in kept]


def _fit(mask: Tensor, rows: tuple[int, ...]) -> Fit | None:
    sizes = tuple(mask.shape)
    if sizes == rows[: len(sizes)]:
        return Fit(mask, (2, len(sizes)))
    if mask.numel() == 0:
        return None
    for length in range(1, min(len(sizes), len(rows) + 1)):
        if _flattens(sizes, rows[:length]):
            return Fit(mask.reshape(rows[:length]), (1, length))
    if len(sizes) == 2 and rows == sizes[::-1]:
        return Fit(mask.t(), (1, 2), turned=True)
    return None


def _flattens(sizes: tuple[int, ...], goal: tuple[int, ...]) -> bool:
    """True if axes next to each other merge into those of `goal`."""
    if math.prod(sizes) != math.prod(goal):
        return False
    merged = {math.prod(sizes[:i]) for i in range(len(sizes) + 1)}
    return all(math.prod(goal[:i]) in merged for i in range(len(goal)))


_turners: WeakSet[nn.Module] = WeakSet()  # layers that have had a mask (N, L) at rows (L, N)


def check_turned(fit: Fit, layer: nn.Module | None) -> None:
    """Raise where it is unknown which of two axes is the batch's.

    A layer that has once run with the axes turned runs so every time; where both are equally long
    sizes do not tell, and the mask as it is would be wrong.
    """
    if fit.turned:
        if layer is None:
            raise ArgumentValueError(
                f"in padding_mask, the layer's rows {tuple(fit.mask.shape)} are those of the mask "
                "turned around, which is not done in compiled code. Give the mask as the layer has "
                "its rows: mask.T."
            )
        _turners.add(layer)
        return
    sizes = tuple(fit.mask.shape)
    if len(sizes) == 2 and sizes[0] == sizes[1] and layer is not None and layer in _turners:
        raise ArgumentValueError(
            f"in padding_mask, a mask of shape {sizes} may belong to the layer's rows as it is, or "
            "turned around as in its earlier calls. Pass mask= to this layer, or give a batch of "
            "another size."
        )


def carry(masks: Sequence[Tensor], rows: tuple[int, ...], rescale: str | None) -> Tensor:
    """The one of these masks that coarser rows can come from, at those rows.

    Raises:
        ArgumentValueError: none can, or several that differ there; or, without a rule, a block is
            partly padding.
    """
    reasons = [_find_reason(tuple(mask.shape), rows) for mask in masks]
    able = [mask for mask, reason in zip(masks, reasons, strict=True) if reason is None]
    if not able:
        reason = reasons[0] if len(masks) == 1 else "none of them is finer and of its batch"
        raise misfit(masks, rows, str(reason))
    found = keep_distinct([_coarsen(mask, rows, rescale) for mask in able])
    if len(found) > 1:
        raise misfit(able, rows, "several could be meant, and they differ there")
    return found[0]


def _find_reason(sizes: tuple[int, ...], rows: tuple[int, ...]) -> str | None:
    """The reason why rows of a mask of these sizes cannot become these rows, or None."""
    if sizes[0] != rows[0] or len(rows) > len(sizes):
        return "the batch axis or the number of axes differs"
    if rows[0] == 0:
        return None
    for axis, (size, goal) in enumerate(zip(sizes, rows, strict=False)):
        if goal > size:
            return f"{goal} is finer than {size} on axis {axis}, and a mask is not repeated"
        if goal == 0 < size:
            return f"{size} positions on axis {axis} do not become none"
    return None


def _coarsen(mask: Tensor, rows: tuple[int, ...], rescale: str | None) -> Tensor:
    sizes = tuple(mask.shape)
    if rows[0] == 0:
        return mask.new_zeros(rows)
    # Axes that pooling or flattening removed are one block each.
    target = (*rows, *(1,) * (len(sizes) - len(rows)))
    found = every = mask
    for axis, (size, goal) in enumerate(zip(sizes, target, strict=True)):
        if size == goal:
            continue
        if size == 0:
            raise misfit([mask], rows, f"axis {axis} has no positions")
        anchors = guess_anchors(size, goal)
        whole = rescale == "all" or (rescale is None and size % goal != 0)
        found = walk_axis(found, axis, goal, anchors._replace(every=whole))
        every = walk_axis(every, axis, goal, anchors) if rescale is None else found
    if rescale is None and not torch.equal(found, every):
        raise ArgumentValueError(
            f"in padding_mask, a mask of shape {sizes} does not carry over to a layer "
            f"with rows {rows}: some blocks are partly padding. Pad to whole blocks, or say "
            'rescale="any" or rescale="all"; or let follow=model find the real ones.'
        )
    return found.reshape(rows)


def misfit(
    masks: Sequence[Tensor], rows: tuple[int, ...], reason: str, *, followed: bool = False
) -> ArgumentValueError:
    """The error of a layer that no mask, or more than one, fits; `reason` says why."""
    shapes = [str(tuple(mask.shape)) for mask in masks]
    said = f"a mask of shape {shapes[0]} does not fit"
    if len(shapes) > 1:
        said = f"masks of shapes {', '.join(shapes)} are at hand, and none is the one for"
    size = rows[1] if len(rows) > 1 else rows[0]
    follow = "" if followed else "say follow=model, which maps masks through its convolutions; "
    return ArgumentValueError(
        f"in padding_mask, {said} a layer with rows {rows}: {reason}. Open padding_mask with a "
        f"mask of these rows, alone or in a list beside others: sequence_mask(lengths, {size}), "
        "with the lengths that the model itself computes (Hugging Face: "
        "_get_feat_extract_output_lengths, _get_subsampling_output_length); or "
        f"{follow}pass mask= to this layer, or wrap it in padding_mask(None)."
    )
