"""Computations once per channel, in double precision: moments, coefficients, running statistics.

The formulas are those of `batchnorm.core`; the conformance table compares the two. Results are
kept in one array of doubles: the rows that STATISTICS names, one value for each group and channel,
and after them the count of each group. Each part of the channels has its own copy of the counts, so
that no program reads counts which another program of the same launch is writing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from batchnorm.kernels.kept import STATISTICS

MEAN, LOW, VAR, RSTD, SCALE, OFFSET, R, D = (tl.constexpr(row) for row in STATISTICS.values())
COUNT = tl.constexpr(len(STATISTICS))
STEP_BITS = tl.constexpr(62)  # of a number of steps


@triton.jit
def load_channels(a, channels, exists, absent: tl.constexpr):
    """A per-channel array; `absent` everywhere where there is none."""
    if a is None:
        found = tl.full(channels.shape, absent, tl.float64)
    else:
        found = tl.load(a + channels, mask=exists, other=absent).to(tl.float64)
    return found


@triton.jit
def finish_moments(count, anchor, total, square):
    """Mean as two numbers, and variance, from sums of x - anchor and of its square (S2, S3)."""
    rows = tl.maximum(count, 1.0)
    shift = total / rows
    mean = anchor + shift
    moved = mean - anchor  # Knuth's two-sum: mean + low is anchor + shift, without rounding
    low = (anchor - (mean - moved)) + (shift - moved)
    var = square / rows - shift * shift
    var = tl.where(count == 1, 0.0, tl.where(var < 0, 0.0, var))
    real = count > 0
    return tl.where(real, mean, 0.0), tl.where(real, low, 0.0), tl.where(real, var, 0.0)


@triton.jit
def find_rstd(var, eps, walk):
    """1 / sqrt(var + eps); 0 where it would not be finite in x's arithmetic (S7)."""
    power = var + eps
    least = 2.2250738585072014e-308 if walk.wide == tl.float64 else 1.3817869688151111e-76
    constant = (power >= 0) & (power <= least)  # 2^-1022, or 2^-126 squared
    return tl.where(constant, 0.0, 1.0 / tl.sqrt(tl.where(constant, 1.0, power)))


@triton.jit
def store_moments(kept, count, mean, low, var, part, group, channels, exists, walk):
    """Keep a group's moments, and the count as that of a part of the channels."""
    size = walk.groups * walk.channels
    at = kept + group * walk.channels + channels
    tl.store(at + MEAN * size, mean, mask=exists)
    tl.store(at + LOW * size, low, mask=exists)
    tl.store(at + VAR * size, var, mask=exists)
    tl.store(kept + COUNT * size + part * walk.groups + group, count)


@triton.jit
def average_groups(kept, counts, channels, exists, walk, depth: tl.constexpr):
    """Moments for the running statistics: averages over the groups that are not empty (S12).

    Returns mean, variance, unbiased variance, and a flag: true if the channel has real rows and all
    its moments are finite (S9) in the type to which statistics of such an x are rounded (S16).
    """
    size = walk.groups * walk.channels
    mean = tl.zeros(channels.shape, tl.float64)
    var = mean
    unbiased = mean
    present = mean
    spoilt = mean
    for start in tl.range(0, walk.groups, depth):
        group = start + tl.arange(0, depth)
        count = tl.load(counts + group, mask=group < walk.groups, other=0.0)
        own = (count > 0)[:, None]
        at = kept + (group * walk.channels)[:, None] + channels[None, :]
        means = tl.load(at + MEAN * size, mask=own & exists[None, :], other=0.0)
        variances = tl.load(at + VAR * size, mask=own & exists[None, :], other=0.0)
        factor = tl.where(count > 1, count / tl.maximum(count - 1.0, 1.0), 1.0)
        present += tl.sum((count > 0).to(tl.float64), 0)
        mean += tl.sum(means, 0)
        var += tl.sum(variances, 0)
        unbiased += tl.sum(variances * factor[:, None], 0)
        finite = tl.abs(means.to(walk.wide)) < float("inf")  # neither is NaN
        finite = finite & (tl.abs(variances.to(walk.wide)) < float("inf"))
        spoilt += tl.sum((finite == 0).to(tl.float64), 0)
    groups = tl.maximum(present, 1.0)
    usable = exists & (spoilt == 0) & (present > 0)
    return mean / groups, var / groups, unbiased / groups, usable


@triton.jit
def renormalize(running, mean, var, channels, exists, rates):
    """r and d (S11)."""
    eps, _, _, rmin, rmax, dmax = rates
    floor = tl.sqrt(tl.zeros(channels.shape, tl.float64) + eps)
    reference = load_channels(running.renorm_stddev, channels, exists, 1.0)
    floor = tl.maximum(floor, 1.1754943508222875e-38)  # the smallest normal float32
    reference = tl.where(reference < floor, floor, reference)
    r = tl.sqrt(var + eps) / reference
    d = (mean - load_channels(running.renorm_mean, channels, exists, 0.0)) / reference
    # Comparisons rather than minima and maxima, so that NaN stays NaN.
    r = tl.where(r < rmin, rmin, tl.where(r > rmax, rmax, r))
    d = tl.where(d < -dmax, -dmax, tl.where(d > dmax, dmax, d))
    return r, d


@triton.jit
def move(a, channels, usable, decay, value):
    """Move usable channels of a running statistic towards `value`; the new values."""
    old = tl.load(a + channels, mask=usable, other=0.0).to(tl.float64)
    new = decay * old + (1.0 - decay) * value
    # Several threads hold the same channel: all must have read it before one of them writes.
    tl.debug_barrier()
    tl.store(a + channels, new, mask=usable)
    return new


@triton.jit
def debias(decay, batches):
    """The weight of the old value at the next step, 1 - (1 - decay) / (1 - decay^t) (S23)."""
    steps = tl.load(batches) + 1
    power = tl.full((), 1.0, tl.float64)  # decay^t by its squares
    square = power * decay
    for _ in tl.range(0, STEP_BITS):
        power = tl.where(steps % 2 == 1, power * square, power)
        square = square * square
        steps = steps // 2
    forgotten = 1.0 - power
    weight = (1.0 - decay) / tl.where(forgotten > 0.0, forgotten, 1.0)
    return tl.where(forgotten > 0.0, 1.0 - weight, decay)


@triton.jit
def update_running(running, mean, var, unbiased, channels, usable, rates, task):
    """Move the running statistics of usable channels (S9, S10, S11)."""
    eps, decay, renorm_decay, _, _, _ = rates
    if task.cumulative:
        decay = 1.0 - 1.0 / (tl.load(running.batches).to(tl.float64) + 1.0)
    elif task.debias:
        decay = debias(decay, running.batches)
    if task.debias and task.renorm:
        renorm_decay = debias(renorm_decay, running.batches)
    move(running.mean, channels, usable, decay, mean)
    if task.renorm:
        deviation = tl.sqrt(var + eps)
        stddev = move(running.stddev, channels, usable, decay, deviation)
        variance = stddev * stddev - eps
        tl.store(running.var + channels, tl.where(variance > 0, variance, 0.0), mask=usable)
        move(running.renorm_mean, channels, usable, renorm_decay, mean)
        move(running.renorm_stddev, channels, usable, renorm_decay, deviation)
    elif task.unbiased:
        move(running.var, channels, usable, decay, unbiased)
    else:
        move(running.var, channels, usable, decay, var)


@triton.jit
def finish_groups(
    kept, flags, parameters, running, part, channels, exists, walk, rates, task, depth: tl.constexpr
):
    """Running statistics and the coefficients of y, from the moments of all groups.

    `part`: the part of the channels whose counts are read.
    """
    counts = kept + COUNT * walk.groups * walk.channels + part * walk.groups
    old_mean = load_channels(running.mean, channels, exists, 0.0)
    old_var = load_channels(running.var, channels, exists, 1.0)
    gamma = load_channels(parameters.gamma, channels, exists, 1.0)
    beta = load_channels(parameters.beta, channels, exists, 0.0)
    r = tl.full(channels.shape, 1.0, tl.float64)
    d = tl.zeros(channels.shape, tl.float64)
    if task.renorm or task.update:
        mean, var, unbiased, usable = average_groups(kept, counts, channels, exists, walk, depth)
        if task.renorm:
            r, d = renormalize(running, mean, var, channels, exists, rates)
        if task.update:
            tl.debug_barrier()  # see `move`
            update_running(running, mean, var, unbiased, channels, usable, rates, task)
            if flags is not None:
                tl.store(flags + tl.program_id(0), tl.max(usable.to(tl.int32), 0))
    size = walk.groups * walk.channels
    for start in tl.range(0, walk.groups, depth):
        group = start + tl.arange(0, depth)
        valid = group < walk.groups
        own = (tl.load(counts + group, mask=valid, other=0.0) > 0)[:, None]
        here = valid[:, None] & exists[None, :]
        at = kept + (group * walk.channels)[:, None] + channels[None, :]
        variances = tl.load(at + VAR * size, mask=here, other=0.0)
        rstd = find_rstd(tl.where(own, variances, old_var[None, :]), rates[0], walk)
        scale = rstd * gamma[None, :]
        offset = beta[None, :] + 0.0 * tl.zeros_like(rstd)
        if task.renorm:
            every_r = tl.where(own, r[None, :], 1.0)
            every_d = tl.where(own, d[None, :], 0.0)
            scale = scale * every_r
            offset = offset + every_d * gamma[None, :]
            tl.store(at + R * size, every_r, mask=here)
            tl.store(at + D * size, every_d, mask=here)
        tl.store(at + RSTD * size, rstd, mask=here)
        tl.store(at + SCALE * size, scale, mask=here)
        tl.store(at + OFFSET * size, offset, mask=here)
        nothing = tl.zeros_like(rstd)
        tl.store(at + MEAN * size, nothing + old_mean[None, :], mask=here & (own == 0))  # S6
        tl.store(at + LOW * size, nothing, mask=here & (own == 0))


@triton.jit
def keep_running(kept, parameters, running, channels, exists, walk, eps, block):
    """Coefficients from the running statistics; the program of block 0 also keeps them."""
    mean = load_channels(running.mean, channels, exists, 0.0)
    var = load_channels(running.var, channels, exists, 1.0)
    rstd = find_rstd(var, eps, walk)
    scale = rstd * load_channels(parameters.gamma, channels, exists, 1.0)
    offset = load_channels(parameters.beta, channels, exists, 0.0)
    here, at = tl.where(exists, block, 1) == 0, kept + channels
    tl.store(at + MEAN * walk.channels, mean, mask=here)
    tl.store(at + LOW * walk.channels, tl.zeros_like(mean), mask=here)
    tl.store(at + RSTD * walk.channels, rstd, mask=here)
    tl.store(at + SCALE * walk.channels, scale, mask=here)
    tl.store(at + OFFSET * walk.channels, offset, mask=here)
    hi, lo = split_mean(mean, tl.zeros_like(mean), walk)
    return hi, lo, scale.to(walk.wide), offset.to(walk.wide)


@triton.jit
def load_coefficients(kept, group, channels, exists, walk):
    """Mean as two numbers, scale and offset of y = ((x - hi) - lo)·scale + offset."""
    size = walk.groups * walk.channels
    at = kept + group * walk.channels + channels
    mean = tl.load(at + MEAN * size, mask=exists, other=0.0)
    low = tl.load(at + LOW * size, mask=exists, other=0.0)
    hi, lo = split_mean(mean, low, walk)
    scale = tl.load(at + SCALE * size, mask=exists, other=0.0).to(walk.wide)
    offset = tl.load(at + OFFSET * size, mask=exists, other=0.0).to(walk.wide)
    return hi, lo, scale, offset


@triton.jit
def split_mean(mean, low, walk):
    """The mean as two numbers of the arithmetic's type (S3)."""
    hi = mean.to(walk.wide)
    return hi, ((mean - hi.to(tl.float64)) + low).to(walk.wide)


@triton.jit
def finish_parameters(sums, kept, gradients, channels, exists, walk, task, depth: tl.constexpr):
    """Gradients of gamma and beta from the sums of g and of g·(x - mean) of all groups (S8)."""
    size = walk.groups * walk.channels
    dgamma = tl.zeros(channels.shape, tl.float64)
    dbeta = dgamma
    for start in tl.range(0, walk.groups, depth):
        group = start + tl.arange(0, depth)
        here = (group < walk.groups)[:, None] & exists[None, :]
        at = (group * walk.channels)[:, None] + channels[None, :]
        of_g = tl.load(sums + at, mask=here, other=0.0)
        product = tl.load(sums + size + at, mask=here, other=0.0)
        product = product * tl.load(kept + RSTD * size + at, mask=here, other=0.0)
        if task.renorm:
            product = product * tl.load(kept + R * size + at, mask=here, other=0.0)
            product += of_g * tl.load(kept + D * size + at, mask=here, other=0.0)
        dgamma += tl.sum(product, 0)
        dbeta += tl.sum(of_g, 0)
    if gradients.gamma is not None:
        tl.store(gradients.gamma + channels, dgamma, mask=exists)
    if gradients.beta is not None:
        tl.store(gradients.beta + channels, dbeta, mask=exists)


@triton.jit
def count_batch(flags, batches, parts, width: tl.constexpr):
    """Count one more batch, if a part of the channels was updated (S9)."""
    updated = tl.program_id(0)  # the only one: 0
    for start in tl.range(0, parts, width):
        part = start + tl.arange(0, width)
        found = tl.load(flags + part, mask=part < parts, other=0)
        updated = tl.maximum(updated, tl.max(found, 0))
    count = tl.load(batches)
    tl.debug_barrier()  # see `move`
    tl.store(batches, count + updated)
