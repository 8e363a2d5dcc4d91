"""y by the kernels, in eager code.

In a small step the code around the kernels takes longer than they do. So everything that depends
on shapes and options alone is decided once (`decide`), and the rest is kept short.
"""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.core.declaration import refuse_options
from batchnorm.core.forward import average_of
from batchnorm.torch import options as declared
from batchnorm.torch.accumulation import leaves_statistics
from batchnorm.torch.call import Call
from batchnorm.torch.kernels.autograd import run as run_step
from batchnorm.torch.kernels.records import KernelStep
from batchnorm.torch.kernels.step import arrange, centred_of, find_moments, find_passes
from batchnorm.torch.kernels.tensors import (
    NOT_PLAIN,
    refuse_parameters,
    refuse_residual,
    refuse_tensors,
)
from batchnorm.torch.namespace import XP
from batchnorm.torch.recompute import recall_step
from batchnorm.torch.tracing import untraced


@untraced
def refuse(call: Call) -> str | None:
    """The reason why no kernel can compute y, or None."""
    decision = call.decision
    if decision is None:
        return NOT_PLAIN
    x, mask, weight, bias, residual, running = call.tensors
    reason = (
        decision.refusal
        or refuse_parameters((weight, bias))
        or refuse_tensors(x, (mask, weight, bias, residual), running)
        or refuse_residual(x, residual)
        or refuse_options(declared.UNSERVED, call.options)
    )
    if reason is None and call.part is not None and decision.layout.groups is not None:
        return "none merges the averages of ghost batches over ranks"
    return reason


@untraced
def run(call: Call) -> Tensor:
    """y by the kernels."""
    assert call.decision is not None
    options, again = call.options, call.again is True
    tensors, decision = arrange(call.tensors, call.decision, options)
    x, mask, weight, bias, residual, running = tensors
    passes = find_passes(decision)
    moves = call.update and running is not None and not again
    step = KernelStep(
        decision,
        mask,
        running,
        passes.find_state(weight, bias, running),
        options,
        call.by_batch,
        moves and call.settings.pending is None,
        residual is not None,
        call.part,
    )
    if step.renormalizes:
        assert running is not None
        if again:  # the statistics have moved since the step that is recomputed
            moments = find_moments(step, x)
            step.running = recall_step(running.renorm_mean, moments)
            step.state = passes.find_state(weight, bias, step.running)
        else:
            step.remembered = True
    y = run_step(step, x, weight, bias, residual)
    if moves and not step.update:
        centred = centred_of(passes.pack(step.kept), decision.layout, torch.float64)
        leaves_statistics(call, average_of(centred, decision.layout, XP))
    return y
