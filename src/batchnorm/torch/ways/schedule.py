"""The schedule of the GPU's kernels for a call, for `explain`."""

from __future__ import annotations

from batchnorm.kernels.schedules import SCHEDULE
from batchnorm.torch.call import Call


def note(call: Call) -> str:
    """Visits or passes, with the reason for passes; "" where visits are off."""
    if not SCHEDULE.visits:
        return ""
    if not call.by_batch:
        return "one pass, as the statistics are known"
    if call.part is not None:
        return "passes, as ranks exchange sums between them"
    decision = call.decision
    if decision is None or decision.plan is None:
        return "visits or passes, as the memory at run time suits them"
    if decision.kernel != "triton":
        return ""
    gated = call.tensors.residual is not None and call.options.activation is not None
    plan = decision.plan
    forward, backward = plan.find_visit(1), plan.find_visit(3 if gated else 2)
    if forward.cut is None:
        return f"passes: {forward.reason}"
    if backward.cut is None:
        return f"forward one visit to each channel; backward passes: {backward.reason}"
    return "one visit to each channel, forward and backward"
