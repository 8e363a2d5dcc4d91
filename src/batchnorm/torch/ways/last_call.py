"""A layer's latest calls, repeated without their checks while nothing that these look at changes.

A step on a small tensor is a matter of microseconds, most of which would go into checks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from batchnorm.core import config
from batchnorm.core.running import Running
from batchnorm.torch import masking
from batchnorm.torch.kernels import autograd, on_cpu, step
from batchnorm.torch.kernels.decision import Decision, decide
from batchnorm.torch.kernels.tensors import is_plain, refuse_tensors
from batchnorm.torch.recompute import in_backward
from batchnorm.torch.tracing import untraced

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


class LastCalls:
    """The inputs that a layer has seen lately, and shortcuts for those that come again.

    A shortcut takes time to make, so that an input must come twice, and after a shortcut that
    was of no use more often.
    """

    _INPUTS = 8  # kinds of input that are remembered: all are forgotten when there are more
    _MOST = 64  # calls that an input is waited for at most

    __slots__ = ("_known", "_patience")

    def __init__(self) -> None:
        self._known: dict[Any, LastCall | int] = {}  # or how often the input must come yet
        self._patience = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled layer begins anew."""
        return LastCalls, ()

    @untraced
    def find_key(self, layer: BatchNorm, x: Tensor) -> Any:
        """The kind of input that x is; None where no shortcut leads."""
        if not is_plain(x) or masking.in_use() or layer._masked_by_context or in_backward():
            return None
        return x.shape, x.stride(), x.dtype, layer.training, x.is_cpu

    @untraced
    def repeat(self, layer: BatchNorm, x: Tensor, key: Any) -> Tensor | None:
        """y by the shortcut for inputs of this kind, or None."""
        shortcut = self._known.get(key)
        if type(shortcut) is not LastCall:
            return None
        y: Tensor | None = shortcut.repeat(layer, x)
        if y is None:
            self._patience = min(2 * self._patience, self._MOST)
            self._known[key] = self._patience
        return y

    def learn(self, layer: BatchNorm, x: Tensor, key: Any, options: config.Options) -> None:
        """Remember an input of this kind that has just gone the whole way."""
        known = self._known
        left = known.get(key)
        if left is None:
            if len(known) >= self._INPUTS:
                known.clear()
            known[key] = self._patience
        elif isinstance(left, LastCall):
            return
        elif left > 1:
            known[key] = left - 1
        else:
            known[key] = find_last_call(layer, x, options) or self._MOST


class LastCall:
    """The way one call went: through the kernels, without mask, residual or renormalization."""

    __slots__ = (
        "addresses",
        "batch",
        "decision",
        "options",
        "running",
        "seen",
        "settings",
        "tensors",
        "update",
    )

    def __init__(
        self,
        layer: BatchNorm,
        state: tuple[Tensor | None, ...],
        decision: Decision,
        options: config.Options,
        batch: bool,
        update: bool,
    ) -> None:
        weight, bias, *statistics = state
        self.settings = _settings(layer)
        # What may change about a tensor that stays the same object.
        self.seen = [(a, (a.data_ptr(), a.dtype, a.shape)) for a in state if a is not None]
        self.tensors = state
        self.running = None if statistics[0] is None else Running(*statistics)
        self.addresses = on_cpu.find_state(weight, bias, self.running)
        self.decision, self.options = decision, options
        self.batch, self.update = batch, update

    def repeat(self, layer: BatchNorm, x: Tensor) -> Tensor | None:
        """y for an input of the same kind, or None if anything else is not as it was."""
        if _settings(layer) != self.settings:
            return None
        state = _state(layer)
        if state is None:
            return None
        for a, kept in zip(state, self.tensors, strict=True):
            if a is not kept:
                return None
        for a, seen in self.seen:
            if (
                (a.data_ptr(), a.dtype, a.shape) != seen
                or a.is_neg()
                or not a.is_contiguous()
                or (a.requires_grad and a is not state[0] and a is not state[1])
            ):
                return None
        call = step.KernelStep(
            self.decision,
            None,
            self.running,
            self.addresses,
            self.options,
            self.batch,
            self.update,
            False,
            None,
        )
        return autograd.run(call, x, state[0], state[1], None)


def find_last_call(layer: BatchNorm, x: Tensor, options: config.Options) -> LastCall | None:
    """The shortcut for calls like the one that x has just been through, or None."""
    state = _state(layer)
    if state is None or layer.fused is False or options.renorm is not None:
        return None
    if not is_plain(x) or not x.is_cpu:
        return None
    training = layer.training and not layer.frozen
    if training and layer.synchronized:
        return None
    decision = decide(
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
    weight, bias, *statistics = state
    running = None if statistics[0] is None else Running(*statistics)
    if (
        decision.kernel != "cpu"
        or decision.plan is None
        or refuse_tensors(x, (weight, bias), running) is not None
    ):
        return None
    if any(a is not None and not a.is_contiguous() for a in (weight, bias)):
        return None
    if any(a is not None and (a.requires_grad or a.is_inference()) for a in statistics):
        return None
    batch = training or running is None
    update = training and running is not None and layer.track_running_stats
    return LastCall(layer, state, decision, options, batch, update)
