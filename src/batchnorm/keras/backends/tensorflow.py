"""Normalizing on the TensorFlow backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from batchnorm.core import config
from batchnorm.core.forward import Inputs, forward_batch, forward_running
from batchnorm.core.normalize import rstd_of_running
from batchnorm.core.running import Running
from batchnorm.keras.adjustment import missing_axes
from batchnorm.keras.backends import tensorflow_kernels as kernels
from batchnorm.keras.backends.tensorflow_arrays import (
    XP,
    DynamicLayout,
    check_divisible,
    fill_mask,
    fit_mask,
    make_merge,
    needs_mask,
    place_given,
    sizes_of,
)
from batchnorm.keras.backends.tensorflow_devices import find_accelerator, is_compiled
from batchnorm.keras.call import Call
from batchnorm.kernels import explanation
from batchnorm.kernels.select import refuse_fused

_ONE_PASS = "one operation of TensorFlow"

refuse_kernel = kernels.refuse_options


def resolve_training(training: Any) -> Any:
    """A bool where `training` has a value now, rather than when the graph runs."""
    value = tf.get_static_value(training) if tf.is_tensor(training) else training
    return training if value is None else bool(value)


def read_values(a: tf.Tensor) -> np.ndarray | None:
    """The values of a tensor where no device but the CPU has to be asked for them, or None."""
    if not tf.executing_eagerly() or not hasattr(a, "numpy"):
        return None
    return a.numpy() if "CPU" in a.device else None


def normalize(
    x: tf.Tensor, mask: Any, gamma: Any, beta: Any, running: Running, call: Call
) -> tuple[tf.Tensor, Running | None]:
    """As `batchnorm.keras.functional.Backend` says."""
    mask = None if mask is None else fit_mask(tf.convert_to_tensor(mask), x, call.axes)
    gamma, beta = (None if a is None else tf.convert_to_tensor(a) for a in (gamma, beta))
    running = running.map(tf.convert_to_tensor)

    def train() -> tuple[tf.Tensor, Running]:
        return _by_batch(x, mask, gamma, beta, running, call)

    def evaluate() -> tuple[tf.Tensor, Running]:
        return _by_running(x, mask, gamma, beta, running, call), running

    if tf.is_tensor(call.training):
        return tf.cond(tf.cast(call.training, tf.bool), train, evaluate)
    return train() if call.training else (evaluate()[0], None)


def _by_batch(
    x: tf.Tensor, mask: Any, gamma: Any, beta: Any, running: Running, call: Call
) -> tuple[tf.Tensor, Running]:
    x = check_divisible(x, call)
    plain = _plain_step(mask, running, call)
    refusal = None if call.fused is False else kernels.refuse(x, mask, call)
    if call.fused and refusal is not None:
        raise refuse_fused(refusal)
    if call.fused is False or refusal is not None:
        reason = explanation.UNFUSED if refusal is None else refusal
        explanation.report(call.owner, explanation.ARRAY_CODE, ((explanation.KERNELS, reason),))
        return plain(x, gamma, beta)
    explanation.report(call.owner, explanation.KERNELS)

    def differentiable(x: Any, gamma: Any, beta: Any) -> tf.Tensor:
        return plain(x, gamma, beta)[0]

    return kernels.step(x, mask, gamma, beta, running, call, differentiable)


def _plain_step(
    mask: Any, running: Running, call: Call
) -> Callable[[Any, Any, Any], tuple[tf.Tensor, Running]]:
    """The training step in differentiable operations, as a function of x, gamma and beta."""

    def step(x: Any, gamma: Any, beta: Any) -> tuple[tf.Tensor, Running]:
        if any(x.shape[a] == 0 for a in call.axes):
            return _without_channels(x, gamma, beta, call), running
        work = _working_type(x)
        layout = DynamicLayout.of(x, call.axes, call.options.virtual_batch_size)
        shape: Any = tuple(x.shape) if x.shape.is_fully_defined() else tf.shape(x)
        s, t = config.call_adjustment(call.adjustment, shape)
        real = fill_mask(mask, x, call.axes) if needs_mask(layout) else mask
        inputs = Inputs(
            tf.cast(x, work),
            real,
            gamma=_cast(gamma, work),
            beta=_cast(beta, work),
            s=_adjusted("scale", s, x, work),
            t=_adjusted("bias", t, x, work),
        )
        found = forward_batch(
            inputs,
            _in(running, work),
            layout,
            call.options,
            merge=make_merge() if call.synchronized else None,
            xp=XP,
        )
        assert found.running is not None
        new = Running(
            *(
                None if old is None else tf.cast(tf.stop_gradient(a), old.dtype)
                for a, old in zip(found.running, running, strict=True)
            )
        )
        y = tf.cast(found.y, x.dtype)
        y.set_shape(x.shape)
        return y, new

    return step


def _without_channels(x: tf.Tensor, gamma: Any, beta: Any, call: Call) -> tf.Tensor:
    """y of nothing: TensorFlow crashes where it folds products with an empty constant."""
    sizes = [x.shape[a] if a in call.axes else 1 for a in range(x.shape.rank)]
    for a in (gamma, beta):
        x = x if a is None else x + tf.cast(tf.reshape(a, sizes), x.dtype)
    return x


def _by_running(
    x: tf.Tensor, mask: Any, gamma: Any, beta: Any, running: Running, call: Call
) -> tf.Tensor:
    work = _working_type(x)
    layout = DynamicLayout.of(x, call.axes, None)

    def evaluate(x: Any, gamma: Any, beta: Any, real: Any = None) -> tf.Tensor:
        if any(x.shape[a] == 0 for a in call.axes):
            return _without_channels(x, gamma, beta, call)
        inputs = Inputs(tf.cast(x, work), real, _cast(gamma, work), _cast(beta, work))
        statistics = _in(running, work)
        y = forward_running(inputs, statistics, layout, call.options, xp=XP)
        return tf.cast(y, x.dtype)

    refusal = _refuse_one_pass(x, call)
    one_pass = refusal is None
    if one_pass:
        explanation.report(call.owner, _ONE_PASS)
    else:
        explanation.report(call.owner, explanation.ARRAY_CODE, ((_ONE_PASS, str(refusal)),))
    if mask is None and not one_pass:
        return evaluate(x, gamma, beta)
    given = [a for a in (x, gamma, beta) if a is not None]
    place = partial(place_given, scaled=gamma is not None, centred=beta is not None)

    @tf.custom_gradient
    def forward(*given: tf.Tensor) -> Any:
        def gradient(dy: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(given)
                y = evaluate(*place(given), mask)  # matters to gradients only (S8)
            return tape.gradient(y, given, dy)

        if one_pass:
            return _evaluate_in_one_pass(*place(given), running, call), gradient
        return evaluate(*place(given)), gradient

    return forward(*given)


def _refuse_one_pass(x: tf.Tensor, call: Call) -> str | None:
    """Why TensorFlow's own fused operation does not compute the same, or None."""
    if call.fused is False:
        return explanation.UNFUSED
    if x.dtype not in (tf.float32, tf.float16, tf.bfloat16):
        return f"it does not take {x.dtype.name}"
    if call.axes != (x.shape.rank - 1,):
        return "it takes channels on the last axis"
    if x.shape[-1] == 0:
        return "it takes no input without channels"
    if accelerator := find_accelerator():
        return f"it serves the CPU, and the graph may run on {accelerator}"
    if is_compiled():
        return "XLA makes x·a + b of it, which cancels at offsets"  # (S3)
    return None


def _evaluate_in_one_pass(
    x: tf.Tensor, gamma: Any, beta: Any, running: Running, call: Call
) -> tf.Tensor:
    """(x - mean)·scale + offset over the last axis, in one pass over x."""
    channels = x.shape[-1]
    mean, var = (tf.cast(a, tf.float32) for a in running[:2])
    scale = rstd_of_running(var, eps=call.options.eps, xp=XP)
    found = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(x, (1, 1, -1, channels)),
        scale=scale if gamma is None else scale * tf.cast(gamma, tf.float32),
        offset=tf.zeros(channels) if beta is None else tf.cast(beta, tf.float32),
        mean=mean,
        variance=tf.ones(channels),  # `scale` has divided already
        epsilon=0.0,
        is_training=False,
    )
    return tf.reshape(found.y, sizes_of(x))


def _working_type(x: tf.Tensor) -> tf.DType:
    return tf.float64 if x.dtype == tf.float64 else tf.float32


def _cast(a: Any, dtype: tf.DType) -> Any:
    return None if a is None else tf.cast(a, dtype)


def _in(running: Running, dtype: tf.DType) -> Running:
    return running.map(lambda a: tf.cast(a, dtype))


def _adjusted(name: str, a: Any, x: tf.Tensor, dtype: tf.DType) -> Any:
    """A tensor of the adjustment that broadcasts against x, of x's rank, or None (S13)."""
    if a is None:
        return None
    tensor = tf.cast(tf.convert_to_tensor(a), dtype)
    missing = missing_axes(name, tensor.shape.as_list(), x.shape.as_list())
    return tf.reshape(tensor, [1] * missing + sizes_of(tensor))
