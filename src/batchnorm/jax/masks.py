"""Masks out of lengths, and out of masks at a finer resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

from batchnorm.core import config
from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.core.layout import check_length_values
from batchnorm.core.resolution import Anchors, check_per_axis, find_anchors, is_int
from batchnorm.jax.checks import check_mask, read_values

__all__ = ["downsample_mask", "sequence_mask"]

# Of flax, lax and Equinox. "CIRCULAR" and "REFLECT" would read the padding as if it were data.
_NAMED_PADDINGS = {"VALID": (0, 0), "SAME": None, "SAME_LOWER": None, "CAUSAL": None}


@names_errors("sequence_mask")
def sequence_mask(lengths: Any, size: int) -> Array:
    """Mark the first `lengths` of `size` positions, as masks of samples padded at the end do.

    Args:
        lengths: of any integer type and any shape `(...)`, each between 0 and `size`; `(N,)` for
            a batch of sequences.
        size: number of positions, at least 0.

    Returns:
        bool of shape `(..., size)`, True at positions below the length.

    Raises:
        TypeError: lengths that are no integers, or a size that is no int.
        ValueError: a negative size; a length that is not between 0 and `size`, where values can
            be read at once: traced or on an accelerator such lengths count as 0 or `size`.

    Source: S1.

    >>> sequence_mask(jnp.array([1, 3]), 3).astype(int).tolist()
    [[1, 0, 0], [1, 1, 1]]
    """
    if not export.is_symbolic_dim(size):
        size = config.check_size(size)
    lengths = lengths if hasattr(lengths, "dtype") else np.asarray(lengths)
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ArgumentTypeError(
            f"lengths must be integers; got {lengths.dtype}. Count them, for instance "
            "mask.sum(-1), or cast them first."
        )
    known = read_values(lengths)
    if known is not None and isinstance(size, int):  # before 64 bits are cut to 32
        check_length_values(known, size)
    array = jnp.asarray(lengths)
    if jnp.iinfo(array.dtype).max > jnp.iinfo(jnp.int32).max:  # no position is as far away
        array = jnp.minimum(array, jnp.asarray(jnp.iinfo(jnp.int32).max, array.dtype))
    positions = jnp.arange(size, dtype=jnp.int32)
    return positions < jnp.expand_dims(array.astype(jnp.int32), -1)


@names_errors("downsample_mask")
def downsample_mask(
    mask: Any,
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] | Sequence[tuple[int, int]] = "VALID",
    *,
    dilation: int | Sequence[int] = 1,
) -> Array:
    """The mask of what a convolution or pooling makes of a masked input.

    A sample that is padded at its end has as many real outputs in a batch as it has outputs alone.
    With `reach = dilation * (window - 1)`, length n gives

    - "VALID": `(n - reach - 1) // stride + 1`,
    - "SAME", "SAME_LOWER", "CAUSAL": `ceil(n / stride)`,
    - `(low, high)`: `(n + low + high - reach - 1) // stride + 1`.

    For masks of any pattern: output o is real if the input is from position `o * stride` to
    `o * stride + reach - low - high`; if that comes first, if it is at one position between them.
    With "SAME", "SAME_LOWER" and "CAUSAL" position `o * stride` alone decides. So an empty sample
    has no real output, whatever the padding; and a sample that is padded at its start, by a
    multiple of the stride, has its own number of them.

    A convolution's real outputs are those of the sample alone if padded positions hold 0 when it
    reads them (as behind a layer with `padded_output="zero"`) and, with a stride, if padding is not
    "SAME": that is split by the size of the batch, so that a shorter sample may meet its windows
    elsewhere than alone.

    Args:
        mask: boolean or integer of shape `(N, *spatial)`, at least one spatial axis.
        window: size of the kernel or of the pool; an int for all spatial axes, or one for each.
        stride: likewise.
        padding: "VALID", "SAME", "SAME_LOWER", "CAUSAL"; or an int for both sides of every axis,
            or for each axis an int or a pair `(low, high)`.
        dilation: of the kernel (`rhs_dilation`, `kernel_dilation`), like `window`.

    Returns:
        bool of shape `(N, *outputs)`, with the layer's own numbers of outputs.

    Raises:
        TypeError: a mask that is neither boolean nor integer; sizes that are no ints.
        ValueError: a mask without spatial axes, or with integers other than 0 and 1, where values
            can be read at once (S1); windows, strides or dilations below 1; a number of sizes
            other than that of spatial axes; an unknown padding.

    Source: S5.

    >>> mask = sequence_mask(jnp.array([7, 4]), 7)
    >>> downsample_mask(mask, window=3, stride=2, padding=1).astype(int).tolist()
    [[1, 1, 1, 1], [1, 1, 0, 0]]
    """
    if mask is None:
        raise ArgumentTypeError("mask must be an array; got None. Without a mask there is none.")
    real = check_mask(mask)
    assert real is not None
    rank = real.ndim - 1
    if rank < 1:
        raise ArgumentValueError(
            f"mask must have shape (N, *spatial) with at least one spatial axis; got "
            f"{real.shape}. A mask (N,) of whole samples is the same at every resolution."
        )
    sizes = (check_per_axis("window", window, rank), check_per_axis("stride", stride, rank))
    dilations = check_per_axis("dilation", dilation, rank)
    args = zip(*sizes, _pad(padding, rank), dilations, strict=True)
    return _walk(real.astype(bool), [find_anchors(*a) for a in args])


def _walk(real: Array, anchors: list[Anchors]) -> Array:
    """The mask of the outputs; sizes may be symbolic."""
    for axis, one in enumerate(anchors, 1):
        # All positions from first to last anchor, or one of those from last to first.
        decide = jax.lax.min if one.span >= 0 else jax.lax.max
        outside = max(-one.span, 0)
        windows, strides, sides = [1] * real.ndim, [1] * real.ndim, [(0, 0)] * real.ndim
        windows[axis], strides[axis] = abs(one.span) + 1, one.step
        sides[axis] = (outside, outside)
        real = jax.lax.reduce_window(real, one.span >= 0, decide, windows, strides, sides)
    return real


def _pad(padding: Any, rank: int) -> list[tuple[int, int] | None]:
    """The padding of each axis, as `find_anchors` takes it."""
    if isinstance(padding, str):
        if padding.upper() not in _NAMED_PADDINGS:
            names = ", ".join(map(repr, _NAMED_PADDINGS))
            raise ArgumentValueError(f"padding must be {names}, ints or pairs; got {padding!r}.")
        return [_NAMED_PADDINGS[padding.upper()]] * rank
    each = tuple(padding) if isinstance(padding, Sequence) else (padding,) * rank
    pairs = [tuple(p) if isinstance(p, Sequence) else (p, p) for p in each]
    if not all(len(p) == 2 and all(map(is_int, p)) for p in pairs):
        raise ArgumentTypeError(
            f"padding must be a name, an int, or for each axis an int or a pair; got {padding!r}."
        )
    if len(pairs) != rank:
        raise ArgumentValueError(
            f"padding must be a name, an int, or one int or pair for each of the {rank} axes of "
            f"the mask behind the first; got {padding!r}."
        )
    return [(int(low), int(high)) for low, high in pairs]
