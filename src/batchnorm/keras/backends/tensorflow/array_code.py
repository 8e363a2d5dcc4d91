"""y in differentiable operations of TensorFlow, by the core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from batchnorm.core import config
from batchnorm.core.forward import Inputs, forward_batch, forward_running
from batchnorm.core.namespace import select
from batchnorm.core.running import Running
from batchnorm.keras.adjustment import missing_axes
from batchnorm.keras.backends.tensorflow.arrays import (
    XP,
    DynamicLayout,
    fill_mask,
    make_merge,
    needs_mask,
    sizes_of,
)
from batchnorm.keras.backends.tensorflow.step import Step


def run_by_batch(step: Step) -> tuple[tf.Tensor, Running]:
    """y by the batch's own statistics, and the running ones after it."""
    return normalize_by_batch(step, step.x, step.gamma, step.beta)


def normalize_by_batch(step: Step, x: Any, gamma: Any, beta: Any) -> tuple[tf.Tensor, Running]:
    """As `run_by_batch`, for other tensors in the place of the step's x, gamma and beta."""
    call, work = step.call, step.working_type
    if not step.has_channels:
        return _without_channels(step, x, gamma, beta), step.running
    layout = DynamicLayout.of(x, call.axes, call.options.virtual_batch_size)
    inputs = _adjusted_inputs(step, x, gamma, beta, layout)
    found = forward_batch(
        inputs,
        _cast_running(step.running, work),
        layout,
        step.options,
        merge=make_merge() if call.synchronized else None,
        xp=XP,
    )
    assert found.running is not None
    moved = (
        None if old is None else tf.cast(tf.stop_gradient(a), old.dtype)
        for a, old in zip(found.running, step.running, strict=True)
    )
    y = tf.cast(found.y, x.dtype)
    y.set_shape(x.shape)
    return y, Running(*moved)


def _adjusted_inputs(step: Step, x: Any, gamma: Any, beta: Any, layout: DynamicLayout) -> Inputs:
    """The core's inputs, with the adjustment's arrays and a mask where rows must be counted."""
    call, work = step.call, step.working_type
    shape: Any = tuple(x.shape) if x.shape.is_fully_defined() else tf.shape(x)
    s, t = config.call_adjustment(call.adjustment, shape)
    mask = fill_mask(step.mask, x, call.axes) if needs_mask(layout) else step.mask
    return Inputs(
        tf.cast(x, work),
        mask,
        gamma=_cast(gamma, work),
        beta=_cast(beta, work),
        s=_adjusted("scale", s, x, work),
        t=_adjusted("bias", t, x, work),
    )


def run_by_running(step: Step) -> tuple[tf.Tensor, Running]:
    """y by the running statistics, which stay."""

    def evaluate(x: Any, gamma: Any, beta: Any) -> tf.Tensor:
        return _normalize_by_running(step, x, gamma, beta)

    if step.mask is None:
        return evaluate(step.x, step.gamma, step.beta), step.running
    return evaluate_with_gradient(step, evaluate), step.running


def evaluate_with_gradient(step: Step, evaluate: Callable[[Any, Any, Any], tf.Tensor]) -> tf.Tensor:
    """y by `evaluate` of x, gamma and beta, with the gradients of array code under the mask."""
    given = step.given

    @tf.custom_gradient
    def forward(*given: tf.Tensor) -> Any:
        def gradient(dy: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(given)
                # The mask matters to gradients, and to padded rows that are 0 (S4, S8).
                y = _normalize_by_running(step, *step.place(given), step.mask)
            return tape.gradient(y, given, dy)

        return _zero_padding(step, evaluate(*step.place(given))), gradient

    return forward(*given)


def _zero_padding(step: Step, y: tf.Tensor) -> tf.Tensor:
    """y of a step that was evaluated without its mask, with 0 at padded rows if they are zeroed."""
    if not step.call.options.zero_padding:
        return y
    found = select(step.mask, y, 0.0, XP)
    found.set_shape(y.shape)
    return found


def _normalize_by_running(step: Step, x: Any, gamma: Any, beta: Any, mask: Any = None) -> tf.Tensor:
    if not step.has_channels:
        return _without_channels(step, x, gamma, beta)
    work, options = step.working_type, step.call.options
    layout = DynamicLayout.of(x, step.call.axes, None)
    inputs = Inputs(tf.cast(x, work), mask, _cast(gamma, work), _cast(beta, work))
    y = forward_running(inputs, _cast_running(step.running, work), layout, options, xp=XP)
    return tf.cast(y, x.dtype)


def _without_channels(step: Step, x: tf.Tensor, gamma: Any, beta: Any) -> tf.Tensor:
    """y of nothing: TensorFlow crashes where it folds products with an empty constant."""
    sizes = [x.shape[a] if a in step.call.axes else 1 for a in range(x.shape.rank)]
    for a in (gamma, beta):
        x = x if a is None else x + tf.cast(tf.reshape(a, sizes), x.dtype)
    return x


def _cast(a: Any, dtype: tf.DType) -> Any:
    return None if a is None else tf.cast(a, dtype)


def _cast_running(running: Running, dtype: tf.DType) -> Running:
    return running.map(lambda a: tf.cast(a, dtype))


def _adjusted(name: str, a: Any, x: tf.Tensor, dtype: tf.DType) -> Any:
    """A tensor of the adjustment that broadcasts against x, of x's rank, or None (S13)."""
    if a is None:
        return None
    tensor = tf.cast(tf.convert_to_tensor(a), dtype)
    missing = missing_axes(name, tensor.shape.as_list(), x.shape.as_list())
    return tf.reshape(tensor, [1] * missing + sizes_of(tensor))
