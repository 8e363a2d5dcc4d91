"""The flax nnx layer: state around the pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from batchnorm.core import config
from batchnorm.core.config import Options
from batchnorm.core.errors import ArgumentValueError, names_errors
from batchnorm.core.layout import check_axis, normalize_axis
from batchnorm.core.running import Running, derive_renorm
from batchnorm.jax.checks import check_input, wide_type
from batchnorm.jax.namespace import XP
from batchnorm.jax.options import check_dtype, check_features, freeze_groups, make_keys
from batchnorm.jax.steps import normalize_batch, normalize_running
from batchnorm.jax.synchronize import Groups
from batchnorm.kernels.explanation import Explanation, ask

__all__ = ["BatchNorm", "Momentum", "load_state"]

_RENORM = ("stddev", "renorm_mean", "renorm_stddev")
_STATISTICS = ("mean", "var", *_RENORM)


class Momentum(nnx.Variable):
    """The weight of the old running value: an array, so that changing it compiles nothing anew."""


class BatchNorm(nnx.Module):
    """Batch normalization over every axis but the channel axes, for inputs of any rank.

    Takes the place of `flax.nnx.BatchNorm`: same arguments, same state (and `momentum`, which
    is an array here), same results where flax's are right.

    Args:
        num_features: C; with several axes their sizes in increasing order of axis, like
            `(A, B)`. None learns it from the first input; see `init`.
        axis: channel axis or axes.
        momentum: weight of the *old* value in the running statistics, between 0 and 1.
        epsilon: added to the variance, at least 0.
        dtype: of the output; None for the input's. Arithmetic is float32 or wider (S16).
        param_dtype: of scale and bias. Running statistics are float32 or wider.
        use_bias: learn beta.
        use_scale: learn gamma.
        bias_init: initializer `(key, shape, dtype) -> array` of beta.
        scale_init: the same of gamma.
        axis_name: named axis, or axes, over whose devices statistics are merged by count (S14).
        axis_index_groups: lists of indices along it; statistics stay within a group.
        virtual_batch_size: samples of one ghost batch, which must divide the batch in training
            (S12).
        renorm: batch renormalization (S11).
        renorm_clipping: any of "rmin", "rmax", "dmax"; missing ones are 0, ∞, ∞.
        renorm_momentum: weight of the old value in renormalization's statistics.
        fused: None takes the compiled kernels where they apply, True demands them, False is
            plain array code.
        rngs: `nnx.Rngs`, a key or an int. With `num_features` it initializes the layer at once.
        use_running_average: start in evaluation mode.
        use_fast_variance: without effect; the variance is always exact (S3).
        promote_dtype: function of `((x, mean, var, scale, bias), dtype=...)` that casts what
            it is given; running statistics are used as stored whatever it does. None: S16.
        bias_metadata: of beta's `nnx.Param`.
        scale_metadata: of gamma's.
        features_in: an alias of `num_features`.

    Attributes:
        training, frozen, initialized: independent static flags. The running average is used
            where `not training or frozen`; `frozen` survives `eval()` and `train()`.
        momentum: `Momentum`, there from the start and the only place that holds it.
        mean, var: `nnx.BatchStat`; scale, bias: `nnx.Param` or None. With renorm also stddev,
            renorm_mean, renorm_stddev.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range, or options that exclude each other.

    Source: S1-S16; Ioffe and Szegedy 2015 (arXiv 1502.03167); Ioffe 2017 (arXiv 1702.03275).
    Unlike flax's it takes masks of any shape of S1, keeps its digits at large offsets (S3),
    merges devices by count (S14), survives empty and overflowing batches (S6, S9), and stays
    frozen when told so (S15).

    >>> layer = BatchNorm(3, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((8, 5, 3)), mask=jnp.ones((8, 5), bool)).shape
    (8, 5, 3)
    """

    @names_errors()
    def __init__(
        self,
        num_features: int | tuple[int, ...] | None = None,
        *,
        axis: int | tuple[int, ...] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable[..., Any] = jax.nn.initializers.zeros,
        scale_init: Callable[..., Any] = jax.nn.initializers.ones,
        axis_name: Any = None,
        axis_index_groups: Groups = None,
        virtual_batch_size: int | None = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float] | None = None,
        renorm_momentum: float = 0.99,
        fused: bool | None = None,
        rngs: Any = None,
        use_running_average: bool | None = False,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] | None = None,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        features_in: int | tuple[int, ...] | None = None,
    ) -> None:
        del use_fast_variance
        self.axis = axis if isinstance(axis, int) else check_axis(axis)
        self.num_features = check_features(num_features, features_in, check_axis(axis))
        weight = config.check_number("momentum", momentum, 0.0, 1.0)
        self.momentum = Momentum(jnp.asarray(weight, jnp.float32))
        self.epsilon = config.check_number("epsilon", epsilon, 0.0)
        self.dtype, self.param_dtype = (
            check_dtype("dtype", dtype),
            check_dtype("param_dtype", param_dtype),
        )
        self.use_bias = config.check_flag("use_bias", use_bias)
        self.use_scale = config.check_flag("use_scale", use_scale)
        self.bias_init, self.scale_init = bias_init, scale_init
        # Static attributes must be hashable.
        self.bias_metadata = tuple(bias_metadata.items())
        self.scale_metadata = tuple(scale_metadata.items())
        self.axis_name, self.axis_index_groups = axis_name, freeze_groups(axis_index_groups)
        self.virtual_batch_size = config.check_virtual_batch_size(virtual_batch_size)
        weight = config.check_number("renorm_momentum", renorm_momentum, 0.0, 1.0)
        self.renorm = config.check_renorm(renorm, renorm_clipping, weight)
        self.fused = config.check_fused(fused)
        self.promote_dtype = promote_dtype
        self.training = not use_running_average
        self.frozen = False
        self.initialized = False
        if self.num_features is not None and rngs is not None:
            self.init(rngs)

    @names_errors()
    def init(self, rngs: Any = 0, x: Any = None, use_running_average: bool = True) -> BatchNorm:
        """Make parameters and statistics, in place.

        Args:
            rngs: `nnx.Rngs`, a key or an int, for the initializers.
            x: an input, needed if the number of features is unknown.
            use_running_average: False runs a training step on x as well, for its statistics.

        Returns:
            The layer.

        Raises:
            ValueError: neither x nor a number of features.
        """
        sizes = self.num_features
        if sizes is None:
            if x is None:
                raise ArgumentValueError(
                    "init needs x to learn the number of features; got None. Pass x, or "
                    "num_features to the constructor."
                )
            axes = normalize_axis(self.axis, jnp.ndim(x), least_rows=0)
            found = tuple(jnp.shape(x)[a] for a in axes)
            sizes = found if len(found) > 1 else found[0]
        shape = sizes if isinstance(sizes, tuple) else (sizes,)
        wide = wide_type(self.param_dtype)
        self.num_features = sizes
        self.mean = nnx.BatchStat(jnp.zeros(shape, wide))
        self.var = nnx.BatchStat(jnp.ones(shape, wide))
        keys = make_keys(rngs)
        self.scale = self.bias = nnx.data(None)
        if self.use_scale:
            value = self.scale_init(keys(), shape, self.param_dtype)
            self.scale = nnx.Param(value, **dict(self.scale_metadata))
        if self.use_bias:
            value = self.bias_init(keys(), shape, self.param_dtype)
            self.bias = nnx.Param(value, **dict(self.bias_metadata))
        if self.renorm is not None:
            self.stddev = nnx.BatchStat(jnp.ones(shape, wide))
            self.renorm_mean = nnx.BatchStat(jnp.zeros(shape, wide))
            self.renorm_stddev = nnx.BatchStat(jnp.ones(shape, wide))
        self.initialized = True
        if not use_running_average:
            self(x, use_running_average=False)
        return self

    @names_errors()
    def __call__(
        self, x: Any, use_running_average: bool | None = None, *, mask: Any = None
    ) -> Array:
        """Normalize x, and in training move the running statistics.

        Args:
            x: floating, of a rank that has the channel axes, `(N, ..., C)` by default. Of shape
                `(C,)` it is one row, as inside `jax.vmap` over examples.
            use_running_average: wins over the flags (S15); None: `not training or frozen`.
            mask: boolean, or integers of 1 and 0, for real rows and padding: x's shape without
                its channel axes, a prefix of that, or x's rank with sizes of x or 1 (S1). Traced
                integers count as real where they are not 0.

        Returns:
            y, of x's shape, and its type or `dtype`.

        Raises:
            TypeError: an array of the wrong dtype.
            ValueError: shapes that do not fit; an uninitialized layer in evaluation or under a
                trace. State is unchanged then.
            NameError: `axis_name` is not bound.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        x = check_input(x)
        if not self.initialized:
            self._initialize_from(x, use_running_average)
        self._check_channels(x)
        mean, var = self.mean[...], self.var[...]
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        dtype = x.dtype if self.dtype is None else self.dtype
        if self.promote_dtype is not None:
            x, _, _, scale, bias = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)
            dtype = x.dtype
        elif dtype != x.dtype:
            x = x.astype(wide_type(x.dtype, dtype))
        running = Running(mean, var)
        if use_running_average:
            options = Options(eps=self.epsilon)
            y = normalize_running(
                x,
                mask,
                scale,
                bias,
                running,
                axis=self.axis,
                options=options,
                fused=self.fused,
                owner=type(self).__name__,
            )
            return y.astype(dtype)
        if self.renorm is not None:
            running = Running(mean, var, None, *(getattr(self, name)[...] for name in _RENORM))
        y, _, after = normalize_batch(
            x,
            mask,
            scale,
            bias,
            running,
            axis=self.axis,
            options=Options(
                eps=self.epsilon,
                decay=self.momentum[...],
                virtual_batch_size=self.virtual_batch_size,
                renorm=self.renorm,
            ),
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            fused=self.fused,
            owner=type(self).__name__,
        )
        for name in _STATISTICS if self.renorm is not None else _STATISTICS[:2]:
            getattr(self, name)[...] = getattr(after, name)
        return y.astype(dtype)

    @names_errors()
    def _explain(self, x: Any, use_running_average: bool | None = None, **rest: Any) -> Explanation:
        """The way of a call."""
        if not self.initialized:
            raise ArgumentValueError(
                "the layer is not initialized, and has no way yet; call "
                "layer.init(key, x) first, or pass num_features and rngs to the constructor."
            )
        return ask(lambda: BatchNorm.__call__(self, x, use_running_average, **rest))

    @property
    def use_running_average(self) -> bool:
        """Whether a call without that argument uses the running statistics.

        Assigning it, as flax's `train()`, `eval()` and `view` do for whole models, sets
        `training`; a frozen layer stays frozen.
        """
        return not self.training or self.frozen

    @use_running_average.setter
    def use_running_average(self, value: bool) -> None:
        self.training = not value

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Used by `nnx.view`, and described by `nnx.view_info`, which wants two spaces.

        Args:
          use_running_average: use the running statistics, rather than those of the batch.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def train(self, mode: bool = True, **attributes: Any) -> BatchNorm:
        """Training mode, or with `mode=False` evaluation; in place. Returns the layer."""
        self.training = bool(mode)
        if attributes:
            self.set_attributes(**attributes, raise_if_not_found=False)
        return self

    def eval(self, **attributes: Any) -> BatchNorm:
        """Evaluation mode, in place. Returns the layer."""
        return self.train(False, **attributes)

    def freeze(self) -> BatchNorm:
        """Normalize by the running statistics, and leave them alone, in training too (S15).

        In place; survives `train()` and `eval()`, and leaves gradients alone. Returns the layer.
        """
        self.frozen = True
        return self

    def unfreeze(self) -> BatchNorm:
        """Undo `freeze`, in place. Returns the layer."""
        self.frozen = False
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Change the array where a number is assigned to `momentum`."""
        current = self.__dict__.get(name) if name == "momentum" else None
        if current is not None and not isinstance(value, nnx.Variable):
            current[...] = jnp.asarray(value, current[...].dtype)
        else:
            super().__setattr__(name, value)

    def _initialize_from(self, x: Array, use_running_average: bool) -> None:
        if use_running_average or isinstance(x, jax.core.Tracer):
            where = "evaluation" if use_running_average else "a trace"
            raise ArgumentValueError(
                f"the layer is not initialized, which {where} cannot do; call "
                "layer.init(key, x) first, or pass num_features and rngs to the constructor."
            )
        self.init(0, x)

    def _check_channels(self, x: Array) -> None:
        axes = normalize_axis(self.axis, x.ndim, least_rows=0)
        found = tuple(x.shape[a] for a in axes)
        expected = self.mean[...].shape
        if found != expected:
            raise ArgumentValueError(
                f"x must have num_features={self.num_features} along axis {self.axis}; "
                f"got {found if len(found) > 1 else found[0]} in shape {tuple(x.shape)}."
            )


def load_state(module: nnx.Module, state: Any) -> None:
    """Take over a state, flax's own too, in place.

    Args:
        module: a `BatchNorm`, or a model that holds some.
        state: an `nnx.State` or nested dict of variables or arrays. What it lacks, such as the
            momentum, keeps its value; renormalization's statistics are derived from mean and
            variance where it lacks them (S11).
    """
    state = state if isinstance(state, nnx.State) else nnx.State(state)
    nnx.update(module, state)
    given = {tuple(map(str, path)) for path, _ in nnx.to_flat_state(state)}
    for path, layer in nnx.iter_modules(module):
        if not isinstance(layer, BatchNorm) or layer.renorm is None or not layer.initialized:
            continue
        at = tuple(map(str, path))
        if (*at, "var") in given and (*at, "stddev") not in given:
            mean, stddev = derive_renorm(layer.mean[...], layer.var[...], eps=layer.epsilon, xp=XP)
            layer.stddev[...] = layer.renorm_stddev[...] = stddev
            layer.renorm_mean[...] = mean
