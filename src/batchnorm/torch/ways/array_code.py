"""y by differentiable operations on arrays."""

from __future__ import annotations

from typing import Any

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
from batchnorm.torch.recompute import HISTORY, recomputation_flag, snapshot
from batchnorm.torch.rollback import write_all


def by_array(call: Call) -> Tensor:
    """y by differentiable operations."""
    x, layout, owner = call.x, call.layout, call.owner
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    s, t = config.call_adjustment(owner, call.adjustment, layout.shape)
    inputs = Inputs(
        x.to(work),
        checks.to_boolean(call.mask),
        gamma=_cast(call.parameters.weight, work),
        beta=_cast(call.parameters.bias, work),
        residual=_cast(call.residual, work),
        s=checks.check_adjusted(owner, "scale", s, x, work),
        t=checks.check_adjusted(owner, "bias", t, x, work),
    )
    if call.mode.own_statistics or call.running is None:
        return _by_batch(call, inputs)
    if not torch.is_grad_enabled():
        inputs = inputs._replace(mask=None)  # it matters to gradients only
    running = _in(call.running, work)
    return forward_running(inputs, running, layout, call.options, owner=owner, xp=XP).to(x.dtype)


def _by_batch(call: Call, inputs: Inputs) -> Tensor:
    layout, options, owner, running = call.layout, call.options, call.owner, call.running
    merge = None if call.part is None else RankMerge(call.part, options.eps)

    def forward(statistics: Running | None) -> Outcome:
        return forward_batch(inputs, statistics, layout, options, owner=owner, xp=XP, merge=merge)

    if running is None:
        return forward(None).y.to(call.x.dtype)
    before = _in(_before_step(running, layout, options), inputs.x.dtype)
    remembers = options.renorm is not None and not torch.compiler.is_compiling()
    again = remembers and recomputation_flag(inputs.x) is True
    if again:
        # The statistics have moved since the step that is recomputed (S9).
        with torch.no_grad():
            moments = forward(before).moments
        before = HISTORY.recall(owner, running.renorm_mean, moments)
    outcome = forward(before)
    if remembers and not again:
        HISTORY.record(running.renorm_mean, outcome.moments, before)
    y = outcome.y.to(call.x.dtype)
    if call.mode.update:  # last, since a call that fails moves nothing (S9)
        store(running, outcome.running, inputs.x)
    return y


def _before_step(running: Running, layout: Layout, options: config.Options) -> Running:
    """The statistics, where gradients depend on them out of reach of this step's update."""
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


def store(running: Running, new: Running | None, x: Tensor) -> None:
    """Write `new` into `running` in place, unless this forward pass is a recomputation (S9)."""
    again: Any = recomputation_flag(x)
    if again is True:
        return
    assert new is not None
    values = (
        (old, v.to(old.dtype)) for old, v in zip(running, new, strict=True) if old is not None
    )
    if torch.compiler.is_compiling():
        for old, value in values:
            old.copy_(value if again is None else torch.where(again, old, value))
    else:
        write_all(values)


def _cast(a: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if a is None else a.to(dtype)
