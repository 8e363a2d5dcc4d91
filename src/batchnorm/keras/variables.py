"""Weights that training moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np


def add_statistic(
    layer: Any, name: str, shape: tuple[int, ...], initializer: Any, dtype: str
) -> Any:
    """A weight for moving statistics, which is averaged over TensorFlow's replicas when read."""
    return _add(layer, name, shape, initializer, dtype, "mean")


def add_counter(layer: Any, name: str, initializer: Any) -> Any:
    """A weight that counts steps; TensorFlow's replicas count alike."""
    return _add(layer, name, (), initializer, "int", "only_first_replica")


def _add(
    layer: Any, name: str, shape: tuple[int, ...], initializer: Any, dtype: str, aggregation: str
) -> Any:
    if keras.backend.backend() != "tensorflow":
        return layer.add_weight(
            shape=shape,
            name=name,
            initializer=initializer,
            dtype=dtype,
            trainable=False,
            autocast=False,
        )
    return keras.Variable(  # `add_weight` does not pass `synchronization` on
        initializer,
        shape=shape,
        dtype=dtype,
        trainable=False,
        autocast=False,
        aggregation=aggregation,
        synchronization="on_read",
        name=name,
    )


def make_limits(values: list[float], dtype: str) -> Any:
    """A variable for limits of renormalization, which is no weight."""
    initializer = keras.initializers.Constant(values)
    return keras.Variable(
        initializer, shape=(3,), dtype=dtype, trainable=False, autocast=False, name="renorm_limits"
    )


def clone(initializer: Any) -> Any:
    """An initializer that draws the same values again."""
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    return type(initializer).from_config(initializer.get_config())


def square_root_of(initializer: Any) -> Callable[..., Any]:
    """An initializer of square roots: of deviations, given that of variances (S11)."""

    def initialize(shape: Any, dtype: Any = None) -> Any:
        return keras.ops.sqrt(clone(initializer)(shape, dtype=dtype))

    return initialize


def stack_rows(mean: Any, variance: Any) -> Callable[..., Any]:
    """An initializer of shape (2, C): row 0 by the one, row 1 by the other."""

    def initialize(shape: Any, dtype: Any = None) -> Any:
        return keras.ops.stack([a(shape[1:], dtype=dtype) for a in (mean, variance)])

    return initialize


class Row(keras.Variable):
    """One row of a packed weight, to read like a variable and to assign to."""

    trainable = False
    regularizer = constraint = None
    overwrite_with_gradient = False

    def __init__(self, packed: Any, row: int, name: str) -> None:
        # No `super().__init__`: it would make a weight of its own. What it would set, to read by
        # the properties of a variable, the properties here give.
        object.__setattr__(self, "_packed", packed)
        object.__setattr__(self, "_row", row)
        object.__setattr__(self, "_label", name)

    @property
    def name(self) -> str:
        """The name of the row."""
        return self._label

    @property
    def path(self) -> str:
        """The path of the packed weight, and the row's name."""
        return f"{self._packed.path}/{self._label}"

    @property
    def shape(self) -> Any:
        """The shape of a row, of the type that the backend's variables have."""
        return self._packed.shape[1:]

    @property
    def ndim(self) -> int:
        """The number of axes of a row."""
        return len(self.shape)

    @property
    def dtype(self) -> str:
        """The type of the packed weight."""
        return keras.backend.standardize_dtype(self._packed.dtype)

    @property
    def value(self) -> Any:
        """The row's current value."""
        return self._packed.value[self._row]

    def assign(self, value: Any) -> Any:
        """Write the row into the packed weight."""
        value = keras.ops.cast(keras.ops.convert_to_tensor(value), self.dtype)
        if tuple(value.shape) != tuple(self.shape):
            raise ValueError(
                f"{self.path}: the value to assign must have shape {tuple(self.shape)}; got "
                f"{tuple(value.shape)}."
            )
        rows = [self._packed.value[0], self._packed.value[1]]
        rows[self._row] = value
        self._packed.assign(keras.ops.stack(rows))
        return value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """A copy as a NumPy array."""
        return np.array(keras.ops.convert_to_numpy(self.value), dtype=dtype)

    def __repr__(self) -> str:
        return f"<Row {self._row} of {self._packed!r}>"
