"""y by operators of a graph that `torch.compile` makes."""

from __future__ import annotations

import torch
from torch import Tensor

from batchnorm.core.declaration import refuse_options
from batchnorm.core.forward import average_of, move_by_average
from batchnorm.torch import options as declared
from batchnorm.torch.accumulation import leaves_statistics
from batchnorm.torch.call import Call
from batchnorm.torch.kernels import operators
from batchnorm.torch.kernels.decision import choose
from batchnorm.torch.kernels.step import centred_of
from batchnorm.torch.kernels.tensors import (
    NAMES,
    refuse_parameters,
    refuse_residual,
    refuse_tensors,
)
from batchnorm.torch.namespace import XP
from batchnorm.torch.private import constant_in_graphs, find_transformation, in_forward_mode
from batchnorm.torch.rollback import store
from batchnorm.torch.tracing import is_more

SMALL = 1 << 17  # elements; up to here a training step costs less without calls of operators
# Bytes; glibc maps larger outputs anew at each call, while the kernels' outputs are recycled: that
# is worth more than to fuse evaluation with its neighbours.
KEPT = 32 << 20


def refuse(call: Call) -> str | None:
    """The reason to keep the operator out of a graph, or None."""
    if torch.compiler.is_exporting():
        return "an exported program holds array code, which runs without this library"
    if in_forward_mode():  # read where it is traced, so that graphs depend on it
        return "forward-mode differentiation is at work"
    if call.training and call.settings.synchronizer is not None:
        return "compiled graphs merge with other ranks in array code"
    demanded = call.settings.fused is True
    if not call.by_batch and not demanded and not _is_large(call.tensors.x):
        return "the compiler fuses evaluation with what surrounds it"
    if call.renormalizes:
        return "compiled graphs renormalize in array code"
    if not call.layout.channels_are_neighbours:
        axes = call.layout.channel_axes
        return f"channel axes {axes} are no neighbours, as compiled graphs need them"
    x, _, weight, bias, residual, running = call.tensors
    adjusted = call.adjustment is not None
    return (
        refuse_options(declared.UNSERVED, call.options)
        or refuse_residual(x, residual)
        or refuse_parameters((weight, bias))
        or _choose(x.device.type, NAMES[x.dtype], adjusted, call.mask_varies, demanded)
        or _refuse_small(call, demanded)
        or refuse_tensors(x, call.tensors[:5], running, traced=True)  # takes long to trace
    )


def _is_large(x: Tensor) -> bool:
    """True if outputs of evaluation are worth recycled memory."""
    return x.device.type == "cpu" and is_more(x.numel() * x.element_size(), KEPT)


def _refuse_small(call: Call, demanded: bool) -> str | None:
    x = call.tensors.x
    if demanded or not call.by_batch or x.device.type != "cpu" or is_more(x.numel(), SMALL):
        return None
    return "the compiler's code for small inputs takes less time than calls of operators"


def run(call: Call) -> Tensor:
    """y by the operator; the graph moves the running statistics."""
    y, kept = operators.step(call)
    running, layout = call.tensors.running, call.layout
    if call.update and running is not None:
        average = average_of(centred_of(kept, layout, call.working_type), layout, XP)
        moved = move_by_average(running, average, layout, call.options, XP)
        if call.settings.pending is not None:  # moments to be merged keep all their digits
            average = average_of(centred_of(kept, layout, torch.float64), layout, XP)
        store(running, moved, leaves_statistics(call, average))
    return y


@constant_in_graphs
def _choose(
    device: str, dtype: str, adjusted: bool, per_channel: bool, demanded: bool
) -> str | None:
    """The reason why no kernel serves the call, or None; found while a graph is traced."""
    if find_transformation() is not None:
        return "a transformation of torch is at work"
    choice = choose(device, dtype, adjusted, per_channel, demanded)
    return None if choice.kernel else choice.reason
