"""The weights of a layer: their shapes, and reading and writing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from batchnorm.core.errors import ArgumentValueError, names_errors
from batchnorm.core.layout import normalize_axis
from batchnorm.core.running import Running
from batchnorm.keras.limits import ClippedNormalization
from batchnorm.keras.loading import fit_weights
from batchnorm.keras.masks import is_pair_of_shapes
from batchnorm.keras.options import check_ghost_axes
from batchnorm.keras.variables import (
    add_counter,
    add_statistic,
    clone,
    square_root_of,
)

_RENORM_WEIGHTS = ("moving_stddev", "renorm_mean", "renorm_stddev")


class WeightedNormalization(ClippedNormalization):
    """Keras's layer with the weights of this package's; `layers.py` gives it options and calls."""

    _channel_axes: tuple[int, ...] = ()
    _channels: tuple[int, ...] = ()
    steps: Any = None  # the counter, with `debias`
    # A converted layer keeps its weights, of shape (C,), with ghost batches too.
    _flat_weights = False

    @names_errors()
    def build(self, input_shape: Any) -> None:
        """Make the weights for inputs of this shape, or for a pair whose x has it."""
        shape = self._check_shape(input_shape)
        axes = normalize_axis(self._plain_axis(), len(shape))
        if any(shape[a] is None for a in axes):
            raise ArgumentValueError(
                f"channel sizes must be known when the layer is built; got shape {shape} "
                f"with axis={self._plain_axis()!r}. Give the input a static size there."
            )
        check_ghost_axes(self.virtual_batch_size, axes, self._plain_axis())
        self._channel_axes = axes
        self._channels = tuple(n for n in (shape[a] for a in axes) if n is not None)
        self._check_kernel(rank=len(shape))
        kept = self._weight_shape(len(shape))
        for name, wanted in (("gamma", self.scale), ("beta", self.center)):
            if wanted:
                setattr(self, name, self._make_parameter(name, kept))
        self._make_statistics(kept)
        named = (self.axis,) if isinstance(self.axis, int) else axes
        self.input_spec = keras.layers.InputSpec(ndim=len(shape), axes={a: shape[a] for a in named})

    def get_build_config(self) -> dict[str, Any] | None:
        """The input shape and weight layout that `build_from_config` reads."""
        config = super().get_build_config()
        return config | {"flat_weights": True} if config and self._flat_weights else config

    def build_from_config(self, config: Mapping[str, Any]) -> None:
        """Build as the layer was built that gave `config`."""
        rest = dict(config or {})
        self._flat_weights = rest.pop("flat_weights", False)
        super().build_from_config(rest)

    def rematerialized_call(self, layer_call: Any, *args: Any, **kwargs: Any) -> Any:
        """The call as it is: a step keeps its input alone, which a recomputation needs as well.

        In `keras.RematScope` a recomputed pass would move the statistics again, and with JAX leak
        them out of the trace.
        """
        return layer_call

    @names_errors()
    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """x's shape."""
        shape = self._check_shape(input_shape)
        normalize_axis(self._plain_axis(), len(shape))
        return shape

    @names_errors()
    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Load weights of this layer, of Keras's own ones, or in the packed layout."""
        count = len(store.keys())
        if not self.built and not count:
            return
        if self.weights and not count:
            raise ArgumentValueError(
                f"the file has no weights for layer {self.name!r}. Files "
                "name layers by their class: one of another kind of batch normalization loads "
                "with batchnorm.keras.load_weights(model, path)."
            )
        self.set_weights([store[str(i)] for i in range(count)])

    @names_errors()
    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set all weights; layouts as in `load_own_variables`."""
        if not self.built:
            super().load_own_variables({str(i): w for i, w in enumerate(weights)})  # raises
        super().set_weights(fit_weights(self, weights))

    def _start_statistics(self) -> None:
        self.moving_mean: Any = None
        self.moving_variance: Any = None

    def _make_parameter(self, name: str, shape: tuple[int, ...]) -> Any:
        return self.add_weight(
            shape=shape,
            name=name,
            initializer=getattr(self, f"{name}_initializer"),
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=getattr(self, f"{name}_constraint"),
            dtype=self._weight_type,
            trainable=True,
            autocast=False,
        )

    def _make_statistics(self, shape: tuple[int, ...]) -> None:
        """Add the weights that training moves."""
        mean, variance = self.moving_mean_initializer, self.moving_variance_initializer
        for name, initializer in (("moving_mean", mean), ("moving_variance", variance)):
            setattr(self, name, add_statistic(self, name, shape, initializer, self._weight_type))
        if self.renorm:
            self._add_renorm_weights(shape)
        if self.debias:
            self._add_steps()

    def _add_renorm_weights(self, shape: tuple[int, ...]) -> None:
        stddev = square_root_of(self.moving_variance_initializer)
        starts = (stddev, clone(self.moving_mean_initializer), stddev)
        for name, initializer in zip(_RENORM_WEIGHTS, starts, strict=True):
            setattr(self, name, add_statistic(self, name, shape, initializer, self._weight_type))

    def _add_steps(self, initializer: Any = "zeros") -> None:
        """Add the number of steps that have moved the statistics, which `debias` needs (S23)."""
        self.steps = add_counter(self, "steps", initializer)

    def _count_steps(self) -> Any:
        return None if self.steps is None else self.steps.value

    def _running(self) -> Running:
        names = ("moving_mean", "moving_variance", *(_RENORM_WEIGHTS if self.renorm else ()))
        mean, variance, *rest = (self._per_channel(getattr(self, name)) for name in names)
        return Running(mean, variance, self._count_steps(), *rest)

    def _store(self, moved: Running) -> None:
        names = ("moving_mean", "moving_variance", "steps", *_RENORM_WEIGHTS)
        for name, value in zip(names, moved, strict=True):
            if value is not None:
                variable = getattr(self, name)
                variable.assign(keras.ops.reshape(value, tuple(variable.shape)))

    def _store_if(self, moves: Any, moved: Running, before: Running) -> None:
        """Store the statistics if `moves`, which may be a tensor of a graph."""
        if moves is False:
            return
        if moves is not True:
            pairs = zip(moved, before, strict=True)
            moved = Running(
                *(None if a is None else keras.ops.where(moves, a, b) for a, b in pairs)
            )
        self._store(moved)

    def _pack(self, statistics: list[Any]) -> list[Any]:
        """Statistics as this layer's weights hold them."""
        return statistics

    def _per_channel(self, weight: Any) -> Any:
        """A weight's value with the channel axes' sizes."""
        value = weight.value
        return (
            value
            if len(value.shape) == len(self._channels)
            else keras.ops.reshape(value, self._channels)
        )

    def _plain_axis(self) -> Any:
        """The axis as the user gave it; Keras keeps lists in a class of its own."""
        return list(self.axis) if isinstance(self.axis, list) else self.axis

    def _weight_shape(self, rank: int) -> tuple[int, ...]:
        if len(self._channels) == 1 and (self._flat_weights or self.virtual_batch_size is None):
            return self._channels
        sizes = dict(zip(self._channel_axes, self._channels, strict=True))
        return tuple(sizes.get(a, 1) for a in range(rank))

    @property
    def _weight_type(self) -> str:
        """float32 under 16-bit policies (S16)."""
        return "float32" if self.variable_dtype in ("float16", "bfloat16") else self.variable_dtype

    def _check_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        shape = input_shape[0] if is_pair_of_shapes(input_shape) else input_shape
        if shape is None:
            raise ArgumentValueError("inputs must have a known rank; got an unknown one.")
        return tuple(shape)
