"""The backward pass of a layer in closed form, for front ends without their own autograd (S8)."""

from __future__ import annotations

from batchnorm.core.config import Options
from batchnorm.core.forward import Inputs, Outcome, channel_affine, expand_running
from batchnorm.core.gradient import Gradients, gradient
from batchnorm.core.layout import Layout
from batchnorm.core.namespace import Array, Namespace
from batchnorm.core.normalize import activation_gradient, normalized, rstd_of_running
from batchnorm.core.running import Running


def backward_batch(
    dy: Array,
    inputs: Inputs,
    outcome: Outcome,
    layout: Layout,
    options: Options,
    *,
    xp: Namespace,
) -> Gradients:
    """The gradient of `forward_batch`.

    Args:
        dy: gradient with respect to y, of x's shape.
        inputs: those of the forward pass.
        outcome: of the forward pass.
        layout: of inputs.x.
        options: those of the forward pass.
        xp: array namespace.

    Returns:
        Gradients: dx of x's shape; dgamma and dbeta per channel.
    """
    dy = activation_gradient(dy, outcome.y, options.activation, xp)
    kept = layout.kept if layout.groups is None else layout.kept[1:]
    found = gradient(
        layout.split(dy, xp),
        normalized(outcome.centred, outcome.rstd),
        outcome.rstd,
        outcome.centred.count,
        layout.mask(inputs.mask, xp),
        outcome.affine,
        layout.reduced,
        tuple(a for a in range(len(layout.working)) if a not in kept),
        correction=options.correction,
        xp=xp,
    )
    return _shaped(found, layout, xp)


def backward_running(
    dy: Array,
    y: Array,
    inputs: Inputs,
    running: Running,
    layout: Layout,
    options: Options,
    *,
    xp: Namespace,
) -> Gradients:
    """The gradient of `forward_running`, whose result is y; otherwise as `backward_batch`."""
    expanded = expand_running(running, layout, xp)
    rstd = rstd_of_running(expanded.var, eps=options.eps, xp=xp)
    found = gradient(
        activation_gradient(dy, y, options.activation, xp),
        (inputs.x - expanded.mean) * rstd,
        rstd,
        None,
        layout.mask(inputs.mask, xp),
        channel_affine(inputs, layout, xp),
        layout.reduced,
        layout.reduced,
        correction=options.correction,
        xp=xp,
    )
    return _shaped(found, layout, xp)


def _shaped(found: Gradients, layout: Layout, xp: Namespace) -> Gradients:
    return Gradients(
        layout.merge(found.dx, xp),
        xp.reshape(found.dgamma, layout.channels),
        xp.reshape(found.dbeta, layout.channels),
    )
