"""The forward pass of a layer: what every front end calls, around its own state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from batchnorm.core.config import Options
from batchnorm.core.layout import Layout
from batchnorm.core.moments import (
    Centred,
    Moments,
    Parts,
    centre,
    join_groups,
    merge_centred,
)
from batchnorm.core.namespace import Array, Namespace
from batchnorm.core.normalize import Affine, activate, normalize_batch, normalize_running
from batchnorm.core.running import Running, average_groups, renorm_correction, update_running

Gather = Callable[[Parts], Parts]
"""Stacks the parts of all participants on a new first axis, in the same order everywhere (S14)."""


class Inputs(NamedTuple):
    """Arrays of one call, in the working type; all but x may be None.

    x, residual, s and t have x's rank; gamma and beta are per channel; mask is boolean, of any
    shape of S1.
    """

    x: Array
    mask: Array | None = None
    gamma: Array | None = None
    beta: Array | None = None
    residual: Array | None = None
    s: Array | None = None
    t: Array | None = None


class Outcome(NamedTuple):
    """y in x's shape; the batch's moments; running statistics after the step, if any came in.

    The last two, on the working view, are what a closed-form gradient starts from.
    """

    y: Array
    moments: Moments
    running: Running | None
    centred: Centred
    affine: Affine


def forward_batch(
    inputs: Inputs,
    running: Running | None,
    layout: Layout,
    options: Options,
    *,
    gather: Gather | None = None,
    update: bool = True,
    owner: str,
    xp: Namespace,
) -> Outcome:
    """Normalize by the batch's own statistics (training).

    Args:
        inputs: as in Inputs.
        running: per channel; serves empty channels (S6) and is what the update starts from.
        layout: of inputs.x.
        options: as in Options.
        gather: synchronizes the step; ghost groups stay local but for their average (S14).
        update: move the running statistics.
        owner: whose name error messages carry.
        xp: array namespace.

    Returns:
        Outcome; moments are per channel, with ghost batches per group (of all participants)
        and channel.

    Raises:
        ValueError: the mask's shape is none of S1.
    """
    x = layout.split(inputs.x, xp)
    mask = layout.mask(inputs.mask, owner, xp)
    centred = centre(x, mask, layout.reduced, eps=options.eps, xp=xp)
    counted = centred
    if gather is not None:
        parts = gather(Parts.of(centred))
        if layout.groups is None:
            counted = centred = merge_centred(centred, parts, mask, xp)
        else:
            counted = join_groups(parts, 1, xp)
    average = average_groups(
        Centred(*(xp.stop_gradient(a) for a in counted)),
        None if layout.groups is None else 1,
        xp,
    )
    expanded, affine = None, channel_affine(inputs, layout, xp)
    fallback = (xp.zeros_like(centred.power), xp.ones_like(centred.power))
    if running is not None:
        expanded = expand_running(running, layout, xp)
        fallback = (expanded.mean, expanded.var)
        if options.renorm is not None:
            r, d = renorm_correction(average, expanded, options.renorm, eps=options.eps, xp=xp)
            affine = affine._replace(r=r, d=d)
    y = normalize_batch(
        x, centred, mask, affine, fallback, eps=options.eps, correction=options.correction, xp=xp
    )
    if expanded is not None and update:
        axes = tuple(range(len(layout.working)))
        running = update_running(expanded, average, options, axes, xp)
        running = _reshape_running(running, layout.channels, xp)
    y = activate(layout.merge(y, xp), inputs.residual, options.activation, xp)
    moments = _returned(counted, layout, xp)
    return Outcome(y, moments, running, centred, affine)


def forward_running(
    inputs: Inputs,
    running: Running,
    layout: Layout,
    options: Options,
    *,
    owner: str,
    xp: Namespace,
) -> Array:
    """Normalize by running statistics (evaluation, frozen); arguments as `forward_batch`."""
    expanded = expand_running(running, layout, xp)
    y = normalize_running(
        inputs.x,
        expanded.mean,
        expanded.var,
        layout.mask(inputs.mask, owner, xp),
        channel_affine(inputs, layout, xp),
        eps=options.eps,
        xp=xp,
    )
    return activate(y, inputs.residual, options.activation, xp)


def channel_affine(inputs: Inputs, layout: Layout, xp: Namespace) -> Affine:
    """What follows x̂, shaped to broadcast against the working view."""
    return Affine(
        gamma=layout.expand(inputs.gamma, xp),
        beta=layout.expand(inputs.beta, xp),
        s=inputs.s,
        t=inputs.t,
    )


def expand_running(running: Running, layout: Layout, xp: Namespace) -> Running:
    """Running statistics shaped to broadcast against the working view."""
    return _reshape_running(running, layout.per_channel, xp)


def _reshape_running(running: Running, shape: tuple[int, ...], xp: Namespace) -> Running:
    per_channel = running._replace(batches=None)
    shaped = (None if a is None else xp.reshape(a, shape) for a in per_channel)
    return Running(*shaped)._replace(batches=running.batches)


def _returned(centred: Centred, layout: Layout, xp: Namespace) -> Moments:
    """Moments as callers see them: the groups, of all participants, come first."""
    groups = () if layout.groups is None else (centred.power.shape[1],)
    shape = (*groups, *layout.channels)
    return Moments(*(xp.reshape(a, shape) for a in centred.moments))
