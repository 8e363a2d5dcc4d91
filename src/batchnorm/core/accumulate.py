"""Several forward passes as one step (S21)."""

from __future__ import annotations

import math

from batchnorm.core.merge import Parts, merge_parts
from batchnorm.core.moments import Centred
from batchnorm.core.namespace import Namespace
from batchnorm.core.running import BatchAverage, average_groups, unbiased_variance


def contribution(average: BatchAverage, pooled: bool, unbiased: bool, xp: Namespace) -> Parts:
    """The moments that a pass adds to its step.

    Args:
        average: of the pass, merged over participants.
        pooled: with ghost batches each group is normalized by its own moments, so that their
            average counts, by the number of groups that are not empty (S12).
        unbiased: average the unbiased variances of groups (S10).
        xp: array namespace.
    """
    centred, count = average.centred, average.count
    parts = Parts.of(centred)
    if pooled:
        var = unbiased_variance(centred, xp) if unbiased else centred.var
        anchor, shift, power = (average.of(a, xp) for a in (centred.anchor, centred.shift, var))
        parts = Parts(count, anchor, shift, xp.ones_like(power), power)
    # Moments that are not finite keep the step from moving the channel, as in one batch (S9).
    unusable = (count > 0) & ~average.usable
    return parts._replace(anchor=xp.where(unusable, math.nan, parts.anchor))


def merge_passes(parts: Parts, pooled: bool, xp: Namespace) -> Parts:
    """The contributions of passes, stacked on a new first axis, as one."""
    return Parts.of(merge_parts(parts, xp, spread=not pooled))


def average_of_step(parts: Parts, pooled: bool, xp: Namespace) -> BatchAverage:
    """The merged moments of a step as `update_running` takes them."""
    count, anchor, shift, scale, power = parts
    merged = Centred(count, anchor, shift, scale, power, scale, xp.zeros_like(power))
    average = average_groups(merged, None, xp)
    if not pooled:
        return average
    # Count 1, so that the unbiased factor is not applied twice.
    return average._replace(centred=merged._replace(count=xp.ones_like(power)))
