"""The `with` blocks of `padding_mask`, and the one that a thread runs in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Follower(Protocol):
    """Finds the masks of a block that follows a model."""

    model: nn.Module

    def find_mask(self, layer: nn.Module | None, x: Tensor, rows: tuple[int, ...]) -> Tensor | None:
        """The mask of a layer with this input; None for a layer that is named to have none."""

    def list_given(self, layer: nn.Module | None) -> Sequence[Tensor]:
        """The masks that were given for a layer."""

    def close(self) -> None:
        """Stop following; masks stay for recomputations."""


@dataclass(eq=False)
class Block:
    """One `with` block; a task that outlives the block finds it inactive."""

    masks: tuple[Tensor, ...]  # as they were given
    rescale: str | None
    padded_output: str | None = None
    names: tuple[str, ...] = ()  # of each mask's submodule, where masks are told apart by name
    follower: Follower | None = None
    active: bool = True


def is_alike(a: Block | None, b: Block | None) -> bool:
    """True if two blocks give layers the same masks, and say the same of padded rows."""
    if a is None or b is None or a is b:
        return a is b
    models = [None if block.follower is None else block.follower.model for block in (a, b)]
    return (
        a.rescale == b.rescale
        and a.padded_output == b.padded_output
        and a.names == b.names
        and models[0] is models[1]
        and len(a.masks) == len(b.masks)
        and all(are_equal(one, other) for one, other in zip(a.masks, b.masks, strict=True))
    )


def are_equal(a: Tensor, b: Tensor) -> bool:
    """True if two masks mark the same positions."""
    return a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))


def keep_distinct(masks: Sequence[Tensor]) -> list[Tensor]:
    """The first of each set of equal masks."""
    kept: list[Tensor] = []
    for mask in masks:
        if not any(are_equal(mask, other) for other in kept):
            kept.append(mask)
    return kept


current: ContextVar[Block | None] = ContextVar("batchnorm_padding_mask", default=None)


def find_block() -> Block | None:
    """The `with` block that this thread runs in, or None."""
    block = current.get()
    return block if block is not None and block.active else None


class Usage:
    """The blocks of `padding_mask` in all threads; compilers guard on its attributes."""

    def __init__(self) -> None:
        self.in_use = False
        self.sets_output = False  # one of them says what padded rows hold
        self._blocks: list[Block | None] = []
        self._lock = threading.Lock()

    def enter(self, block: Block | None) -> None:
        """Count a block that is opened; None: one without any effect but to hide another."""
        with self._lock:
            self._blocks.append(block)
            self._refresh()

    def leave(self, block: Block | None) -> None:
        """Count a block that has ended."""
        with self._lock:
            at = next(i for i, other in enumerate(self._blocks) if other is block)
            del self._blocks[at]
            self._refresh()

    def _refresh(self) -> None:
        self.in_use = bool(self._blocks)
        self.sets_output = any(b is not None and b.padded_output is not None for b in self._blocks)

    def open_blocks(self) -> list[Block]:
        """The blocks that are open in any thread."""
        with self._lock:
            return [block for block in self._blocks if block is not None]


usage = Usage()
