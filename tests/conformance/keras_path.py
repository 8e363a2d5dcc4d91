"""How a case runs on the Keras front end, on whichever backend this process has."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import keras_backend
from batchnorm.keras import BatchNormalization
from cases import Case, Data, Result, State

_WEIGHTS = {
    "mean": "moving_mean",
    "var": "moving_variance",
    "stddev": "moving_stddev",
    "renorm_mean": "renorm_mean",
    "renorm_stddev": "renorm_stddev",
}


def applies(case: Case) -> bool:
    """Whether Keras's layer has what the case asks for."""
    return not case.residual and case.activation is None and case.decay is not None


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
    mask = None if data.mask is None else keras_backend.native(data.mask)

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
    assert keras.backend.standardize_dtype(y.dtype) == case.dtype
    found = {f: getattr(layer, name, None) for f, name in _WEIGHTS.items()}
    rest = iter(gradients)
    return Result(
        keras_backend.numpy(y),
        keras_backend.numpy(dx),
        np.reshape(keras_backend.numpy(next(rest)), case.channels) if case.gamma else None,
        np.reshape(keras_backend.numpy(next(rest)), case.channels) if case.beta else None,
        State(
            **{
                f: None if w is None else np.reshape(keras_backend.numpy(w.value), case.channels)
                for f, w in found.items()
            },
            batches=None,
        ),
    )


def _layer(case: Case, data: Data, fused: bool | None, synchronized: bool) -> BatchNormalization:
    adjustment = None
    if case.adjusted:
        work = "float64" if case.dtype == "float64" else "float32"
        pair = tuple(keras_backend.tensor(a, work) for a in (data.s, data.t))
        adjustment = lambda shape: pair  # noqa: E731
    layer = BatchNormalization(
        axis=case.axis,
        momentum=case.decay,
        epsilon=case.eps,
        center=case.beta,
        scale=case.gamma,
        renorm=case.renorm is not None,
        renorm_clipping=case.renorm or None,
        fused=fused,
        virtual_batch_size=case.ghost,
        adjustment=adjustment,
        synchronized=synchronized,
        dtype={"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}.get(
            case.dtype, case.dtype
        ),
    )
    layer.build(case.shape)
    values = {"gamma": data.gamma, "beta": data.beta}
    values |= {name: getattr(data.state, f) for f, name in _WEIGHTS.items()}
    for name, value in values.items():
        weight = getattr(layer, name, None)
        if weight is not None:
            weight.assign(np.reshape(value, tuple(weight.shape)))
    layer.trainable = case.mode != "frozen"
    return layer
