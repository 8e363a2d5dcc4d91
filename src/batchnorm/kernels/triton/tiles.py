"""Tiles: the elements of memory that a tile holds, and its real positions.

A tile is some channels times some positions of a group. It has the shape in which threads run
along contiguous memory: (positions, channels) where rows of channels are contiguous, else
(channels, positions).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_program(walk):
    """The part of the channels, the block of positions and the group of this program."""
    program = tl.program_id(0)
    return (
        program % walk.parts,
        program // walk.parts % walk.blocks,
        program // walk.parts // walk.blocks,
    )


@triton.jit
def find_channels(part, walk):
    """A tile's channels, and which of them exist."""
    channels = part * walk.width + tl.arange(0, walk.width)
    valid = channels < walk.channels
    if walk.last:
        valid = tl.max_constancy(valid, walk.align)
    return channels, valid


@triton.jit
def find_positions(tile, group, walk):
    """Outer rows (64 bits) of a tile's positions, positions within the row, and if they exist.

    Numbers that do not fit into 32 bits are computed once per tile; lanes divide in 32 bits.
    """
    lanes = tl.arange(0, walk.length)
    if walk.huge:
        lanes = lanes.to(tl.int64)
    start = tl.cast(tile, tl.int64) * walk.length
    valid = lanes < walk.positions - start
    if walk.per_row == 1:
        row = start
        steps = lanes
        within = lanes * 0
    else:
        row, steps, within = divide(start, lanes, walk.inner, walk.per_row == 2)
    rows = row + steps
    if walk.grouped:
        sample, more, rest = divide(row, steps, walk.run, False)
        rows = ((sample + more) * walk.groups + group) * walk.run + rest
    if not walk.last:
        valid = tl.max_constancy(valid, walk.align)
    return rows, within, valid


@triton.jit
def divide(start, lanes, size, short: tl.constexpr):
    """start // size; quotients and remainders of start % size + lanes.

    `short`: all lanes are below size, so that no quotient is above 1.
    """
    first = start // size
    rest = (start - first * size).to(lanes.dtype) + lanes
    quotients = (rest >= size).to(lanes.dtype) if short else rest // size
    return first, quotients, rest - quotients * size


@triton.jit
def find_real(mask, rows, within, valid):
    """The real positions; without a mask all that exist (S1)."""
    if mask.data is None:
        real = valid
    else:
        entries = (rows // mask.repeat) * mask.outer + within.to(tl.int64) * mask.inner
        real = valid & (tl.load(mask.data + entries, mask=valid, other=0) != 0)
    return real


@triton.jit
def find_wanted(real, valid, walk):
    """Positions whose elements are loaded: real ones, and their neighbours in the same load.

    Where a position is a row of channels, padded rows are left out. Elsewhere neighbours share a
    load, and a mask would split it: so all of a tile is loaded, or nothing.
    """
    # Not `valid & (any > 0)`: Triton's interpreter makes integers of a bit that it repeats, and
    # takes no integers for a mask.
    return real if walk.last else tl.where(valid, tl.max(real.to(tl.int32), 0), 0) > 0


@triton.jit
def place(rows, within, stride, channels, walk):
    """Offsets of a tile's elements in an array whose outer rows are `stride` apart."""
    ahead = tl.multiple_of(rows * stride + within, walk.align)
    if walk.last:
        offsets = ahead[:, None] + channels[None, :]
    else:
        ahead = tl.max_contiguous(ahead, walk.align)
        inside = tl.multiple_of(channels.to(tl.int64) * walk.inner, walk.align)
        offsets = ahead[None, :] + inside[:, None]
    return offsets


@triton.jit
def across(a, walk):
    """One value per channel, shaped to broadcast against a tile."""
    return a[None, :] if walk.last else a[:, None]


@triton.jit
def along(a, walk):
    """One value per position, shaped to broadcast against a tile."""
    return a[:, None] if walk.last else a[None, :]


@triton.jit
def add_positions(a, walk):
    """The sum over a tile's positions, for each channel."""
    return tl.sum(a, 0) if walk.last else tl.sum(a, 1)


@triton.jit
def load_tile(a, rows, within, channels, wanted, walk):
    """Elements of an array in the type of the arithmetic, 0 where not wanted (S16)."""
    offsets = place(rows, within, a.row, channels, walk)
    return tl.load(a.data + offsets, mask=wanted, other=0.0).to(walk.wide)


@triton.jit
def store_tile(a, values, rows, within, channels, wanted, walk):
    """Write a tile to an array, rounded once to its type (S16)."""
    tl.store(a.data + place(rows, within, a.row, channels, walk), values, mask=wanted)
