"""The layer for padded batches whose moving statistics are one packed weight."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np

from batchnorm.core.errors import ArgumentValueError, names_errors
from batchnorm.core.running import Running
from batchnorm.keras.layers import BatchNormalization
from batchnorm.keras.options import OPTIONS, take_arguments
from batchnorm.keras.variables import Row, add_statistic, stack_rows

__all__ = ["MaskedBatchNormalization"]


@keras.saving.register_keras_serializable(package="batchnorm")
class MaskedBatchNormalization(BatchNormalization):
    """Batch normalization for pairs (x, mask), with its statistics in one weight.

    `moving_stats`, of shape (2, C), holds the moving mean and variance. The output has x's type:
    the layer does not cast half-precision inputs, and computes their moments in float32 (S16).

    Args:
        axis: the channel axis, which must be the last one.
        momentum: weight of the *old* value in the moving statistics, between 0 and 1.
        epsilon: added to the variance, at least 0.
        center: learn beta.
        scale: learn gamma.
        beta_initializer: of beta.
        gamma_initializer: of gamma.
        moving_mean_initializer: of moving_stats[0].
        moving_variance_initializer: of moving_stats[1].
        beta_regularizer: of beta.
        gamma_regularizer: of gamma.
        beta_constraint: of beta.
        gamma_constraint: of gamma.
        **kwargs: `fused`, `adjustment`, `padded_output`, `debias`, `synchronized`, `axis_name`
            and `process_group`, as for `BatchNormalization`; `name`, `trainable`, `dtype` and what
            else `keras.layers.Layer` takes.

    Calls are those of `BatchNormalization`; `(x, None)` and x alone mean no mask.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range; `renorm` or `virtual_batch_size`; when the layer is
            built, an axis but the last.

    Source: S1-S10, S15, S16, S23.

    >>> layer = MaskedBatchNormalization(momentum=0.0)
    >>> x = keras.ops.array([[1.0], [3.0], [99.0]])
    >>> y = layer((x, keras.ops.array([1, 1, 0])), training=True)
    >>> [float(a) for a in np.asarray(layer.moving_mean)]
    [2.0]
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        named = take_arguments(locals(), {})
        for option in OPTIONS:
            if not option.packed and kwargs.get(option.name):
                raise ValueError(
                    f"{type(self).__name__}: {option.name} does not go with one weight of shape "
                    f"(2, C); got {option.name}={kwargs[option.name]!r}. Use BatchNormalization."
                )
        super().__init__(**named, **{"autocast": False, **kwargs})

    @names_errors()
    def build(self, input_shape: Any) -> None:
        """Make the weights for inputs of this shape, or for a pair whose x has it."""
        rank = len(self._check_shape(input_shape))
        if self._plain_axis() not in (-1, rank - 1):
            raise ArgumentValueError(
                f"axis must be the last one, -1 or {rank - 1} for inputs "
                f"of rank {rank}; got {self._plain_axis()!r}. BatchNormalization takes any."
            )
        super().build(input_shape)

    @property
    def moving_mean(self) -> Any:
        """The moving mean, row 0 of `moving_stats`; assigning to it writes through."""
        return None if self.moving_stats is None else Row(self.moving_stats, 0, "moving_mean")

    @property
    def moving_variance(self) -> Any:
        """The moving variance, row 1 of `moving_stats`; assigning to it writes through."""
        return None if self.moving_stats is None else Row(self.moving_stats, 1, "moving_variance")

    def compute_output_spec(self, inputs: Any, *args: Any, **kwargs: Any) -> keras.KerasTensor:
        """x's shape and type."""
        x = inputs[0] if isinstance(inputs, (list, tuple)) else inputs
        return keras.KerasTensor(self.compute_output_shape(x.shape), self._output_type(x))

    def get_config(self) -> dict[str, Any]:
        """The arguments that the constructor names, and others where they are set."""
        config = super().get_config()
        named = inspect.signature(MaskedBatchNormalization.__init__).parameters
        for option in OPTIONS:
            if option.name not in named and not option.is_set(self):
                config.pop(option.name, None)
        return config

    def _start_statistics(self) -> None:
        self.moving_stats: Any = None

    def _make_statistics(self, shape: tuple[int, ...]) -> None:
        initializer = stack_rows(self.moving_mean_initializer, self.moving_variance_initializer)
        self.moving_stats = add_statistic(
            self, "moving_stats", (2, *shape), initializer, self._weight_type
        )
        if self.debias:
            self._add_steps()

    def _running(self) -> Running:
        stats = self.moving_stats.value
        return Running(stats[0], stats[1], self._count_steps())

    def _store(self, moved: Running) -> None:
        self.moving_stats.assign(keras.ops.stack(moved[:2]))
        if self.steps is not None:
            self.steps.assign(moved.batches)

    def _pack(self, statistics: list[np.ndarray]) -> list[np.ndarray]:
        mean, variance, *steps = statistics
        return [np.stack([mean.reshape(-1), variance.reshape(-1)]), *steps]

    def _cast_input(self, x: Any) -> Any:
        return keras.ops.cast(x, self._output_type(x))

    def _output_type(self, x: Any) -> str:
        dtype = keras.backend.standardize_dtype(x.dtype)
        return dtype if keras.backend.is_float_dtype(dtype) else self.compute_dtype
