"""The runs of a case on the Keras front end, on this process's backend."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import keras
import numpy as np

from batchnorm.keras import BatchNormalization, accumulate_statistics, keep_statistics
from batchnorm.verification import keras_backend
from batchnorm.verification.cases import Case, Data, Result, State, split
from batchnorm.verification.comparison import check_type

_WEIGHTS = {
    "mean": "moving_mean",
    "var": "moving_variance",
    "stddev": "moving_stddev",
    "renorm_mean": "renorm_mean",
    "renorm_stddev": "renorm_stddev",
}


def refuse(case: Case) -> str | None:
    """The reason why Keras's layer does not have the case, or None."""
    if case.residual or case.activation is not None:
        return "activation and residual are torch's"
    if case.decay is None:
        return "Keras has no cumulative average"
    if case.single_value != "raise":
        return "single_value is torch's; Keras always gives beta"
    if case.passes > 1 and keras_backend.NAME == "jax":
        return "Keras on JAX has no place for the moments of several passes"
    if case.dtype == "float64" and not keras_backend.has_float64():
        return "float64 is switched off in JAX"
    return None


def run(
    case: Case,
    data: Data,
    *,
    fused: bool | None = None,
    compiled: str | None = None,
    synchronized: bool = False,
) -> Result:
    """Run a case through `BatchNormalization`."""
    layer = _layer(case, data, fused, synchronized)
    with ExitStack() as blocks:
        if not case.update:
            blocks.enter_context(keep_statistics())
        if case.passes > 1:
            blocks.enter_context(accumulate_statistics(layer))
        found = [_pass(layer, *part, compiled) for part in split(case, data)]
    y, dx, gradients = zip(*found, strict=True)
    sums = iter(np.sum(one, axis=0) for one in zip(*gradients, strict=True))
    kept = {f: getattr(layer, name, None) for f, name in _WEIGHTS.items()}
    return Result(
        np.concatenate(y),
        np.concatenate(dx),
        np.reshape(next(sums), case.channels) if case.gamma else None,
        np.reshape(next(sums), case.channels) if case.beta else None,
        State(
            **{
                f: None if w is None else np.reshape(keras_backend.numpy(w.value), case.channels)
                for f, w in kept.items()
            },
            batches=None if layer.steps is None else keras_backend.numpy(layer.steps.value),
        ),
    )


def _pass(layer: BatchNormalization, case: Case, data: Data, compiled: str | None) -> Any:
    """y, dx and the gradients of gamma and beta, as far as there are such."""
    mask = None if data.mask is None else keras_backend.native(data.mask)
    if case.adjusted:
        work = "float64" if case.dtype == "float64" else "float32"
        pair = tuple(keras_backend.tensor(a, work) for a in (data.s, data.t))
        layer.adjustment = lambda shape: pair

    def call(x: Any) -> Any:
        return layer(x, training=case.mode != "eval", mask=mask)

    y, dx, gradients = keras_backend.differentiate(
        layer,
        call,
        keras_backend.tensor(data.x, case.dtype),
        keras_backend.tensor(data.dy, case.dtype),
        [w for w in (layer.gamma, layer.beta) if w is not None],
        compiled,
    )
    check_type(keras.backend.standardize_dtype(y.dtype), case.dtype)
    return (
        keras_backend.numpy(y),
        keras_backend.numpy(dx),
        list(map(keras_backend.numpy, gradients)),
    )


def _layer(case: Case, data: Data, fused: bool | None, synchronized: bool) -> BatchNormalization:
    limits: Any = case.renorm or {}
    decay: Any = case.decay  # `refuse` leaves no case without one
    layer = BatchNormalization(
        axis=case.axis,
        momentum=decay,
        epsilon=case.eps,
        center=case.beta,
        scale=case.gamma,
        renorm=case.renorm is not None,
        renorm_clipping=None if case.late_limits else case.renorm or None,
        fused=fused,
        virtual_batch_size=case.ghost,
        adjustment=(lambda shape: (None, None)) if case.adjusted else None,
        padded_output=case.padded_output,
        debias=case.debias,
        synchronized=synchronized,
        dtype={"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}.get(
            case.dtype, case.dtype
        ),
    )
    layer.build(case.shape)
    if case.late_limits:
        layer.set_renorm_clipping(**limits)
    if layer.steps is not None:
        layer.steps.assign(case.steps)
    values: dict[str, Any] = {"gamma": data.gamma, "beta": data.beta}
    values |= {name: getattr(data.state, f) for f, name in _WEIGHTS.items()}
    for name, value in values.items():
        weight = getattr(layer, name, None)
        if weight is not None:
            weight.assign(np.reshape(value, tuple(weight.shape)))
    layer.trainable = case.mode != "frozen"
    return layer
