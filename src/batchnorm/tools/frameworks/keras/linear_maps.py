"""Keras's linear maps, as folding sees them."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from batchnorm.tools.frameworks.affine import Affine, into_next, into_previous


class LinearMap(NamedTuple):
    """The axes of a kind of linear map that hold channels.

    Attributes:
        output: axes of the (last) kernel that hold output channels.
        next: a batch norm in front of it can be folded into it.
    """

    output: tuple[int, ...]
    next: bool = False


# Exactly these types: a subclass may compute something else.
_MAPS: dict[type, LinearMap] = {
    layers.Dense: LinearMap((-1,), True),
    **dict.fromkeys((layers.Conv1D, layers.Conv2D, layers.Conv3D), LinearMap((-1,), True)),
    layers.Conv1DTranspose: LinearMap((-2,)),
    layers.Conv2DTranspose: LinearMap((-2,)),
    layers.Conv3DTranspose: LinearMap((-2,)),
    layers.DepthwiseConv1D: LinearMap((-2, -1)),
    layers.DepthwiseConv2D: LinearMap((-2, -1)),
    layers.SeparableConv1D: LinearMap((-1,)),
    layers.SeparableConv2D: LinearMap((-1,)),
}
_DO_NOTHING = (
    *(layers.Identity, layers.Dropout, layers.GaussianNoise, layers.GaussianDropout),
    *(layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D),
)


def is_map(layer: Any) -> bool:
    """True for a linear map that a batch norm can be folded into."""
    return type(layer) in _MAPS


def does_nothing(layer: Any) -> bool:
    """True for a layer that returns its input in inference."""
    return type(layer) in _DO_NOTHING


def refuse_map(layer: Any) -> str | None:
    """The reason why a layer is more than a linear map, or None."""
    if getattr(layer, "quantization_mode", None) is not None:
        return "it is quantized"
    if getattr(layer, "lora_enabled", False):
        return "it has LoRA weights"
    return None


def refuse_activation(layer: Any) -> str | None:
    """The reason against folding anything behind a layer into it, or None."""
    activation = getattr(layer, "activation", None)
    if activation in (None, keras.activations.linear):
        return None
    return f"it applies {getattr(activation, '__name__', activation)}"


def refuse_next(layer: Any, affine: Affine) -> str | None:
    """The reason against folding a batch norm into the layer behind it, or None."""
    if not _MAPS[type(layer)].next or getattr(layer, "groups", 1) != 1:
        return "which only takes batch norms behind it"
    padding = getattr(layer, "padding", "valid")
    if padding == "valid" or not affine.moves_zero:
        return None
    if padding == "same" and all(n == 1 for n in layer.kernel_size):
        return None
    return "which pads with zeros that the batch norm would move"


def channel_axis(layer: Any, rank: int) -> int:
    """The axis of a linear map's input and output that holds channels."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def with_previous(layer: Any, weights: list[Any], affine: Affine) -> list[Any]:
    """A layer's weights with the batch norm behind it, a bias among them."""
    kernel, bias, rest = _parts(layer, weights)
    axes = _MAPS[type(layer)].output
    if len(axes) == 2:  # (..., inputs, multiplier): one output channel for each pair
        flat = kernel.reshape(*kernel.shape[:-2], -1)
        folded = into_previous(flat, bias, affine, axis=-1)
        folded = folded._replace(weight=folded.weight.reshape(kernel.shape))
    else:
        folded = into_previous(kernel, bias, affine, axis=axes[0])
    return [*rest, folded.weight, folded.bias]


def with_next(layer: Any, weights: list[Any], affine: Affine) -> list[Any]:
    """A layer's weights with the batch norm in front of it, a bias among them."""
    kernel, bias, rest = _parts(layer, weights)
    return [*rest, *into_next(kernel, bias, affine, axis=-2, output_axis=-1)]


def _parts(layer: Any, weights: list[Any]) -> tuple[Any, Any, list[Any]]:
    """The kernel that makes the outputs, the bias or None, and kernels before it."""
    wide = [np.asarray(a, np.float64) for a in weights]
    bias = wide.pop() if len(wide) > _kernels(layer) else None
    return wide[-1], bias, wide[:-1]


def _kernels(layer: Any) -> int:
    return 2 if isinstance(layer, (layers.SeparableConv1D, layers.SeparableConv2D)) else 1
