"""One step of the kernels, forward or backward, on tensors.

The kernels are those of the extension (`compiled`) or, on a GPU, those of Triton (`launched`).
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
from batchnorm.torch.prepared import Prepared, empty_output, like, rearrange
from batchnorm.torch.runtime import StepHistory
from batchnorm.torch.synchronize import Participation
from batchnorm.torch.unmoved import unmoved_on_failure

__all__ = ["Call", "Wanted", "arrange", "backward", "find_moments", "find_passes", "forward"]


class Call:
    """One call of the kernels: all that they need beside the tensors that gradients flow to."""

    __slots__ = (
        "batch",
        "history",
        "kept",
        "mask",
        "options",
        "part",
        "prepared",
        "residual",
        "running",
        "state",
        "update",
        "y",
    )

    def __init__(
        self,
        prepared: Prepared,
        mask: Tensor | None,
        running: Running | None,
        state: Any,
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
        self.y: Tensor | None = None  # if it is filled before autograd records it
        self.kept: Any = None  # what the kernels keep for the backward step

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


def forward(
    call: Call,
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
    call: Call,
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
    passes = find_passes(call.prepared)
    call.kept = passes.forward(call, x, weight, bias, residual, y, merged)


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
