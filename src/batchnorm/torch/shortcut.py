"""A layer's last call, repeated without its checks while nothing that they look at has changed.

A step on a small tensor is a matter of microseconds, most of which would go into checks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.running import Running
from batchnorm.torch import compiled, fused, masking, steps
from batchnorm.torch.runtime import untraced

if TYPE_CHECKING:
    from batchnorm.torch.layers import BatchNorm


def _settings(layer: BatchNorm) -> tuple[Any, ...]:
    """Everything but tensors that a call depends on; users may assign any of it."""
    return (
        layer.training,
        layer.frozen,
        layer.eps,
        layer.momentum,
        layer.axis,
        layer.num_features,
        layer.track_running_stats,
        layer.virtual_batch_size,
        layer.renorm,
        layer.adjustment,
        layer.activation,
        layer.fused,
        layer.synchronized,
    )


def _state(layer: BatchNorm) -> tuple[Tensor | None, ...] | None:
    """The layer's tensors; None where one of them is computed anew for each call."""
    parameters, buffers = layer._parameters, layer._buffers
    try:
        return (
            parameters["weight"],
            parameters["bias"],
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"],
        )
    except KeyError:
        return None


def _no_shortcut() -> None:
    return None


class Shortcut:
    """The way one call went: through the kernels, without mask, residual or renormalization."""

    __slots__ = (
        "addresses",
        "batch",
        "input",
        "options",
        "prepared",
        "running",
        "settings",
        "tensors",
        "update",
    )

    def __init__(
        self,
        layer: BatchNorm,
        x: Tensor,
        state: tuple[Tensor | None, ...],
        prepared: fused.Prepared,
        options: config.Options,
        batch: bool,
        update: bool,
    ) -> None:
        weight, bias, *statistics = state
        self.settings = _settings(layer)
        self.input = (x.shape, x.stride(), x.dtype)
        # What may change about a tensor that stays the same object.
        self.tensors = [(a, None if a is None else (a.data_ptr(), a.dtype, a.shape)) for a in state]
        self.running = None if statistics[0] is None else Running(*statistics)
        self.addresses = compiled.find_state(weight, bias, self.running)
        self.prepared, self.options = prepared, options
        self.batch, self.update = batch, update

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled layer finds its own."""
        return _no_shortcut, ()

    @untraced
    def repeat(self, layer: BatchNorm, x: Tensor) -> Tensor | None:
        """y, or None if anything is not as it was."""
        if (
            not fused.is_plain(x)
            or not x.is_cpu
            or (x.shape, x.stride(), x.dtype) != self.input
            or _settings(layer) != self.settings
            or masking.in_use()
            or layer._masked_by_context
            or torch._C._current_graph_task_id() != -1
        ):
            return None
        state = _state(layer)
        if state is None:
            return None
        for a, (kept, seen) in zip(state, self.tensors, strict=True):
            if a is not kept:
                return None
            if a is not None and (
                (a.data_ptr(), a.dtype, a.shape) != seen or not a.is_contiguous()
            ):
                return None
        call = steps.Call(
            self.prepared,
            None,
            self.running,
            self.addresses,
            self.options,
            self.batch,
            self.update,
            False,
            None,
        )
        return fused.run(call, x, state[0], state[1], None)


def find_shortcut(layer: BatchNorm, x: Tensor, options: config.Options) -> Shortcut | None:
    """The shortcut for calls like the one that x has just been through, or None."""
    state = _state(layer)
    if state is None or layer.fused is False or options.renorm is not None:
        return None
    if not fused.is_plain(x) or not x.is_cpu:
        return None
    training = layer.training and not layer.frozen
    if training and layer.synchronized:
        return None
    prepared = fused.prepare(
        type(layer).__name__,
        x.shape,
        x.stride(),
        x.dtype,
        layer.axis,
        options.virtual_batch_size if training else None,
        training and layer.adjustment is not None,
        options.activation,
        None,
    )
    weight, bias, mean, var, batches = state
    running = None if mean is None else Running(mean, var, batches)
    if (
        prepared.kernel != "cpu"
        or prepared.plan is None
        or fused.refuse_tensors(x, (weight, bias), running) is not None
    ):
        return None
    if any(a is not None and not a.is_contiguous() for a in (weight, bias)):
        return None
    batch = training or running is None
    update = training and running is not None and layer.track_running_stats
    return Shortcut(layer, x, state, prepared, options, batch, update)
