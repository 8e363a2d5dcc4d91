"""The kernels' gradient once more, in differentiable operations, for higher derivatives (S8)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.core.merge import recentre
from batchnorm.core.moments import centre
from batchnorm.core.namespace import select
from batchnorm.core.normalize import (
    Affine,
    activation_gradient,
    normalize_batch,
    normalize_running,
    rstd_of,
)
from batchnorm.torch.checks import working_type
from batchnorm.torch.namespace import XP
from batchnorm.torch.ranks.array_moments import RankMerge
from batchnorm.torch.ranks.kernel_moments import moments_of_kernel


def differentiable_backward(
    passes: Any,
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    y: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The same gradients by the plain path, differentiable again in dy, x and weight (S8)."""
    step = ctx.step
    wants_x, wants_weight, wants_bias, wants_residual, _ = ctx.needs_input_grad
    layout = step.decision.layout
    work = working_type(x.dtype)
    if step.options.activation is not None:
        dy = activation_gradient(dy, y, step.options.activation, XP)
    real = None if mask is None else mask != 0
    inputs = [a for a, wanted in ((x, wants_x), (weight, wants_weight)) if wanted and a is not None]
    found: list[Any] = []
    if inputs:
        with torch.enable_grad():
            z = _replay(passes, ctx, x.to(work), weight, real)
            z = z.to(x.dtype)
        again = torch.is_grad_enabled()
        found = list(torch.autograd.grad(z, inputs, dy, create_graph=again))
    dx = found.pop(0) if wants_x else None
    dweight = found.pop(0) if wants_weight else None
    dbias = None
    if wants_bias:
        reduced = tuple(a for a in range(x.dim()) if a not in layout.channel_axes)
        total = XP.sum(select(real, dy.to(work), 0.0, XP), axis=reduced, keepdims=False)
        dbias = total.to(ctx.bias_type)
    if step.options.zero_padding:
        dy = select(real, dy, 0.0, XP)
    return dx, dweight, dbias, dy if wants_residual else None, None


def _replay(passes: Any, ctx: Any, x: Tensor, weight: Tensor | None, mask: Tensor | None) -> Tensor:
    """The forward step without bias and activation, in operations on x and gamma."""
    step = ctx.step
    layout, options = step.decision.layout, step.options

    def row(name: str) -> Tensor:
        values = passes.row(step.kept, name)
        return values.to(x.dtype, copy=True).reshape(layout.statistics)

    affine = Affine(gamma=layout.expand(None if weight is None else weight.to(x.dtype), XP))
    if not step.batch:
        var = 1.0 / row("rstd") ** 2 - options.eps
        return normalize_running(x, row("mean"), var, mask, affine, options, xp=XP)
    if ctx.renorm:
        affine = affine._replace(r=row("r"), d=row("d"))
    split, real = layout.split(x, XP), layout.split(mask, XP)
    centred = centre(split, real, layout.reduced, eps=options.eps, xp=XP)
    if step.part is not None:
        merge = RankMerge(step.part, options.eps, moments_of_kernel(passes, step.kept))
        centred = recentre(split, real, merge.moments(centred), XP)
    rstd = rstd_of(centred, eps=options.eps, correction=0, xp=XP)
    # An empty group has padded rows only, and no gradient depends on their values.
    z = normalize_batch(split, centred, rstd, real, affine, None, options, xp=XP)
    return layout.merge(z, XP)
