"""torch's modules that change the number of positions, as walks along each axis."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from torch import nn

from batchnorm.torch.masks.walks import Walk, proportion, scale, spread, window

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
    """True for a module whose walks are known."""
    return isinstance(module, _KNOWN)


def count_axes(module: nn.Module, rank: int) -> int:
    """The number of spatial axes of an input of this rank."""
    if isinstance(module, nn.Upsample):
        return rank - 2
    if isinstance(module, (nn.PixelShuffle, nn.PixelUnshuffle)):
        return 2
    kind = next(kind for kind in type(module).__mro__ if kind in _KNOWN)
    return int(kind.__name__[-2])  # of "Conv2d"


def find_walks(
    module: nn.Module, sizes: tuple[int, ...], goals: tuple[int, ...]
) -> list[Walk | None]:
    """The walk along each spatial axis; None where a subclass has another output size."""
    axes = len(sizes)
    pairs = list(zip(sizes, goals, strict=True))
    if isinstance(module, _ADAPTIVE):
        # A sample alone has all the outputs, however short it is.
        return [proportion(n, m, every=False) for n, m in pairs]
    if isinstance(module, _TRANSPOSED):
        strides = _spread(module.stride, axes)
        return [spread(n, m, s) for (n, m), s in zip(pairs, strides, strict=True)]
    if isinstance(module, _RESIZES):
        return [_resize(module, axis, n, m) for axis, (n, m) in enumerate(pairs)]
    made = [_window(module, axis, axes) for axis in range(axes)]
    return [_agree(walk, n, m) for walk, (n, m) in zip(made, pairs, strict=True)]


def _agree(walk: Walk, size: int, goal: int) -> Walk | None:
    if walk.count(size) == goal:
        return walk
    # A layer that pads by itself: as many outputs as strides begin.
    return walk._replace(span=0) if goal == -(-size // walk.step) else None


def _window(module: Any, axis: int, axes: int) -> Walk:
    if isinstance(module, _PADS):
        before, after = module.padding[2 * (axes - 1 - axis) : 2 * (axes - axis)]  # last axis first
        return window(1, 1, 1, (before, after))
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
    return window(kernel, stride, dilation, both, ceil=getattr(module, "ceil_mode", False))


def _resize(module: Any, axis: int, size: int, goal: int) -> Walk:
    if isinstance(module, nn.PixelShuffle):
        return scale(Fraction(module.upscale_factor))
    if isinstance(module, nn.PixelUnshuffle):
        return scale(Fraction(1, module.downscale_factor))
    factors = module.scale_factor
    if factors is not None:
        factor = factors[axis] if isinstance(factors, tuple) else factors
        walk = scale(Fraction(factor).limit_denominator(_MOST))
        if walk.count(size) == goal:
            return walk
    return proportion(size, goal)


def _spread(value: Any, axes: int) -> tuple[int, ...]:
    """One number for each axis."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * axes
