"""Masks behind strided windows: the input position that decides about each output position (S5).

A convolution or pooling gives a sample of length n, alone, `count(n)` outputs. In a padded batch
that many of its outputs are real, and no more. Along an axis with padding (low, high) output o
exists as soon as its window, from `o·stride - low` on and `reach = dilation·(window - 1)` further,
ends within the sample and its high padding: `n > o·stride + reach - low - high`. So the position
on the right decides. It is the window's last one less the high padding, the output's *anchor*. An
output is real where the input at its anchor is; for samples that are padded at their end that is
the arithmetic of their lengths, and it needs no lengths: a mask of any pattern has anchors.

Anchors before the first position, of outputs that exist even for shorter samples, are clipped to
it. So a sample without real positions has no real outputs, whatever the padding.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError


@dataclass(frozen=True)
class Anchors:
    """The anchors of the outputs along one axis: `stride·o + offset`, clipped at 0."""

    stride: int
    offset: int

    def anchor(self, output: int) -> int:
        """The input position that decides about an output position."""
        return max(output * self.stride + self.offset, 0)

    @property
    def clipped(self) -> int:
        """The number of outputs at the start whose anchors are clipped."""
        return max(-(self.offset // self.stride), 0)

    @property
    def start(self) -> int:
        """The anchor of the first output that is not clipped; `start::stride` are theirs."""
        return self.offset + self.clipped * self.stride

    def count(self, size: int) -> int:
        """The number of outputs of `size` positions, as the framework's own layers give."""
        return max((size - 1 - self.offset) // self.stride + 1, 0)


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
