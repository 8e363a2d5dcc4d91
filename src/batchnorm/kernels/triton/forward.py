"""Moments and normalization on a GPU (S2-S4, S6, S7, S12, S18)."""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.core.config import NEGATIVE_SLOPE
from batchnorm.kernels.triton import channels as per_channel
from batchnorm.kernels.triton import tiles

SLOPE = tl.constexpr(NEGATIVE_SLOPE)
# A power of two, so that it rounds nothing; with it squares of 1e18 stay within float32 (S3).
SHRINK = tl.constexpr(1.0 / 16.0)
GROW = tl.constexpr(256.0)


@triton.jit
def invert(n):
    """1 / n with IEEE rounding: float32's `/` is an approximation that differs between GPUs."""
    return tl.div_rn(1.0, n) if n.dtype == tl.float32 else 1.0 / n


@triton.jit
def add_moments(x, mask, tile, group, channels, exists, walk, count, anchor, total, square):
    """Add a tile to the count and the sums of x - anchor and of its square, all in double.

    The tile is in registers, so it can be centred twice, in its own type, without memory traffic:
    only deviations from the tile's own mean are squared, which are small. The sums over tiles, in
    double, are relative to the mean of the first tile.
    """
    rows, within, valid = tiles.find_positions(tile, group, walk)
    real = tiles.find_real(mask, rows, within, valid)
    wanted = tiles.find_wanted(real, valid, walk)
    here = tiles.along(wanted, walk) & tiles.across(exists, walk)
    values = tiles.load_tile(x, rows, within, channels, here, walk)
    keep = tiles.along(real, walk)
    n = tl.sum(real.to(walk.wide), 0)
    share = invert(tl.maximum(n, 1.0))
    first = tiles.add_positions(tl.where(keep, values, 0.0), walk) * share
    d = tl.where(keep, values - tiles.across(first, walk), 0.0)
    around = tiles.add_positions(d, walk)
    step = around * share
    d = tl.where(keep, (d - tiles.across(step, walk)) * SHRINK, 0.0)
    squares = tiles.add_positions(d * d, walk)
    n, first, step = n.to(tl.float64), first.to(tl.float64), step.to(tl.float64)
    rest = around.to(tl.float64) - n * step
    anchor = tl.where(count > 0, anchor, first)
    far = (first - anchor) + step
    total += rest + n * far
    square += squares.to(tl.float64) * GROW + far * (2.0 * rest + n * far)
    return count + n, anchor, total, square


@triton.jit
def sum_moments(x, mask, block, group, channels, exists, walk):
    """The sums of `add_moments` over the tiles of a block.

    Blocks take turns along memory: all programs together read one stretch after the other. The
    last stretch is the end of x, where the next pass begins.
    """
    anchor = tl.zeros((walk.width,), tl.float64)
    total = anchor
    square = anchor
    count = tl.sum(anchor, 0)
    for tile in tl.range(block, walk.tiles, walk.blocks):
        count, anchor, total, square = add_moments(
            x, mask, tile, group, channels, exists, walk, count, anchor, total, square
        )
    return count, anchor, total, square


@triton.jit
def partial_moments(x, mask, partials, walk):
    """A block's sums. `partials`: anchors, sums and squares of each block, then its counts.

    The first part of the channels stores the counts; the other parts have the same counts.
    """
    part, block, group = tiles.find_program(walk)
    channels, exists = tiles.find_channels(part, walk)
    count, anchor, total, square = sum_moments(x, mask, block, group, channels, exists, walk)
    size = walk.groups * walk.channels
    at = partials + block * size + group * walk.channels + channels
    tl.store(at, anchor, mask=exists)
    tl.store(at + walk.blocks * size, total, mask=exists)
    tl.store(at + 2 * walk.blocks * size, square, mask=exists)
    counts = partials + 3 * walk.blocks * size
    tl.store(counts + block * walk.groups + group, count, mask=part == 0)


@triton.jit
def merge_partials(partials, kept, part, group, channels, exists, walk, depth: tl.constexpr):
    """Keep the moments of a group, from the sums of its blocks in their order."""
    size = walk.groups * walk.channels
    counts = partials + 3 * walk.blocks * size + group
    first = walk.blocks + tl.program_id(0) * 0  # a tensor, like the value that the loop assigns
    for start in tl.range(0, walk.blocks, depth):
        block = start + tl.arange(0, depth)
        n = tl.load(counts + block * walk.groups, mask=block < walk.blocks, other=0.0)
        first = tl.minimum(first, tl.min(tl.where(n > 0, block, walk.blocks), 0))
    of_group = partials + group * walk.channels + channels
    found = tl.where(exists, first, walk.blocks) < walk.blocks  # see `tiles.find_wanted`
    anchor = tl.load(of_group + first * size, mask=found, other=0.0)
    total = tl.zeros(channels.shape, tl.float64)
    square = total
    count = tl.sum(total, 0)
    for start in tl.range(0, walk.blocks, depth):
        block = start + tl.arange(0, depth)
        valid = block < walk.blocks
        n = tl.load(counts + block * walk.groups, mask=valid, other=0.0)
        here = (n > 0)[:, None] & exists[None, :]
        at = (block * size)[:, None] + of_group[None, :]
        far = tl.load(at, mask=here, other=0.0) - anchor[None, :]
        moved = tl.where(here, n[:, None] * far, 0.0)
        sums = tl.load(at + walk.blocks * size, mask=here, other=0.0)
        squares = tl.load(at + 2 * walk.blocks * size, mask=here, other=0.0)
        count += tl.sum(n, 0)
        total += tl.sum(sums + moved, 0)
        square += tl.sum(squares + tl.where(here, far * (2.0 * sums + moved), 0.0), 0)
    mean, low, var = per_channel.finish_moments(count, anchor, total, square)
    per_channel.store_moments(kept, count, mean, low, var, part, group, channels, exists, walk)


@triton.jit
def merge_moments(partials, kept, walk, width: tl.constexpr, depth: tl.constexpr):
    """The moments of every group from the sums of its blocks."""
    parts = tl.cdiv(walk.channels, width)
    part, group = tl.program_id(0) % parts, tl.program_id(0) // parts
    channels = part * width + tl.arange(0, width)
    merge_partials(partials, kept, part, group, channels, channels < walk.channels, walk, depth)


@triton.jit
def finish_channels(
    partials,
    kept,
    flags,
    parameters,
    running,
    walk,
    eps: tl.float64,
    decay: tl.float64,
    renorm_decay: tl.float64,
    rmin: tl.float64,
    rmax: tl.float64,
    dmax: tl.float64,
    task,
    width: tl.constexpr,
    depth: tl.constexpr,
):
    """Running statistics and coefficients, from the moments in `kept`.

    With a single group, `partials` may be given: the moments are merged from them first.
    """
    rates = (eps, decay, renorm_decay, rmin, rmax, dmax)
    part = tl.program_id(0)
    channels = part * width + tl.arange(0, width)
    exists = channels < walk.channels
    if partials is not None:
        merge_partials(partials, kept, part, 0, channels, exists, walk, depth)
        tl.debug_barrier()  # other threads of this program read them
        per_channel.finish_groups(
            kept, flags, parameters, running, part, channels, exists, walk, rates, task, 1
        )
    else:
        per_channel.finish_groups(
            kept, flags, parameters, running, 0, channels, exists, walk, rates, task, depth
        )


@triton.jit
def activate(y, task):
    """`y <= 0` rather than `y > 0`, so that NaN stays NaN; 0 is on the negative side (S18)."""
    if task.activation == 1:
        y = tl.where(y <= 0, 0.0, y)
    elif task.activation == 2:
        y = tl.where(y <= 0, y * SLOPE, y)
    return y


@triton.jit
def normalize_tile(x, residual, y, mask, coefficients, tile, group, channels, exists, walk, task):
    """y of a tile, padded positions included (S4)."""
    hi, lo, scale, offset = coefficients
    rows, within, valid = tiles.find_positions(tile, group, walk)
    every = tiles.along(valid, walk) & tiles.across(exists, walk)
    here = every
    if task.zero_padding:
        real = tiles.find_real(mask, rows, within, valid)
        here = tiles.along(tiles.find_wanted(real, valid, walk), walk) & every
    d = tiles.load_tile(x, rows, within, channels, here, walk) - tiles.across(hi, walk)
    d = d - tiles.across(lo, walk)
    out = d * tiles.across(scale, walk) + tiles.across(offset, walk)
    if residual.data is not None:
        out = out + tiles.load_tile(residual, rows, within, channels, here, walk)
    out = activate(out, task)
    if task.zero_padding:
        out = tl.where(tiles.along(real, walk), out, 0.0)
    tiles.store_tile(y, out, rows, within, channels, every, walk)


@triton.jit
def normalize(x, residual, y, mask, kept, parameters, running, walk, eps: tl.float64, task):
    """y from the coefficients of `finish_channels` or, in evaluation, from running statistics.

    Programs start at the end of x, which the sums have read last: the part of it that is still in
    the L2 cache need not come from memory again.
    """
    part, block, group = tiles.find_program(walk)
    channels, exists = tiles.find_channels(part, walk)
    if task.batch:
        coefficients = per_channel.load_coefficients(kept, group, channels, exists, walk)
    else:
        coefficients = per_channel.keep_running(
            kept, parameters, running, channels, exists, walk, eps, block
        )
    first = (walk.blocks - 1 - block) * walk.together
    for tile in tl.range(first, tl.minimum(first + walk.together, walk.tiles)):
        normalize_tile(
            x, residual, y, mask, coefficients, tile, group, channels, exists, walk, task
        )


@triton.jit
def forward_whole(
    x,
    mask,
    residual,
    y,
    kept,
    flags,
    parameters,
    running,
    walk,
    eps: tl.float64,
    decay: tl.float64,
    renorm_decay: tl.float64,
    rmin: tl.float64,
    rmax: tl.float64,
    dmax: tl.float64,
    task,
    depth: tl.constexpr,
):
    """A step in one launch: each program does a whole step for its channels.

    The second time, tiles are taken from the last to the first, as in `normalize`.
    """
    rates = (eps, decay, renorm_decay, rmin, rmax, dmax)
    part = tl.program_id(0)
    channels, exists = tiles.find_channels(part, walk)
    for group in tl.range(0, walk.groups):
        count, anchor, total, square = sum_moments(x, mask, 0, group, channels, exists, walk)
        mean, low, var = per_channel.finish_moments(count, anchor, total, square)
        per_channel.store_moments(kept, count, mean, low, var, part, group, channels, exists, walk)
    tl.debug_barrier()  # other threads of this program read them
    per_channel.finish_groups(
        kept, flags, parameters, running, part, channels, exists, walk, rates, task, depth
    )
    tl.debug_barrier()
    for later in tl.range(0, walk.groups):
        group = walk.groups - 1 - later
        coefficients = per_channel.load_coefficients(kept, group, channels, exists, walk)
        for step in tl.range(0, walk.tiles):
            tile = walk.tiles - 1 - step
            normalize_tile(
                x, residual, y, mask, coefficients, tile, group, channels, exists, walk, task
            )
