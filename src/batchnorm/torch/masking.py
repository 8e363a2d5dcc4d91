"""Masks for layers deep inside a model whose `forward` does not pass them on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.core.errors import (
    ArgumentRuntimeError,
    ArgumentValueError,
    names_errors,
    naming,
)
from batchnorm.torch import checks
from batchnorm.torch.masks.blocks import Block, current, find_block, is_alike, usage
from batchnorm.torch.masks.opening import open_block
from batchnorm.torch.masks.resolutions import carry, check_turned, find_fits, misfit
from batchnorm.torch.recompute import in_backward
from batchnorm.torch.tracing import uncaptured

__all__ = ["padding_mask", "sequence_mask"]


@contextmanager
def padding_mask(
    mask: Tensor | Sequence[Tensor] | Mapping[str, Any] | None,
    *,
    rescale: str | None = None,
    follow: nn.Module | None = None,
    padded_output: str | None = None,
) -> Iterator[None]:
    """Give `mask` to every batchnorm layer that runs inside the `with` block.

    Args:
        mask: bool, or integer with 1 at real positions and 0 at padding: `(N,)` for whole
            samples, or `(N, *spatial)`. A list of masks of different shapes serves layers of
            different resolutions. With `follow`, a dict has masks (a mask, a list, or None for
            none) by the names of the model's submodules, the innermost name counting. None
            switches an outer `padding_mask` off.
        rescale: the rule, at a layer of coarser resolution, for a block of positions that is
            partly padding: "any" (real if one is), "all" (real if all are), or None, which raises.
        follow: the model; masks are then mapped through its convolutions, poolings, paddings and
            resamplings (torch's modules, not calls of `torch.nn.functional`) as these run.
        padded_output: "normalize" or "zero": the value of padded rows (S4) for all layers inside;
            None leaves it to the block around, or else to each layer.

    A layer's explicit `mask=` wins. A layer takes the mask that has its rows, all of them or, as
    with `(N,)`, the first axes. A mask's axes may be flattened in the layer's rows, `(N, L)` to
    `(N·L,)`, in this order. Rows `(L, N)` take a mask `(N, L)` turned, in eager code; if a layer
    that has had such rows comes with N = L, it raises.

    Without `follow`, a coarser layer's mask is made from the sizes alone. Where a size divides the
    mask's, a position stands for one block. Elsewhere, with windows of at most two strides beside
    their padding, an output is real only if all positions that it may stand for are (any of them
    with `rescale="any"`): those at least as many strides from the first and the last position as it
    is from the first and last output. So padded positions never count as real; masks of samples
    padded at the end follow the lengths' own arithmetic, 401 positions to 201 at stride 2. After
    pooling or flattening the spatial axes away, whatever is left of a sample is one block. A finer
    layer never repeats a mask. Everything else raises.

    With `follow` masks are exact: a sample has as many real positions as the layer would have rows
    for the sample alone, `floor((length + 2·padding - dilation·(kernel - 1) - 1)/stride) + 1`
    behind a convolution. An output is real if all positions of its window are, less as many at
    each end as the padding adds there; of an adaptive pooling, if one is. A layer straight behind
    such modules, or behind those that keep shapes, takes the mask by data flow, others by sizes. If
    branches with different masks meet, `rescale` decides, and None raises. Compiled models run as
    eager code inside the block, in all threads; masks in a list keep them compiled.

    A jagged input has no padding: it takes only a mask `(N,)` of whole samples.

    The setting belongs to the thread (or asyncio task) that made it, ends with the block even on
    an exception, nests, and works around compiled models without recompiling when values change.
    A forward pass that activation checkpointing repeats takes the mask that it had at first. Where
    a layer is compiled, or has run in several blocks since its last backward pass, run that inside
    its block.

    Raises:
        TypeError: a mask that is neither boolean nor integer; a `follow` that is no module.
        ValueError: a scalar mask, one of other integers, two of one shape, unknown rules or names;
            from a layer: no mask that fits, or several, or a block of real and padded positions
            without a rule for it.
        RuntimeError: `follow` inside a compiled function; from a layer that is recomputed, and may
            have had one of several masks.

    Source: S1, S4, S5.

    >>> from batchnorm.torch import BatchNorm1d
    >>> layer = BatchNorm1d(1, eps=0.0, affine=False)
    >>> x = torch.tensor([[[1.0, 3.0, 0.0, 0.0]]])
    >>> with padding_mask(torch.tensor([[True, True, False, False]])):
    ...     layer(x).flatten().tolist()
    [-1.0, 1.0, -2.0, -2.0]
    """
    block = open_block(mask, rescale, follow, padded_output)
    token = current.set(block)
    usage.enter(block)
    try:
        yield
    finally:
        if block is not None:
            block.active = False
            if block.follower is not None:
                block.follower.close()
        usage.leave(block)
        current.reset(token)


@names_errors("sequence_mask")
def sequence_mask(lengths: Tensor, size: int) -> Tensor:
    """Mark the first `lengths` of `size` positions, as masks of samples padded at the end do.

    Args:
        lengths: of any integer type and any shape `(...)`, each between 0 and `size`; `(N,)` for
            a batch of sequences.
        size: number of positions, at least 0.

    Returns:
        bool of shape `(..., size)` on the device of `lengths`, True at positions below the length.

    Raises:
        TypeError: lengths that are no tensor of integers, or a size that is no int.
        ValueError: a negative size; a length that is not between 0 and `size`, where values can
            be read at once: in traced code and on a GPU such lengths count as 0 or `size`.

    Source: S1.

    >>> sequence_mask(torch.tensor([1, 3]), 3).int().tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    checks.check_size(size)
    wide = checks.check_lengths(lengths, size)
    return torch.arange(size, device=wide.device) < wide.unsqueeze(-1)


def in_use() -> bool:
    """True if any thread is inside `padding_mask`."""
    return usage.in_use


def mask_in(
    block: Block | None, x: Tensor, channel_axes: Sequence[int], layer: nn.Module | None = None
) -> Tensor | None:
    """The mask that a block gives a layer with input x, in eager code; or None."""
    if block is None or not block.masks:
        return None
    if x.layout is torch.jagged:  # has no padding: whole samples are all that it can use
        given = block.masks if block.follower is None else block.follower.list_given(layer)
        whole = [mask for mask in given if mask.dim() == 1]
        fitting = [mask for mask in whole if mask.shape[0] == x.shape[0]]
        return next(iter(fitting or whole), None)
    return _find_mask(block, x, _rows(x, channel_axes), layer)


def traced_mask(x: Tensor, channel_axes: Sequence[int]) -> Tensor | None:
    """The mask that `padding_mask` will give a layer when the traced graph runs, or None."""
    if not usage.in_use:
        return None
    if x.layout is torch.jagged:
        raise ArgumentValueError(
            "padding_mask does not reach a jagged input in compiled code; pass mask= to "
            "the layer, or compile outside of padding_mask."
        )
    if torch.compiler.is_exporting():
        raise ArgumentValueError(
            "padding_mask cannot be exported; pass mask= explicitly, as an input."
        )
    return _runtime_mask(x.detach(), _rows(x, channel_axes))


def padded_output_in(block: Block | None) -> str | None:
    """The value of padded rows that a block sets for all layers inside, or None (S4)."""
    return None if block is None else block.padded_output


def traced_zeroing(x: Tensor, own: str) -> Tensor | bool:
    """True where padded rows of y are zero, in traced code; `own`: the layer's `padded_output`.

    Without a block that sets `padded_output` the answer is the layer's own, when the graph is
    made; a graph is made anew where such a block is open for the first time. Then the answer is
    data, a 0-d boolean tensor on x's device: each thread that runs the graph has its own block.
    """
    if not usage.sets_output:
        return own == "zero"
    if torch.compiler.is_exporting():
        raise ArgumentValueError(
            "padded_output of padding_mask cannot be exported; set the layers' own."
        )
    return _runtime_zeroing(x.detach(), own)


def _rows(x: Tensor, channel_axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for a, n in enumerate(x.shape) if a not in channel_axes)


def _find_mask(
    block: Block, x: Tensor, rows: tuple[int, ...], layer: nn.Module | None
) -> Tensor | None:
    """The mask of a layer's rows, or of a prefix of them."""
    for mask in block.masks:
        checks.check_mask(mask, x.device)
    if block.follower is not None:
        return block.follower.find_mask(layer, x, rows)
    fits = find_fits(block.masks, rows)
    if not fits:
        return carry(block.masks, rows, block.rescale)
    if len(fits) > 1:
        raise misfit([fit.mask for fit in fits], rows, "several fit it")
    check_turned(fits[0], layer)
    return fits[0].mask


@uncaptured("batchnorm::ambient_mask")
def _runtime_mask(x: Tensor, rows: Sequence[int]) -> Tensor:
    # Read when the graph runs, in the thread that runs it. Without a mask there all is real.
    with naming("BatchNorm"):
        block = _find_block_at_runtime()
        if block is not None and block.follower is not None:
            raise ArgumentRuntimeError(
                "follow= of padding_mask does not reach compiled code. Give a list of masks at the "
                "resolutions of its layers."
            )
        if block is None or not block.masks:
            return torch.ones(rows, dtype=torch.bool, device=x.device)
        mask = _find_mask(block, x, tuple(rows), None)
    assert mask is not None
    sizes = [*mask.shape, *(1,) * (len(rows) - mask.dim())]
    return mask.reshape(sizes).expand(rows).clone()


@_runtime_mask.register_fake
def _(x: Tensor, rows: Sequence[int]) -> Tensor:
    return x.new_empty(rows, dtype=torch.bool)


@uncaptured("batchnorm::ambient_zeroing")
def _runtime_zeroing(x: Tensor, own: str) -> Tensor:
    with naming("BatchNorm"):
        said = padded_output_in(_find_block_at_runtime())
    return torch.full((), (said or own) == "zero", dtype=torch.bool, device=x.device)


@_runtime_zeroing.register_fake
def _(x: Tensor, own: str) -> Tensor:
    return x.new_empty((), dtype=torch.bool)


def _find_block_at_runtime() -> Block | None:
    """The block of this thread; in a backward pass in another thread, the one that is open."""
    block = find_block()
    if block is not None or not in_backward():
        return block
    open_blocks = usage.open_blocks()
    if not open_blocks:
        return None
    if all(is_alike(open_blocks[0], other) for other in open_blocks[1:]):
        return open_blocks[0]
    raise ArgumentRuntimeError(
        "compiled code is recomputed in another thread (activation checkpointing) while blocks of "
        "padding_mask with different masks are open. Run one of them at a time."
    )
