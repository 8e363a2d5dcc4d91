"""A layer that gives a tensor its mask back, at the resolution behind a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from batchnorm.core.errors import ArgumentValueError, names_errors, naming
from batchnorm.core.resolution import Anchors, check_per_axis, find_anchors
from batchnorm.keras.masks import to_boolean
from batchnorm.keras.private import attach_mask

__all__ = ["Remask"]

_PADDINGS = ("valid", "same", "causal")


@keras.saving.register_keras_serializable(package="batchnorm")
class Remask(keras.layers.Layer):
    """Attach a mask to a tensor that a layer with windows has made, for the layers behind.

    Keras hands masks from layer to layer, but convolutions, pooling and operations outside of
    layers drop them. The options are those of the layer in between, whose windows the mask
    follows: an output position is real if its whole window is with "valid", if the position
    `output · stride` is with "same" and "causal". So samples of length L that are padded at their
    end get the length that the layer gives a sequence of L positions alone: with window k, stride
    s and dilation d, `floor((L - d·(k - 1) - 1) / s) + 1` ("valid", at least 0) or `ceil(L / s)`
    ("same", "causal").

    Args:
        kernel_size: of the window, `pool_size` of a pooling layer; an int, or one for each
            spatial axis.
        strides: of the window.
        padding: "valid", "same" or "causal".
        dilation_rate: of the window.
        name: of the layer.
        **kwargs: what else `keras.layers.Layer` takes.

    Call arguments:
        inputs: a pair (x, source): source is the mask, `(N, *spatial)` before the windows, bool
            or non-zero at real positions, or a tensor that carries one. Or x alone.
        mask: the mask, where x comes alone; without it, the one that x carries.

    Returns:
        x, of any type and rank at least 2, with the mask `(N, *spatial)` behind the windows.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range; when it is called, no mask, or one that does not fit x.

    Source: S1, S5.

    >>> mask = keras.ops.array([[True, True, True, False, False]])
    >>> pairs = keras.ops.ones((1, 4, 8))  # of a Conv1D with kernel_size=2
    >>> y = Remask(kernel_size=2)((pairs, mask))
    >>> keras.ops.convert_to_numpy(y._keras_mask).tolist()
    [[True, True, False, False]]
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int] = 1,
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        dilation_rate: int | Sequence[int] = 1,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        with naming(type(self).__name__):
            sizes = [
                _check_sizes("kernel_size", kernel_size),
                _check_sizes("strides", strides),
                _check_sizes("dilation_rate", dilation_rate),
            ]
            if padding not in _PADDINGS:
                raise ArgumentValueError(
                    f'padding must be "valid", "same" or "causal"; got {padding!r}.'
                )
        super().__init__(name=name, **{"autocast": False, **kwargs})
        self.kernel_size, self.strides, self.dilation_rate = sizes
        self.padding = padding
        self.supports_masking = True

    @names_errors()
    def call(self, inputs: Any, mask: Any = None) -> Any:
        """x with its mask; arguments as the class says."""
        x, found = self._find_mask(inputs, mask)
        y = keras.ops.reshape(x, keras.ops.shape(x))
        if y is x:  # another tensor, so that x keeps the mask that it has
            y = keras.ops.copy(x)
        return attach_mask(y, found)

    @names_errors()
    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """The mask behind the windows."""
        return self._find_mask(inputs, previous_mask)[1]

    def compute_output_shape(self, input_shape: Any) -> Any:
        """x's shape."""
        paired = isinstance(input_shape[0], (list, tuple))
        return tuple(input_shape[0] if paired else input_shape)

    def compute_output_spec(self, inputs: Any, mask: Any = None) -> keras.KerasTensor:
        """x's shape and type."""
        x = inputs[0] if isinstance(inputs, (list, tuple)) else inputs
        return keras.KerasTensor(x.shape, x.dtype)

    def get_config(self) -> dict[str, Any]:
        """The options."""
        own = {
            name: list(value) if isinstance(value, tuple) else value
            for name in ("kernel_size", "strides", "padding", "dilation_rate")
            for value in [getattr(self, name)]
        }
        return super().get_config() | own

    def _find_mask(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        """x, and its mask behind the windows."""
        x = inputs
        if isinstance(inputs, (list, tuple)):
            if len(inputs) != 2:
                raise ArgumentValueError(
                    f"inputs must be x or a pair (x, source); got {len(inputs)} inputs."
                )
            x, source = inputs
            # Keras gives the masks that the two carry.
            carried = mask[1] if isinstance(mask, (list, tuple)) else mask
            mask = source if carried is None else carried
            if carried is None and len(source.shape) >= len(x.shape):
                raise ArgumentValueError(
                    f"source carries no mask, and is none, of shape {tuple(source.shape)} beside "
                    f"x of shape {tuple(x.shape)}. Pass the mask, or the output of the layer that "
                    "made it."
                )
        if mask is None:
            raise ArgumentValueError("there is no mask; pass a pair (x, mask), or mask=.")
        found = self._map(to_boolean(mask))
        _check_fit(found, x)
        return x, found

    def _map(self, mask: Any) -> Any:
        """The mask behind the windows."""
        rank = len(mask.shape) - 1
        kernels, strides, dilations = (
            check_per_axis(name, getattr(self, name), rank)
            for name in ("kernel_size", "strides", "dilation_rate")
        )
        padding = (0, 0) if self.padding == "valid" else None
        if not isinstance(mask, keras.KerasTensor):
            mask = keras.ops.convert_to_tensor(mask)
        for axis in range(rank):
            anchors = find_anchors(kernels[axis], strides[axis], padding, dilations[axis])
            mask = _follow(mask, axis + 1, anchors)
        return mask


def _check_sizes(name: str, sizes: Any) -> int | tuple[int, ...]:
    """An int, or a tuple of them, each at least 1."""
    several = isinstance(sizes, Sequence) and not isinstance(sizes, str)
    checked = check_per_axis(name, sizes, len(sizes) if several else 1)
    return checked if several else checked[0]


def _follow(mask: Any, axis: int, anchors: Anchors) -> Any:
    """The mask behind windows along one axis: real where all positions between the anchors are."""
    if anchors.span == 0:
        return _cut(mask, axis, slice(0, None, anchors.step))
    wide = anchors.span + 1
    sides = [[int(a == axis), 0] for a in range(len(mask.shape))]
    counted = keras.ops.cumsum(keras.ops.pad(keras.ops.cast(mask, "int32"), sides), axis=axis)
    last = _cut(counted, axis, slice(wide, None, anchors.step))
    first = _cut(counted, axis, slice(0, -wide, anchors.step))
    return keras.ops.equal(keras.ops.subtract(last, first), wide)


def _cut(a: Any, axis: int, places: slice) -> Any:
    if places == slice(0, None, 1):
        return a
    every = (*(slice(None),) * axis, places)
    return a[every]


def _check_fit(mask: Any, x: Any) -> None:
    """Raise unless a mask has x's shape without its last axis, or without the one after N."""
    shape, found = tuple(x.shape), tuple(mask.shape)
    for wanted in (shape[:-1], (shape[0], *shape[2:])):
        # Sizes that a graph does not know are compared when a layer behind takes the mask.
        if len(found) == len(wanted) and all(
            None in (a, b) or a == b for a, b in zip(found, wanted, strict=True)
        ):
            return
    raise ArgumentValueError(
        f"behind the windows the mask has shape {found}, which does not fit x of shape {shape}; "
        "kernel_size, strides, padding and dilation_rate must be those of the layers between the "
        "mask and x."
    )
