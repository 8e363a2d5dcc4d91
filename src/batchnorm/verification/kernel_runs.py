"""The runs of a case on the compiled kernels alone, on NumPy arrays: no framework is needed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from batchnorm.core.config import Renorm
from batchnorm.core.layout import Layout, make_layout
from batchnorm.core.running import Scalars, debiased_decay
from batchnorm.kernels import extension
from batchnorm.kernels.geometry import (
    Geometry,
    find_geometry,
    row_distance,
    row_major_strides,
    row_mask_shape,
    view_mask,
)
from batchnorm.kernels.kept import TYPES
from batchnorm.verification.cases import Case, Data, Result, State, refuse_kernels

if TYPE_CHECKING:
    from batchnorm.kernels import _cpu

_THREADS = 2  # more than one, so that the passes split their work
_GAP = 3  # elements between rows of x in memory that has gaps
_RUNNING = {
    "mean": "running_mean",
    "var": "running_var",
    "stddev": "running_stddev",
    "renorm_mean": "renorm_mean",
    "renorm_stddev": "renorm_stddev",
}


def refuse(case: Case) -> str | None:
    """The reason why no kernel serves the case, or None."""
    if case.passes > 1:
        return "front ends merge passes"
    if case.single_value != "raise":
        return "single_value is decided by front ends"
    return refuse_kernels(case)


def run(case: Case, data: Data, *, gaps: bool = False, halves: bool = False) -> Result:
    """Run a case on the kernels of the instruction set in use.

    Args:
        case: one that `refuse` has no reason against.
        data: its arrays.
        gaps: let x lie in memory with gaps between its rows.
        halves: run both steps in the halves between which ranks exchange statistics (S14).
    """
    step = _prepare(case, data, gaps)
    y, kept = _forward(step, halves)
    dx, dgamma, dbeta, dresidual = _backward(step, y, kept, halves)
    state = {name: _wide(a) for name, a in step.state.items()}
    return Result(
        _wide(y),
        _wide(dx),
        None if data.gamma is None else _wide(dgamma),
        None if data.beta is None else _wide(dbeta),
        State(**state),
        None if dresidual is None else _wide(dresidual),
    )


class _Step(NamedTuple):
    """A case in memory as the kernels take it."""

    case: Case
    plan: _cpu.Plan
    row: int  # distance between rows of all arrays but x
    x: np.ndarray
    dy: np.ndarray
    mask: np.ndarray | None
    residual: np.ndarray | None
    gamma: np.ndarray | None
    beta: np.ndarray | None
    state: dict[str, np.ndarray]

    @property
    def batch(self) -> bool:
        return self.case.mode == "train"


def _prepare(case: Case, data: Data, gaps: bool) -> _Step:
    layout = make_layout(case.shape, case.axis, case.ghost if case.mode == "train" else None)
    x = _place(data.x, case, gaps)
    strides = tuple(n // x.itemsize for n in x.strides)
    geometry = find_geometry(layout, strides if x.size else row_major_strides(case.shape))
    assert geometry is not None, "refuse() leaves no such case"
    mask, view = _view_mask(data.mask, layout, geometry)
    plan = extension.make_plan(
        layout,
        geometry,
        case.dtype,
        case.activation,
        case.zeroed,
        view,
        1 if mask is None else mask.itemsize,
        0,
    )
    work = "float64" if case.dtype == "float64" else "float32"
    state = {f: _cast(a, work) for f, a in data.state._asdict().items() if a is not None}
    state["batches"] = np.array([data.state.batches], np.int64)
    row = row_distance(geometry, case.shape, row_major_strides(case.shape))
    return _Step(
        case,
        plan,
        geometry.dense if row is None else row,
        x,
        _cast(data.dy, case.dtype),
        mask,
        _maybe(data.residual, case.dtype),
        _maybe(data.gamma, work),
        _maybe(data.beta, work),
        state,
    )


def _view_mask(mask: Any, layout: Layout, geometry: Geometry) -> tuple[np.ndarray | None, Any]:
    """The mask in memory that the kernels can walk, and its view."""
    if mask is None:
        return None, None
    shape = layout.mask_shape(mask.shape)
    mask = np.ascontiguousarray(mask.reshape(shape))
    view = view_mask(geometry, layout.shape, shape, row_major_strides(shape))
    if view is None:
        shape = row_mask_shape(layout)
        mask = np.ascontiguousarray(np.broadcast_to(mask, shape))
        view = view_mask(geometry, layout.shape, shape, row_major_strides(shape))
    return mask, view


def _forward(step: _Step, halves: bool) -> tuple[np.ndarray, _cpu.Kept]:
    case, plan = step.case, step.plan
    y = _poisoned(case)
    types = {"gamma_type": _type(step.gamma), "beta_type": _type(step.beta)}
    state = extension.State(
        gamma=_address(step.gamma),
        beta=_address(step.beta),
        **types,
        running_type=_type(step.state["mean"]),
        batches=_address(step.state["batches"]),
        **{name: _address(step.state.get(f)) for f, name in _RUNNING.items()},
    )
    kept = None
    if halves and step.batch:
        kept = plan.moments(x=_address(step.x), mask=_address(step.mask), threads=_THREADS)
    decay, renorm = _decays(case)
    kept = plan.forward(
        x=_address(step.x),
        mask=_address(step.mask),
        y=_address(y),
        residual=_address(step.residual),
        residual_row=step.row,
        state=state,
        eps=case.eps,
        decay=decay,
        batch=step.batch,
        update=step.batch and case.update,
        unbiased=True,
        renorm=extension.make_renorm(renorm if step.batch else None),
        threads=_THREADS,
        kept=kept,
    )
    return y, kept


def _decays(case: Case) -> tuple[float, Renorm | None]:
    """The decay, negative for the cumulative average, and renormalization's numbers."""
    renorm = None if case.renorm is None else Renorm(0.99, **case.renorm)
    if case.debias:
        steps = case.steps + 1
        decay = None if case.decay is None else debiased_decay(case.decay, steps, Scalars)
        if renorm is not None:
            renorm = replace(renorm, decay=debiased_decay(renorm.decay, steps, Scalars))
        return -1.0 if decay is None else decay, renorm
    return -1.0 if case.decay is None else case.decay, renorm


def _backward(step: _Step, y: np.ndarray, kept: _cpu.Kept, halves: bool) -> list[Any]:
    """dx, dgamma, dbeta and the residual's gradient."""
    case, plan = step.case, step.plan
    dx, work = _poisoned(case), "float64" if case.dtype == "float64" else "float32"
    dgamma, dbeta = (np.full(case.channels, np.nan, work) for _ in range(2))
    changed = step.residual is not None and (case.activation is not None or case.zeroed)
    dresidual = _poisoned(case) if changed else None
    rows: dict[str, Any] = {
        "dy": _address(step.dy),
        "dy_row": step.row,
        "x": _address(step.x),
        "y": _address(y) if step.residual is not None else 0,
        "mask": _address(step.mask),
        "dresidual": _address(dresidual),
        "kept": kept,
        "threads": _THREADS,
    }
    parameters: dict[str, Any] = {
        "dgamma": _address(dgamma),
        "dgamma_type": _type(dgamma),
        "dbeta": _address(dbeta),
        "dbeta_type": _type(dbeta),
    }
    if halves and step.batch:
        sums = plan.reduce(**rows, **parameters)
        plan.apply(**rows, dx=_address(dx), sums=sums)
    else:
        plan.backward(**rows, **parameters, dx=_address(dx), batch=step.batch)
    if step.residual is not None and not changed:
        dresidual = step.dy
    return [dx, dgamma, dbeta, dresidual]


# Memory. NumPy has no bfloat16: such arrays are its bits.


def _cast(a: Any, dtype: str) -> np.ndarray:
    """A float64 array, whose values `dtype` can hold, in that type."""
    a = np.asarray(a)
    if dtype != "bfloat16":
        return np.ascontiguousarray(a.astype(dtype))
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32) >> np.uint32(16)
    return bits.astype(np.uint16).reshape(a.shape)


def _wide(a: np.ndarray) -> np.ndarray:
    if a.dtype == np.uint16:
        a = (a.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return a[0] if a.dtype == np.int64 else a.astype(np.float64)


def _maybe(a: Any, dtype: str) -> np.ndarray | None:
    return None if a is None else _cast(a, dtype)


def _place(a: np.ndarray, case: Case, gaps: bool) -> np.ndarray:
    """`a` in dense memory, or in memory with gaps before the channels of each position."""
    dense = _cast(a, case.dtype)
    if not gaps or a.size == 0:
        return dense
    outer, rest = a.shape[: case.axes[0]], math.prod(a.shape[case.axes[0] :])
    memory = np.full((math.prod(outer), rest + _GAP), _cast(np.nan, case.dtype), dense.dtype)
    memory[:, :rest] = dense.reshape(-1, rest)
    rows = [step * memory.strides[0] for step in row_major_strides(outer)]
    strides = (*rows, *dense.strides[len(outer) :])
    return np.lib.stride_tricks.as_strided(memory, a.shape, strides)


def _poisoned(case: Case) -> np.ndarray:
    """Memory for an output, full of NaN."""
    return _cast(np.full(case.shape, np.nan), case.dtype)


def _address(a: np.ndarray | None) -> int:
    return 0 if a is None else a.ctypes.data


def _type(a: np.ndarray | None) -> int:
    return TYPES["float32" if a is None else str(a.dtype)]
