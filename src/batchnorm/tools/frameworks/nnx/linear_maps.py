"""flax nnx's linear maps, as folding sees them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from batchnorm.core.fold import Folded
from batchnorm.jax.layers import BatchNorm
from batchnorm.jax.options import OPTIONS
from batchnorm.tools.frameworks.affine import Affine, affine_of, into_next, into_previous
from batchnorm.tools.frameworks.nnx.stacked import stack_of
from batchnorm.tools.frameworks.nnx.states import take_state

# Exactly these types: a subclass may compute something else.
_MAPS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
_NORMS = (nnx.BatchNorm, BatchNorm)


def is_map(module: Any) -> bool:
    """True for a linear map that a batch norm can be folded into."""
    return type(module) in _MAPS


def spatial_axes(module: Any) -> int:
    """Axes between the batch and the channels of a linear map's input."""
    return module.kernel[...].ndim - 2


def fold_pair(first: Any, second: Any) -> str | None:
    """Fold a linear map and a batch norm that run one after the other, in place.

    Returns:
        None, or the reason against it; nothing has changed then.
    """
    behind = is_map(first)
    linear, norm = (first, second) if behind else (second, first)
    if type(norm) not in _NORMS:
        return f"it is a {type(norm).__name__}, which may compute something else"
    rank = 2 if isinstance(linear, nnx.Linear) else len(linear.kernel_shape)
    if stack_of(norm) or linear.kernel[...].ndim != rank:
        return "its arrays are those of several layers, stacked"
    if norm.axis not in (-1, (-1,)):
        return f"it normalizes axis {norm.axis}, and channels lie on axis -1"
    if option := _unfolded(norm):
        return f"it has {option}={getattr(norm, option)!r}, which no linear map can take over"
    if getattr(linear, "mask", None) is not None:
        return "its kernel has a mask"
    affine = affine_of(take_state(norm))
    channels = linear.out_features if behind else linear.in_features
    if affine.scale.size != channels:
        return f"it has {affine.scale.size} channels, and the map {channels}"
    kernel = np.asarray(linear.kernel[...], np.float64)
    bias = None if linear.bias is None else np.asarray(linear.bias[...], np.float64)
    if behind:
        transposed = getattr(linear, "transpose_kernel", False)
        _replace(linear, into_previous(kernel, bias, affine, axis=-2 if transposed else -1))
        return None
    reason = _refuse_next(linear, affine)
    if reason is None:
        _replace(linear, into_next(kernel, bias, affine, axis=-2, output_axis=-1))
    return reason


def _unfolded(norm: Any) -> str | None:
    """The option that makes a layer in evaluation more than an affine map, or None."""
    for option in OPTIONS:
        if not option.folds and getattr(norm, option.name, option.kept) != option.kept:
            return option.name
    return None


def _refuse_next(linear: Any, affine: Affine) -> str | None:
    """The reason against folding a batch norm into the linear map behind it, or None."""
    if isinstance(linear, nnx.Linear):
        return None
    if isinstance(linear, nnx.ConvTranspose):
        return "at the edges of a transposed convolution fewer inputs meet"
    if linear.feature_group_count != 1:
        return "a grouped convolution takes batch norms behind it only"
    if not affine.moves_zero or _pads_nothing(linear):
        return None
    return "it pads with zeros, which the batch norm would move"


def _pads_nothing(conv: nnx.Conv) -> bool:
    """True if the convolution pads with no zeros."""
    padding = conv.padding
    if isinstance(padding, str):
        copies = padding.upper() in ("VALID", "CIRCULAR", "REFLECT")
        return copies or (padding.upper() == "SAME" and all(n == 1 for n in conv.kernel_shape[:-2]))
    return not np.any(np.asarray(padding))


def _replace(linear: Any, folded: Folded) -> None:
    dtype = linear.kernel[...].dtype
    linear.kernel[...] = jnp.asarray(folded.weight, dtype)
    linear.bias = nnx.Param(jnp.asarray(folded.bias, dtype))
    linear.use_bias = True
