"""The compiled kernels as TensorFlow operations.

They run in Python functions that the graph calls, on the memory of its tensors: a custom
operation would tie this library to one version of TensorFlow. Eager code calls the functions
itself. XLA cannot call Python, nor can a saved model, so that graphs for those take array code;
evaluation always does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from batchnorm.core.running import Running
from batchnorm.keras.backends.shared import refuse_apart, refuse_calls
from batchnorm.keras.backends.tensorflow import passes
from batchnorm.keras.backends.tensorflow.array_code import normalize_by_batch
from batchnorm.keras.backends.tensorflow.devices import find_accelerator, is_compiled
from batchnorm.keras.backends.tensorflow.passes import Passes
from batchnorm.keras.backends.tensorflow.step import Step
from batchnorm.keras.call import Call
from batchnorm.kernels.select import select_kernel

_SMALL = 1 << 15  # of elements, measured: with a mask and without, and with all options


def refuse_kernel(call: Call, rank: int | None) -> str | None:
    """As `batchnorm.keras.functional.Backend` says."""
    return refuse_calls(call) or refuse_apart(call.axes, rank)


def refuse(step: Step) -> str | None:
    """The reason why no kernel serves a training step, or None."""
    reason = refuse_kernel(step.call, step.x.shape.rank)
    if reason is not None:
        return reason
    if is_compiled():
        return "XLA cannot call it (jit_compile=True)"
    if accelerator := find_accelerator():
        return f"there is none for device {accelerator}"
    if not step.call.fused and _is_small(step.x):
        return f"a graph runs array code faster on up to {_SMALL} elements than it calls Python"
    choice = select_kernel(
        "cpu", step.x.dtype.name, adjusted=False, per_channel_mask=step.masks_channels
    )
    return None if choice.kernel else choice.reason


def _is_small(x: tf.Tensor) -> bool:
    """True for an x of a graph that is known to be small."""
    size = x.shape.num_elements()
    return not tf.executing_eagerly() and size is not None and size <= _SMALL


def run(step: Step) -> tuple[tf.Tensor, Running]:
    """y by the batch's own statistics, and the running ones after it."""
    x, call = step.x, step.call
    known = Passes(
        call.owner,
        call.axes,
        call.options,
        step.mask is not None,
        step.gamma is not None,
        step.beta is not None,
    )
    statistics = [a for a in step.running if a is not None]
    masks = [] if step.mask is None else [step.mask]
    limits = [] if step.limits is None else [step.limits]
    backward = _make_backward(step, known, masks)

    @tf.custom_gradient
    def forward(*given: tf.Tensor) -> Any:
        # The array for the backward pass has no shape that the graph knows.
        outputs = _call(
            partial(passes.forward, known),
            [*given, *masks, *limits, *statistics],
            [x, None, *statistics],
        )
        kept = outputs[1]

        def gradient(dy: tf.Tensor, *_: Any) -> Any:
            return backward(dy, kept, *given)

        return tuple(outputs), gradient

    y, _, *moved = forward(*step.given)
    values = iter(moved)
    return y, Running(*(None if a is None else next(values) for a in step.running))


def _make_backward(step: Step, known: Passes, masks: list[tf.Tensor]) -> Callable[..., Any]:
    """The backward pass of a step; its own derivative is that of array code."""

    @tf.custom_gradient
    def backward(dy: tf.Tensor, kept: tf.Tensor, *given: tf.Tensor) -> Any:
        found = _call(partial(passes.backward, known), [dy, kept, *given, *masks], given)

        def again(*cotangents: tf.Tensor) -> Any:
            with tf.GradientTape() as outer:
                outer.watch([dy, *given])
                with tf.GradientTape() as inner:
                    inner.watch(given)
                    y = normalize_by_batch(step, *step.place(given))[0]
                first = inner.gradient(y, given, dy)
            second = outer.gradient(first, [dy, *given], cotangents)
            return second[0], None, *second[1:]

        return tuple(found), again

    return backward


def _call(
    function: Callable[..., Any], arrays: Sequence[tf.Tensor], like: Sequence[tf.Tensor | None]
) -> list[tf.Tensor]:
    """A function of NumPy arrays; its results have types and shapes as `like`, None for float64."""
    if tf.executing_eagerly():  # `tf.numpy_function` would copy whatever goes in and comes out
        return [passes.make_tensor(a) for a in function(*map(np.asarray, arrays))]
    types = [tf.float64 if a is None else a.dtype for a in like]
    found = tf.numpy_function(function, arrays, types, stateful=False)
    for one, a in zip(found, like, strict=True):
        if a is not None:
            one.set_shape(a.shape)
    return list(found)
