"""One step of the kernels, forward or backward, on tensors.

The kernels are those of the extension (`on_cpu`) or, on a GPU, those of Triton (`on_gpu`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from batchnorm.core import config
from batchnorm.core.moments import Moments
from batchnorm.core.running import Running
from batchnorm.torch.kernels import on_cpu
from batchnorm.torch.kernels.decision import Decision, rearrange
from batchnorm.torch.kernels.memory import empty_output, like
from batchnorm.torch.ranks.kernel_moments import merge_kept, total_of_kernel
from batchnorm.torch.ranks.synchronizer import Participation
from batchnorm.torch.recompute import StepHistory
from batchnorm.torch.rollback import unmoved_on_failure

__all__ = ["KernelStep", "Wanted", "arrange", "backward", "find_moments", "find_passes", "forward"]


class KernelStep:
    """One call of the kernels: all that they need beside the tensors that gradients flow to."""

    __slots__ = (
        "batch",
        "decision",
        "history",
        "kept",
        "mask",
        "options",
        "part",
        "residual",
        "running",
        "state",
        "update",
        "y",
    )

    def __init__(
        self,
        decision: Decision,
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
        self.decision = decision
        self.mask = mask
        self.running = running
        self.state = state  # the per-channel tensors as the kernels take them
        self.options = options
        self.batch = batch  # normalize by the batch's own statistics
        self.update = update  # move the running ones
        self.residual = residual  # one is added before the activation
        self.history = history  # where a step with renormalization is remembered, or None
        self.part = part  # of a call whose statistics are merged with other ranks'
        self.y: Tensor | None = None  # if it is filled before autograd records it
        self.kept: Any = None  # what the kernels keep for the backward step

    @property
    def renorm(self) -> bool:
        """Whether renormalization applies (S11)."""
        return self.options.renorm is not None and self.batch and self.running is not None


def find_passes(decision: Decision) -> Any:
    """The kernels that serve such calls: `on_cpu` or `on_gpu`, modules of one interface.

    In both, outputs are tensors to be filled, None where they are not wanted, and `kept` is what
    a forward step leaves for its backward step.
    """
    if decision.kernel == "cpu":
        return on_cpu
    from batchnorm.torch.kernels import on_gpu  # imports Triton

    return on_gpu


def arrange(
    x: Tensor,
    mask: Tensor | None,
    parameters: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    decision: Decision,
    activation: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Decision] | str:
    """x, mask, weight, bias and residual in memory that suits the kernels; or why there is none."""
    if decision.plan is None:
        x, mask, decision = rearrange(x, mask, decision, activation)
        if decision.plan is None:
            return f"channel axes {decision.layout.channel_axes} are apart in memory"
    if mask is not None:
        assert decision.mask_shape is not None
        mask = mask.view(decision.mask_shape)
    weight, bias = parameters
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if residual is not None:
        residual = like(residual, x, decision)
    return x, mask, weight, bias, residual, decision


def forward(
    call: KernelStep,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Fill y and `call.kept`, and move the running statistics, unless it fails (S9)."""
    running, history = call.running, call.history
    if history is None:
        _fill(call, x, weight, bias, residual, y)
    else:
        assert running is not None
        before = Running(*(None if a is None else a.clone() for a in running))
        with unmoved_on_failure(running if call.update else None):
            _fill(call, x, weight, bias, residual, y)
            history.record(running.renorm_mean, _moments(call, call.kept), before)


def _fill(
    call: KernelStep,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    merged = None if call.part is None else _find_kept(call, x)
    if call.update:  # first, since some tensors may not be written
        assert call.running is not None
        increment_version([a for a in call.running if a is not None])
    passes = find_passes(call.decision)
    call.kept = passes.forward(call, x, weight, bias, residual, y, merged)


class Wanted(NamedTuple):
    """Which gradients a backward step computes; weight's and bias's by their types."""

    x: bool
    weight: torch.dtype | None
    bias: torch.dtype | None
    residual: bool  # where an activation comes between; otherwise it is dy


def backward(
    call: KernelStep,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mask: Tensor | None,
    kept: Any,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and dresidual, each None where it is not wanted."""
    decision, channels = call.decision, call.decision.layout.channels
    dx = empty_output(x, decision) if wanted.x or wanted.residual else None
    dresidual = empty_output(x, decision) if wanted.residual else None
    dweight, dbias = (
        None if dtype is None else torch.empty(channels, dtype=dtype, device=x.device)
        for dtype in wanted[1:3]
    )
    # y decides where the activation's input was not x's doing alone.
    rows = (dy, x, y if call.residual else None, mask)
    passes = find_passes(decision)
    if call.part is None or not wanted.x:
        passes.backward(call, *rows, dx, dresidual, dweight, dbias, kept)
    else:
        arguments = (call, *rows, dresidual, dweight, dbias, kept)
        sums = total_of_kernel(lambda: passes.reduce(*arguments), call.part, x.device)
        passes.apply(call, *rows, dx, dresidual, sums, kept)
    return dx if wanted.x else None, dweight, dbias, dresidual


def find_moments(call: KernelStep, x: Tensor) -> Moments:
    """The moments that a forward step would find."""
    return _moments(call, _find_kept(call, x))


def _find_kept(call: KernelStep, x: Tensor) -> Any:
    """What the first pass of a forward step keeps, merged with what it keeps on other ranks."""
    passes = find_passes(call.decision)
    if call.part is None:
        return passes.moments(call, x)
    return merge_kept(passes, lambda: passes.moments(call, x), call.part, x.device)


def _moments(call: KernelStep, kept: Any) -> Moments:
    passes, shape = find_passes(call.decision), call.decision.layout.moments
    mean, var = (passes.row(kept, name).clone().reshape(shape) for name in ("mean", "var"))
    return Moments(passes.count(kept).clone(), mean, var)
