"""y by the kernels, in eager code."""

from __future__ import annotations

from torch import Tensor

from batchnorm.torch.call import Call
from batchnorm.torch.kernels import autograd as kernels
from batchnorm.torch.recompute import HISTORY, recomputation_flag
from batchnorm.torch.tracing import untraced


@untraced
def by_kernel(call: Call, decision: kernels.Decision | None) -> Tensor | str:
    """y, or why no kernel can compute it."""
    if decision is None:
        return "x is not a plain tensor, or a transformation of torch is at work"
    x, mask, parameters, residual, running = call[:5]
    refusal = (
        decision.refusal
        or kernels.refuse_parameters(parameters)
        or kernels.refuse_tensors(x, (mask, *parameters, residual), running)
        or refuse_residual(call)
    )
    if refusal is None and call.part is not None and decision.layout.groups is not None:
        refusal = "none merges the averages of ghost batches over ranks"
    if refusal is not None:
        return refusal
    again = recomputation_flag(x) is True
    return kernels.normalize(
        x,
        mask,
        parameters,
        residual,
        running,
        decision,
        call.options,
        batch=call.batch,
        update=call.mode.update and running is not None and not again,
        history=HISTORY,
        again=again,
        owner=call.owner,
        part=call.part,
    )


def refuse_residual(call: Call) -> str | None:
    """What kernels have against the residual, or None."""
    if call.residual is None or call.residual.dtype is call.x.dtype:
        return None
    return f"it takes a residual of x's type {call.x.dtype}, and got {call.residual.dtype}"
