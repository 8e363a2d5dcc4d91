"""Masks behind strided windows: the input positions that decide about each output position (S5).

A convolution or pooling gives a sample of length n, alone, `count(n)` outputs. In a padded batch
that many of its outputs are real, and no more. Along an axis with padding (low, high) output o
exists as soon as its window, from `o·stride - low` on and `reach = dilation·(window - 1)` further,
ends within the sample and its high padding: `n > o·stride + reach - low - high`. So for a sample
that is padded at its end the position on the right decides, the output's *last* anchor: the last
position of its window, after as many were taken off as the padding adds. For one that is padded at
its start it is the *first* anchor, `o·stride` by the same reasoning from the other end (that sample
has its own number of outputs if its padding is a multiple of the stride).

An output is real if all positions from its first anchor to its last are, whatever pattern a mask
has. Where padding takes more than the window has, the last comes before the first, and one real
position between them is enough: the window exists even for shorter samples. Positions outside of
the input are not real, so that a sample of padding alone has no real outputs.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError


@dataclass(frozen=True)
class Anchors:
    """The anchors of the outputs along one axis: `stride·o` and `stride·o + span`."""

    stride: int
    span: int

    def positions(self, output: int) -> tuple[int, int]:
        """The first and the last anchor of an output position."""
        first = output * self.stride
        return first, first + self.span

    def count(self, size: int) -> int:
        """The number of outputs of `size` positions, as the framework's own layers give."""
        return max((size - 1 - self.span) // self.stride + 1, 0)


def find_anchors(
    window: int, stride: int = 1, padding: tuple[int, int] | None = (0, 0), dilation: int = 1
) -> Anchors:
    """The anchors along an axis of a window of `window` positions, `dilation` apart.

    `padding` is that in front and behind. None stands for all paddings that give `ceil(n / stride)`
    outputs: "same" of all frameworks, however it is split, and "causal".
    """
    if padding is None:
        return Anchors(stride, 0)
    return Anchors(stride, dilation * (window - 1) - sum(padding))


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
