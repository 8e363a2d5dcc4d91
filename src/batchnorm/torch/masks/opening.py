"""The arguments of `padding_mask`, checked, as a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.core.config import check_block
from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.torch import checks
from batchnorm.torch.masks.blocks import Block, find_block
from batchnorm.torch.masks.following import Following


@names_errors("padding_mask")
def open_block(mask: Any, rescale: Any, follow: Any, padded_output: Any) -> Block | None:
    """The block of these arguments, which follows the model; None if it only hides another."""
    check_block(rescale, padded_output)
    if follow is not None and not isinstance(follow, nn.Module):
        raise ArgumentTypeError(
            f"follow must be the model, a torch.nn.Module; got {type(follow).__name__}."
        )
    model = getattr(follow, "_orig_mod", follow)  # of a compiled one
    given = _check_masks(mask, model)
    around = find_block()
    if padded_output is None and around is not None:
        padded_output = around.padded_output
    masks = tuple(one for some in given.values() for one in some)
    if not masks:
        return None if padded_output is None else Block((), rescale, padded_output)
    names = tuple(name for name, some in given.items() for _ in some if name is not None)
    block = Block(masks, rescale, padded_output, names)
    if model is not None:
        follower = Following(model, given, rescale)
        follower.open()
        block.follower = follower
    return block


def _check_masks(mask: Any, model: nn.Module | None) -> dict[str | None, Sequence[Tensor]]:
    """Masks by the name of a submodule, or under None."""
    if not isinstance(mask, Mapping):
        return {None: _check_list(mask)}
    if model is None:
        raise ArgumentValueError(
            "masks by the names of submodules need follow=model, whose names they are."
        )
    for name in mask:
        _check_name(name, model)
    return {name: _check_list(some) for name, some in mask.items()}


def _check_name(name: Any, model: nn.Module) -> None:
    try:
        model.get_submodule(name)
    except (AttributeError, TypeError):
        children = [child for child, _ in model.named_children()]
        raise ArgumentValueError(
            f"the keys of a dict of masks must be names of submodules of {type(model).__name__}, "
            f'such as {", ".join(repr(child) for child in children)}, or "" for the rest; got '
            f"{name!r}."
        ) from None


def _check_list(mask: Any) -> list[Tensor]:
    """The masks of one scope, boolean."""
    if mask is None:
        return []
    if not isinstance(mask, (list, tuple)):
        return [_check_one(mask)]
    if not mask:
        raise ArgumentValueError("a list of masks must not be empty; None means no mask.")
    checked = [_check_one(one) for one in mask]
    shapes = [tuple(one.shape) for one in checked]
    twice = next((shape for i, shape in enumerate(shapes) if shape in shapes[:i]), None)
    if twice is not None:
        raise ArgumentValueError(
            f"masks of a list are told apart by their shapes; got several of shape {twice}. Name "
            "their submodules in a dict, with follow=model."
        )
    return checked


def _check_one(mask: Any) -> Tensor:
    if isinstance(mask, Tensor) and mask.layout is torch.jagged:
        raise ArgumentValueError("mask must be dense; jagged inputs need no padding mask.")
    checked = checks.to_boolean(checks.check_mask(mask, None))
    if checked is None:
        raise ArgumentTypeError("mask must be a torch.Tensor; got None in a list.")
    if checked.dim() == 0:
        raise ArgumentValueError("mask must have at least the batch axis; got a scalar.")
    return checked
