"""Folding an inference batch normalization into a neighbouring linear map (S19)."""

from __future__ import annotations

from typing import NamedTuple

from batchnorm.core.namespace import Array, Namespace
from batchnorm.core.normalize import rstd_of_running


class Folded(NamedTuple):
    """Weight and bias of a linear map with a normalization folded into it."""

    weight: Array
    bias: Array


def inference_affine(
    mean: Array, var: Array, gamma: Array | None, beta: Array | None, *, eps: float, xp: Namespace
) -> tuple[Array, Array]:
    """a and b of y = a·x + b, per channel; in float64, since at large offsets b loses digits."""
    a = rstd_of_running(var, eps=eps, xp=xp)
    a = a if gamma is None else a * gamma
    b = -mean * a
    return a, b if beta is None else b + beta


def fold_into_previous(
    weight: Array,
    bias: Array | None,
    a: Array,
    b: Array,
    *,
    axis: int = 0,
    groups: int = 1,
    xp: Namespace,
) -> Folded:
    """Fold a·(W·x + w0) + b into W', w0'.

    Args:
        weight: the linear map's weight.
        bias: w0, shape (out,), or None for 0.
        a: scale per output channel, shape (out,).
        b: offset per output channel, shape (out,).
        axis: weight's output-channel axis. It holds all output channels, or out / groups of
            them where axis 0 holds the inputs of all groups (transposed convolution).
        groups: of the linear map.
        xp: array namespace.
    """
    shape = tuple(weight.shape)
    axis = axis % len(shape)
    if axis != 0 and groups > 1:
        sizes = [1] * (len(shape) + 1)
        sizes[0], sizes[axis + 1] = groups, shape[axis]
        grouped = xp.reshape(weight, (groups, shape[0] // groups, *shape[1:]))
        folded = xp.reshape(grouped * xp.reshape(a, sizes), shape)
    else:
        folded = weight * xp.reshape(a, _along(axis, len(shape)))
    return Folded(folded, b if bias is None else a * bias + b)


def fold_into_next(
    weight: Array,
    bias: Array | None,
    a: Array,
    b: Array,
    *,
    axis: int = 1,
    output_axis: int = 0,
    groups: int = 1,
    xp: Namespace,
) -> Folded:
    """Fold W·(a·x + b) + w0 into W', w0'; exact only where the map pads nothing.

    Args:
        weight: the linear map's weight.
        bias: w0, shape (out,), or None for 0.
        a: scale per input channel, shape (in,).
        b: offset per input channel, shape (in,).
        axis: weight's input-channel axis, of size in / groups.
        output_axis: weight's output-channel axis, of size out; 0 if there are groups.
        groups: of the linear map.
        xp: array namespace.

    Raises:
        ValueError: groups with an output axis other than 0.
    """
    shape = tuple(weight.shape)
    axis, output_axis = axis % len(shape), output_axis % len(shape)
    if groups > 1 and output_axis != 0:
        raise ValueError(
            f"fold_into_next: with groups the output channels must lie on axis 0; got "
            f"output_axis={output_axis} and groups={groups}."
        )
    if groups > 1:
        view = (groups, shape[0] // groups, *shape[1:])
        sizes = [1] * len(view)
        sizes[0], sizes[axis + 1] = groups, shape[axis]
        summed = tuple(range(2, len(view)))
    else:
        view, sizes = shape, list(_along(axis, len(shape)))
        summed = tuple(i for i in range(len(shape)) if i != output_axis)
    grouped = xp.reshape(weight, view)
    offset = xp.sum(grouped * xp.reshape(b, sizes), axis=summed, keepdims=False)
    offset = xp.reshape(offset, (shape[output_axis],))
    folded = xp.reshape(grouped * xp.reshape(a, sizes), shape)
    return Folded(folded, offset if bias is None else bias + offset)


def _along(axis: int, rank: int) -> tuple[int, ...]:
    return tuple(-1 if i == axis else 1 for i in range(rank))
