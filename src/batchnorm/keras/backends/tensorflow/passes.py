"""The passes on the memory of TensorFlow's tensors, as functions of NumPy arrays."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tensorflow as tf

from batchnorm.core.config import Options, Renorm
from batchnorm.core.errors import naming
from batchnorm.core.layout import Layout, make_layout
from batchnorm.core.running import Scalars, debiased_decay
from batchnorm.kernels import extension
from batchnorm.kernels.geometry import find_geometry, row_major_strides, row_mask_shape, view_mask
from batchnorm.kernels.kept import TYPES

if TYPE_CHECKING:
    from batchnorm.kernels import _cpu

_STEPS = 2  # place of the number of steps among the statistics, where it is counted
_ALIGNMENT = 64  # bytes; TensorFlow copies arrays that start elsewhere

extension.warn_if_missing()


class Passes(NamedTuple):
    """A call without its arrays: which of them there are, and everything else."""

    owner: str
    axes: tuple[int, ...]
    options: Options
    masked: bool
    scaled: bool
    centred: bool


class _Prepared(NamedTuple):
    """The passes for arrays of some shapes."""

    plan: _cpu.Plan
    row: int  # distance between rows of x


def forward(passes: Passes, x: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """y, an array for the backward pass, and the moved statistics."""
    rest = iter(arrays)
    gamma = next(rest) if passes.scaled else None
    beta = next(rest) if passes.centred else None
    mask = next(rest) if passes.masked else None
    limits = next(rest) if passes.options.renorm is not None else None
    statistics = [_aligned(a.shape, a.dtype, a) for a in rest]
    prepared, mask = _prepare(passes, x, mask)
    y, options = _aligned(x.shape, x.dtype), _options_of_step(passes.options, limits, statistics)
    kept = prepared.plan.forward(
        x=_address(x),
        mask=_address(mask),
        y=_address(y),
        residual=0,
        residual_row=0,
        state=_state(gamma, beta, statistics, options.debias),
        eps=options.eps,
        decay=options.decay,
        batch=True,
        update=True,
        unbiased=options.unbiased,
        renorm=extension.make_renorm(options.renorm),
        threads=_threads(),
        kept=None,
    )
    memory = kept.all()
    return [y, _aligned(memory.shape, memory.dtype, memory), *statistics]


def _options_of_step(
    options: Options, limits: np.ndarray | None, statistics: list[np.ndarray]
) -> Options:
    """The options with the limits and decays of a step."""
    renorm = options.renorm
    if renorm is None and not options.debias:
        return options
    if renorm is not None and limits is not None:
        renorm = Renorm(renorm.decay, *map(float, limits))
    if not options.debias:
        return replace(options, renorm=renorm)
    step = int(statistics[_STEPS]) + 1
    if renorm is not None:
        renorm = replace(renorm, decay=debiased_decay(renorm.decay, step, Scalars))
    return replace(options, decay=debiased_decay(options.decay, step, Scalars), renorm=renorm)


def backward(
    passes: Passes, dy: np.ndarray, kept: np.ndarray, x: np.ndarray, *arrays: np.ndarray
) -> list[np.ndarray]:
    """dx, and dgamma and dbeta where they are wanted."""
    rest = iter(arrays)
    gamma = next(rest) if passes.scaled else None
    beta = next(rest) if passes.centred else None
    prepared, mask = _prepare(passes, x, next(rest) if passes.masked else None)
    dx = _aligned(x.shape, x.dtype)
    dgamma, dbeta = (None if a is None else _aligned(a.shape, a.dtype) for a in (gamma, beta))
    plan, renorm = prepared.plan, passes.options.renorm is not None
    plan.backward(
        dy=_address(dy),
        dy_row=prepared.row,
        x=_address(x),
        y=0,
        mask=_address(mask),
        dx=_address(dx),
        dresidual=0,
        dgamma=_address(dgamma),
        dgamma_type=_type(dgamma),
        dbeta=_address(dbeta),
        dbeta_type=_type(dbeta),
        kept=plan.restore(data=_address(kept), size=kept.size, renorm=renorm),
        batch=True,
        threads=_threads(),
    )
    return [a for a in (dx, dgamma, dbeta) if a is not None]


def _prepare(
    passes: Passes, x: np.ndarray, mask: np.ndarray | None
) -> tuple[_Prepared, np.ndarray | None]:
    """The passes for these arrays, and the mask in memory that they can walk."""
    options = passes.options
    settings = (
        *(passes.axes, options.virtual_batch_size, options.zero_padding),
        *(x.shape, x.dtype),
    )
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
    zero_padding: bool,
    shape: tuple[int, ...],
    dtype: np.dtype,
    mask_shape: tuple[int, ...] | None,
    mask_width: int,
) -> _Prepared | None:
    """The passes for dense arrays of these shapes; None if the mask must be copied first."""
    layout = make_layout(shape, axes, virtual_batch_size)
    geometry = find_geometry(layout, row_major_strides(shape))
    assert geometry is not None
    view = None
    if mask_shape is not None:
        Layout(shape, axes).mask_shape(mask_shape)  # sizes that the graph did not know
        view = view_mask(geometry, shape, mask_shape, row_major_strides(mask_shape))
        if view is None:
            return None
    plan = extension.make_plan(
        layout, geometry, dtype.name, None, zero_padding, view, mask_width, 0
    )
    return _Prepared(plan, geometry.dense)


def _aligned(
    shape: tuple[int, ...], dtype: np.dtype, values: np.ndarray | None = None
) -> np.ndarray:
    """An array that TensorFlow takes over without a copy; empty, or a copy of `values`."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -_address(memory) % _ALIGNMENT
    found = memory[first : first + size].view(dtype).reshape(shape)
    if values is not None:
        found[...] = values
    return found


def make_tensor(a: np.ndarray) -> tf.Tensor:
    """An eager tensor of the array's memory, which nobody else may change any more."""
    if a.dtype.name != "bfloat16":
        return tf.experimental.dlpack.from_dlpack(a.__dlpack__())
    bits = tf.experimental.dlpack.from_dlpack(a.view(np.uint16).__dlpack__())  # numpy's rule
    return tf.bitcast(bits, tf.bfloat16)


def _state(
    gamma: np.ndarray | None, beta: np.ndarray | None, statistics: list[np.ndarray], counted: bool
) -> extension.State:
    """The arrays of a step; `statistics` as in Running, without those that there are not."""
    names = ["running_mean", "running_var", "running_stddev", "renorm_mean", "renorm_stddev"]
    if counted:
        names.insert(_STEPS, "batches")
    running = dict(zip(names, map(_address, statistics), strict=False))
    return extension.State(
        gamma=_address(gamma),
        gamma_type=_type(gamma),
        beta=_address(beta),
        beta_type=_type(beta),
        running_type=_type(statistics[0]),
        **running,
    )


def _address(a: np.ndarray | None) -> int:
    return 0 if a is None else a.__array_interface__["data"][0]  # faster than a.ctypes.data


def _type(a: np.ndarray | None) -> int:
    return TYPES["float32" if a is None else a.dtype.name]


def _threads() -> int:
    return tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1
