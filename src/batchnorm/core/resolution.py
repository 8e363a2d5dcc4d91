"""Masks behind strided windows: the input positions that decide about each output position (S5).

A convolution or pooling gives a sample of length n, alone, `count(n)` outputs. In a padded batch
that many of its outputs are real, and no more. Along an axis with padding (low, high) output o
exists as soon as its window, from `o·stride - low` on and `reach = dilation·(window - 1)` further,
ends within the sample and its high padding: `n > o·stride + reach - low - high`. So for a sample
that is padded at its end the position on the right decides, the output's *last* anchor: the last
position of its window, after as many were taken off as the padding adds. For one that is padded at
its start it is the *first* anchor, `o·stride` by the same reasoning from the other end (that sample
has its own number of outputs if its padding is a multiple of the stride). Transposed convolutions
and resamplings have anchors of the same form, with a step that is a fraction.

An output is real if all positions from its first anchor to its last are, whatever pattern a mask
has. Where padding takes more than the window has, the last comes before the first, and one real
position between them is enough: the window exists even for shorter samples. Positions outside of
the input are not real, so that a sample of padding alone has no real outputs.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError


class Anchors(NamedTuple):
    """The anchors of output o: `floor(o·step/fine)` and `ceil((o·step + span)/fine)`.

    For windows `step` is the stride, and `fine` 1.
    """

    step: int
    span: int
    fine: int = 1
    every: bool = True  # all positions between them are real; False: at least one

    def positions(self, output: Any) -> tuple[Any, Any]:
        """The first and the last anchor of an output position, an int or an array of them."""
        place = output * self.step
        return place // self.fine, -(-(place + self.span) // self.fine)

    def count(self, size: int) -> int:
        """The number of outputs of `size` positions, as the framework's own layers give."""
        return max(((size - 1) * self.fine - self.span) // self.step + 1, 0)

    def keeps(self, size: int, goal: int) -> bool:
        """True if each output is real where its own position is."""
        return size == goal and self.step == self.fine and self.span == 0


def find_anchors(
    window: int,
    stride: int = 1,
    padding: tuple[int, int] | None = (0, 0),
    dilation: int = 1,
    *,
    ceil: bool = False,
) -> Anchors:
    """The anchors along an axis of a window of `window` positions, `dilation` apart.

    `padding` is that in front and behind. None stands for all paddings that give `ceil(n / stride)`
    outputs: "same" of all frameworks, however it is split, and "causal". `ceil`: the last window
    may reach over the end, but must begin before it.
    """
    if padding is None:
        return Anchors(stride, 0)
    span = dilation * (window - 1) - sum(padding)
    if ceil:
        span = max(span - stride + 1, -padding[0])
    return Anchors(stride, span)


def find_transposed(size: int, goal: int, stride: int) -> Anchors:
    """The anchors of a transposed convolution, whose outputs count from both ends."""
    return Anchors(1, (size - 1) * stride + 1 - goal, stride)


def find_scaled(factor: Fraction, *, every: bool = True) -> Anchors:
    """The anchors of a resampling to `factor` times the size."""
    up, down = factor.numerator, factor.denominator
    return Anchors(down, down - up, up, every)


def find_resized(size: int, goal: int, *, every: bool = True) -> Anchors:
    """The anchors of a resampling from one size to another."""
    return find_scaled(Fraction(goal, size), every=every)


def guess_anchors(size: int, goal: int) -> Anchors:
    """The anchors of windows of which only the sizes of their input and output are known.

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
    return Anchors(stride, size - 1 - (goal - 1) * stride)


def check_per_axis(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """`value`, a positive int or one for each of `rank` axes, as a tuple."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    values = tuple(value) if several else (value,) * rank
    if not all(is_int(v) for v in values):
        raise ArgumentTypeError(f"{name} must be an int or one for each axis; got {value!r}.")
    if len(values) != rank:
        raise ArgumentValueError(
            f"{name} must be an int or have one for each of the {rank} axes of the mask behind "
            f"the first; got {value!r}."
        )
    if min(values, default=1) < 1:
        raise ArgumentValueError(f"{name} must be at least 1; got {value!r}.")
    return tuple(int(v) for v in values)


def is_int(value: Any) -> bool:
    """True for integers of Python and NumPy, False for bools."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
