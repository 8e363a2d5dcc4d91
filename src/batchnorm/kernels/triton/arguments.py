"""Arguments of kernels: named tuples of tensors, sizes, and constants that are compiled in."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from batchnorm.core.config import Options
from batchnorm.kernels.geometry import Sizes
from batchnorm.kernels.kept import STATISTICS
from batchnorm.kernels.triton import tiling
from batchnorm.kernels.triton.tiling import Tiling

ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2}
FAR = 1 << 30  # sizes from which 32 bits might not hold a size plus a tile


class Array(NamedTuple):
    """A tensor, or None, and the distance between its outer rows."""

    data: Tensor | None
    row: int = 0


class Mask(NamedTuple):
    """A mask, or None, and its view: see `batchnorm.kernels.geometry.MaskView`."""

    data: Tensor | None
    repeat: int = 1
    outer: int = 0
    inner: int = 0


class Parameters(NamedTuple):
    """gamma and beta, or their gradients, each contiguous or None."""

    gamma: Tensor | None
    beta: Tensor | None


class Walk(NamedTuple):
    """The order in which programs walk over arrays; `tl.constexpr` fields are compiled in."""

    positions: int  # of a group
    channels: int
    inner: int
    run: int
    groups: int
    parts: int
    tiles: int
    blocks: int
    together: int
    width: tl.constexpr
    length: tl.constexpr
    last: tl.constexpr  # rows of channels are contiguous
    per_row: tl.constexpr  # positions in a row: 1: one; 2: at least a tile's; 3: fewer
    grouped: tl.constexpr
    align: tl.constexpr
    huge: tl.constexpr
    wide: tl.constexpr  # the type of the arithmetic


class Task(NamedTuple):
    """The choices of a step; all of them are compiled in."""

    batch: tl.constexpr
    update: tl.constexpr
    renorm: tl.constexpr
    unbiased: tl.constexpr
    cumulative: tl.constexpr
    debias: tl.constexpr
    activation: tl.constexpr
    zero_padding: tl.constexpr  # only where there is a mask


class Kept(NamedTuple):
    """The results of a forward step for its backward step: see `channels`."""

    data: Tensor
    size: int  # of a row
    groups: int
    renorm: bool = False  # whether r and d are there

    def row(self, name: str) -> Tensor:
        """One of STATISTICS: a value for each group and channel."""
        begin = STATISTICS[name] * self.size
        return self.data[begin : begin + self.size]

    def counts(self) -> Tensor:
        """Real rows of each group, as the first part of the channels has stored them."""
        begin = len(STATISTICS) * self.size
        return self.data[begin : begin + self.groups]


def make_walk(
    sizes: Sizes,
    cut: Tiling,
    blocks: int,
    together: int,
    rows: tuple[int, ...],
    wide: tl.dtype,
) -> Walk:
    """The walk over arrays with these row distances; `wide`: type of the arithmetic."""
    per_row = 1
    if sizes.inner > 1:
        per_row = 2 if cut.length <= sizes.inner else 3
    constants = (
        cut.width,
        cut.length,
        sizes.inner == 1,
        per_row,
        sizes.groups > 1,
        tiling.find_alignment(sizes, cut, rows),
        max(sizes.inner, sizes.run) >= FAR,
        wide,
    )
    return Walk(
        tiling.count_positions(sizes),
        sizes.channels,
        sizes.inner,
        sizes.run,
        sizes.groups,
        cut.parts,
        cut.tiles,
        blocks,
        together,
        *(tl.constexpr(value) for value in constants),
    )


def make_task(options: Options, batch: bool, update: bool, running: bool, masked: bool) -> Task:
    """The choices of a step.

    `running`: there are running statistics to compare with; `masked`: there is a mask.
    """
    renorm = options.renorm is not None and batch and running
    return _cached_task(
        batch,
        update,
        renorm,
        options.unbiased,
        update and options.decay is None,
        update and options.debias,
        ACTIVATIONS[options.activation],
        masked and options.zero_padding,
    )


@lru_cache(maxsize=256)
def _cached_task(*values: bool | int) -> Task:
    return Task(*(tl.constexpr(value) for value in values))


def rates_of(options: Options) -> tuple[float, ...]:
    """eps, decay, renormalization's decay, rmin, rmax, dmax."""
    renorm = options.renorm
    decay = 0.0 if options.decay is None else float(options.decay)
    if renorm is None:
        return (float(options.eps), decay, 0.0, 0.0, math.inf, math.inf)
    return (float(options.eps), decay, renorm.decay, renorm.rmin, renorm.rmax, renorm.dmax)
