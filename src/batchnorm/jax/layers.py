"""The flax nnx layer: state around the pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from batchnorm.core.declaration import check_arguments, list_arguments
from batchnorm.core.errors import ArgumentValueError, names_errors
from batchnorm.jax import state
from batchnorm.jax.call import make_settings
from batchnorm.jax.checks import check_input, wide_type
from batchnorm.jax.modes import Modes
from batchnorm.jax.options import OPTIONS, check_update
from batchnorm.jax.steps import normalize_batch, normalize_running
from batchnorm.jax.synchronize import Groups
from batchnorm.jax.variables import (
    Momentum,
    PassStatistics,
    Renormalization,
    hold_renorm,
    set_limits,
    value_of,
)
from batchnorm.kernels.explanation import Explanation, ask

__all__ = ["BatchNorm", "Momentum"]


class BatchNorm(Modes):
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
        debias: weigh the first steps so that the statistics forget their start at once: after one
            step they are that batch's (S23).
        padded_output: "normalize" padded rows of y like real ones, or "zero" them, in evaluation
            and frozen too (S4).
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
            renorm_mean, renorm_stddev; with debias steps, an int32 scalar.
        renorm: None, or what holds `decay` and the limits `rmin`, `rmax`, `dmax`, each a
            `RenormLimit`; see `set_renorm_clipping`.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range, or options that exclude each other.

    Source: S1-S16, S20, S21, S23; Ioffe and Szegedy 2015 (arXiv 1502.03167); Ioffe 2017
    (arXiv 1702.03275).
    Unlike flax's it takes masks of any shape of S1, keeps its digits at large offsets (S3),
    merges devices by count (S14), survives empty and overflowing batches (S6, S9), and stays
    frozen when told so (S15).

    >>> layer = BatchNorm(3, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((8, 5, 3)), mask=jnp.ones((8, 5), bool)).shape
    (8, 5, 3)
    """

    axis: int | tuple[int, ...]
    num_features: int | tuple[int, ...] | None
    momentum: Momentum
    epsilon: float
    debias: bool
    renorm: Renormalization | None
    mean: nnx.BatchStat
    var: nnx.BatchStat
    scale: nnx.Param | None
    bias: nnx.Param | None
    stddev: nnx.BatchStat
    renorm_mean: nnx.BatchStat
    renorm_stddev: nnx.BatchStat
    steps: nnx.BatchStat
    passes: PassStatistics | None = None

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
        debias: bool = False,
        padded_output: str = "normalize",
        fused: bool | None = None,
        rngs: Any = None,
        use_running_average: bool | None = False,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] | None = None,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        features_in: int | tuple[int, ...] | None = None,
    ) -> None:
        given = locals()
        named = {name: given[name] for name in list_arguments(OPTIONS) if name in given}
        values = check_arguments(OPTIONS, named)
        values["momentum"] = Momentum(jnp.asarray(values["momentum"], jnp.float32))
        values["renorm"] = hold_renorm(values["renorm"], (), wide_type(values["param_dtype"]))
        for name, value in values.items():
            setattr(self, name, value)
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
            found = state.sizes_of(self.axis, jnp.shape(x))
            sizes = found if len(found) > 1 else found[0]
        self.num_features = sizes
        shape = sizes if isinstance(sizes, tuple) else (sizes,)
        for name, variable in state.make_variables(self, shape, rngs).items():
            setattr(self, name, variable)
        self.initialized = True
        if not use_running_average:
            self(x, use_running_average=False)
        return self

    @names_errors()
    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        update_statistics: bool = True,
    ) -> Array:
        """Normalize x, and in training move the running statistics.

        Args:
            x: floating, of a rank that has the channel axes, `(N, ..., C)` by default. Of shape
                `(C,)` it is one row, as inside `jax.vmap` over examples.
            use_running_average: wins over the flags (S15); None: `not training or frozen`.
            mask: boolean, or integers of 1 and 0, for real rows and padding: x's shape without
                its channel axes, a prefix of that, or x's rank with sizes of x or 1 (S1). Traced
                integers count as real where they are not 0.
            update_statistics: False leaves every running value as it is (S20), the counter of
                steps too: for a second pass over the same data, or a teacher's.

        Returns:
            y, of x's shape, and its type or `dtype`.

        Raises:
            TypeError: an array of the wrong dtype; a traced update_statistics.
            ValueError: shapes that do not fit; an uninitialized layer in evaluation or under a
                trace. State is unchanged then.
            NameError: `axis_name` is not bound.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        x, update = check_input(x), check_update(update_statistics)
        if not self.initialized:
            self._initialize_from(x, use_running_average)
        state.check_sizes(self, x)
        training = not use_running_average
        arrays, dtype = state.read_arrays(self, x, mask, training)
        settings = make_settings(type(self).__name__, self._read, training=training)
        if not training:
            return normalize_running(arrays, settings).astype(dtype)
        step = normalize_batch(arrays, settings, update=update and self.passes is None)
        if update and self.passes is not None:
            state.add_pass(self.passes, step.moments)
        elif update:
            state.write_running(self, step.running)
        return step.y.astype(dtype)

    @names_errors()
    def _explain(self, x: Any, use_running_average: bool | None = None, **rest: Any) -> Explanation:
        """The way of a call."""
        if not self.initialized:
            raise ArgumentValueError(
                "the layer is not initialized, and has no way yet; call "
                "layer.init(key, x) first, or pass num_features and rngs to the constructor."
            )
        return ask(lambda: BatchNorm.__call__(self, x, use_running_average, **rest))

    @names_errors()
    def set_renorm_clipping(
        self, *, rmax: Any = None, rmin: Any = None, dmax: Any = None
    ) -> BatchNorm:
        """Set limits of renormalization's r and d, in place, and nothing else (S11).

        The limits are data: a compiled step takes any, and a schedule compiles once.

        Args:
            rmax: largest r, a number or a floating scalar, traced ones too; ∞ lifts the limit,
                None leaves it as it is.
            rmin: smallest r, likewise.
            dmax: largest magnitude of d, likewise.

        Returns:
            The layer.

        Raises:
            ValueError: a layer without renorm; a negative number; rmin above rmax, as far as values
                are known when this runs. No limit has changed then.
            TypeError: no number.
        """
        set_limits(self.renorm, {"rmin": rmin, "rmax": rmax, "dmax": dmax})
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

    def _read(self, name: str) -> Any:
        """The value of an option, which may be in variables."""
        return value_of(getattr(self, name))
