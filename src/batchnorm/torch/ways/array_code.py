"""y by differentiable operations on arrays."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.forward import Inputs, forward_batch, forward_running
from batchnorm.core.moments import Moments
from batchnorm.core.running import Running
from batchnorm.torch import checks
from batchnorm.torch.accumulation import leaves_statistics
from batchnorm.torch.call import Call
from batchnorm.torch.namespace import XP
from batchnorm.torch.ranks.array_moments import RankMerge
from batchnorm.torch.recompute import before_step, snapshot
from batchnorm.torch.rollback import store
from batchnorm.torch.ways import graph_arrays


def run(call: Call) -> Tensor:
    """y by array code."""
    if graph_arrays.serves(call):
        return graph_arrays.run(call)
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
    if running is None:
        return forward_batch(inputs, None, layout, options, xp=XP, merge=merge).y.to(x.dtype)
    before, recall = running, None
    if options.renorm is not None:
        # This step moves them, and may be recomputed after that (S9).
        def recall(moments: Moments) -> Running:
            return _in(before_step(running, moments, call.again), call.working_type)

    elif layout.groups is not None and options.activation is not None:
        before = snapshot(running)  # gradients depend on them
    before = _in(before, call.working_type)
    outcome = forward_batch(
        inputs, before, layout, options, xp=XP, merge=merge, update=call.update, recall=recall
    )
    y = outcome.y.to(x.dtype)
    if call.update:  # last, since a call that fails moves nothing (S9)
        assert outcome.average is not None
        store(running, outcome.running, leaves_statistics(call, outcome.average))
    return y


def _in(running: Running, dtype: torch.dtype) -> Running:
    """Statistics in the working type; the number of batches stays an integer."""
    cast = Running(*(_cast(a, dtype) for a in running))
    return cast._replace(batches=running.batches)


def _cast(a: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if a is None else a.to(dtype)
