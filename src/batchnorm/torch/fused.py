"""The kernels as one differentiable function, with the plain path behind it.

Everything a step does runs in two calls of the kernels, one forward and one backward: those of
the extension (`compiled`) or, on a GPU, those of Triton (`launched`). What the kernels cannot do,
transformations and higher derivatives, goes to the differentiable path (S8).

A small step is dominated by what surrounds the kernels, so that what depends on shapes and
options alone is found once (`prepare`), and the rest is kept short.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from batchnorm.core import config
from batchnorm.core.moments import Moments
from batchnorm.core.running import Running
from batchnorm.torch import compiled
from batchnorm.torch.kernel_merge import merge_kept, total_of_kernel
from batchnorm.torch.prepared import (
    Prepared,
    empty_output,
    has_memory,
    is_plain,
    like,
    prepare,
    rearrange,
    refuse_parameters,
    refuse_tensors,
)
from batchnorm.torch.replay import differentiable_backward
from batchnorm.torch.runtime import StepHistory, untraced
from batchnorm.torch.synchronize import Participation

__all__ = [
    "Call",
    "Prepared",
    "Wanted",
    "arrange",
    "backward",
    "find_passes",
    "forward",
    "is_plain",
    "normalize",
    "prepare",
    "refuse_parameters",
    "refuse_tensors",
    "run",
]


class Call:
    """One call of the kernels: all that they need beside the tensors that gradients flow to."""

    __slots__ = (
        "batch",
        "history",
        "mask",
        "options",
        "part",
        "prepared",
        "residual",
        "running",
        "state",
        "update",
    )

    def __init__(
        self,
        prepared: Prepared,
        mask: Tensor | None,
        running: Running | None,
        state: tuple[int, ...],
        options: config.Options,
        batch: bool,
        update: bool,
        residual: bool,
        history: StepHistory | None,
        part: Participation | None = None,
    ) -> None:
        self.prepared = prepared
        self.mask = mask
        self.running = running
        self.state = state  # the per-channel tensors as the kernels take them
        self.options = options
        self.batch = batch  # normalize by the batch's own statistics
        self.update = update  # move the running ones
        self.residual = residual  # one is added before the activation
        self.history = history  # where a step with renormalization is remembered, or None
        self.part = part  # of a call whose statistics are merged with other ranks'

    @property
    def renorm(self) -> bool:
        """Whether renormalization applies (S11)."""
        return self.options.renorm is not None and self.batch and self.running is not None


def find_passes(prepared: Prepared) -> Any:
    """The kernels that serve such calls: `compiled` or `launched`, modules of one interface.

    In both, outputs are tensors to be filled, None where they are not wanted, and `kept` is what
    a forward step leaves for its backward step.
    """
    if prepared.kernel == "cpu":
        return compiled
    from batchnorm.torch import launched  # imports Triton

    return launched


def normalize(
    x: Tensor,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    running: Running | None,
    prepared: Prepared,
    options: config.Options,
    *,
    batch: bool,
    update: bool,
    history: StepHistory,
    again: bool,
    owner: str,
    part: Participation | None = None,
) -> Tensor | str:
    """Normalize by the kernels; the reason where x's memory does not suit them.

    Args:
        x, mask, parameters, residual, running: checked, and nothing that `is_plain` or
            `refuse_tensors` objects to.
        prepared: of x and the mask.
        options: as in Options.
        batch: normalize by the batch's own statistics.
        update: move the running ones.
        history: of steps with renormalization, for when one is recomputed.
        again: whether this one is a recomputation (S9).
        owner: whose name error messages carry.
        part: how the call takes part in synchronization, or None (S14).
    """
    arranged = arrange(x, mask, parameters, residual, prepared, options.activation)
    if isinstance(arranged, str):
        return arranged
    x, mask, weight, bias, residual, prepared = arranged
    passes = find_passes(prepared)
    state = passes.find_state(weight, bias, running)
    residuals = residual is not None
    call = Call(prepared, mask, running, state, options, batch, update, residuals, None, part)
    if call.renorm:
        assert running is not None
        if again:  # the statistics have moved since the step that is recomputed
            moments = find_moments(call, x)
            call.running = history.recall(owner, running.renorm_mean, moments)
            call.state = passes.find_state(weight, bias, call.running)
        else:
            call.history = history
    return run(call, x, weight, bias, residual)


def arrange(
    x: Tensor,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    prepared: Prepared,
    activation: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Prepared] | str:
    """x, mask, weight, bias and residual in memory that suits the kernels; or why there is none."""
    if prepared.plan is None:
        x, mask, prepared = rearrange(x, mask, prepared, activation)
        if prepared.plan is None:
            return f"channel axes {prepared.layout.channel_axes} are apart in memory"
    if mask is not None:
        assert prepared.mask_shape is not None
        mask = mask.view(prepared.mask_shape)
    weight, bias = parameters
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if residual is not None:
        residual = like(residual, x, prepared)
    return x, mask, weight, bias, residual, prepared


def run(
    call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """y, recorded for autograd where a gradient may be asked for."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _apply(x, weight, bias, residual, call)
    return forward(call, x, weight, bias, residual)[0]


class _Fused(torch.autograd.Function):
    """The kernels' forward and backward step."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
    ) -> Tensor:
        y, ctx.kept = forward(call, x, weight, bias, residual)
        ctx.save_for_backward(x, weight, call.mask, None if call.options.activation is None else y)
        ctx.memory = _memory(x, call.mask, y)
        ctx.renorm, ctx.bias_type = call.renorm, None if bias is None else bias.dtype
        # Running statistics have served their turn, and may move before the backward pass.
        call.running = call.mask = call.history = None
        ctx.call = call
        return y

    @staticmethod
    @untraced
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, mask, y = ctx.saved_tensors
        if (
            torch.is_grad_enabled()
            or type(dy) is not Tensor
            or not has_memory(dy)
            # Hooks on saved tensors may bring them back in other memory.
            or _memory(x, mask, y) != (*ctx.memory[:2], None if y is None else ctx.memory[2])
        ):
            passes = find_passes(ctx.call.prepared)
            return differentiable_backward(passes, ctx, dy, x, weight, mask, y)
        wants_x, wants_weight, wants_bias, wants_residual, _ = ctx.needs_input_grad
        gated = ctx.call.options.activation is not None
        wanted = Wanted(
            wants_x,
            weight.dtype if wants_weight else None,
            ctx.bias_type if wants_bias else None,
            wants_residual and gated,
        )
        dy = like(dy, x, ctx.call.prepared)
        found = backward(ctx.call, dy, x, y, mask, ctx.kept, wanted)
        return (*found[:3], dy if wants_residual and not gated else found[3], None)


def _memory(x: Tensor, mask: Tensor | None, y: Tensor | None) -> tuple[Any, ...]:
    return (
        x.stride(),
        None if mask is None else mask.stride(),
        None if y is None else y.stride(),
    )


# Function.apply without its search for functorch's wrappers, which `is_plain` has ruled out: that
# takes as long as the kernel on a small tensor.
_apply: Any = super(torch.autograd.Function, _Fused).apply


def forward(
    call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Any]:
    """y, and what the kernels keep for the backward step."""
    prepared, running = call.prepared, call.running
    y = empty_output(x, prepared)
    before = None
    if call.history is not None:
        assert running is not None
        before = Running(*(None if a is None else a.clone() for a in running))
    merged = None if call.part is None else _find_kept(call, x)
    kept = find_passes(prepared).forward(call, x, weight, bias, residual, y, merged)
    if call.update:
        assert running is not None
        increment_version([a for a in running if a is not None])
    if before is not None:
        assert call.history is not None
        assert running is not None
        call.history.record(running.renorm_mean, _moments(call, kept), before)
    return y, kept


class Wanted(NamedTuple):
    """Which gradients a backward step computes; weight's and bias's by their types."""

    x: bool
    weight: torch.dtype | None
    bias: torch.dtype | None
    residual: bool  # where an activation comes between; otherwise it is dy


def backward(
    call: Call,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    kept: Any,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and dresidual, each None where it is not wanted."""
    prepared, channels = call.prepared, call.prepared.layout.channels
    dx = empty_output(x, prepared) if wanted.x or wanted.residual else None
    dresidual = empty_output(x, prepared) if wanted.residual else None
    dweight, dbias = (
        None if dtype is None else torch.empty(channels, dtype=dtype, device=x.device)
        for dtype in wanted[1:3]
    )
    # y decides where the activation's input was not x's doing alone.
    rows = (dy, x, y if call.residual else None, mask)
    passes = find_passes(prepared)
    if call.part is None or not wanted.x:
        passes.backward(call, *rows, dx, dresidual, dweight, dbias, kept)
    else:
        arguments = (call, *rows, dresidual, dweight, dbias, kept)
        sums = total_of_kernel(lambda: passes.reduce(*arguments), call.part, x.device)
        passes.apply(call, *rows, dx, dresidual, sums, kept)
    return dx if wanted.x else None, dweight, dbias, dresidual


def find_moments(call: Call, x: Tensor) -> Moments:
    """The moments that a forward step would find."""
    return _moments(call, _find_kept(call, x))


def _find_kept(call: Call, x: Tensor) -> Any:
    """What the first pass of a forward step keeps, merged with what it keeps on other ranks."""
    passes = find_passes(call.prepared)
    if call.part is None:
        return passes.moments(call, x)
    return merge_kept(passes, lambda: passes.moments(call, x), call.part, x.device)


def _moments(call: Call, kept: Any) -> Moments:
    passes, shape = find_passes(call.prepared), call.prepared.layout.moments
    mean, var = (passes.row(kept, name).clone().reshape(shape) for name in ("mean", "var"))
    return Moments(passes.count(kept).clone(), mean, var)
