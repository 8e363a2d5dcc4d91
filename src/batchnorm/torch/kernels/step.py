"""One step of the kernels, forward or backward, on tensors.

The kernels are those of the extension (`on_cpu`) or, on a GPU, those of Triton (`on_gpu`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from batchnorm.core import config
from batchnorm.core.layout import Layout
from batchnorm.core.moments import Centred, Moments, centred_from
from batchnorm.core.running import Running
from batchnorm.kernels.kept import STATISTICS
from batchnorm.torch.call import Tensors
from batchnorm.torch.kernels import on_cpu
from batchnorm.torch.kernels.decision import Decision, rearrange
from batchnorm.torch.kernels.memory import empty_output, like
from batchnorm.torch.kernels.records import Gradients, KernelStep, Rows, Wanted
from batchnorm.torch.namespace import XP
from batchnorm.torch.ranks.kernel_moments import merge_kept, total_of_kernel
from batchnorm.torch.recompute import remember_step
from batchnorm.torch.rollback import unmoved_on_failure

__all__ = ["arrange", "backward", "centred_of", "find_moments", "find_passes", "forward"]


def find_passes(decision: Decision) -> Any:
    """The kernels that serve such calls: `on_cpu` or `on_gpu`, modules of one interface.

    In both, outputs are tensors to be filled, None where they are not wanted, and `kept` is the
    record that a forward step leaves for its backward step.
    """
    if decision.kernel == "cpu":
        return on_cpu
    from batchnorm.torch.kernels import on_gpu  # imports Triton

    return on_gpu


def arrange(
    tensors: Tensors, decision: Decision, options: config.Options
) -> tuple[Tensors, Decision]:
    """The tensors in memory that suits the kernels, and the decision about that."""
    x, mask, weight, bias, residual, running = tensors
    if decision.plan is None:
        x, mask, decision = rearrange(x, mask, decision, (options.activation, options.zero_padding))
    if mask is not None:
        assert decision.mask_shape is not None
        mask = mask.view(decision.mask_shape)
    if weight is not None and not weight.is_contiguous():
        weight = weight.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if residual is not None:
        residual = like(residual, x, decision)
    return Tensors(x, mask, weight, bias, residual, running), decision


def forward(
    step: KernelStep,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    """Fill y and `step.kept`, and move the running statistics, unless it fails (S9)."""
    if not step.remembered:
        _fill(step, x, weight, bias, residual, y)
        return
    running = step.running
    assert running is not None
    before = Running(*(None if a is None else a.clone() for a in running))
    with unmoved_on_failure(running if step.update else None):
        _fill(step, x, weight, bias, residual, y)
        remember_step(running.renorm_mean, _moments(step, step.kept), before)


def _fill(
    step: KernelStep,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
) -> None:
    merged = None if step.part is None else _find_kept(step, x)
    if step.update:  # first, since some tensors may not be written
        assert step.running is not None
        increment_version([a for a in step.running if a is not None])
    passes = find_passes(step.decision)
    step.kept = passes.forward(step, x, weight, bias, residual, y, merged)


def backward(step: KernelStep, rows: Rows, kept: Any, wanted: Wanted) -> Gradients:
    """The gradients of a step that are wanted; the residual's comes with x's."""
    decision, x = step.decision, rows.x
    channels = decision.layout.channels
    dx = empty_output(x, decision) if wanted.x or wanted.residual else None
    dresidual = empty_output(x, decision) if wanted.residual else None
    dweight, dbias = (
        None if dtype is None else torch.empty(channels, dtype=dtype, device=x.device)
        for dtype in wanted[1:3]
    )
    found = Gradients(dx, dweight, dbias, dresidual)
    passes = find_passes(decision)
    if step.part is None or not wanted.x:
        passes.backward(step, rows, found, kept)
    else:
        sums = total_of_kernel(lambda: passes.reduce(step, rows, found, kept), step.part, x.device)
        passes.apply(step, rows, found, sums, kept)
    return found if wanted.x else Gradients(None, dweight, dbias, dresidual)


def find_moments(step: KernelStep, x: Tensor) -> Moments:
    """The moments that a forward step would find."""
    return _moments(step, _find_kept(step, x))


def _find_kept(step: KernelStep, x: Tensor) -> Any:
    """The record of a forward step's first pass, merged with those of other ranks."""
    passes = find_passes(step.decision)
    if step.part is None:
        return passes.moments(step, x)
    return merge_kept(passes, lambda: passes.moments(step, x), step.part, x.device)


def _moments(step: KernelStep, kept: Any) -> Moments:
    passes, shape = find_passes(step.decision), step.decision.layout.moments
    mean, var = (passes.row(kept, name).clone().reshape(shape) for name in ("mean", "var"))
    return Moments(passes.count(kept).clone(), mean, var)


def centred_of(kept: Tensor, layout: Layout, work: torch.dtype) -> Centred:
    """The moments of a step's record as the core takes them, shaped `layout.statistics`.

    `kept`: as `pack` gives it; `work`: the type in which an overflow is no update (S9).
    """
    groups = 1 if layout.groups is None else layout.groups
    rows, counts = torch.split(kept.to(work), [kept.shape[0] - groups, groups])
    rows = rows.reshape(len(STATISTICS), *layout.statistics)
    mean, low, var = (rows[STATISTICS[name]] for name in ("mean", "low", "var"))
    per_group = [n if a == 1 and layout.groups is not None else 1 for a, n in enumerate(var.shape)]
    count = counts.reshape(per_group) * torch.ones_like(var)
    return centred_from(count, mean, low, var, XP)
