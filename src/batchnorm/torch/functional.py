"""Batch normalization as a function of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.core import config
from batchnorm.core.layout import Layout, check_per_channel, count_values, make_layout
from batchnorm.core.running import Running
from batchnorm.kernels.select import refuse_fused
from batchnorm.torch import checks, jagged
from batchnorm.torch.call import Call, Mode, Parameters
from batchnorm.torch.kernels.decision import decide
from batchnorm.torch.kernels.tensors import is_plain
from batchnorm.torch.ranks.synchronizer import Synchronizer, find_synchronizer, participate
from batchnorm.torch.ways.array_code import by_array
from batchnorm.torch.ways.eager_kernels import by_kernel
from batchnorm.torch.ways.graph_operators import by_operator

__all__ = ["RenormStatistics", "batch_norm"]

_BATCHES = "num_batches_tracked"
_STATISTICS = (
    "running_mean",
    "running_var",
    _BATCHES,
    "running_stddev",
    *("renorm statistics",) * 2,
)


class RenormStatistics(NamedTuple):
    """Running statistics of batch renormalization, each per channel, updated in place (S11)."""

    running_stddev: Tensor
    renorm_mean: Tensor
    renorm_stddev: Tensor


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
    owner = "batch_norm"
    config.check_flag(owner, "training", training)
    if (running_mean is None) != (running_var is None):
        raise ValueError(
            f"{owner}: running_mean and running_var go together; got None for one of them. "
            "Give both, or neither."
        )
    size = config.check_virtual_batch_size(owner, virtual_batch_size)
    options = config.Options(
        eps=config.check_number(owner, "eps", eps, 0.0),
        decay=1.0 - config.check_number(owner, "momentum", momentum, 0.0, 1.0),
        unbiased=True,
        virtual_batch_size=size,
        renorm=config.check_renorm(
            owner,
            renorm is not None,
            renorm_clipping,
            1.0 - config.check_number(owner, "renorm_momentum", renorm_momentum, 0.0, 1.0),
        ),
        activation=config.check_activation(owner, activation),
    )
    running = None
    if running_mean is not None:
        running = Running(running_mean, running_var, None, *(renorm or (None, None, None)))
    elif renorm is not None:
        raise ValueError(f"{owner}: renorm needs running_mean and running_var; got None.")
    return normalize(
        checks.check_input(owner, input),
        mask,
        Parameters(weight, bias),
        residual,
        running,
        axis=axis,
        options=options,
        adjustment=config.check_adjustment(owner, adjustment, size),
        fused=config.check_fused(owner, fused),
        mode=Mode(own_statistics=training or running is None, training=training, update=training),
        owner=owner,
        synchronizer=find_synchronizer(owner, synchronized, process_group),
    )


def normalize(
    x: Tensor,
    mask: Any,
    parameters: Parameters,
    residual: Any,
    running: Running | None,
    *,
    axis: int | tuple[int, ...],
    options: config.Options,
    adjustment: config.Adjustment | None,
    fused: bool | None,
    mode: Mode,
    owner: str,
    synchronizer: Synchronizer | None = None,
) -> Tensor:
    """`batch_norm` with options already validated, for the layers too."""
    if x.layout is torch.jagged:
        return jagged.normalize_values(
            normalize,
            x,
            mask,
            residual,
            parameters=parameters,
            running=running,
            axis=axis,
            options=options,
            adjustment=adjustment,
            fused=fused,
            mode=mode,
            owner=owner,
            synchronizer=synchronizer,
        )
    mask = checks.check_mask(owner, mask, x.device)
    size = options.virtual_batch_size if mode.training else None
    adjustment = adjustment if mode.training else None
    decision = None
    if fused is not False and is_plain(x):
        decision = decide(
            owner,
            x.shape,
            x.stride(),
            x.dtype,
            axis,
            size,
            adjustment is not None,
            options.activation,
            None if mask is None else (mask.shape, mask.stride(), mask.element_size()),
            x.device.type,
            fused is True,
        )
        layout = decision.layout
    else:
        layout = make_layout(owner, tuple(x.shape), axis, size)
    _check_shapes(owner, x, mask, parameters, residual, running, layout, mode, synchronizer)
    part = None
    if synchronizer is not None and mode.training:
        part = participate(synchronizer, owner, layout, options, mask)
    call = Call(
        x, mask, parameters, residual, running, layout, options, adjustment, mode, owner, part
    )
    if fused is not False:
        compiling = torch.compiler.is_compiling()
        y = by_operator(call, fused is True) if compiling else by_kernel(call, decision)
        if not isinstance(y, str):
            return y
        if fused:
            raise refuse_fused(owner, y)
    return by_array(call)


def _check_shapes(
    owner: str,
    x: Tensor,
    mask: Tensor | None,
    parameters: Parameters,
    residual: Any,
    running: Running | None,
    layout: Layout,
    mode: Mode,
    synchronizer: Synchronizer | None,
) -> None:
    channels = layout.channels
    for name, a in (("weight", parameters.weight), ("bias", parameters.bias)):
        if a is not None:
            if a.shape != channels:
                check_per_channel(owner, name, a, layout)
            if type(a) is not Parameter or a.dtype is not x.dtype or a.layout is not torch.strided:
                checks.check_parameter(owner, name, a)
    if running is not None:
        update = mode.update and not torch.compiler.is_compiling()
        for name, a in zip(_STATISTICS, running, strict=True):
            if a is None:
                continue
            if name is not _BATCHES and (
                a.shape != channels
                or a.dtype not in checks.FLOATING
                or a.requires_grad
                or type(a) is not Tensor
                or a.layout is not torch.strided
            ):
                check_per_channel(owner, name, a, layout)
                checks.check_statistic(owner, name, a)
            if update and a.is_inference():
                checks.check_writable(owner, name, a)
    if residual is not None:
        checks.check_residual(owner, residual, x)
    alone = mode.own_statistics and (synchronizer is None or not mode.training)
    if alone and mask is None and layout.groups is None:
        _check_count(owner, layout)


def _check_count(owner: str, layout: Layout) -> None:
    if count_values(layout) == 1:
        raise ValueError(
            f"{owner}: training needs more than 1 value per channel; got an input of shape "
            f"{layout.shape} with channel axes {layout.channel_axes}. Use a larger batch, "
            "evaluation mode, or a mask."
        )
