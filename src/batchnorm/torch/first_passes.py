"""A layer's latest forward passes, as far as a recomputation cannot see what they saw (S9)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.core.errors import ArgumentRuntimeError
from batchnorm.torch import masking

_Fingerprint = tuple[tuple[int, ...], str]


class FirstPasses:
    """Forward passes that activation checkpointing may run again.

    A recomputation can run in another thread than the first pass (always on a GPU), or after the
    block of `padding_mask` has ended: it takes the block of the first pass from here. And another
    library may have switched tracking off during the first pass, and on during the second, which
    then has to move the statistics.
    """

    _BLOCKS = 4
    _UNTRACKED = 64

    __slots__ = ("_blocks", "_served", "_tracked", "untracked")

    def __init__(self) -> None:
        self._blocks: deque[masking.Block | None] = deque(maxlen=self._BLOCKS)
        self._served = False  # a recomputation has come since the last of them
        self.untracked: deque[_Fingerprint] = deque(maxlen=self._UNTRACKED)
        self._tracked = 0  # passes since then, of other inputs

    def note_block(self, block: masking.Block | None) -> None:
        """Remember the block that a forward pass has run in."""
        if self._served:  # the steps before have had their backward pass
            self._blocks.clear()
            self._served = False
        if not self._blocks or self._blocks[-1] is not block:
            self._blocks.append(block)

    def find_block(self, here: masking.Block | None) -> masking.Block | None:
        """The block of the pass that is recomputed; `here`: the present one of this thread.

        Raises:
            ArgumentRuntimeError: there were several, with different masks.
        """
        self._served = True
        known = self._blocks
        if not known or any(block is here for block in known):
            return here
        open_still = [block for block in known if block is not None and block.active]
        found = _only(open_still) or _only(known)
        if found is None:
            raise ArgumentRuntimeError(
                "a forward pass that ran inside padding_mask is recomputed outside of it "
                "(activation checkpointing), after passes with several masks. Call backward "
                "inside the with block too, or after each forward pass."
            )
        return found[0]

    def note_untracked(self, x: Tensor) -> None:
        """Remember a pass without gradients for which tracking was off."""
        self.untracked.append(_fingerprint(x))
        self._tracked = 0

    def note_tracked(self, x: Tensor) -> None:
        """A pass that moves the statistics itself: what repeats it must not."""
        found = _fingerprint(x)
        self._tracked += 1
        if self._tracked > self._UNTRACKED:  # nothing has repeated them for long
            self.untracked.clear()
        elif found in self.untracked:
            self.untracked.remove(found)

    def take_untracked(self, x: Tensor) -> bool:
        """True, once, if the pass that is recomputed was one with tracking off."""
        if not self.untracked:
            return False
        found = _fingerprint(x)
        if found not in self.untracked:
            return False
        self.untracked.remove(found)
        return True


def _only(blocks: Sequence[masking.Block | None]) -> tuple[masking.Block | None] | None:
    """The one answer that all these blocks give, in a tuple; or None."""
    if not blocks or not all(masking.is_alike(blocks[0], other) for other in blocks):
        return None
    return (blocks[0],)


def _fingerprint(x: Tensor) -> _Fingerprint:
    """Tells inputs apart: a recomputed one has the same bits."""
    values: Any = x.values() if x.layout is torch.jagged else x
    return tuple(values.shape), values.detach().double().sum().item().hex()
