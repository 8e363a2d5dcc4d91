"""The expected result of a case: the float64 core, over numpy."""

from __future__ import annotations

import numpy as np

import batchnorm
from batchnorm.core.config import Options, Renorm
from batchnorm.core.forward import Inputs, forward_batch, forward_running
from batchnorm.core.layout import make_layout
from batchnorm.core.normalize import activation_gradient
from batchnorm.core.running import Running
from batchnorm.numpy_namespace import XP
from cases import Case, Data, Result, State


def expect(case: Case, data: Data, *, unbiased: bool) -> Result:
    """y and state from the core's forward pass; gradients from the public reference."""
    renorm = None if case.renorm is None else Renorm(0.99, **case.renorm)
    training = case.mode == "train"
    options = Options(
        eps=case.eps,
        decay=case.decay,
        unbiased=unbiased,
        renorm=renorm,
        activation=case.activation,
        padded_output=case.padded_output,
    )
    layout = make_layout(case.shape, case.axis, case.ghost if training else None)
    mask = None if data.mask is None else data.mask != 0
    s, t = (data.s, data.t) if training else (None, None)
    inputs = Inputs(data.x, mask, data.gamma, data.beta, data.residual, s, t)
    running = Running(*data.state)._replace(batches=np.asarray(data.state.batches))
    with np.errstate(invalid="ignore"):
        if training:
            outcome = forward_batch(inputs, running, layout, options, xp=XP)
            y, state = outcome.y, State(*outcome.running)
        else:
            y, state = forward_running(inputs, running, layout, options, xp=XP), data.state
    dx, dgamma, dbeta = batchnorm.batch_norm_gradient(
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
    return Result(
        y,
        dx,
        None if data.gamma is None else dgamma,
        None if data.beta is None else dbeta,
        state,
        dresidual,
    )
