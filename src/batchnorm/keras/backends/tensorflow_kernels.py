"""The compiled kernels as TensorFlow operations.

They run in Python functions that the graph calls, on the memory of its tensors: a custom
operation would tie this library to one version of TensorFlow. XLA cannot call Python, nor can a
saved model, so that graphs for those take the plain path; evaluation always does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from batchnorm.core.config import Options
from batchnorm.core.errors import naming
from batchnorm.core.layout import Layout, make_layout
from batchnorm.core.running import Running
from batchnorm.keras.backends.shared import refuse_apart, refuse_calls
from batchnorm.keras.backends.tensorflow_arrays import place_given
from batchnorm.keras.backends.tensorflow_devices import find_accelerator, is_compiled
from batchnorm.keras.call import Call
from batchnorm.kernels import extension
from batchnorm.kernels.geometry import find_geometry, row_major_strides, row_mask_shape, view_mask
from batchnorm.kernels.kept import TYPES
from batchnorm.kernels.select import select_kernel

if TYPE_CHECKING:
    from batchnorm.kernels import _cpu

_ALIGNMENT = 64  # bytes; TensorFlow copies arrays that start elsewhere

extension.warn_if_missing()


def refuse_options(call: Call, rank: int | None) -> str | None:
    """As `batchnorm.keras.functional.Backend` says."""
    return refuse_calls(call) or refuse_apart(call.axes, rank)


def refuse(x: tf.Tensor, mask: tf.Tensor | None, call: Call) -> str | None:
    """Why no kernel serves this call, or None."""
    reason = refuse_options(call, x.shape.rank)
    if reason is not None:
        return reason
    if is_compiled():
        return "XLA cannot call it (jit_compile=True)"
    if accelerator := find_accelerator():
        return f"there is none for device {accelerator}"
    per_channel = mask is not None and any(mask.shape[a] != 1 for a in call.axes)
    choice = select_kernel("cpu", x.dtype.name, adjusted=False, per_channel_mask=per_channel)
    return None if choice.kernel else choice.reason


def step(
    x: tf.Tensor,
    mask: tf.Tensor | None,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    running: Running,
    call: Call,
    plain: Callable[[Any, Any, Any], tf.Tensor],
) -> tuple[tf.Tensor, Running]:
    """A training step by the kernels.

    Args:
        x: of a type and layout that `refuse` has nothing against.
        mask: of x's rank, or None.
        gamma: per channel, or None.
        beta: per channel, or None.
        running: before the step.
        call: everything else.
        plain: y of x, gamma and beta in differentiable operations, for higher derivatives.

    Returns:
        y, and the statistics after the step.
    """
    passes = _Passes(
        call.owner, call.axes, call.options, mask is not None, gamma is not None, beta is not None
    )
    statistics = [a for a in running if a is not None]
    masks = [] if mask is None else [mask]
    given = [a for a in (x, gamma, beta) if a is not None]

    @tf.custom_gradient
    def forward(*given: tf.Tensor) -> Any:
        outputs = tf.numpy_function(
            partial(_forward, passes),
            [*given, *masks, *statistics],
            [x.dtype, tf.float64, *(a.dtype for a in statistics)],
            stateful=False,
        )
        for found, like in zip(outputs, (x, None, *statistics), strict=True):
            if like is not None:
                found.set_shape(like.shape)
        kept = outputs[1]

        def gradient(dy: tf.Tensor, *_: Any) -> Any:
            return backward(dy, kept, *given)

        return tuple(outputs), gradient

    @tf.custom_gradient
    def backward(dy: tf.Tensor, kept: tf.Tensor, *given: tf.Tensor) -> Any:
        found = tf.numpy_function(
            partial(_backward, passes),
            [dy, kept, *given, *masks],
            [a.dtype for a in given],
            stateful=False,
        )
        if tf.is_tensor(found):  # what an eager call makes of a list of one
            found = [found]
        for one, like in zip(found, given, strict=True):
            one.set_shape(like.shape)

        def again(*cotangents: tf.Tensor) -> Any:
            with tf.GradientTape() as outer:
                outer.watch([dy, *given])
                with tf.GradientTape() as inner:
                    inner.watch(given)
                    y = plain(*place_given(given, scaled=passes.scaled, centred=passes.centred))
                first = inner.gradient(y, given, dy)
            second = outer.gradient(first, [dy, *given], cotangents)
            return second[0], None, *second[1:]

        return tuple(found), again

    y, _, *moved = forward(*given)
    values = iter(moved)
    return y, Running(*(None if a is None else next(values) for a in running))


class _Passes(NamedTuple):
    """What the Python functions of a call know besides their arrays."""

    owner: str
    axes: tuple[int, ...]
    options: Options
    masked: bool
    scaled: bool
    centred: bool


class _Prepared(NamedTuple):
    """What the shapes of a call decide."""

    plan: _cpu.Plan
    row: int  # distance between rows of x


def _forward(passes: _Passes, x: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """y, what the backward pass needs, and the moved statistics."""
    rest = iter(arrays)
    gamma = next(rest) if passes.scaled else None
    beta = next(rest) if passes.centred else None
    mask = next(rest) if passes.masked else None
    statistics = [_aligned(a.shape, a.dtype, a) for a in rest]
    prepared, mask = _prepare(passes, x, mask)
    y, options = _aligned(x.shape, x.dtype), passes.options
    kept = prepared.plan.forward(
        x=x.ctypes.data,
        mask=_address(mask),
        y=y.ctypes.data,
        residual=0,
        residual_row=0,
        state=_state(gamma, beta, statistics),
        eps=options.eps,
        decay=options.decay,
        batch=True,
        update=True,
        unbiased=options.unbiased,
        renorm=extension.make_renorm(options.renorm),
        threads=_threads(),
        kept=None,
    )
    return [y, kept.all().copy(), *statistics]


def _backward(
    passes: _Passes, dy: np.ndarray, kept: np.ndarray, x: np.ndarray, *arrays: np.ndarray
) -> list[np.ndarray]:
    """dx, and dgamma and dbeta where they are wanted."""
    rest = iter(arrays)
    gamma = next(rest) if passes.scaled else None
    beta = next(rest) if passes.centred else None
    prepared, mask = _prepare(passes, x, next(rest) if passes.masked else None)
    dx = _aligned(x.shape, x.dtype)
    dgamma, dbeta = (None if a is None else np.empty_like(a) for a in (gamma, beta))
    plan, renorm = prepared.plan, passes.options.renorm is not None
    plan.backward(
        dy=dy.ctypes.data,
        dy_row=prepared.row,
        x=x.ctypes.data,
        y=0,
        mask=_address(mask),
        dx=dx.ctypes.data,
        dresidual=0,
        dgamma=_address(dgamma),
        dgamma_type=_type(dgamma),
        dbeta=_address(dbeta),
        dbeta_type=_type(dbeta),
        kept=plan.restore(data=kept.ctypes.data, size=kept.size, renorm=renorm),
        batch=True,
        threads=_threads(),
    )
    return [a for a in (dx, dgamma, dbeta) if a is not None]


def _prepare(
    passes: _Passes, x: np.ndarray, mask: np.ndarray | None
) -> tuple[_Prepared, np.ndarray | None]:
    """What the shapes decide, and the mask in memory that the kernels can walk."""
    settings = (passes.axes, passes.options.virtual_batch_size, x.shape, str(x.dtype))
    with naming(passes.owner):  # nothing else names the errors of a graph that runs
        if mask is None:
            found = _plan(*settings, None, 1)
        else:
            found = _plan(*settings, mask.shape, mask.itemsize)
            if found is None:
                rows = row_mask_shape(Layout(x.shape, passes.axes))
                mask = np.ascontiguousarray(np.broadcast_to(mask, rows))
                found = _plan(*settings, mask.shape, mask.itemsize)
    assert found is not None
    return found, mask


@lru_cache(maxsize=1024)
def _plan(
    axes: tuple[int, ...],
    virtual_batch_size: int | None,
    shape: tuple[int, ...],
    dtype: str,
    mask_shape: tuple[int, ...] | None,
    mask_width: int,
) -> _Prepared | None:
    """What dense arrays of these shapes decide; None if the mask must be copied first."""
    layout = make_layout(shape, axes, virtual_batch_size)
    geometry = find_geometry(layout, row_major_strides(shape))
    assert geometry is not None
    view = None
    if mask_shape is not None:
        Layout(shape, axes).mask_shape(mask_shape)  # sizes that the graph did not know
        view = view_mask(geometry, shape, mask_shape, row_major_strides(mask_shape))
        if view is None:
            return None
    plan = extension.make_plan(layout, geometry, dtype, None, view, mask_width, 0)
    return _Prepared(plan, geometry.dense)


def _aligned(
    shape: tuple[int, ...], dtype: np.dtype, values: np.ndarray | None = None
) -> np.ndarray:
    """An array that TensorFlow takes over without a copy; empty, or a copy of `values`."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    found = memory[first : first + size].view(dtype).reshape(shape)
    if values is not None:
        found[...] = values
    return found


def _state(
    gamma: np.ndarray | None, beta: np.ndarray | None, statistics: list[np.ndarray]
) -> extension.State:
    """The per-channel arrays; `statistics` are mean and var, and renormalization's three."""
    names = ("running_mean", "running_var", "running_stddev", "renorm_mean", "renorm_stddev")
    running = dict(zip(names, (a.ctypes.data for a in statistics), strict=False))
    return extension.State(
        gamma=_address(gamma),
        gamma_type=_type(gamma),
        beta=_address(beta),
        beta_type=_type(beta),
        running_type=_type(statistics[0]),
        **running,
    )


def _address(a: np.ndarray | None) -> int:
    return 0 if a is None else a.ctypes.data


def _type(a: np.ndarray | None) -> int:
    return TYPES["float32" if a is None else str(a.dtype)]


def _threads() -> int:
    return tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1
