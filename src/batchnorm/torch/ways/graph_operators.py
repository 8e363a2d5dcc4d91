"""y by operators of a graph that `torch.compile` makes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.core.forward import move_running
from batchnorm.torch.call import Call
from batchnorm.torch.kernels import operators
from batchnorm.torch.kernels.decision import choose
from batchnorm.torch.kernels.tensors import NAMES, refuse_parameters, refuse_tensors
from batchnorm.torch.namespace import XP
from batchnorm.torch.ways.array_code import store
from batchnorm.torch.ways.eager_kernels import refuse_residual


def by_operator(call: Call, demanded: bool) -> Tensor | str:
    """y by an operator of a compiled graph, or why there is none for it."""
    refusal = _refuse_operator(call, demanded)
    if refusal is not None:
        return refusal
    y, centred = operators.step(
        *call[:5],
        call.layout,
        call.options,
        batch=call.batch,
        demanded=demanded,
        owner=call.owner,
    )
    if call.mode.update and call.running is not None:
        moved = move_running(call.running, centred, call.layout, call.options, XP)
        store(call.running, moved, call.x)
    return y


def _refuse_operator(call: Call, demanded: bool) -> str | None:
    """Why a graph should not hold the operator for such a call, or None."""
    if torch.compiler.is_exporting():
        return "an exported program holds array code, which runs without this library"
    if forward_ad._current_level >= 0:  # read where it is traced, so that graphs depend on it
        return "forward-mode differentiation is at work"
    if call.part is not None:
        return "compiled graphs merge with other ranks in array code"
    if not call.batch and not demanded:
        return "the compiler fuses evaluation with what surrounds it"
    if call.options.renorm is not None and call.batch:
        return "compiled graphs renormalize in array code"
    axes = call.layout.channel_axes
    if axes != tuple(range(axes[0], axes[0] + len(axes))):
        return f"channel axes {axes} are no neighbours, as compiled graphs need them"
    x, mask, parameters, residual, running = call[:5]
    shape = None if mask is None else call.layout.mask_shape(tuple(mask.shape), call.owner)
    per_channel = shape is not None and any(shape[a] != 1 for a in axes)
    return (
        refuse_residual(call)
        or refuse_parameters(parameters)
        or refuse_tensors(x, (x, mask, *parameters, residual), running, traced=True)
        or _choose(
            x.device.type, NAMES[x.dtype], call.adjustment is not None, per_channel, demanded
        )
    )


def _choose(
    device: str, dtype: str, adjusted: bool, per_channel: bool, demanded: bool
) -> str | None:
    """Why no kernel serves the call, or None; found while a graph is traced."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transformation of torch is at work"
    choice = choose(device, dtype, adjusted, per_channel, demanded)
    return None if choice.kernel else choice.reason


# torch.compiler.assume_constant_result, without importing the compiler: that takes seconds.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
