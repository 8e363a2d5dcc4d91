"""Gradient reduction and gradient application on a GPU (S8, S18)."""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.triton import channels as per_channel
from batchnorm.kernels.triton import tiles
from batchnorm.kernels.triton.forward import SLOPE


@triton.jit
def gate(dy, y, task):
    """act'(y)·dy; at exactly 0 the negative side's (S18)."""
    if task.activation == 1:
        dy = tl.where(y <= 0, 0.0, dy)
    elif task.activation == 2:
        dy = tl.where(y <= 0, dy * SLOPE, dy)
    return dy


@triton.jit
def load_gradient(dy, y, d, coefficients, rows, within, channels, here, walk, task):
    """g, the gradient before the activation. Without y, the sign of y is computed from x."""
    g = tiles.load_tile(dy, rows, within, channels, here, walk)
    if task.activation != 0:
        if y.data is None:
            _, _, scale, offset = coefficients
            out = d * tiles.across(scale, walk) + tiles.across(offset, walk)
        else:
            out = tiles.load_tile(y, rows, within, channels, here, walk)
        g = gate(g, out, task)
    return g


@triton.jit
def centre_tile(x, coefficients, rows, within, channels, here, walk):
    """x - mean."""
    hi, lo, _, _ = coefficients
    d = tiles.load_tile(x, rows, within, channels, here, walk) - tiles.across(hi, walk)
    return d - tiles.across(lo, walk)


@triton.jit
def sum_gradients(x, dy, y, dresidual, mask, kept, block, group, channels, exists, walk, task):
    """Sums of g and of g·(x - mean) over a block's real positions, in double between tiles.

    Fills dresidual, at padded positions too: 0 there, if they are zeroed (S4).
    """
    coefficients = per_channel.load_coefficients(kept, group, channels, exists, walk)
    first = tl.zeros((walk.width,), tl.float64)
    second = first
    for tile in tl.range(block, walk.tiles, walk.blocks):
        rows, within, valid = tiles.find_positions(tile, group, walk)
        real = tiles.find_real(mask, rows, within, valid)
        wanted = tiles.find_wanted(real, valid, walk)
        here = tiles.along(wanted, walk) & tiles.across(exists, walk)
        d = centre_tile(x, coefficients, rows, within, channels, here, walk)
        keep = tiles.along(real, walk)
        every = tiles.along(valid, walk) & tiles.across(exists, walk)
        if dresidual.data is not None and not task.zero_padding:
            here = every
        g = load_gradient(dy, y, d, coefficients, rows, within, channels, here, walk, task)
        if dresidual.data is not None:
            out = tl.where(keep, g, 0.0) if task.zero_padding else g
            tiles.store_tile(dresidual, out, rows, within, channels, every, walk)
        g = tl.where(keep, g, 0.0)
        first += tiles.add_positions(g, walk).to(tl.float64)
        second += tiles.add_positions(g * tl.where(keep, d, 0.0), walk).to(tl.float64)
    return first, second


@triton.jit
def partial_gradients(x, dy, y, dresidual, mask, kept, partials, walk, task):
    """Store a block's sums after those of the blocks before it."""
    part, block, group = tiles.find_program(walk)
    channels, exists = tiles.find_channels(part, walk)
    first, second = sum_gradients(
        x, dy, y, dresidual, mask, kept, block, group, channels, exists, walk, task
    )
    size = walk.groups * walk.channels
    at = partials + block * size + group * walk.channels + channels
    tl.store(at, first, mask=exists)
    tl.store(at + walk.blocks * size, second, mask=exists)


@triton.jit
def merge_gradients(
    partials, sums, kept, gradients, walk, task, width: tl.constexpr, depth: tl.constexpr
):
    """Add each group's sums over its blocks, in order; with a single group dgamma, dbeta too."""
    parts = tl.cdiv(walk.channels, width)
    channels = tl.program_id(0) % parts * width + tl.arange(0, width)
    exists = channels < walk.channels
    size = walk.groups * walk.channels
    to = tl.program_id(0) // parts * walk.channels + channels
    first = tl.zeros(channels.shape, tl.float64)
    second = first
    for start in tl.range(0, walk.blocks, depth):
        block = start + tl.arange(0, depth)
        here = (block < walk.blocks)[:, None] & exists[None, :]
        at = partials + (block * size)[:, None] + to[None, :]
        first += tl.sum(tl.load(at, mask=here, other=0.0), 0)
        second += tl.sum(tl.load(at + walk.blocks * size, mask=here, other=0.0), 0)
    tl.store(sums + to, first, mask=exists)
    tl.store(sums + size + to, second, mask=exists)
    if not walk.grouped:
        tl.debug_barrier()  # other threads of this program read them
        per_channel.finish_parameters(sums, kept, gradients, channels, exists, walk, task, 1)


@triton.jit
def finish_gradients(sums, kept, gradients, walk, task, width: tl.constexpr, depth: tl.constexpr):
    """dgamma and dbeta from the sums of all groups."""
    channels = tl.program_id(0) * width + tl.arange(0, width)
    exists = channels < walk.channels
    per_channel.finish_parameters(sums, kept, gradients, channels, exists, walk, task, depth)


@triton.jit
def load_factors(sums, kept, group, channels, exists, walk, task):
    """Coefficients of a channel's y, and `load_directions` where the statistics are x's own."""
    coefficients = per_channel.load_coefficients(kept, group, channels, exists, walk)
    directions = coefficients  # a placeholder: evaluation uses no directions
    if task.batch:
        directions = load_directions(sums, kept, group, channels, exists, walk)
    return coefficients, directions


@triton.jit
def load_directions(sums, kept, group, channels, exists, walk):
    """rstd, and the terms that dx adds to g since the statistics depend on x (S8).

    g + (x̂·slope + level) is g without its mean and without its part along x̂.
    """
    size = walk.groups * walk.channels
    at = group * walk.channels + channels
    count = tl.load(kept + per_channel.COUNT * size + group)
    weight = tl.where(count > 0, 1.0 / tl.maximum(count, 1.0), 0.0)
    rstd = tl.load(kept + per_channel.RSTD * size + at, mask=exists, other=0.0)
    product = tl.load(sums + size + at, mask=exists, other=0.0)
    level = -weight * tl.load(sums + at, mask=exists, other=0.0)  # of a single row: -g (S7)
    slope = -weight * rstd * product
    return rstd.to(walk.wide), slope.to(walk.wide), level.to(walk.wide)


@triton.jit
def apply_tile(x, dy, y, dx, mask, factors, tile, group, channels, exists, walk, task):
    """dx of a tile, 0 at padded positions."""
    coefficients, directions = factors
    _, _, scale, _ = coefficients
    rows, within, valid = tiles.find_positions(tile, group, walk)
    real = tiles.find_real(mask, rows, within, valid)
    wanted = tiles.find_wanted(real, valid, walk)
    here = tiles.along(wanted, walk) & tiles.across(exists, walk)
    d = tiles.across(scale, walk)
    if task.batch or (task.activation != 0 and y.data is None):
        d = centre_tile(x, coefficients, rows, within, channels, here, walk)
    g = load_gradient(dy, y, d, coefficients, rows, within, channels, here, walk, task)
    if task.batch:
        rstd, slope, level = directions
        xhat = d * tiles.across(rstd, walk)
        g = g + (xhat * tiles.across(slope, walk) + tiles.across(level, walk))
    found = tl.where(tiles.along(real, walk), g * tiles.across(scale, walk), 0.0)
    every = tiles.along(valid, walk) & tiles.across(exists, walk)
    tiles.store_tile(dx, found, rows, within, channels, every, walk)


@triton.jit
def apply_gradient(x, dy, y, dx, mask, sums, kept, walk, task):
    """dx; programs start at the end of x, as in `normalize`."""
    part, block, group = tiles.find_program(walk)
    channels, exists = tiles.find_channels(part, walk)
    factors = load_factors(sums, kept, group, channels, exists, walk, task)
    first = (walk.blocks - 1 - block) * walk.together
    for tile in tl.range(first, tl.minimum(first + walk.together, walk.tiles)):
        apply_tile(x, dy, y, dx, mask, factors, tile, group, channels, exists, walk, task)


@triton.jit
def backward_whole(
    x, dy, y, dx, dresidual, mask, sums, kept, gradients, walk, task, depth: tl.constexpr
):
    """A step in one launch, as `forward_whole`."""
    channels, exists = tiles.find_channels(tl.program_id(0), walk)
    size = walk.groups * walk.channels
    for group in tl.range(0, walk.groups):
        first, second = sum_gradients(
            x, dy, y, dresidual, mask, kept, 0, group, channels, exists, walk, task
        )
        at = sums + group * walk.channels + channels
        tl.store(at, first, mask=exists)
        tl.store(at + size, second, mask=exists)
    tl.debug_barrier()  # other threads of this program read them
    per_channel.finish_parameters(sums, kept, gradients, channels, exists, walk, task, depth)
    if dx.data is not None:
        for later in tl.range(0, walk.groups):
            group = walk.groups - 1 - later
            factors = load_factors(sums, kept, group, channels, exists, walk, task)
            for step in tl.range(0, walk.tiles):
                tile = walk.tiles - 1 - step
                apply_tile(x, dy, y, dx, mask, factors, tile, group, channels, exists, walk, task)
