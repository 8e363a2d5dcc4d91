"""Masks through windows: which output positions of a convolution or pooling are real (S5).

One rule for all of them. Output position o has two anchors among the input's positions: `first`,
by which a sample's beginning is counted, and `last`, by which its end is. For a window they are its
first and last position after as many positions were taken off as the padding adds at that end. So
a sample padded at the end has as many real outputs as the sample alone has outputs:
`floor((length + 2·padding - dilation·(kernel - 1) - 1) / stride) + 1`. In general an output is real
if all positions from first to last are; where padding takes more than the window has, so that last
comes before first, if one of those between them is.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class Walk(NamedTuple):
    """The anchors of output position o: `floor(o·step/fine)`, `ceil((o·step + span)/fine)`."""

    step: int
    fine: int
    span: int
    every: bool = True  # all positions between them are real; False: at least one

    def keeps(self, size: int, goal: int) -> bool:
        """True if each output is real where its own position is."""
        return size == goal and self.step == self.fine and self.span == 0

    def count(self, size: int) -> int:
        """The number of outputs of a sample with `size` positions."""
        return max(0, ((size - 1) * self.fine - self.span) // self.step + 1)


def window(
    kernel: int, stride: int, dilation: int, padding: tuple[int, int], *, ceil: bool = False
) -> Walk:
    """The walk of a convolution or pooling; padding before and after."""
    span = dilation * (kernel - 1) - sum(padding)
    if ceil:  # the last window may reach over the end, but must begin before it
        span = max(span - stride + 1, -padding[0])
    return Walk(stride, 1, span)


def spread(size: int, goal: int, stride: int) -> Walk:
    """The walk of a transposed convolution, whose outputs count from both ends."""
    return Walk(1, stride, (size - 1) * stride + 1 - goal)


def scale(factor: Fraction, *, every: bool = True) -> Walk:
    """The walk of a resampling to `factor` times the size."""
    return Walk(factor.denominator, factor.numerator, factor.denominator - factor.numerator, every)


def proportion(size: int, goal: int, *, every: bool = True) -> Walk:
    """The walk of a resampling from one size to another."""
    return scale(Fraction(goal, size), every=every)


def guess(size: int, goal: int) -> Walk:
    """The walk of windows of which only the sizes of their input and output are known.

    An output o is at least o strides behind the first position, and goal - 1 - o strides before
    the last. So it can be called real only if all positions from `o·stride` to
    `size - 1 - (goal - 1 - o)·stride` are real; whatever the kernel, dilation and padding were, a
    padded output is then not called real. The stride is `size / goal` where that comes out even.
    Elsewhere it is the least with which windows of at most two strides beside their padding, and a
    padding of at most half a window, give these sizes: the least calls the fewest outputs real.
    Strides one after another multiply, and the rule holds for their product.
    """
    if size % goal == 0:
        stride = size // goal
    else:
        stride = max(1, min(size // (goal + 2) + 1, size // (goal - 1)))
    return Walk(stride, 1, size - 1 - (goal - 1) * stride)


def walk_axis(mask: Tensor, axis: int, goal: int, walk: Walk) -> Tensor:
    """The mask of a walk's `goal` outputs along one axis."""
    size = mask.shape[axis]
    if walk.keeps(size, goal):
        return mask
    if size == 0 or goal == 0:
        return mask.new_zeros([*mask.shape[:axis], goal, *mask.shape[axis + 1 :]])
    o = torch.arange(goal, device=mask.device)
    first = o * walk.step // walk.fine
    last = -(-(o * walk.step + walk.span) // walk.fine)
    every = first <= last if walk.every else torch.zeros_like(o, dtype=torch.bool)
    low = torch.minimum(first, last).clamp(0, size)
    end = torch.maximum(first, last).clamp(-1, size - 1) + 1
    before = torch.nn.functional.pad(
        mask.movedim(axis, -1).cumsum(-1, dtype=torch.int32), (1, 0)
    )  # (..., size + 1), real positions before each
    real = before[..., end] - before[..., low]
    found = (real > 0) & (~every | (real == end - low))
    return found.movedim(-1, axis).contiguous()
