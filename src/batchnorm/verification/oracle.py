"""The expected result of a case: the float64 core, over numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchnorm.core.accumulate import average_of_step, contribution, merge_passes
from batchnorm.core.config import Options, Renorm
from batchnorm.core.forward import Inputs, forward_batch, forward_running, move_by_average
from batchnorm.core.layout import make_layout
from batchnorm.core.merge import Parts
from batchnorm.core.normalize import activation_gradient
from batchnorm.core.running import BatchAverage, Running
from batchnorm.numpy_namespace import XP
from batchnorm.reference import batch_norm_gradient
from batchnorm.verification.cases import Case, Data, Result, State, split


def expect(case: Case, data: Data, *, unbiased: bool) -> Result:
    """y and state from the core's forward pass; gradients from the public reference."""
    if case.single_value == "running":
        case = replace(case, mode="eval")
    elif case.single_value == "beta":
        case = replace(case, update=False)
    if case.passes == 1:
        return _expect(case, data, unbiased)[0]
    found, averages = zip(*(_expect(*part, unbiased) for part in split(case, data)), strict=True)
    y, dx, dresidual = (
        None if a is None else np.concatenate(a) for a in (_column(found, f) for f in _ROWS)
    )
    dgamma, dbeta = (None if a is None else sum(a) for a in (_column(found, f) for f in _SUMS))
    return Result(y, dx, dgamma, dbeta, _step(case, data, averages, unbiased), dresidual)


_ROWS, _SUMS = ("y", "dx", "dresidual"), ("dgamma", "dbeta")


def _column(found: Sequence[Result], field: str) -> list[np.ndarray] | None:
    values = [getattr(one, field) for one in found]
    return None if values[0] is None else values


def _step(case: Case, data: Data, averages: Sequence[BatchAverage | None], unbiased: bool) -> State:
    """The state after all passes."""
    if case.mode != "train" or not case.update:
        return data.state
    options, pooled = _options(case, unbiased), case.ghost is not None
    parts = [
        contribution(a, pooled, unbiased and options.renorm is None, XP)
        for a in averages
        if a is not None
    ]
    stacked = Parts(*(np.stack(column) for column in zip(*parts, strict=True)))
    with np.errstate(invalid="ignore"):
        average = average_of_step(merge_passes(stacked, pooled, XP), pooled, XP)
    layout = make_layout(case.shape, case.axis, case.ghost)
    moved: Any = move_by_average(_running(data), average, layout, options, XP)
    return State(*moved)


def _options(case: Case, unbiased: bool) -> Options:
    renorm = None if case.renorm is None else Renorm(0.99, **case.renorm)
    return Options(
        eps=case.eps,
        decay=case.decay,
        unbiased=unbiased,
        renorm=renorm,
        activation=case.activation,
        padded_output=case.padded_output,
        debias=case.debias,
    )


def _running(data: Data) -> Running:
    return Running(*data.state)._replace(batches=np.asarray(data.state.batches))


def _expect(case: Case, data: Data, unbiased: bool) -> tuple[Result, BatchAverage | None]:
    """The result of one pass, and the moments by which the running statistics move."""
    training, options = case.mode == "train", _options(case, unbiased)
    layout = make_layout(case.shape, case.axis, case.ghost if training else None)
    mask = None if data.mask is None else data.mask != 0
    s, t = (data.s, data.t) if training else (None, None)
    inputs = Inputs(data.x, mask, data.gamma, data.beta, data.residual, s, t)
    running, average = _running(data), None
    with np.errstate(invalid="ignore"):
        if training:
            outcome = forward_batch(inputs, running, layout, options, update=case.update, xp=XP)
            moved: Any = outcome.running
            y, state, average = outcome.y, State(*moved), outcome.average
        else:
            y, state = forward_running(inputs, running, layout, options, xp=XP), data.state
    dx, dgamma, dbeta = batch_norm_gradient(
        data.dy,
        data.x,
        data.gamma,
        data.beta,
        mask=mask,
        axis=case.axis,
        eps=case.eps,
        training=training,
        running_mean=data.state.mean,
        running_var=data.state.var,
        virtual_batch_size=case.ghost,
        renorm_mean=data.state.renorm_mean,
        renorm_stddev=data.state.renorm_stddev,
        renorm_clipping=case.renorm,
        adjustment=(lambda shape: (data.s, data.t)) if case.adjusted else None,
        residual=data.residual,
        activation=case.activation,
        padded_output=case.padded_output,
    )
    dresidual = None
    if case.residual:
        dresidual = activation_gradient(data.dy, y, case.activation, XP)
        if case.zeroed:
            dresidual = np.where(data.real, dresidual, 0.0)
    result = Result(
        y,
        dx,
        None if data.gamma is None else dgamma,
        None if data.beta is None else dbeta,
        state,
        dresidual,
    )
    return result, average
