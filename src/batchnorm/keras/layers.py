"""The layers: options and calls, around the active backend's functional."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras

from batchnorm.core.config import Adjustment
from batchnorm.core.errors import ArgumentValueError, names_errors, naming
from batchnorm.keras.call import Call
from batchnorm.keras.dropped import warn_dropped
from batchnorm.keras.functional import BACKEND
from batchnorm.keras.masking import find_mask
from batchnorm.keras.masks import propagate_mask, split_pair, to_boolean
from batchnorm.keras.moving import find_rule
from batchnorm.keras.options import (
    list_call_options,
    list_losses,
    make_attributes,
    make_config,
    make_core,
    take_arguments,
)
from batchnorm.keras.private import get_mask
from batchnorm.keras.state import WeightedNormalization
from batchnorm.kernels.explanation import Explanation, ask
from batchnorm.kernels.select import refuse_fused

__all__ = ["BatchNormalization", "SyncBatchNormalization"]


@keras.saving.register_keras_serializable(package="batchnorm")
class BatchNormalization(WeightedNormalization):
    """Batch normalization over every axis but the channel axes, on all Keras backends.

    Takes the place of `keras.layers.BatchNormalization`: same arguments, weights and config, same
    results where Keras's are right; and brings back what Keras 3 dropped.

    Args:
        axis: channel axis or axes of the input, an int or a list or tuple of ints.
        momentum: weight of the *old* value in the moving statistics, between 0 and 1.
        epsilon: added to the variance, at least 0.
        center: learn beta.
        scale: learn gamma.
        beta_initializer: of beta.
        gamma_initializer: of gamma.
        moving_mean_initializer: of the moving mean.
        moving_variance_initializer: of the moving variance.
        beta_regularizer: of beta.
        gamma_regularizer: of gamma.
        beta_constraint: of beta.
        gamma_constraint: of gamma.
        renorm: batch renormalization (S11).
        renorm_clipping: any of "rmin", "rmax", "dmax"; missing ones are 0, ∞, ∞.
        renorm_momentum: weight of the old value in the statistics that r and d compare with.
        fused: None takes the fastest path, True demands a kernel, False plain array code.
        trainable: False normalizes by the moving statistics and trains nothing (S15).
        virtual_batch_size: samples of one ghost batch, which must divide the batch in training
            (S12).
        adjustment: function of the input's shape returning (scale, bias), each broadcastable
            against the input, applied before gamma and beta in training (S13). Not saved.
        synchronized: moments over all replicas, ranks or devices (S14).
        axis_name: JAX: the named axis to synchronize over. Not saved.
        process_group: torch: the ranks to synchronize with. Not saved.
        name: of the layer.
        padded_output: "normalize" padded rows of the output like real ones, or "zero" them, in
            evaluation and frozen too (S4).
        debias: let the moving statistics forget their start at once: after one step they are that
            batch's (S23). Steps are counted in a further weight, `steps`.
        **kwargs: `dtype` and what else `keras.layers.Layer` takes.

    Call arguments:
        inputs: x, or a pair (x, mask).
        training: bool, int, 0-d tensor, or None for the call context's value, else False.
        mask: non-zero marks real rows: x's shape without its channel axes, a prefix of that, or
            x's rank with sizes of x or 1 (S1). One that Keras propagates is used too, and without
            any the one of `padding_mask`.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range, or options that exclude each other; when the layer is
            built, axes that do not fit; when it is called, a mask that does not.

    Source: S1-S16, S23; Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithms 1 and 2; Ioffe 2017
    (arXiv 1702.03275), algorithm 1. Unlike Keras's it takes masks of every kind, padding may hold
    NaN, empty and overflowing batches leave the statistics alone (S6, S9), and no digit is lost
    at offsets (S3). Unlike Keras 2's it always stores the biased variance, uses a mask that
    earlier layers propagate, fuses any rank, and `virtual_batch_size` need not divide the batch in
    inference. `batchnorm.keras.load_weights` loads the weights of Keras 2's ghost batches.

    >>> layer = BatchNormalization()
    >>> layer((keras.ops.ones((4, 3)), keras.ops.array([True, True, True, False]))).shape[1]
    3
    """

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
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
        renorm: bool = False,
        renorm_clipping: Mapping[str, float] | None = None,
        renorm_momentum: float = 0.99,
        fused: bool | None = None,
        trainable: bool = True,
        virtual_batch_size: int | None = None,
        adjustment: Adjustment | None = None,
        synchronized: bool = False,
        name: str | None = None,
        *,
        padded_output: str = "normalize",
        debias: bool = False,
        axis_name: Any = None,
        process_group: Any = None,
        **kwargs: Any,
    ) -> None:
        given = take_arguments(locals(), kwargs)
        with naming(type(self).__name__):  # Keras refuses a decorated constructor
            attributes = make_attributes(given)
        # Keras's own constructor takes neither several axes nor synchronization everywhere.
        super(keras.layers.BatchNormalization, self).__init__(
            trainable=trainable, name=name, **kwargs
        )
        for option, value in attributes.items():
            setattr(self, option, value)
        self.supports_masking = True
        self.gamma = self.beta = None
        self._start_statistics()
        self._read_options()
        with naming(type(self).__name__):
            self._check_kernel(rank=None)

    @names_errors()
    def __call__(self, inputs: Any, *args: Any, mask: Any = None, **kwargs: Any) -> Any:
        """Normalize inputs; arguments as the class says."""
        # To Keras x alone is the input, and the mask one more argument.
        x, mask = split_pair(inputs, mask)
        if getattr(getattr(x, "shape", None), "rank", 0) is None:
            raise ArgumentValueError(
                "inputs must have a known rank; got a tensor of unknown "
                "rank. Give it one, for instance with tf.ensure_shape."
            )
        if mask is None:
            warn_dropped(self, x)
        # Keras would cast the mask to the layer's type, in which a small number may be 0.
        return super().__call__(x, *args, mask=to_boolean(mask), **kwargs)

    @names_errors()
    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """Normalize inputs; arguments as the class says."""
        x, mask = split_pair(inputs, mask)
        if mask is None:  # Keras hands it over only where x is the only tensor
            mask = get_mask(x)
        found = find_mask(self, x, self._channel_axes, to_boolean(mask))
        gamma, beta = (None if a is None else self._per_channel(a) for a in (self.gamma, self.beta))
        call = self._make_call(self._resolve_training(training))
        if found.padded_output is not None:
            options = replace(call.options, padded_output=found.padded_output)
            call = replace(call, options=options)
        x, running = self._cast_input(x), self._running()
        if call.training is False:
            return BACKEND.normalize(x, found.mask, gamma, beta, running, call)[0]
        rule = find_rule(self)
        limits = BACKEND.read_limits(self) if self.renorm else None
        call = replace(call, update=rule.moves is not False, limits=limits)
        y, moved = BACKEND.normalize(x, found.mask, gamma, beta, running, call)
        if moved is not None:
            self._store_if(rule.moves, moved, running)
        if rule.ledger is not None and not BACKEND.repeats(None):
            adds = rule.adds
            if call.training is not True:
                adds = keras.ops.logical_and(adds, keras.ops.cast(call.training, "bool"))
            rule.ledger.add(lambda: BACKEND.measure(x, found.mask, call), adds)
        return y

    @names_errors()
    def _explain(self, x: Any, **arguments: Any) -> Explanation:
        """The way of a call."""
        if not self.built:
            raise ArgumentValueError(
                "the layer has no weights, and no way yet; build it first, "
                "with layer.build(x.shape)."
            )
        return ask(lambda: self(x, **arguments))

    @names_errors()
    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """The mask for the layers behind, of one dimension less than x, or None."""
        x, mask = split_pair(inputs, previous_mask)
        mask = to_boolean(mask)
        return None if mask is None else propagate_mask(mask, x, self._channel_axes)

    def get_config(self) -> dict[str, Any]:
        """The options that Keras's own layer takes, and this one's others where they are set."""
        for loss in list_losses(self):
            warnings.warn(f"{type(self).__name__}: {loss}", stacklevel=2)
        return super(keras.layers.BatchNormalization, self).get_config() | make_config(self)

    @names_errors()
    def _read_options(self) -> None:
        """Compute by the attributes as they are now; limits that were set later stay."""
        options, limits = make_core(self), self._clipping
        if options.renorm is not None and limits is not None:
            options = replace(options, renorm=replace(limits, decay=options.renorm.decay))
        self._options = options

    def _cast_input(self, x: Any) -> Any:
        """x in the type of the output."""
        if keras.backend.standardize_dtype(x.dtype) == self.compute_dtype:
            return x
        return keras.ops.cast(x, self.compute_dtype)

    def _make_call(self, training: Any) -> Call:
        owner, rest = type(self).__name__, list_call_options(self)
        return Call(owner, self._channel_axes, self._options, training, **rest)

    def _resolve_training(self, training: Any) -> Any:
        if training is None or not self.trainable:
            return False
        if isinstance(training, (bool, int)):
            return bool(training)
        return BACKEND.resolve_training(training)

    def _check_kernel(self, rank: int | None) -> None:
        """Raise if fused=True demands a kernel where there is none."""
        if not self.fused:
            return
        call = self._make_call(False)
        reason = BACKEND.refuse_kernel(call, rank)
        if reason is not None:
            raise refuse_fused(reason)


@keras.saving.register_keras_serializable(package="batchnorm")
class SyncBatchNormalization(BatchNormalization):
    """`BatchNormalization(..., synchronized=True)`: moments over all participants (S14).

    They are the replicas of a `tf.distribute` strategy, the ranks of `torch.distributed`, or with
    JAX the devices of a sharded batch or of the axis `axis_name`. Without any of them it is an
    ordinary layer. Arguments, calls and errors are those of `BatchNormalization`.

    Source: S14; Chan, Golub and LeVeque 1983, equation 2.1b.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.setdefault("synchronized", True) is not True:
            raise ValueError(
                f"{type(self).__name__}: synchronized must be True; got "
                f"{kwargs['synchronized']!r}. Use BatchNormalization for local statistics."
            )
        super().__init__(*args, **kwargs)
