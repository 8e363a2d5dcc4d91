"""Masks for layers deep inside a model whose `forward` does not pass them on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchnorm.core.errors import (
    ArgumentRuntimeError,
    ArgumentValueError,
    names_errors,
    naming,
)
from batchnorm.torch import checks
from batchnorm.torch.recompute import in_backward
from batchnorm.torch.tracing import uncaptured

__all__ = ["padding_mask", "sequence_mask"]

_OWNER = "padding_mask"
_RULES = (None, "any", "all")


@dataclass(eq=False)
class Block:
    """One `with` block; a task that outlives the block finds it inactive."""

    mask: Tensor
    rescale: str | None
    active: bool = True


def is_alike(a: Block | None, b: Block | None) -> bool:
    """True if two blocks give layers the same masks."""
    if a is None or b is None or a is b:
        return a is b
    same = a.rescale == b.rescale and a.mask.shape == b.mask.shape
    return same and a.mask.device == b.mask.device and torch.equal(a.mask, b.mask)


_current: ContextVar[Block | None] = ContextVar("batchnorm_padding_mask", default=None)


class _Usage:
    """The blocks of `padding_mask` in all threads; compilers guard on the attribute `in_use`."""

    def __init__(self) -> None:
        self.in_use = False
        self._blocks: list[Block | None] = []
        self._lock = threading.Lock()

    def enter(self, block: Block | None) -> None:
        with self._lock:
            self._blocks.append(block)
            self.in_use = True

    def leave(self, block: Block | None) -> None:
        with self._lock:
            at = next(i for i, other in enumerate(self._blocks) if other is block)
            del self._blocks[at]
            self.in_use = bool(self._blocks)

    def open_blocks(self) -> list[Block]:
        with self._lock:
            return [block for block in self._blocks if block is not None]


_usage = _Usage()


@contextmanager
def padding_mask(mask: Tensor | None, *, rescale: str | None = None) -> Iterator[None]:
    """Give `mask` to every batchnorm layer that runs inside the `with` block.

    Args:
        mask: bool, or integer with 1 at real positions and 0 at padding: `(N,)` for whole
            samples, or `(N, *spatial)` at the resolution of the model's input. None switches an
            outer `padding_mask` off.
        rescale: the rule, at a layer of coarser resolution, for a block of positions that is
            partly padding: "any" (real if one is), "all" (real if all are), or None, which raises.

    A layer's explicit `mask=` wins. At a layer whose rows differ from the mask's, each size must
    divide, or be divided by, the mask's: blocks then merge or repeat. After pooling or flattening
    the spatial axes away, whatever is left of a sample is one block. Everything else raises.
    A jagged input has no padding: it takes only a mask `(N,)` of whole samples.

    The setting belongs to the thread (or asyncio task) that made it, ends with the block even on
    an exception, nests, and works around compiled models without recompiling when values change.
    A forward pass that activation checkpointing repeats takes the mask that it had at first. Where
    a layer has run in several blocks since its last backward pass, run that inside its block.

    Raises:
        TypeError: a mask that is neither boolean nor integer.
        ValueError: a scalar mask, one of other integers, or an unknown rule; from a layer: sizes
            that do not fit, or a block of real and padded positions without a rule for it.
        RuntimeError: from a layer that is recomputed, and may have had one of several masks.

    Source: S1, S5.

    >>> from batchnorm.torch import BatchNorm1d
    >>> layer = BatchNorm1d(1, eps=0.0, affine=False)
    >>> x = torch.tensor([[[1.0, 3.0, 0.0, 0.0]]])
    >>> with padding_mask(torch.tensor([[True, True, False, False]])):
    ...     layer(x).flatten().tolist()
    [-1.0, 1.0, -2.0, -2.0]
    """
    ambient = _make_ambient(mask, rescale)
    token = _current.set(ambient)
    _usage.enter(ambient)
    try:
        yield
    finally:
        if ambient is not None:
            ambient.active = False
        _usage.leave(ambient)
        _current.reset(token)


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
    return _usage.in_use


def find_block() -> Block | None:
    """The `with` block that this thread runs in, or None."""
    ambient = _current.get()
    return ambient if ambient is not None and ambient.active else None


def mask_in(block: Block | None, x: Tensor, channel_axes: Sequence[int]) -> Tensor | None:
    """The mask that a block gives a layer with input x, in eager code; or None."""
    if block is None:
        return None
    if x.layout is torch.jagged:  # has no padding: whole samples are all that it can use
        return block.mask if block.mask.dim() == 1 else None
    return _at_resolution(block, _rows(x, channel_axes), x.device)


def traced_mask(x: Tensor, channel_axes: Sequence[int]) -> Tensor | None:
    """The mask that `padding_mask` will give a layer when the traced graph runs, or None."""
    if not _usage.in_use:
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


def _rows(x: Tensor, channel_axes: Sequence[int]) -> list[int]:
    return [n for a, n in enumerate(x.shape) if a not in channel_axes]


@uncaptured("batchnorm::ambient_mask")
def _runtime_mask(x: Tensor, rows: Sequence[int]) -> Tensor:
    # Read when the graph runs, in the thread that runs it. Without a mask there all is real.
    with naming("BatchNorm"):
        ambient = _find_block_at_runtime()
        if ambient is None:
            return torch.ones(rows, dtype=torch.bool, device=x.device)
        mask = _at_resolution(ambient, rows, x.device)
    sizes = [*mask.shape, *(1,) * (len(rows) - mask.dim())]
    return mask.reshape(sizes).expand(rows).contiguous()


@_runtime_mask.register_fake
def _(x: Tensor, rows: Sequence[int]) -> Tensor:
    return x.new_empty(rows, dtype=torch.bool)


def _find_block_at_runtime() -> Block | None:
    """The block of this thread; in a backward pass in another thread, the one that is open."""
    block = find_block()
    if block is not None or not in_backward():
        return block
    open_blocks = _usage.open_blocks()
    if not open_blocks:
        return None
    if all(is_alike(open_blocks[0], other) for other in open_blocks[1:]):
        return open_blocks[0]
    raise ArgumentRuntimeError(
        "compiled code is recomputed in another thread (activation checkpointing) while blocks of "
        "padding_mask with different masks are open. Run one of them at a time."
    )


@names_errors("padding_mask")
def _make_ambient(mask: Any, rescale: Any) -> Block | None:
    """The checked arguments of `padding_mask`; None without a mask."""
    if rescale not in _RULES:
        raise ArgumentValueError(f'rescale must be None, "any" or "all"; got {rescale!r}.')
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.layout is torch.jagged:
        raise ArgumentValueError("mask must be dense; jagged inputs need no padding mask.")
    checked = checks.to_boolean(checks.check_mask(mask, None))
    assert checked is not None
    if checked.dim() == 0:
        raise ArgumentValueError("mask must have at least the batch axis; got a scalar.")
    return Block(checked, rescale)


def _at_resolution(ambient: Block, rows: Sequence[int], device: torch.device) -> Tensor:
    """The ambient mask with the layer's row sizes, or a prefix of them."""
    mask = checks.to_boolean(checks.check_mask(ambient.mask, device))
    assert mask is not None
    sizes, wanted = tuple(mask.shape), tuple(rows)
    if len(sizes) <= len(wanted) and sizes == wanted[: len(sizes)]:
        return mask
    if sizes[0] != wanted[0] or len(wanted) > len(sizes):
        raise _misfit(sizes, wanted, "the batch axis or the number of axes differs")
    # Axes that pooling or flattening removed are one block each.
    target = (*wanted, *(1,) * (len(sizes) - len(wanted)))
    for axis, (size, goal) in enumerate(zip(sizes, target, strict=True)):
        if size == goal:
            continue
        if size == 0 or goal == 0 or (size % goal != 0 and goal % size != 0):
            raise _misfit(sizes, wanted, f"{size} and {goal} on axis {axis} do not divide")
        if goal > size:
            mask = mask.repeat_interleave(goal // size, dim=axis)
    merged = _merge_blocks(mask, target, ambient.rescale)
    if merged is None:
        raise ArgumentValueError(
            f"in padding_mask, a mask of shape {sizes} does not carry over to a layer "
            f"with rows {wanted}: some blocks are partly padding. Pad to whole blocks, or say "
            'rescale="any" or rescale="all".'
        )
    return merged.reshape(wanted)


def _merge_blocks(mask: Tensor, target: tuple[int, ...], rule: str | None) -> Tensor | None:
    """One position for each block by `rule`; None if a block is mixed and there is no rule."""
    pairs = zip(mask.shape, target, strict=True)
    split = [n for size, goal in pairs for n in (goal, size // goal if goal else 1)]
    inner = tuple(range(1, len(split), 2))
    blocks = mask.reshape(split)
    some, every = blocks.any(dim=inner), blocks.all(dim=inner)
    if rule is None and not torch.equal(some, every):
        return None
    return every if rule == "all" else some


def _misfit(sizes: tuple[int, ...], wanted: tuple[int, ...], reason: str) -> ArgumentValueError:
    return ArgumentValueError(
        f"in padding_mask, a mask of shape {sizes} does not fit a layer with rows "
        f"{wanted}: {reason}. Pad so that sizes divide, pass mask= to this layer, or wrap it in "
        "padding_mask(None)."
    )
