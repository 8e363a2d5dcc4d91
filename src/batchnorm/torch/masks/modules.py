"""torch's modules that change the number of positions, as anchors along each axis."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torch import nn

from batchnorm.core.resolution import (
    Anchors,
    find_anchors,
    find_resized,
    find_scaled,
    find_transposed,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d),
)
_ADAPTIVE = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_PADS = (
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
)
_RESIZES = (nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle)
_KNOWN = (*_CONVOLUTIONS, *_TRANSPOSED, *_POOLS, *_ADAPTIVE, *_PADS, *_RESIZES)
_MOST = 1 << 16  # denominator of a scale


def is_known(module: nn.Module) -> bool:
    """True for a module whose anchors are known."""
    return isinstance(module, _KNOWN)


def count_axes(module: nn.Module, rank: int) -> int:
    """The number of spatial axes of an input of this rank."""
    if isinstance(module, nn.Upsample):
        return rank - 2
    if isinstance(module, (nn.PixelShuffle, nn.PixelUnshuffle)):
        return 2
    kind = next(kind for kind in type(module).__mro__ if kind in _KNOWN)
    return int(kind.__name__[-2])  # of "Conv2d"


def find_module_anchors(
    module: nn.Module, sizes: tuple[int, ...], goals: tuple[int, ...]
) -> list[Anchors | None]:
    """The anchors along each spatial axis; None where a subclass has another output size."""
    axes = len(sizes)
    pairs = list(zip(sizes, goals, strict=True))
    if isinstance(module, _ADAPTIVE):
        # A sample alone has all the outputs, however short it is.
        return [find_resized(n, m, every=False) for n, m in pairs]
    if isinstance(module, _TRANSPOSED):
        strides = _spread(module.stride, axes)
        return [find_transposed(n, m, s) for (n, m), s in zip(pairs, strides, strict=True)]
    if isinstance(module, _RESIZES):
        return [_resize(module, axis, n, m) for axis, (n, m) in enumerate(pairs)]
    made = [_window(module, axis, axes) for axis in range(axes)]
    return [_agree(each, n, m) for each, (n, m) in zip(made, pairs, strict=True)]


def _agree(anchors: Anchors, size: int, goal: int) -> Anchors | None:
    if anchors.count(size) == goal:
        return anchors
    # A layer that pads by itself: as many outputs as strides begin.
    return anchors._replace(span=0) if goal == -(-size // anchors.step) else None


def _window(module: Any, axis: int, axes: int) -> Anchors:
    if isinstance(module, _PADS):
        before, after = module.padding[2 * (axes - 1 - axis) : 2 * (axes - axis)]  # last axis first
        return find_anchors(1, 1, (before, after))
    kernel = _spread(module.kernel_size, axes)[axis]
    given = module.stride
    stride = kernel if given is None else _spread(given, axes)[axis]
    dilation = _spread(getattr(module, "dilation", 1), axes)[axis]
    padding = getattr(module, "padding", 0)
    if padding == "valid":
        padding = 0
    if padding == "same":
        both = (dilation * (kernel - 1), 0)
    else:
        both = (_spread(padding, axes)[axis],) * 2
    return find_anchors(kernel, stride, both, dilation, ceil=getattr(module, "ceil_mode", False))


def _resize(module: Any, axis: int, size: int, goal: int) -> Anchors:
    if isinstance(module, nn.PixelShuffle):
        return find_scaled(Fraction(module.upscale_factor))
    if isinstance(module, nn.PixelUnshuffle):
        return find_scaled(Fraction(1, module.downscale_factor))
    factors = module.scale_factor
    if factors is not None:
        factor = factors[axis] if isinstance(factors, tuple) else factors
        anchors = find_scaled(Fraction(factor).limit_denominator(_MOST))
        if anchors.count(size) == goal:
            return anchors
    return find_resized(size, goal)


def _spread(value: Any, axes: int) -> tuple[int, ...]:
    """One number for each axis."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
