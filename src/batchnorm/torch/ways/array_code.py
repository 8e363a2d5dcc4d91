"""y by differentiable operations on arrays."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.forward import Inputs, Outcome, forward_batch, forward_running
from batchnorm.core.layout import Layout
from batchnorm.core.running import Running
from batchnorm.torch import checks
from batchnorm.torch.call import Call
from batchnorm.torch.namespace import XP
from batchnorm.torch.ranks.array_moments import RankMerge
from batchnorm.torch.recompute import recall_step, remember_step, snapshot
from batchnorm.torch.rollback import store


def run(call: Call) -> Tensor:
    """y by array code."""
    (x, mask, weight, bias, residual, running), layout = call.tensors, call.layout
    work = call.working_type
    s, t = config.call_adjustment(call.adjustment, layout.shape)
    inputs = Inputs(
        x.to(work),
        checks.to_boolean(mask),
        gamma=_cast(weight, work),
        beta=_cast(bias, work),
        residual=_cast(residual, work),
        s=checks.check_adjusted("scale", s, x, work),
        t=checks.check_adjusted("bias", t, x, work),
    )
    if call.by_batch:
        return _by_batch(call, inputs)
    assert running is not None
    if not torch.is_grad_enabled() and not call.options.zero_padding:
        inputs = inputs._replace(mask=None)  # it matters to gradients only
    wide = _in(running, work)
    return forward_running(inputs, wide, layout, call.options, xp=XP).to(x.dtype)


def _by_batch(call: Call, inputs: Inputs) -> Tensor:
    layout, options = call.layout, call.options
    x, running = call.tensors.x, call.tensors.running
    merge = None if call.part is None else RankMerge(call.part, options.eps)

    def forward(statistics: Running | None) -> Outcome:
        return forward_batch(inputs, statistics, layout, options, xp=XP, merge=merge)

    if running is None:
        return forward(None).y.to(x.dtype)
    before = _in(_before_step(running, layout, options), call.working_type)
    remembered = call.renormalizes and not call.traced
    again = remembered and call.again is True
    if again:
        # The statistics have moved since the step that is recomputed (S9).
        with torch.no_grad():
            moments = forward(before).moments
        before = recall_step(running.renorm_mean, moments)
    outcome = forward(before)
    if remembered and not again:
        remember_step(running.renorm_mean, outcome.moments, before)
    y = outcome.y.to(x.dtype)
    if call.update:  # last, since a call that fails moves nothing (S9)
        store(running, outcome.running, call.again)
    return y


def _before_step(running: Running, layout: Layout, options: config.Options) -> Running:
    """The statistics; a snapshot where gradients depend on them, since this step moves them."""
    renormalizes = options.renorm is not None
    if not renormalizes and (layout.groups is None or options.activation is None):
        return running
    statistics = running._replace(batches=None)
    copies = iter(snapshot([a for a in statistics if a is not None], repeatable=not renormalizes))
    kept = (None if a is None else next(copies) for a in statistics)
    return Running(*kept)._replace(batches=running.batches)


def _in(running: Running, dtype: torch.dtype) -> Running:
    """Statistics in the working type; the number of batches stays an integer."""
    cast = Running(*(_cast(a, dtype) for a in running))
    return cast._replace(batches=running.batches)


def _cast(a: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if a is None else a.to(dtype)
