"""The specification in float64 numpy: the oracle that every other path is tested against."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from batchnorm.core import config
from batchnorm.core.backward import backward_batch, backward_running
from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.core.forward import Inputs, Outcome, forward_batch, forward_running
from batchnorm.core.layout import Layout, check_mask_values, check_per_channel, make_layout
from batchnorm.core.moments import Moments
from batchnorm.core.running import Running
from batchnorm.numpy_namespace import XP

__all__ = ["batch_norm", "batch_norm_gradient"]


@names_errors("batch_norm")
def batch_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    mask: Any = None,
    axis: int | tuple[int, ...] = -1,
    eps: float = 1e-5,
    training: bool = True,
    running_mean: Any = None,
    running_var: Any = None,
    virtual_batch_size: int | None = None,
    renorm_mean: Any = None,
    renorm_stddev: Any = None,
    renorm_clipping: dict[str, float] | None = None,
    adjustment: config.Adjustment | None = None,
    residual: Any = None,
    activation: str | None = None,
    padded_output: str = "normalize",
) -> tuple[Any, Moments]:
    """Normalize x over every axis that is not a channel axis, in float64.

    Args:
        x: real floating array of any shape with at least one axis beside the channel axes.
        gamma: scale, of the channel axes' sizes (one axis: `(C,)`); None is 1.
        beta: offset, shaped like gamma; None is 0.
        mask: booleans, or integers of 1 and 0, for real rows and padding: shape of x without
            its channel axes, a prefix of that, or x's rank with sizes of x or 1 (S1).
        axis: channel axis or axes.
        eps: added to the variance, at least 0.
        training: normalize by x's own moments; False: by the running statistics, or by x's own
            moments if there are none.
        running_mean: shaped like gamma; in training it serves channels without real rows (S6).
        running_var: like running_mean; both or neither.
        virtual_batch_size: samples of one ghost batch (S12); training only.
        renorm_mean: moving mean of batch renormalization (S11); training only.
        renorm_stddev: moving standard deviation of it; both or neither.
        renorm_clipping: any of rmin, rmax, dmax.
        adjustment: function of x's shape that returns (s, t) (S13); training only.
        residual: added before the activation, of x's shape (S18).
        activation: None, "relu" or "leaky_relu" (S18).
        padded_output: padded rows of y: "normalize", as real ones; "zero", exactly 0 (S4).

    Returns:
        y of x's shape, and the batch's `Moments(count, mean, var)`, shaped like gamma (with
        ghost batches `(groups, ...)`; zeros when not normalizing by the batch). float64.

    Raises:
        TypeError: an integer or complex x, a floating mask, an option of the wrong type.
        ValueError: shapes or options that do not fit; a mask of other integers.

    Source: S1-S8, S11-S13, S18; Ioffe and Szegedy 2015, algorithm 1.

    >>> import numpy as np
    >>> y, moments = batch_norm([[1.0], [3.0], [99.0]], mask=[True, True, False], eps=0.0)
    >>> y[:2].ravel().tolist(), moments.mean.tolist(), moments.var.tolist()
    ([-1.0, 1.0], [2.0], [1.0])
    """
    call = _prepare(_Arguments(**locals()))
    y = _run(call)
    if isinstance(y, Outcome):
        return y.y, y.moments(call.layout, XP)
    zeros = np.zeros(call.layout.channels)
    return y, Moments(zeros, zeros, zeros)


@names_errors("batch_norm_gradient")
def batch_norm_gradient(
    dy: Any,
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    mask: Any = None,
    axis: int | tuple[int, ...] = -1,
    eps: float = 1e-5,
    training: bool = True,
    running_mean: Any = None,
    running_var: Any = None,
    virtual_batch_size: int | None = None,
    renorm_mean: Any = None,
    renorm_stddev: Any = None,
    renorm_clipping: dict[str, float] | None = None,
    adjustment: config.Adjustment | None = None,
    residual: Any = None,
    activation: str | None = None,
    padded_output: str = "normalize",
) -> tuple[Any, Any, Any]:
    """The gradient of `batch_norm`'s y, in float64 and closed form.

    Arguments that are not listed are those of `batch_norm`.

    Args:
        dy: gradient with respect to y, of x's shape; ignored at padded rows.
        x: as in `batch_norm`.
        gamma: as in `batch_norm`.
        beta: as in `batch_norm`; matters only with an activation.
        residual: as in `batch_norm`; its own gradient is the one that reaches the activation.
        activation: as in `batch_norm`.

    Returns:
        dx of x's shape, zero at padded rows; dgamma and dbeta, shaped like gamma. float64.

    Raises:
        TypeError: as `batch_norm`.
        ValueError: as `batch_norm`; dy's shape is not x's.

    Source: S8.

    >>> dx, dgamma, dbeta = batch_norm_gradient([[1.0], [0.0]], [[1.0], [3.0]], eps=0.0)
    >>> dx.ravel().tolist(), dgamma.tolist(), dbeta.tolist()
    ([0.0, 0.0], [-1.0], [1.0])
    """
    arguments = dict(locals())
    del arguments["dy"]
    call = _prepare(_Arguments(**arguments))
    dy = _like_x("dy", dy, call.layout.shape)
    result = _run(call)
    with np.errstate(all="ignore"):
        if isinstance(result, Outcome):
            found = backward_batch(dy, call.inputs, result, call.layout, call.options, xp=XP)
        else:
            assert call.running is not None
            found = backward_running(
                dy, result, call.inputs, call.running, call.layout, call.options, xp=XP
            )
    return found.dx, found.dgamma, found.dbeta


class _Arguments(NamedTuple):
    """The arguments of a reference function, as users give them."""

    x: Any
    gamma: Any
    beta: Any
    mask: Any
    axis: Any
    eps: Any
    training: Any
    running_mean: Any
    running_var: Any
    virtual_batch_size: Any
    renorm_mean: Any
    renorm_stddev: Any
    renorm_clipping: Any
    adjustment: Any
    residual: Any
    activation: Any
    padded_output: Any


class _Call(NamedTuple):
    """The same, checked and in the core's terms."""

    inputs: Inputs
    running: Running | None
    layout: Layout
    options: config.Options
    by_running: bool


def _prepare(given: _Arguments) -> _Call:
    training = config.check_flag("training", given.training)
    size = config.check_virtual_batch_size(given.virtual_batch_size)
    adjustment = config.check_adjustment(given.adjustment, size)
    _check_pair(running_mean=given.running_mean, running_var=given.running_var)
    _check_pair(renorm_mean=given.renorm_mean, renorm_stddev=given.renorm_stddev)
    x = _floating("x", given.x)
    layout = make_layout(x.shape, given.axis, size if training else None)
    options = config.Options(
        eps=config.check_number("eps", given.eps, 0.0),
        renorm=config.check_renorm(given.renorm_mean is not None, given.renorm_clipping, 1.0),
        activation=config.check_activation(given.activation),
        padded_output=config.check_padded_output(given.padded_output),
    )
    s, t = config.call_adjustment(adjustment if training else None, layout.shape)
    inputs = Inputs(
        x,
        _boolean(given.mask),
        _per_channel("gamma", given.gamma, layout),
        _per_channel("beta", given.beta, layout),
        None if given.residual is None else _like_x("residual", given.residual, x.shape),
        s=None if s is None else np.asarray(s, np.float64),
        t=None if t is None else np.asarray(t, np.float64),
    )
    by_running = not training and given.running_mean is not None
    return _Call(inputs, _make_running(given, layout), layout, options, by_running)


def _make_running(given: _Arguments, layout: Layout) -> Running | None:
    """The running statistics; renormalization's alone imply mean 0 and variance 1."""
    mean = _per_channel("running_mean", given.running_mean, layout)
    var = _per_channel("running_var", given.running_var, layout)
    renorm_mean = _per_channel("renorm_mean", given.renorm_mean, layout)
    stddev = _per_channel("renorm_stddev", given.renorm_stddev, layout)
    if mean is None:
        if renorm_mean is None:
            return None
        mean, var = np.zeros(layout.channels), np.ones(layout.channels)
    return Running(mean, var, None, stddev, renorm_mean, stddev)


def _run(call: _Call) -> Any:
    """y by the running statistics, or the Outcome by the batch's own."""
    forward: Any = forward_running if call.by_running else forward_batch
    with np.errstate(all="ignore"):  # NaN and inf in x are data, not errors
        return forward(call.inputs, call.running, call.layout, call.options, xp=XP)


def _per_channel(name: str, a: Any, layout: Layout) -> Any:
    array = None if a is None else _floating(name, a)
    check_per_channel(name, array, layout)
    return array


def _floating(name: str, a: Any) -> Any:
    array = np.asarray(a)
    if not np.issubdtype(array.dtype, np.floating):
        raise ArgumentTypeError(
            f"{name} must be a real floating array; got dtype {array.dtype}. "
            "Convert it, for instance with np.asarray(a, np.float64)."
        )
    return array.astype(np.float64)


def _like_x(name: str, a: Any, shape: tuple[int, ...]) -> Any:
    array = _floating(name, a)
    if array.shape != shape:
        raise ArgumentValueError(f"{name} must have x's shape {shape}; got {array.shape}.")
    return array


def _boolean(mask: Any) -> Any:
    if mask is None:
        return None
    array = np.asarray(mask)
    if array.dtype != np.bool_ and not np.issubdtype(array.dtype, np.integer):
        raise ArgumentTypeError(
            f"mask must be boolean or integer; got dtype {array.dtype}. "
            "Compare it with 0 first: mask != 0."
        )
    if array.dtype != np.bool_:
        check_mask_values(array)
    return array != 0


def _check_pair(**pair: Any) -> None:
    (first, a), (second, b) = pair.items()
    if (a is None) != (b is None):
        missing, given = (first, second) if a is None else (second, first)
        raise ArgumentValueError(f"{given} needs {missing} beside it; got None. Give both.")
