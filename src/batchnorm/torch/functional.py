"""Batch normalization as a function of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.errors import ArgumentValueError, names_errors
from batchnorm.core.running import Running
from batchnorm.torch import checks, jagged
from batchnorm.torch.call import Settings, Tensors, make_call
from batchnorm.torch.ranks.synchronizer import find_synchronizer
from batchnorm.torch.ways.choice import run

__all__ = ["RenormStatistics", "batch_norm"]


class RenormStatistics(NamedTuple):
    """Running statistics of batch renormalization, each per channel, updated in place (S11)."""

    running_stddev: Tensor
    renorm_mean: Tensor
    renorm_stddev: Tensor


@names_errors("batch_norm")
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    *,
    axis: int | tuple[int, ...] = 1,
    virtual_batch_size: int | None = None,
    renorm: RenormStatistics | None = None,
    renorm_clipping: Mapping[str, float] | None = None,
    renorm_momentum: float = 0.01,
    adjustment: config.Adjustment | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    padded_output: str = "normalize",
    num_batches_tracked: Tensor | None = None,
    debias: bool = False,
    single_value: str = "raise",
    fused: bool | None = None,
    synchronized: bool = False,
    process_group: Any = None,
) -> Tensor:
    """Normalize the input x over every axis that is not a channel axis, over real rows only.

    Follows `torch.nn.functional.batch_norm`, argument by argument, up to `eps`.

    Args:
        input: x, float16, bfloat16, float32 or float64, of any shape with `axis`; `(N, C, ...)` by
            default. Jagged nested tensors too, with `axis` not the ragged one.
        running_mean: `(C,)` (several axes: their sizes, like `(A, B)`), updated in place in
            training, or None.
        running_var: like running_mean; holds the unbiased variance, as torch's does (S10).
        weight: gamma, `(C,)`, or None for 1.
        bias: beta, `(C,)`, or None for 0.
        training: normalize by the batch's statistics and update the running ones.
        momentum: weight of the *new* value, between 0 and 1, as in torch (1 - decay).
        eps: added to the variance, at least 0.
        mask: bool, or integer with 1 at real rows and 0 at padding: x's shape without its
            channel axes, a prefix of that such as `(N,)`, or x's rank with sizes of x or 1 (S1).
            Padding does not enter the statistics or any gradient (S5, S8). In traced code and on
            a GPU any integer but 0 means real; eager CPU code takes 0 and 1 only.
        axis: channel axis or axes, in any order.
        virtual_batch_size: samples of one ghost batch; training only (S12).
        renorm: statistics of batch renormalization; asks for it in training (S11).
        renorm_clipping: any of "rmin", "rmax", "dmax".
        renorm_momentum: weight of the new value in renorm_mean and renorm_stddev.
        adjustment: function of x's shape returning scale and bias to apply before gamma and
            beta; training only (S13).
        residual: added before the activation, of x's shape (S18).
        activation: None, "relu" or "leaky_relu" (slope 0.01) (S18).
        padded_output: padded rows of y: "normalize", as real ones; "zero", exactly 0 (S4).
        num_batches_tracked: the number of steps that have updated the running statistics, a 0-d
            int64 tensor, updated in place.
        debias: let the running statistics forget their start at the first step, which needs
            num_batches_tracked (S23).
        single_value: the rule for an input whose shape alone gives a single value per channel in
            training: "raise", "beta", or "running" (by the running statistics) (S7).
        fused: None takes the fastest path, True demands a kernel, False plain array code.
        synchronized: in training, normalize by the statistics of all ranks' batches together
            (S14); every rank must make the same calls in the same order.
        process_group: the ranks that take part; None for the default group.

    Returns:
        y, of x's shape, type and memory format; every row, padded ones too, is normalized.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or options that do not fit; a single value per channel in training.
            Nothing is updated then.
        SynchronizationError: another rank failed or did something else. Nothing is updated then.

    Source: S1-S14, S16, S18; Ioffe and Szegedy 2015, algorithm 1. Unlike torch's it is accurate
    at any offset (S3), and no empty or overflowing batch spoils the running statistics (S6, S9).

    >>> x = torch.tensor([[1.0], [3.0], [99.0]])
    >>> mask = torch.tensor([True, True, False])
    >>> batch_norm(x, None, None, training=True, mask=mask, eps=0.0).flatten().tolist()
    [-1.0, 1.0, 97.0]
    """
    config.check_flag("training", training)
    if (running_mean is None) != (running_var is None):
        raise ArgumentValueError(
            "running_mean and running_var go together; got None for one of them. "
            "Give both, or neither."
        )
    size = config.check_virtual_batch_size(virtual_batch_size)
    options = config.Options(
        eps=config.check_number("eps", eps, 0.0),
        decay=1.0 - config.check_number("momentum", momentum, 0.0, 1.0),
        unbiased=True,
        virtual_batch_size=size,
        renorm=config.check_renorm(
            renorm is not None,
            renorm_clipping,
            1.0 - config.check_number("renorm_momentum", renorm_momentum, 0.0, 1.0),
        ),
        activation=config.check_activation(activation),
        padded_output=config.check_padded_output(padded_output),
        debias=config.check_flag("debias", debias),
    )
    if debias and (num_batches_tracked is None or running_mean is None):
        raise ArgumentValueError(
            "debias=True needs running statistics and num_batches_tracked, which counts their "
            "steps; got None."
        )
    running = None
    if running_mean is not None:
        statistics = renorm or (None, None, None)
        running = Running(running_mean, running_var, num_batches_tracked, *statistics)
    elif renorm is not None:
        raise ArgumentValueError("renorm needs running_mean and running_var; got None.")
    checks.check_input(input)
    settings = Settings(
        "batch_norm",
        axis,
        options,
        config.check_adjustment(adjustment, size),
        config.check_fused(fused),
        find_synchronizer(synchronized, process_group),
        single_value=config.check_single_value(single_value),
    )
    tensors = Tensors(input, mask, weight, bias, residual, running)
    return normalize(tensors, settings, training=training, update=training)


def normalize(tensors: Tensors, settings: Settings, *, training: bool, update: bool) -> Tensor:
    """`batch_norm` with options already validated; jagged tensors too."""
    if tensors.x.layout is torch.jagged:
        return jagged.normalize_values(normalize, tensors, settings, training, update)
    return run(make_call(tensors, settings, training, update))
