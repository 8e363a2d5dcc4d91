"""The cut of the passes into tiles and programs.

The cut depends on shapes alone, so that the order of sums, and the bits of a result, do too. None
of these numbers has been tuned on a GPU. Their reasons:

- A tile is 16 KiB of x. A multiprocessor holds some four to eight programs of that size, and so
  has several times the bytes in flight that cover the latency of its share of the memory.
- 32 registers of tile data a thread leave room for addresses and sums without spilling.
- Rows of channels are read 256 bytes wide, two full requests of a warp at 16 bytes a thread for
  each pair of rows; fewer channels a tile would read parts of rows, more would leave fewer rows
  to add up in registers before threads exchange sums.
- Positions of one channel are read 2048 long where a row has as many, since sums over positions
  cross threads, which costs less for longer tiles. Where rows are short, channels are
  added to the tile, so that the division that finds a position's row serves several of them.
- A sum runs in 512 programs: about four on each of the 100 to 150 multiprocessors of a large
  card, all resident at once, and few enough partial sums. A number that depends on the card
  would make the bits depend on the card.
- Elementwise programs take up to eight tiles, so that loading coefficients costs little.
- Up to four tiles are read twice by one program rather than split: two launches fewer save more
  time than four dependent loads cost.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from batchnorm.kernels.geometry import Sizes


class Limits(NamedTuple):
    """The numbers above."""

    tile: int = 1 << 14  # bytes of x
    row: int = 256  # bytes of channels
    stretch: int = 2048  # positions of a channel, where rows are as long
    short_stretch: int = 512  # where they are not
    programs: int = 512  # of a sum
    together: int = 8  # tiles of an elementwise program
    whole: int = 4  # tiles, for all groups, of a step in one launch
    merged: int = 2048  # partial sums that a program adds up at a time


LIMITS = Limits()


class Tiling(NamedTuple):
    """A cut of one shape.

    Attributes:
        width, length: channels and positions of a tile, powers of two.
        parts: tiles along the channels.
        tiles: tiles along the positions of a group.
        blocks: programs that a sum over these tiles is split into.
        together: tiles of an elementwise program.
        whole: true if one program does a whole step for its channels.
        warps: threads of a program, in units of 32.
    """

    width: int
    length: int
    parts: int
    tiles: int
    blocks: int
    together: int
    whole: bool
    warps: int


@lru_cache(maxsize=4096)
def find_tiling(sizes: Sizes, bytes_each: int, limits: Limits) -> Tiling:
    """The cut for arrays of these sizes, with `bytes_each` bytes per element."""
    positions = count_positions(sizes)
    elements = limits.tile // bytes_each
    if sizes.inner == 1:
        width = min(power_above(sizes.channels), limits.row // bytes_each)
        length = min(power_above(positions), elements // width)
    else:
        long = sizes.inner >= limits.stretch
        length = min(power_above(positions), limits.stretch if long else limits.short_stretch)
        width = min(power_above(sizes.channels), max(1, elements // length))
    parts, tiles = divide_up(sizes.channels, width), divide_up(positions, length)
    groups = max(sizes.groups, 1)
    programs = max(1, limits.programs // max(1, parts * groups))
    wide = max(4, bytes_each)  # of the arithmetic
    return Tiling(
        width,
        length,
        parts,
        tiles,
        blocks=max(1, min(tiles, programs)),
        together=max(1, min(limits.together, tiles * parts * groups // (4 * limits.programs))),
        whole=groups * tiles <= limits.whole,
        warps=max(1, min(8, width * length * wide // 4096)),
    )


def find_alignment(sizes: Sizes, tiling: Tiling, rows: tuple[int, ...]) -> int:
    """Elements, up to 16, that lie together and aligned in arrays with these row distances."""
    if sizes.inner == 1:
        return math.gcd(16, sizes.channels, tiling.width, *rows)
    return math.gcd(16, sizes.inner, tiling.length, *rows)


def find_merging(channels: int, terms: int) -> tuple[int, int]:
    """Channels, and partial sums of each, that a merging program holds at a time."""
    depth = find_depth(terms, 8)
    return min(power_above(channels), 64, max(8, LIMITS.merged // depth // 4)), depth


def find_depth(terms: int, width: int) -> int:
    """Partial sums of each of `width` channels that a program holds at a time."""
    return min(power_above(terms), max(1, LIMITS.merged // width))


def count_positions(sizes: Sizes) -> int:
    """The positions of one group, padding included."""
    return sizes.outer // max(sizes.groups, 1) * sizes.inner


def power_above(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def divide_up(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
