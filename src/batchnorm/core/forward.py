"""The forward pass of a layer, which every front end calls around its own state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from batchnorm.core.config import Options
from batchnorm.core.layout import Layout
from batchnorm.core.merge import Merge, recentre
from batchnorm.core.moments import Centred, Moments, centre
from batchnorm.core.namespace import Array, Namespace, select
from batchnorm.core.normalize import (
    Affine,
    activate,
    normalize_batch,
    normalize_running,
    rstd_of,
)
from batchnorm.core.running import (
    BatchAverage,
    Running,
    average_groups,
    renorm_correction,
    update_running,
)


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
    """y in x's shape, running statistics after the step, if any came in, and what both came from.

    The closed-form gradient starts from `centred`, `rstd` and `affine`, and the running statistics
    move by `average`, which is None where nothing asks for it; these are on the working view.
    """

    y: Array
    running: Running | None
    centred: Centred
    rstd: Array
    affine: Affine
    average: BatchAverage | None
    found: Centred  # with ghost batches and a merge, of all participants' groups, as constants

    def moments(self, layout: Layout, xp: Namespace) -> Moments:
        """The batch's moments per channel, or with ghost batches per group and channel."""
        return _returned(self.found, layout, xp)


def forward_batch(
    inputs: Inputs,
    running: Running | None,
    layout: Layout,
    options: Options,
    *,
    merge: Merge | None = None,
    update: bool = True,
    recall: Callable[[Moments], Running] | None = None,
    xp: Namespace,
) -> Outcome:
    """Normalize by the batch's own statistics (training).

    Args:
        inputs: as in Inputs.
        running: per channel; serves channels without real rows (S6), and is what moves.
        layout: of inputs.x.
        options: as in Options.
        merge: of the moments of all participants, or None; of ghost groups only the averages
            are merged (S14).
        update: move the running statistics.
        recall: function from the batch's moments to the running statistics that count instead of
            `running`: a step that is recomputed needs those from before it (S9).
        xp: array namespace.

    Returns:
        Outcome.

    Raises:
        ValueError: the mask's shape is none of S1.
    """
    x = layout.split(inputs.x, xp)
    mask = layout.mask(inputs.mask, xp)
    centred = centre(x, mask, layout.reduced, eps=options.eps, xp=xp)
    if merge is not None and layout.groups is None:
        centred = recentre(x, mask, merge.moments(centred), xp)
    found, average = centred, None
    merged = None if layout.groups is None else merge
    compared = running is not None and (update or options.renorm is not None)
    if compared or merged is not None:
        average = average_of(centred.map(xp.stop_gradient), layout, xp)
    if average is not None and merged is not None:
        average = merged.average(average, options.unbiased and options.renorm is None)
        found = average.centred
    if recall is not None:
        running = recall(_returned(found, layout, xp))
    expanded, affine = None, channel_affine(inputs, layout, xp)
    if running is not None:
        expanded = expand_running(running, layout, xp)
        if options.renorm is not None:
            assert average is not None
            r, d = renorm_correction(average, expanded, options.renorm, eps=options.eps, xp=xp)
            affine = affine._replace(r=r, d=d)
    rstd = rstd_of(centred, eps=options.eps, correction=options.correction, xp=xp)
    y = normalize_batch(x, centred, rstd, mask, affine, expanded, options, xp=xp)
    if expanded is not None and update:
        assert average is not None
        running = _moved(expanded, average, layout, options, xp)
    y = activate(
        layout.merge(y, xp), _residual(inputs, layout, options, xp), options.activation, xp
    )
    return Outcome(y, running, centred, rstd, affine, average, found)


def move_by_average(
    running: Running, average: BatchAverage, layout: Layout, options: Options, xp: Namespace
) -> Running:
    """The running statistics, per channel, after a step with this average (S9)."""
    return _moved(expand_running(running, layout, xp), average, layout, options, xp)


def average_of(centred: Centred, layout: Layout, xp: Namespace) -> BatchAverage:
    """The moments of a step, shaped `layout.statistics`, as the running statistics see them."""
    return average_groups(centred, None if layout.groups is None else 1, xp)


def _moved(
    expanded: Running, average: BatchAverage, layout: Layout, options: Options, xp: Namespace
) -> Running:
    axes = tuple(range(len(layout.working)))
    running = update_running(expanded, average, options, axes, xp)
    return _reshape_running(running, layout.channels, xp)


def forward_running(
    inputs: Inputs,
    running: Running,
    layout: Layout,
    options: Options,
    *,
    xp: Namespace,
) -> Array:
    """Normalize by running statistics (evaluation, frozen); arguments as `forward_batch`."""
    expanded = expand_running(running, layout, xp)
    y = normalize_running(
        inputs.x,
        expanded.mean,
        expanded.var,
        layout.mask(inputs.mask, xp),
        channel_affine(inputs, layout, xp),
        options,
        xp=xp,
    )
    return activate(y, _residual(inputs, layout, options, xp), options.activation, xp)


def _residual(inputs: Inputs, layout: Layout, options: Options, xp: Namespace) -> Array | None:
    """The residual to be added: 0 at padded rows where y is (S4)."""
    residual, mask = inputs.residual, inputs.mask
    if residual is None or mask is None or not options.zero_padding:
        return residual
    return select(xp.reshape(mask, layout.mask_shape(tuple(mask.shape))), residual, 0.0, xp)


def channel_affine(inputs: Inputs, layout: Layout, xp: Namespace) -> Affine:
    """The operations after x̂, shaped to broadcast against the working view."""
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
    return running.map(lambda a: xp.reshape(a, shape))


def _returned(centred: Centred, layout: Layout, xp: Namespace) -> Moments:
    """Moments as they are returned: on the first axis the groups of all participants."""
    groups = () if layout.groups is None else (centred.power.shape[1],)
    shape = (*groups, *layout.channels)
    return centred.moments.map(lambda a: xp.reshape(a, shape))
